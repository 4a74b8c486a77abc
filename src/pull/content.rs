//! Putting an image's blobs into containerd's content store.
//!
//! Owns the write protocol: small documents in one message, layers streamed in ranges from the registry, an
//! interrupted download continued where it stopped. The content store checks every blob against its digest when it is
//! committed, so nothing wrong can get in. Everything is written under the lease the connection carries.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, ensure};
use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, UpdateRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use futures::channel::mpsc;
use futures::{SinkExt, StreamExt, stream};
use prost_types::FieldMask;
use registry::{Blob, HostTag, ReadOptions, Reference};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use super::image::{Descriptor, source_label};
use crate::containerd::{Containerd, refused};
use crate::progress::LayerProgress;

/// Bytes asked of the registry at once.
const RANGE: u64 = 8 << 20;

/// Ranges in flight for one layer: enough to keep a fast link busy, 32 MiB of memory.
const RANGES_IN_FLIGHT: usize = 4;

/// Bytes of one message to containerd, which takes at most 16 MiB.
const MESSAGE: usize = 1 << 20;

/// How long another client may hold a blob we need before we give up on it. It is checked every [`LOCK_PAUSE`].
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
const LOCK_PAUSE: Duration = Duration::from_millis(250);

/// Labels a blob with the registry and repository it came from, besides `labels`.
#[derive(Debug)]
pub struct ContentStore<'a> {
    /// The connection, under a lease.
    pub containerd: &'a Containerd,
    /// Where the image comes from.
    pub reference: &'a Reference,
    /// How long one range of a layer may take.
    pub deadline: Duration,
}

impl ContentStore<'_> {
    /// Stores a document that is in memory, and labels it.
    ///
    /// # Errors
    ///
    /// containerd refuses it, for instance because it does not match its digest.
    pub async fn put(
        &self,
        kind: &str,
        digest: &str,
        bytes: &[u8],
        labels: HashMap<String, String>,
    ) -> anyhow::Result<()> {
        let size = i64::try_from(bytes.len())?;
        let commit = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: format!("{kind}-{digest}"),
            total: size,
            expected: digest.to_owned(),
            data: bytes.to_vec(),
            ..Default::default()
        };
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match self.write_one(commit.clone()).await {
                Ok(()) => break,
                Err(status) if status.code() == Code::AlreadyExists => break,
                Err(status) if locked(&status) && Instant::now() < deadline => {
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(status) => return Err(refused(format!("cannot store {kind} {digest}"))(status)),
            }
        }
        self.label(digest, labels).await
    }

    async fn write_one(&self, request: WriteContentRequest) -> Result<(), Status> {
        let mut answers = self.containerd.content().write(stream::iter([request])).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    }

    /// Downloads a layer's blob unless it is there, and labels it.
    ///
    /// # Errors
    ///
    /// The registry does not deliver it, or twice delivers something else than the digest says. The caller names the
    /// layer.
    pub async fn download(
        &self,
        layer: &Descriptor,
        blob: &Blob,
        progress: &LayerProgress,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        let mut avoid = None;
        let mut waiting = false;
        loop {
            match self.download_once(layer, blob, progress, avoid.clone()).await {
                Ok(()) => {
                    progress.doing("downloaded");
                    break;
                }
                Err(Failed::Refused(status)) if status.code() == Code::AlreadyExists => break,
                Err(Failed::Refused(status)) if locked(&status) && Instant::now() < deadline => {
                    if !std::mem::replace(&mut waiting, true) {
                        progress.doing("waiting for another download of it");
                    }
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                // The bytes do not match the digest. Nothing of them is kept, and another host is asked once.
                Err(Failed::Wrong(host)) if avoid.is_none() => {
                    tracing::warn!(layer = layer.digest, %host, "the downloaded bytes do not match the digest; trying again");
                    self.forget(layer).await?;
                    blob.forget_route();
                    avoid = Some(host);
                }
                Err(Failed::Wrong(host)) => {
                    self.forget(layer).await?;
                    anyhow::bail!("what {host} delivers does not match the digest");
                }
                Err(Failed::Refused(status)) => {
                    return Err(refused("cannot store it")(status));
                }
                Err(Failed::Other(error)) => {
                    return Err(error.context("cannot download it"));
                }
            }
        }
        self.label(&layer.digest, HashMap::new()).await
    }

    async fn download_once(
        &self,
        layer: &Descriptor,
        blob: &Blob,
        progress: &LayerProgress,
        avoid: Option<HostTag>,
    ) -> Result<(), Failed> {
        let total = i64::try_from(layer.size).context("the manifest gives an impossible size")?;
        let message = |action: WriteAction, offset: u64, data: &[u8]| WriteContentRequest {
            action: action.into(),
            r#ref: ingest(layer),
            total,
            expected: layer.digest.clone(),
            // Offsets stay below `total`.
            offset: i64::try_from(offset).unwrap_or(i64::MAX),
            data: data.to_vec(),
            labels: HashMap::new(),
        };
        // The first message only opens the blob: the answer says how much of it is there.
        let mut writer = Writer::open(self.containerd, message(WriteAction::Stat, 0, &[])).await?;
        let start =
            u64::try_from(writer.opened.offset).context("containerd answered with a negative offset")?;
        progress.downloading(start);

        let mut host = avoid.clone();
        let ranges = ranges(start, layer.size);
        let mut parts = stream::iter(ranges)
            .map(|range| {
                let options = ReadOptions { deadline: Instant::now() + self.deadline, avoid: avoid.clone() };
                async move { Ok::<_, registry::Error>((range.start, blob.read(range, &options).await?)) }
            })
            .buffered(RANGES_IN_FLIGHT);
        while let Some(part) = parts.next().await {
            let (mut offset, served) = part.map_err(anyhow::Error::from)?;
            for piece in served.bytes.chunks(MESSAGE) {
                writer.send(message(WriteAction::Write, offset, piece)).await?;
                offset += piece.len() as u64;
                progress.downloaded(piece.len() as u64);
            }
            host = Some(served.host);
        }
        match (writer.send(message(WriteAction::Commit, layer.size, &[])).await, host) {
            (Err(status), Some(host)) if status.code() == Code::FailedPrecondition => {
                Err(Failed::Wrong(host))
            }
            (result, _) => Ok(result?),
        }
    }

    /// Drops what was received of a layer.
    async fn forget(&self, layer: &Descriptor) -> anyhow::Result<()> {
        let request = AbortRequest { r#ref: ingest(layer) };
        match self.containerd.content().abort(request).await {
            Err(status) if status.code() != Code::NotFound => {
                Err(refused("cannot drop what was received of it")(status))
            }
            _ => Ok(()),
        }
    }

    /// Sets `labels` and the source label on a blob that is in the store; other labels stay.
    ///
    /// # Errors
    ///
    /// The blob is not there.
    pub async fn label(&self, digest: &str, mut labels: HashMap<String, String>) -> anyhow::Result<()> {
        let tried = || format!("cannot label content {digest}");
        let mut content = self.containerd.content();
        let info = content.info(InfoRequest { digest: digest.to_owned() }).await.map_err(refused(tried()))?;
        let present = info.into_inner().info.unwrap_or_default().labels;
        labels.extend(source_label(&present, self.reference.host(), self.reference.repository()));
        labels.retain(|key, value| present.get(key) != Some(value));
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateRequest {
            info: Some(Info { digest: digest.to_owned(), labels, ..Default::default() }),
            update_mask: Some(FieldMask { paths }),
        };
        content.update(request).await.map_err(refused(tried()))?;
        Ok(())
    }
}

/// The name of a layer's partial download; containerd's own clients use the same, so each continues the other's.
fn ingest(layer: &Descriptor) -> String {
    format!("layer-{}", layer.digest)
}

/// Somebody else is writing the same blob.
fn locked(status: &Status) -> bool {
    status.code() == Code::Unavailable
}

/// `start..size` in pieces of [`RANGE`].
fn ranges(start: u64, size: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    let step = usize::try_from(RANGE).unwrap_or(usize::MAX);
    (start..size).step_by(step).map(move |from| from..size.min(from + RANGE))
}

/// Why a download ended early.
enum Failed {
    /// containerd said no.
    Refused(Status),
    /// The blob is complete and does not match its digest; the last host that served part of it.
    Wrong(HostTag),
    /// Anything else.
    Other(anyhow::Error),
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        Self::Refused(status)
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// A blob being written. Every message is answered before the next is sent, so that memory stays bounded by what is
/// in flight from the registry.
struct Writer {
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    opened: WriteContentResponse,
}

impl Writer {
    async fn open(containerd: &Containerd, first: WriteContentRequest) -> Result<Self, Status> {
        let (mut requests, outgoing) = mpsc::channel(1);
        // containerd answers nothing, not even headers, before it has the first message.
        requests.try_send(first).map_err(|_| Status::internal("the request stream is closed"))?;
        let mut answers = containerd.content().write(outgoing).await?.into_inner();
        let opened = answer(&mut answers).await?;
        Ok(Self { requests, answers, opened })
    }

    async fn send(&mut self, message: WriteContentRequest) -> Result<(), Status> {
        // If the stream is gone, its end says why.
        let _ = self.requests.send(message).await;
        answer(&mut self.answers).await.map(drop)
    }
}

async fn answer(answers: &mut Streaming<WriteContentResponse>) -> Result<WriteContentResponse, Status> {
    answers.message().await?.ok_or_else(|| Status::aborted("containerd ended the transfer early"))
}

/// Whether a layer's blob is one containerd can unpack.
///
/// # Errors
///
/// Names the type if it is not.
pub fn check_unpackable(layer: &Descriptor) -> anyhow::Result<()> {
    let known = ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."];
    ensure!(
        known.iter().any(|prefix| layer.media_type.starts_with(prefix)),
        "layer {} is of type {}, which is not a file system layer; this is not a container image",
        layer.digest,
        layer.media_type
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_what_is_missing() {
        let all = |start, size| ranges(start, size).map(|range| (range.start, range.end)).collect::<Vec<_>>();
        assert_eq!(all(0, 0), []);
        assert_eq!(all(9, 9), [], "everything is there");
        assert_eq!(all(5, 7), [(5, 7)]);
        assert_eq!(all(0, 2 * RANGE), [(0, RANGE), (RANGE, 2 * RANGE)]);
        assert_eq!(all(3, RANGE + 4), [(3, RANGE + 3), (RANGE + 3, RANGE + 4)]);
    }
}
