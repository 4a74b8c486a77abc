//! The content of one layer on local disk: a data file per regular file, and the map of what is filled.
//!
//! Owns: `data/<node>` and `filled` in the layer's directory, and finds data files that were moved to their names in the
//! layer's finished tree. May not: touch the network, know FUSE, or accept bytes
//! that are not a [`VerifiedChunk`].
//!
//! A chunk is written at its place in its file's data file, then its bit is set. Data files are sparse until filled.
//!
//! When can a bit be believed? The page cache outlives a process, so every bit set in this boot is true, however the
//! process ended. A power cut may keep a bit and lose the bytes, so after a reboot bits are believed only if the last
//! daemon left a checkpoint (everything synced, nothing changed since). Otherwise they become *suspect*: the bytes
//! may be there, and are hashed again before they are used.
//!
//! Invariant: a set bit means that the chunk's bytes are in the data file and matched the TOC's digest.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use estargz::VerifiedChunk;
use parking_lot::RwLock;
use rustix::fs::{CWD, Mode, OFlags};

use crate::{
    audit::Marks,
    index::{ChunkRef, Index, Node},
};

mod filled;
mod moved;

pub use filled::BootId;
use filled::Filled;
use moved::Moved;
pub(crate) use moved::{FirstNames, PARTIAL, TREE};

/// What of a layer's content is durable whatever the map of filled chunks says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    /// What the map says.
    AsMapped,
    /// All of it.
    All,
}

/// The content store of one layer.
#[derive(Debug)]
pub struct Store {
    data: OwnedFd,
    filled: Filled,
    bytes: AtomicU64,
    dir: PathBuf,
    moved: Moved,
    /// Held shared by every change, exclusively to end them; `true`: there are no more.
    frozen: RwLock<bool>,
}

impl Store {
    /// Opens the store in a layer's directory, creating it where it is missing. A `filled` map that does not fit the
    /// index is replaced by an empty one: the bytes are then fetched anew. Of a layer whose finished tree is durable
    /// everything is there.
    pub fn open(dir: &Path, index: &Index, boot: BootId, durable: Durable) -> io::Result<Store> {
        let data_dir = dir.join("data");
        std::fs::create_dir_all(&data_dir)?;
        let data = rustix::fs::openat(
            CWD,
            &data_dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let filled = Filled::open(&dir.join("filled"), index.chunks(), Marks::of(index).count(), boot)?;
        if durable == Durable::All {
            filled.set_all();
        }
        let bytes = (0..index.chunks()).filter(|&c| filled.has(c)).map(|c| index.chunk(c).spec.size).sum();
        Ok(Store {
            data,
            filled,
            bytes: AtomicU64::new(bytes),
            dir: dir.to_owned(),
            moved: Moved::default(),
            frozen: RwLock::new(false),
        })
    }

    /// The layer's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether a chunk is verified and on disk. One atomic load.
    pub fn has(&self, chunk: u32) -> bool {
        self.filled.has(chunk)
    }

    /// Bytes of content on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn open_data(&self, node: Node, flags: OFlags) -> io::Result<File> {
        let mode = Mode::from_raw_mode(0o600);
        let fd = rustix::fs::openat(
            &self.data,
            node.to_string(),
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            mode,
        )?;
        Ok(File::from(fd))
    }

    /// A data file wherever it is.
    fn find_data(&self, index: &Index, node: Node, flags: OFlags) -> io::Result<File> {
        match self.open_data(node, flags) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.moved.open(&self.dir, index, node, flags)
            }
            opened => opened,
        }
    }

    /// The directory of data files.
    pub(crate) fn data(&self) -> &OwnedFd {
        &self.data
    }

    /// Whether an audit has left this mark.
    pub fn is_marked(&self, mark: u64) -> bool {
        self.filled.is_marked(mark)
    }

    /// Leaves the mark of an audit.
    pub fn set_mark(&self, mark: u64) {
        self.filled.set_mark(mark);
    }

    /// Fills `buf` from a file's content at `offset`. Every chunk under it must be filled. An error here means that
    /// the data file was damaged from outside: [`Store::distrust`] its chunks and fetch them again.
    pub fn read(&self, index: &Index, node: Node, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.find_data(index, node, OFlags::RDONLY)?.read_exact_at(buf, offset)
    }

    /// Writes a verified chunk of the index's layer and marks it filled.
    pub fn put(&self, index: &Index, chunk: &ChunkRef, bytes: &VerifiedChunk) -> io::Result<()> {
        debug_assert_eq!(&chunk.spec, bytes.spec());
        let frozen = self.frozen.read();
        if *frozen {
            return Err(io::Error::other("the store takes no more changes: the daemon is stopping"));
        }
        self.filled.begin_changes()?;
        let file = match self.find_data(index, chunk.node, OFlags::WRONLY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.create_data(index, chunk.node)?,
            opened => opened?,
        };
        file.write_all_at(bytes.data(), chunk.file_offset)?;
        self.mark(chunk);
        Ok(())
    }

    /// Makes a data file. If its chunks are said to be filled it was lost, and they with it.
    fn create_data(&self, index: &Index, node: Node) -> io::Result<File> {
        match self.open_data(node, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL) {
            // Another chunk of the file was quicker.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.open_data(node, OFlags::WRONLY)
            }
            Err(error) => Err(error),
            Ok(file) => {
                index.file_chunks(node).for_each(|chunk| self.unmark(&index.chunk(chunk)));
                Ok(file)
            }
        }
    }

    fn mark(&self, chunk: &ChunkRef) {
        if self.filled.set(chunk.id) {
            self.bytes.fetch_add(chunk.spec.size, Ordering::Relaxed);
        }
    }

    fn unmark(&self, chunk: &ChunkRef) {
        if self.filled.clear(chunk.id) {
            self.bytes.fetch_sub(chunk.spec.size, Ordering::Relaxed);
        }
    }

    /// Whether a chunk's bytes may be on disk but must be hashed before use.
    pub fn is_suspect(&self, chunk: u32) -> bool {
        self.filled.is_suspect(chunk)
    }

    /// Hashes a suspect chunk's bytes again and marks it filled if they are still right. `true` if it is filled now.
    pub fn recheck(&self, index: &Index, chunk: &ChunkRef) -> bool {
        if self.has(chunk.id) {
            return true;
        }
        let frozen = self.frozen.read();
        if *frozen || !self.is_suspect(chunk.id) || self.filled.begin_changes().is_err() {
            return false;
        }
        let mut buf = vec![0; usize::try_from(chunk.spec.size).unwrap_or(usize::MAX)];
        let intact = self.read(index, chunk.node, chunk.file_offset, &mut buf).is_ok()
            && chunk.spec.verify(Bytes::from(buf)).is_ok();
        if intact {
            self.mark(chunk);
        } else {
            self.filled.clear_suspect(chunk.id);
        }
        intact
    }

    /// Takes the marks of all of a file's chunks away after its data file failed to read: what else is in it is as
    /// doubtful, and a chunk written anew would put a hole where others were.
    pub fn distrust(&self, index: &Index, node: Node) {
        let frozen = self.frozen.read();
        if !*frozen && self.filled.begin_changes().is_ok() {
            index.file_chunks(node).for_each(|chunk| self.unmark(&index.chunk(chunk)));
        }
    }

    /// Ends all changes: waits for those under way and refuses later ones.
    pub fn freeze(&self) {
        *self.frozen.write() = true;
    }

    /// Declares everything filled durable. The store is frozen, and then the file system that holds it was synced.
    pub fn checkpoint(&self) -> io::Result<()> {
        debug_assert!(*self.frozen.read());
        self.filled.checkpoint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn chunk_bytes(index: &Index, id: u32) -> (ChunkRef, VerifiedChunk) {
        let chunk = index.chunk(id);
        let bytes = testing::chunk_content(index, id);
        (chunk, chunk.spec.verify(bytes).unwrap())
    }

    #[test]
    fn chunks_survive_a_process_and_are_hashed_again_after_a_reboot_without_checkpoint() {
        let (dir, index) = testing::index_of_two_files();
        let boot = |n: u8| BootId::from_bytes([n; 16]);
        let store = Store::open(dir.path(), &index, boot(1), Durable::AsMapped).unwrap();
        let (chunk, bytes) = chunk_bytes(&index, 0);
        assert!(!store.has(0));
        store.put(&index, &chunk, &bytes).unwrap();
        assert!(store.has(0));
        drop(store);

        let store = Store::open(dir.path(), &index, boot(1), Durable::AsMapped).unwrap();
        assert!(store.has(0), "the same boot trusts what it wrote");
        assert_eq!(store.bytes(), chunk.spec.size);
        drop(store);

        let store = Store::open(dir.path(), &index, boot(2), Durable::AsMapped).unwrap();
        assert!(!store.has(0), "another boot does not");
        assert!(store.recheck(&index, &chunk), "but finds it intact");
        assert!(store.has(0));
        store.freeze();
        assert!(store.put(&index, &chunk, &bytes).is_err(), "no change comes after a checkpoint");
        store.checkpoint().unwrap();
        drop(store);

        let store = Store::open(dir.path(), &index, boot(3), Durable::AsMapped).unwrap();
        assert!(store.has(0), "a checkpoint carries over");
        let (other, other_bytes) = chunk_bytes(&index, 1);
        store.put(&index, &other, &other_bytes).unwrap();
        drop(store);

        // The power fails: the bit of chunk 0 is on disk, its bytes are not what they were.
        let name = dir.path().join("data").join(chunk.node.to_string());
        std::fs::write(&name, vec![0; chunk.spec.size as usize]).unwrap();
        let store = Store::open(dir.path(), &index, boot(4), Durable::AsMapped).unwrap();
        assert!(!store.has(0));
        assert!(!store.recheck(&index, &chunk), "damaged bytes are not believed");
        assert!(store.recheck(&index, &other));
        assert_eq!(store.bytes(), other.spec.size);
    }

    #[test]
    fn a_map_that_does_not_fit_starts_empty() {
        let (dir, index) = testing::index_of_two_files();
        for damage in [&b""[..], b"short", &[0xff; 4096]] {
            std::fs::write(dir.path().join("filled"), damage).unwrap();
            let store =
                Store::open(dir.path(), &index, BootId::from_bytes([1; 16]), Durable::AsMapped).unwrap();
            assert!((0..index.chunks()).all(|c| !store.has(c)));
        }
    }

    #[test]
    fn a_lost_data_file_is_an_error_that_distrust_makes_good() {
        let (dir, index) = testing::index_of_two_files();
        let store = Store::open(dir.path(), &index, BootId::from_bytes([1; 16]), Durable::AsMapped).unwrap();
        let (chunk, bytes) = chunk_bytes(&index, 0);
        store.put(&index, &chunk, &bytes).unwrap();
        std::fs::remove_file(dir.path().join("data").join(chunk.node.to_string())).unwrap();
        let mut buf = vec![0; chunk.spec.size as usize];
        assert!(store.read(&index, chunk.node, 0, &mut buf).is_err());
        store.distrust(&index, chunk.node);
        assert!(!store.has(0));
        assert_eq!(store.bytes(), 0);
        store.put(&index, &chunk, &bytes).unwrap();
        store.read(&index, chunk.node, 0, &mut buf).unwrap();
        assert_eq!(&buf, bytes.data());
    }
}
