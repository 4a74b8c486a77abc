//! Memory of the layers that were not attached.
//!
//! The last outcome per target, for telling a user why, and counts per reason since the start. Bounded: an image
//! has at most 127 layers, so [`KEPT`] covers the last few images at the least. The reason also outlives a restart
//! as a label of the committed snapshot (see [`crate::labels::REASON`]).

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;

use crate::filesystem::{AttachError, Reason};

/// Outcomes remembered.
const KEPT: usize = 1024;

/// A layer that became an ordinary snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// Chain id of the snapshot.
    pub target: String,
    /// Digest of the blob as the client gave it; empty if it did not.
    pub layer_digest: String,
    /// Why.
    pub error: AttachError,
}

#[derive(Debug, Default)]
pub(crate) struct Fallbacks {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: VecDeque<Fallback>,
    counts: BTreeMap<Reason, u64>,
}

impl Fallbacks {
    pub fn note(&self, fallback: Fallback) {
        let mut state = self.state.lock();
        *state.counts.entry(fallback.error.reason).or_default() += 1;
        state.last.retain(|known| known.target != fallback.target);
        if state.last.len() == KEPT {
            state.last.pop_front();
        }
        state.last.push_back(fallback);
    }

    /// The target was attached after all.
    pub fn forget(&self, target: &str) {
        self.state.lock().last.retain(|known| known.target != target);
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<Fallback> {
        self.state.lock().last.iter().cloned().collect()
    }

    pub fn counts(&self) -> BTreeMap<Reason, u64> {
        self.state.lock().counts.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_outcome_per_target_is_kept_and_all_are_counted() {
        let fallbacks = Fallbacks::default();
        let note = |n: usize, reason| {
            let error = AttachError::new(reason, "m");
            fallbacks.note(Fallback { target: n.to_string(), layer_digest: String::new(), error });
        };
        for n in 0..KEPT + 10 {
            note(n, Reason::Timeout);
        }
        note(20, Reason::NotFound);
        let list = fallbacks.list();
        assert_eq!(list.len(), KEPT);
        assert_eq!(list[0].target, "10");
        assert_eq!(list[KEPT - 1].error.reason, Reason::NotFound);
        fallbacks.forget("20");
        assert_eq!(fallbacks.list().len(), KEPT - 1);
        let counts = fallbacks.counts();
        assert_eq!(counts, BTreeMap::from([(Reason::NotFound, 1), (Reason::Timeout, KEPT as u64 + 10)]));
    }
}
