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
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};

use bytes::Bytes;
use estargz::VerifiedChunk;
use parking_lot::{RwLock, RwLockReadGuard};
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

/// While this lives the number of evictions is odd.
struct Evicting<'a>(&'a AtomicU64);

impl Evicting<'_> {
    fn of(evictions: &AtomicU64) -> Evicting<'_> {
        evictions.fetch_add(1, Ordering::AcqRel);
        Evicting(evictions)
    }
}

impl Drop for Evicting<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

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
    /// By its path, so that a thousand layers take no descriptors.
    data: PathBuf,
    filled: Filled,
    bytes: AtomicU64,
    dir: PathBuf,
    moved: Moved,
    /// Odd while chunks are being evicted: what was read meanwhile may be a hole.
    evictions: AtomicU64,
    /// Where evicting goes on.
    evict_next: AtomicU32,
    /// Held shared by every change, exclusively to end them and to evict; `true`: there are no more.
    frozen: RwLock<bool>,
    /// The directory is another layer's now, or nobody's.
    retired: AtomicBool,
}

impl Store {
    /// Opens the store in a layer's directory, creating it where it is missing. A `filled` map that does not fit the
    /// index is replaced by an empty one: the bytes are then fetched anew. Of a layer whose finished tree is durable
    /// everything is there.
    pub fn open(dir: &Path, index: &Index, boot: BootId, durable: Durable) -> io::Result<Store> {
        let data = dir.join("data");
        std::fs::create_dir_all(&data)?;
        let filled = Filled::open(&dir.join("filled"), index.chunks(), Marks::of(index).count(), boot)?;
        if durable == Durable::All {
            filled.set_all();
        }
        let store = Store {
            data,
            filled,
            bytes: AtomicU64::new(0),
            dir: dir.to_owned(),
            moved: Moved::of(dir),
            evictions: AtomicU64::new(0),
            evict_next: AtomicU32::new(0),
            frozen: RwLock::new(false),
            retired: AtomicBool::new(false),
        };
        store.count(index);
        Ok(store)
    }

    /// Counts anew what is filled: at the beginning, and after another process was at it.
    pub(crate) fn count(&self, index: &Index) {
        let filled = (0..index.chunks()).filter(|&c| self.has(c)).map(|c| index.chunk(c).spec.size);
        self.bytes.store(filled.sum(), Ordering::Relaxed);
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
            CWD,
            self.data.join(node.to_string()),
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            mode,
        )?;
        Ok(File::from(fd))
    }

    /// A data file wherever it is.
    fn find_data(&self, index: &Index, node: Node, flags: OFlags) -> io::Result<File> {
        match self.open_data(node, flags) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.moved.is_possible() => {
                self.moved.open(&self.dir, index, node, flags)
            }
            opened => opened,
        }
    }

    /// Files are about to be moved.
    pub(crate) fn expect_moves(&self) {
        self.moved.expect();
    }

    /// The directory of data files.
    pub(crate) fn data(&self) -> &Path {
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

    /// Fills `buf` from a file's content at `offset`, if all of it is here: `false` if not, and `buf` is then anything. An
    /// error means that the data file was damaged from outside: [`Store::distrust`] its chunks and fetch them again.
    ///
    /// Takes no lock: that nothing was evicted meanwhile is seen by the number of evictions.
    pub fn read(&self, index: &Index, node: Node, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let before = self.evictions.load(Ordering::Acquire);
        let bytes = offset..offset.saturating_add(buf.len() as u64);
        if before % 2 == 1
            || self.retired.load(Ordering::Acquire)
            || !index.chunks_in(node, bytes).all(|chunk| self.has(chunk))
        {
            return Ok(false);
        }
        let read =
            self.find_data(index, node, OFlags::RDONLY).and_then(|file| file.read_exact_at(buf, offset));
        fence(Ordering::Acquire);
        if self.evictions.load(Ordering::Relaxed) != before {
            return Ok(false);
        }
        read.map(|()| true)
    }

    /// Bytes of a chunk that may or may not be right.
    fn read_suspect(&self, index: &Index, chunk: &ChunkRef, buf: &mut [u8]) -> io::Result<()> {
        self.find_data(index, chunk.node, OFlags::RDONLY)?.read_exact_at(buf, chunk.file_offset)
    }

    /// Gives back the disk of chunks until `bytes` of content are gone, going round: what was evicted last is evicted again
    /// last. How many bytes went. One at a time. Blocking.
    ///
    /// # Errors
    ///
    /// The file system cannot punch holes. The chunks are then gone all the same.
    pub(crate) fn evict(&self, index: &Index, bytes: u64) -> io::Result<u64> {
        self.filled.begin_changes()?;
        let mut evicted = 0;
        let first = self.evict_next.load(Ordering::Relaxed);
        for step in 0..index.chunks() {
            if evicted >= bytes {
                break;
            }
            let id = (first + step) % index.chunks();
            self.evict_next.store(id + 1, Ordering::Relaxed);
            if !self.has(id) {
                continue;
            }
            // Alone: what writes a chunk and marks it must not do so between the two steps here.
            let frozen = self.frozen.write();
            if *frozen {
                break;
            }
            let _evicting = Evicting::of(&self.evictions);
            let chunk = index.chunk(id);
            // The mark first: nobody may believe in a hole.
            self.unmark(&chunk);
            evicted += chunk.spec.size;
            self.punch(index, &chunk)?;
        }
        Ok(evicted)
    }

    /// Makes a chunk's bytes a hole. Parts of blocks that neighbours share are zeroed, no more.
    fn punch(&self, index: &Index, chunk: &ChunkRef) -> io::Result<()> {
        let file = self.find_data(index, chunk.node, OFlags::WRONLY)?;
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, flags, chunk.file_offset, chunk.spec.size)?)
    }

    /// Writes a verified chunk of the index's layer and marks it filled.
    pub fn put(&self, index: &Index, chunk: &ChunkRef, bytes: &VerifiedChunk) -> io::Result<()> {
        debug_assert_eq!(&chunk.spec, bytes.spec());
        let frozen = self.frozen.read();
        if *frozen {
            return Err(io::Error::other("the store takes no more changes: the daemon is stopping"));
        }
        self.filled.begin_changes()?;
        let file = match self.moved.is_possible() {
            false => self.create_data(index, chunk.node)?,
            true if self.dir.join(TREE).exists() => {
                return Err(io::Error::new(
                    io::ErrorKind::ReadOnlyFilesystem,
                    "the layer is a directory that containers use",
                ));
            }
            true => match self.find_data(index, chunk.node, OFlags::WRONLY) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.create_data(index, chunk.node)?
                }
                opened => opened?,
            },
        };
        file.write_all_at(bytes.data(), chunk.file_offset)?;
        self.mark(chunk);
        Ok(())
    }

    /// Opens a data file that was not moved, making it if need be. Most files have one chunk: making is tried first. If its
    /// chunks are said to be filled it was lost, and they with it.
    fn create_data(&self, index: &Index, node: Node) -> io::Result<File> {
        match self.open_data(node, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL) {
            // Another chunk of the file was first.
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
        let intact =
            self.read_suspect(index, chunk, &mut buf).is_ok() && chunk.spec.verify(Bytes::from(buf)).is_ok();
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

    /// Ends all changes and all reads: the directory is about to be given up. Blocking.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        self.freeze();
    }

    /// Keeps changes possible while the guard lives; `None` if there are no more.
    pub(crate) fn hold(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.frozen.read()).filter(|frozen| !**frozen)
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
        assert!(store.read(&index, chunk.node, 0, &mut buf).is_err(), "the mark says that it is there");
        store.distrust(&index, chunk.node);
        assert!(!store.has(0));
        assert_eq!(store.bytes(), 0);
        store.put(&index, &chunk, &bytes).unwrap();
        assert!(store.read(&index, chunk.node, 0, &mut buf).unwrap());
        assert_eq!(&buf, bytes.data());
    }

    #[test]
    fn what_is_evicted_is_gone_and_can_be_put_again() {
        use std::os::unix::fs::MetadataExt as _;
        let (dir, index) = testing::index_of_two_files();
        let store = Store::open(dir.path(), &index, BootId::from_bytes([1; 16]), Durable::AsMapped).unwrap();
        for id in 0..2 {
            let (chunk, bytes) = chunk_bytes(&index, id);
            store.put(&index, &chunk, &bytes).unwrap();
        }
        let (large, bytes) = chunk_bytes(&index, 1);
        let blocks = || {
            let path = dir.path().join("data").join(large.node.to_string());
            std::fs::metadata(path).unwrap().blocks()
        };
        assert!(blocks() > 100);
        let mut buf = vec![0; large.spec.size as usize];
        assert_eq!(store.evict(&index, 1).unwrap(), index.chunk(0).spec.size, "the first chunk");
        assert!(!store.has(0) && store.has(1));
        assert_eq!(store.evict(&index, 1).unwrap(), large.spec.size, "then the next");
        assert_eq!((store.bytes(), store.has(1)), (0, false));
        assert!(blocks() <= 8, "at most a block that a file's end is in");
        assert!(!store.read(&index, large.node, 0, &mut buf).unwrap());
        store.put(&index, &large, &bytes).unwrap();
        assert!(store.read(&index, large.node, 0, &mut buf).unwrap());
        assert_eq!(&buf, bytes.data());
        assert_eq!(store.evict(&index, u64::MAX).unwrap(), large.spec.size);
    }

    #[test]
    fn one_that_was_given_up_reaches_into_no_directory() {
        let (dir, index) = testing::index_of_two_files();
        let store = Store::open(dir.path(), &index, BootId::from_bytes([1; 16]), Durable::AsMapped).unwrap();
        let (chunk, bytes) = chunk_bytes(&index, 0);
        store.put(&index, &chunk, &bytes).unwrap();
        store.retire();
        let mut buf = vec![0; chunk.spec.size as usize];
        assert!(!store.read(&index, chunk.node, 0, &mut buf).unwrap());
        assert!(store.put(&index, &chunk, &bytes).is_err() && store.hold().is_none());
        assert_eq!(store.evict(&index, u64::MAX).unwrap(), 0);
    }

    #[test]
    fn a_finished_tree_is_not_written_to() {
        let (dir, index) = testing::index_of_two_files();
        let (chunk, bytes) = chunk_bytes(&index, 0);
        std::fs::create_dir(dir.path().join(TREE)).unwrap();
        let store = Store::open(dir.path(), &index, BootId::from_bytes([1; 16]), Durable::AsMapped).unwrap();
        let error = store.put(&index, &chunk, &bytes).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }

    #[test]
    fn readers_never_see_a_hole() {
        let (dir, index) = testing::index_of_two_files();
        let store = Store::open(dir.path(), &index, BootId::from_bytes([1; 16]), Durable::AsMapped).unwrap();
        let (chunk, bytes) = chunk_bytes(&index, 1);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut buf, mut hits) = (vec![0; chunk.spec.size as usize], 0_u32);
                        while !done.load(Ordering::Relaxed) {
                            buf.fill(0);
                            if store.read(&index, chunk.node, 0, &mut buf).unwrap_or(false) {
                                assert!(buf == *bytes.data(), "a read has seen what is not there");
                                hits += 1;
                            }
                        }
                        hits
                    })
                })
                .collect();
            for _ in 0..2000 {
                store.put(&index, &chunk, &bytes).unwrap();
                std::thread::yield_now();
                store.evict(&index, 1).unwrap();
            }
            store.put(&index, &chunk, &bytes).unwrap();
            while store.bytes() == 0 {}
            done.store(true, Ordering::Relaxed);
            let hits: u32 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
            assert!(hits > 0, "the last put was seen");
        });
    }
}
