//! Chunks: decoding them from a member, verifying them.
//!
//! [`VerifiedChunk`] is the only way payload leaves this crate, and [`ChunkSpec::verify`] is its only
//! constructor. What a member's bytes claim decides nothing: the wanted chunks say how much is decoded and
//! allocated.

use std::fmt;

use bytes::Bytes;

use crate::inflate::{Fault, Inflate};
use crate::{Digest, Error, Limits};

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

/// Decodes and verifies the `wanted` chunks of one gzip member.
///
/// `compressed` starts at the member's first byte and may go on behind its end. `wanted` is ascending by
/// `inner_offset`, without overlaps; what lies between the chunks is decoded and thrown away. Decoding stops
/// behind the last wanted byte, so `compressed` need not be the whole member either. Returned are exactly the
/// wanted chunks, in order.
///
/// Allocates the wanted sizes plus the decoder's state (under 128 KiB), whatever `compressed` holds.
///
/// # Errors
///
/// - [`Error::Limit`]: a chunk is larger than `limits.chunk_bytes`, or ends behind `limits.member_bytes`.
/// - [`Error::Truncated`]: `compressed` ends before the last wanted byte.
/// - [`Error::BadMember`]: `compressed` is not a gzip member, it is too short, or `wanted` is not ascending.
/// - [`Error::ChunkDigestMismatch`]: a chunk's bytes are wrong. None of the chunks are returned then.
pub fn decode_member(
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

    let mut stream = Inflate::new(compressed);
    let mut position = 0;
    let mut chunks = Vec::with_capacity(wanted.len());
    for spec in wanted {
        let size = usize::try_from(spec.size)
            .map_err(|_| Error::limit("bytes of a wanted chunk", spec.size, usize::MAX as u64))?;
        let mut data = vec![0; size];
        let end = spec.inner_offset + spec.size; // cannot overflow: it is within limits.member_bytes
        let read = stream.skip(spec.inner_offset - position).and_then(|()| stream.read(&mut data));
        read.map_err(|fault| match fault {
            Fault::Truncated => Error::Truncated { len: compressed.len() as u64, wanted: end },
            Fault::Corrupt(why) => Error::BadMember { why },
        })?;
        position = end;
        chunks.push(spec.verify(data.into())?);
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{gzip, noise};

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

        let chunks = decode_member(&compressed, &wanted, &Limits::default()).unwrap();
        assert_eq!(chunks.len(), wanted.len());
        for ((chunk, range), spec) in chunks.into_iter().zip(ranges).zip(wanted) {
            assert_eq!(*chunk.spec(), spec);
            assert_eq!(&chunk.data()[..], &payload[range]);
            assert_eq!(chunk.clone().into_data(), chunk.data());
        }
        assert!(decode_member(&[], &[], &Limits::default()).unwrap().is_empty());
    }

    #[test]
    fn decoding_stops_at_the_last_wanted_byte() {
        let payload = noise(300_000);
        let mut compressed = gzip(&payload);
        let half = compressed.len() / 2;
        compressed[half..].fill(0xff);
        let wanted = [spec(&payload, 10..100_000)];
        assert_eq!(decode_member(&compressed, &wanted, &Limits::default()).unwrap().len(), 1);
        assert!(decode_member(&compressed[..half], &wanted, &Limits::default()).is_ok());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let payload = noise(3000);
        let compressed = gzip(&payload);
        let wanted = [spec(&payload, 2000..3000)];
        let trailer = compressed.len() - 8;
        for len in 0..trailer - 1 {
            let error = decode_member(&compressed[..len], &wanted, &Limits::default()).unwrap_err();
            assert_eq!(error, Error::Truncated { len: len as u64, wanted: 3000 }, "{len}");
        }
        assert!(decode_member(&compressed[..trailer], &wanted, &Limits::default()).is_ok());
    }

    #[test]
    fn every_bit_flip_is_an_error_or_harmless() {
        let payload = noise(600);
        let compressed = gzip(&payload);
        let wanted = [spec(&payload, 0..600)];
        for bit in 0..compressed.len() * 8 {
            let mut flipped = compressed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(chunks) = decode_member(&flipped, &wanted, &Limits::default()) {
                assert_eq!(&chunks[0].data()[..], payload, "bit {bit}");
            }
        }
    }

    #[test]
    fn wrong_bytes_are_typed() {
        let limits = Limits { chunk_bytes: 100, member_bytes: 1000, ..Limits::default() };
        let payload = noise(1500);
        let compressed = gzip(&payload);
        let decode = |wanted: &[ChunkSpec]| decode_member(&compressed, wanted, &limits).unwrap_err();

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

        let short = decode_member(&gzip(b"short"), &[spec(&payload, 0..10)], &limits).unwrap_err();
        assert!(matches!(short, Error::BadMember { .. }), "{short}");
        let plain = decode_member(&payload, &[spec(&payload, 0..10)], &limits).unwrap_err();
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
}
