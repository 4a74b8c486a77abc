//! What is known of references, in memory, and what is being done about them.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use estargz::TarSplit;
use tokio::time::Instant;

use super::{
    record::{By, LayerRecord, RefRecord},
    seconds,
};

/// What a lookup has found not to be there is not looked for again for this long, and as long as that took: podman asks for each
/// layer of an image that it has just been told is not here.
const SETTLED: Duration = Duration::from_secs(5);

/// All references.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) records: HashMap<u32, RefRecord>,
    pub(super) names: HashMap<String, u32>,
    /// The reference of each slot.
    pub(super) slots: HashMap<u32, u32>,
    pub(super) next: u32,
    /// Slots that lookups may name: the record on disk says that they were shown.
    pub(super) ready: HashSet<u32>,
    pub(super) jobs: HashMap<Job, Progress>,
    /// References to be written.
    pub(super) changed: HashSet<u32>,
    /// TOC digests of layers that nobody used and that were given up: they are fetched again once somebody does.
    pub(super) given_up: HashSet<String>,
}

/// Whence the length of a tar can be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Uncounted {
    /// It is this: another reference has the same layer.
    As(u64),
    /// From the tar-split.
    By(TarSplit),
}

/// Something that is done once at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Job {
    /// Asking the registry where a reference leads.
    Resolve(String),
    /// Showing all layers of a reference under one kind of digest.
    Show(u32, By),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Progress {
    Running,
    Ended { at: Instant, took: Duration },
}

impl Progress {
    /// Whether there is no use in doing it again yet.
    pub(super) fn is_settled(self) -> bool {
        match self {
            Progress::Running => true,
            Progress::Ended { at, took } => at.elapsed() < took.max(SETTLED),
        }
    }
}

impl State {
    pub(super) fn enter(&mut self, record: RefRecord) {
        self.names.insert(record.reference.clone(), record.number);
        self.slots.extend(record.slots().map(|slot| (slot, record.number)));
        self.records.insert(record.number, record);
    }

    /// The layer in a slot, and the digest it is named by.
    pub(super) fn layer(&self, slot: u32) -> Option<(&RefRecord, &LayerRecord, By)> {
        let record = self.records.get(self.slots.get(&slot)?)?;
        let (place, by) = record.in_slot(slot)?;
        Some((record, &record.layers[place], by))
    }

    pub(super) fn layer_mut(&mut self, slot: u32) -> Option<(&mut LayerRecord, By)> {
        let record = self.records.get_mut(self.slots.get(&slot)?)?;
        let (place, by) = record.in_slot(slot)?;
        record.used = seconds();
        Some((&mut record.layers[place], by))
    }

    /// How the length of a layer's tar can be had that is not known yet. Not once the layer is shown: what is said of it stays.
    pub(super) fn uncounted(&self, slot: u32) -> Option<Uncounted> {
        let (_, layer, _) = self.layer(slot)?;
        if layer.diff_size.is_some() || layer.by_blob.shown || layer.by_toc.shown {
            return None;
        }
        let split = layer.tar_split?;
        let is_same = |other: &&LayerRecord| {
            other.blob_digest == layer.blob_digest
                && other.toc_digest == layer.toc_digest
                && other.tar_split == layer.tar_split
        };
        let mut same = self.records.values().flat_map(|record| &record.layers).filter(is_same);
        let known = same.find_map(|other| other.diff_size);
        Some(known.map_or(Uncounted::By(split), Uncounted::As))
    }

    /// The slot of the layer that a reference has under this digest.
    pub(super) fn named(&self, number: u32, digest: &str) -> Option<(u32, By)> {
        let record = self.records.get(&number)?;
        let (place, by) = record.find(digest)?;
        Some((record.layers[place].entry(by).slot, by))
    }

    /// What was found out of a reference says nothing any more.
    pub(super) fn unsettle(&mut self, reference: &str) {
        let number = self.names.get(reference).copied();
        self.jobs.retain(|job, progress| {
            let same = match job {
                Job::Resolve(text) => text == reference,
                Job::Show(shown, _) => Some(*shown) == number,
            };
            !same || matches!(progress, Progress::Running)
        });
    }

    /// Since when a client has been waiting for a reference's layers: it looks for the reference first, and that has had a part
    /// of the time it may take.
    pub(super) fn asked(&self, number: u32, patience: Duration) -> Instant {
        let name = self.records.get(&number).map(|record| record.reference.clone());
        let job = name.and_then(|name| self.jobs.get(&Job::Resolve(name)));
        let begun = match job {
            Some(Progress::Ended { at, took }) => at.checked_sub(*took),
            Some(Progress::Running) | None => None,
        };
        begun.filter(|begun| begun.elapsed() < patience).unwrap_or_else(Instant::now)
    }

    pub(super) fn is_running(&self, job: &Job) -> bool {
        matches!(self.jobs.get(job), Some(Progress::Running))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::record::{Compression, Entry},
        *,
    };

    #[test]
    fn a_tars_length_is_looked_for_once_and_before_the_layer_is_shown() {
        let position = estargz::Position { offset: 1, stored: 2, json: 3 };
        let split = TarSplit { position, digest: None };
        let layer = |slot: u32, diff_size: Option<u64>| LayerRecord {
            blob_digest: "sha256:b".to_owned(),
            blob_size: 9,
            toc_digest: "sha256:t".to_owned(),
            diff_id: "sha256:d".to_owned(),
            diff_size,
            tar_split: Some(split),
            estimated_size: None,
            compression: Compression::Zstd,
            by_blob: Entry::at(slot),
            by_toc: Entry::at(slot + 1),
            below: Vec::new(),
        };
        let mut state = State::default();
        let enter = |state: &mut State, number: u32, layer: LayerRecord| {
            let mut record = RefRecord::new(number, format!("h/r:{number}"), 0);
            record.layers.push(layer);
            state.enter(record);
        };
        enter(&mut state, 2, layer(10, None));
        enter(&mut state, 3, LayerRecord { tar_split: None, ..layer(20, None) });
        assert_eq!([10, 11].map(|slot| state.uncounted(slot)), [Some(Uncounted::By(split)); 2]);
        assert_eq!([20, 99].map(|slot| state.uncounted(slot)), [None; 2]);

        enter(&mut state, 4, layer(30, Some(77)));
        enter(&mut state, 5, LayerRecord { toc_digest: "sha256:u".to_owned(), ..layer(40, None) });
        assert_eq!(state.uncounted(10), Some(Uncounted::As(77)), "another reference has the same layer");
        assert_eq!(state.uncounted(30), None, "it is known");
        assert_eq!(state.uncounted(40), Some(Uncounted::By(split)));
        state.layer_mut(41).unwrap().0.by_toc.shown = true;
        assert_eq!(state.uncounted(40), None, "what is said of a layer stays");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_just_found_out_is_settled_for_a_while_and_counts_to_the_time_of_a_look() {
        let mut state = State::default();
        state.enter(RefRecord::new(2, "h/r:t".to_owned(), 0));
        let patience = Duration::from_secs(30);
        let start = Instant::now();
        assert_eq!(state.asked(2, patience), start);
        tokio::time::advance(Duration::from_secs(8)).await;
        let ended = Progress::Ended { at: Instant::now(), took: Duration::from_secs(8) };
        state.jobs.insert(Job::Resolve("h/r:t".to_owned()), ended);
        assert_eq!(state.asked(2, patience), start);
        tokio::time::advance(Duration::from_secs(7)).await;
        assert!(ended.is_settled());
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(!ended.is_settled());
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(state.asked(2, patience), Instant::now(), "another pull");
        let quick = Progress::Ended { at: Instant::now(), took: Duration::ZERO };
        assert!(quick.is_settled() && Progress::Running.is_settled());
        tokio::time::advance(SETTLED).await;
        assert!(!quick.is_settled());
    }
}
