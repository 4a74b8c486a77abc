//! Layers come back: those that the records of snapshots name, and those that a daemon which is replaced has named before it
//! stopped.
//!
//! Owns the order: who is waited for comes next, and before it what lies below, for a layer may look at that. May not: touch the
//! mount, or ask the network before all that is on disk is back.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};

use fusefs::{AttachRequest, Plane};
use proto::control::ListSlotsRequest;
use snapshotter::{Remote, Snapshotter};
use tokio::task::JoinHandle;

use super::plane::{self, Absent, Port};
use crate::daemon;

/// A daemon that is replaced and does not say in this time what it shows is stopped all the same.
const ASK: Duration = Duration::from_secs(2);

/// What the daemon shows that is to be replaced, opened from disk while it goes on. Nothing if it does not say: one before this
/// could be asked, or one that hangs.
pub async fn open_ahead(plane: &Arc<Plane>, address: &Path, root: &Path) -> Vec<Remote> {
    let asked = async {
        let mut client = daemon::client(address).await?;
        let slots = client.list_slots(ListSlotsRequest {}).await?.into_inner().slots;
        let remote = |slot: proto::control::Slot| {
            anyhow::Ok(Remote { slot: slot.slot, request: serde_json::from_slice(&slot.layer)? })
        };
        slots.into_iter().map(remote).collect::<anyhow::Result<Vec<Remote>>>()
    };
    let remotes = match tokio::time::timeout(ASK, asked).await {
        Ok(Ok(remotes)) => remotes,
        Ok(Err(error)) => {
            tracing::debug!(%error, "the daemon before does not say what it shows");
            Vec::new()
        }
        Err(_) => Vec::new(),
    };
    plane.clone().open_local(distinct(&requests(plane, root, &remotes))).await;
    remotes
}

/// Requests that can be used; a slot whose record cannot is given up.
fn requests(plane: &Plane, root: &Path, remotes: &[Remote]) -> BTreeMap<u64, AttachRequest> {
    let snapshots = root.join("snapshots");
    let request = |remote: &Remote| match plane::request(&remote.request, &snapshots) {
        Ok(request) => Some((remote.slot, request)),
        Err(error) => {
            tracing::warn!(slot = remote.slot, %error, "a lazy snapshot's record cannot be used");
            plane.give_up(remote.slot);
            None
        }
    };
    remotes.iter().filter_map(request).collect()
}

/// One request for each layer.
fn distinct(requests: &BTreeMap<u64, AttachRequest>) -> Vec<AttachRequest> {
    let distinct: HashMap<_, _> = requests.values().map(|request| (request.toc_digest, request)).collect();
    distinct.into_values().cloned().collect()
}

/// The layers of lazy snapshots on their way back.
pub struct Restoring {
    plane: Arc<Plane>,
    root: PathBuf,
    absent: Absent,
    known: Vec<Remote>,
    /// Which of the known are gone.
    gone: Vec<u64>,
    /// The last step, behind those before; what it returns is all of theirs.
    last: Option<JoinHandle<Vec<(u64, PathBuf)>>>,
}

impl Restoring {
    /// Of none so far. In `absent` is said of which no layer can be shown, and why.
    pub fn new(plane: Arc<Plane>, root: &Path, absent: Absent) -> Restoring {
        Restoring { plane, root: root.to_owned(), absent, known: Vec::new(), gone: Vec::new(), last: None }
    }

    /// Begins to restore expected slots, behind those before.
    pub fn begin(&mut self, remotes: Vec<Remote>) {
        self.known.extend(remotes.iter().cloned());
        let before = self.last.take();
        let (plane, root, absent) = (self.plane.clone(), self.root.clone(), self.absent.clone());
        self.last = Some(tokio::spawn(async move {
            let mut trees = match before {
                Some(before) => before.await.unwrap_or_default(),
                None => Vec::new(),
            };
            let requests = requests(&plane, &root, &remotes);
            let unusable =
                remotes.iter().filter(|remote| !requests.contains_key(&remote.slot)).map(|remote| {
                    (
                        remote.slot,
                        "bad_labels: the snapshot's record cannot be used; the log says why".to_owned(),
                    )
                });
            absent.lock().unwrap_or_else(PoisonError::into_inner).extend(unusable);
            trees.extend(restore(&plane, requests, &absent).await);
            trees
        }));
    }

    /// What of the records is not on its way yet; what is on its way and in no record will be given up. Slots are never reused:
    /// the same number is the same layer.
    pub fn left(&mut self, mut records: Vec<Remote>) -> Vec<Remote> {
        let slots = |remotes: &[Remote]| remotes.iter().map(|remote| remote.slot).collect::<HashSet<_>>();
        let (recorded, known) = (slots(&records), slots(&self.known));
        self.gone = known.difference(&recorded).copied().collect();
        records.retain(|record| !known.contains(&record.slot));
        records
    }

    /// Waits until all are back, and clears what no snapshot names. A layer that is not on disk any more costs itself only: it
    /// is opened from its registry behind, for as long as that takes.
    pub async fn finish(self, snapshotter: &Snapshotter<Port>) {
        let Restoring { plane, root, known, gone, last, .. } = self;
        if let Some(last) = last {
            for (slot, tree) in last.await.unwrap_or_default() {
                // A crash may have come between the two.
                let place = root.join("snapshots").join(slot.to_string()).join("fs");
                if fs::read_link(place).ok() != Some(plane::place(slot, Some(&tree))) {
                    plane::link(snapshotter, slot, &tree).await;
                }
            }
        }
        gone.iter().for_each(|&slot| plane.detach(slot));
        let kept = known.iter().filter(|remote| !gone.contains(&remote.slot));
        let wanted: HashSet<_> = kept.filter_map(|remote| remote.request.toc_digest.parse().ok()).collect();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = plane.collect(&wanted) {
                tracing::warn!(%error, "looking for layers nobody names");
            }
        });
    }
}

/// Shows layers again; which of them are directories, and where.
pub async fn restore(
    plane: &Arc<Plane>,
    mut left: BTreeMap<u64, AttachRequest>,
    absent: &Absent,
) -> Vec<(u64, PathBuf)> {
    let total = left.len();
    tokio::spawn(plane.clone().open_local(distinct(&left)));
    let (mut restored, mut trees) = (0, Vec::new());
    while let Some((slot, request)) = next(&mut left, plane.awaited()) {
        match plane.restore(slot, &request).await {
            Ok(attached) => {
                restored += 1;
                trees.extend(attached.tree.map(|tree| (slot, tree)));
            }
            Err(error) => {
                tracing::warn!(slot, layer = %request.toc_digest, %error, "not on disk; opening from the registry");
                tokio::spawn(plane::reattach(plane.clone(), slot, request, absent.clone()));
            }
        }
    }
    if total > 0 {
        tracing::info!(restored, total, "lazy layers are back");
    }
    trees
}

/// The slot to be restored next: the one that is waited for, or the oldest; but first what lies below it.
fn next(left: &mut BTreeMap<u64, AttachRequest>, awaited: Option<u64>) -> Option<(u64, AttachRequest)> {
    let wanted = awaited.filter(|slot| left.contains_key(slot)).or_else(|| left.keys().next().copied())?;
    let below =
        left[&wanted].below.iter().map(|below| below.slot).filter(|slot| left.contains_key(slot)).min();
    left.remove_entry(&below.unwrap_or(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_comes_next_and_before_it_what_lies_below() {
        let request = |below: &[u64]| AttachRequest {
            reference: "host/name:tag".parse().unwrap(),
            blob_digest: String::new(),
            blob_size: None,
            toc_digest: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
            manifest_digest: None,
            neighbours: Vec::new(),
            prefetch_bytes: None,
            fill: None,
            below: below.iter().map(|&slot| fusefs::Below { slot, dir: "/".into() }).collect(),
        };
        let mut left: BTreeMap<u64, AttachRequest> =
            [(1, &[][..]), (2, &[1]), (3, &[]), (4, &[3]), (5, &[4, 3])]
                .map(|(slot, below)| (slot, request(below)))
                .into();
        let mut order = |awaited| next(&mut left, awaited).map(|(slot, _)| slot);
        assert_eq!(order(None), Some(1));
        assert_eq!([order(Some(5)), order(Some(5)), order(Some(5))], [Some(3), Some(4), Some(5)]);
        assert_eq!([order(Some(9)), order(None)], [Some(2), None]);
    }
}
