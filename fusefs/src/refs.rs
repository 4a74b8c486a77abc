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
mod split;
mod state;
mod tidy;

use std::{
    collections::HashSet,
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
use parking_lot::{Mutex, MutexGuard};
use registry::{Reference, Registry};
use tokio::{runtime::Handle, sync::watch, time::Instant};

use crate::{
    index::{Attr, Index},
    layer::Layer,
    manifest,
    plane::{AttachRequest, Below, Fill, PARALLEL_OPENS, Plane},
    resolve::AttachError,
};
use blob::Blobs;
use name::Place;
use record::{By, Entry, Files, LayerRecord, RefRecord};
use state::{Job, Progress, State, Uncounted};

/// Changes of counts are written together.
const WRITE_AFTER: Duration = Duration::from_millis(200);

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
    /// One writes a record at a time. Taken before [`Refs::state`].
    writing: Mutex<()>,
    /// Something has become known, or an attempt has ended.
    changed: watch::Sender<()>,
    runtime: Handle,
    /// What `info` says may be another process's way to say it.
    started: i64,
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
            let entries = record.layers.iter().flat_map(|layer| [layer.by_blob, layer.by_toc]);
            state.ready.extend(entries.filter(|entry| entry.shown).map(|entry| entry.slot));
            if record.is_released() {
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
            writing: Mutex::new(()),
            changed: watch::Sender::new(()),
            runtime: Handle::current(),
            started: i64::try_from(seconds()).unwrap_or(0),
        });
        tokio::spawn(tidy::tidy_often(Arc::downgrade(&refs)));
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

    /// How many say that they use the layer in a slot.
    pub fn uses(&self, slot: u64) -> u64 {
        let state = self.state.lock();
        let layer = u32::try_from(slot).ok().and_then(|slot| state.layer(slot));
        layer.map_or(0, |(_, layer, by)| layer.entry(by).uses)
    }

    /// The TOC digests of all layers that may be asked for.
    pub fn layers(&self) -> HashSet<Digest> {
        let state = self.state.lock();
        let layers = state.records.values().flat_map(|record| &record.layers);
        layers.filter_map(|layer| layer.toc_digest.parse().ok()).collect()
    }

    /// What went wrong with a reference may go well now: somebody has brought a login for it.
    pub fn try_again(&self, reference: &str) {
        self.state.lock().unsettle(reference);
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
        self.count(slot, Entry::take);
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
            self.count(slot, Entry::release);
        }
    }

    fn count(self: &Arc<Self>, slot: u32, change: impl Fn(&mut Entry)) {
        let mut state = self.state.lock();
        let Some((layer, by)) = state.layer_mut(slot) else { return };
        let entry = layer.entry_mut(by);
        change(entry);
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

    /// Writes what has changed, and waits for who is writing. Blocking.
    pub fn flush(&self) {
        let writing = self.writing.lock();
        let changed = std::mem::take(&mut self.state.lock().changed);
        for number in changed {
            if let Err(error) = self.write(number, &writing) {
                tracing::warn!(number, %error, "a reference's record cannot be written");
            }
        }
    }

    /// Writes what is known of a reference. Blocking.
    fn write(&self, number: u32, _: &MutexGuard<'_, ()>) -> io::Result<()> {
        let record = self.state.lock().records.get(&number).cloned();
        record.map_or(Ok(()), |record| self.files.write(&record))
    }

    /// Whether a lookup may name a slot; waits for the disk after a start.
    fn is_shown(&self, slot: u32) -> bool {
        let is_ready = self.state.lock().ready.contains(&slot);
        is_ready && self.plane.upgrade().is_some_and(|plane| plane.slots().await_slot(slot).is_some())
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
        let deadline = self.state.lock().asked(number, self.patience) + self.patience;
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
        if !self.is_in_slot(slot) || !self.state.lock().ready.contains(&slot) {
            self.start(job.clone(), |refs| async move { refs.show_now(number, by).await });
        }
        let is_there = |state: &State| state.ready.contains(&slot) && self.is_in_slot(slot);
        self.until(&job, deadline, |state| is_there(state).then_some(slot)).await
    }

    /// Whether a slot is filled.
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
        let diff_ids = match image.config.as_ref().filter(|_| image.layers.iter().any(|l| l.toc.is_some())) {
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
        let _writing = self.writing.lock();
        let (mut record, next) = {
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
        // Counts may have changed meanwhile; what is new has none.
        if let Some(now) = state.records.get(&record.number) {
            record.layers[..now.layers.len()].clone_from_slice(&now.layers);
        }
        let number = record.number;
        state.enter(record);
        // What has just been tried was without the new layers.
        state.jobs.retain(|job, progress| match job {
            Job::Show(shown, _) => *shown != number || matches!(progress, Progress::Running),
            Job::Resolve(_) => true,
        });
        drop(state);
        self.changed.send_replace(());
        Ok(())
    }

    /// Shows all layers of a reference, the lowest first: a layer may take owners and modes from those below.
    async fn show_now(self: Arc<Self>, number: u32, by: By) {
        let deadline = self.limit();
        let requests = self.state.lock().records.get(&number).map_or(Vec::new(), |r| requests(r, by));
        let Some(plane) = self.plane.upgrade() else { return };
        let is_ready = |slot| self.is_in_slot(slot) && self.state.lock().ready.contains(&slot);
        let missing: Vec<_> = requests.into_iter().filter(|(entry, _)| !is_ready(entry.slot)).collect();
        let opener = (self.clone(), plane.clone());
        let open = move |(entry, request): (Entry, AttachRequest)| {
            let (refs, plane) = opener.clone();
            async move {
                let opened = match plane.open_ahead(&request, deadline).await {
                    Ok(layer) => Ok(refs.tar_length(entry.slot, layer, deadline).await),
                    Err(error) => Err(error),
                };
                (entry, request, opened)
            }
        };
        let mut opening = stream::iter(missing).map(open).buffered(PARALLEL_OPENS);
        while let Some((entry, request, opened)) = opening.next().await {
            let attached = match opened {
                Ok(length) => {
                    plane.attach_by(u64::from(entry.slot), &request, deadline).await.map(|_| length)
                }
                Err(error) => Err(error),
            };
            match attached {
                Ok(length) => self.note_shown(&plane, entry.slot, length).await,
                Err(error) => tracing::warn!(
                    reference = %request.reference, layer = request.blob_digest, reason = error.reason(), %error,
                    "the layer is not shown: it is pulled instead"
                ),
            }
        }
    }

    /// Bytes of the tar of a layer that is about to be shown, if they are not known and its tar-split tells.
    async fn tar_length(&self, slot: u32, layer: Arc<Layer>, deadline: Instant) -> Option<u64> {
        let uncounted = self.state.lock().uncounted(slot)?;
        let split = match uncounted {
            Uncounted::As(length) => return Some(length),
            Uncounted::By(split) => split,
        };
        // Doing without is better than coming too late.
        let left = deadline.saturating_duration_since(Instant::now());
        split::tar_length(layer, split, Instant::now() + left / 2).await
    }

    /// Notes that a slot is filled, on disk first: what a lookup has named must come back after a crash.
    async fn note_shown(self: &Arc<Self>, plane: &Plane, slot: u32, length: Option<u64>) {
        let size = plane.layer(u64::from(slot)).map(|layer| tar_size(layer.index()));
        let number = {
            let mut state = self.state.lock();
            let Some((layer, by)) = state.layer_mut(slot) else { return };
            layer.entry_mut(by).shown = true;
            layer.estimated_size = size;
            layer.diff_size = layer.diff_size.or(length);
            state.slots[&slot]
        };
        let refs = self.clone();
        let written = tokio::task::spawn_blocking(move || refs.write(number, &refs.writing.lock())).await;
        match written.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            Ok(()) => {
                self.state.lock().ready.insert(slot);
            }
            Err(error) => {
                tracing::warn!(slot, %error, "the layer is not shown: its record cannot be written")
            }
        }
        self.changed.send_replace(());
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

/// What the plane needs to show a reference's layers under one kind of digest, the lowest first.
fn requests(record: &RefRecord, by: By) -> Vec<(Entry, AttachRequest)> {
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
                fill: record.is_released().then_some(Fill::Off),
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
