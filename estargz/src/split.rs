//! The tar-split of podman's zstd:chunked, read for one number: how long the layer's tar is.
//!
//! Lines of JSON that hold all of the tar but the contents of its files, of which they give the sizes (the writer's `split`
//! shows some). Neither is kept: the tar is as long as all of them together.
//!
//! The format is that of github.com/vbatts/tar-split (`tar/storage/entry.go`).

use std::borrow::Cow;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::ops::Range;

use serde::Deserialize;

use crate::error::shorten;
use crate::{Digest, Error, Limits, Position, inflate};

/// Lines for each entry of a tar at most: writers make one of its headers, one of itself, and some one of its padding.
const LINES: u64 = 4;
/// Go has sizes in 64 bits with a sign.
const LENGTH: u64 = i64::MAX as u64;

/// A tar-split as a manifest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TarSplit {
    /// Where it is.
    pub position: Position,
    /// Its digest as it is compressed, if the manifest names that; otherwise the TOC may
    /// ([`Toc::tar_split`](crate::Toc::tar_split)).
    pub digest: Option<Digest>,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(default)]
    size: u64,
    payload: Option<&'a str>,
}

impl TarSplit {
    /// The bytes to read of a blob of `blob_size` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::BadTarSplit`] if they are not in it, [`Error::Limit`] if they are too many, as they are or decompressed.
    pub fn range(&self, blob_size: u64, limits: &Limits) -> Result<Range<u64>, Error> {
        let Position { offset, stored, json } = self.position;
        for (what, value, limit) in [
            ("bytes of the tar-split as stored in the blob", stored, limits.toc_compressed_bytes),
            ("bytes of tar-split JSON", json, limits.tar_split_bytes),
        ] {
            if value > limit {
                return Err(Error::limit(what, value, limit));
            }
        }
        let end = offset.checked_add(stored).filter(|&end| stored > 0 && end <= blob_size);
        let outside = || bad(format!("{stored} bytes at {offset} do not lie in a blob of {blob_size} bytes"));
        Ok(offset..end.ok_or_else(outside)?)
    }

    /// Bytes of the tar, from those at [`TarSplit::range`]. `named` is the digest that the TOC names; without, the manifest's
    /// is compared; without that, none. Takes as much memory as one line, and as the window that zstd frames ask for (128 MiB
    /// at most).
    ///
    /// # Errors
    ///
    /// [`Error::BadTarSplit`], [`Error::Limit`].
    pub fn tar_length(&self, stored: &[u8], named: Option<Digest>, limits: &Limits) -> Result<u64, Error> {
        if let Some(expected) = named.or(self.digest) {
            let actual = Digest::of(stored);
            if actual != expected {
                return Err(bad(format!("it has digest {actual} instead of {expected}")));
            }
        }
        sum(stored, self.position.json, limits)
    }
}

fn bad(why: impl Into<Cow<'static, str>>) -> Error {
    Error::BadTarSplit { why: why.into() }
}

/// Adds up a tar-split of `json` bytes.
fn sum(stored: &[u8], json: u64, limits: &Limits) -> Result<u64, Error> {
    if json > limits.tar_split_bytes {
        return Err(Error::limit("bytes of tar-split JSON", json, limits.tar_split_bytes));
    }
    let broken = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => bad("its zstd frame is cut off"),
        _ => bad(format!("its zstd frame is broken: {error}")),
    };
    let most_lines = LINES * (u64::from(limits.entries) + 1);
    let mut text = BufReader::new(inflate::zstd_stream(stored).map_err(broken)?).take(json.saturating_add(1));
    let (mut line, mut lines, mut read, mut length) = (Vec::new(), 0, 0, 0_u64);
    loop {
        line.clear();
        let most = limits.tar_split_line_bytes;
        let found =
            text.by_ref().take(most.saturating_add(1)).read_until(b'\n', &mut line).map_err(broken)? as u64;
        if found == 0 {
            break;
        }
        read += found;
        lines += 1;
        for (what, value, limit) in
            [("bytes of a line of the tar-split", found, most), ("lines of the tar-split", lines, most_lines)]
        {
            if value > limit {
                return Err(Error::limit(what, value, limit));
            }
        }
        let part = part(&line).map_err(|why| bad(format!("line {lines}: {why}")))?;
        length = length
            .checked_add(part)
            .filter(|&length| length <= LENGTH)
            .ok_or_else(|| bad(format!("line {lines}: the tar would be longer than {LENGTH} bytes")))?;
    }
    if read != json {
        let more = if read > json { "more than" } else { "less than" };
        return Err(bad(format!("it holds {more} the announced {json} bytes")));
    }
    Ok(length)
}

/// Bytes of the tar that a line stands for.
fn part(line: &[u8]) -> Result<u64, Cow<'static, str>> {
    let Line { kind, size, payload } =
        serde_json::from_slice(line).map_err(|error| shorten(&error.to_string()))?;
    match kind {
        // A file, whose payload is a checksum.
        1 => Ok(size),
        2 => decoded(payload.unwrap_or_default()).ok_or_else(|| "its payload is not base64".into()),
        other => Err(format!("entries of type {other} are not known").into()),
    }
}

/// Bytes that a text in base64 stands for. Which ones is nobody's business here.
fn decoded(text: &str) -> Option<u64> {
    let padding = text.bytes().rev().take_while(|&byte| byte == b'=').count() as u64;
    let quads = text.len() as u64 / 4;
    (text.len().is_multiple_of(4) && padding <= 2).then(|| (3 * quads).saturating_sub(padding))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    fn limits() -> Limits {
        Limits { tar_split_bytes: 1 << 20, tar_split_line_bytes: 1000, entries: 9, ..Limits::default() }
    }

    fn read(text: &str) -> Result<u64, Error> {
        sum(&fixture::zstd(text.as_bytes()), text.len() as u64, &limits())
    }

    #[test]
    fn segments_and_files_are_added_up() {
        let text = r#"{"type":2,"payload":"aGVhZDE=","position":0}
{"type":1,"name":"dir/","payload":null,"position":1}
{"type":2,"payload":"aGVhZDI2","position":2}
{"type":1,"name_raw":"Zv8=","size":900,"payload":"uQlWx3WkEAE=","position":3}
{"type":2,"payload":"AAAAAAAAAA==","position":4,"unknown":{"deep":[1.5,null]}}
{"type":2,"payload":"","position":5}
"#;
        assert_eq!(read(text), Ok(5 + 6 + 900 + 7));
        assert_eq!(read(text.trim_end()), Ok(5 + 6 + 900 + 7));
        assert_eq!(read(""), Ok(0));
        // It may come in several frames.
        let (one, other) = text.split_at(100);
        let frames = [fixture::zstd(one.as_bytes()), fixture::zstd(other.as_bytes())].concat();
        assert_eq!(sum(&frames, text.len() as u64, &limits()), Ok(5 + 6 + 900 + 7));
    }

    #[test]
    fn what_is_no_tar_split_is_an_error() {
        let file = |size: u64| format!("{{\"type\":1,\"size\":{size}}}\n");
        let deep = format!("{{\"type\":1,\"x\":{}", "[".repeat(900));
        for (text, expected) in [
            ("{}\n", "line 1: missing field `type`"),
            ("[]\n", "line 1"),
            ("\n", "line 1"),
            ("{\"type\":3}\n", "line 1: entries of type 3"),
            ("{\"type\":2,\"payload\":\"abc\"}\n", "line 1: its payload"),
            ("{\"type\":2,\"payload\":\"a===\"}\n", "line 1: its payload"),
            ("{\"type\":2,\"payload\":7}\n", "line 1"),
            ("{\"type\":1,\"size\":1}\n{\"type\":1,\"size\":-1}\n", "line 2"),
            ("{\"type\":1,\"size\":1.5}\n", "line 1"),
            ("{\"type\":1", "line 1: EOF"),
            (&deep, "line 1: EOF while parsing a list"),
            (&file(u64::MAX), "longer than"),
            (&[file(LENGTH), file(1)].concat(), "line 2: the tar would be longer"),
        ] {
            match read(text).unwrap_err() {
                Error::BadTarSplit { why } => assert!(why.contains(expected), "{why}: {expected}"),
                other => panic!("{other}: {text}"),
            }
        }
        assert_eq!(read(&file(LENGTH)), Ok(LENGTH));
        let error = read(&format!("{{\"type\":\"{}\"}}", "x".repeat(900))).unwrap_err();
        assert!(error.to_string().len() < 400, "{error}");
    }

    #[test]
    fn it_is_as_long_as_was_said_and_no_longer_than_allowed() {
        let text = "{\"type\":1,\"size\":7}\n".repeat(3);
        let (stored, len) = (fixture::zstd(text.as_bytes()), text.len() as u64);
        assert_eq!(sum(&stored, len, &limits()), Ok(21));
        let bomb = fixture::zstd(&vec![b' '; 64 << 20]);
        for (expected, stored, json) in [
            ("more than", &stored[..], len - 1),
            ("less than", &stored, len + 1),
            ("broken", b"not zstd at all", 10),
            ("cut off", &stored[..stored.len() - 1], len),
            ("cut off", b"", 10),
        ] {
            match sum(stored, json, &limits()).unwrap_err() {
                Error::BadTarSplit { why } => {
                    assert!(why.contains(expected), "{why}: {expected}")
                }
                other => panic!("{other}: {expected}"),
            }
        }
        let limit = |stored: &[u8], json| match sum(stored, json, &limits()) {
            Err(Error::Limit { value, limit, .. }) => (value, limit),
            other => panic!("{other:?}"),
        };
        assert_eq!(limit(&bomb, 1 << 20), (1001, 1000));
        assert_eq!(limit(&stored, (1 << 20) + 1), ((1 << 20) + 1, 1 << 20));
        let many = "{\"type\":1}\n".repeat(41);
        assert_eq!(limit(&fixture::zstd(many.as_bytes()), many.len() as u64), (41, 40));
    }

    #[test]
    fn a_position_is_in_the_blob_and_a_digest_is_compared() {
        let text = "{\"type\":1,\"size\":7}\n";
        let stored = fixture::zstd(text.as_bytes());
        let (right, wrong) = (Digest::of(&stored), Digest::of(b"x"));
        let split = |digest| {
            let position = Position { offset: 10, stored: stored.len() as u64, json: text.len() as u64 };
            TarSplit { position, digest }
        };
        let end = 10 + stored.len() as u64;
        assert_eq!(split(None).range(end, &limits()), Ok(10..end));
        assert!(matches!(split(None).range(end - 1, &limits()), Err(Error::BadTarSplit { .. })));
        let at = |offset, stored, json| {
            TarSplit { position: Position { offset, stored, json }, digest: None }.range(1 << 40, &limits())
        };
        assert!(matches!(at(10, 0, 1), Err(Error::BadTarSplit { .. })));
        assert!(matches!(at(u64::MAX, 1, 1), Err(Error::BadTarSplit { .. })));
        assert!(matches!(at(0, u64::MAX, 1), Err(Error::Limit { .. })));
        assert!(matches!(at(0, 1, u64::MAX), Err(Error::Limit { .. })));

        for (manifest, toc) in
            [(None, None), (Some(right), None), (None, Some(right)), (Some(wrong), Some(right))]
        {
            assert_eq!(split(manifest).tar_length(&stored, toc, &limits()), Ok(7), "{manifest:?} {toc:?}");
        }
        for (manifest, toc) in [(Some(wrong), None), (Some(right), Some(wrong))] {
            let error = split(manifest).tar_length(&stored, toc, &limits()).unwrap_err();
            assert!(error.to_string().contains("instead of"), "{error}");
        }
    }
}
