//! What is kept of a reference, so that its paths come back without the network.
//!
//! ```text
//! refs/numbers          {"version":1,"next":...}: the next number of a reference or slot
//! refs/<number>.json    one reference: its manifests so far, and their layers ([`RefRecord`])
//! ```
//!
//! Owns: these files. A file is replaced as a whole.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use estargz::TarSplit;
use serde::{Deserialize, Serialize};

use super::name::FIRST_NUMBER;
use crate::resolve::write_durably;

const VERSION: u32 = 1;

/// The digest by which a layer's directory is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum By {
    /// That of its blob: c/storage until 1.53.
    Blob,
    /// That of its TOC: c/storage from 1.54 on.
    Toc,
}

/// A reference and all that was found under it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefRecord {
    version: u32,
    /// Its number.
    pub number: u32,
    /// As podman names it.
    pub reference: String,
    /// Digests of the manifests it has led to.
    pub manifests: Vec<String>,
    /// Their layers that can be lazy. Only ever grows: others name layers by their place in it.
    pub layers: Vec<LayerRecord>,
    /// When it was last asked for, in seconds since the epoch.
    pub used: u64,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Digest of its blob.
    pub blob_digest: String,
    /// Bytes of its blob.
    pub blob_size: u64,
    /// Digest of its TOC.
    pub toc_digest: String,
    /// Digest of its tar, as the image's config has it.
    pub diff_id: String,
    /// Bytes of its tar, where its builder has noted them, or its tar-split tells.
    pub diff_size: Option<u64>,
    /// Its tar-split. Not kept: it is read before the layer is shown first, or not at all.
    #[serde(skip)]
    pub tar_split: Option<TarSplit>,
    /// About how many they are otherwise, once its index is here.
    pub estimated_size: Option<u64>,
    /// Of its blob.
    pub compression: Compression,
    /// Its directory by the blob's digest.
    pub by_blob: Entry,
    /// Its directory by the TOC's digest.
    pub by_toc: Entry,
    /// The places of those below it, the nearest first.
    pub below: Vec<usize>,
}

/// How a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

impl Compression {
    /// The number it has in c/storage (pkg/archive/archive.go).
    pub fn number(self) -> u8 {
        match self {
            Compression::Gzip => 2,
            Compression::Zstd => 4,
        }
    }
}

/// One directory of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its slot.
    pub slot: u32,
    /// Whether it was ever asked for: it comes back after a restart.
    pub shown: bool,
    /// How many say that they use it. A hint: who crashes does not say that it has ended.
    pub uses: u64,
    /// Whether the last of them has said that it uses it no longer: without, a count of none may be one that a crash has lost.
    pub released: bool,
}

impl Entry {
    /// A fresh one.
    pub fn at(slot: u32) -> Entry {
        Entry { slot, shown: false, uses: 0, released: false }
    }
}

impl Entry {
    /// Somebody uses it.
    pub fn take(&mut self) {
        self.uses = self.uses.saturating_add(1);
        self.released = false;
    }

    /// Somebody does not any more.
    pub fn release(&mut self) {
        self.uses = self.uses.saturating_sub(1);
        self.released = self.uses == 0;
    }
}

impl LayerRecord {
    /// Its directory under one of its names.
    pub fn entry(&self, by: By) -> &Entry {
        match by {
            By::Blob => &self.by_blob,
            By::Toc => &self.by_toc,
        }
    }

    /// The same, to be changed.
    pub fn entry_mut(&mut self, by: By) -> &mut Entry {
        match by {
            By::Blob => &mut self.by_blob,
            By::Toc => &mut self.by_toc,
        }
    }
}

impl RefRecord {
    /// One of which nothing is known.
    pub fn new(number: u32, reference: String, used: u64) -> RefRecord {
        RefRecord { version: VERSION, number, reference, manifests: Vec::new(), layers: Vec::new(), used }
    }

    /// The layer that a directory of this digest shows.
    pub fn find(&self, digest: &str) -> Option<(usize, By)> {
        let found = self.layers.iter().enumerate().find_map(|(place, layer)| {
            let by_toc = (layer.toc_digest == digest).then_some((place, By::Toc));
            by_toc.or((layer.blob_digest == digest).then_some((place, By::Blob)))
        });
        // What is in a file may be anything.
        found.filter(|_| !digest.is_empty())
    }

    /// The layer in a slot.
    pub fn in_slot(&self, slot: u32) -> Option<(usize, By)> {
        self.layers.iter().enumerate().find_map(|(place, layer)| {
            let by_toc = (layer.by_toc.slot == slot).then_some((place, By::Toc));
            by_toc.or((layer.by_blob.slot == slot).then_some((place, By::Blob)))
        })
    }

    /// Those who say that they use any of it.
    pub fn uses(&self) -> u64 {
        self.layers.iter().map(|layer| layer.by_blob.uses + layer.by_toc.uses).sum()
    }

    /// Whether nobody uses any of it, as far as can be known.
    pub fn is_released(&self) -> bool {
        let mut entries = self.layers.iter().flat_map(|layer| [layer.by_blob, layer.by_toc]);
        self.uses() == 0 && entries.any(|entry| entry.released)
    }

    /// Whether all that it says can be used.
    fn is_sound(&self) -> bool {
        let below = |(place, layer): (usize, &LayerRecord)| layer.below.iter().all(|&below| below < place);
        self.version == VERSION
            && self.number >= FIRST_NUMBER
            && self.layers.iter().enumerate().all(below)
            && self.slots().all(|slot| slot >= FIRST_NUMBER)
    }

    /// All of its slots.
    pub fn slots(&self) -> impl Iterator<Item = u32> {
        self.layers.iter().flat_map(|layer| [layer.by_blob.slot, layer.by_toc.slot])
    }
}

/// The next number.
#[derive(Debug, Serialize, Deserialize)]
struct Numbers {
    version: u32,
    next: u32,
}

/// The files.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
}

impl Files {
    /// In the directory, which is made.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn open(dir: &Path) -> io::Result<Files> {
        fs::create_dir_all(dir)?;
        Ok(Files { dir: dir.to_owned() })
    }

    /// All references, and the next number. One whose file is damaged is left out: it is found again when it is asked for.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn load(&self) -> io::Result<(Vec<RefRecord>, u32)> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let read = || serde_json::from_slice::<RefRecord>(&fs::read(&path).ok()?).ok();
            match read().filter(|record| record.is_sound() && path == self.path(record.number)) {
                Some(record) => records.push(record),
                None => {
                    tracing::warn!(path = %path.display(), "a reference's record cannot be used; it is left out")
                }
            }
        }
        let taken = records.iter().flat_map(|record| record.slots().chain([record.number])).max();
        let noted = fs::read(self.dir.join("numbers")).ok();
        let noted = noted.and_then(|text| serde_json::from_slice::<Numbers>(&text).ok());
        let next = noted.map_or(FIRST_NUMBER, |numbers| numbers.next);
        Ok((records, next.max(taken.map_or(FIRST_NUMBER, |taken| taken.saturating_add(1)))))
    }

    /// Notes the next number. Blocking.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn note_next(&self, next: u32) -> io::Result<()> {
        let text = serde_json::to_vec(&Numbers { version: VERSION, next })?;
        write_durably(&self.dir.join("numbers"), &text)
    }

    /// Writes a reference. Blocking.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn write(&self, record: &RefRecord) -> io::Result<()> {
        write_durably(&self.path(record.number), &serde_json::to_vec(record)?)
    }

    /// Deletes a reference. Blocking.
    ///
    /// # Errors
    ///
    /// It cannot be deleted.
    pub fn remove(&self, number: u32) -> io::Result<()> {
        fs::remove_file(self.path(number))
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u32, slots: [u32; 2]) -> RefRecord {
        let mut record = RefRecord::new(number, "h/r:t".to_owned(), 7);
        record.layers.push(LayerRecord {
            blob_digest: "sha256:b".to_owned(),
            blob_size: 1,
            toc_digest: "sha256:t".to_owned(),
            diff_id: "sha256:d".to_owned(),
            diff_size: None,
            tar_split: None,
            estimated_size: None,
            compression: Compression::Gzip,
            by_blob: Entry::at(slots[0]),
            by_toc: Entry::at(slots[1]),
            below: Vec::new(),
        });
        record
    }

    #[test]
    fn records_come_back_and_damaged_ones_cost_only_themselves() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path()).unwrap();
        assert_eq!(files.load().unwrap(), (vec![], FIRST_NUMBER));
        let good = record(2, [3, 4]);
        files.write(&good).unwrap();
        assert_eq!(files.load().unwrap(), (vec![good.clone()], 5));
        files.note_next(9).unwrap();
        fs::write(dir.path().join("7.json"), "{").unwrap();
        files.write(&record(8, [0, 1])).unwrap();
        let mut cyclic = record(10, [11, 12]);
        cyclic.layers[0].below.push(0);
        files.write(&cyclic).unwrap();
        assert_eq!(files.load().unwrap(), (vec![good], 9));
        files.remove(2).unwrap();
        assert_eq!(files.load().unwrap(), (vec![], 9), "numbers are not used again");
    }

    #[test]
    fn a_count_that_a_crash_may_have_lost_releases_nothing() {
        let mut record = record(2, [3, 4]);
        assert!(!record.is_released(), "nobody has said anything");
        for _ in 0..2 {
            record.layers[0].by_toc.take();
        }
        record.layers[0].by_toc.release();
        assert_eq!((record.uses(), record.is_released()), (1, false));
        record.layers[0].by_toc.release();
        assert_eq!((record.uses(), record.is_released()), (0, true));
        record.layers[0].by_toc.release();
        record.layers[0].by_blob.take();
        assert_eq!((record.uses(), record.is_released()), (1, false));
    }

    #[test]
    fn a_layer_is_found_by_either_digest() {
        let record = record(2, [3, 4]);
        assert_eq!(record.find("sha256:b"), Some((0, By::Blob)));
        assert_eq!(record.find("sha256:t"), Some((0, By::Toc)));
        assert_eq!((record.find("sha256:d"), record.find("")), (None, None));
        assert_eq!((record.in_slot(3), record.in_slot(4)), (Some((0, By::Blob)), Some((0, By::Toc))));
        assert_eq!(record.in_slot(2), None);
    }
}
