//! The content of one layer on local disk: a data file per regular file, and the map of what is filled.
//!
//! Owns: `data/<node>` and `filled` in the layer's directory. May not: touch the network, know FUSE, or accept bytes
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
use rustix::fs::{CWD, Mode, OFlags};

use crate::index::{ChunkRef, Index, Node};

mod filled;

pub use filled::BootId;
use filled::Filled;

/// The content store of one layer.
#[derive(Debug)]
pub struct Store {
    data: OwnedFd,
    filled: Filled,
    bytes: AtomicU64,
    dir: PathBuf,
}

impl Store {
    /// Opens the store in a layer's directory, creating it where it is missing. A `filled` map that does not fit the
    /// index is replaced by an empty one: the bytes are then fetched anew.
    pub fn open(dir: &Path, index: &Index, boot: BootId) -> io::Result<Store> {
        let data_dir = dir.join("data");
        std::fs::create_dir_all(&data_dir)?;
        let data = rustix::fs::openat(
            CWD,
            &data_dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let filled = Filled::open(&dir.join("filled"), index.chunks(), boot)?;
        let bytes = (0..index.chunks()).filter(|&c| filled.has(c)).map(|c| index.chunk(c).spec.size).sum();
        Ok(Store { data, filled, bytes: AtomicU64::new(bytes), dir: dir.to_owned() })
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
    /// Bytes of content on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn open_data(&self, node: Node, flags: OFlags) -> io::Result<File> {
        let fd = rustix::fs::openat(
            &self.data,
            node.to_string(),
            flags | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )?;
        Ok(File::from(fd))
    }

    /// Fills `buf` from a file's content at `offset`. Every chunk under it must be filled. An error here means that
    /// the data file was damaged from outside: [`Store::distrust`] its chunks and fetch them again.
    pub fn read(&self, node: Node, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.open_data(node, OFlags::RDONLY)?.read_exact_at(buf, offset)
    }

    /// Writes a verified chunk and marks it filled.
    pub fn put(&self, chunk: &ChunkRef, bytes: &VerifiedChunk) -> io::Result<()> {
        debug_assert_eq!(&chunk.spec, bytes.spec());
        self.filled.begin_changes()?;
        let file = self.open_data(chunk.node, OFlags::WRONLY | OFlags::CREATE)?;
        file.write_all_at(bytes.data(), chunk.file_offset)?;
        if self.filled.set(chunk.id) {
            self.bytes.fetch_add(chunk.spec.size, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether a chunk's bytes may be on disk but must be hashed before use.
    pub fn is_suspect(&self, chunk: u32) -> bool {
        self.filled.is_suspect(chunk)
    }

    /// Hashes a suspect chunk's bytes again and marks it filled if they are still right. `true` if it is filled now.
    pub fn recheck(&self, chunk: &ChunkRef) -> bool {
        if self.has(chunk.id) {
            return true;
        }
        if !self.filled.is_suspect(chunk.id) || self.filled.begin_changes().is_err() {
            return false;
        }
        self.filled.clear_suspect(chunk.id);
        let mut buf = vec![0; usize::try_from(chunk.spec.size).unwrap_or(usize::MAX)];
        let intact = self.read(chunk.node, chunk.file_offset, &mut buf).is_ok()
            && chunk.spec.verify(Bytes::from(buf)).is_ok();
        if intact && self.filled.set(chunk.id) {
            self.bytes.fetch_add(chunk.spec.size, Ordering::Relaxed);
        }
        intact
    }

    /// Takes a chunk's mark away after its data file failed to read.
    pub fn distrust(&self, chunk: &ChunkRef) {
        if self.filled.begin_changes().is_ok() && self.filled.clear(chunk.id) {
            self.bytes.fetch_sub(chunk.spec.size, Ordering::Relaxed);
        }
    }

    /// Declares everything filled so far durable. The caller has synced the file system that holds the store.
    pub fn checkpoint(&self) -> io::Result<()> {
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
        let store = Store::open(dir.path(), &index, boot(1)).unwrap();
        let (chunk, bytes) = chunk_bytes(&index, 0);
        assert!(!store.has(0));
        store.put(&chunk, &bytes).unwrap();
        assert!(store.has(0));
        drop(store);

        let store = Store::open(dir.path(), &index, boot(1)).unwrap();
        assert!(store.has(0), "the same boot trusts what it wrote");
        assert_eq!(store.bytes(), chunk.spec.size);
        drop(store);

        let store = Store::open(dir.path(), &index, boot(2)).unwrap();
        assert!(!store.has(0), "another boot does not");
        assert!(store.recheck(&chunk), "but finds it intact");
        assert!(store.has(0));
        store.checkpoint().unwrap();
        drop(store);

        let store = Store::open(dir.path(), &index, boot(3)).unwrap();
        assert!(store.has(0), "a checkpoint carries over");
        let (other, other_bytes) = chunk_bytes(&index, 1);
        store.put(&other, &other_bytes).unwrap();
        drop(store);

        // The power fails: the bit of chunk 0 is on disk, its bytes are not what they were.
        let name = dir.path().join("data").join(chunk.node.to_string());
        std::fs::write(&name, vec![0; chunk.spec.size as usize]).unwrap();
        let store = Store::open(dir.path(), &index, boot(4)).unwrap();
        assert!(!store.has(0));
        assert!(!store.recheck(&chunk), "damaged bytes are not believed");
        assert!(store.recheck(&other));
        assert_eq!(store.bytes(), other.spec.size);
    }

    #[test]
    fn a_map_that_does_not_fit_starts_empty() {
        let (dir, index) = testing::index_of_two_files();
        for damage in [&b""[..], b"short", &[0xff; 4096]] {
            std::fs::write(dir.path().join("filled"), damage).unwrap();
            let store = Store::open(dir.path(), &index, BootId::from_bytes([1; 16])).unwrap();
            assert!((0..index.chunks()).all(|c| !store.has(c)));
        }
    }

    #[test]
    fn a_lost_data_file_is_an_error_that_distrust_makes_good() {
        let (dir, index) = testing::index_of_two_files();
        let store = Store::open(dir.path(), &index, BootId::from_bytes([1; 16])).unwrap();
        let (chunk, bytes) = chunk_bytes(&index, 0);
        store.put(&chunk, &bytes).unwrap();
        std::fs::remove_file(dir.path().join("data").join(chunk.node.to_string())).unwrap();
        let mut buf = vec![0; chunk.spec.size as usize];
        assert!(store.read(chunk.node, 0, &mut buf).is_err());
        store.distrust(&chunk);
        assert!(!store.has(0));
        assert_eq!(store.bytes(), 0);
        store.put(&chunk, &bytes).unwrap();
        store.read(chunk.node, 0, &mut buf).unwrap();
        assert_eq!(&buf, bytes.data());
    }
}
