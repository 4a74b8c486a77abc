//! The footer: the last bytes of a blob, which say where its TOC starts.
//!
//! Two writers' footers are known, both an empty gzip member whose extra field holds the TOC's offset:
//!
//! ```text
//!            eStargz, 51 bytes                 legacy stargz, 47 bytes
//! 0   10     gzip header, FLG = FEXTRA         the same
//! 10   2     XLEN = 26                         XLEN = 22
//! 12   4     'S' 'G', subfield length 22       -
//!     16     TOC offset, hex digits            the same
//!      6     "STARGZ"                          the same
//!      5     empty final deflate block         the same
//!      8     CRC-32 and size, all zero         the same
//! ```
//!
//! Checked are the bytes that carry meaning: gzip's magic, method and flags, the lengths, the subfield's id, the
//! digits and the magic word. Time, compression hint and operating system depend on the writer's gzip library,
//! and the empty body says nothing, so they are not looked at. The offset is not trusted: it must point between
//! the blob's start and its footer.
//!
//! A format with another kind of footer (zstd:chunked) is one more function here and one more [`Format`].

use std::ops::Range;

use crate::Error;

/// Bytes to read from a blob's end to recognise any supported footer.
pub(crate) const MAX_LEN: usize = ESTARGZ_LEN;

const ESTARGZ_LEN: usize = 51;
const LEGACY_LEN: usize = 47;

/// How a layer's blob is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// eStargz: gzip members, 51-byte footer.
    EStargz,
    /// Legacy stargz (CRFS): gzip members, 47-byte footer. Its TOCs often lack chunk digests, so that few of
    /// them can be verified.
    Stargz,
}

/// What a footer says, checked against the blob's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) format: Format,
    /// Blob range of the TOC member, not empty. Its start is the end of the payload members.
    pub(crate) toc: Range<u64>,
}

/// Parses the last [`MAX_LEN`] bytes of a blob of `blob_size` bytes.
///
/// # Errors
///
/// [`Error::NotEstargz`] if there is no footer, [`Error::BadToc`] if it points outside the blob's payload.
pub(crate) fn parse(tail: &[u8; MAX_LEN], blob_size: u64) -> Result<Footer, Error> {
    let (format, len, offset) = if let Some(offset) = toc_offset(tail, b"\x1a\0SG\x16\0") {
        (Format::EStargz, ESTARGZ_LEN, offset)
    } else if let Some(offset) = toc_offset(&tail[MAX_LEN - LEGACY_LEN..], b"\x16\0") {
        (Format::Stargz, LEGACY_LEN, offset)
    } else {
        return Err(Error::NotEstargz { why: "its last bytes are not a footer".into() });
    };
    let start = blob_size.saturating_sub(len as u64);
    if offset >= start {
        let why = format!("the footer itself starts at {start}");
        return Err(Error::BadToc { offset, why: why.into() });
    }
    Ok(Footer { format, toc: offset..start })
}

/// The TOC offset in a gzip header whose extra field is `framing`, 16 hex digits and the magic word; `framing`
/// begins with XLEN.
fn toc_offset(footer: &[u8], framing: &[u8]) -> Option<u64> {
    let digits = footer
        .strip_prefix(b"\x1f\x8b\x08\x04")? // magic, deflate, FEXTRA and no other flag
        .get(6..)? // MTIME, XFL, OS
        .strip_prefix(framing)?;
    let (digits, rest) = digits.split_at_checked(16)?;
    rest.strip_prefix(b"STARGZ")?;
    digits.iter().try_fold(0, |offset, &byte| Some(offset << 4 | u64::from(char::from(byte).to_digit(16)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    const SIZE: u64 = 1 << 40;

    fn tail(footer: &[u8]) -> [u8; MAX_LEN] {
        let mut tail = [0xaa; MAX_LEN];
        tail[MAX_LEN - footer.len()..].copy_from_slice(footer);
        tail
    }

    #[test]
    fn both_formats() {
        let estargz = parse(&tail(&fixture::footer(0x1234_abcd)), SIZE).unwrap();
        assert_eq!(estargz, Footer { format: Format::EStargz, toc: 0x1234_abcd..SIZE - 51 });
        let legacy = parse(&tail(&fixture::legacy_footer(0)), SIZE).unwrap();
        assert_eq!(legacy, Footer { format: Format::Stargz, toc: 0..SIZE - 47 });
    }

    #[test]
    fn upper_case_digits_and_other_gzip_libraries() {
        let mut footer = fixture::footer(0xabc);
        footer.make_ascii_uppercase();
        footer[..10].copy_from_slice(&[0x1f, 0x8b, 8, 4, 1, 2, 3, 4, 2, 3]);
        assert_eq!(parse(&tail(&footer), SIZE).unwrap().toc.start, 0xabc);
    }

    #[test]
    fn every_meaningful_byte_is_checked() {
        for (footer, framing) in [(fixture::footer(7), 6), (fixture::legacy_footer(7), 2)] {
            let meaningful = (0..4).chain(10..10 + framing + 16 + 6);
            for at in meaningful {
                let mut broken = footer.clone();
                broken[at] ^= 0x80;
                assert!(matches!(parse(&tail(&broken), SIZE), Err(Error::NotEstargz { .. })), "byte {at}");
            }
        }
        for digits in ["+000000000000007", "-000000000000007", "0x00000000000007", " 000000000000007"] {
            let mut broken = fixture::footer(7);
            broken[16..32].copy_from_slice(digits.as_bytes());
            assert!(matches!(parse(&tail(&broken), SIZE), Err(Error::NotEstargz { .. })), "{digits}");
        }
        assert!(matches!(parse(&[0; MAX_LEN], SIZE), Err(Error::NotEstargz { .. })));
    }

    #[test]
    fn the_offset_lies_before_the_footer() {
        let last = SIZE - 51;
        assert_eq!(parse(&tail(&fixture::footer(last - 1)), SIZE).unwrap().toc, last - 1..last);
        for offset in [last, last + 1, SIZE, SIZE + 1, i64::MAX as u64, u64::MAX] {
            let error = parse(&tail(&fixture::footer(offset)), SIZE).unwrap_err();
            assert!(matches!(error, Error::BadToc { offset: o, .. } if o == offset), "{error}");
        }
        assert!(parse(&tail(&fixture::footer(0)), 51).is_err());
    }
}
