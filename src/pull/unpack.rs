//! Turning an image's layers into snapshots, from the bottom up, as containerd's unpacker does it.
//!
//! Each layer is offered to the snapshotter first (Prepare with the chain id it would be committed under). A remote
//! snapshotter answers "already exists" when it has committed the layer by itself; then nothing is downloaded.
//! Otherwise the blob goes into the content store and containerd's diff service unpacks it into the mounts.
//!
//! Blobs of layers that carry no TOC digest cannot be lazy, so their downloads start at once, side by side; the others
//! are downloaded only when the snapshotter has declined them.
//!
//! Invariant: a snapshot is committed only if what was unpacked has the diff id the image config names.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, ensure};
use containerd_client::services::v1::ApplyRequest;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info, PrepareSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::types;
use futures::future::{Either, FutureExt, LocalBoxFuture, Shared, join_all, select};
use registry::{Reference, Registry};
use tokio::sync::Semaphore;
use tonic::{Code, Status};

use super::content::ContentStore;
use super::labels::LayerLabels;
use super::report::{Layer, Outcome};
use super::session::Session;
use crate::containerd::{refused, said};
use crate::image::{Descriptor, short};
use crate::progress::{LayerProgress, Progress};

/// Set by remote snapshotters on what they committed without unpacking.
const REMOTE: &str = "containerd.io/snapshot/remote";

/// Why the snapshotter left the layer to containerd.
const REASON: &str = "containerd.io/snapshot/lazurite.reason";

/// Layers that are downloaded side by side.
const DOWNLOADS: usize = 3;

/// How often a layer is offered again after an answer that contradicts itself, as containerd's unpacker does.
const OFFERS: usize = 3;

/// An image whose layers are to become snapshots.
#[derive(Debug)]
pub struct Image<'a> {
    /// Where its blobs are.
    pub reference: &'a Reference,
    /// The name it will be recorded under.
    pub name: &'a str,
    /// Digest of the platform's manifest.
    pub manifest_digest: &'a str,
    /// From the bottom up.
    pub layers: &'a [Descriptor],
    /// One for each layer.
    pub diff_ids: &'a [String],
    /// One for each layer.
    pub chain_ids: &'a [String],
}

/// Downloads that run when first waited for, and once.
type Download<'a> = Shared<LocalBoxFuture<'a, Result<(), Arc<anyhow::Error>>>>;

/// Makes the snapshots of all layers and says how each came about.
///
/// # Errors
///
/// A layer cannot be downloaded, verified or unpacked, or containerd refuses. Layers below it stay.
pub async fn unpack(
    session: &Session,
    store: &ContentStore<'_>,
    registry: &Registry,
    image: &Image<'_>,
    progress: &Progress,
) -> anyhow::Result<Vec<Layer>> {
    let unpacker = Unpacker { session, store, image };
    let bars: Vec<LayerProgress> =
        image.layers.iter().map(|layer| progress.layer(&short(&layer.digest), layer.size)).collect();

    // What is there is there from the bottom up, since a snapshot keeps its parents.
    let mut outcomes = Vec::new();
    for chain_id in image.chain_ids {
        session.hold(chain_id).await?;
        match unpacker.stat(chain_id).await? {
            Some(info) => outcomes.push(Outcome::present(&info.labels)),
            None => break,
        }
    }

    let slots = Semaphore::new(DOWNLOADS);
    let mut downloads: Vec<Download<'_>> = Vec::new();
    for (n, (layer, bar)) in image.layers.iter().zip(&bars).enumerate() {
        // An image may have a layer twice.
        if let Some(same) = image.layers[..n].iter().position(|below| below.digest == layer.digest) {
            downloads.push(downloads[same].clone());
            continue;
        }
        let blob = registry.blob(image.reference, &layer.digest, Some(layer.size))?;
        let slots = &slots;
        let download = async move {
            let _slot = slots.acquire().await.map_err(|error| Arc::new(error.into()))?;
            store.download(layer, &blob, bar).await.map_err(Arc::new)
        };
        downloads.push(download.boxed_local().shared());
    }
    let certain = downloads
        .iter()
        .zip(image.layers)
        .skip(outcomes.len())
        .filter(|(_, layer)| layer.named_toc_digest().is_none())
        .map(|(download, _)| download.clone());
    // Failures are met again by the layer that waits for the download.
    let ahead = join_all(certain);

    let in_order = async {
        for (outcome, bar) in outcomes.iter().zip(&bars) {
            bar.done(&outcome.to_string());
        }
        for n in outcomes.len()..image.layers.len() {
            let outcome = unpacker.layer(n, &downloads[n], &bars[n]).await?;
            bars[n].done(&outcome.to_string());
            outcomes.push(outcome);
        }
        anyhow::Ok(outcomes)
    };
    tokio::pin!(ahead, in_order);
    let outcomes = match select(&mut in_order, &mut ahead).await {
        Either::Left((outcomes, _)) => outcomes?,
        Either::Right((_, in_order)) => in_order.await?,
    };

    let layers = image.layers.iter().zip(image.chain_ids).zip(outcomes);
    Ok(layers
        .map(|((layer, chain_id), outcome)| Layer {
            digest: layer.digest.clone(),
            size: layer.size,
            chain_id: chain_id.clone(),
            outcome,
        })
        .collect())
}

struct Unpacker<'a> {
    session: &'a Session,
    store: &'a ContentStore<'a>,
    image: &'a Image<'a>,
}

impl Unpacker<'_> {
    /// Makes the snapshot of layer `n`, whose parents are there.
    async fn layer(&self, n: usize, download: &Download<'_>, bar: &LayerProgress) -> anyhow::Result<Outcome> {
        let image = self.image;
        let (layer, chain_id) = (&image.layers[n], &image.chain_ids[n]);
        let parent = if n == 0 { "" } else { &image.chain_ids[n - 1] };
        let labels = LayerLabels {
            reference: image.name,
            manifest_digest: image.manifest_digest,
            layers: image.layers,
        }
        .of(n, chain_id);

        self.session.hold(chain_id).await?;
        bar.doing("asking the snapshotter");
        let (key, mounts) = match self.offer(chain_id, parent, &labels).await? {
            Offer::Taken(info) => return Ok(Outcome::taken(&info.labels)),
            Offer::Declined { key, mounts } => (key, mounts),
        };

        let result = async {
            download.clone().await.map_err(|error| anyhow::anyhow!("{error:#}"))?;
            bar.doing("unpacking");
            self.apply(n, mounts).await?;
            self.commit(chain_id, &key, labels).await
        };
        match result.await {
            Ok(info) => Ok(Outcome::unpacked(&info.labels)),
            Err(error) => {
                // The first failure is the one to report; close() tries again to remove the snapshot.
                let _ = self.session.abandon().await;
                Err(error.context(format!("layer {}", layer.digest)))
            }
        }
    }

    /// Offers a layer to the snapshotter.
    async fn offer(
        &self,
        chain_id: &str,
        parent: &str,
        labels: &HashMap<String, String>,
    ) -> anyhow::Result<Offer> {
        for _ in 0..OFFERS {
            let key = self.session.extraction_key(chain_id);
            let request = PrepareSnapshotRequest {
                snapshotter: self.session.snapshotter().to_owned(),
                key: key.clone(),
                parent: parent.to_owned(),
                labels: labels.clone(),
            };
            match self.session.containerd().snapshots().prepare(request).await {
                Ok(answer) => return Ok(Offer::Declined { key, mounts: answer.into_inner().mounts }),
                // Either the snapshotter has the layer, or the key was not unique after all.
                Err(status) if status.code() == Code::AlreadyExists => {
                    self.session.settled();
                    if let Some(info) = self.stat(chain_id).await? {
                        return Ok(Offer::Taken(info));
                    }
                }
                Err(status) => return Err(self.unwilling("prepare", chain_id, &status)),
            }
        }
        anyhow::bail!(
            "snapshotter {} says that {chain_id} exists, but containerd does not find it",
            self.session.snapshotter()
        )
    }

    /// Unpacks the blob of layer `n` into `mounts`.
    async fn apply(&self, n: usize, mounts: Vec<types::Mount>) -> anyhow::Result<()> {
        let (layer, diff_id) = (&self.image.layers[n], &self.image.diff_ids[n]);
        let diff = types::Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.clone(),
            size: i64::try_from(layer.size).context("the manifest gives an impossible size")?,
            annotations: layer.annotations.clone(),
        };
        let request = ApplyRequest { diff: Some(diff), mounts, ..Default::default() };
        let answer =
            self.session.containerd().diff().apply(request).await.map_err(refused("cannot unpack"))?;
        let unpacked = answer.into_inner().applied.unwrap_or_default().digest;
        ensure!(
            unpacked == *diff_id,
            "the unpacked contents are {unpacked}, but the image config says {diff_id}: the image is damaged"
        );
        // Lets containerd find the blob of an unpacked layer, for instance when it exports the image.
        let uncompressed = HashMap::from([("containerd.io/uncompressed".to_owned(), unpacked)]);
        self.store.label(&layer.digest, uncompressed).await
    }

    async fn commit(
        &self,
        chain_id: &str,
        key: &str,
        labels: HashMap<String, String>,
    ) -> anyhow::Result<Info> {
        let request = CommitSnapshotRequest {
            snapshotter: self.session.snapshotter().to_owned(),
            name: chain_id.to_owned(),
            key: key.to_owned(),
            labels,
        };
        match self.session.containerd().snapshots().commit(request).await {
            Ok(_) => self.session.settled(),
            // Somebody else was faster; theirs is as good.
            Err(status) if status.code() == Code::AlreadyExists => self.session.abandon().await?,
            Err(status) => return Err(self.unwilling("commit", chain_id, &status)),
        }
        self.stat(chain_id).await?.with_context(|| format!("snapshot {chain_id} is gone after its commit"))
    }

    async fn stat(&self, name: &str) -> anyhow::Result<Option<Info>> {
        let request =
            StatSnapshotRequest { snapshotter: self.session.snapshotter().to_owned(), key: name.to_owned() };
        match self.session.containerd().snapshots().stat(request).await {
            Ok(answer) => Ok(answer.into_inner().info),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.unwilling("look up", name, &status)),
        }
    }

    fn unwilling(&self, tried: &str, name: &str, status: &Status) -> anyhow::Error {
        let snapshotter = self.session.snapshotter();
        let hint = match status.code() {
            Code::InvalidArgument | Code::Unavailable => {
                "; `lazurite check` says whether it is set up and running"
            }
            _ => "",
        };
        anyhow::anyhow!("snapshotter {snapshotter} did not {tried} {name}: {}{hint}", said(status))
    }
}

/// The snapshotter's answer to an offered layer.
enum Offer {
    /// The snapshot is committed.
    Taken(Info),
    /// The layer has to be unpacked into these mounts.
    Declined { key: String, mounts: Vec<types::Mount> },
}

impl Outcome {
    fn present(labels: &HashMap<String, String>) -> Self {
        Self::Present { lazy: labels.contains_key(REMOTE) }
    }

    fn taken(labels: &HashMap<String, String>) -> Self {
        if labels.contains_key(REMOTE) { Self::Lazy } else { Self::present(labels) }
    }

    fn unpacked(labels: &HashMap<String, String>) -> Self {
        Self::Unpacked { reason: labels.get(REASON).cloned() }
    }
}
