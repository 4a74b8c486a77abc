//! One layer: what becomes of it, and the moving of its bytes from source to destination.
//!
//! A layer is decided on first ([`Work::fate`], which reads its table of contents at most) and then dealt with
//! ([`Work::perform`]). Bytes pass in memory: source, inlet, encoder, outlet, destination, each holding back the one
//! before it.
//!
//! Invariants: what is stored under a digest was hashed on its way, the source's blob as well as ours; a blob that is
//! not finished, for whatever reason, is cancelled.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, ensure};
use estargz::writer::{Dialect, Target};
use estargz::{Digest, Format, Limits, VerifiedToc};
use futures::TryStreamExt;
use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::earlier::{Earlier, recipe};
use super::encode::{self, Encoded, Settings};
use super::media::LayerKind;
use super::pipe;
use super::plan::Task;
use super::rewrite::{CONVERTED_FROM, Change};
use crate::image::{Descriptor, TOC_DIGEST};
use crate::progress::LayerProgress;
use crate::toc::{self, Guess};
use crate::transport::{BlobWriter, Destination, Finished, Kept, Location, Source};

/// The work was given up because something else failed, or the user wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}

/// What layers are taken from, what they go to, and how.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// Where the image is.
    pub source: &'a dyn Source,
    /// The same, by name.
    pub from: &'a Location,
    /// Where the image goes.
    pub destination: &'a dyn Destination,
    /// What the destination has of an earlier run.
    pub earlier: &'a Earlier,
    /// How layers are made.
    pub settings: &'a Settings,
    /// Whether layers that are what is wanted, or were made by an earlier run, are made again.
    pub again: Again,
    /// Ends all work.
    pub stop: &'a CancellationToken,
}

/// What happens with layers that need no conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// They are used as they are.
    Never,
    /// They are converted like the others.
    Always,
}

/// What is to become of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is converted.
    Convert,
    /// An earlier run has converted it.
    Earlier(Change),
    /// It is what is wanted.
    Reuse {
        /// Of its table of contents.
        toc_digest: Digest,
        /// Whether the manifest says so.
        told: Told,
    },
    /// It is copied as it is; why.
    Copy(&'static str),
    /// Only its descriptor stays; why.
    Leave(&'static str),
}

/// Whether the manifest names the layer's TOC digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It does.
    Yes,
    /// It does not; ours will.
    No,
}

/// How a layer's blob came to be at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stored {
    /// Its bytes were sent there.
    Written,
    /// It was there.
    Present,
    /// The registry took it from another repository.
    Mounted,
    /// It is not copied.
    Not,
}

/// A layer that is dealt with.
#[derive(Debug, Clone)]
pub struct Done {
    /// What became of it.
    pub fate: Fate,
    /// What changes in the manifest and the config.
    pub change: Option<Change>,
    /// How its blob came there.
    pub stored: Stored,
    /// Paths and globs that match nothing in it.
    pub missing: Vec<String>,
    /// Entries with names that a table of contents cannot tell.
    pub lossy_names: u64,
    /// Entries because of which podman would refuse the layer if it were annotated.
    pub unlike: u64,
}

impl Work<'_> {
    /// Decides on a layer.
    ///
    /// # Errors
    ///
    /// The source or the destination cannot be asked.
    pub async fn fate(&self, task: &Task) -> anyhow::Result<Fate> {
        unless_stopped(self.stop, self.decide(task)).await
    }

    async fn decide(&self, task: &Task) -> anyhow::Result<Fate> {
        match task.kind {
            LayerKind::Other => return Ok(Fate::Copy("not a file system layer")),
            LayerKind::NotDistributable => return Ok(Fate::Leave("not distributable")),
            LayerKind::Tar if self.again == Again::Always => return Ok(Fate::Convert),
            LayerKind::Tar => {}
        }
        if let Some(change) = self.earlier.get(&recipe(task, &self.settings.shape)) {
            let blob = Descriptor { digest: change.digest.clone(), size: change.size, ..task.layer.clone() };
            if self.destination.has(&blob).await? {
                return Ok(Fate::Earlier(change.clone()));
            }
        }
        match self.settings.shape.target {
            Target::EStargz => self.reuse_estargz(task).await,
            Target::ZstdChunked(dialect) => self.reuse_zstd_chunked(task, dialect).await,
        }
    }

    /// Whether the layer is zstd:chunked already, and is named as the dialect names it, so that it can stay.
    async fn reuse_zstd_chunked(&self, task: &Task, dialect: Dialect) -> anyhow::Result<Fate> {
        let layer = &task.layer;
        let named_as = match layer.annotations.contains_key(TOC_DIGEST) {
            true => Dialect::Stargz,
            false => Dialect::Podman,
        };
        let Some(named) = layer.toc().filter(|_| named_as == dialect) else { return Ok(Fate::Convert) };
        let limits = Limits::default();
        let json = match toc::read(self.source, layer, Guess::Lazy, &limits).await? {
            Ok(json) if json.format() == Format::ZstdChunked => json,
            Ok(_) | Err(estargz::Error::NotEstargz { .. }) => return Ok(Fate::Convert),
            Err(error) => return Ok(self.unfit(layer, &error)),
        };
        match json.verify(&named.digest, &limits) {
            Ok(toc) if encode::would_reorder(&toc, &task.first)? => Ok(Fate::Convert),
            Ok(_) => Ok(Fate::Reuse { toc_digest: named.digest, told: Told::Yes }),
            Err(error) => Ok(self.unfit(layer, &error)),
        }
    }

    /// Whether the layer is eStargz already, so that it can stay.
    async fn reuse_estargz(&self, task: &Task) -> anyhow::Result<Fate> {
        let layer = &task.layer;
        let named = layer.annotations.get(TOC_DIGEST).map(|text| text.parse::<Digest>());
        let guess = if named.is_some() { Guess::Lazy } else { Guess::Plain };
        let limits = Limits::default();
        let json = match toc::read(self.source, layer, guess, &limits).await? {
            Ok(json) if json.format() == Format::EStargz => json,
            Ok(_) | Err(estargz::Error::NotEstargz { .. }) => return Ok(Fate::Convert),
            Err(error) => return Ok(self.unfit(layer, &error)),
        };
        let (expected, told) = match named {
            Some(Ok(digest)) => (digest, Told::Yes),
            Some(Err(error)) => return Ok(self.unfit(layer, &error)),
            // The blob's own digest vouches for its table of contents.
            None => (self.toc_of_whole_blob(layer, json.toc_offset()).await?, Told::No),
        };
        match json.verify(&expected, &limits) {
            Ok(toc) if encode::would_reorder(&toc, &task.first)? => Ok(Fate::Convert),
            Ok(toc) => Ok(Fate::Reuse { toc_digest: VerifiedToc::digest(&toc), told }),
            Err(error) => Ok(self.unfit(layer, &error)),
        }
    }

    /// A lazy layer that nobody could mount is converted anew.
    fn unfit(&self, layer: &Descriptor, error: &estargz::Error) -> Fate {
        tracing::warn!(layer = layer.digest, %error, "the layer looks lazy but is not usable as such");
        Fate::Convert
    }

    /// The digest of the table of contents at `toc_offset` of a blob all of which is read and verified.
    async fn toc_of_whole_blob(&self, layer: &Descriptor, toc_offset: u64) -> anyhow::Result<Digest> {
        let (mut hash, mut at, mut tail) = (Sha256::new(), 0, Vec::new());
        let mut pieces = self.source.stream(layer).await?;
        while let Some(piece) = pieces.try_next().await? {
            hash.update(&piece);
            let skip = usize::try_from(toc_offset.saturating_sub(at)).unwrap_or(usize::MAX);
            tail.extend_from_slice(piece.get(skip..).unwrap_or_default());
            at += piece.len() as u64;
        }
        verify(layer, at, hash)?;
        let mut opener = estargz::Opener::new(at, Limits::default())?;
        match opener.feed(toc_offset, &tail)? {
            estargz::Step::Done(json) => Ok(json.digest()),
            estargz::Step::Need(_) => anyhow::bail!("the source changed layer {} meanwhile", layer.digest),
        }
    }

    /// Does to a layer what was decided.
    ///
    /// # Errors
    ///
    /// The layer cannot be read, converted or stored, or work was stopped ([`Stopped`]).
    pub async fn perform(&self, task: &Task, fate: Fate, progress: &LayerProgress) -> anyhow::Result<Done> {
        let done = |change, stored| Done {
            fate: fate.clone(),
            change,
            stored,
            missing: Vec::new(),
            lossy_names: 0,
            unlike: 0,
        };
        Ok(match &fate {
            Fate::Convert => return self.convert(task, progress).await,
            Fate::Earlier(change) => done(Some(change.clone()), Stored::Present),
            Fate::Leave(_) => done(None, Stored::Not),
            Fate::Copy(_) => done(None, self.transfer(&task.layer, progress).await?),
            Fate::Reuse { toc_digest, told } => {
                let Descriptor { digest, size, .. } = &task.layer;
                let change =
                    (*told == Told::No).then(|| Change::annotated(digest, *size, &toc_digest.to_string()));
                done(change, self.transfer(&task.layer, progress).await?)
            }
        })
    }

    /// Brings a blob to the destination as it is.
    ///
    /// # Errors
    ///
    /// As [`perform`](Work::perform).
    pub async fn transfer(&self, blob: &Descriptor, progress: &LayerProgress) -> anyhow::Result<Stored> {
        if unless_stopped(self.stop, self.destination.has(blob)).await? {
            return Ok(Stored::Present);
        }
        if unless_stopped(self.stop, self.destination.adopt(blob, self.from)).await? {
            return Ok(Stored::Mounted);
        }
        let mut pieces = self.source.stream(blob).await?;
        let mut sink = self.destination.create().await?;
        progress.started("copying", 0);
        let copying = async {
            let (mut hash, mut size) = (Sha256::new(), 0);
            while let Some(piece) = pieces.try_next().await? {
                hash.update(&piece);
                size += piece.len() as u64;
                progress.advanced(piece.len() as u64);
                sink.write(piece).await?;
            }
            verify(blob, size, hash)
        };
        let copied = unless_stopped(self.stop, copying).await;
        let finished = |(): &()| Finished { digest: blob.digest.clone(), size: blob.size, diff_id: None };
        let (kept, ()) = conclude(sink, copied, finished).await?;
        Ok(stored(kept))
    }

    async fn convert(&self, task: &Task, progress: &LayerProgress) -> anyhow::Result<Done> {
        let layer = &task.layer;
        let mut sink = self.destination.create().await?;
        progress.started("converting", 0);
        let encoded = unless_stopped(self.stop, self.encode(task, &mut *sink, progress)).await;
        let (kept, encoded) = conclude(sink, encoded, |encoded: &Encoded| Finished {
            digest: encoded.digest.clone(),
            size: encoded.size,
            diff_id: Some(encoded.diff_id.clone()),
        })
        .await?;
        let mut done = Done {
            fate: Fate::Convert,
            change: None,
            stored: stored(kept),
            missing: encoded.missing,
            lossy_names: encoded.lossy_names,
            unlike: encoded.unlike,
        };
        // Converting what was converted so before gives the same bytes; its descriptor then tells everything.
        let named =
            encoded.annotations.is_empty() || layer.toc().is_some_and(|toc| toc.digest == encoded.toc_digest);
        if encoded.digest != layer.digest || !named {
            let mut annotations: BTreeMap<_, _> = encoded.annotations.into_iter().collect();
            annotations.insert(CONVERTED_FROM.to_owned(), recipe(task, &self.settings.shape));
            done.change = Some(Change {
                digest: encoded.digest,
                size: encoded.size,
                diff_id: Some(encoded.diff_id),
                zstd: self.settings.shape.target != Target::EStargz,
                annotations,
            });
        }
        Ok(done)
    }

    /// Source, encoder and destination at once.
    async fn encode(
        &self,
        task: &Task,
        sink: &mut dyn BlobWriter,
        progress: &LayerProgress,
    ) -> anyhow::Result<Encoded> {
        let layer = &task.layer;
        let expected: Digest = layer.digest.parse()?;
        let stream = self.source.stream(layer).await?;
        let (feed, inlet) = pipe::inlet();
        let (outlet, mut pieces) = pipe::outlet();
        let (size, settings, first) = (layer.size, self.settings.clone(), task.first.clone());
        let encoding = spawn_blocking(move || {
            let mut inlet = inlet;
            let encoded = encode::encode(&mut inlet, outlet, &settings, &first)?;
            inlet.verify(&expected, size)?;
            anyhow::Ok(encoded)
        });
        let storing = async move {
            while let Some(piece) = pieces.recv().await {
                sink.write(piece).await?;
            }
            anyhow::Ok(())
        };
        let feeding = pipe::feed(feed, stream, |bytes| progress.advanced(bytes));
        let (encoded, stored, fed) = tokio::join!(encoding, storing, feeding);
        // The encoder's error is only a consequence if one of the others has failed.
        stored?;
        fed?;
        encoded.context("the conversion has panicked")?
    }
}

/// Waits for `work` unless all work is to stop.
///
/// # Errors
///
/// That of `work`, or [`Stopped`].
pub async fn unless_stopped<T>(
    stop: &CancellationToken,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    tokio::select! {
        result = work => result,
        () = stop.cancelled() => Err(Stopped.into()),
    }
}

/// Finishes a blob whose bytes are all written, or cancels it.
async fn conclude<T>(
    sink: Box<dyn BlobWriter>,
    written: anyhow::Result<T>,
    finished: impl FnOnce(&T) -> Finished,
) -> anyhow::Result<(Kept, T)> {
    match written {
        Ok(value) => {
            let kept = sink.finish(finished(&value)).await?;
            Ok((kept, value))
        }
        Err(error) => {
            sink.cancel().await;
            Err(error)
        }
    }
}

fn stored(kept: Kept) -> Stored {
    match kept {
        Kept::New => Stored::Written,
        Kept::Present => Stored::Present,
    }
}

/// Checks that the bytes that passed are the blob.
fn verify(blob: &Descriptor, size: u64, hash: Sha256) -> anyhow::Result<()> {
    let (expected, actual) = (blob.digest.parse::<Digest>()?, Digest::from_bytes(hash.finalize().into()));
    ensure!(
        actual == expected && size == blob.size,
        "the source sent {size} bytes with digest {actual} instead of {} bytes with {expected}",
        blob.size
    );
    Ok(())
}
