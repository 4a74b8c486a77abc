//! Plugs the data plane into the control plane's port.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use fusefs::{AttachRequest, Below, Fill, Graduation, OpaqueXattr, Plane, PlaneConfig};
use snapshotter::{AttachError, FileSystem, LayerRequest, LayerRoot, Reason, Snapshotter, Usage, overlay};
use tokio::sync::mpsc;

use crate::config::{Config, Prefetch};

/// The data plane's settings.
pub fn settings(config: &Config, root: &Path, overlay: overlay::Options) -> PlaneConfig {
    let fetch = config.fetch();
    let mut plane = PlaneConfig::new(root);
    plane.opaque = if overlay.userxattr { OpaqueXattr::User } else { OpaqueXattr::Trusted };
    plane.read_deadline = fetch.read_deadline;
    plane.find_tocs = fetch.find_tocs;
    (plane.prefetch, plane.prefetch_bytes) = match fetch.prefetch {
        Prefetch::Off => (false, 0),
        Prefetch::On { unmarked_bytes } => (true, unmarked_bytes),
    };
    plane.fill = fetch.fill;
    plane.fetch.background_rate = fetch.background_rate;
    plane.fetch.cache = fetch.cache;
    plane.fetch.audits = fetch.audits;
    plane.fetch.background = fetch.background_downloads;
    plane.fetch.in_flight_bytes = fetch.in_flight_bytes;
    plane
}

/// The port, as the snapshotter calls it.
#[derive(Debug)]
pub struct Port {
    plane: Arc<Plane>,
    snapshots: PathBuf,
}

impl Port {
    /// Over a running data plane, for the snapshots under `root`.
    pub fn new(plane: Arc<Plane>, root: &Path) -> Port {
        Port { plane, snapshots: root.join("snapshots") }
    }
}

#[async_trait]
impl FileSystem for Port {
    async fn attach(&self, slot: u64, layer: &LayerRequest) -> Result<LayerRoot, AttachError> {
        let root = self.plane.attach(slot, &request(layer, &self.snapshots)?).await;
        let root = root.map_err(|e| AttachError::new(reason(e.reason()), e.to_string()))?;
        Ok(LayerRoot { path: place(slot, root.tree.as_deref()), uid: root.uid, gid: root.gid })
    }

    async fn find_toc(&self, layer: &LayerRequest) -> Option<String> {
        let (reference, manifest) = (layer.reference.parse().ok()?, layer.manifest_digest.as_deref()?);
        let digest = self.plane.find_toc(&reference, &layer.layer_digest, manifest).await?;
        Some(digest.to_string())
    }

    async fn detach(&self, slot: u64) {
        self.plane.detach(slot);
    }

    fn place(&self, slot: u64) -> Option<PathBuf> {
        self.plane.layer(slot)?;
        Some(place(slot, self.plane.tree(slot).as_deref()))
    }

    async fn usage(&self, slot: u64) -> Usage {
        let usage = self.plane.usage(slot).unwrap_or_default();
        Usage { size: usage.bytes, inodes: usage.inodes }
    }
}

/// Where a slot's layer is, relative to `snapshots/<id>/`, so that the root directory can be moved: in the mount, or the
/// directory `layers/<digest>/fs` that it has become.
pub fn place(slot: u64, tree: Option<&Path>) -> PathBuf {
    let digest = tree.and_then(Path::parent).and_then(Path::file_name);
    match (digest, tree.and_then(Path::file_name)) {
        (Some(digest), Some(name)) => Path::new("../../layers").join(digest).join(name),
        _ => PathBuf::from(format!("../../mnt/{slot}")),
    }
}

/// Points snapshots at the directories that their layers become.
pub async fn relink(mut graduations: mpsc::Receiver<Graduation>, snapshotter: Arc<Snapshotter<Port>>) {
    while let Some(Graduation { slots, tree }) = graduations.recv().await {
        for slot in slots {
            link(&snapshotter, slot, &tree).await;
        }
    }
}

/// Points one snapshot at the directory that its layer has become.
pub async fn link(snapshotter: &Snapshotter<Port>, slot: u64, tree: &Path) {
    match snapshotter.link(slot, &place(slot, Some(tree))).await {
        // It was removed meanwhile, or is being prepared and will look itself.
        Ok(()) | Err(snapshotter::Error::NotFound(_)) => {}
        Err(error) => tracing::warn!(slot, %error, "the snapshot goes on using the lazy layer"),
    }
}

/// A layer of a store, as if labels had named it.
pub fn describe(request: &AttachRequest) -> LayerRequest {
    LayerRequest {
        target: String::new(),
        reference: request.reference.to_string(),
        layer_digest: request.blob_digest.clone(),
        toc_digest: request.toc_digest.to_string(),
        manifest_digest: None,
        neighbours: Vec::new(),
        prefetch_bytes: None,
        background_fetch: None,
        below: Vec::new(),
        labels: BTreeMap::new(),
    }
}

/// What the data plane needs of a layer's labels; `snapshots` is the directory of all snapshots.
pub fn request(layer: &LayerRequest, snapshots: &Path) -> Result<AttachRequest, AttachError> {
    let bad = |what: &str, error: String| AttachError::new(Reason::BadLabels, format!("{what}: {error}"));
    Ok(AttachRequest {
        reference: layer
            .reference
            .parse()
            .map_err(|e: registry::Error| bad("image reference", e.to_string()))?,
        blob_digest: layer.layer_digest.clone(),
        blob_size: None,
        toc_digest: layer.toc_digest.parse().map_err(|e: estargz::Error| bad("TOC digest", e.to_string()))?,
        manifest_digest: layer.manifest_digest.clone(),
        neighbours: layer.neighbours.clone(),
        prefetch_bytes: layer.prefetch_bytes,
        fill: layer.background_fetch.map(|wanted| if wanted { Fill::On } else { Fill::Off }),
        below: layer
            .below
            .iter()
            .map(|&slot| Below { slot, dir: snapshots.join(slot.to_string()).join("fs") })
            .collect(),
    })
}

/// Why slots that should have a layer have none, with the reason code in front.
pub type Absent = Arc<Mutex<BTreeMap<u64, String>>>;

/// Opens a layer from its registry that should have been on disk, with longer and longer pauses.
pub async fn reattach(plane: Arc<Plane>, slot: u64, request: AttachRequest, absent: Absent) {
    let absent = || absent.lock().unwrap_or_else(PoisonError::into_inner);
    let mut pause = Duration::from_secs(1);
    while let Err(error) = plane.attach(slot, &request).await {
        if matches!(error, fusefs::AttachError::Retired(_)) {
            absent().remove(&slot);
            return;
        }
        absent().insert(slot, format!("{}: {error}", error.reason()));
        tracing::warn!(slot, layer = %request.toc_digest, reason = error.reason(), %error, ?pause, "still not attached");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(300));
    }
    absent().remove(&slot);
    tracing::info!(slot, layer = %request.toc_digest, "attached again");
}

/// The control plane's name for a reason code of the data plane.
fn reason(code: &str) -> Reason {
    match code {
        "not_estargz" => Reason::NotEstargz,
        "toc_invalid" => Reason::TocInvalid,
        "lossy_names" => Reason::LossyNames,
        "auth_denied" => Reason::AuthDenied,
        "not_found" => Reason::NotFound,
        "timeout" => Reason::Timeout,
        "unavailable" | "bad_response" => Reason::Unavailable,
        "verify_failed" => Reason::VerifyFailed,
        "no_space" => Reason::NoSpace,
        "draining" => Reason::Draining,
        _ => Reason::Internal,
    }
}
