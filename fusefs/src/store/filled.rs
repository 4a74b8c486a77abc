//! The map of filled chunks: a small file, mapped shared, two bits a chunk; and the marks of an audit.
//!
//! ```text
//! 0        8       12      16         32      40      48         64            64+w            64+2w      64+2w+m
//! +--------+-------+-------+----------+-------+-------+----------+-------------+---------------+----------+
//! |LZRFILL1|version|chunks | boot id  | clean | marks |    0     | filled bits | suspect bits  | marks    |
//! +--------+-------+-------+----------+-------+-------+----------+-------------+---------------+----------+
//!           w = 8 * ceil(chunks/64), m = 8 * ceil(marks/64)
//! ```
//!
//! `filled` bits are true if they were set in the boot that `boot id` names, or if `clean` is 1. Before the first
//! change `clean` is cleared and synced, so that it can never vouch for later bits. Marks say what was seen in the blob, which
//! never changes: they are true whenever they are there.

use std::{
    fs::{File, OpenOptions},
    io,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
};

use memmap2::MmapRaw;

const MAGIC: &[u8; 8] = b"LZRFILL1";
const VERSION: u32 = 2;
const HEADER: usize = 64;
const BOOT: usize = 16;
const CLEAN: usize = 32;
const MARKS: usize = 40;

/// Names one boot of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId([u8; 16]);

impl BootId {
    /// The running kernel's, from `/proc/sys/kernel/random/boot_id`.
    pub fn current() -> io::Result<BootId> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let value =
            u128::from_str_radix(&hex, 16).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(BootId(value.to_be_bytes()))
    }

    /// From its 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> BootId {
        BootId(bytes)
    }
}

#[derive(Debug)]
pub(super) struct Filled {
    map: MmapRaw,
    words: usize,
    chunks: u32,
    marks: u64,
    boot: BootId,
    /// Set once this process has cleared `clean` on disk.
    changing: AtomicBool,
}

impl Filled {
    pub(super) fn open(path: &Path, chunks: u32, marks: u64, boot: BootId) -> io::Result<Filled> {
        let words = (chunks as usize).div_ceil(64);
        let mark_words = usize::try_from(marks.div_ceil(64)).map_err(io::Error::other)?;
        let len = HEADER + words * 16 + mark_words * 8;
        let head = Self::head(chunks, marks);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut header = [0; HEADER];
        let fits = file.metadata()?.len() == len as u64
            && io::Read::read_exact(&mut file, &mut header).is_ok()
            && (&header[..BOOT], &header[MARKS..]) == (&head[..BOOT], &head[MARKS..]);
        if !fits {
            file = Self::create(path, &head, len)?;
        }
        let map = MmapRaw::map_raw(&file)?;
        if map.len() != len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the map of filled chunks changed while it was opened",
            ));
        }
        let filled = Filled { map, words, chunks, marks, boot, changing: AtomicBool::new(false) };
        if fits && header[BOOT..BOOT + 16] != boot.0 && header[CLEAN] != 1 {
            // The bits first: once the file names this boot, what it calls filled is believed.
            for word in 0..words {
                let bits = filled.filled(word).load(Ordering::Acquire);
                filled.suspect(word).fetch_or(bits, Ordering::AcqRel);
                filled.filled(word).store(0, Ordering::Release);
            }
            filled.begin_changes()?;
        }
        Ok(filled)
    }

    fn head(chunks: u32, marks: u64) -> [u8; HEADER] {
        let mut head = [0; HEADER];
        head[..8].copy_from_slice(MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        head[12..16].copy_from_slice(&chunks.to_le_bytes());
        head[MARKS..MARKS + 8].copy_from_slice(&marks.to_le_bytes());
        head
    }

    /// A fresh map under a temporary name, renamed into place: another process's mapping of the old one stays whole.
    fn create(path: &Path, head: &[u8; HEADER], len: usize) -> io::Result<File> {
        let tmp = path.with_extension("tmp");
        let mut bytes = vec![0; len];
        bytes[..HEADER].copy_from_slice(head);
        std::fs::write(&tmp, &bytes)?;
        let file = OpenOptions::new().read(true).write(true).open(&tmp)?;
        std::fs::rename(&tmp, path)?;
        Ok(file)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(HEADER + (at + 1) * 8 <= self.map.len());
        // SAFETY: within the map (just checked), which is page aligned, so that the word is aligned; the map lives as long
        // as `self`, and behind its header it is only ever accessed through atomics.
        unsafe { &*self.map.as_ptr().add(HEADER).cast::<AtomicU64>().add(at) }
    }

    fn filled(&self, word: usize) -> &AtomicU64 {
        self.word(word)
    }

    fn suspect(&self, word: usize) -> &AtomicU64 {
        self.word(self.words + word)
    }

    fn place(&self, chunk: u32) -> (usize, u64) {
        assert!(chunk < self.chunks, "chunk {chunk} of a layer with {}", self.chunks);
        (chunk as usize / 64, 1 << (chunk % 64))
    }

    pub(super) fn has(&self, chunk: u32) -> bool {
        let (word, bit) = self.place(chunk);
        self.filled(word).load(Ordering::Acquire) & bit != 0
    }

    /// Sets a bit; `true` if it was not set before.
    pub(super) fn set(&self, chunk: u32) -> bool {
        let (word, bit) = self.place(chunk);
        self.suspect(word).fetch_and(!bit, Ordering::AcqRel);
        self.filled(word).fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Clears a bit; `true` if it was set before.
    pub(super) fn clear(&self, chunk: u32) -> bool {
        let (word, bit) = self.place(chunk);
        self.filled(word).fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    pub(super) fn is_suspect(&self, chunk: u32) -> bool {
        let (word, bit) = self.place(chunk);
        self.suspect(word).load(Ordering::Acquire) & bit != 0
    }

    pub(super) fn clear_suspect(&self, chunk: u32) {
        let (word, bit) = self.place(chunk);
        self.suspect(word).fetch_and(!bit, Ordering::AcqRel);
    }

    /// All chunks: what is declared durable by other means.
    pub(super) fn set_all(&self) {
        for chunk in 0..self.chunks {
            self.set(chunk);
        }
    }

    fn mark_place(&self, mark: u64) -> (usize, u64) {
        assert!(mark < self.marks, "mark {mark} of a layer with {}", self.marks);
        (2 * self.words + (mark / 64) as usize, 1 << (mark % 64))
    }

    pub(super) fn is_marked(&self, mark: u64) -> bool {
        let (word, bit) = self.mark_place(mark);
        self.word(word).load(Ordering::Acquire) & bit != 0
    }

    pub(super) fn set_mark(&self, mark: u64) {
        let (word, bit) = self.mark_place(mark);
        self.word(word).fetch_or(bit, Ordering::AcqRel);
    }

    /// Must precede every change of a bit: makes the file say, durably, that its bits hold for this boot only.
    pub(super) fn begin_changes(&self) -> io::Result<()> {
        if self.changing.load(Ordering::Acquire) {
            return Ok(());
        }
        // Two threads may both come this far; the second flush is harmless.
        self.mark(0)?;
        self.changing.store(true, Ordering::Release);
        Ok(())
    }

    /// Declares all bits durable; the next change withdraws it. No change may run beside it.
    pub(super) fn checkpoint(&self) -> io::Result<()> {
        self.map.flush()?;
        self.mark(1)?;
        self.changing.store(false, Ordering::Release);
        Ok(())
    }

    fn mark(&self, clean: u8) -> io::Result<()> {
        for (at, byte) in self.boot.0.iter().enumerate() {
            self.byte(BOOT + at).store(*byte, Ordering::Release);
        }
        self.byte(CLEAN).store(clean, Ordering::Release);
        self.map.flush_range(0, HEADER)
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        debug_assert!(at < HEADER);
        // SAFETY: within the header, which every map has; accessed only through atomics after `open`.
        unsafe { &*self.map.as_ptr().add(at).cast::<AtomicU8>() }
    }
}
