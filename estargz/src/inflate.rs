//! Members as decompressed bytes: one as a forward-only stream, or all that follow one another at once.
//!
//! A gzip member's trailer (checksum, size) is only met when a read runs into it: whoever stops at the last wanted
//! byte does not pay for the rest, and everything wanted is checked by a stronger digest anyway.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{ErrorKind, Read};

use flate2::bufread::{GzDecoder, MultiGzDecoder};
use zstd::zstd_safe::{self, DCtx};

/// What a blob's members are compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A member is a gzip member (RFC 1952).
    Gzip,
    /// A member is a zstd frame (RFC 8878).
    Zstd,
}

impl Compression {
    /// That of a layer with this media type; gzip unless it says zstd.
    pub fn of_media_type(media_type: &str) -> Self {
        if media_type.ends_with("zstd") { Compression::Zstd } else { Compression::Gzip }
    }
}

/// The largest window of zstd that is decoded: 128 MiB, as zstd itself has it by default.
const WINDOW_LOG: u32 = 27;

/// Why a member did not yield a byte.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The compressed bytes ended first.
    Truncated,
    /// The member ended first, or its bytes are none.
    Corrupt(Cow<'static, str>),
}

/// A decoder positioned somewhere in a decompressed member.
pub(crate) enum Inflate<'a> {
    Gzip(Box<GzDecoder<&'a [u8]>>),
    /// Goes on with the frames behind.
    Zstd(zstd::Decoder<'static, &'a [u8]>),
}

impl<'a> Inflate<'a> {
    /// Starts at the first byte of a member; bytes after the member's end are ignored.
    pub(crate) fn new(compression: Compression, compressed: &'a [u8]) -> Result<Self, Fault> {
        let corrupt = |error: std::io::Error| Fault::Corrupt(error.to_string().into());
        match compression {
            Compression::Gzip => Ok(Inflate::Gzip(Box::new(GzDecoder::new(compressed)))),
            Compression::Zstd => Ok(Inflate::Zstd(zstd_stream(compressed).map_err(corrupt)?)),
        }
    }

    /// Fills `buffer` with the next bytes.
    pub(crate) fn read(&mut self, mut buffer: &mut [u8]) -> Result<(), Fault> {
        while !buffer.is_empty() {
            let read = match self {
                Inflate::Gzip(stream) => stream.read(buffer),
                Inflate::Zstd(stream) => stream.read(buffer),
            };
            match read {
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

/// The decompressed bytes of zstd frames that follow one another.
pub(crate) fn zstd_stream(compressed: &[u8]) -> std::io::Result<zstd::Decoder<'static, &[u8]>> {
    let mut decoder = zstd::Decoder::with_buffer(compressed)?;
    decoder.window_log_max(WINDOW_LOG)?;
    Ok(decoder)
}

/// Why not all of the members could be decoded.
#[derive(Debug)]
pub(crate) enum Whole {
    Fault(Fault),
    /// More would come out than is allowed.
    Limit,
}

/// Decodes members that follow one another, at least one, to `limit` bytes at most.
pub(crate) fn members(compression: Compression, compressed: &[u8], limit: u64) -> Result<Vec<u8>, Whole> {
    if compressed.is_empty() {
        return Err(Whole::Fault(Fault::Truncated));
    }
    match compression {
        Compression::Gzip => gzip_members(compressed, limit),
        Compression::Zstd => zstd_frames(compressed, limit),
    }
}

fn gzip_members(compressed: &[u8], limit: u64) -> Result<Vec<u8>, Whole> {
    let mut bytes = Vec::new();
    let read = MultiGzDecoder::new(compressed).take(limit.saturating_add(1)).read_to_end(&mut bytes);
    match read {
        Ok(_) if bytes.len() as u64 > limit => Err(Whole::Limit),
        Ok(_) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(Whole::Fault(Fault::Truncated)),
        Err(error) => Err(Whole::Fault(Fault::Corrupt(error.to_string().into()))),
    }
}

thread_local! {
    /// Making one costs as much as decoding a small file.
    static FRAMES: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// In one go: that takes no window, and no more memory than the frames may need by their own headers.
fn zstd_frames(compressed: &[u8], limit: u64) -> Result<Vec<u8>, Whole> {
    let corrupt = |code| Whole::Fault(Fault::Corrupt(zstd_safe::get_error_name(code).into()));
    let bound = zstd_safe::decompress_bound(compressed)
        .map_err(|_| Whole::Fault(Fault::Corrupt("its bytes are not whole zstd frames".into())))?;
    let capacity = usize::try_from(bound.min(limit)).map_err(|_| Whole::Limit)?;
    let mut bytes = Vec::with_capacity(capacity);
    match FRAMES.with_borrow_mut(|context| context.decompress(&mut bytes, compressed)) {
        Ok(_) => Ok(bytes),
        // The frames' own bound was cut short, and they need what was cut.
        Err(code) if bound > limit && zstd_safe::get_error_name(code) == TOO_SMALL => Err(Whole::Limit),
        Err(code) => Err(corrupt(code)),
    }
}

/// Name of the error of a destination that is too small (zstd, `error_private.c`).
const TOO_SMALL: &str = "Destination buffer is too small";
