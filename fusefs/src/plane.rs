//! The data plane: one mount, its slots, and the layers in them.
//!
//! Owns: which layers are open, which slots show them, their background work, and the directories of layers nobody
//! shows any more. May not: know snapshots, labels or containerd.
//!
//! Invariants: a layer is opened by one task at a time; a directory is deleted only under its layer's lock and when
//! no slot shows it; nothing here waits for the mount that this process serves.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use estargz::Digest;
use futures::{StreamExt as _, stream};
use parking_lot::Mutex;
use registry::{Reference, Registry};
use tokio::{
    sync::{Semaphore, mpsc},
    time::Instant,
};

use crate::{
    cache::CacheConfig,
    fetch::Sign,
    fetch::{Engine, FetchConfig, FetchCounters},
    fs::OpaqueXattr,
    fuse::{Connection, FuseCounters, Keeper},
    layer::Layer,
    manifest::{ManifestLayer, Manifests},
    resolve::{AttachError, LayerSpec, Resolver},
    slots::Slots,
    store::BootId,
    view::{Lower, View},
};

mod behind;
mod described;
mod mounted;

/// Layers of one image opened at once.
pub(crate) const PARALLEL_OPENS: usize = 8;

/// Whether whole layers are fetched behind the running containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// All of them.
    On,
    /// Only what is read.
    Off,
}

/// Settings of the data plane.
#[derive(Debug, Clone)]
pub struct PlaneConfig {
    /// Holds `mnt` and `layers`.
    pub root: PathBuf,
    /// Threads that take FUSE requests.
    pub threads: usize,
    /// Which opaque marker overlayfs looks for.
    pub opaque: OpaqueXattr,
    /// How long a reader waits for bytes before it is told EIO.
    pub read_deadline: Duration,
    /// How long opening a layer may take.
    pub attach_deadline: Duration,
    /// Whether manifests are asked for the TOC digests of layers that come without.
    pub find_tocs: bool,
    /// Whether the range before a layer's landmark is fetched first.
    pub prefetch: bool,
    /// Bytes to prefetch of a layer that has no landmark.
    pub prefetch_bytes: u64,
    /// Whether whole layers are fetched behind the running containers.
    pub fill: Fill,
    /// Settings of the fetch engine.
    pub fetch: FetchConfig,
    /// Limits on formats.
    pub limits: estargz::Limits,
    /// Where it is mounted: `<root>/mnt` unless somebody else looks there.
    pub mountpoint: PathBuf,
    /// How long a mount that is kept stays when the process ends.
    pub stay: Stay,
}

/// How long a mount that is kept stays when its process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    /// As long as anything uses it.
    WhileUsed,
    /// Until it is drained: others fail without it.
    UntilDrained,
}

impl PlaneConfig {
    /// The defaults for a root directory.
    pub fn new(root: impl Into<PathBuf>) -> PlaneConfig {
        let root = root.into();
        PlaneConfig {
            mountpoint: root.join("mnt"),
            stay: Stay::WhileUsed,
            root,
            threads: std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(2, 4),
            opaque: OpaqueXattr::default(),
            read_deadline: Duration::from_secs(300),
            attach_deadline: Duration::from_secs(25),
            find_tocs: true,
            prefetch: true,
            prefetch_bytes: 0,
            fill: Fill::On,
            fetch: FetchConfig::default(),
            limits: estargz::Limits::default(),
        }
    }
}

/// A layer to attach, as containerd's labels describe it.
#[derive(Debug, Clone)]
pub struct AttachRequest {
    /// The image it is pulled by.
    pub reference: Reference,
    /// Digest of its blob.
    pub blob_digest: String,
    /// Bytes of its blob, where known: otherwise the image's manifest is asked.
    pub blob_size: Option<u64>,
    /// Digest of its TOC.
    pub toc_digest: Digest,
    /// Digest of the platform's manifest, where containerd says it.
    pub manifest_digest: Option<String>,
    /// Blob digests of the image's layers from this one to the top.
    pub neighbours: Vec<String>,
    /// Bytes to prefetch if the layer has no landmark, instead of the configured number.
    pub prefetch_bytes: Option<u64>,
    /// Whether all of the layer is fetched behind the container, if the image says so itself.
    pub fill: Option<Fill>,
    /// What lies below it, the nearest first.
    pub below: Vec<Below>,
}

/// A snapshot below a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Below {
    /// The slot it has if it is a lazy layer.
    pub slot: u64,
    /// Where it is unpacked if it is not.
    pub dir: PathBuf,
}

/// The root directory of an attached layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The directory that can be used instead of the slot: the layer has graduated.
    pub tree: Option<PathBuf>,
}

/// A layer has become a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graduation {
    /// The slots whose snapshots can use it instead.
    pub slots: Vec<u64>,
    /// The directory.
    pub tree: PathBuf,
}

/// What became of a layer that was to be evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evicted {
    /// The layer.
    pub digest: Digest,
    /// Bytes of content that went.
    pub bytes: u64,
    /// Why nothing went.
    pub refused: Option<String>,
}

/// What a layer takes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerUsage {
    /// Bytes of content present.
    pub bytes: u64,
    /// Inodes of its tree.
    pub inodes: u64,
}

/// The data plane of one daemon.
#[derive(Debug)]
pub struct Plane {
    config: PlaneConfig,
    connection: Mutex<Option<Arc<Connection>>>,
    keeper: Mutex<Option<Arc<dyn Keeper>>>,
    slots: Arc<Slots>,
    fuse: Arc<FuseCounters>,
    engine: Arc<Engine>,
    registry: Registry,
    resolver: Arc<Resolver>,
    manifests: Manifests,
    opens: Semaphore,
    open: Mutex<HashMap<Digest, Open>>,
    locks: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    /// Slots that a layer is on its way to, and whether they were given up meanwhile: it must not arrive then.
    arriving: Mutex<HashMap<u32, bool>>,
    stopping: AtomicBool,
    draining: AtomicBool,
    trash: AtomicU64,
    /// One layer at a time becomes a directory: it takes the disk, not time.
    graduating: Semaphore,
    graduated: mpsc::Sender<Graduation>,
    graduations: Mutex<Option<mpsc::Receiver<Graduation>>>,
}

#[derive(Debug)]
struct Open {
    layer: Arc<Layer>,
    /// What [`Plane::stamp`] said before it was opened from disk.
    stamp: Option<SystemTime>,
    since: Instant,
    background: bool,
}

impl Plane {
    /// Sets up what serves, without serving yet: slots that will be restored are expected before [`Plane::serve`]. Needs no network. Call it on a
    /// tokio runtime.
    pub fn start(config: PlaneConfig, registry: Registry) -> io::Result<Arc<Plane>> {
        let layers = config.root.join("layers");
        // What is there may be a mount that waits for us: it is not looked at.
        make_dir(&config.mountpoint)?;
        fs::create_dir_all(&layers)?;
        let engine = Arc::new(Engine::new(config.fetch, config.limits));
        let (slots, fuse) = (Arc::new(Slots::default()), Arc::new(FuseCounters::default()));
        let resolver = Resolver::new(layers, registry.clone(), engine.clone(), BootId::current()?);
        let (graduated, graduations) = mpsc::channel(16);
        let plane = Arc::new(Plane {
            graduating: Semaphore::new(1),
            graduated,
            graduations: Mutex::new(Some(graduations)),
            config,
            connection: Mutex::new(None),
            keeper: Mutex::new(None),
            slots,
            fuse,
            engine,
            registry,
            resolver: Arc::new(resolver),
            manifests: Manifests::default(),
            opens: Semaphore::new(PARALLEL_OPENS),
            open: Mutex::default(),
            locks: Mutex::default(),
            arriving: Mutex::default(),
            stopping: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            trash: AtomicU64::new(0),
        });
        tokio::spawn(behind::forget_unused(Arc::downgrade(&plane)));
        Ok(plane)
    }

    /// Tells when layers become directories. Whoever takes it must receive until it ends; it is there once.
    pub fn graduations(&self) -> Option<mpsc::Receiver<Graduation>> {
        self.graduations.lock().take()
    }

    /// What the kernel asked.
    pub fn fuse_counters(&self) -> &FuseCounters {
        &self.fuse
    }

    /// What was fetched.
    pub fn fetch_counters(&self) -> &FetchCounters {
        self.engine.counters()
    }

    /// The layer a slot shows.
    pub fn layer(&self, slot: u64) -> Option<Arc<Layer>> {
        u32::try_from(slot).ok().and_then(|s| self.slots.get(s)).map(|view| view.layer().clone())
    }

    /// The directory that can be used instead of a slot.
    pub fn tree(&self, slot: u64) -> Option<PathBuf> {
        let view = u32::try_from(slot).ok().and_then(|s| self.slots.get(s))?;
        view.graduated().map(Path::to_owned)
    }

    /// Shows a layer in a slot. A layer that is open or on disk needs no network; otherwise its blob's tail is read,
    /// and the image's other layers start opening too.
    pub async fn attach(
        self: &Arc<Self>,
        slot: u64,
        request: &AttachRequest,
    ) -> Result<Attached, AttachError> {
        self.attach_by(slot, request, Instant::now() + self.config.attach_deadline).await
    }

    /// [`Plane::attach`] with a deadline for what needs the network.
    pub(crate) async fn attach_by(
        self: &Arc<Self>,
        slot: u64,
        request: &AttachRequest,
        deadline: Instant,
    ) -> Result<Attached, AttachError> {
        let slot = u32::try_from(slot).ok().filter(|&s| s > 0).ok_or(AttachError::Slot(slot))?;
        // A task of its own: who gives up waiting must not leave the layer's lock while its directory is being made.
        let (plane, request) = (self.clone(), request.clone());
        // One that could not be restored keeps its place until it arrives or is given up.
        let first = {
            let mut arriving = self.arriving.lock();
            let first = !arriving.contains_key(&slot);
            arriving.entry(slot).or_insert(false);
            first
        };
        let task = tokio::spawn(async move {
            let attached = plane.attach_now(slot, &request, deadline).await;
            if attached.is_err() && first {
                plane.arriving.lock().remove(&slot);
            }
            attached
        });
        task.await.unwrap_or(Err(AttachError::Stopping))
    }

    async fn attach_now(
        self: &Arc<Self>,
        slot: u32,
        request: &AttachRequest,
        deadline: Instant,
    ) -> Result<Attached, AttachError> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(AttachError::Stopping);
        }
        if self.draining.load(Ordering::Acquire) {
            return Err(AttachError::Draining);
        }
        let mut spec = spec_of(request);
        let lock = self.lock(spec.toc_digest);
        let mut locked = lock.lock().await;
        let layer = match self.open_here(&spec).await {
            Some(layer) => layer,
            None => {
                // The manifest is fetched without the lock: the image's other layers wait for it, too.
                drop(locked);
                if spec.blob_size.is_none()
                    && let Some(ManifestLayer { size, toc, .. }) =
                        self.ask_manifest(request, deadline).await?
                {
                    spec.blob_size = Some(size);
                    let toc = toc.filter(|toc| toc.digest == spec.toc_digest);
                    spec.toc_position = toc.and_then(|toc| toc.position);
                }
                locked = lock.lock().await;
                self.open(&spec, deadline).await?
            }
        };
        let attached = self.show(slot, &layer, request).await?;
        drop(locked);
        self.root_changed();
        // Whoever pulls an image mostly runs it next.
        layer.engine().note(Sign::Pulled);
        self.start_background(&layer, request);
        Ok(attached)
    }

    /// Opens a layer that will be attached.
    pub(crate) async fn open_ahead(
        &self,
        request: &AttachRequest,
        deadline: Instant,
    ) -> Result<Arc<Layer>, AttachError> {
        let spec = spec_of(request);
        let lock = self.lock(spec.toc_digest);
        let _locked = lock.lock().await;
        self.open(&spec, deadline).await
    }

    /// Where it keeps its data.
    pub(crate) fn root(&self) -> &Path {
        &self.config.root
    }

    /// The table of slots.
    pub(crate) fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Opens layers that will be restored, several at a time, so that restoring them takes no time.
    pub async fn open_local(self: Arc<Self>, requests: Vec<AttachRequest>) {
        let opening = requests.into_iter().map(|request| {
            let plane = self.clone();
            async move {
                let spec = spec_of(&request);
                let lock = plane.lock(spec.toc_digest);
                let _locked = lock.lock().await;
                // One that is not here is found missing again.
                let _ = plane.open_here(&spec).await;
            }
        });
        stream::iter(opening).buffer_unordered(PARALLEL_OPENS).collect::<()>().await;
    }

    /// Another process, which has ended, went on with the layers' directories after they were opened here: what it has changed
    /// the shape of is opened again when it is needed.
    pub fn look_again(&self) {
        self.open.lock().retain(|digest, open| {
            let same = open.stamp.is_some() && open.stamp == self.stamp(*digest);
            if same {
                open.layer.store().count(open.layer.index());
            }
            same
        });
    }

    /// When a file of a layer's directory was last made, renamed or removed.
    fn stamp(&self, digest: Digest) -> Option<SystemTime> {
        fs::metadata(self.layers_dir().join(digest.hex())).and_then(|dir| dir.modified()).ok()
    }

    /// These slots will be restored: who asks for one waits until it is, or cannot be.
    pub fn expect(&self, slots: impl IntoIterator<Item = u64>) {
        self.slots.expect(slots.into_iter().filter_map(|slot| u32::try_from(slot).ok()));
    }

    /// Whether slots that were not named yet are expected as well.
    pub fn expect_others(&self, others: bool) {
        self.slots.expect_others(others);
    }

    /// A slot that was expected cannot be restored.
    pub fn give_up(&self, slot: u64) {
        drop(u32::try_from(slot).map(|slot| Arrived(&self.slots, slot)));
    }

    /// An expected slot that somebody waits for.
    pub fn awaited(&self) -> Option<u64> {
        self.slots.awaited().map(u64::from)
    }

    /// Shows a layer in an expected slot again after a restart, from its directory alone. Lower slots must come first.
    pub async fn restore(
        self: &Arc<Self>,
        slot: u64,
        request: &AttachRequest,
    ) -> Result<Attached, AttachError> {
        let slot = u32::try_from(slot).ok().filter(|&s| s > 0).ok_or(AttachError::Slot(slot))?;
        // Whatever becomes of it, nobody waits any longer.
        let _arrived = Arrived(&self.slots, slot);
        let spec = spec_of(request);
        let lock = self.lock(spec.toc_digest);
        let locked = lock.lock().await;
        let Some(layer) = self.open_here(&spec).await else {
            self.arriving.lock().insert(slot, false);
            return Err(AttachError::NotLocal(spec.toc_digest));
        };
        let attached = self.show(slot, &layer, request).await?;
        drop(locked);
        self.start_background(&layer, request);
        Ok(attached)
    }

    /// Empties a slot; the directory of a layer that no slot shows is deleted behind. Idempotent, never blocks on the
    /// mount.
    pub fn detach(self: &Arc<Self>, slot: u64) {
        let Some(slot) = u32::try_from(slot).ok() else { return };
        let removed = {
            let mut arriving = self.arriving.lock();
            if let Some(retired) = arriving.get_mut(&slot) {
                *retired = true;
            }
            self.slots.remove(slot)
        };
        let Some(view) = removed else { return };
        if let Some(connection) = self.connection.lock().clone() {
            // Invalidation takes locks that readers may hold while they wait for us.
            tokio::task::spawn_blocking(move || connection.forget_slot(slot));
        }
        let (plane, digest) = (self.clone(), view.layer().digest());
        drop(view);
        tokio::spawn(async move { plane.forget(digest).await });
    }

    /// What the layer in a slot takes on disk. Of several slots that show one layer the first has all of it, so that sums
    /// are right.
    pub fn usage(&self, slot: u64) -> Option<LayerUsage> {
        let layer = self.layer(slot)?;
        let first = self.slots.of(&layer).first().is_some_and(|(first, _)| u64::from(*first) == slot);
        let usage = LayerUsage { bytes: layer.store().bytes(), inodes: u64::from(layer.index().nodes()) };
        Some(if first { usage } else { LayerUsage::default() })
    }

    /// The layers that are open, with the slots that show them.
    pub fn layers(&self) -> Vec<(Arc<Layer>, Vec<u64>)> {
        let open: Vec<Arc<Layer>> = self.open.lock().values().map(|open| open.layer.clone()).collect();
        let slots = |layer: &Layer| self.slots.of(layer).iter().map(|(slot, _)| u64::from(*slot)).collect();
        open.into_iter().map(|layer| (layer.clone(), slots(&layer))).collect()
    }

    /// The limits of what layers keep.
    pub fn cache(&self) -> &CacheConfig {
        self.engine.cache().config()
    }

    /// Gives back the disk that lazy layers take: those named (all if none is) that were not read for as long. Blocking.
    pub fn evict(&self, wanted: &[Digest], unused: Duration) -> Vec<Evicted> {
        let open: HashMap<Digest, Arc<Layer>> =
            self.layers().into_iter().map(|(layer, _)| (layer.digest(), layer)).collect();
        let all: Vec<Digest> =
            if wanted.is_empty() { open.keys().copied().collect() } else { wanted.to_vec() };
        let evict = |digest: Digest| {
            let refused = |why: &str| Evicted { digest, bytes: 0, refused: Some(why.to_owned()) };
            let Some(layer) = open.get(&digest) else { return refused("there is no such layer") };
            if layer.graduated().is_some() {
                return refused("it is a directory that containers may use");
            }
            if layer.unused() < unused {
                return refused("it was read since");
            }
            match self.engine.cache().evict(layer, u64::MAX) {
                Ok(bytes) => Evicted { digest, bytes, refused: None },
                Err(error) => refused(&error.to_string()),
            }
        };
        all.into_iter().map(evict).collect()
    }

    /// Deletes the directories of layers that are neither open nor among `wanted`, and what an earlier deletion left.
    /// Blocking.
    pub fn collect(&self, wanted: &HashSet<Digest>) -> io::Result<()> {
        for entry in fs::read_dir(self.layers_dir())? {
            let entry = entry?;
            let name = entry.file_name();
            let digest = name.to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
            let lock = digest.map(|d| self.lock(d));
            let _locked = lock.as_ref().map(|lock| lock.blocking_lock());
            if digest.is_some_and(|d| wanted.contains(&d) || self.open.lock().contains_key(&d)) {
                continue;
            }
            tracing::info!(path = %entry.path().display(), "deleting a layer that no snapshot names");
            if let Err(error) = self.discard(&entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "deleting a layer");
            }
        }
        Ok(())
    }

    fn layers_dir(&self) -> PathBuf {
        self.config.root.join("layers")
    }

    fn lock(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock();
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(&digest).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        locks.insert(digest, Arc::downgrade(&lock));
        lock
    }

    /// The layer, if it is open or on disk. Under its lock.
    async fn open_here(&self, spec: &LayerSpec) -> Option<Arc<Layer>> {
        if let Some(open) = self.open.lock().get(&spec.toc_digest) {
            if let Ok(source) = self.resolver.source(spec, spec.blob_size) {
                open.layer.sources().add(source);
            }
            return Some(open.layer.clone());
        }
        let (resolver, job) = (self.resolver.clone(), spec.clone());
        let stamp = self.stamp(spec.toc_digest);
        match tokio::task::spawn_blocking(move || resolver.open_local(&job)).await.ok()? {
            Ok(layer) => Some(self.enter(layer, stamp)),
            Err(AttachError::NotLocal(_)) => None,
            Err(error) => {
                tracing::warn!(layer = %spec.toc_digest, %error, "the layer's directory cannot be used; opening it anew");
                None
            }
        }
    }

    /// The layer, from wherever it is. Under its lock.
    async fn open(&self, spec: &LayerSpec, deadline: Instant) -> Result<Arc<Layer>, AttachError> {
        if let Some(layer) = self.open_here(spec).await {
            return Ok(layer);
        }
        let layer = self.resolver.open_remote(spec, deadline).await?;
        tracing::debug!(
            layer = %spec.toc_digest, source = %layer.sources().name(), nodes = layer.index().nodes(), "layer opened"
        );
        Ok(self.enter(layer, None))
    }

    fn enter(&self, layer: Arc<Layer>, stamp: Option<SystemTime>) -> Arc<Layer> {
        let open = Open { layer: layer.clone(), stamp, since: Instant::now(), background: false };
        self.open.lock().insert(layer.digest(), open);
        self.engine.cache().add(&layer);
        layer
    }

    /// Puts the layer in the slot as its chain shows it. Under the layer's lock.
    async fn show(
        &self,
        slot: u32,
        layer: &Arc<Layer>,
        request: &AttachRequest,
    ) -> Result<Attached, AttachError> {
        let below: Vec<Lower> = request
            .below
            .iter()
            .map(|below| match u32::try_from(below.slot).ok().and_then(|s| self.slots.get(s)) {
                Some(view) => Lower::View(view),
                None => Lower::Dir(below.dir.clone()),
            })
            .collect();
        let job = layer.clone();
        let view = tokio::task::spawn_blocking(move || View::new(job, &below)).await;
        let view = Arc::new(view.unwrap_or_else(|_| View::new(layer.clone(), &[])));
        let mut arriving = self.arriving.lock();
        if arriving.remove(&slot) == Some(true) {
            return Err(AttachError::Retired(slot));
        }
        self.slots.insert(slot, &view);
        drop(arriving);
        let (uid, gid) = view.attr(0).map_or((0, 0), |a| (a.uid, a.gid));
        Ok(Attached { uid, gid, tree: view.graduated().map(Path::to_owned) })
    }

    fn root_changed(&self) {
        if let Some(connection) = self.connection.lock().clone() {
            tokio::task::spawn_blocking(move || connection.root_changed());
        }
    }

    /// Starts prefetch and fill, once for each layer.
    fn start_background(self: &Arc<Self>, layer: &Arc<Layer>, request: &AttachRequest) {
        match self.open.lock().get_mut(&layer.digest()) {
            Some(open) if !open.background => open.background = true,
            _ => return,
        }
        let prefetch = match layer.index().prefetch_end() {
            _ if !self.config.prefetch => 0,
            Some(end) => end,
            None => request.prefetch_bytes.unwrap_or(self.config.prefetch_bytes),
        };
        if prefetch > 0 {
            layer.position().set_profiled();
        }
        let fill = request.fill.unwrap_or(self.config.fill);
        if fill == Fill::On {
            layer.position().set_filled();
        }
        tokio::spawn(behind::work_behind(Arc::downgrade(self), Arc::downgrade(layer), prefetch, fill));
    }

    /// Starts prefetch and fill again, of a layer that was given up meanwhile.
    pub(crate) fn fill_again(self: &Arc<Self>, request: &AttachRequest) {
        let layer = self.open.lock().get_mut(&request.toc_digest).map(|open| {
            open.background = false;
            open.layer.clone()
        });
        if let Some(layer) = layer {
            self.start_background(&layer, request);
        }
    }

    /// Forgets a layer and deletes its directory, unless a slot shows it.
    async fn forget(&self, digest: Digest) {
        let lock = self.lock(digest);
        let _locked = lock.lock().await;
        let (dir, retired) = {
            let mut open = self.open.lock();
            match open.get(&digest) {
                Some(unused) if !self.slots.shows(&unused.layer) => {
                    let dir = unused.layer.store().dir().to_owned();
                    (dir, open.remove(&digest).map(|open| open.layer))
                }
                _ => return,
            }
        };
        // Whoever still has it must not reach into the directory of the one that comes next.
        if let Some(layer) = retired {
            let _ = tokio::task::spawn_blocking(move || layer.store().retire()).await;
        }
        // Renamed under the lock, deleted outside of it.
        let trash = self.trash_name();
        match fs::rename(&dir, &trash) {
            Ok(()) => drop(tokio::task::spawn_blocking(move || delete(&trash))),
            Err(error) => tracing::warn!(path = %dir.display(), %error, "deleting a layer"),
        }
    }

    fn trash_name(&self) -> PathBuf {
        self.layers_dir().join(format!(
            ".trash-{}-{}",
            std::process::id(),
            self.trash.fetch_add(1, Ordering::Relaxed)
        ))
    }

    fn discard(&self, path: &Path) -> io::Result<()> {
        let trash = self.trash_name();
        fs::rename(path, &trash)?;
        if trash.is_dir() { fs::remove_dir_all(trash) } else { fs::remove_file(trash) }
    }
}

/// Ends the waiting for a slot.
struct Arrived<'a>(&'a Slots, u32);

impl Drop for Arrived<'_> {
    fn drop(&mut self) {
        self.0.arrived(self.1);
    }
}

fn spec_of(request: &AttachRequest) -> LayerSpec {
    LayerSpec {
        reference: request.reference.clone(),
        blob_digest: request.blob_digest.clone(),
        blob_size: request.blob_size,
        toc_digest: request.toc_digest,
        toc_position: None,
    }
}

/// Makes a directory, without a look at what is there.
fn make_dir(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Deletes what was renamed away. A download that was under way may still put a file into it.
fn delete(trash: &Path) {
    let deleted = (0..3).any(|_| fs::remove_dir_all(trash).is_ok());
    if !deleted {
        tracing::warn!(path = %trash.display(), "a deleted layer's directory stays until the next start");
    }
}
