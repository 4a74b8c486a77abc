//! A data plane that does as it is told.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use snapshotter::{AttachError, FileSystem, LayerRequest, LayerRoot, Reason, Usage};
use tokio::sync::Semaphore;

/// What the next attachments do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    Works,
    Fails(Reason),
    Hangs,
    Panics,
    /// Works once [`FakeFs::let_go`] is called.
    Waits,
    /// Works, and the layer graduates before the snapshot is committed.
    Moves,
}

/// Layers are directories `mnt/<slot>` holding one file, `layer`, with the layer's digest in it.
#[derive(Debug)]
pub struct FakeFs {
    root: PathBuf,
    behaviour: Mutex<Attach>,
    attached: Mutex<BTreeMap<u64, String>>,
    attempts: Mutex<Vec<u64>>,
    /// TOC digests by the layers' digests, as manifests have them; `None` for one that hangs.
    manifests: Mutex<BTreeMap<String, Option<String>>>,
    asked: Mutex<Vec<String>>,
    gate: Semaphore,
    entered: Semaphore,
}

impl FakeFs {
    pub fn new(root: &Path) -> FakeFs {
        FakeFs {
            root: root.to_owned(),
            behaviour: Mutex::new(Attach::Works),
            attached: Mutex::default(),
            attempts: Mutex::default(),
            manifests: Mutex::default(),
            asked: Mutex::default(),
            gate: Semaphore::new(0),
            entered: Semaphore::new(0),
        }
    }

    pub fn behave(&self, attach: Attach) {
        *self.behaviour.lock().unwrap() = attach;
    }

    /// The slots attached now, with the targets they stand for.
    pub fn attached(&self) -> BTreeMap<u64, String> {
        self.attached.lock().unwrap().clone()
    }

    /// How often an attachment was asked for.
    pub fn attempts(&self) -> usize {
        self.attempts.lock().unwrap().len()
    }

    /// Makes a manifest say this TOC digest of a layer; with `None` asking for it takes for ever.
    pub fn describe(&self, layer: &str, toc: Option<&str>) {
        self.manifests.lock().unwrap().insert(layer.to_owned(), toc.map(str::to_owned));
    }

    /// The layers whose TOC digests were asked for.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    /// Waits until one more attachment is under way.
    pub async fn entered(&self) {
        self.entered.acquire().await.unwrap().forget();
    }

    pub fn let_go(&self) {
        self.gate.add_permits(1);
    }

    /// The owner of every layer's root: another than the daemon's, if the daemon may give files away.
    pub fn owner() -> (u32, u32) {
        match rustix::process::geteuid().as_raw() {
            0 => (1234, 4321),
            uid => (uid, rustix::process::getegid().as_raw()),
        }
    }

    pub fn usage_of(slot: u64) -> Usage {
        Usage { size: slot * 1000, inodes: slot }
    }
}

#[async_trait::async_trait]
impl FileSystem for FakeFs {
    async fn attach(&self, slot: u64, request: &LayerRequest) -> Result<LayerRoot, AttachError> {
        self.attempts.lock().unwrap().push(slot);
        self.entered.add_permits(1);
        let behaviour = *self.behaviour.lock().unwrap();
        match behaviour {
            Attach::Works | Attach::Moves => {}
            Attach::Fails(reason) => return Err(AttachError::new(reason, "as told")),
            Attach::Hangs => std::future::pending().await,
            Attach::Panics => panic!("as told"),
            Attach::Waits => self.gate.acquire().await.unwrap().forget(),
        }
        let mount = self.root.join(format!("mnt/{slot}"));
        fs::create_dir_all(&mount).unwrap();
        fs::write(mount.join("layer"), &request.layer_digest).unwrap();
        self.attached.lock().unwrap().insert(slot, request.target.clone());
        let (uid, gid) = FakeFs::owner();
        Ok(LayerRoot { path: format!("../../mnt/{slot}").into(), uid, gid })
    }

    async fn find_toc(&self, request: &LayerRequest) -> Option<String> {
        assert!(request.manifest_digest.is_some() && request.toc_digest.is_empty());
        self.asked.lock().unwrap().push(request.layer_digest.clone());
        let known = self.manifests.lock().unwrap().get(&request.layer_digest).cloned();
        match known {
            Some(None) => std::future::pending().await,
            known => known.flatten(),
        }
    }

    async fn detach(&self, slot: u64) {
        if self.attached.lock().unwrap().remove(&slot).is_some() {
            fs::remove_dir_all(self.root.join(format!("mnt/{slot}"))).unwrap();
        }
    }

    fn place(&self, slot: u64) -> Option<PathBuf> {
        self.attached.lock().unwrap().get(&slot)?;
        Some(match *self.behaviour.lock().unwrap() {
            Attach::Moves => format!("../../layers/{slot}/fs").into(),
            _ => format!("../../mnt/{slot}").into(),
        })
    }

    async fn usage(&self, slot: u64) -> Usage {
        if *self.behaviour.lock().unwrap() == Attach::Hangs {
            std::future::pending().await
        }
        FakeFs::usage_of(slot)
    }
}
