//! References as directories: the additional layer store of containers/storage (podman, buildah, CRI-O, skopeo).
//!
//! `<mount>/<base64 of a reference>/<digest>/{diff,info,blob,use}`: `diff` is a layer's tree, `info` what containers/storage
//! records of it, `blob` its blob; whoever creates `use` or removes `<digest>` says that it uses the layer, or no longer does,
//! and is told that there is no such thing. The digest is a blob's for older clients, a TOC's for newer ones ([`info`]).
//!
//! Owns: which layer is behind which path, and that this outlives the process ([`record`]). May not: serve a layer's tree, which
//! is a slot of the [`Plane`] like any other.
//!
//! Invariants: a path once shown shows the same layer for ever, also when its tag has moved; what is asked of a FUSE thread
//! ([`Refs::lookup`]) never waits for the network: then the answer is a future; no answer takes longer than the limit; a client
//! that is told "not here" pulls the layer itself.

pub mod blob;
pub mod image;
pub mod info;
pub mod name;
pub mod record;

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    ops::Range,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use estargz::{Digest, Kind};
use futures::{StreamExt as _, stream};
use parking_lot::Mutex;
use registry::{Reference, Registry};
use tokio::{runtime::Handle, sync::watch, time::Instant};

use crate::{
    index::{Attr, Index},
    manifest,
    plane::{AttachRequest, Below, Fill, PARALLEL_OPENS, Plane},
    resolve::AttachError,
};
use blob::Blobs;
use name::Place;
use record::{By, Files, LayerRecord, RefRecord};

/// Changes of counts are written together.
const WRITE_AFTER: Duration = Duration::from_millis(200);
/// What a lookup has found not to be there is not looked for again for this long, and as long as that took: podman asks for each
/// layer of an image that it has just been told is not here.
const SETTLED: Duration = Duration::from_secs(5);
/// How often it is seen what nobody uses any more.
const TIDY: Duration = Duration::from_secs(60);
/// A reference that nobody has used for this long gives back its disk: podman counts a layer's use once it has it.
const UNUSED: Duration = Duration::from_secs(15 * 60);
/// And one that nobody uses or has asked for in this time is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a lookup is answered.
pub enum Looked {
    /// It is there.
    Found(Found),
    /// It is not.
    Nothing,
    /// It may be, once this is done.
    Later(Pin<Box<dyn Future<Output = Option<Found>> + Send>>),
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Something above the layers' trees.
    Place(Place),
    /// The root of the layer in a slot.
    Tree(u32),
}

impl fmt::Debug for Looked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Looked::Found(found) => write!(f, "{found:?}"),
            Looked::Nothing => f.write_str("Nothing"),
            Looked::Later(_) => f.write_str("Later"),
        }
    }
}

/// All references.
#[derive(Debug)]
pub struct Refs {
    plane: Weak<Plane>,
    registry: Registry,
    files: Files,
    blobs: Arc<Blobs>,
    /// How long a lookup may take.
    patience: Duration,
    state: Mutex<State>,
    /// Something has become known, or an attempt has ended.
    changed: watch::Sender<()>,
    runtime: Handle,
    /// What `info` says may be another process's way to say it.
    started: i64,
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<u32, RefRecord>,
    names: HashMap<String, u32>,
    /// The reference of each slot.
    slots: HashMap<u32, u32>,
    next: u32,
    jobs: HashMap<Job, Progress>,
    /// References to be written.
    changed: HashSet<u32>,
    /// TOC digests of layers that nobody used and that were given up: they are fetched again once somebody does.
    given_up: HashSet<String>,
}

/// Something that is done once at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Job {
    /// Asking the registry where a reference leads.
    Resolve(String),
    /// Showing all layers of a reference under one kind of digest.
    Show(u32, By),
}

#[derive(Debug, Clone, Copy)]
enum Progress {
    Running,
    Ended { at: Instant, took: Duration },
}

impl Progress {
    /// Whether there is no use in doing it again yet.
    fn is_settled(self) -> bool {
        match self {
            Progress::Running => true,
            Progress::Ended { at, took } => at.elapsed() < took.max(SETTLED),
        }
    }
}

impl State {
    fn enter(&mut self, record: RefRecord) {
        self.names.insert(record.reference.clone(), record.number);
        self.slots.extend(record.slots().map(|slot| (slot, record.number)));
        self.records.insert(record.number, record);
    }

    /// The layer in a slot, and the digest it is named by.
    fn layer(&self, slot: u32) -> Option<(&RefRecord, &LayerRecord, By)> {
        let record = self.records.get(self.slots.get(&slot)?)?;
        let (place, by) = record.in_slot(slot)?;
        Some((record, &record.layers[place], by))
    }

    fn layer_mut(&mut self, slot: u32) -> Option<(&mut LayerRecord, By)> {
        let record = self.records.get_mut(self.slots.get(&slot)?)?;
        let (place, by) = record.in_slot(slot)?;
        record.used = seconds();
        Some((&mut record.layers[place], by))
    }

    /// The slot of the layer that a reference has under this digest.
    fn named(&self, number: u32, digest: &str) -> Option<(u32, By)> {
        let record = self.records.get(&number)?;
        let (place, by) = record.find(digest)?;
        Some((record.layers[place].entry(by).slot, by))
    }

    fn is_running(&self, job: &Job) -> bool {
        matches!(self.jobs.get(job), Some(Progress::Running))
    }
}

impl Refs {
    /// Reads what is known of references in `<root>/refs`. `patience` is how long a lookup may take. On a tokio runtime.
    ///
    /// # Errors
    ///
    /// The directory cannot be used.
    pub fn open(plane: &Arc<Plane>, registry: Registry, patience: Duration) -> io::Result<Arc<Refs>> {
        let files = Files::open(&plane.root().join("refs"))?;
        let (records, next) = files.load()?;
        let mut state = State { next, ..State::default() };
        for record in records {
            if record.uses() == 0 {
                state.given_up.extend(record.layers.iter().map(|layer| layer.toc_digest.clone()));
            }
            state.enter(record);
        }
        let refs = Arc::new(Refs {
            plane: Arc::downgrade(plane),
            blobs: Arc::new(Blobs::new(registry.clone())),
            registry,
            files,
            patience,
            state: Mutex::new(state),
            changed: watch::Sender::new(()),
            runtime: Handle::current(),
            started: i64::try_from(seconds()).unwrap_or(0),
        });
        tokio::spawn(tidy_often(Arc::downgrade(&refs)));
        Ok(refs)
    }

    /// The slots that were shown before, with their layers: they are to be restored.
    pub fn shown(&self) -> Vec<(u64, AttachRequest)> {
        let state = self.state.lock();
        let mut shown: Vec<_> = state
            .records
            .values()
            .flat_map(|record| [By::Blob, By::Toc].map(|by| (record, by)))
            .flat_map(|(record, by)| requests(record, by))
            .filter(|(entry, _)| entry.shown)
            .map(|(entry, request)| (u64::from(entry.slot), request))
            .collect();
        shown.sort_by_key(|(slot, _)| *slot);
        shown
    }

    /// The TOC digests of all layers that may be asked for.
    pub fn layers(&self) -> HashSet<Digest> {
        let state = self.state.lock();
        let layers = state.records.values().flat_map(|record| &record.layers);
        layers.filter_map(|layer| layer.toc_digest.parse().ok()).collect()
    }

    /// What went wrong with a reference may go well now: somebody has brought a login for it.
    pub fn try_again(&self, reference: &str) {
        let mut state = self.state.lock();
        let number = state.names.get(reference).copied();
        state.jobs.retain(|job, progress| {
            let same = match job {
                Job::Resolve(text) => text == reference,
                Job::Show(shown, _) => Some(*shown) == number,
            };
            !same || matches!(progress, Progress::Running)
        });
    }

    /// Looks for a name in a directory.
    pub fn lookup(self: &Arc<Self>, parent: Place, name: &[u8]) -> Looked {
        let here = |place| Looked::Found(Found::Place(place));
        match parent {
            Place::Root => {
                let Some(text) = name::decode(name) else { return Looked::Nothing };
                if let Some(&number) = self.state.lock().names.get(&text) {
                    return here(Place::Reference(number));
                }
                let Ok(reference) = text.parse() else { return Looked::Nothing };
                let refs = self.clone();
                Looked::Later(Box::pin(async move {
                    refs.resolve(text, reference).await.map(|number| Found::Place(Place::Reference(number)))
                }))
            }
            Place::Reference(number) => {
                let Some(digest) = std::str::from_utf8(name).ok().filter(|name| name.contains(':')) else {
                    return Looked::Nothing;
                };
                let known = self.state.lock().named(number, digest);
                if let Some((slot, _)) = known.filter(|(slot, _)| self.is_shown(*slot)) {
                    return here(Place::Layer(slot));
                }
                let (refs, digest) = (self.clone(), digest.to_owned());
                Looked::Later(Box::pin(async move {
                    refs.find(number, digest).await.map(|slot| Found::Place(Place::Layer(slot)))
                }))
            }
            Place::Layer(slot) => match name {
                b"diff" if self.is_shown(slot) => Looked::Found(Found::Tree(slot)),
                b"diff" => {
                    // It could not be restored.
                    let refs = self.clone();
                    Looked::Later(Box::pin(async move { refs.find_again(slot).await.map(Found::Tree) }))
                }
                b"info" => here(Place::Info(slot)),
                b"blob" => here(Place::Blob(slot)),
                _ => Looked::Nothing,
            },
            Place::Info(_) | Place::Blob(_) => Looked::Nothing,
        }
    }

    /// What `stat` says; `None` for what is not there any more.
    pub fn attr(&self, place: Place) -> Option<Attr> {
        let state = self.state.lock();
        let attr = |kind, mode, nlink, size, mtime| Attr {
            kind,
            mode,
            uid: 0,
            gid: 0,
            nlink,
            rdev: (0, 0),
            size,
            mtime: (mtime, 0),
        };
        let dir = |mode| attr(Kind::Directory, mode, 2, 0, 0);
        Some(match place {
            // Set-id programs of images lie under it, and what their registries give to root alone.
            Place::Root => dir(0o700),
            Place::Reference(number) => state.records.get(&number).map(|_| dir(0o755))?,
            Place::Layer(slot) => state.layer(slot).map(|_| dir(0o755))?,
            Place::Info(slot) => {
                let (_, layer, by) = state.layer(slot)?;
                attr(Kind::Regular, 0o444, 1, info::info(layer, by).len() as u64, self.started)
            }
            Place::Blob(slot) => attr(Kind::Regular, 0o444, 1, state.layer(slot)?.1.blob_size, 0),
        })
    }

    /// The directory that a place is in.
    pub fn above(&self, place: Place) -> Place {
        match place {
            Place::Root | Place::Reference(_) => Place::Root,
            Place::Layer(slot) => {
                self.state.lock().slots.get(&slot).map_or(Place::Root, |n| Place::Reference(*n))
            }
            Place::Info(slot) | Place::Blob(slot) => Place::Layer(slot),
        }
    }

    /// What is in a directory that somebody has looked for, by name.
    pub fn entries(&self, place: Place) -> Vec<(String, Place)> {
        let state = self.state.lock();
        let mut entries: Vec<(String, Place)> = match place {
            Place::Root => {
                let name = |record: &RefRecord| name::encode(&record.reference);
                state.records.values().map(|record| (name(record), Place::Reference(record.number))).collect()
            }
            Place::Reference(number) => state
                .records
                .get(&number)
                .into_iter()
                .flat_map(|record| &record.layers)
                .flat_map(|layer| [(&layer.blob_digest, layer.by_blob), (&layer.toc_digest, layer.by_toc)])
                .filter(|(_, entry)| entry.shown)
                .map(|(digest, entry)| (digest.clone(), Place::Layer(entry.slot)))
                .collect(),
            Place::Layer(slot) => {
                vec![("blob".to_owned(), Place::Blob(slot)), ("info".to_owned(), Place::Info(slot))]
            }
            Place::Info(_) | Place::Blob(_) => Vec::new(),
        };
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        entries
    }

    /// The description of the layer in a slot.
    pub fn info(&self, slot: u32) -> Option<Vec<u8>> {
        let state = self.state.lock();
        let (_, layer, by) = state.layer(slot)?;
        Some(info::info(layer, by))
    }

    /// Bytes of the blob of the layer in a slot.
    ///
    /// # Errors
    ///
    /// The registry does not give them.
    pub async fn read_blob(
        &self,
        slot: u32,
        bytes: Range<u64>,
        deadline: Instant,
    ) -> Result<Bytes, AttachError> {
        let found =
            self.state.lock().layer(slot).map(|(record, layer, _)| {
                (record.reference.clone(), layer.blob_digest.clone(), layer.blob_size)
            });
        let (reference, digest, size) = found.ok_or(AttachError::Retired(slot))?;
        Ok(self.blobs.read(&reference.parse()?, &digest, size, bytes, deadline).await?)
    }

    /// Somebody uses the layer in a slot.
    pub fn take(self: &Arc<Self>, slot: u32) {
        self.count(slot, |uses| uses.saturating_add(1));
        let again = {
            let mut state = self.state.lock();
            let digest = state.layer(slot).map(|(_, layer, _)| layer.toc_digest.clone());
            let given_up = digest.is_some_and(|digest| state.given_up.remove(&digest));
            let found = state.layer(slot).filter(|_| given_up);
            found.and_then(|(record, _, by)| requests(record, by).into_iter().find(|(e, _)| e.slot == slot))
        };
        if let (Some((_, request)), Some(plane)) = (again, self.plane.upgrade()) {
            let _on = self.runtime.enter();
            plane.fill_again(&request);
        }
    }

    /// Somebody does not use a layer any more, and names it.
    pub fn release(self: &Arc<Self>, number: u32, digest: &[u8]) {
        let Ok(digest) = std::str::from_utf8(digest) else { return };
        let known = self.state.lock().named(number, digest);
        if let Some((slot, _)) = known {
            self.count(slot, |uses| uses.saturating_sub(1));
        }
    }

    fn count(self: &Arc<Self>, slot: u32, change: impl Fn(u64) -> u64) {
        let mut state = self.state.lock();
        let Some((layer, by)) = state.layer_mut(slot) else { return };
        let entry = layer.entry_mut(by);
        entry.uses = change(entry.uses);
        tracing::debug!(slot, uses = entry.uses, "uses of a layer");
        self.write_soon(&mut state, slot);
    }

    /// Writes what is known of a slot's reference in a moment.
    fn write_soon(self: &Arc<Self>, state: &mut State, slot: u32) {
        let Some(&number) = state.slots.get(&slot) else { return };
        let is_first = state.changed.is_empty();
        state.changed.insert(number);
        if is_first {
            let refs = self.clone();
            self.runtime.spawn(async move {
                tokio::time::sleep(WRITE_AFTER).await;
                let _ = tokio::task::spawn_blocking(move || refs.flush()).await;
            });
        }
    }

    /// Writes what has changed. Blocking.
    pub fn flush(&self) {
        let records: Vec<RefRecord> = {
            let mut state = self.state.lock();
            let changed = std::mem::take(&mut state.changed);
            changed.iter().filter_map(|number| state.records.get(number).cloned()).collect()
        };
        for record in records {
            if let Err(error) = self.files.write(&record) {
                tracing::warn!(reference = record.reference, %error, "a reference's record cannot be written");
            }
        }
    }

    fn is_shown(&self, slot: u32) -> bool {
        self.plane.upgrade().is_some_and(|plane| plane.slots().await_slot(slot).is_some())
    }

    /// The number of a reference that is not known yet.
    async fn resolve(self: Arc<Self>, text: String, reference: Reference) -> Option<u32> {
        let deadline = Instant::now() + self.patience;
        let (job, name) = (Job::Resolve(text.clone()), text.clone());
        self.start(job.clone(), |refs| async move { refs.resolve_now(reference, name).await });
        self.until(&job, deadline, |state| state.names.get(&text).copied()).await
    }

    /// The slot of the layer that a reference has under this digest, shown.
    async fn find(self: Arc<Self>, number: u32, digest: String) -> Option<u32> {
        let deadline = Instant::now() + self.patience;
        let known = self.state.lock().named(number, &digest);
        let (slot, by) = match known {
            Some(known) => known,
            None => {
                // The tag may lead elsewhere by now; a digest does not.
                let text = self.state.lock().records.get(&number).map(|record| record.reference.clone())?;
                let reference: Reference = text.parse().ok().filter(|r: &Reference| r.digest().is_none())?;
                let job = Job::Resolve(text.clone());
                self.start(job.clone(), |refs| async move { refs.resolve_now(reference, text).await });
                self.until(&job, deadline, |state| state.named(number, &digest)).await?
            }
        };
        self.show(number, by, slot, deadline).await
    }

    /// The slot of a layer that was there before.
    async fn find_again(self: Arc<Self>, slot: u32) -> Option<u32> {
        let deadline = Instant::now() + self.patience;
        let found = self.state.lock().layer(slot).map(|(record, _, by)| (record.number, by));
        let (number, by) = found?;
        self.show(number, by, slot, deadline).await
    }

    /// Waits until a slot is filled, together with the others of its reference.
    async fn show(self: Arc<Self>, number: u32, by: By, slot: u32, deadline: Instant) -> Option<u32> {
        let job = Job::Show(number, by);
        if !self.is_in_slot(slot) {
            self.start(job.clone(), |refs| async move { refs.show_now(number, by).await });
        }
        self.until(&job, deadline, |_| self.is_in_slot(slot).then_some(slot)).await
    }

    /// [`Refs::is_shown`] without waiting for the disk.
    fn is_in_slot(&self, slot: u32) -> bool {
        self.plane.upgrade().is_some_and(|plane| plane.slots().get(slot).is_some())
    }

    /// Does a job, unless somebody does, or has just done so.
    fn start<F>(self: &Arc<Self>, job: Job, run: impl FnOnce(Arc<Refs>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut state = self.state.lock();
        state.jobs.retain(|_, progress| progress.is_settled());
        if state.jobs.contains_key(&job) {
            return;
        }
        state.jobs.insert(job.clone(), Progress::Running);
        drop(state);
        let (refs, run) = (self.clone(), run(self.clone()));
        self.runtime.spawn(async move {
            let _ended = Ended { refs, job, since: Instant::now() };
            run.await;
        });
    }

    /// What `look` finds, at once or while a job runs.
    async fn until<T>(&self, job: &Job, deadline: Instant, look: impl Fn(&State) -> Option<T>) -> Option<T> {
        let mut changed = self.changed.subscribe();
        loop {
            changed.borrow_and_update();
            {
                let state = self.state.lock();
                let found = look(&state);
                if found.is_some() || !state.is_running(job) {
                    return found;
                }
            }
            tokio::time::timeout_at(deadline, changed.changed()).await.ok()?.ok()?;
        }
    }

    /// What is left for a job that lookups wait for: they are to hear of its end.
    fn limit(&self) -> Instant {
        Instant::now() + self.patience * 9 / 10
    }

    async fn resolve_now(self: Arc<Self>, reference: Reference, text: String) {
        if let Err(error) = self.try_resolve(&reference, text).await {
            tracing::warn!(%reference, reason = error.reason(), %error, "the reference is not shown");
        }
    }

    async fn try_resolve(self: &Arc<Self>, reference: &Reference, text: String) -> Result<(), AttachError> {
        let deadline = self.limit();
        let image = manifest::image(&self.registry, reference, None, deadline).await?;
        let known = |state: &State| Some(state.records.get(state.names.get(&text)?)?.clone());
        let before = known(&self.state.lock());
        if before.as_ref().is_some_and(|record| record.manifests.contains(&image.digest)) {
            return Ok(());
        }
        let diff_ids =
            match image.config.as_ref().filter(|_| image.layers.iter().any(|l| l.toc_digest.is_some())) {
                Some(config) => {
                    let config =
                        self.registry.blob_bytes(reference, config, image::CONFIG_LIMIT, deadline).await?;
                    image::diff_ids(&config)
                }
                None => Vec::new(),
            };
        let (refs, name) = (self.clone(), text.clone());
        let added = tokio::task::spawn_blocking(move || refs.add(name, &image, &diff_ids)).await;
        let path = || self.plane.upgrade().map_or(PathBuf::new(), |plane| plane.root().join("refs"));
        added
            .unwrap_or_else(|panic| Err(io::Error::other(panic)))
            .map_err(|error| AttachError::Io { path: path(), error })
    }

    /// Adds to a reference what it leads to now, on disk first. Only one job does so at a time for one reference. Blocking.
    fn add(&self, text: String, image: &manifest::ImageLayers, diff_ids: &[String]) -> io::Result<()> {
        let (record, next) = {
            let mut state = self.state.lock();
            let known = state.names.get(&text).and_then(|number| state.records.get(number)).cloned();
            let mut number = || {
                state.next = state.next.saturating_add(1);
                state.next - 1
            };
            let mut record = known.unwrap_or_else(|| RefRecord::new(number(), text, seconds()));
            image::add(&mut record, image, diff_ids, number);
            record.used = seconds();
            (record, state.next)
        };
        self.files.note_next(next)?;
        self.files.write(&record)?;
        let mut state = self.state.lock();
        let number = record.number;
        // Counts may have changed meanwhile; what is new has none.
        let mut record = record;
        if let Some(now) = state.records.get(&number) {
            record.layers[..now.layers.len()].clone_from_slice(&now.layers);
        }
        state.enter(record);
        drop(state);
        self.changed.send_replace(());
        Ok(())
    }

    /// Shows all layers of a reference, the lowest first: a layer may take owners and modes from those below.
    async fn show_now(self: Arc<Self>, number: u32, by: By) {
        let deadline = self.limit();
        let requests = self.state.lock().records.get(&number).map_or(Vec::new(), |r| requests(r, by));
        let Some(plane) = self.plane.upgrade() else { return };
        let missing: Vec<_> =
            requests.into_iter().filter(|(entry, _)| !self.is_in_slot(entry.slot)).collect();
        let opener = plane.clone();
        let open = move |(entry, request): (record::Entry, AttachRequest)| {
            let plane = opener.clone();
            async move {
                let opened = plane.open_ahead(&request, deadline).await;
                (entry, request, opened)
            }
        };
        let mut opening = stream::iter(missing).map(open).buffered(PARALLEL_OPENS);
        while let Some((entry, request, opened)) = opening.next().await {
            let attached = match opened {
                Ok(()) => plane.attach_by(u64::from(entry.slot), &request, deadline).await.map(drop),
                Err(error) => Err(error),
            };
            match attached {
                Ok(()) => self.note_shown(&plane, entry.slot),
                Err(error) => tracing::warn!(
                    reference = %request.reference, layer = request.blob_digest, reason = error.reason(), %error,
                    "the layer is not shown: it is pulled instead"
                ),
            }
        }
    }

    fn note_shown(self: &Arc<Self>, plane: &Plane, slot: u32) {
        let size = plane.layer(u64::from(slot)).map(|layer| tar_size(layer.index()));
        let mut state = self.state.lock();
        if let Some((layer, by)) = state.layer_mut(slot) {
            layer.entry_mut(by).shown = true;
            layer.estimated_size = size;
            self.write_soon(&mut state, slot);
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// Gives back the disk of layers that nobody uses, and forgets references that nobody has asked for in a long time.
    async fn tidy(self: &Arc<Self>) {
        self.blobs.forget_unused();
        let Some(plane) = self.plane.upgrade() else { return };
        let job = plane.clone();
        // Who counts wrongly and yet has it mounted keeps it.
        let is_mounted = tokio::task::spawn_blocking(move || job.is_used()).await.unwrap_or(true);
        let now = seconds();
        let (unused, forgotten) = {
            let state = self.state.lock();
            let idle = |record: &RefRecord, limit: Duration| {
                record.uses() == 0 && now.saturating_sub(record.used) > limit.as_secs()
            };
            let layers = |record: &RefRecord| -> HashSet<String> {
                record.layers.iter().map(|layer| layer.toc_digest.clone()).collect()
            };
            let (unused, used): (Vec<&RefRecord>, Vec<&RefRecord>) =
                state.records.values().partition(|record| idle(record, UNUSED));
            let used: HashSet<String> = used.into_iter().flat_map(&layers).collect();
            let forgotten: Vec<RefRecord> = unused
                .iter()
                .filter(|record| !is_mounted && idle(record, FORGOTTEN))
                .copied()
                .cloned()
                .collect();
            let unused: HashSet<String> = unused.into_iter().flat_map(layers).collect();
            (
                unused.difference(&used).filter_map(|digest| digest.parse().ok()).collect::<Vec<Digest>>(),
                forgotten,
            )
        };
        for record in forgotten {
            self.forget(&plane, record).await;
        }
        if !unused.is_empty() {
            let evicted = tokio::task::spawn_blocking(move || plane.evict(&unused, UNUSED)).await;
            let went = evicted.unwrap_or_default().into_iter().filter(|evicted| evicted.refused.is_none());
            self.state.lock().given_up.extend(went.map(|evicted| evicted.digest.to_string()));
        }
    }

    async fn forget(self: &Arc<Self>, plane: &Arc<Plane>, record: RefRecord) {
        tracing::info!(
            reference = record.reference,
            "nobody has used the reference in a long time: it is forgotten"
        );
        {
            let mut state = self.state.lock();
            state.names.remove(&record.reference);
            state.records.remove(&record.number);
            state.changed.remove(&record.number);
            state.slots.retain(|_, number| *number != record.number);
        }
        plane.forget_name(name::encode(&record.reference));
        record.slots().for_each(|slot| plane.detach(u64::from(slot)));
        let refs = self.clone();
        let removed = tokio::task::spawn_blocking(move || refs.files.remove(record.number)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(number = record.number, %error, "a forgotten reference comes back with the next start");
        }
    }
}

/// Notes the end of a job, also if it panics.
struct Ended {
    refs: Arc<Refs>,
    job: Job,
    since: Instant,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let progress = Progress::Ended { at: Instant::now(), took: self.since.elapsed() };
        self.refs.state.lock().jobs.insert(self.job.clone(), progress);
        self.refs.changed.send_replace(());
    }
}

async fn tidy_often(refs: Weak<Refs>) {
    let mut tick = tokio::time::interval(TIDY);
    loop {
        tick.tick().await;
        let Some(refs) = refs.upgrade() else { return };
        refs.tidy().await;
    }
}

/// What the plane needs to show a reference's layers under one kind of digest, the lowest first.
fn requests(record: &RefRecord, by: By) -> Vec<(record::Entry, AttachRequest)> {
    let Ok(reference) = record.reference.parse::<Reference>() else { return Vec::new() };
    let request = |layer: &LayerRecord| {
        let entry = *layer.entry(by);
        let below = layer.below.iter().filter_map(|&place| record.layers.get(place));
        Some((
            entry,
            AttachRequest {
                reference: reference.clone(),
                blob_digest: layer.blob_digest.clone(),
                blob_size: Some(layer.blob_size),
                toc_digest: layer.toc_digest.parse().ok()?,
                manifest_digest: None,
                neighbours: Vec::new(),
                prefetch_bytes: None,
                // What nobody uses is not fetched again.
                fill: (entry.shown && record.uses() == 0).then_some(Fill::Off),
                below: below
                    // One that is not shown is nowhere.
                    .map(|layer| Below { slot: layer.entry(by).slot.into(), dir: PathBuf::new() })
                    .collect(),
            },
        ))
    };
    record.layers.iter().filter_map(request).collect()
}

/// About the length of the tar that a tree came from: a header and whole blocks for each file, and the end.
fn tar_size(index: &Index) -> u64 {
    const BLOCK: u64 = 512;
    let size = |node| index.attr(node).filter(|attr| attr.kind == Kind::Regular).map_or(0, |attr| attr.size);
    let file = |node| size(node).div_ceil(BLOCK).saturating_add(1).saturating_mul(BLOCK);
    (0..index.nodes()).map(file).fold(2 * BLOCK, u64::saturating_add).min(i64::MAX as u64)
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
