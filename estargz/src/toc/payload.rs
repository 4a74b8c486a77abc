//! Chunks and members: that a file's chunks cover it, and that chunks and members fit the blob.
//!
//! A `reg` entry of at least one byte carries the file's first chunk, the `chunk` entries after it the others.
//! Of every file, also one that a later entry replaces, is checked:
//!
//! - chunks follow each other without gap or overlap from 0 to the file's size, in blob order;
//! - each lies in a member before the TOC, and no two chunks of a member overlap.

use std::borrow::Cow;
use std::ops::Range;

use super::json::Entry;
use super::tree::same_path;
use super::{Chunk, Digests, Member};
use crate::error::shorten;
use crate::{Digest, Error, Format, Limits};

/// All files' chunks, collected in the order of the TOC.
#[derive(Debug)]
pub(super) struct Payload<'a, 'l> {
    format: Format,
    toc_offset: u64,
    digests: Digests,
    limits: &'l Limits,
    files: Vec<File<'a>>,
    chunks: Vec<Placed>,
}

#[derive(Debug)]
struct File<'a> {
    name: Cow<'a, str>,
    size: u64,
    digest: Option<Digest>,
    chunks: Range<usize>,
}

/// A chunk and its place in the blob.
#[derive(Debug)]
struct Placed {
    file_offset: u64,
    size: u64,
    member_offset: u64,
    inner_offset: u64,
    digest: Option<Digest>,
    zeros: bool,
    /// Index of the member; known when all chunks are.
    member: u32,
}

impl Placed {
    fn inner_end(&self) -> u64 {
        self.inner_offset + self.size // no overflow: `add` checked it
    }
}

impl<'a, 'l> Payload<'a, 'l> {
    pub(super) fn new(format: Format, toc_offset: u64, digests: Digests, limits: &'l Limits) -> Self {
        Payload { format, toc_offset, digests, limits, files: Vec::new(), chunks: Vec::new() }
    }

    /// Starts the file of a `reg` entry, with its first chunk. Returns the file's number, size and digest.
    pub(super) fn file(&mut self, entry: &Entry<'a>) -> Result<(u32, u64, Option<Digest>), Error> {
        self.close()?;
        let size = unsigned(entry, "size", entry.size)?;
        let digest = digest(entry, "digest", &entry.digest)?;
        let chunks = self.chunks.len()..self.chunks.len();
        let number = self.files.len() as u32; // limits.entries is an u32
        self.files.push(File { name: entry.name.clone(), size, digest, chunks });
        if size > 0 || entry.chunk_size != 0 || entry.chunk_offset != 0 {
            self.add(entry)?;
        }
        Ok((number, size, digest))
    }

    /// Adds a `chunk` entry to the file before it.
    pub(super) fn chunk(&mut self, entry: &Entry<'a>) -> Result<(), Error> {
        match self.files.last() {
            None => Err(Error::entry(&entry.name, "chunk before any regular file")),
            Some(file) if entry.name.is_empty() || same_path(&entry.name, &file.name) => self.add(entry),
            Some(file) => {
                let why = format!("chunk after the entries of another file, {:?}", shorten(&file.name));
                Err(Error::entry(&entry.name, why))
            }
        }
    }

    fn add(&mut self, entry: &Entry<'a>) -> Result<(), Error> {
        let Some(file) = self.files.last_mut() else {
            return Ok(());
        };
        let bad = |why: String| Err(Error::entry(&file.name, why));
        let covered = self.chunks[file.chunks.clone()].last().map_or(0, |last| last.file_offset + last.size);
        let file_offset = unsigned(entry, "chunkOffset", entry.chunk_offset)?;
        if file_offset != covered {
            let what = if file_offset < covered { "overlap" } else { "leave a gap" };
            return bad(format!(
                "chunks {what}: {covered} bytes covered, the next chunk is at {file_offset}"
            ));
        }
        let rest = file.size.saturating_sub(file_offset);
        let size = match unsigned(entry, "chunkSize", entry.chunk_size)? {
            0 => rest,
            size => size,
        };
        if size == 0 || size > rest {
            return bad(format!("chunk of {size} bytes at {file_offset} in a file of {}", file.size));
        }
        if size > self.limits.chunk_bytes {
            let what = format!("bytes of a chunk of {:?}", shorten(&file.name));
            return Err(Error::limit(what, size, self.limits.chunk_bytes));
        }
        let member_offset = unsigned(entry, "offset", entry.offset)?;
        if member_offset >= self.toc_offset {
            return bad(format!("member at {member_offset} in a blob whose TOC is at {}", self.toc_offset));
        }
        let inner_offset = unsigned(entry, "innerOffset", entry.inner_offset)?;
        // Both are below 2^63: no overflow.
        if inner_offset + size > self.limits.member_bytes {
            let what = format!("bytes of a member to decode for {:?}", shorten(&file.name));
            return Err(Error::limit(what, inner_offset + size, self.limits.member_bytes));
        }
        let chunk = Placed {
            file_offset,
            size,
            member_offset,
            inner_offset,
            digest: digest(entry, "chunkDigest", &entry.chunk_digest)?,
            zeros: self.format == Format::ZstdChunked && entry.chunk_type == "zeros",
            member: 0,
        };
        if let Some(last) = self.chunks[file.chunks.clone()].last()
            && (chunk.member_offset, chunk.inner_offset) < (last.member_offset, last.inner_end())
        {
            return bad(format!(
                "chunk at {file_offset} is stored at {member_offset}+{inner_offset}, not behind the one before it"
            ));
        }
        self.chunks.push(chunk);
        file.chunks.end = self.chunks.len();
        Ok(())
    }

    /// Checks the last file, whose chunks are complete.
    fn close(&mut self) -> Result<(), Error> {
        let Some(file) = self.files.last() else {
            return Ok(());
        };
        let chunks = &mut self.chunks[file.chunks.clone()];
        let covered: u64 = chunks.iter().map(|chunk| chunk.size).sum();
        if covered != file.size {
            let why = format!("its chunks cover {covered} of {} bytes", file.size);
            return Err(Error::entry(&file.name, why));
        }
        if let [only] = chunks {
            match (only.digest, file.digest) {
                (None, whole) => only.digest = whole,
                (Some(chunk), Some(whole)) if chunk != whole => {
                    let why = format!("digest {whole} and chunkDigest {chunk} of the same bytes differ");
                    return Err(Error::entry(&file.name, why));
                }
                _ => {}
            }
        }
        if self.digests == Digests::Required
            && let Some(chunk) = chunks.iter().find(|chunk| chunk.digest.is_none())
        {
            let why = format!("chunk at {} has no digest, so it could not be verified", chunk.file_offset);
            return Err(Error::entry(&file.name, why));
        }
        Ok(())
    }

    /// Ends the last file, and finds the members.
    pub(super) fn finish(&mut self) -> Result<Vec<Member>, Error> {
        self.close()?;
        // Writers store chunks in the order of the TOC, which sorting notices.
        let mut order: Vec<usize> = (0..self.chunks.len()).collect();
        order.sort_by_key(|&at| (self.chunks[at].member_offset, self.chunks[at].inner_offset));

        let mut members: Vec<Member> = Vec::new();
        let mut inner_end = 0;
        for at in order {
            let chunk = &self.chunks[at];
            let offset = chunk.member_offset;
            match members.last_mut() {
                Some(member) if member.offset == offset => {
                    if chunk.inner_offset < inner_end {
                        let file = self.files.partition_point(|file| file.chunks.end <= at);
                        let why = format!(
                            "chunk at {} overlaps another one in the member at {offset}",
                            chunk.file_offset
                        );
                        return Err(Error::entry(&self.files[file].name, why));
                    }
                }
                previous => {
                    if let Some(previous) = previous {
                        previous.end = offset;
                    }
                    members.push(Member { offset, end: self.toc_offset });
                }
            }
            inner_end = chunk.inner_end();
            self.chunks[at].member = members.len() as u32 - 1;
        }
        Ok(members)
    }

    /// Blob offset of the member with the first chunk of a file; `None` for an empty file.
    pub(super) fn member_offset(&self, file: u32) -> Option<u64> {
        let chunks = &self.chunks[self.files[file as usize].chunks.clone()];
        chunks.first().map(|chunk| chunk.member_offset)
    }

    /// The chunks of a file as those of `inode`.
    pub(super) fn chunks(&self, file: u32, inode: u32) -> impl Iterator<Item = Chunk> {
        self.chunks[self.files[file as usize].chunks.clone()].iter().map(move |chunk| {
            let &Placed { file_offset, size, inner_offset, digest, zeros, member, .. } = chunk;
            Chunk { inode, file_offset, size, member, inner_offset, digest, zeros }
        })
    }
}

/// A number that may not be negative.
pub(super) fn unsigned(entry: &Entry<'_>, field: &str, value: i64) -> Result<u64, Error> {
    u64::try_from(value).map_err(|_| Error::entry(&entry.name, format!("{field} is {value}")))
}

fn digest(entry: &Entry<'_>, field: &str, text: &str) -> Result<Option<Digest>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    let bad = |error: Error| Error::entry(&entry.name, format!("{field}: {error}"));
    text.parse().map(Some).map_err(bad)
}
