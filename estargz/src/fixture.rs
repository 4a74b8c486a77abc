//! Hand-made bytes for unit tests.

use std::io::Write;

use flate2::{Compression, GzBuilder};

use crate::Position;

/// One gzip member.
pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut writer = GzBuilder::new().write(Vec::new(), Compression::default());
    writer.write_all(data).unwrap();
    writer.finish().unwrap()
}

/// Bytes that do not compress, the same in every run (xorshift).
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Noise that JSON can hold.
pub(crate) fn letters(len: usize) -> String {
    noise(len).into_iter().map(|byte| char::from(b'a' + byte % 26)).collect()
}

pub(crate) fn footer(toc_offset: u64) -> Vec<u8> {
    framed(b"\x1a\0SG\x16\0", toc_offset)
}

pub(crate) fn legacy_footer(toc_offset: u64) -> Vec<u8> {
    framed(b"\x16\0", toc_offset)
}

fn framed(framing: &[u8], toc_offset: u64) -> Vec<u8> {
    let header: &[u8] = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff";
    let digits = format!("{toc_offset:016x}STARGZ");
    [header, framing, digits.as_bytes(), b"\x01\0\0\xff\xff", &[0; 8]].concat()
}

/// A frame of zstd without the size of its contents, as streaming writers make them.
pub(crate) fn zstd(data: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A zstd:chunked footer of 40, 56 or 64 bytes in its frame.
pub(crate) fn zstd_footer(position: Position, len: usize) -> Vec<u8> {
    let Position { offset, stored, json } = position;
    let numbers = [offset, stored, json, 1].map(u64::to_le_bytes).concat();
    let rest = match len {
        40 => b"GnUlInUx".to_vec(),
        56 => [b"GnUlInUx", &[0; 16][..]].concat(),
        _ => [&[7; 24][..], b"GNUlInUx"].concat(),
    };
    skippable(&[numbers, rest].concat())
}

/// A frame that decoders skip.
pub(crate) fn skippable(data: &[u8]) -> Vec<u8> {
    [b"\x50\x2a\x4d\x18", &(data.len() as u32).to_le_bytes(), data].concat()
}

/// A tar with one entry and its closing blocks.
pub(crate) fn tar(name: &str, data: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut header);
    let padding = data.len().next_multiple_of(512) - data.len() + 1024;
    [&header, data, &vec![0; padding]].concat()
}

/// Writes a tar header's checksum.
pub(crate) fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header[..512].iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A blob of one payload member, a TOC and an eStargz footer.
pub(crate) struct Blob {
    pub(crate) bytes: Vec<u8>,
    pub(crate) toc_offset: u64,
    pub(crate) json: Vec<u8>,
}

impl Blob {
    pub(crate) fn new(payload: &[u8], json: &[u8]) -> Self {
        let mut bytes = gzip(payload);
        let toc_offset = bytes.len() as u64;
        bytes.extend(gzip(&tar("stargz.index.json", json)));
        bytes.extend(footer(toc_offset));
        Blob { bytes, toc_offset, json: json.to_vec() }
    }
}

impl Blob {
    /// The same as zstd:chunked, with a footer of 40, 56 or 64 bytes. `toc_offset` is where the payload ends.
    pub(crate) fn zstd(payload: &[u8], json: &[u8], footer: usize) -> Self {
        let mut bytes = zstd(payload);
        let toc_offset = bytes.len() as u64;
        let toc = zstd(json);
        let position = Position { offset: toc_offset + 8, stored: toc.len() as u64, json: json.len() as u64 };
        bytes.extend(skippable(&toc));
        bytes.extend(zstd_footer(position, footer));
        Blob { bytes, toc_offset, json: json.to_vec() }
    }
}
