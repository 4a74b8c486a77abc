//! The tar-split of podman's zstd:chunked: all of a tar but the contents of its files, as lines of JSON.
//!
//! ```json
//! {"type":2,"payload":"<base64: padding of the file before, headers of an entry>","position":0}
//! {"type":1,"name":"bin/sh","size":1000,"payload":"<base64: checksum of its content>","position":1}
//! ```
//!
//! The format is that of github.com/vbatts/tar-split (`tar/storage/entry.go`); the order is the one that its
//! `asm.IterateHeaders` counts on, by which containers/storage compares the table of contents: one segment for all headers
//! of an entry, which begins with the padding of the entry before; then the entry; the end of the archive last.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crc::{CRC_64_GO_ISO, Crc, Digest as Checksum, Table};
use serde::Serialize;

use super::{Error, Level};

/// Go's `crc64.ISO`.
static CRC: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_GO_ISO);

/// Bytes of a segment without headers.
const SEGMENT: u64 = 1 << 20;

/// A tar-split, compressed.
#[derive(Debug)]
pub(super) struct Split {
    pub(super) stored: Vec<u8>,
    /// Bytes before compression.
    pub(super) size: u64,
}

/// Takes a tar in its order.
pub(super) struct Splitter {
    output: zstd::Encoder<'static, Vec<u8>>,
    size: u64,
    position: u64,
    /// Bytes that fill the last block of the file before.
    padding: usize,
    /// Of the content that is being taken.
    checksum: Checksum<'static, u64, Table<16>>,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    /// A name that is not UTF-8, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_raw: Option<String>,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    payload: Option<String>,
    position: u64,
}

fn is_zero(size: &u64) -> bool {
    *size == 0
}

impl Splitter {
    pub(super) fn new(level: Level) -> Result<Self, Error> {
        let output = zstd::Encoder::new(Vec::new(), level.get().into()).map_err(Error::Write)?;
        Ok(Splitter { output, size: 0, position: 0, padding: 0, checksum: CRC.digest() })
    }

    /// The blocks in front of an entry's content.
    pub(super) fn headers(&mut self, blocks: &[u8]) -> Result<(), Error> {
        let segment = [&vec![0; self.padding][..], blocks].concat();
        self.padding = 0;
        self.segment(&segment)
    }

    /// The next bytes of the entry's content.
    pub(super) fn content(&mut self, bytes: &[u8]) {
        self.checksum.update(bytes);
    }

    /// The entry, whose content was taken, and how many bytes fill its last block.
    pub(super) fn entry(&mut self, name: &[u8], size: u64, padding: usize) -> Result<(), Error> {
        let checksum = std::mem::replace(&mut self.checksum, CRC.digest()).finalize();
        let text = str::from_utf8(name).ok();
        self.padding = padding;
        self.line(Line {
            kind: 1,
            name: text,
            name_raw: text.is_none().then(|| STANDARD.encode(name)),
            size,
            payload: (size > 0).then(|| STANDARD.encode(checksum.to_be_bytes())),
            position: 0,
        })
    }

    /// The zero bytes at the end of the archive.
    pub(super) fn finish(mut self, zeros: u64) -> Result<Split, Error> {
        let mut left = self.padding as u64 + zeros;
        while left > 0 {
            let segment = left.min(SEGMENT);
            self.segment(&vec![0; segment as usize])?;
            left -= segment;
        }
        Ok(Split { stored: self.output.finish().map_err(Error::Write)?, size: self.size })
    }

    fn segment(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let payload = Some(STANDARD.encode(bytes));
        self.line(Line { kind: 2, name: None, name_raw: None, size: 0, payload, position: 0 })
    }

    fn line(&mut self, line: Line<'_>) -> Result<(), Error> {
        let line = Line { position: self.position, ..line };
        let mut text = serde_json::to_vec(&line).map_err(|error| Error::Write(error.into()))?;
        text.push(b'\n');
        self.position += 1;
        self.size += text.len() as u64;
        self.output.write_all(&text).map_err(Error::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_go_package() {
        let mut splitter = Splitter::new(Level::default()).unwrap();
        splitter.headers(b"head1").unwrap();
        splitter.entry(b"dir/", 0, 0).unwrap();
        splitter.headers(b"head2").unwrap();
        splitter.content(b"1234");
        splitter.content(b"56789");
        splitter.entry(b"f\xff", 9, 3).unwrap();
        let Split { stored, size } = splitter.finish(2).unwrap();
        let text = zstd::decode_all(&stored[..]).unwrap();
        assert_eq!(text.len() as u64, size);
        // The checksum is the one that Go's crc64.Checksum([]byte("123456789"), crc64.MakeTable(crc64.ISO)) gives.
        let checksum = STANDARD.encode(0xb909_56c7_75a4_1001_u64.to_be_bytes());
        let expected = [
            r#"{"type":2,"payload":"aGVhZDE=","position":0}"#.to_owned(),
            r#"{"type":1,"name":"dir/","payload":null,"position":1}"#.to_owned(),
            r#"{"type":2,"payload":"aGVhZDI=","position":2}"#.to_owned(),
            format!(r#"{{"type":1,"name_raw":"Zv8=","size":9,"payload":"{checksum}","position":3}}"#),
            r#"{"type":2,"payload":"AAAAAAA=","position":4}"#.to_owned(),
        ];
        assert_eq!(str::from_utf8(&text).unwrap().lines().collect::<Vec<_>>(), expected);
    }
}
