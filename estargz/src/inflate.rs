//! One gzip member as a forward-only stream of decompressed bytes.
//!
//! The member's trailer (checksum, size) is only met when a read runs into it: whoever stops at the last wanted
//! byte does not pay for the rest, and everything wanted is checked by a stronger digest anyway.

use std::borrow::Cow;
use std::io::{ErrorKind, Read};

use flate2::bufread::{GzDecoder, MultiGzDecoder};

/// Why a member did not yield a byte.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The compressed bytes ended first.
    Truncated,
    /// The member ended first, or its bytes are no gzip member.
    Corrupt(Cow<'static, str>),
}

/// A decoder positioned somewhere in a decompressed member.
pub(crate) struct Inflate<'a> {
    gzip: GzDecoder<&'a [u8]>,
}

impl<'a> Inflate<'a> {
    /// Starts at the first byte of a member; bytes after the member's end are ignored.
    pub(crate) fn new(compressed: &'a [u8]) -> Self {
        Inflate { gzip: GzDecoder::new(compressed) }
    }

    /// Fills `buffer` with the next bytes.
    pub(crate) fn read(&mut self, mut buffer: &mut [u8]) -> Result<(), Fault> {
        while !buffer.is_empty() {
            match self.gzip.read(buffer) {
                Ok(0) => return Err(Fault::Corrupt("it ends before the wanted bytes".into())),
                Ok(n) => buffer = &mut buffer[n..],
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Err(Fault::Truncated),
                Err(error) => return Err(Fault::Corrupt(error.to_string().into())),
            }
        }
        Ok(())
    }

    /// Decodes `count` bytes and throws them away.
    pub(crate) fn skip(&mut self, mut count: u64) -> Result<(), Fault> {
        let mut scratch = [0; 16 << 10];
        while count > 0 {
            let n = usize::try_from(count).map_or(scratch.len(), |count| count.min(scratch.len()));
            self.read(&mut scratch[..n])?;
            count -= n as u64;
        }
        Ok(())
    }
}

/// Why not all of the members could be decoded.
#[derive(Debug)]
pub(crate) enum Whole {
    Fault(Fault),
    /// More would come out than is allowed.
    Limit,
}

/// Decodes gzip members that follow one another, at least one, to `limit` bytes at most.
pub(crate) fn members(compressed: &[u8], limit: u64) -> Result<Vec<u8>, Whole> {
    if compressed.is_empty() {
        return Err(Whole::Fault(Fault::Truncated));
    }
    let mut bytes = Vec::new();
    let read = MultiGzDecoder::new(compressed).take(limit.saturating_add(1)).read_to_end(&mut bytes);
    match read {
        Ok(_) if bytes.len() as u64 > limit => Err(Whole::Limit),
        Ok(_) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(Whole::Fault(Fault::Truncated)),
        Err(error) => Err(Whole::Fault(Fault::Corrupt(error.to_string().into()))),
    }
}
