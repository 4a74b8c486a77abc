//! Chunks: decoding them from a member, verifying them.
//!
//! [`VerifiedChunk`] is the only way payload leaves this crate, and [`ChunkSpec::verify`] is its only
//! constructor. What a member's bytes claim decides nothing: the wanted chunks say how much is decoded and
//! allocated, or for a whole member the limits do.
//!
//! A whole gzip member is decoded by libdeflate, 1.4 times as fast as the streaming decoder, which stands in where the bytes
//! turn out to be several gzip members: a run of many headers is cut into members that the table of contents does not
//! name.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use libdeflater::Decompressor;

use crate::headers::{self, TarEntry};
use crate::inflate::{self, Compression, Fault, Inflate};
use crate::{Digest, Error, Limits, writer};

/// Where a chunk lies in its decompressed member, and what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSpec {
    /// Offset in bytes of the decompressed member.
    pub inner_offset: u64,
    /// Size in bytes.
    pub size: u64,
    /// sha256 of these bytes.
    pub digest: Digest,
}

impl ChunkSpec {
    /// Checks `data` to be this chunk.
    ///
    /// # Errors
    ///
    /// [`Error::ChunkDigestMismatch`], or [`Error::BadMember`] if the size differs.
    pub fn verify(self, data: Bytes) -> Result<VerifiedChunk, Error> {
        if data.len() as u64 != self.size {
            let why = format!("{} bytes given for a chunk of {}", data.len(), self.size);
            return Err(Error::BadMember { why: why.into() });
        }
        let actual = Digest::of(&data);
        if actual != self.digest {
            let ChunkSpec { inner_offset, size, digest: expected } = self;
            return Err(Error::ChunkDigestMismatch { inner_offset, size, expected, actual });
        }
        Ok(VerifiedChunk { spec: self, data })
    }

    /// First offset behind the chunk in the decompressed member; `None` if no such number exists.
    fn end(&self) -> Option<u64> {
        self.inner_offset.checked_add(self.size)
    }
}

/// A chunk whose bytes have the size and digest of its [`ChunkSpec`].
#[derive(Clone)]
pub struct VerifiedChunk {
    spec: ChunkSpec,
    data: Bytes,
}

impl VerifiedChunk {
    /// What the bytes were checked against.
    pub fn spec(&self) -> &ChunkSpec {
        &self.spec
    }

    /// The bytes.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The bytes, without a copy.
    pub fn into_data(self) -> Bytes {
        self.data
    }
}

impl fmt::Debug for VerifiedChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifiedChunk").field("spec", &self.spec).finish_non_exhaustive()
    }
}

/// Decodes and verifies the `wanted` chunks of one member.
///
/// `compressed` starts at the member's first byte and may go on behind its end. `wanted` is ascending by
/// `inner_offset`, without overlaps; what lies between the chunks is decoded and thrown away. Decoding stops
/// behind the last wanted byte, so `compressed` need not be the whole member either. Returned are exactly the
/// wanted chunks, in order.
///
/// Allocates the wanted sizes plus the decoder's state, whatever `compressed` holds: under 128 KiB for gzip, for zstd the
/// window that the frame asks for, 128 MiB at most, of which only what is decoded is touched.
///
/// # Errors
///
/// - [`Error::Limit`]: a chunk is larger than `limits.chunk_bytes`, or ends behind `limits.member_bytes`.
/// - [`Error::Truncated`]: `compressed` ends before the last wanted byte.
/// - [`Error::BadMember`]: `compressed` is not a member, it is too short, or `wanted` is not ascending.
/// - [`Error::ChunkDigestMismatch`]: a chunk's bytes are wrong. None of the chunks are returned then.
pub fn decode_member(
    compression: Compression,
    compressed: &[u8],
    wanted: &[ChunkSpec],
    limits: &Limits,
) -> Result<Vec<VerifiedChunk>, Error> {
    let mut end = 0;
    for spec in wanted {
        if spec.inner_offset < end {
            let why = format!("wanted chunks overlap or are not ascending at {}", spec.inner_offset);
            return Err(Error::BadMember { why: why.into() });
        }
        if spec.size > limits.chunk_bytes {
            return Err(Error::limit("bytes of a wanted chunk", spec.size, limits.chunk_bytes));
        }
        end = spec.end().unwrap_or(u64::MAX);
        if end > limits.member_bytes {
            return Err(Error::limit("bytes of a member to decode", end, limits.member_bytes));
        }
    }

    let fault = |fault, end| match fault {
        Fault::Truncated => Error::Truncated { len: compressed.len() as u64, wanted: end },
        Fault::Corrupt(why) => Error::BadMember { why },
    };
    let mut stream = Inflate::new(compression, compressed).map_err(|error| fault(error, end))?;
    let mut position = 0;
    let mut chunks = Vec::with_capacity(wanted.len());
    for spec in wanted {
        let size = usize::try_from(spec.size)
            .map_err(|_| Error::limit("bytes of a wanted chunk", spec.size, usize::MAX as u64))?;
        let mut data = vec![0; size];
        let end = spec.inner_offset + spec.size; // cannot overflow: it is within limits.member_bytes
        let read = stream.skip(spec.inner_offset - position).and_then(|()| stream.read(&mut data));
        read.map_err(|error| fault(error, end))?;
        position = end;
        chunks.push(spec.verify(data.into())?);
    }
    Ok(chunks)
}

/// Everything in a member, decompressed. Nothing of it is verified until [`chunk`](DecodedMember::chunk) takes it out.
#[derive(Clone)]
pub struct DecodedMember {
    bytes: Bytes,
}

thread_local! {
    /// Making one costs as much as decoding a small file.
    static DECOMPRESSOR: RefCell<Decompressor> = RefCell::new(Decompressor::new());
}

impl DecodedMember {
    /// Decodes `compressed`: all of a member, from its first byte to that of the next member of the table of contents.
    ///
    /// Allocates what comes out, at most `limits.member_bytes`, and the decoder's state.
    ///
    /// # Errors
    ///
    /// [`Error::Truncated`], [`Error::BadMember`] or [`Error::Limit`] if it is anything but whole gzip members or zstd
    /// frames.
    pub fn decode(compression: Compression, compressed: &[u8], limits: &Limits) -> Result<Self, Error> {
        if compression == Compression::Gzip
            && let Some(bytes) = Self::decode_one(compressed, limits)
        {
            return Ok(Self { bytes: bytes.into() });
        }
        let bytes =
            inflate::members(compression, compressed, limits.member_bytes).map_err(|fault| match fault {
                inflate::Whole::Fault(Fault::Truncated) => {
                    Error::Truncated { len: compressed.len() as u64, wanted: limits.member_bytes }
                }
                inflate::Whole::Fault(Fault::Corrupt(why)) => Error::BadMember { why },
                inflate::Whole::Limit => {
                    Error::limit("bytes of a member to decode", limits.member_bytes + 1, limits.member_bytes)
                }
            })?;
        Ok(Self { bytes: bytes.into() })
    }

    /// The contents if this is exactly one gzip member, by its trailer: checksum and size.
    fn decode_one(compressed: &[u8], limits: &Limits) -> Option<Vec<u8>> {
        let (checksum, size) = compressed.last_chunk::<8>()?.split_at(4);
        let size = u32::from_le_bytes(size.try_into().ok()?);
        // Deflate makes at most 1032 bytes of one: a trailer that claims more is not believed, nor allocated for.
        let most = limits.member_bytes.min((compressed.len() as u64).saturating_mul(1032));
        if u64::from(size) > most {
            return None;
        }
        let mut bytes = vec![0; size as usize];
        let length = DECOMPRESSOR
            .with_borrow_mut(|decompressor| decompressor.gzip_decompress(compressed, &mut bytes))
            .ok()?;
        // The decoder looks at the first member only. That it is all is seen by the last trailer being its own.
        let whole = length == bytes.len() && libdeflater::crc32(&bytes).to_le_bytes() == *checksum;
        whole.then_some(bytes)
    }

    /// Decompressed bytes.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes out a chunk, without a copy.
    ///
    /// # Errors
    ///
    /// [`Error::BadMember`] if the member ends before it, [`Error::ChunkDigestMismatch`].
    pub fn chunk(&self, spec: ChunkSpec) -> Result<VerifiedChunk, Error> {
        let range = spec.end().and_then(|end| self.part(spec.inner_offset..end));
        match range {
            Some(range) => spec.verify(self.bytes.slice(range)),
            None => Err(Error::BadMember { why: "it ends before the wanted bytes".into() }),
        }
    }

    /// The tar headers in a range of the member, which begins where a header does. They are not verified.
    ///
    /// # Errors
    ///
    /// The member ends before the range does, or there is something else in it.
    pub fn headers(&self, range: Range<u64>) -> Result<Vec<TarEntry>, writer::Error> {
        match self.part(range) {
            Some(range) => headers::read(&self.bytes[range]),
            None => Err(writer::Error::Truncated { offset: self.len(), entry: String::new() }),
        }
    }

    fn part(&self, range: Range<u64>) -> Option<Range<usize>> {
        let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
        (start <= end && end <= self.bytes.len()).then_some(start..end)
    }
}

impl fmt::Debug for DecodedMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecodedMember").field("len", &self.bytes.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{gzip, noise, skippable, zstd};

    #[test]
    fn whole_members_are_decoded_however_many_gzip_members_they_are() {
        let limits = Limits { member_bytes: 400_000, ..Limits::default() };
        let payload = noise(300_000);
        let one = gzip(&payload);
        let several = [gzip(&payload[..1000]), gzip(&payload[1000..2000]), gzip(&payload[2000..])].concat();
        let twins = [gzip(&payload[..1000]), gzip(&payload[..1000])].concat();
        for (compressed, expected) in [(&one, &payload[..]), (&several, &payload), (&gzip(b""), b"")] {
            let member = DecodedMember::decode(Compression::Gzip, compressed, &limits).unwrap();
            assert_eq!((member.len(), member.is_empty()), (expected.len() as u64, expected.is_empty()));
            assert_eq!(&member.bytes[..], expected);
        }
        // The one case that is taken for less than it is: what is missing is seen missing, and nothing is wrong.
        assert!(
            [1000, 2000].contains(&DecodedMember::decode(Compression::Gzip, &twins, &limits).unwrap().len())
        );

        let member = DecodedMember::decode(Compression::Gzip, &several, &limits).unwrap();
        let wanted = spec(&payload, 500..2500);
        assert_eq!(member.chunk(wanted).unwrap().data(), &payload[500..2500]);
        assert!(matches!(
            member.chunk(ChunkSpec { inner_offset: 501, ..wanted }),
            Err(Error::ChunkDigestMismatch { .. })
        ));
        for inner_offset in [299_000, u64::MAX] {
            assert!(matches!(
                member.chunk(ChunkSpec { inner_offset, ..wanted }),
                Err(Error::BadMember { .. })
            ));
        }
        assert!(member.headers(0..512).is_err());
        assert!(member.headers(299_999..300_001).is_err());

        let large = gzip(&vec![0; 400_001]);
        assert!(matches!(
            DecodedMember::decode(Compression::Gzip, &large, &limits),
            Err(Error::Limit { .. })
        ));
        assert!(matches!(
            DecodedMember::decode(Compression::Gzip, &one[..one.len() - 1], &limits),
            Err(Error::Truncated { .. } | Error::BadMember { .. })
        ));
        for broken in [&[one.clone(), b"rest".to_vec()].concat(), &payload, &Vec::new()] {
            assert!(DecodedMember::decode(Compression::Gzip, broken, &limits).is_err());
        }
    }

    fn spec(payload: &[u8], range: std::ops::Range<usize>) -> ChunkSpec {
        ChunkSpec {
            inner_offset: range.start as u64,
            size: range.len() as u64,
            digest: Digest::of(&payload[range]),
        }
    }

    #[test]
    fn wanted_chunks_come_back_in_order() {
        let payload = noise(300_000);
        let mut compressed = gzip(&payload);
        compressed.extend(gzip(b"the next member"));
        let ranges = [0..1, 1..5000, 5000..5000, 70_000..70_001, 100_000..299_999, 299_999..300_000];
        let wanted: Vec<_> = ranges.iter().cloned().map(|range| spec(&payload, range)).collect();

        let chunks = decode_member(Compression::Gzip, &compressed, &wanted, &Limits::default()).unwrap();
        assert_eq!(chunks.len(), wanted.len());
        for ((chunk, range), spec) in chunks.into_iter().zip(ranges).zip(wanted) {
            assert_eq!(*chunk.spec(), spec);
            assert_eq!(&chunk.data()[..], &payload[range]);
            assert_eq!(chunk.clone().into_data(), chunk.data());
        }
        assert!(decode_member(Compression::Gzip, &[], &[], &Limits::default()).unwrap().is_empty());
    }

    #[test]
    fn decoding_stops_at_the_last_wanted_byte() {
        let payload = noise(300_000);
        let mut compressed = gzip(&payload);
        let half = compressed.len() / 2;
        compressed[half..].fill(0xff);
        let wanted = [spec(&payload, 10..100_000)];
        assert_eq!(
            decode_member(Compression::Gzip, &compressed, &wanted, &Limits::default()).unwrap().len(),
            1
        );
        assert!(decode_member(Compression::Gzip, &compressed[..half], &wanted, &Limits::default()).is_ok());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let payload = noise(3000);
        let compressed = gzip(&payload);
        let wanted = [spec(&payload, 2000..3000)];
        let trailer = compressed.len() - 8;
        for len in 0..trailer - 1 {
            let error = decode_member(Compression::Gzip, &compressed[..len], &wanted, &Limits::default())
                .unwrap_err();
            assert_eq!(error, Error::Truncated { len: len as u64, wanted: 3000 }, "{len}");
        }
        assert!(
            decode_member(Compression::Gzip, &compressed[..trailer], &wanted, &Limits::default()).is_ok()
        );
    }

    #[test]
    fn every_bit_flip_is_an_error_or_harmless() {
        let payload = noise(600);
        let compressed = gzip(&payload);
        let wanted = [spec(&payload, 0..600)];
        for bit in 0..compressed.len() * 8 {
            let mut flipped = compressed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(chunks) = decode_member(Compression::Gzip, &flipped, &wanted, &Limits::default()) {
                assert_eq!(&chunks[0].data()[..], payload, "bit {bit}");
            }
        }
    }

    #[test]
    fn wrong_bytes_are_typed() {
        let limits = Limits { chunk_bytes: 100, member_bytes: 1000, ..Limits::default() };
        let payload = noise(1500);
        let compressed = gzip(&payload);
        let decode = |wanted: &[ChunkSpec]| {
            decode_member(Compression::Gzip, &compressed, wanted, &limits).unwrap_err()
        };

        let mut wrong = spec(&payload, 10..20);
        wrong.inner_offset = 11;
        let actual = Digest::of(&payload[11..21]);
        assert_eq!(
            decode(&[wrong]),
            Error::ChunkDigestMismatch { inner_offset: 11, size: 10, expected: wrong.digest, actual }
        );

        let limit = |error| match error {
            Error::Limit { value, limit, .. } => (value, limit),
            other => panic!("{other}"),
        };
        assert_eq!(limit(decode(&[spec(&payload, 0..101)])), (101, 100));
        assert_eq!(limit(decode(&[spec(&payload, 990..1001)])), (1001, 1000));
        assert_eq!(limit(decode(&[ChunkSpec { inner_offset: u64::MAX, ..wrong }])), (u64::MAX, 1000));
        assert_eq!(limit(decode(&[ChunkSpec { size: u64::MAX, ..wrong }])), (u64::MAX, 100));

        let overlapping = [spec(&payload, 0..10), spec(&payload, 9..20)];
        assert!(matches!(decode(&overlapping), Error::BadMember { .. }));
        let descending = [spec(&payload, 50..60), spec(&payload, 0..10)];
        assert!(matches!(decode(&descending), Error::BadMember { .. }));

        let short =
            decode_member(Compression::Gzip, &gzip(b"short"), &[spec(&payload, 0..10)], &limits).unwrap_err();
        assert!(matches!(short, Error::BadMember { .. }), "{short}");
        let plain =
            decode_member(Compression::Gzip, &payload, &[spec(&payload, 0..10)], &limits).unwrap_err();
        assert!(matches!(plain, Error::BadMember { .. }), "{plain}");
    }

    #[test]
    fn verify_checks_size_and_digest() {
        let spec = ChunkSpec { inner_offset: 0, size: 3, digest: Digest::of(b"abc") };
        assert_eq!(spec.verify(Bytes::from_static(b"abc")).unwrap().data(), "abc");
        assert!(matches!(spec.verify(Bytes::from_static(b"abd")), Err(Error::ChunkDigestMismatch { .. })));
        let lying = ChunkSpec { size: 2, ..spec };
        assert!(matches!(lying.verify(Bytes::from_static(b"abc")), Err(Error::BadMember { .. })));
    }

    #[test]
    fn frames_of_zstd_are_decoded_like_members_of_gzip() {
        let limits = Limits { member_bytes: 400_000, ..Limits::default() };
        let payload = noise(300_000);
        let sized = zstd::bulk::compress(&payload, 1).unwrap();
        let several =
            [zstd(&payload[..1000]), skippable(b"x"), zstd(&payload[1000..2000]), zstd(&payload[2000..])];
        for compressed in [zstd(&payload), sized.clone(), several.concat()] {
            let member = DecodedMember::decode(Compression::Zstd, &compressed, &limits).unwrap();
            assert_eq!(&member.bytes[..], payload);
            let wanted = [spec(&payload, 0..500), spec(&payload, 600..1000)];
            let chunks = decode_member(Compression::Zstd, &compressed, &wanted, &limits).unwrap();
            assert_eq!(chunks[1].data(), &payload[600..1000]);
            for cut in [0, 1, 5, 100, compressed.len() - 1] {
                assert!(
                    DecodedMember::decode(Compression::Zstd, &compressed[..cut], &limits).is_err(),
                    "{cut}"
                );
            }
            let short = decode_member(Compression::Zstd, &compressed[..100], &wanted, &limits).unwrap_err();
            assert_eq!(short, Error::Truncated { len: 100, wanted: 500 });
            let gzip = decode_member(Compression::Gzip, &compressed, &wanted, &limits).unwrap_err();
            assert!(matches!(gzip, Error::BadMember { .. }), "{gzip}");
        }
        for over in [zstd(&vec![0; 400_001]), zstd::bulk::compress(&vec![0; 1 << 30], 1).unwrap()] {
            let error = DecodedMember::decode(Compression::Zstd, &over, &limits).unwrap_err();
            assert!(matches!(error, Error::Limit { limit: 400_000, .. }), "{error}");
        }
        // Just as much as is allowed, in a frame that does not say how much that is.
        assert_eq!(
            DecodedMember::decode(Compression::Zstd, &zstd(&vec![0; 400_000]), &limits).unwrap().len(),
            400_000
        );
        for broken in [&[sized, b"rest".to_vec()].concat(), &payload, &gzip(&payload)] {
            assert!(DecodedMember::decode(Compression::Zstd, broken, &limits).is_err());
        }
    }
}
