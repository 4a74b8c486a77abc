//! Putting an image's blobs into containerd's content store.
//!
//! Owns how a layer is downloaded: streamed in ranges from the registry, an interrupted download continued where it
//! stopped, another host asked once when the bytes turn out wrong. Labels everything with where it came from.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, ensure};
use containerd_client::services::v1::{WriteAction, WriteContentRequest};
use futures::{StreamExt, stream};
use registry::{Blob, HostTag, ReadOptions, Reference};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::labels::source_label;
use crate::containerd::content::{self, LOCK_PATIENCE, LOCK_PAUSE, MESSAGE, Writer, locked};
use crate::containerd::{Containerd, refused};
use crate::image::Descriptor;
use crate::progress::LayerProgress;

/// Bytes asked of the registry at once.
const RANGE: u64 = 8 << 20;

/// Ranges in flight for one layer: enough to keep a fast link busy, 32 MiB of memory.
const RANGES_IN_FLIGHT: usize = 4;

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
        content::put(self.containerd, kind, digest, bytes).await?;
        self.label(digest, labels).await
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
            u64::try_from(writer.opened().offset).context("containerd answered with a negative offset")?;
        progress.started("downloading", start);

        let mut host = avoid.clone();
        let ranges = ranges(start, layer.size);
        let mut parts = stream::iter(ranges)
            .map(|range| {
                let options = ReadOptions {
                    avoid: avoid.clone(),
                    ..ReadOptions::until(Instant::now() + self.deadline)
                };
                async move { Ok::<_, registry::Error>((range.start, blob.read(range, &options).await?)) }
            })
            .buffered(RANGES_IN_FLIGHT);
        while let Some(part) = parts.next().await {
            let (mut offset, served) = part.map_err(anyhow::Error::from)?;
            for piece in served.bytes.chunks(MESSAGE) {
                writer.send(message(WriteAction::Write, offset, piece)).await?;
                offset += piece.len() as u64;
                progress.advanced(piece.len() as u64);
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
        let dropped = content::abort(self.containerd, &ingest(layer)).await;
        dropped.map_err(refused("cannot drop what was received of it"))
    }

    /// Sets `labels` and the source label on a blob that is in the store; other labels stay.
    ///
    /// # Errors
    ///
    /// The blob is not there.
    pub async fn label(&self, digest: &str, mut labels: HashMap<String, String>) -> anyhow::Result<()> {
        content::label(self.containerd, digest, |present| {
            labels.extend(source_label(present, self.reference.host(), self.reference.repository()));
            labels
        })
        .await
    }
}

/// The name of a layer's partial download; containerd's own clients use the same, so each continues the other's.
fn ingest(layer: &Descriptor) -> String {
    format!("layer-{}", layer.digest)
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
