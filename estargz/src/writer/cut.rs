//! Cutting the tar into members. Decides what is compressed together; looks at nothing but the tar and the options,
//! so the cuts do not depend on threads or on how well something compresses.
//!
//! ```text
//! tar     | header | header | payload, padding | header | header | payload ... payload, padding | header |
//! member  | headers in front ||-------- chunk 1 --------------- || chunk 1 | chunk 2 | chunk 3 --------- |
//! ```
//!
//! - A chunk starts a member, unless the open one starts with a chunk too and is still below the minimum size.
//! - Everything that follows a chunk in the tar, up to the next one, stays in its member: the padding and the headers
//!   of what has no payload, then the header of the next file.
//! - After [`MAX_HEADERS`] without a chunk a member ends all the same, and one without chunks begins. The table of
//!   contents does not name it; it only keeps a million empty files out of memory, and on all cores.
//! - A landmark always starts a member, because its offset is the end of what is worth prefetching.
//!
//! For podman's zstd:chunked the tar-split is made here too, where the tar passes in order.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use super::order::clean;
use super::pipeline::Feed;
use super::split::{Split, Splitter};
use super::tar::{self, BLOCK, Header};
use super::toc::{self, Describer};
use super::{Dialect, Error, Observer, Options, Target};

/// Bytes of headers after which a member ends without a chunk.
const MAX_HEADERS: usize = 1 << 20;

/// The contents of a landmark. Any would do.
const LANDMARK: &[u8] = &[0x0f];

/// A member before compression.
#[derive(Debug, Default)]
pub(super) struct Member {
    /// Its decompressed bytes: a part of the tar.
    pub(super) bytes: Vec<u8>,
    /// Its chunks, in order.
    pub(super) chunks: Vec<Chunk>,
    /// Entries of the table of contents whose header or chunk is in here, in order.
    pub(super) rows: Vec<Row>,
}

/// A chunk in a member.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    /// Place in the member's bytes.
    pub(super) range: Range<usize>,
    pub(super) part: Part,
}

/// Which part of its file a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// One of several, and not the last.
    Piece,
    /// The last of several.
    Last,
}

/// An entry of the table of contents, but for what is known only after compression.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) entry: toc::Entry,
    /// Whether the member's next chunk is this entry's.
    pub(super) has_chunk: bool,
}

/// What was cut.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Entries of the input that are in the output.
    pub(super) entries: u64,
    /// Their chunks.
    pub(super) chunks: u64,
    /// Entries with a name that the table of contents cannot tell.
    pub(super) lossy_names: u64,
    /// Entries that podman would not find the same in table of contents and tar-split.
    pub(super) unlike: u64,
}

/// Takes entries, gives members.
pub(super) struct Cutter<'a> {
    chunk_size: u64,
    min_chunk_size: u64,
    observer: &'a dyn Observer,
    feed: Feed,
    /// The open member.
    member: Member,
    describer: Describer,
    splitter: Option<Splitter>,
    /// Hashes of the names so far, if there is a tar-split, which must have none twice.
    names: HashSet<u64>,
    counts: Counts,
}

impl<'a> Cutter<'a> {
    pub(super) fn new(options: &Options, feed: Feed, observer: &'a dyn Observer) -> Result<Self, Error> {
        let &Options { target, chunk_size, min_chunk_size, level, .. } = options;
        let splits = target == Target::ZstdChunked(Dialect::Podman);
        let splitter = splits.then(|| Splitter::new(level)).transpose()?;
        let describer = Describer::new(target);
        let (member, names, counts) = Default::default();
        Ok(Cutter { chunk_size, min_chunk_size, observer, feed, member, describer, splitter, names, counts })
    }

    /// Adds an entry, whose content comes from `tar`.
    pub(super) fn entry(
        &mut self,
        entry: &tar::Entry,
        tar: &mut tar::Reader<impl std::io::Read>,
    ) -> Result<(), Error> {
        let row = self.describer.describe(entry)?;
        self.counts.entries += 1;
        self.counts.lossy_names += u64::from(row.is_lossy());
        if self.splitter.is_some() {
            let mut hasher = DefaultHasher::new();
            clean(&entry.name).hash(&mut hasher);
            let unlike = row.is_lossy() || entry.has_spare_fields || !self.names.insert(hasher.finish());
            self.counts.unlike += u64::from(unlike);
        }
        self.header(&entry.header)?;
        if let Some(splitter) = &mut self.splitter {
            splitter.headers(&entry.header)?;
        }
        if entry.size == 0 {
            self.member.rows.push(Row { entry: row, has_chunk: false });
        } else {
            self.file(row, tar)?;
        }
        if let Some(splitter) = &mut self.splitter {
            splitter.entry(&entry.name, entry.size, padding(entry.size))?;
        }
        self.observer.entry();
        Ok(())
    }

    /// Adds a landmark.
    pub(super) fn landmark(&mut self, name: &'static str) -> Result<(), Error> {
        let size = LANDMARK.len() as u64;
        self.header(Header::file(name.as_bytes(), size).block())?;
        let chunk_size = if size == self.chunk_size { size } else { 0 };
        let row =
            toc::Entry { name: name.to_owned(), kind: "reg", size, chunk_size, ..toc::Entry::default() };
        self.close()?;
        let start = self.start_chunk(size, row)?;
        self.member.bytes.extend_from_slice(LANDMARK);
        self.end_chunk(start, Part::Whole);
        self.pad(size);
        Ok(())
    }

    /// Ends the last member. `end` is how many zero bytes end the archive, if that is in a member: in eStargz it is not.
    pub(super) fn finish(mut self, end: u64) -> Result<(Counts, Option<Split>), Error> {
        if self.describer.target() != Target::EStargz {
            let mut left = end;
            while left > 0 {
                let zeros = left.min(MAX_HEADERS as u64);
                self.header(&vec![0; zeros as usize])?;
                left -= zeros;
            }
        }
        self.close()?;
        let split = self.splitter.map(|splitter| splitter.finish(end)).transpose()?;
        Ok((self.counts, split))
    }

    fn file(&mut self, row: toc::Entry, tar: &mut tar::Reader<impl std::io::Read>) -> Result<(), Error> {
        let (name, size) = (row.name.clone(), row.size);
        let mut next = Some(row);
        let mut chunk_offset = 0;
        while chunk_offset < size {
            let len = self.chunk_size.min(size - chunk_offset);
            let part = match (len == size, chunk_offset + len == size) {
                (true, _) => Part::Whole,
                (false, true) => Part::Last,
                (false, false) => Part::Piece,
            };
            let row = next.take().unwrap_or_else(|| toc::Entry::chunk(name.clone()));
            let chunk_size = if len == self.chunk_size { len } else { 0 };
            let start = self.start_chunk(len, toc::Entry { chunk_offset, chunk_size, ..row })?;
            tar.read(len, &mut self.member.bytes)?;
            if let Some(splitter) = &mut self.splitter {
                splitter.content(&self.member.bytes[start..]);
            }
            self.end_chunk(start, part);
            self.counts.chunks += 1;
            chunk_offset += len;
        }
        self.pad(size);
        Ok(())
    }

    /// Appends header blocks.
    fn header(&mut self, blocks: &[u8]) -> Result<(), Error> {
        let payload = self.member.chunks.last().map_or(0, |last| last.range.end);
        if self.member.bytes.len() - payload >= MAX_HEADERS {
            self.close()?;
        }
        self.member.bytes.extend_from_slice(blocks);
        Ok(())
    }

    /// Makes room for a chunk, in a new member unless it may share the open one. Returns where it starts.
    fn start_chunk(&mut self, len: u64, entry: toc::Entry) -> Result<usize, Error> {
        let shares = !self.member.chunks.is_empty() && (self.member.bytes.len() as u64) < self.min_chunk_size;
        if !shares {
            self.close()?;
        }
        // With padding and the header that nearly always follows.
        self.member.bytes.reserve(len as usize + 2 * BLOCK);
        self.member.rows.push(Row { entry, has_chunk: true });
        Ok(self.member.bytes.len())
    }

    fn end_chunk(&mut self, start: usize, part: Part) {
        let range = start..self.member.bytes.len();
        self.member.chunks.push(Chunk { range, part });
    }

    /// Fills up the last block of a payload of `size` bytes.
    fn pad(&mut self, size: u64) {
        self.member.bytes.resize(self.member.bytes.len() + padding(size), 0);
    }

    fn close(&mut self) -> Result<(), Error> {
        if self.member.bytes.is_empty() {
            return Ok(());
        }
        self.feed.send(std::mem::take(&mut self.member))
    }
}

/// Bytes that fill the last block of a payload of `size` bytes.
fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}
