//! What becomes of a member on its own: gzip or zstd, and what encloses a table of contents.

use libdeflater::{CompressionLvl, Compressor};
use zstd::zstd_safe::{self, CCtx, CParameter};

use super::{Dialect, Level, Options, Target};
use crate::Position;

/// Compresses members. The bytes depend on nothing but the member and the options.
pub(super) enum Packer {
    Gzip(Compressor),
    Zstd {
        context: CCtx<'static>,
        /// Whether a chunk has a frame of its own.
        apart: bool,
    },
}

/// A compressed member.
#[derive(Debug)]
pub(super) struct Bytes {
    pub(super) bytes: Vec<u8>,
    /// Where in them the chunk's frame ends, if it has one to itself.
    pub(super) chunk_end: usize,
}

impl Packer {
    pub(super) fn new(options: &Options) -> Self {
        let &Options { target, level, .. } = options;
        match target {
            Target::EStargz => Packer::gzip(level),
            Target::ZstdChunked(dialect) => {
                let mut context = CCtx::create();
                // A level that exists is not refused.
                let _ = context.set_parameter(CParameter::CompressionLevel(level.get().into()));
                Packer::Zstd { context, apart: dialect == Dialect::Podman }
            }
        }
    }

    fn gzip(level: Level) -> Self {
        let level = CompressionLvl::new(level.get().into()).unwrap_or_default();
        Packer::Gzip(Compressor::new(level))
    }

    /// A member of `bytes`, of which the first `chunk` are a chunk, or 0.
    pub(super) fn member(&mut self, bytes: &[u8], chunk: usize) -> Bytes {
        if !matches!(self, Packer::Zstd { apart: true, .. }) || chunk == 0 {
            return Bytes { bytes: self.pack(bytes), chunk_end: 0 };
        }
        let (chunk, rest) = bytes.split_at(chunk);
        let mut bytes = self.pack(chunk);
        let chunk_end = bytes.len();
        if !rest.is_empty() {
            bytes.extend_from_slice(&self.pack(rest));
        }
        Bytes { bytes, chunk_end }
    }

    /// One gzip member of `bytes`, without time, name and system, or one zstd frame, which tells their number.
    pub(super) fn pack(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = match self {
            Packer::Gzip(compressor) => {
                // Untouched pages of a large buffer cost nothing.
                let mut out = vec![0; compressor.gzip_compress_bound(bytes.len())];
                let len = compressor.gzip_compress(bytes, &mut out).expect("the bound is large enough");
                out.truncate(len);
                out
            }
            Packer::Zstd { context, .. } => {
                let mut out = Vec::with_capacity(zstd_safe::compress_bound(bytes.len()));
                context.compress2(&mut out, bytes).expect("the bound is large enough");
                out
            }
        };
        out.shrink_to_fit();
        out
    }
}

/// The footer of a blob whose table of contents starts at `toc_offset`; `footer` in the reading part has the drawing.
pub(super) fn footer(toc_offset: u64) -> Vec<u8> {
    let mut footer = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0".to_vec();
    footer.extend_from_slice(format!("{toc_offset:016x}STARGZ").as_bytes());
    footer.extend_from_slice(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
    footer
}

/// The footer of a zstd:chunked blob, without its frame; `footer` in the reading part has the drawing.
pub(super) fn zstd_footer(toc: Position, split: Option<Position>) -> Vec<u8> {
    let numbers = |Position { offset, stored, json }| [offset, stored, json];
    let bytes = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
    let toc = [bytes(&numbers(toc)), bytes(&[1])].concat();
    match split {
        Some(split) => [toc, bytes(&numbers(split)), b"GNUlInUx".to_vec()].concat(),
        None => [toc, b"GnUlInUx".to_vec()].concat(),
    }
}

/// The header of a zstd frame of `len` bytes that decoders skip (RFC 8878, 3.1.2).
///
/// `None` if it would be too large.
pub(super) fn skippable_header(len: usize) -> Option<[u8; 8]> {
    let len = u32::try_from(len).ok()?.to_le_bytes();
    Some([0x50, 0x2a, 0x4d, 0x18, len[0], len[1], len[2], len[3]])
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::bufread::MultiGzDecoder;

    use super::*;
    use crate::fixture;

    #[test]
    fn members_are_gzip() {
        for level in 1..=12 {
            let mut packer = Packer::gzip(Level::new(level).unwrap());
            for size in [0, 1, 511, 70_000] {
                let data = [fixture::noise(size), vec![7; size]].concat();
                let member = packer.pack(&data);
                assert_eq!(packer.pack(&data), member, "no memory of the member before");
                assert_eq!(&member[..4], b"\x1f\x8b\x08\0");
                let mut back = Vec::new();
                MultiGzDecoder::new(&member[..]).read_to_end(&mut back).unwrap();
                assert_eq!(back, data);
            }
        }
    }

    #[test]
    fn the_footer_is_the_one_that_is_read() {
        for offset in [0, 0x1234_abcd, u64::MAX] {
            assert_eq!(footer(offset), fixture::footer(offset));
        }
        assert_eq!(MultiGzDecoder::new(&footer(7)[..]).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn members_are_zstd_frames() {
        for level in 1..=12 {
            for dialect in [Dialect::Podman, Dialect::Stargz] {
                let target = Target::ZstdChunked(dialect);
                let options = Options { target, level: Level::new(level).unwrap(), ..Options::default() };
                let mut packer = Packer::new(&options);
                for size in [1, 511, 70_000] {
                    let data = [fixture::noise(size), vec![7; size]].concat();
                    let Bytes { bytes, chunk_end } = packer.member(&data, size);
                    assert_eq!(packer.member(&data, size).bytes, bytes, "no memory of the member before");
                    assert_eq!(zstd::decode_all(&bytes[..]).unwrap(), data);
                    if dialect == Dialect::Podman {
                        assert_eq!(zstd::decode_all(&bytes[..chunk_end]).unwrap(), data[..size]);
                        assert_eq!(packer.member(&data[..size], size).bytes, bytes[..chunk_end]);
                    }
                }
            }
        }
    }

    #[test]
    fn zstd_footers_are_those_that_are_read() {
        let toc = Position { offset: 1000, stored: 200, json: 3000 };
        assert_eq!(fixture::skippable(&zstd_footer(toc, None)), fixture::zstd_footer(toc, 40));
        let sevens = u64::from_le_bytes([7; 8]);
        let split = Position { offset: sevens, stored: sevens, json: sevens };
        let footer = zstd_footer(toc, Some(split));
        let frame = [&skippable_header(64).unwrap()[..], &footer].concat();
        assert_eq!(frame, fixture::zstd_footer(toc, 64));
    }
}
