//! The input: what it is compressed with, and the tar inside.

use std::io::{self, BufReader, Cursor, ErrorKind, Read};

use flate2::bufread::MultiGzDecoder;

use super::{Error, Observer};

/// Bytes read from the caller's input at a time.
const BUFFER: usize = 256 << 10;

/// The decompressed layer. What fails here is wrapped as an [`Error`]; a compressed stream that is cut off is
/// [`ErrorKind::UnexpectedEof`].
pub(super) struct Input<'o, R: Read> {
    decoder: Decoder<Source<'o, R>>,
    /// Decompressed bytes so far.
    offset: u64,
}

enum Decoder<R: Read> {
    Plain(BufReader<R>),
    /// Buffered on both sides: the tar is read in blocks, and inflating has a price per call.
    Gzip(Box<BufReader<MultiGzDecoder<BufReader<R>>>>),
    Zstd(BufReader<zstd::Decoder<'static, BufReader<R>>>),
}

/// The caller's input behind the bytes that were read to sniff.
type Source<'o, R> = io::Chain<Cursor<Vec<u8>>, Watched<'o, R>>;

impl<'o, R: Read> Input<'o, R> {
    /// Looks at the first bytes and starts to decode: gzip, zstd, and else a plain tar.
    pub(super) fn new(input: R, observer: &'o dyn Observer) -> Result<Self, Error> {
        let mut input = Watched { input, observer };
        let mut start = Vec::new();
        input.by_ref().take(4).read_to_end(&mut start).map_err(Error::unwrap)?;
        let format = Format::of(&start);
        let buffered = BufReader::with_capacity(BUFFER, Cursor::new(start).chain(input));
        let decoder = match format {
            Format::Plain => Decoder::Plain(buffered),
            Format::Gzip => {
                Decoder::Gzip(Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(buffered))))
            }
            Format::Zstd => {
                let decoder = zstd::Decoder::with_buffer(buffered).map_err(Error::unwrap)?;
                Decoder::Zstd(BufReader::with_capacity(BUFFER, decoder))
            }
        };
        Ok(Input { decoder, offset: 0 })
    }

    /// Whether it is compressed with zstd.
    pub(super) fn is_zstd(&self) -> bool {
        matches!(self.decoder, Decoder::Zstd(_))
    }
}

impl<R: Read> Read for Input<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (format, read) = match &mut self.decoder {
            Decoder::Plain(input) => ("tar", input.read(buffer)),
            Decoder::Gzip(input) => ("gzip", input.read(buffer)),
            Decoder::Zstd(input) => ("zstd", input.read(buffer)),
        };
        match read {
            Ok(count) => {
                self.offset += count as u64;
                Ok(count)
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(error),
            Err(error) => Err(match error.downcast::<Error>() {
                Ok(known) => io::Error::other(known),
                Err(error) => {
                    let why = error.to_string();
                    io::Error::other(Error::BadCompression { format, offset: self.offset, why })
                }
            }),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Plain,
    Gzip,
    Zstd,
}

impl Format {
    /// Source of the magic numbers: RFC 1952 2.3.1, RFC 8878 3.1. A zstd stream may start with a skippable frame. No tar
    /// starts like that: bytes below a blank do not begin a name, and the others are no UTF-8.
    fn of(start: &[u8]) -> Format {
        match start {
            [0x1f, 0x8b, ..] => Format::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Format::Zstd,
            _ => Format::Plain,
        }
    }
}

/// The caller's input: tells the observer what was read, and wraps its errors so that no decoder can mistake them for
/// its own.
struct Watched<'o, R> {
    input: R,
    observer: &'o dyn Observer,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = loop {
            match self.input.read(buffer) {
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(io::Error::other(Error::Read(error))),
            }
        };
        self.observer.read(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::fixture;

    /// Hands out few bytes at a time, then fails or ends.
    struct Trickle<'a>(&'a [u8], Option<ErrorKind>);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match (self.0.is_empty(), self.1) {
                (true, Some(kind)) => Err(kind.into()),
                _ => (&mut self.0).take(3).read(buffer),
            }
        }
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.include_checksum(true).unwrap();
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn decode(input: impl Read) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        match Input::new(input, &())?.read_to_end(&mut out) {
            Ok(_) => Ok(out),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Err(Error::Truncated { offset: out.len() as u64, entry: String::new() })
            }
            Err(error) => Err(Error::unwrap(error)),
        }
    }

    #[test]
    fn formats() {
        let (first, second) = (fixture::noise(70_000), b"second".to_vec());
        let both = [&first[..], &second].concat();
        let skippable = b"\x50\x2a\x4d\x18\x02\0\0\0xx".to_vec();
        for stored in [
            both.clone(),
            fixture::gzip(&both),
            [fixture::gzip(&first), fixture::gzip(&second), fixture::gzip(b"")].concat(),
            zstd(&both),
            [skippable, zstd(&first), zstd(&second)].concat(),
        ] {
            assert_eq!(decode(&stored[..]).unwrap(), both);
            assert_eq!(decode(Trickle(&stored, None)).unwrap(), both);
        }
        for short in [&b""[..], b"\x1f", b"ab"] {
            assert_eq!(decode(short).unwrap(), short);
        }
    }

    #[test]
    fn faults_are_told_apart() {
        let data = fixture::noise(5000);
        for (format, stored) in [("gzip", fixture::gzip(&data)), ("zstd", zstd(&data))] {
            for len in 4..stored.len() {
                let error = decode(&stored[..len]).map(drop).unwrap_err();
                assert!(matches!(error, Error::Truncated { .. }), "{format} {len}: {error}");
            }
            let error =
                decode(Trickle(&stored[..100], Some(ErrorKind::UnexpectedEof))).map(drop).unwrap_err();
            assert!(
                matches!(&error, Error::Read(inner) if inner.kind() == ErrorKind::UnexpectedEof),
                "{error}"
            );
            let mut broken = stored.clone();
            // Of gzip's checksum and size the checksum, of zstd's the checksum.
            broken[stored.len() - if format == "gzip" { 6 } else { 2 }] ^= 1;
            let error = decode(&broken[..]).map(drop).unwrap_err();
            assert!(matches!(error, Error::BadCompression { format: f, .. } if f == format), "{error}");
            let trailing = [&stored[..], b"x"].concat();
            assert!(decode(&trailing[..]).is_err(), "{format}");
        }
        let error = decode(Trickle(&data, Some(ErrorKind::ConnectionReset))).map(drop).unwrap_err();
        assert!(
            matches!(&error, Error::Read(inner) if inner.kind() == ErrorKind::ConnectionReset),
            "{error}"
        );
    }
}
