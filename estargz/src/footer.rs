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
//! A zstd:chunked blob ends in a skippable zstd frame instead, whose contents are numbers (u64, little endian) and a magic
//! word. Three forms are known; each word is told by its own place, so that none is taken for another:
//!
//! ```text
//!       stargz-snapshotter,     containers/storage      containers/storage
//!       containers/storage      1.47 to 1.49            since 1.50
//!       up to 1.46: 40 bytes    56 bytes                64 bytes
//! -8    50 2a 4d 18, length     the same                the same
//! 0     TOC offset              the same                the same
//! 8     TOC bytes, compressed   the same                the same
//! 16    TOC bytes               the same                the same
//! 24    1                       the same                the same
//! 32    "GnUlInUx"              "GnUlInUx", 16 zeros    tar-split offset, both lengths, "GNUlInUx"
//! ```
//!
//! containers/storage itself never reads them: it goes by the manifest's annotations, see [`Position`].

use std::ops::Range;

use crate::inflate::Compression;
use crate::{Error, Limits};

/// Bytes to read from a blob's end to recognise any supported footer. No blob that holds a TOC is as short.
pub(crate) const MAX_LEN: usize = SKIPPABLE_HEADER + 64;

const ESTARGZ_LEN: usize = 51;
const LEGACY_LEN: usize = 47;

/// Magic number and length of a skippable zstd frame (RFC 8878, 3.1.2).
const SKIPPABLE_HEADER: usize = 8;
const SKIPPABLE_MAGIC: &[u8] = b"\x50\x2a\x4d\x18";

/// The only kind of TOC there is.
const KIND: u64 = 1;

/// How a layer's blob is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// eStargz: gzip members, 51-byte footer.
    EStargz,
    /// Legacy stargz (CRFS): gzip members, 47-byte footer. Its TOCs often lack chunk digests, so that few of
    /// them can be verified.
    Stargz,
    /// zstd:chunked of either dialect: zstd frames, the TOC in a skippable frame.
    ZstdChunked,
}

impl Format {
    /// What its members are compressed with.
    pub fn compression(self) -> Compression {
        match self {
            Format::EStargz | Format::Stargz => Compression::Gzip,
            Format::ZstdChunked => Compression::Zstd,
        }
    }
}

/// What a footer says, checked against the blob's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) format: Format,
    /// Blob range of the TOC as it is stored, not empty.
    pub(crate) toc: Range<u64>,
    /// Where the payload members end.
    pub(crate) payload_end: u64,
    /// Bytes of the TOC's JSON, where they are told beside it.
    pub(crate) json: Option<u64>,
}

impl Footer {
    /// # Errors
    ///
    /// [`Error::Limit`] if the TOC is too large, as stored or by what is said of its JSON.
    pub(crate) fn check(self, limits: &Limits) -> Result<Self, Error> {
        let stored = self.toc.end - self.toc.start;
        for (what, value, limit) in [
            ("bytes of the TOC as stored in the blob", stored, limits.toc_compressed_bytes),
            ("bytes of TOC JSON", self.json.unwrap_or(0), limits.toc_json_bytes),
        ] {
            if value > limit {
                return Err(Error::limit(what, value, limit));
            }
        }
        Ok(self)
    }
}

/// Where the TOC of a zstd:chunked blob is, or its tar-split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Blob offset of the compressed JSON, behind the header of its skippable frame.
    pub offset: u64,
    /// Bytes of it, compressed.
    pub stored: u64,
    /// Bytes of it, decompressed.
    pub json: u64,
}

impl Position {
    /// Reads the annotation `...zstd-chunked.manifest-position`: `offset:stored:json:1`.
    pub fn parse(text: &str) -> Option<Position> {
        let (position, kind) = text.rsplit_once(':')?;
        if number(kind)? == KIND { Position::parse_tar_split(position) } else { None }
    }

    /// Reads the annotation `...zstd-chunked.tarsplit-position`: `offset:stored:json`.
    pub fn parse_tar_split(text: &str) -> Option<Position> {
        let mut numbers = text.split(':').map(number);
        let mut next = || numbers.next().flatten();
        let position = Position { offset: next()?, stored: next()?, json: next()? };
        numbers.next().is_none().then_some(position)
    }

    /// The same as a footer of a blob whose TOC must end before `end`.
    pub(crate) fn footer(self, end: u64) -> Result<Footer, Error> {
        let Position { offset, stored, json } = self;
        let bad = |why: String| Error::BadToc { offset, why: why.into() };
        let payload_end = offset.checked_sub(SKIPPABLE_HEADER as u64);
        let payload_end = payload_end.ok_or_else(|| bad("there is no room for its frame".to_owned()))?;
        match offset.checked_add(stored) {
            Some(toc_end) if stored > 0 && toc_end <= end => Ok(Footer {
                format: Format::ZstdChunked,
                toc: offset..toc_end,
                payload_end,
                json: Some(json),
            }),
            _ => Err(bad(format!("{stored} bytes there do not lie before {end}"))),
        }
    }
}

/// Digits, and nothing else.
fn number(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// Parses the last [`MAX_LEN`] bytes of a blob of `blob_size` bytes.
///
/// # Errors
///
/// [`Error::NotEstargz`] if there is no footer, [`Error::BadToc`] if it points outside the blob's payload.
pub(crate) fn parse(tail: &[u8; MAX_LEN], blob_size: u64) -> Result<Footer, Error> {
    if let Some((position, len)) = zstd_chunked(tail) {
        return position.footer(blob_size.saturating_sub(len as u64));
    }
    let (format, len, offset) =
        if let Some(offset) = toc_offset(&tail[MAX_LEN - ESTARGZ_LEN..], b"\x1a\0SG\x16\0") {
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
    Ok(Footer { format, toc: offset..start, payload_end: offset, json: None })
}

/// What a zstd:chunked footer says, and the bytes of its frame.
fn zstd_chunked(tail: &[u8; MAX_LEN]) -> Option<(Position, usize)> {
    let len = if tail.ends_with(b"GNUlInUx") {
        64
    } else if tail.ends_with(b"GnUlInUx") {
        40
    } else if tail.ends_with(b"GnUlInUx\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0") {
        56
    } else {
        return None;
    };
    let frame = &tail[MAX_LEN - SKIPPABLE_HEADER - len..];
    let footer =
        frame.strip_prefix(SKIPPABLE_MAGIC)?.strip_prefix(&u32::try_from(len).ok()?.to_le_bytes())?;
    let (numbers, _) = footer.as_chunks::<8>();
    let [offset, stored, json, KIND] = numbers.first_chunk::<4>()?.map(u64::from_le_bytes) else {
        return None;
    };
    Some((Position { offset, stored, json }, frame.len()))
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

    fn gzip(format: Format, toc: Range<u64>) -> Footer {
        Footer { format, payload_end: toc.start, toc, json: None }
    }

    #[test]
    fn both_gzip_formats() {
        let estargz = parse(&tail(&fixture::footer(0x1234_abcd)), SIZE).unwrap();
        assert_eq!(estargz, gzip(Format::EStargz, 0x1234_abcd..SIZE - 51));
        let legacy = parse(&tail(&fixture::legacy_footer(0)), SIZE).unwrap();
        assert_eq!(legacy, gzip(Format::Stargz, 0..SIZE - 47));
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

    const POSITION: Position = Position { offset: 1000, stored: 200, json: 3000 };

    #[test]
    fn every_form_of_zstd_chunked() {
        for len in [40, 56, 64] {
            let footer = fixture::zstd_footer(POSITION, len);
            let expected =
                Footer { format: Format::ZstdChunked, toc: 1000..1200, payload_end: 992, json: Some(3000) };
            assert_eq!(parse(&tail(&footer), SIZE).unwrap(), expected);
            // The TOC may end where the footer's frame begins, and no later.
            let size = 1200 + footer.len() as u64;
            assert_eq!(parse(&tail(&footer), size).unwrap(), expected);
            assert!(matches!(parse(&tail(&footer), size - 1), Err(Error::BadToc { offset: 1000, .. })));
            // Every byte but those of numbers that may be anything.
            for at in (0..8).chain(32..40).chain(if len == 64 { 64..72 } else { 40..8 + len }) {
                let mut broken = footer.clone();
                broken[at] ^= 0x20;
                assert!(matches!(parse(&tail(&broken), SIZE), Err(Error::NotEstargz { .. })), "{len}: {at}");
            }
        }
        // The end of a longer footer with the shorter one's word is none.
        let mut mixed = fixture::zstd_footer(POSITION, 64);
        mixed[64..].copy_from_slice(b"GnUlInUx");
        assert!(matches!(parse(&tail(&mixed), SIZE), Err(Error::NotEstargz { .. })));
        for position in [
            Position { offset: 7, ..POSITION },
            Position { stored: 0, ..POSITION },
            Position { offset: u64::MAX, ..POSITION },
            Position { stored: u64::MAX, ..POSITION },
        ] {
            let error = parse(&tail(&fixture::zstd_footer(position, 64)), SIZE).unwrap_err();
            assert!(matches!(error, Error::BadToc { .. }), "{error}");
        }
    }

    #[test]
    fn positions_are_four_numbers() {
        assert_eq!(Position::parse("1000:200:3000:1"), Some(POSITION));
        for text in [
            "",
            "1:2:3",
            "1:2:3:2",
            "1:2:3:1:1",
            "1:2:+3:1",
            "1:2::1",
            "1:2:3:1 ",
            "99999999999999999999:2:3:1",
        ] {
            assert_eq!(Position::parse(text), None, "{text}");
        }
    }
}
