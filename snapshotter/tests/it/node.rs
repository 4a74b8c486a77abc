//! A root directory with a snapshotter and a fake data plane on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use snapshotter::{Config, Error, Prepared, Snapshotter, labels, overlay};

use crate::fake::FakeFs;

pub type Labels = BTreeMap<String, String>;

pub struct Node {
    pub dir: tempfile::TempDir,
    pub fs: Arc<FakeFs>,
    pub snapshotter: Option<Snapshotter<FakeFs>>,
}

impl Node {
    pub fn new() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let fs = Arc::new(FakeFs::new(dir.path()));
        let mut node = Node { dir, fs, snapshotter: None };
        node.open();
        node
    }

    pub fn config(&self) -> Config {
        Config::new(self.dir.path())
    }

    pub fn open(&mut self) {
        self.snapshotter = Some(Snapshotter::open(self.config(), self.fs.clone()).unwrap());
    }

    /// As a restart of the daemon: all state but the disk and the attachments is lost.
    pub async fn reopen(&mut self) {
        self.close().await;
        self.open();
    }

    /// As a kill of the daemon and its next start: the records' file is as it was then, not as a stop leaves it.
    pub async fn crash(&mut self) {
        let records = self.path("snapshots.redb");
        let then = std::fs::read(&records).unwrap();
        self.close().await;
        std::fs::write(&records, then).unwrap();
        self.open();
    }

    pub async fn close(&mut self) {
        if let Some(snapshotter) = self.snapshotter.take() {
            snapshotter.close().await;
        }
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    /// Names under `snapshots/`.
    pub fn dirs(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.path("snapshots")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Names of all snapshots.
    pub async fn names(&self) -> Vec<String> {
        self.list(&[]).await.unwrap().into_iter().map(|info| info.name).collect()
    }

    /// Prepares an ordinary snapshot and commits it.
    pub async fn commit_ordinary(&self, name: &str, parent: &str) {
        self.prepare("tmp", parent, Labels::new()).await.unwrap();
        self.commit(name, "tmp", Labels::new()).await.unwrap();
    }
}

impl std::ops::Deref for Node {
    type Target = Snapshotter<FakeFs>;

    fn deref(&self) -> &Snapshotter<FakeFs> {
        self.snapshotter.as_ref().unwrap()
    }
}

pub fn digest(n: u8) -> String {
    format!("sha256:{}", format!("{n:02x}").repeat(32))
}

/// The labels of a Prepare that offers a layer with TOC number `toc` as `target`.
pub fn offer(target: &str, toc: u8) -> Labels {
    [
        (labels::TARGET, target.to_owned()),
        ("containerd.io/snapshot/stargz/toc.digest", digest(toc)),
        ("containerd.io/snapshot/cri.image-ref", "example.com/image:1".to_owned()),
        ("containerd.io/snapshot/cri.layer-digest", digest(0xcc)),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// The name a lazy layer was committed under.
#[track_caller]
pub fn remote(prepared: Result<Prepared, Error>) -> String {
    match prepared.unwrap() {
        Prepared::Remote { name } => name,
        other => panic!("not attached: {other:?}"),
    }
}

/// The one mount of an ordinary snapshot, as `type source options`.
#[track_caller]
pub fn mount(prepared: Result<Prepared, Error>) -> String {
    match prepared.unwrap() {
        Prepared::Mounts(mounts) => show(&mounts),
        other => panic!("attached: {other:?}"),
    }
}

#[track_caller]
pub fn show(mounts: &[overlay::Mount]) -> String {
    assert_eq!(mounts.len(), 1);
    format!("{} {} {}", mounts[0].fs_type, mounts[0].source, mounts[0].options.join(","))
}

/// The variant of an error.
pub fn code(error: &Error) -> &'static str {
    match error {
        Error::NotFound(_) => "NotFound",
        Error::AlreadyExists(_) => "AlreadyExists",
        Error::FailedPrecondition(_) => "FailedPrecondition",
        Error::InvalidArgument(_) => "InvalidArgument",
        Error::Unavailable(_) => "Unavailable",
        _ => "Internal",
    }
}
