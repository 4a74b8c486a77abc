//! What a pull holds in containerd while it runs, and gives back however it ends.
//!
//! A lease keeps everything the pull makes from containerd's garbage collector until the image record refers to it.
//! At most one active snapshot exists at a time; its key is noted here before it is asked for, so that an
//! interruption at any point can remove it. The lease also expires by itself, for the case that we are killed.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use tonic::Code;

use crate::containerd::lease::{Lease, unique};
use crate::containerd::{Containerd, refused};

/// How long giving everything back may take before the command ends all the same.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A running pull's hold on containerd.
#[derive(Debug)]
pub struct Session {
    lease: Lease,
    snapshotter: String,
    active: Mutex<Option<String>>,
}

impl Session {
    /// Connects and takes a lease.
    ///
    /// # Errors
    ///
    /// containerd cannot be reached or refuses.
    pub async fn open(address: &Path, namespace: &str, snapshotter: &str) -> anyhow::Result<Self> {
        let lease = Lease::take(Containerd::connect(address, namespace).await?, "pull").await?;
        Ok(Self { lease, snapshotter: snapshotter.to_owned(), active: Mutex::new(None) })
    }

    /// The connection, under the lease.
    pub fn containerd(&self) -> &Containerd {
        self.lease.containerd()
    }

    /// The snapshotter the image is pulled into.
    pub fn snapshotter(&self) -> &str {
        &self.snapshotter
    }

    /// Keeps the snapshot `name`, which may or may not exist, from being collected while the pull runs.
    ///
    /// # Errors
    ///
    /// containerd refuses.
    pub async fn hold(&self, name: &str) -> anyhow::Result<()> {
        self.lease.hold(&format!("snapshots/{}", self.snapshotter), name).await
    }

    /// A key for preparing the snapshot of `chain_id`, noted for removal.
    ///
    /// Its form is that of containerd's unpacker, by which snapshotters recognise an extraction.
    pub fn extraction_key(&self, chain_id: &str) -> String {
        let key = format!("extract-{} {chain_id}", unique(SystemTime::now()));
        self.note(Some(key.clone()));
        key
    }

    /// The noted snapshot is committed or was never made.
    pub fn settled(&self) {
        self.note(None);
    }

    /// Removes the noted snapshot.
    ///
    /// # Errors
    ///
    /// containerd refuses; that it is not there is fine.
    pub async fn abandon(&self) -> anyhow::Result<()> {
        let Some(key) = self.note(None) else { return Ok(()) };
        let request = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.clone() };
        match self.containerd().snapshots().remove(request).await {
            Err(status) if status.code() != Code::NotFound => {
                Err(refused(format!("cannot remove the unfinished snapshot {key}"))(status))
            }
            _ => Ok(()),
        }
    }

    /// Gives everything back: the noted snapshot, then the lease.
    ///
    /// # Errors
    ///
    /// containerd refuses or does not answer. The lease then expires by itself.
    pub async fn close(self) -> anyhow::Result<()> {
        let give_back = async {
            let removed = self.abandon().await;
            removed.and(self.lease.release().await)
        };
        tokio::time::timeout(CLOSE_TIMEOUT, give_back).await.with_context(|| {
            format!("containerd does not answer; lease {} expires by itself", self.lease.id())
        })?
    }

    fn note(&self, key: Option<String>) -> Option<String> {
        let mut active = self.active.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::replace(&mut active, key)
    }
}
