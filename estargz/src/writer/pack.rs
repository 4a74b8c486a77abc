//! What becomes of a member on its own: gzip, and the footer, which is a member too.

use libdeflater::{CompressionLvl, Compressor};

use super::Level;

/// Compresses members. The bytes depend on nothing but the member and the level.
pub(super) struct Packer(Compressor);

impl Packer {
    pub(super) fn new(level: Level) -> Self {
        let level = CompressionLvl::new(level.get().into()).unwrap_or_default();
        Packer(Compressor::new(level))
    }

    /// One gzip member of `bytes`, without time, name and system.
    pub(super) fn gzip(&mut self, bytes: &[u8]) -> Vec<u8> {
        // Untouched pages of a large buffer cost nothing.
        let mut out = vec![0; self.0.gzip_compress_bound(bytes.len())];
        let len = self.0.gzip_compress(bytes, &mut out).expect("the bound is large enough");
        out.truncate(len);
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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::bufread::MultiGzDecoder;

    use super::*;
    use crate::fixture;

    #[test]
    fn members_are_gzip() {
        for level in 1..=12 {
            let mut packer = Packer::new(Level::new(level).unwrap());
            for size in [0, 1, 511, 70_000] {
                let data = [fixture::noise(size), vec![7; size]].concat();
                let member = packer.gzip(&data);
                assert_eq!(packer.gzip(&data), member, "no memory of the member before");
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
}
