//! The calls of a snapshotter.
//!
//! Owns the order of effects: which transaction, directory and attachment happens when, and what is undone when
//! one fails. The decisions are elsewhere (`prepare`, `overlay`, `metastore::rules`); here they are carried out.
//!
//! Every call runs in a task of its own, so a client that goes away does not leave one half done, and is waited
//! for no longer than [`Config::call_timeout`]. Calls that may change the same thing meet in three places only:
//!
//! - the lock of a *key*, held by Prepare and Commit: a Commit waits for the Prepare of its snapshot;
//! - the lock of a *target*, held by Prepare around the attachment: one of several that want the same layer
//!   attaches it, the others find it there. Always taken after the key's;
//! - redb's single writer.
//!
//! Remove takes no lock: it must not wait for the network. A Prepare it overtakes finds its record gone (compared by
//! id), gives the slot back and fails.
//!
//! | submodule | owns |
//! |---|---|
//! | `lazy` | Prepare |
//! | `sweep` | getting rid of what Remove, failures and crashes left behind |

mod lazy;
mod sweep;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::{runtime::Handle, time::timeout};
use tokio_util::task::TaskTracker;

use crate::{
    Error,
    dirs::{NewDir, SnapshotDirs},
    error::Result,
    fallbacks::{Fallback, Fallbacks},
    filesystem::{FileSystem, LayerRequest, Reason, Usage},
    filters::Filters,
    keyed::KeyedLocks,
    metastore::{
        Metastore, WriteTx,
        rules::{self, Commit, Creation},
    },
    overlay::{self, Mount},
    record::{Info, Kind, Record},
};

/// What a snapshotter is told when it is opened.
#[derive(Clone, Debug)]
pub struct Config {
    /// Absolute directory of everything; without `:`, `,` and `\`, which overlay options cannot carry.
    pub root: PathBuf,
    /// How long a Prepare may wait for its layer to be attached before it falls back.
    pub attach_timeout: Duration,
    /// How long any call may take before its client is told so. Longer than `attach_timeout`, since a Prepare
    /// may have to wait for another one of the same key first, and long enough to measure a large snapshot.
    pub call_timeout: Duration,
    /// What overlay mounts need on this host.
    pub overlay: overlay::Options,
}

impl Config {
    /// The defaults: 30 s to attach, 2 min for a call, overlay options as the host needs them.
    pub fn new(root: impl Into<PathBuf>) -> Config {
        Config {
            root: root.into(),
            attach_timeout: Duration::from_secs(30),
            call_timeout: Duration::from_secs(120),
            overlay: overlay::Options::detect(),
        }
    }
}

/// The answer to a Prepare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// An active snapshot, to be mounted like this.
    Mounts(Vec<Mount>),
    /// The layer is there, committed under this name; nothing is to be unpacked.
    Remote {
        /// Name of the committed snapshot.
        name: String,
    },
}

/// A layer that was attached when the records were last written, to be attached again after a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The slot it had, and must have again.
    pub slot: u64,
    /// The layer.
    pub request: LayerRequest,
}

/// The snapshotter. Clones are handles to the same one.
pub struct Snapshotter<F> {
    inner: Arc<Inner<F>>,
}

struct Inner<F> {
    config: Config,
    filesystem: Arc<F>,
    store: Metastore,
    dirs: SnapshotDirs,
    keys: KeyedLocks,
    targets: KeyedLocks,
    fallbacks: Fallbacks,
    tasks: TaskTracker,
    /// Held by whoever sweeps.
    sweeping: tokio::sync::Mutex<()>,
    /// A sweep is on its way and has not begun to look.
    sweep_due: AtomicBool,
}

impl<F> Clone for Snapshotter<F> {
    fn clone(&self) -> Self {
        Snapshotter { inner: self.inner.clone() }
    }
}

impl<F> fmt::Debug for Snapshotter<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshotter").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl<F: FileSystem> Snapshotter<F> {
    /// Opens the records and directories under `config.root`, and begins to remove what a crash left behind.
    ///
    /// Blocks on the disk. Must be called within a tokio runtime.
    pub fn open(config: Config, filesystem: Arc<F>) -> Result<Self> {
        Handle::try_current().map_err(|error| Error::internal("opening the snapshotter", error))?;
        check_root(&config.root)?;
        let dirs = SnapshotDirs::open(&config.root)?;
        // A directory may be ahead of the records: its transaction was not committed before a crash.
        let floor = dirs.list()?.iter().map(|found| found.id + 1).max().unwrap_or(1);
        let store = Metastore::open(&config.root.join("snapshots.redb"), floor)?;
        let inner = Arc::new(Inner {
            config,
            filesystem,
            store,
            dirs,
            keys: KeyedLocks::default(),
            targets: KeyedLocks::default(),
            fallbacks: Fallbacks::default(),
            tasks: TaskTracker::new(),
            sweeping: tokio::sync::Mutex::default(),
            sweep_due: AtomicBool::new(false),
        });
        inner.sweep_soon();
        Ok(Snapshotter { inner })
    }

    /// Waits for all work in flight, background removal included. Idempotent. The records are closed, and may be
    /// opened again, once the last handle is dropped after this.
    pub async fn close(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// Creates an active snapshot over `parent` (empty for none), or attaches the layer the labels offer.
    pub async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Prepared> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        self.call("Prepare", |inner| inner.prepare(key, parent, labels)).await
    }

    /// Creates a read-only view of `parent` (empty for none).
    pub async fn view(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        self.call("View", async move |inner| {
            let view = Creation { kind: Kind::View, key, parent, labels, fallback: None };
            let record = inner.create(view).await?;
            Ok(inner.mounts(&record))
        })
        .await
    }

    /// The mounts of a view or active snapshot.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let record = self.record("Mounts", key).await?;
        if record.kind == Kind::Committed {
            let message =
                format!("snapshot {key:?} is committed; only views and active snapshots have mounts");
            return Err(Error::FailedPrecondition(message));
        }
        Ok(self.inner.mounts(&record))
    }

    /// Turns the active snapshot `key` into the committed snapshot `name`, with exactly these labels.
    pub async fn commit(&self, name: &str, key: &str, labels: BTreeMap<String, String>) -> Result<()> {
        let (key, name) = (key.to_owned(), name.to_owned());
        self.call("Commit", async move |inner| {
            let _key = inner.keys.lock(&key).await;
            inner
                .blocking(move |inner| {
                    let id = inner.store.read(|tx| rules::committable(tx, &key, &name))?.id;
                    let usage = inner.dirs.usage(id)?;
                    let owner = inner.dirs.owner(id)?;
                    let commit = Commit { key, id, name, labels, usage, owner, remote: None };
                    inner.store.write(|tx| rules::commit(tx, commit))
                })
                .await
        })
        .await
    }

    /// Removes a snapshot that has no children. What it takes on disk goes later.
    pub async fn remove(&self, key: &str) -> Result<()> {
        let key = key.to_owned();
        self.call("Remove", async move |inner| {
            inner.blocking(move |inner| inner.store.write(|tx| rules::remove(tx, &key))).await?;
            inner.sweep_soon();
            Ok(())
        })
        .await
    }

    /// A snapshot of any kind.
    pub async fn stat(&self, key: &str) -> Result<Info> {
        Ok(self.record("Stat", key).await?.info())
    }

    /// Replaces the labels of a snapshot: all of them if `paths` is empty, else those it names, as `labels` or
    /// `labels.<label>`. A label absent or empty in `labels` is deleted.
    pub async fn update(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
        paths: Vec<String>,
    ) -> Result<Info> {
        let name = name.to_owned();
        self.call("Update", async move |inner| {
            inner
                .blocking(move |inner| inner.store.write(|tx| rules::update(tx, &name, labels, &paths)))
                .await
        })
        .await
    }

    /// The snapshots that match any of the filters, in containerd's filter language; all without filters.
    pub async fn list(&self, filters: &[String]) -> Result<Vec<Info>> {
        let filters = Filters::parse(filters)?;
        let records = self.records("List", move |record| filters.match_record(record)).await?;
        Ok(records.iter().map(Record::info).collect())
    }

    /// What the snapshot takes on disk, its parents not counted.
    pub async fn usage(&self, key: &str) -> Result<Usage> {
        let record = self.record("Usage", key).await?;
        match record.kind {
            Kind::View => Ok(Usage::default()),
            Kind::Active => {
                self.call("Usage", async move |inner| {
                    inner.blocking(move |inner| inner.dirs.usage(record.id)).await
                })
                .await
            }
            Kind::Committed if record.remote.is_some() => {
                self.call("Usage", async move |inner| Ok(inner.filesystem.usage(record.id).await)).await
            }
            Kind::Committed => Ok(record.usage),
        }
    }

    /// Removes from disk what no snapshot needs any more.
    pub async fn cleanup(&self) -> Result<()> {
        self.call("Cleanup", async move |inner| inner.sweep().await).await
    }

    /// The layers to attach again after a start, oldest slot first.
    pub async fn remote_snapshots(&self) -> Result<Vec<Remote>> {
        let records = self.records("listing the lazy layers", |record| record.remote.is_some()).await?;
        let mut remotes: Vec<Remote> = records
            .into_iter()
            .filter_map(|record| Some(Remote { slot: record.id, request: record.remote? }))
            .collect();
        remotes.sort_by_key(|remote| remote.slot);
        Ok(remotes)
    }

    /// Points the directory of a lazy snapshot at where its layer is now: after it was attached again, or
    /// graduated. `path` is relative to `snapshots/<slot>/`. Mounts made before are not affected.
    ///
    /// # Errors
    /// `NotFound` if no lazy snapshot has the slot: it was removed, or its Prepare has not committed it yet.
    pub async fn link(&self, slot: u64, path: &Path) -> Result<()> {
        let path = path.to_owned();
        self.call("linking a layer", async move |inner| inner.link(slot, path).await).await
    }

    /// The layers that were last left to containerd although it offered them, oldest first.
    pub fn fallbacks(&self) -> Vec<Fallback> {
        self.inner.fallbacks.list()
    }

    /// How many layers were left to containerd since the start, by reason.
    pub fn fallback_counts(&self) -> BTreeMap<Reason, u64> {
        self.inner.fallbacks.counts()
    }

    async fn record(&self, call: &'static str, key: &str) -> Result<Record> {
        let key = key.to_owned();
        self.call(call, async move |inner| {
            inner.blocking(move |inner| inner.store.read(|tx| tx.require(&key))).await
        })
        .await
    }

    async fn records(
        &self,
        call: &'static str,
        wanted: impl FnMut(&Record) -> bool + Send + 'static,
    ) -> Result<Vec<Record>> {
        self.call(call, async move |inner| {
            inner.blocking(move |inner| inner.store.read(|tx| tx.all(wanted))).await
        })
        .await
    }

    /// Runs a call to its end in a task, and waits for it within bounds.
    async fn call<T, Fut>(&self, name: &'static str, body: impl FnOnce(Arc<Inner<F>>) -> Fut) -> Result<T>
    where
        T: Send + 'static,
        Fut: Future<Output = Result<T>> + Send + 'static,
    {
        let limit = self.inner.config.call_timeout;
        match timeout(limit, self.inner.tasks.spawn(body(self.inner.clone()))).await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(Error::internal(name, panic)),
            Err(_) => {
                Err(Error::Unavailable(format!("{name} takes longer than {limit:?}; it goes on meanwhile")))
            }
        }
    }
}

impl<F: FileSystem> Inner<F> {
    /// Runs a closure where it may block.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        body: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.clone();
        match tokio::task::spawn_blocking(move || body(&inner)).await {
            Ok(result) => result,
            Err(panic) => Err(Error::internal("a call to the disk", panic)),
        }
    }

    /// Creates a view or active snapshot, record and directory together, durably.
    async fn create(self: &Arc<Self>, creation: Creation) -> Result<Record> {
        self.blocking(move |inner| {
            let (record, dir) = inner.store.write(|tx| inner.made(tx, creation))?;
            dir.keep();
            Ok(record)
        })
        .await
    }

    /// Creates an active snapshot that nobody is told of: only what it is committed as must last.
    async fn create_for_now(self: &Arc<Self>, creation: Creation) -> Result<Record> {
        self.blocking(move |inner| {
            let (record, dir) = inner.store.write_soon(|tx| inner.made(tx, creation))?;
            dir.keep();
            Ok(record)
        })
        .await
    }

    fn made(&self, tx: &mut WriteTx<'_>, creation: Creation) -> Result<(Record, NewDir)> {
        let record = rules::create(tx, creation)?;
        let dir = self.dirs.create(record.id, record.kind, record.owner)?;
        Ok((record, dir))
    }

    async fn link(self: &Arc<Self>, slot: u64, path: PathBuf) -> Result<()> {
        self.blocking(move |inner| {
            // Within a write transaction, so that no Remove and sweep come in between.
            inner.store.write_soon(|tx| {
                if tx.by_id(slot)?.is_none_or(|record| record.remote.is_none()) {
                    return Err(Error::NotFound(format!("no lazy snapshot has slot {slot}")));
                }
                inner.dirs.link(slot, &path)
            })
        })
        .await
    }

    fn mounts(&self, record: &Record) -> Vec<Mount> {
        overlay::mounts(record.kind, record.id, &record.ancestors, self.dirs.path(), self.config.overlay)
    }
}

fn check_root(root: &Path) -> Result<()> {
    match root.to_str() {
        Some(text) if root.is_absolute() && !text.contains([':', ',', '\\']) => Ok(()),
        _ => Err(Error::InvalidArgument(format!(
            "root {root:?} must be an absolute path in UTF-8 without ':', ',' and '\\', which overlay mounts cannot name"
        ))),
    }
}
