//! The far end: members in order into the output, and the table of contents behind them.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::sync::mpsc::Receiver;

use sha2::{Digest as _, Sha256};

use super::cut::{Part, Row};
use super::pack::{Bytes, Packer, footer, skippable_header, zstd_footer};
use super::pipeline::Packed;
use super::split::Split;
use super::toc::{self, Toc};
use super::{Dialect, Error, Observer, Target, ZstdChunked};
use crate::{Digest, Position};

/// Bytes written to the caller's output at a time, at least.
const BUFFER: usize = 64 << 10;

/// Writes the blob.
pub(super) struct Emitter<'a, W: Write> {
    target: Target,
    output: BufWriter<W>,
    observer: &'a dyn Observer,
    hash: Sha256,
    /// Bytes written so far.
    size: u64,
    /// Bytes of the members, decompressed.
    uncompressed: u64,
    toc: Toc,
    /// Entries of the file whose digest is not known yet, because more chunks follow.
    open: Vec<toc::Entry>,
}

/// What was written.
#[derive(Debug)]
pub(super) struct Blob {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) diff_id: Digest,
    pub(super) uncompressed_size: u64,
    pub(super) toc_digest: Digest,
    pub(super) toc_json_size: u64,
    pub(super) zstd: Option<ZstdChunked>,
}

impl<'a, W: Write> Emitter<'a, W> {
    pub(super) fn new(target: Target, output: W, observer: &'a dyn Observer) -> Self {
        let output = BufWriter::with_capacity(BUFFER, output);
        let (hash, toc, open) = (Sha256::new(), Toc::new(), Vec::new());
        Emitter { target, output, observer, hash, size: 0, uncompressed: 0, toc, open }
    }

    /// Writes members as they come, in their order; `digests` are those of files of several chunks.
    pub(super) fn run(
        mut self,
        packed: &Receiver<Packed>,
        digests: &Receiver<Digest>,
    ) -> Result<Self, Error> {
        // Those that were ready before their turn.
        let mut early = BTreeMap::new();
        let mut next = 0;
        for member in packed {
            early.insert(member.number, member);
            while let Some(member) = early.remove(&next) {
                self.member(member, digests)?;
                next += 1;
            }
        }
        Ok(self)
    }

    fn member(&mut self, member: Packed, files: &Receiver<Digest>) -> Result<(), Error> {
        let offset = self.size;
        let Bytes { bytes, chunk_end } = &member.packed;
        self.write(bytes)?;
        self.uncompressed += member.content.len();
        let mut chunks = member.content.chunks.iter().zip(member.digests);
        for Row { mut entry, has_chunk } in member.rows {
            let Some((chunk, digest)) = has_chunk.then(|| chunks.next()).flatten() else {
                self.toc.push(&entry)?;
                continue;
            };
            entry.offset = offset;
            entry.inner_offset = chunk.range.start as u64;
            let end = offset + *chunk_end as u64;
            match self.target {
                Target::ZstdChunked(Dialect::Podman) => {
                    // Only of several, but then of all.
                    entry.chunk_size = 0;
                    if chunk.part != Part::Whole {
                        entry.chunk_digest = Some(digest);
                        entry.chunk_size = chunk.range.len() as u64;
                        entry.chunk_type = if member.content.is_zero(chunk) { "zeros" } else { "" };
                    }
                    let first = self.open.first_mut().unwrap_or(&mut entry);
                    first.end_offset = end;
                }
                _ => entry.chunk_digest = Some(digest),
            }
            match chunk.part {
                Part::Whole => {
                    entry.digest = Some(digest);
                    self.toc.push(&entry)?;
                }
                Part::Piece => self.open.push(entry),
                Part::Last => {
                    self.open.push(entry);
                    // The hasher has met this chunk, or will; it ends without its digest only if it panics.
                    self.open[0].digest = files.recv().ok();
                    for entry in std::mem::take(&mut self.open) {
                        self.toc.push(&entry)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends the blob. `contents` is the hash of the members' decompressed bytes.
    pub(super) fn finish(
        mut self,
        mut contents: Sha256,
        packer: &mut Packer,
        split: Option<Split>,
    ) -> Result<Blob, Error> {
        let toc = std::mem::replace(&mut self.toc, Toc::new());
        let (toc_digest, toc_json_size, zstd) = match self.target {
            Target::EStargz => {
                let toc_offset = self.size;
                let (tar, digest, size) = toc.into_tar();
                contents.update(&tar);
                self.uncompressed += tar.len() as u64;
                self.write(&packer.pack(&tar))?;
                self.write(&footer(toc_offset))?;
                (digest, size, None)
            }
            Target::ZstdChunked(dialect) => {
                let json = toc.into_json(split.as_ref().map(|split| Digest::of(&split.stored)));
                let zstd = self.zstd_toc(&json, packer, split)?;
                let digest = match dialect {
                    Dialect::Podman => zstd.toc_stored_digest,
                    Dialect::Stargz => Digest::of(&json),
                };
                (digest, json.len() as u64, Some(zstd))
            }
        };
        self.output.flush().map_err(Error::Write)?;
        Ok(Blob {
            digest: Digest::from_bytes(self.hash.finalize().into()),
            size: self.size,
            diff_id: Digest::from_bytes(contents.finalize().into()),
            uncompressed_size: self.uncompressed,
            toc_digest,
            toc_json_size,
            zstd,
        })
    }

    /// Writes the frames behind the members, which decoders skip.
    fn zstd_toc(
        &mut self,
        json: &[u8],
        packer: &mut Packer,
        split: Option<Split>,
    ) -> Result<ZstdChunked, Error> {
        let stored = packer.pack(json);
        let toc = self.skippable(&stored, json.len() as u64)?;
        let tar_split = match &split {
            Some(split) => Some((self.skippable(&split.stored, split.size)?, Digest::of(&split.stored))),
            None => None,
        };
        let footer = zstd_footer(toc, tar_split.map(|(position, _)| position));
        self.skippable(&footer, 0)?;
        Ok(ZstdChunked { toc, toc_stored_digest: Digest::of(&stored), tar_split })
    }

    /// Writes a frame that decoders skip. `size` is what its contents are decompressed.
    fn skippable(&mut self, stored: &[u8], size: u64) -> Result<Position, Error> {
        let header = skippable_header(stored.len()).ok_or_else(|| Error::Limit {
            what: "bytes behind the members in one frame".to_owned(),
            value: stored.len() as u64,
            limit: u32::MAX.into(),
        })?;
        self.write(&header)?;
        let position = Position { offset: self.size, stored: stored.len() as u64, json: size };
        self.write(stored)?;
        Ok(position)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.output.write_all(bytes).map_err(Error::Write)?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        self.observer.written(bytes.len() as u64);
        Ok(())
    }
}
