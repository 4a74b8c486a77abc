//! Reading all of a layer and checking every digest, in one pass and bounded memory. Blocking.
//!
//! The bytes go three ways at once: into the hash of the blob; through a decompressor into the hash of the contents
//! (DiffID); and member by member to where the table of contents says that chunks are.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use estargz::{Chunk, ChunkSpec, Digest, Kind, Limits, Toc, decode_member};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::examine::names;
use crate::convert::pipe::Inlet;

/// Bytes read at once.
const PIECE: usize = 256 << 10;

/// Problems told of one layer: a layer that is wrong throughout need not be told so a million times.
const MAX_PROBLEMS: usize = 20;

/// What a layer is expected to be.
#[derive(Debug)]
pub struct Expected {
    /// Digest of the blob.
    pub blob: Option<Digest>,
    /// Bytes of the blob.
    pub size: u64,
    /// Digest of its contents.
    pub diff_id: Option<Digest>,
    /// What is where in it.
    pub toc: Option<Toc>,
    /// What it holds.
    pub contents: Contents,
}

/// What a blob holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// A tar, perhaps compressed.
    Tar,
    /// Something else, whose bytes are all that can be checked.
    Opaque,
}

impl Expected {
    /// A blob of which only the size is known.
    pub fn of(size: u64) -> Self {
        Self { blob: None, size, diff_id: None, toc: None, contents: Contents::Opaque }
    }
}

/// What was found.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// What was checked and is right.
    pub verified: Vec<String>,
    /// What is wrong.
    pub problems: Vec<String>,
    /// Digest of the contents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// Bytes of the contents.
    pub uncompressed_size: u64,
}

/// Reads a layer to its end.
///
/// # Errors
///
/// It cannot be read. What is wrong with it is not an error but a finding.
pub fn verify(mut blob: Inlet, expected: &Expected) -> anyhow::Result<Findings> {
    let mut findings = Findings::default();
    let mut whole = Sha256::new();
    let mut contents = Decompressor::new();
    let mut members = expected.toc.as_ref().map(Members::new);
    let (mut piece, mut at) = (vec![0; PIECE], 0);
    loop {
        let length = blob.read(&mut piece)?;
        if length == 0 {
            break;
        }
        let bytes = &piece[..length];
        whole.update(bytes);
        if expected.contents == Contents::Tar {
            contents.push(bytes);
        }
        if let Some(members) = &mut members {
            members.push(at, bytes);
        }
        at += length as u64;
    }

    let actual = Digest::from_bytes(whole.finalize().into());
    match expected.blob {
        Some(digest) if digest != actual || at != expected.size => {
            findings.problems.push(format!("the blob has {at} bytes with digest {actual}"));
        }
        Some(_) => findings.verified.push("blob".to_owned()),
        None => {}
    }
    match contents.finish() {
        _ if expected.contents == Contents::Opaque => {}
        Ok((digest, size)) => {
            findings.diff_id = Some(digest.to_string());
            findings.uncompressed_size = size;
            match expected.diff_id {
                Some(diff_id) if diff_id != digest => {
                    findings
                        .problems
                        .push(format!("the contents have digest {digest}, the config says {diff_id}"));
                }
                Some(_) => findings.verified.push("contents".to_owned()),
                None => {}
            }
        }
        Err(error) => findings.problems.push(format!("the contents cannot be decompressed: {error}")),
    }
    if let Some(members) = members {
        members.finish(&mut findings);
    }
    Ok(findings)
}

/// Hashes what is written into it.
#[derive(Default)]
struct Hashed {
    hash: Sha256,
    length: u64,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Decompresses whatever a layer is compressed with, told by its first bytes.
struct Decompressor {
    format: Format,
    /// The first thing that went wrong; nothing is decompressed after it.
    failed: Option<io::Error>,
}

enum Format {
    /// Not enough bytes yet to tell.
    Unknown(Vec<u8>),
    Gzip(Box<flate2::write::MultiGzDecoder<Hashed>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Hashed>>),
    Plain(Hashed),
}

impl Decompressor {
    fn new() -> Self {
        Self { format: Format::Unknown(Vec::new()), failed: None }
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_none()
            && let Err(error) = self.try_push(bytes)
        {
            self.failed = Some(error);
        }
    }

    fn try_push(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.format {
            Format::Unknown(start) => {
                start.extend_from_slice(bytes);
                if start.len() < 4 {
                    return Ok(());
                }
                let start = std::mem::take(start);
                self.format = Format::of(&start)?;
                self.try_push(&start)
            }
            Format::Gzip(decoder) => decoder.write_all(bytes),
            Format::Zstd(decoder) => decoder.write_all(bytes),
            Format::Plain(hashed) => hashed.write_all(bytes),
        }
    }

    /// Digest and size of what came out.
    fn finish(mut self) -> io::Result<(Digest, u64)> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let hashed = match &mut self.format {
            Format::Unknown(start) => {
                let mut hashed = Hashed::default();
                hashed.write_all(start)?;
                hashed
            }
            Format::Gzip(decoder) => {
                decoder.try_finish()?;
                std::mem::take(decoder.get_mut())
            }
            Format::Zstd(decoder) => {
                decoder.flush()?;
                std::mem::take(decoder.get_mut())
            }
            Format::Plain(hashed) => std::mem::take(hashed),
        };
        Ok((Digest::from_bytes(hashed.hash.finalize().into()), hashed.length))
    }
}

impl Format {
    fn of(start: &[u8]) -> io::Result<Self> {
        Ok(match start {
            [0x1f, 0x8b, ..] => Self::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Hashed::default()))),
            // A frame, or one that is skipped.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Self::Zstd(Box::new(zstd::stream::write::Decoder::new(Hashed::default())?))
            }
            _ => Self::Plain(Hashed::default()),
        })
    }
}

/// Checks the chunks of one member after the other.
struct Members<'a> {
    toc: &'a Toc,
    limits: Limits,
    /// Chunks by their members, each member's in the order of its bytes.
    chunks: Vec<Vec<&'a Chunk>>,
    /// The member being gathered.
    current: usize,
    bytes: Vec<u8>,
    /// Files of several chunks: hash of what has passed, and how much that is.
    files: HashMap<u32, (Sha256, u64)>,
    verified: u64,
    without_digest: u64,
    problems: Problems,
}

/// The first problems, and how many there were after them.
#[derive(Default)]
struct Problems {
    told: Vec<String>,
    more: u64,
}

impl Problems {
    /// To name a file takes time: it is done only for what is told.
    fn push(&mut self, problem: impl FnOnce() -> String) {
        match self.told.len() < MAX_PROBLEMS {
            true => self.told.push(problem()),
            false => self.more += 1,
        }
    }
}

impl<'a> Members<'a> {
    fn new(toc: &'a Toc) -> Self {
        let mut chunks = vec![Vec::new(); toc.members().len()];
        for chunk in toc.chunks() {
            chunks[chunk.member as usize].push(chunk);
        }
        chunks.iter_mut().for_each(|chunks| chunks.sort_by_key(|chunk| chunk.inner_offset));
        Self {
            toc,
            limits: Limits::default(),
            chunks,
            current: 0,
            bytes: Vec::new(),
            files: HashMap::new(),
            verified: 0,
            without_digest: 0,
            problems: Problems::default(),
        }
    }

    /// Takes bytes that lie at `at` of the blob.
    fn push(&mut self, at: u64, bytes: &[u8]) {
        let end = at + bytes.len() as u64;
        while let Some(member) = self.toc.members().get(self.current) {
            let (from, to) = (member.offset.max(at), member.end.min(end));
            if from < to {
                let part = &bytes[(from - at) as usize..(to - at) as usize];
                // More is never needed to decode a member within the limits.
                let room = (self.limits.member_bytes + (1 << 20)).saturating_sub(self.bytes.len() as u64);
                let room = usize::try_from(room).unwrap_or(usize::MAX);
                self.bytes.extend_from_slice(&part[..part.len().min(room)]);
            }
            if member.end > end {
                return;
            }
            self.check();
            self.current += 1;
            self.bytes.clear();
        }
    }

    /// Checks the chunks of the gathered member.
    fn check(&mut self) {
        let chunks = std::mem::take(&mut self.chunks[self.current]);
        let (specs, with): (Vec<ChunkSpec>, Vec<&Chunk>) =
            chunks.iter().filter_map(|chunk| Some((chunk.spec()?, *chunk))).unzip();
        self.without_digest += (chunks.len() - specs.len()) as u64;
        match decode_member(self.toc.format().compression(), &self.bytes, &specs, &self.limits) {
            Ok(decoded) => {
                self.verified += decoded.len() as u64;
                for (chunk, verified) in with.iter().zip(decoded) {
                    let (hash, length) = self.files.entry(chunk.inode).or_insert_with(|| (Sha256::new(), 0));
                    // A file whose chunks are not in order cannot be hashed in one pass.
                    if *length == chunk.file_offset {
                        hash.update(verified.data());
                        *length += chunk.size;
                    }
                    self.file_ended(chunk.inode);
                }
            }
            Err(error) => {
                let offset = self.toc.members()[self.current].offset;
                self.problems.push(|| format!("the member at {offset}: {error}"));
            }
        }
    }

    /// Compares a file's digest once all of it has passed.
    fn file_ended(&mut self, inode: u32) {
        let file = &self.toc.inodes()[inode as usize];
        if self.files.get(&inode).is_some_and(|(_, length)| *length == file.size)
            && let (Some((hash, _)), Some(expected)) = (self.files.remove(&inode), file.digest)
        {
            let actual = Digest::from_bytes(hash.finalize().into());
            if actual != expected {
                let toc = self.toc;
                self.problems.push(|| {
                    format!("{}: the file has digest {actual}, the TOC says {expected}", path(toc, inode))
                });
            }
        }
    }

    fn finish(mut self, findings: &mut Findings) {
        for member in &self.toc.members()[self.current..] {
            self.problems.push(|| format!("the member at {} is not in the blob", member.offset));
        }
        for inode in self.files.keys() {
            self.problems.push(|| format!("{}: not all of the file is there", path(self.toc, *inode)));
        }
        let empty = Digest::of(b"");
        for (number, inode) in self.toc.inodes().iter().enumerate() {
            if inode.kind == Kind::Regular
                && inode.size == 0
                && inode.digest.is_some_and(|digest| digest != empty)
            {
                let inode = u32::try_from(number).unwrap_or(u32::MAX);
                self.problems
                    .push(|| format!("{}: an empty file with another digest", path(self.toc, inode)));
            }
        }
        if self.without_digest > 0 {
            self.problems.push(|| format!("{} chunks have no digest in the TOC", self.without_digest));
        }
        if self.problems.told.is_empty() {
            findings.verified.push(format!("{} chunks", self.verified));
        }
        findings.problems.append(&mut self.problems.told);
        if self.problems.more > 0 {
            findings.problems.push(format!("and {} more", self.problems.more));
        }
    }
}

/// A name of an inode, for messages.
fn path(toc: &Toc, inode: u32) -> String {
    let all = names(toc);
    all.into_iter()
        .find(|(_, number)| *number == inode)
        .map_or_else(|| format!("inode {inode}"), |(path, _)| path)
}

#[cfg(test)]
mod tests;
