//! Opens a layer: from its directory where it was before, otherwise from the tail of its blob.
//!
//! Owns: the layer's directory on disk (`layers/<TOC digest>`) and the one ranged request a cold layer costs. May not:
//! know slots or FUSE.
//!
//! ```text
//! layers/<64 hex of the TOC digest>/
//!     index         the mapped index
//!     data/<node>   contents of regular files, sparse until filled
//!     filled        which chunks are verified and on disk
//!     layer.json    {"version":1,"blob_digest":...,"blob_size":...,"tar_split":<digest, if the TOC names one>}
//! ```
//!
//! The directory is keyed by the TOC digest because that is the only digest a lazy layer is verified against: keyed by
//! the blob's, a forged image could poison another's layer. It is the digest that the image names: of the TOC's JSON, or for
//! podman's zstd:chunked of the JSON as it is compressed. One layer that two images name in both ways is kept twice.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use estargz::{Digest, Opener, Position, Step, TocJson, VerifiedToc};
use registry::{HostTag, ReadOptions, Reference, Registry};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    blob::{Source, Sources},
    fetch::{self, Engine},
    graduate,
    index::{Index, IndexError},
    layer::Layer,
    store::{BootId, Durable, Store},
};

/// Why a layer cannot be mounted lazily.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Its blob or manifest cannot be read.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Its blob is not an eStargz or zstd:chunked layer, or its TOC is not one we accept.
    #[error("{blob}: {error}")]
    Format {
        /// The blob's digest.
        blob: String,
        /// What is wrong.
        error: estargz::Error,
    },
    /// Its tree cannot be told from its TOC.
    #[error(
        "{blob}: the TOC holds U+FFFD where the layer has names that are not UTF-8, so they cannot be shown"
    )]
    LossyNames {
        /// The blob's digest.
        blob: String,
    },
    /// A piece of it is too long to be fetched in one request.
    #[error(
        "{blob}: a member of {bytes} bytes is more than the {} that one request may bring",
        registry::MAX_READ
    )]
    MemberTooLong {
        /// The blob's digest.
        blob: String,
        /// The member's bytes.
        bytes: u64,
    },
    /// Its index cannot be written.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Its directory cannot be used.
    #[error("{path}: {error}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Nothing of it is on disk.
    #[error("layer {0} is not on disk")]
    NotLocal(Digest),
    /// It is not a number a slot can have.
    #[error("slot {0} is out of range")]
    Slot(u64),
    /// It was given up before it was filled.
    #[error("slot {0} was given up")]
    Retired(u32),
    /// The daemon lets go of its layers.
    #[error("the daemon is draining")]
    Draining,
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
}

impl AttachError {
    /// The reason code under which it is logged and counted.
    pub fn reason(&self) -> &'static str {
        match self {
            AttachError::Registry(error) => error.reason(),
            AttachError::Format { error: estargz::Error::NotEstargz { .. }, .. } => "not_estargz",
            AttachError::Format { error: estargz::Error::TocDigestMismatch { .. }, .. } => "verify_failed",
            AttachError::Format { .. } => "toc_invalid",
            AttachError::LossyNames { .. } => "lossy_names",
            AttachError::MemberTooLong { .. } => "toc_invalid",
            AttachError::Index(IndexError::Io { source, .. }) => io_reason(source),
            AttachError::Index(_) => "toc_invalid",
            AttachError::Io { error, .. } => io_reason(error),
            AttachError::Draining => "draining",
            AttachError::NotLocal(_)
            | AttachError::Slot(_)
            | AttachError::Retired(_)
            | AttachError::Stopping => "internal",
        }
    }
}

fn io_reason(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::StorageFull { "no_space" } else { "internal" }
}

/// The layer to open.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// The image it was pulled by.
    pub reference: Reference,
    /// Digest of its blob.
    pub blob_digest: String,
    /// Size of its blob in bytes, where known.
    pub blob_size: Option<u64>,
    /// Digest of its TOC, from a source that the image's digest covers.
    pub toc_digest: Digest,
    /// Where its TOC is, if the manifest says so; otherwise the blob's footer does.
    pub toc_position: Option<Position>,
}

/// `layer.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    blob_digest: String,
    blob_size: u64,
    /// Digest of the tar-split, where the TOC names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tar_split: Option<Digest>,
}

const RECORD_VERSION: u32 = 1;

/// How much of a blob's end to read at first. The TOC takes about 1 % of a layer of ordinary files, 4 % of one of
/// tiny files; a read that is too short costs a round trip, one that is too long is not wasted, because the members
/// in it are stored.
fn speculative(blob_size: u64) -> u64 {
    (blob_size / 40).clamp(256 << 10, 4 << 20)
}

/// What opening layers needs.
#[derive(Debug)]
pub struct Resolver {
    layers: PathBuf,
    registry: Registry,
    engine: Arc<Engine>,
    boot: BootId,
}

impl Resolver {
    /// Keeps layers in the directory `layers`.
    pub fn new(layers: PathBuf, registry: Registry, engine: Arc<Engine>, boot: BootId) -> Resolver {
        Resolver { layers, registry, engine, boot }
    }

    /// Where a layer is kept.
    pub fn dir(&self, toc_digest: &Digest) -> PathBuf {
        self.layers.join(toc_digest.hex())
    }

    /// A source for the layer's bytes.
    pub fn source(&self, spec: &LayerSpec, blob_size: Option<u64>) -> Result<Source, AttachError> {
        let blob = self.registry.blob(&spec.reference, &spec.blob_digest, blob_size)?;
        let name = format!("{}/{}@{}", spec.reference.host(), spec.reference.repository(), spec.blob_digest);
        Ok(Source { name: name.into(), blob: Arc::new(blob) })
    }

    /// Opens a layer from its directory alone: no network. Blocking.
    pub fn open_local(&self, spec: &LayerSpec) -> Result<Arc<Layer>, AttachError> {
        let dir = self.dir(&spec.toc_digest);
        let record = fs::read(dir.join("layer.json")).ok();
        let record = record.and_then(|text| serde_json::from_slice::<Record>(&text).ok());
        let Some(record) = record.filter(|r| r.version == RECORD_VERSION) else {
            return Err(AttachError::NotLocal(spec.toc_digest));
        };
        let index = Index::open(&dir.join("index"))?;
        if index.toc_digest() != spec.toc_digest {
            return Err(AttachError::NotLocal(spec.toc_digest));
        }
        // The size on record is that of the blob the index came from; another blob of the same TOC may differ.
        let size = spec.blob_size.or((record.blob_digest == spec.blob_digest).then_some(record.blob_size));
        let source = self.source(spec, size)?;
        self.bond(&dir, index, source, &spec.blob_digest, &record)
    }

    /// Opens a layer from its blob: one ranged request if the blob's size is known and its TOC is not unusually large.
    pub async fn open_remote(
        self: &Arc<Self>,
        spec: &LayerSpec,
        deadline: Instant,
    ) -> Result<Arc<Layer>, AttachError> {
        let mut avoid = None;
        loop {
            match self.try_remote(spec, deadline, avoid.clone()).await {
                Ok(layer) => return Ok(layer),
                // Wrong bytes may be one host's fault; the next one is asked once.
                Err((error, Some(host))) if avoid.is_none() => {
                    tracing::warn!(layer = %spec.toc_digest, %host, %error, "opening failed, asking another host");
                    avoid = Some(host);
                }
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// One attempt; an error that the bytes are to blame for names the host they came from.
    async fn try_remote(
        self: &Arc<Self>,
        spec: &LayerSpec,
        deadline: Instant,
        avoid: Option<HostTag>,
    ) -> Result<Arc<Layer>, (AttachError, Option<HostTag>)> {
        let plain = |error: registry::Error| (AttachError::from(error), None);
        let options = ReadOptions { avoid, ..ReadOptions::until(deadline) };
        let blob = self.registry.blob(&spec.reference, &spec.blob_digest, spec.blob_size).map_err(plain)?;
        if blob.size().is_none() {
            blob.read(0..1, &options).await.map_err(plain)?;
        }
        let size = blob.size().unwrap_or(0);
        let format = |error| AttachError::Format { blob: spec.blob_digest.clone(), error };
        let limits = *self.engine.limits();
        let opener = match spec.toc_position {
            Some(position) => Opener::at(size, position, limits),
            None => Opener::new(size, limits),
        };
        let mut opener = opener.map_err(|e| (format(e), None))?;
        let mut range = opener.tail(speculative(size));
        loop {
            let served = blob.read(range.clone(), &options).await.map_err(plain)?;
            let blame = |error| (format(error), Some(served.host.clone()));
            match opener.feed(range.start, &served.bytes).map_err(blame)? {
                Step::Need(next) => range = next,
                Step::Done(json) => {
                    let (this, job) = (self.clone(), spec.clone());
                    let built = tokio::task::spawn_blocking(move || this.build(&job, json, size)).await;
                    let built = built.unwrap_or_else(|panic| {
                        Err(AttachError::Io {
                            path: self.dir(&spec.toc_digest),
                            error: io::Error::other(panic),
                        })
                    });
                    let layer = match built {
                        Ok(layer) => layer,
                        Err(error @ AttachError::Format { .. }) => {
                            return Err((error, Some(served.host.clone())));
                        }
                        Err(error) => return Err((error, None)),
                    };
                    self.keep_tail(&layer, range.start, served.bytes);
                    return Ok(layer);
                }
            }
        }
    }

    /// Verifies a TOC and makes the layer's directory from it. Blocking.
    fn build(&self, spec: &LayerSpec, json: TocJson, blob_size: u64) -> Result<Arc<Layer>, AttachError> {
        let format = |error| AttachError::Format { blob: spec.blob_digest.clone(), error };
        let toc: VerifiedToc = json.verify(&spec.toc_digest, self.engine.limits()).map_err(format)?;
        if toc.lossy_names() {
            return Err(AttachError::LossyNames { blob: spec.blob_digest.clone() });
        }
        let dir = self.dir(&spec.toc_digest);
        let io = |error| AttachError::Io { path: dir.clone(), error };
        fs::create_dir_all(&dir).map_err(io)?;
        let index = Index::create(&dir.join("index"), &toc)?;
        let bytes = fetch::widest_member(&index);
        if bytes > registry::MAX_READ {
            // What was made is deleted with other leftovers; without its record it is never opened.
            return Err(AttachError::MemberTooLong { blob: spec.blob_digest.clone(), bytes });
        }
        let record = Record {
            version: RECORD_VERSION,
            blob_digest: spec.blob_digest.clone(),
            blob_size,
            tar_split: toc.tar_split(),
        };
        let text = serde_json::to_vec(&record).map_err(|e| io(e.into()))?;
        // Not synced either, for the same reason.
        let path = dir.join("layer.json");
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, &text).and_then(|()| fs::rename(&temporary, &path)).map_err(io)?;
        let source = self.source(spec, Some(blob_size))?;
        self.bond(&dir, index, source, &spec.blob_digest, &record)
    }

    fn bond(
        &self,
        dir: &Path,
        index: Index,
        source: Source,
        blob_digest: &str,
        record: &Record,
    ) -> Result<Arc<Layer>, AttachError> {
        let graduated = graduate::read(dir);
        let durable = if graduated.is_some() { Durable::All } else { Durable::AsMapped };
        let store = Store::open(dir, &index, self.boot, durable)
            .map_err(|error| AttachError::Io { path: dir.to_owned(), error })?;
        let (sources, engine) = (Sources::new(source), self.engine.clone());
        let &Record { blob_size, tar_split, .. } = record;
        let layer = Layer::new(index, store, sources, engine, blob_digest.to_owned(), blob_size, tar_split);
        if let Some(graduated) = graduated {
            layer.note_graduated(graduated);
        }
        Ok(Arc::new(layer))
    }

    /// The tail read for the TOC usually holds the last members too: they need not be fetched again.
    fn keep_tail(&self, layer: &Arc<Layer>, start: u64, bytes: Bytes) {
        let layer = layer.clone();
        tokio::spawn(async move { fetch::offer(&layer, start, bytes).await });
    }
}

/// Writes a file so that after a crash it is either as before or whole.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let tmp = path.with_extension("tmp");
    let mut file = fs::File::create(&tmp)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    fs::rename(&tmp, path)
}
