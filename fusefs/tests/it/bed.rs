//! A registry, a data plane and a mount for one test.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use fusefs::{AttachError, AttachRequest, Attached, Fill, NoKeeper, Plane, PlaneConfig};
use registry::{HostConfig, MirrorConfig, Registry};
use support::{
    estargz::Built,
    guard::{self, MountGuard},
    layer::{Expect, Layer, walk},
    registry::{ImageDigests, LayerBlob, ScriptedRegistry},
};
use tokio::runtime::Runtime;

pub const REPOSITORY: &str = "test/image";
/// Longer than anything here takes; only a bug reaches it.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Fields are dropped in order: the plane before the runtime it runs on, the mount's guard before its directory.
pub struct Bed {
    pub plane: Option<Arc<Plane>>,
    pub runtime: Runtime,
    pub origin: ScriptedRegistry,
    pub mirror: Option<ScriptedRegistry>,
    config: PlaneConfig,
    _mount: MountGuard,
    pub dir: tempfile::TempDir,
}

impl Bed {
    /// `None` on a machine that cannot mount.
    pub fn new() -> Option<Bed> {
        Bed::with(|_| {}, false)
    }

    /// With a mirror in front of the origin.
    pub fn mirrored() -> Option<Bed> {
        Bed::with(|_| {}, true)
    }

    /// With changed settings. Nothing is fetched in the background unless they say so.
    pub fn with(change: impl FnOnce(&mut PlaneConfig), mirrored: bool) -> Option<Bed> {
        if !guard::require_root_and_fuse() {
            return None;
        }
        let dir = guard::temp_dir();
        let mut config = PlaneConfig::new(dir.path());
        config.fill = Fill::Off;
        config.prefetch = false;
        change(&mut config);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
        let mut bed = Bed {
            plane: None,
            runtime,
            origin: ScriptedRegistry::start(),
            mirror: mirrored.then(ScriptedRegistry::start),
            config,
            _mount: MountGuard::new(dir.path().join("mnt")),
            dir,
        };
        bed.start();
        Some(bed)
    }

    /// Changes the settings of the next start.
    pub fn change(&mut self, change: impl FnOnce(&mut PlaneConfig)) {
        change(&mut self.config);
    }

    /// Starts a data plane over the directory, as a new process would.
    pub fn start(&mut self) {
        let mut hosts = registry::Config {
            backoff_min: Duration::from_millis(1),
            backoff_max: Duration::from_millis(10),
            retries: 2,
            ..registry::Config::default()
        };
        if let Some(mirror) = &self.mirror {
            let mirror = MirrorConfig {
                host: mirror.host(),
                insecure: true,
                headers: Vec::new(),
                request_timeout: None,
            };
            let host = HostConfig { insecure: true, mirrors: vec![mirror] };
            hosts.hosts.insert(self.origin.host(), host);
        }
        let _entered = self.runtime.enter();
        let registry = Registry::new(hosts).unwrap();
        let plane = Plane::start(self.config.clone(), registry).unwrap();
        plane.serve(Arc::new(NoKeeper)).unwrap();
        self.plane = Some(plane);
    }

    /// Ends the data plane; whether its mount was idle and went with it.
    pub fn stop(&mut self) {
        let plane = self.plane.take().unwrap();
        guard::deadline(LIMIT, move || plane.stop()).unwrap();
    }

    pub fn plane(&self) -> &Arc<Plane> {
        self.plane.as_ref().unwrap()
    }

    /// Puts an image of lazy layers into the origin, and the mirror if there is one.
    pub fn push(&self, layers: &[&Built]) -> ImageDigests {
        let blobs: Vec<LayerBlob> = layers.iter().map(|b| LayerBlob::lazy(b)).collect();
        if let Some(mirror) = &self.mirror {
            mirror.put_image(REPOSITORY, "latest", &blobs, &serde_json::Value::Null);
        }
        self.origin.put_image(REPOSITORY, "latest", &blobs, &serde_json::Value::Null)
    }

    /// What containerd's labels say of layer `n` of an image.
    pub fn request(&self, image: &ImageDigests, layers: &[&Built], n: usize) -> AttachRequest {
        AttachRequest {
            reference: format!("{}/{REPOSITORY}:latest", self.origin.host()).parse().unwrap(),
            blob_digest: image.layers[n].clone(),
            blob_size: None,
            toc_digest: layers[n].toc_digest.parse().unwrap(),
            manifest_digest: Some(image.manifest.clone()),
            neighbours: image.layers[n..].to_vec(),
            prefetch_bytes: None,
            fill: None,
            below: Vec::new(),
        }
    }

    pub fn attach(&self, slot: u64, request: &AttachRequest) -> Result<Attached, AttachError> {
        self.runtime.block_on(async {
            tokio::time::timeout(LIMIT, self.plane().attach(slot, request)).await.unwrap()
        })
    }

    pub fn detach(&self, slot: u64) {
        let _entered = self.runtime.enter();
        self.plane().detach(slot);
    }

    /// Pushes an image of one layer and attaches it in slot 1.
    pub fn attach_one(&self, built: &Built) -> PathBuf {
        let image = self.push(&[built]);
        self.attach(1, &self.request(&image, &[built], 0)).unwrap();
        self.slot(1)
    }

    pub fn slot(&self, slot: u64) -> PathBuf {
        self.plane().mountpoint().join(slot.to_string())
    }

    /// Ranges of blobs that were asked for since the last call.
    pub fn ranges(&self) -> Vec<std::ops::Range<u64>> {
        let log = self.origin.take_requests();
        log.iter().filter(|r| r.is_blob_get()).map(|r| r.single().expect("one absolute range")).collect()
    }

    /// Lets the kernel forget what it has read.
    pub fn forget_pages(&self) {
        fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    }

    /// Requests the kernel has sent so far.
    pub fn messages(&self) -> u64 {
        self.plane().fuse_counters().total()
    }
}

/// Reads a whole tree under a deadline.
pub fn tree(root: PathBuf) -> Vec<Expect> {
    guard::deadline(LIMIT, move || walk(&root).unwrap()).unwrap()
}

/// Reads a file under a deadline.
pub fn read(path: PathBuf) -> std::io::Result<Vec<u8>> {
    guard::deadline(LIMIT, move || std::fs::read(path)).unwrap()
}

/// What containerd's unpacker makes of a layer: no attributes `trusted.*` but overlayfs' own mark, no time before 1970.
pub fn unpacked(layer: &Layer) -> Vec<Expect> {
    let mut tree = layer.expected();
    for found in &mut tree {
        found.xattrs.retain(|name, _| !name.starts_with(b"trusted.") || name == b"trusted.overlay.opaque");
        if found.mtime.0 < 0 {
            found.mtime = (0, 0);
        }
    }
    tree
}
