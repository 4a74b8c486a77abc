//! The wrapping of a TOC: a gzip member that holds a tar with the single entry `stargz.index.json`, or a zstd frame of
//! which is known how much it holds.

use std::borrow::Cow;

use crate::inflate::{self, Compression, Fault, Inflate, Whole};
use crate::{Error, Limits};

const NAME: &[u8] = b"stargz.index.json";

/// Deflate cannot do better: 258 bytes from two bits.
const MAX_RATIO: u64 = 1032;

/// Returns the JSON of a gzip member. `member` is the TOC member, perhaps with bytes behind it; `toc_offset` is for messages.
///
/// The size that the tar claims is checked against the limit and against what `member` can hold at all before
/// it is allocated. Nothing behind the JSON is decoded.
pub(super) fn gzip(toc_offset: u64, member: &[u8], limits: &Limits) -> Result<Vec<u8>, Error> {
    let bad = |why: Cow<'static, str>| Error::BadToc { offset: toc_offset, why };
    let fault = |fault| match fault {
        Fault::Truncated => bad("its gzip stream is cut off".into()),
        Fault::Corrupt(why) => bad(format!("its gzip stream is broken: {why}").into()),
    };

    let mut stream = Inflate::new(Compression::Gzip, member).map_err(fault)?;
    let mut header = [0; 512];
    stream.read(&mut header).map_err(fault)?;
    let size = entry_size(&header).map_err(|why| bad(why.into()))?;
    if size > limits.toc_json_bytes {
        return Err(Error::limit("bytes of TOC JSON", size, limits.toc_json_bytes));
    }
    if size > MAX_RATIO * member.len() as u64 {
        let why = format!("{} compressed bytes cannot hold the claimed {size}", member.len());
        return Err(bad(why.into()));
    }
    let size =
        usize::try_from(size).map_err(|_| Error::limit("bytes of TOC JSON", size, usize::MAX as u64))?;
    let mut json = vec![0; size];
    stream.read(&mut json).map_err(fault)?;
    Ok(json)
}

/// Returns the JSON of `size` bytes that `frames` are. `toc_offset` is for messages.
///
/// The size is within the limits already; no more than that is allocated, and no more than the frames' headers ask for.
pub(super) fn zstd(toc_offset: u64, frames: &[u8], size: u64) -> Result<Vec<u8>, Error> {
    let bad = |why: Cow<'static, str>| Error::BadToc { offset: toc_offset, why };
    match inflate::members(Compression::Zstd, frames, size) {
        Ok(json) if json.len() as u64 == size => Ok(json),
        Ok(json) => Err(bad(format!("it holds {} bytes instead of the announced {size}", json.len()).into())),
        Err(Whole::Limit) => Err(bad(format!("it holds more than the announced {size} bytes").into())),
        Err(Whole::Fault(Fault::Truncated)) => Err(bad("its zstd frame is cut off".into())),
        Err(Whole::Fault(Fault::Corrupt(why))) => Err(bad(format!("its zstd frame is broken: {why}").into())),
    }
}

/// Size of the entry that a tar header announces, if it is the TOC's.
fn entry_size(header: &[u8; 512]) -> Result<u64, &'static str> {
    let name = &header[..100];
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    if &name[..end] != NAME {
        return Err("its tar does not start with stargz.index.json");
    }
    if !matches!(header[156], b'0' | 0) {
        return Err("stargz.index.json is not a regular file in its tar");
    }
    let sum = header.iter().map(|&byte| u64::from(byte)).sum::<u64>()
        - header[148..156].iter().map(|&byte| u64::from(byte)).sum::<u64>()
        + 8 * u64::from(b' '); // the checksum counts its own field as blanks
    if octal(&header[148..156]) != Some(sum) {
        return Err("its tar header has a wrong checksum");
    }
    octal(&header[124..136]).ok_or("its tar header gives no size")
}

/// A number field: octal digits between blanks and NULs. (Twelve digits fit easily.)
fn octal(field: &[u8]) -> Option<u64> {
    let digits = str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if digits.is_empty() || digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{self, gzip, noise, seal, tar};

    const AT: u64 = 77;

    fn unpack(member: &[u8]) -> Result<Vec<u8>, Error> {
        super::gzip(AT, member, &Limits::default())
    }

    /// A member whose tar header was edited.
    fn edited(edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut tar = tar("stargz.index.json", b"{}");
        edit(&mut tar);
        gzip(&tar)
    }

    #[test]
    fn json_comes_out() {
        let json = noise(100_000);
        let mut member = gzip(&tar("stargz.index.json", &json));
        assert_eq!(unpack(&member).unwrap(), json);
        member.extend(fixture::footer(AT));
        assert_eq!(unpack(&member).unwrap(), json);
        assert_eq!(unpack(&gzip(&tar("stargz.index.json", b""))).unwrap(), b"");
        assert_eq!(unpack(&edited(|tar| tar.truncate(514))).unwrap(), b"{}");
    }

    #[test]
    fn other_spellings_of_the_header() {
        let old = edited(|tar| {
            tar[156] = 0;
            tar[124..136].copy_from_slice(b"          2 ");
            seal(tar);
        });
        assert_eq!(unpack(&old).unwrap(), b"{}");
    }

    #[test]
    fn what_is_not_a_toc_is_an_error() {
        type Edit = fn(&mut Vec<u8>);
        let edits: [(&str, Edit); 8] = [
            ("start with", |tar| {
                tar[..4].copy_from_slice(b"evil");
                seal(tar);
            }),
            ("regular", |tar| {
                tar[156] = b'2';
                seal(tar);
            }),
            ("checksum", |tar| tar[0x90] ^= 1),
            ("checksum", |tar| tar[148..156].fill(0)),
            ("no size", |tar| {
                tar[124..136].fill(0);
                seal(tar);
            }),
            ("no size", |tar| {
                tar[124..136].copy_from_slice(b"-0000000002\0");
                seal(tar);
            }),
            ("no size", |tar| {
                tar[124] = 0x80; // base 256
                seal(tar);
            }),
            ("ends before", |tar| tar.truncate(513)),
        ];
        let cases = edits.map(|(why, edit)| (why, edited(edit)));
        let raw = [
            ("broken", b"not gzip at all".to_vec()),
            ("cut off", gzip(&tar("stargz.index.json", &noise(9000)))[..5000].to_vec()),
            ("cut off", Vec::new()),
            ("ends before", gzip(b"")),
        ];
        for (expected, member) in cases.into_iter().chain(raw) {
            match unpack(&member).unwrap_err() {
                Error::BadToc { offset: AT, why } => assert!(why.contains(expected), "{why}: {expected}"),
                other => panic!("{other}: {expected}"),
            }
        }
    }

    #[test]
    fn sizes_are_checked_before_they_are_allocated() {
        let claim = |size: u64| {
            edited(|tar| {
                tar[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
                seal(tar);
            })
        };
        let limit = Limits::default().toc_json_bytes;
        let over = unpack(&claim(limit + 1)).unwrap_err();
        assert!(matches!(over, Error::Limit { value, limit: l, .. } if value == limit + 1 && l == limit));
        let unbelievable = unpack(&claim(limit)).unwrap_err();
        assert!(unbelievable.to_string().contains("cannot hold"), "{unbelievable}");
    }

    #[test]
    fn a_frame_holds_as_much_as_was_said() {
        let json = noise(100_000);
        let frame = fixture::zstd(&json);
        assert_eq!(zstd(AT, &frame, 100_000).unwrap(), json);
        let bomb = fixture::zstd(&vec![0; 64 << 20]);
        for (expected, frame, size) in [
            ("more than", &frame[..], 99_999),
            ("instead of", &frame, 100_001),
            ("instead of", &frame, u64::MAX),
            ("more than", &bomb, 1000),
            ("broken", &frame[..5000], 100_000),
            ("broken", b"not zstd at all", 10),
            ("cut off", b"", 10),
        ] {
            match zstd(AT, frame, size).unwrap_err() {
                Error::BadToc { offset: AT, why } => assert!(why.contains(expected), "{why}: {expected}"),
                other => panic!("{other}: {expected}"),
            }
        }
    }
}
