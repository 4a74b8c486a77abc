//! From a blob's size to its TOC JSON, without reading anything: the caller is told which range to bring.
//!
//! The footer is at a known place, the TOC in front of it is not. Reading a generous tail first gets both in
//! one request for nearly every layer; if it was too short, exactly the missing front of the TOC is asked for,
//! and the part that had arrived is kept.

use std::fmt;
use std::ops::Range;

use crate::footer::{self, Footer, Position};
use crate::{Error, Limits, TocJson};

/// What [`Opener::feed`] wants next.
#[derive(Debug)]
pub enum Step {
    /// Feed these bytes of the blob (any range that covers them will do).
    Need(Range<u64>),
    /// The TOC was found and decompressed. It is not verified yet.
    Done(TocJson),
}

/// Finds and decompresses the TOC of a blob (sans-I/O: the caller reads).
///
/// ```no_run
/// # fn read(range: std::ops::Range<u64>) -> Vec<u8> { unimplemented!() }
/// # fn main() -> Result<(), estargz::Error> {
/// # let blob_size = 0;
/// use estargz::{Limits, Opener, Step};
///
/// let mut opener = Opener::new(blob_size, Limits::default())?;
/// let mut range = opener.tail(256 << 10);
/// let toc_json = loop {
///     match opener.feed(range.start, &read(range.clone()))? {
///         Step::Need(next) => range = next,
///         Step::Done(toc_json) => break toc_json,
///     }
/// };
/// # Ok(()) }
/// ```
pub struct Opener {
    blob_size: u64,
    limits: Limits,
    /// Once its bytes have arrived.
    footer: Option<Footer>,
    /// The last bytes of the TOC member, as far as they have arrived.
    held: Vec<u8>,
}

impl Opener {
    /// Starts on a blob of `blob_size` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::NotEstargz`] if the blob is too small to hold a footer.
    pub fn new(blob_size: u64, limits: Limits) -> Result<Self, Error> {
        if blob_size <= footer::MAX_LEN as u64 {
            let why = format!("{blob_size} bytes are too few for a TOC and a footer");
            return Err(Error::NotEstargz { why: why.into() });
        }
        Ok(Opener { blob_size, limits, footer: None, held: Vec::new() })
    }

    /// The same for a zstd:chunked blob of which the manifest says where the TOC is; its footer is then not read.
    ///
    /// # Errors
    ///
    /// [`Error::BadToc`] if that is not in the blob; [`Error::Limit`] if the TOC is too large.
    pub fn at(blob_size: u64, position: Position, limits: Limits) -> Result<Self, Error> {
        let opener = Self::new(blob_size, limits)?;
        let footer = position.footer(blob_size)?.check(&limits)?;
        Ok(Opener { footer: Some(footer), ..opener })
    }

    /// The range to read first: the last `speculative` bytes of the blob, but at least the footer and at most
    /// the blob. Once it includes the TOC, the first [`feed`](Opener::feed) is the last.
    pub fn tail(&self, speculative: u64) -> Range<u64> {
        let len = speculative.clamp(footer::MAX_LEN as u64, self.blob_size);
        self.blob_size - len..self.blob_size
    }

    /// Takes `bytes`, which start at `offset` of the blob.
    ///
    /// Any range is accepted; if it does not cover what was asked for, the same range is asked for again.
    /// At most two calls are needed, the first with [`tail`](Opener::tail).
    ///
    /// # Errors
    ///
    /// [`Error::NotEstargz`] for a blob without footer; [`Error::BadToc`] for a footer that does not point to
    /// a TOC, or a TOC that cannot be decompressed; [`Error::Limit`] if the TOC is too large, compressed
    /// (before it is asked for) or not (before it is decompressed); [`Error::OutsideBlob`].
    pub fn feed(&mut self, offset: u64, bytes: &[u8]) -> Result<Step, Error> {
        let len = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.blob_size) {
            return Err(Error::OutsideBlob { offset, len, blob_size: self.blob_size });
        }
        let piece = Piece { offset, bytes };
        let footer = match &self.footer {
            Some(footer) => footer.clone(),
            None => {
                let place = self.tail(0);
                let Some(Ok(tail)) = piece.cut(&place).map(<&[u8; footer::MAX_LEN]>::try_from) else {
                    return Ok(Step::Need(place));
                };
                let footer = footer::parse(tail, self.blob_size)?.check(&self.limits)?;
                self.footer.insert(footer).clone()
            }
        };

        let toc = footer.toc.clone();
        let done = |member: &[u8]| TocJson::unpack(&footer, member, &self.limits).map(Step::Done);
        if let Some(member) = piece.cut(&toc) {
            return done(member);
        }
        let missing = |held: usize| toc.start..toc.end - held as u64;
        if let Some(head) = piece.cut(&missing(self.held.len())) {
            return done(&[head, &self.held].concat());
        }
        // Only the end of the TOC has arrived. Keep it, if it is more than before.
        let end = piece.cut(&(offset.max(toc.start)..toc.end)).unwrap_or_default();
        if end.len() > self.held.len() {
            self.held = end.to_vec();
        }
        Ok(Step::Need(missing(self.held.len())))
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener")
            .field("blob_size", &self.blob_size)
            .field("footer", &self.footer)
            .field("held", &self.held.len())
            .finish_non_exhaustive()
    }
}

/// Bytes and where in the blob they start.
struct Piece<'a> {
    offset: u64,
    bytes: &'a [u8],
}

impl<'a> Piece<'a> {
    /// The bytes of a blob range, if all of them are here.
    fn cut(&self, range: &Range<u64>) -> Option<&'a [u8]> {
        let start = usize::try_from(range.start.checked_sub(self.offset)?).ok()?;
        let end = usize::try_from(range.end.checked_sub(self.offset)?).ok()?;
        self.bytes.get(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{self, Blob};
    use crate::{Digest, Format};

    fn feed(opener: &mut Opener, blob: &[u8], range: Range<u64>) -> Result<Step, Error> {
        opener.feed(range.start, &blob[range.start as usize..range.end as usize])
    }

    fn blob() -> Blob {
        let json = format!(r#"{{"version":1,"entries":[],"x":{:?}}}"#, fixture::letters(4000));
        Blob::new(&fixture::noise(500), json.as_bytes())
    }

    fn zstd_blob(footer: usize) -> Blob {
        let json = format!(r#"{{"version":1,"entries":[],"x":{:?}}}"#, fixture::letters(4000));
        Blob::zstd(&fixture::noise(500), json.as_bytes(), footer)
    }

    #[test]
    fn every_tail_length_gets_there_in_two_feeds() {
        every_tail_length(&blob(), 0, Format::EStargz);
        for footer in [40, 56, 64] {
            every_tail_length(&zstd_blob(footer), 8, Format::ZstdChunked);
        }
    }

    /// `frame` is what precedes the TOC of a blob and is not read.
    fn every_tail_length(blob: &Blob, frame: u64, format: Format) {
        let &Blob { ref bytes, toc_offset: payload_end, ref json } = blob;
        let (size, toc_offset) = (bytes.len() as u64, payload_end + frame);
        for speculative in 0..=size + 1 {
            let mut opener = Opener::new(size, Limits::default()).unwrap();
            let tail = opener.tail(speculative);
            assert_eq!(tail, size - speculative.clamp(72, size)..size);
            let toc = match feed(&mut opener, bytes, tail.clone()).unwrap() {
                Step::Done(toc) => {
                    assert!(tail.start <= toc_offset, "{tail:?}");
                    toc
                }
                Step::Need(range) => {
                    assert_eq!(range, toc_offset..tail.start);
                    match feed(&mut opener, bytes, range).unwrap() {
                        Step::Done(toc) => toc,
                        Step::Need(range) => panic!("{range:?} after the whole TOC"),
                    }
                }
            };
            assert_eq!(toc.bytes(), json);
            assert_eq!(toc.digest(), Digest::of(json));
            assert_eq!((toc.format(), toc.toc_offset()), (format, payload_end));
        }
    }

    #[test]
    fn every_second_feed_that_covers_what_is_missing_will_do() {
        let Blob { bytes, toc_offset, json } = blob();
        let size = bytes.len() as u64;
        for (from, until) in [(0, 0), (toc_offset, 0), (0, 30), (toc_offset - 7, 72), (toc_offset, 80)] {
            let mut opener = Opener::new(size, Limits::default()).unwrap();
            let tail = opener.tail(80);
            assert!(matches!(feed(&mut opener, &bytes, tail).unwrap(), Step::Need(_)));
            match feed(&mut opener, &bytes, from..size - until).unwrap() {
                Step::Done(toc) => assert_eq!(toc.bytes(), json),
                Step::Need(range) => panic!("{range:?} missing after {from}..-{until}"),
            }
        }
    }

    #[test]
    fn a_range_that_was_not_asked_for_is_asked_for_again() {
        let Blob { bytes, toc_offset, .. } = blob();
        let size = bytes.len() as u64;
        let mut opener = Opener::new(size, Limits::default()).unwrap();
        for range in [0..10, size - 71..size, size - 72..size - 1, 3..3] {
            match feed(&mut opener, &bytes, range).unwrap() {
                Step::Need(range) => assert_eq!(range, size - 72..size),
                Step::Done(_) => panic!("done without a footer"),
            }
        }
        // With the footer known, later pieces that end with the TOC still help.
        for (range, missing) in [
            (size - 72..size, toc_offset..size - 72),
            (toc_offset..size - 73, toc_offset..size - 72),
            (size - 90..size - 51, toc_offset..size - 90),
            (size - 70..size, toc_offset..size - 90),
            (0..size - 91, toc_offset..size - 90),
        ] {
            match feed(&mut opener, &bytes, range).unwrap() {
                Step::Need(range) => assert_eq!(range, missing),
                Step::Done(_) => panic!("done without a TOC"),
            }
        }
        let text = format!("{opener:?}");
        assert!(text.contains("EStargz") && text.contains("held: 39"), "{text}");
        assert!(matches!(feed(&mut opener, &bytes, 0..size - 90).unwrap(), Step::Done(_)));
        assert!(matches!(feed(&mut opener, &bytes, 0..size).unwrap(), Step::Done(_)));
    }

    #[test]
    fn bytes_beyond_the_blob_are_refused() {
        let mut opener = Opener::new(100, Limits::default()).unwrap();
        for (offset, len) in [(50, 51), (100, 1), (101, 0), (u64::MAX, 2)] {
            let error = opener.feed(offset, &vec![0; len]).unwrap_err();
            assert_eq!(error, Error::OutsideBlob { offset, len: len as u64, blob_size: 100 });
        }
    }

    #[test]
    fn blobs_without_a_footer() {
        for size in 0..73 {
            assert!(matches!(Opener::new(size, Limits::default()), Err(Error::NotEstargz { .. })), "{size}");
        }
        let bytes = fixture::gzip(&fixture::noise(1000));
        let mut opener = Opener::new(bytes.len() as u64, Limits::default()).unwrap();
        assert!(matches!(opener.feed(0, &bytes), Err(Error::NotEstargz { .. })));
    }

    #[test]
    fn an_oversize_toc_is_refused_before_it_is_asked_for() {
        let size = 1 << 50;
        let mut opener = Opener::new(size, Limits::default()).unwrap();
        let error = opener.feed(size - 72, &[vec![0; 21], fixture::footer(1)].concat()).unwrap_err();
        let limit = Limits::default().toc_compressed_bytes;
        assert!(matches!(error, Error::Limit { value, limit: l, .. } if value == size - 52 && l == limit));
    }

    #[test]
    fn a_place_that_the_manifest_names_needs_no_footer() {
        let Blob { bytes, toc_offset, json } = zstd_blob(64);
        let size = bytes.len() as u64;
        let stored = size - 72 - toc_offset - 8;
        let position = Position { offset: toc_offset + 8, stored, json: json.len() as u64 };
        let at = |position| Opener::at(size, position, Limits::default());
        let mut opener = at(position).unwrap();
        match opener.feed(position.offset, &bytes[position.offset as usize..][..stored as usize]).unwrap() {
            Step::Done(toc) => assert_eq!(toc.bytes(), json),
            Step::Need(range) => panic!("{range:?} still needed"),
        }
        let mut opener = at(position).unwrap();
        assert!(matches!(feed(&mut opener, &bytes, size - 72..size).unwrap(),
            Step::Need(range) if range == (position.offset..position.offset + stored)));

        let beyond = Position { stored: size - position.offset + 1, ..position };
        assert!(matches!(at(beyond), Err(Error::BadToc { .. })));
        let large = Position { json: u64::MAX, ..position };
        assert!(matches!(at(large), Err(Error::Limit { value: u64::MAX, .. })));
        for json in [0, 1, position.json - 1, position.json + 1] {
            let mut opener = at(Position { json, ..position }).unwrap();
            assert!(matches!(feed(&mut opener, &bytes, 0..size), Err(Error::BadToc { .. })), "{json}");
        }
        for stored in [1, stored - 1, stored + 1] {
            let mut opener = at(Position { stored, ..position }).unwrap();
            assert!(matches!(feed(&mut opener, &bytes, 0..size), Err(Error::BadToc { .. })), "{stored}");
        }
    }
}
