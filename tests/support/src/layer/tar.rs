//! The bytes of tar entries: POSIX ustar headers, GNU long names, PAX records.
//!
//! Format: POSIX.1-2017 pax(1), "pax Header Block", "pax Extended Header" and "ustar Interchange Format"; GNU tar's
//! manual, "GNU Extensions to the Archive Format" for the types `L` and `K`. Extended attributes use the key prefix
//! `SCHILY.xattr.` that star introduced and GNU tar, libarchive and Go read.

use super::{Body, Entry, LongNames};

const BLOCK: usize = 512;
static ZEROS: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// Largest values of the octal fields of 7, 7 and 11 digits.
const MAX_ID: u32 = 0o777_7777;
const MAX_TIME: i64 = 0o777_7777_7777;
const MAX_SIZE: u64 = 0o777_7777_7777;

/// Zeros that fill a payload of `length` bytes up to whole blocks.
pub(crate) fn padding(length: usize) -> &'static [u8] {
    &ZEROS[..length.next_multiple_of(BLOCK) - length]
}

/// The two zero blocks at the end of an archive.
pub(crate) fn end_of_archive() -> &'static [u8] {
    &ZEROS
}

/// Everything before the payload: extension entries if needed, then the header block.
pub(crate) fn header_blocks(entry: &Entry, long_names: LongNames) -> Vec<u8> {
    let mut out = Vec::new();
    let mut pax = Vec::new();
    let link: &[u8] = match &entry.body {
        Body::Symlink(target) | Body::Hardlink(target) => target,
        _ => b"",
    };
    let size = entry.payload().len() as u64;
    let (secs, nanos) = entry.mtime;

    for (key, value) in &entry.xattrs {
        record(&mut pax, &[b"SCHILY.xattr.", key.as_slice()].concat(), value);
    }
    if size > MAX_SIZE {
        record(&mut pax, b"size", size.to_string().as_bytes());
    }
    if entry.uid > MAX_ID {
        record(&mut pax, b"uid", entry.uid.to_string().as_bytes());
    }
    if entry.gid > MAX_ID {
        record(&mut pax, b"gid", entry.gid.to_string().as_bytes());
    }
    if nanos != 0 || !(0..=MAX_TIME).contains(&secs) {
        record(&mut pax, b"mtime", decimal(secs, nanos).as_bytes());
    }
    for (value, key, gnu_type) in [(entry.name.as_slice(), "path", b'L'), (link, "linkpath", b'K')] {
        if value.len() > 100 {
            match long_names {
                LongNames::Pax => record(&mut pax, key.as_bytes(), value),
                LongNames::Gnu => extension(&mut out, b"././@LongLink", gnu_type, &[value, b"\0"].concat()),
            }
        }
    }
    if !pax.is_empty() {
        extension(&mut out, b"././@PaxHeader", b'x', &pax);
    }

    let mut header = Header::new(&entry.name, type_flag(&entry.body), size.min(MAX_SIZE));
    header.octal(100, 8, u64::from(entry.mode));
    header.octal(108, 8, u64::from(entry.uid.min(MAX_ID)));
    header.octal(116, 8, u64::from(entry.gid.min(MAX_ID)));
    header.octal(136, 12, secs.clamp(0, MAX_TIME).unsigned_abs());
    header.text(157, 100, link);
    header.text(265, 31, entry.user.as_bytes());
    header.text(297, 31, entry.group.as_bytes());
    if let Body::Char(major, minor) | Body::Block(major, minor) = entry.body {
        header.octal(329, 8, u64::from(major));
        header.octal(337, 8, u64::from(minor));
    }
    out.extend_from_slice(&header.finish());
    out
}

fn type_flag(body: &Body) -> u8 {
    match body {
        Body::Regular(_) => b'0',
        Body::Hardlink(_) => b'1',
        Body::Symlink(_) => b'2',
        Body::Char(..) => b'3',
        Body::Block(..) => b'4',
        Body::Directory => b'5',
        Body::Fifo => b'6',
    }
}

/// An entry that only carries data about the next one.
fn extension(out: &mut Vec<u8>, name: &[u8], type_flag: u8, data: &[u8]) {
    let mut header = Header::new(name, type_flag, data.len() as u64);
    header.octal(100, 8, 0o644);
    header.octal(136, 12, 0);
    out.extend_from_slice(&header.finish());
    out.extend_from_slice(data);
    out.extend_from_slice(padding(data.len()));
}

/// Appends `<length> <key>=<value>\n`; the length counts itself.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// `secs` + `nanos` as a signed decimal number: (-2, 250_000_000) is -1.75.
fn decimal(secs: i64, nanos: u32) -> String {
    match (secs, nanos) {
        (_, 0) => secs.to_string(),
        (0.., _) => format!("{secs}.{nanos:09}"),
        _ => format!("-{}.{:09}", -(secs + 1), 1_000_000_000 - nanos),
    }
}

struct Header([u8; BLOCK]);

impl Header {
    fn new(name: &[u8], type_flag: u8, size: u64) -> Header {
        let mut header = Header([0; BLOCK]);
        header.text(0, 100, name);
        header.octal(108, 8, 0);
        header.octal(116, 8, 0);
        header.octal(124, 12, size);
        header.0[156] = type_flag;
        header.text(257, 8, b"ustar\x0000");
        header.octal(329, 8, 0);
        header.octal(337, 8, 0);
        header
    }

    /// Writes a field that need not end in NUL, cutting what does not fit: extensions carry the whole.
    fn text(&mut self, at: usize, width: usize, value: &[u8]) {
        let length = value.len().min(width);
        self.0[at..at + length].copy_from_slice(&value[..length]);
    }

    fn octal(&mut self, at: usize, width: usize, value: u64) {
        let digits = format!("{value:0>width$o}\0", width = width - 1);
        assert_eq!(digits.len(), width, "{value:#o} does not fit a tar field of {width} bytes");
        self.text(at, width, digits.as_bytes());
    }

    fn finish(mut self) -> [u8; BLOCK] {
        self.text(148, 8, b"        ");
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        self.text(148, 8, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}
