//! What a pull holds in containerd while it runs, and gives back however it ends.
//!
//! A lease keeps everything the pull makes from containerd's garbage collector until the image record refers to it.
//! At most one active snapshot exists at a time; its key is noted here before it is asked for, so that an
//! interruption at any point can remove it. The lease also expires by itself, for the case that we are killed.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use containerd_client::services::v1::{AddResourceRequest, CreateRequest, DeleteRequest, Resource};
use tonic::Code;

use crate::containerd::{Containerd, refused};

/// When containerd drops the lease of a pull that was killed; its own clients use the same.
const LEASE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// How long giving everything back may take before the command ends all the same.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A running pull's hold on containerd.
#[derive(Debug)]
pub struct Session {
    containerd: Containerd,
    snapshotter: String,
    lease: String,
    active: Mutex<Option<String>>,
}

impl Session {
    /// Connects and takes a lease.
    ///
    /// # Errors
    ///
    /// containerd cannot be reached or refuses.
    pub async fn open(address: &Path, namespace: &str, snapshotter: &str) -> anyhow::Result<Self> {
        let containerd = Containerd::connect(address, namespace).await?;
        let now = SystemTime::now();
        let lease = format!("lazurite-pull-{}", unique(now));
        let expiry = ("containerd.io/gc.expire".to_owned(), rfc3339(now + LEASE_LIFETIME));
        let request = CreateRequest { id: lease.clone(), labels: HashMap::from([expiry]) };
        containerd.leases().create(request).await.map_err(refused("cannot take a lease"))?;
        Ok(Self {
            containerd: containerd.leased(&lease)?,
            snapshotter: snapshotter.to_owned(),
            lease,
            active: Mutex::new(None),
        })
    }

    /// The connection, under the lease.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
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
        let resource = Resource { id: name.to_owned(), r#type: format!("snapshots/{}", self.snapshotter) };
        let request = AddResourceRequest { id: self.lease.clone(), resource: Some(resource) };
        let result = self.containerd.leases().add_resource(request).await;
        result.map(drop).map_err(refused(format!("cannot hold snapshot {name}")))
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
        match self.containerd.snapshots().remove(request).await {
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
            let request = DeleteRequest { id: self.lease.clone(), sync: false };
            let released = self.containerd.leases().delete(request).await;
            removed.and(released.map(drop).map_err(refused(format!("cannot release lease {}", self.lease))))
        };
        tokio::time::timeout(CLOSE_TIMEOUT, give_back)
            .await
            .with_context(|| format!("containerd does not answer; lease {} expires by itself", self.lease))?
    }

    fn note(&self, key: Option<String>) -> Option<String> {
        let mut active = self.active.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::replace(&mut active, key)
    }
}

/// `<nanoseconds of the second>-<four letters>`, as containerd's clients make keys unique.
fn unique(now: SystemTime) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // Each RandomState is keyed anew from the system's randomness.
    let mut bits = RandomState::new().build_hasher().finish();
    let mut letters = String::new();
    for _ in 0..4 {
        letters.push(LETTERS[(bits % 64) as usize].into());
        bits /= 64;
    }
    format!("{}-{letters}", since.subsec_nanos())
}

/// A time as containerd reads it in labels, in UTC (RFC 3339).
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_for_containerd() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ];
        for (seconds, text) in cases {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn keys_are_unique_and_of_containerds_form() {
        let now = UNIX_EPOCH + Duration::new(5, 123_456_789);
        let one = unique(now);
        let (nanos, letters) = one.split_once('-').unwrap();
        assert_eq!(nanos, "123456789");
        assert_eq!(letters.len(), 4);
        assert!(letters.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
        assert!((0..8).any(|_| unique(now) != one), "equal times give different keys");
    }
}
