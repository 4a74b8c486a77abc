//! The table of contents on its way out: entries become JSON one by one, the JSON of eStargz a tar.
//!
//! Keys, their order and when they are left out are those of the format's first writer (containerd/stargz-snapshotter,
//! `estargz/types.go`). Two things are said otherwise, which every reader understands: the document is not indented,
//! and times keep their fraction where the tar has one, instead of being rounded to seconds.
//!
//! In podman's dialect of zstd:chunked it is what containers/storage compares with the tar's headers, entry by entry
//! (`pkg/chunked/internal/minimal/compression.go`): with all three times and without names of owners.

use std::collections::{BTreeMap, HashMap};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::tar::{self, BLOCK, Header, Kind};
use super::{Dialect, Error, TOC_NAME, Target};
use crate::{Digest, Limits, Timestamp};

/// One entry of the JSON.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) size: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) modtime: String,
    /// Of last access. This, the next, the end and the type of chunks are told in podman's dialect only.
    #[serde(rename = "accesstime", skip_serializing_if = "String::is_empty")]
    pub(super) access_time: String,
    #[serde(rename = "changetime", skip_serializing_if = "String::is_empty")]
    pub(super) change_time: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) link_name: String,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) mode: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) uid: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) gid: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) user_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) group_name: String,
    /// Blob offset of the member.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) offset: u64,
    /// Blob offset at which the frame of the file's last chunk ends.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) end_offset: u64,
    /// Offset in the decompressed member.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) inner_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) dev_major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) dev_minor: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) xattrs: BTreeMap<String, String>,
    /// Digest of the whole file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) digest: Option<Digest>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) chunk_offset: u64,
    /// Given for all chunks but a shorter last one; by podman for all if there are several.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) chunk_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) chunk_digest: Option<Digest>,
    /// Whether the chunk is nothing but `zeros`.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) chunk_type: &'static str,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Entry {
    /// A further chunk of the file `name`.
    pub(super) fn chunk(name: String) -> Self {
        Entry { name, kind: "chunk", ..Entry::default() }
    }

    /// Whether a name in it cannot be told: bytes that are not UTF-8 became U+FFFD. (A name may also hold that
    /// character itself; readers cannot tell.)
    pub(super) fn is_lossy(&self) -> bool {
        let is_lossy = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
        is_lossy(&self.name) || is_lossy(&self.link_name) || self.xattrs.keys().any(|name| is_lossy(name))
    }
}

/// Describes entries, one after the other: the name of an owner is given only where it changes.
#[derive(Debug)]
pub(super) struct Describer {
    target: Target,
    users: HashMap<u32, Vec<u8>>,
    groups: HashMap<u32, Vec<u8>>,
}

impl Describer {
    pub(super) fn new(target: Target) -> Self {
        let (users, groups) = Default::default();
        Describer { target, users, groups }
    }

    /// Whose table it is.
    pub(super) fn target(&self) -> Target {
        self.target
    }

    /// Everything of an entry but its chunks and, unless it is empty, a file's digest.
    pub(super) fn describe(&mut self, entry: &tar::Entry) -> Result<Entry, Error> {
        let kind = match entry.kind {
            Kind::Directory => "dir",
            Kind::Regular => "reg",
            Kind::Symlink => "symlink",
            Kind::HardLink => "hardlink",
            Kind::CharDevice => "char",
            Kind::BlockDevice => "block",
            Kind::Fifo => "fifo",
        };
        let outside = || Error::entry(&entry.name, "its modification time lies outside the years 0 to 9999");
        let is_empty_file = entry.kind == Kind::Regular && entry.size == 0;
        let podman = self.target == Target::ZstdChunked(Dialect::Podman);
        let [access_time, change_time] = entry.other_times.map(|time| match time {
            Some(time) if podman => rfc3339(time).unwrap_or_default(),
            _ => String::new(),
        });
        let owner = |last: &mut HashMap<u32, Vec<u8>>, id, name: &[u8]| match podman {
            true => String::new(),
            false => if_changed(last, id, name),
        };
        Ok(Entry {
            name: text(&entry.name),
            kind,
            size: entry.size,
            modtime: rfc3339(entry.mtime).ok_or_else(outside)?,
            link_name: text(&entry.link),
            mode: entry.mode,
            uid: entry.uid.into(),
            gid: entry.gid.into(),
            access_time,
            change_time,
            user_name: owner(&mut self.users, entry.uid, &entry.user),
            group_name: owner(&mut self.groups, entry.gid, &entry.group),
            dev_major: entry.device.0.into(),
            dev_minor: entry.device.1.into(),
            xattrs: entry.xattrs.iter().map(|(name, value)| (text(name), STANDARD.encode(value))).collect(),
            digest: (is_empty_file && !podman).then(|| Digest::of(b"")),
            ..Entry::default()
        })
    }
}

/// The name of an id, if it is not the one given last for it.
fn if_changed(last: &mut HashMap<u32, Vec<u8>>, id: u32, name: &[u8]) -> String {
    if name.is_empty() || last.get(&id).is_some_and(|last| last == name) {
        return String::new();
    }
    last.insert(id, name.to_vec());
    text(name)
}

/// Text as Go's JSON encoder makes it: U+FFFD for every byte that is not part of UTF-8.
fn text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    text
}

/// A time as RFC 3339 in UTC, with as many digits of a fraction as it needs; empty for the epoch, which is what
/// readers take for no time at all. `None` if the year has not four digits.
fn rfc3339(Timestamp { secs, nanos }: Timestamp) -> Option<String> {
    if secs == 0 && nanos == 0 {
        return Some(String::new());
    }
    let (days, second) = (secs.div_euclid(86_400), secs.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    if !(0..=9999).contains(&year) {
        return None;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut fraction = if nanos > 0 { format!(".{nanos:09}") } else { String::new() };
    fraction.truncate(fraction.trim_end_matches('0').len());
    Some(format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z"))
}

/// The date of the Gregorian calendar so many days from 1970-01-01.
///
/// The calendar repeats every 400 years, 146,097 days. Years are counted from March, so that the leap day is the last;
/// then month `m` starts at day `(153 m + 2) / 5`.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    // Every 4 years have 1461 days, every 100 one less, all 400 one more.
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    if month < 10 { (era * 400 + year, month + 3, day) } else { (era * 400 + year + 1, month - 9, day) }
}

/// The TOC under construction: room for the header of a tar, then the JSON.
#[derive(Debug)]
pub(super) struct Toc {
    tar: Vec<u8>,
    entries: u64,
}

impl Toc {
    pub(super) fn new() -> Self {
        let mut tar = vec![0; BLOCK];
        tar.extend_from_slice(br#"{"version":1,"entries":["#);
        Toc { tar, entries: 0 }
    }

    /// Appends an entry.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] if the TOC becomes larger than this crate opens by default.
    pub(super) fn push(&mut self, entry: &Entry) -> Result<(), Error> {
        self.tar.extend_from_slice(if self.entries == 0 { b"\n" } else { b",\n" });
        self.entries += 1;
        // Texts and numbers always have a JSON form, and memory takes what is written.
        serde_json::to_writer(&mut self.tar, entry).map_err(|error| Error::Write(error.into()))?;
        let limits = Limits::default();
        for (what, value, limit) in [
            ("entries of the table of contents", self.entries, limits.entries.into()),
            ("bytes of the table of contents", self.tar.len() as u64, limits.toc_json_bytes),
        ] {
            if value > limit {
                return Err(Error::Limit { what: what.to_owned(), value, limit });
            }
        }
        Ok(())
    }

    /// The JSON, which names the tar-split by the digest of its compressed form.
    pub(super) fn into_json(mut self, tar_split: Option<Digest>) -> Vec<u8> {
        self.tar.extend_from_slice(b"\n]");
        if let Some(digest) = tar_split {
            self.tar.extend_from_slice(format!(",\"tarSplitDigest\":\"{digest}\"").as_bytes());
        }
        self.tar.extend_from_slice(b"}\n");
        self.tar.drain(..BLOCK);
        self.tar
    }

    /// The tar, and digest and size of the JSON in it.
    pub(super) fn into_tar(mut self) -> (Vec<u8>, Digest, u64) {
        self.tar.extend_from_slice(b"\n]}\n");
        let json = &self.tar[BLOCK..];
        let (digest, size) = (Digest::of(json), json.len() as u64);
        self.tar[..BLOCK].copy_from_slice(Header::file(TOC_NAME, size).block());
        // The end of the archive: two zero blocks.
        self.tar.resize(self.tar.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
        (self.tar, digest, size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        // Expected values from `date -u -d @SECONDS +%FT%TZ`.
        for (secs, nanos, text) in [
            (0, 0, ""),
            (0, 500_000_000, "1970-01-01T00:00:00.5Z"),
            (1, 0, "1970-01-01T00:00:01Z"),
            (-1, 0, "1969-12-31T23:59:59Z"),
            (-1, 250_000_000, "1969-12-31T23:59:59.25Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (1_735_689_599, 0, "2024-12-31T23:59:59Z"),
            (-62_167_219_200, 0, "0000-01-01T00:00:00Z"),
            (253_402_300_799, 0, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(Timestamp { secs, nanos }).as_deref(), Some(text));
        }
        for secs in [i64::MIN, -62_167_219_201, 253_402_300_800, i64::MAX] {
            assert_eq!(rfc3339(Timestamp { secs, nanos: 0 }), None, "{secs}");
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut date = (-1, 12, 31);
        for days in -719_528..2_932_897 {
            let (year, month, day) = civil(days);
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let expected = match date {
                (year, month, day) if (year, month, day + 1) == civil(days) => (year, month, day + 1),
                (year, 12, 31) => (year + 1, 1, 1),
                (year, month, last) => {
                    assert_eq!(
                        last,
                        [31, 28 + i64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
                            [month as usize - 1]
                    );
                    (year, month + 1, 1)
                }
            };
            assert_eq!((year, month, day), expected);
            date = expected;
        }
        assert_eq!(date, (9999, 12, 31));
    }

    #[test]
    fn what_no_reader_opens_is_not_written() {
        let entry = Entry::chunk("name".to_owned());
        let most = u64::from(Limits::default().entries);
        let mut long = Toc { entries: most - 1, ..Toc::new() };
        long.push(&entry).unwrap();
        assert!(
            matches!(long.push(&entry), Err(Error::Limit { value, limit, .. }) if (value, limit) == (most + 1, most))
        );
        let most = Limits::default().toc_json_bytes;
        let mut large = Toc { tar: vec![0; most as usize], entries: 1 };
        let error = large.push(&entry).unwrap_err();
        assert!(
            matches!(error, Error::Limit { value, limit, .. } if value > most && limit == most),
            "{error}"
        );
    }

    #[test]
    fn text_is_as_go_makes_it() {
        assert_eq!(text("naïve".as_bytes()), "naïve");
        assert_eq!(text(b"a\xe2\x82b\xff"), "a\u{fffd}\u{fffd}b\u{fffd}");
    }

    #[test]
    fn entries_are_written_as_go_writes_them() {
        let mut toc = Toc::new();
        toc.push(&Entry { name: "a<b\"\n".into(), kind: "dir", ..Entry::default() }).unwrap();
        let digest = Some(Digest::of(b""));
        let xattrs =
            BTreeMap::from([("user.b".to_owned(), "Yg==".to_owned()), ("user.a".to_owned(), String::new())]);
        let full = Entry {
            size: 1,
            modtime: "t".into(),
            link_name: "l".into(),
            mode: 2,
            uid: 3,
            gid: 4,
            user_name: "u".into(),
            group_name: "g".into(),
            offset: 5,
            inner_offset: 6,
            dev_major: 7,
            dev_minor: 8,
            xattrs,
            digest,
            chunk_offset: 9,
            chunk_size: 10,
            chunk_digest: digest,
            ..Entry::chunk("f".to_owned())
        };
        toc.push(&full).unwrap();
        let (tar, digest, size) = toc.into_tar();
        let empty = Digest::of(b"");
        let json = format!(
            concat!(
                "{{\"version\":1,\"entries\":[\n",
                r#"{{"name":"a<b\"\n","type":"dir"}},"#,
                "\n",
                r#"{{"name":"f","type":"chunk","size":1,"modtime":"t","linkName":"l","mode":2,"uid":3,"gid":4,"#,
                r#""userName":"u","groupName":"g","offset":5,"innerOffset":6,"devMajor":7,"devMinor":8,"#,
                r#""xattrs":{{"user.a":"","user.b":"Yg=="}},"digest":"{0}","chunkOffset":9,"chunkSize":10,"#,
                r#""chunkDigest":"{0}"}}"#,
                "\n]}}\n",
            ),
            empty
        );
        assert_eq!(str::from_utf8(&tar[BLOCK..][..size as usize]), Ok(&*json));
        assert_eq!(digest, Digest::of(json.as_bytes()));
        assert!(tar.len() % BLOCK == 0 && tar.ends_with(&[0; 2 * BLOCK]));
        let (empty, _, size) = Toc::new().into_tar();
        assert_eq!(&empty[BLOCK..][..size as usize], b"{\"version\":1,\"entries\":[\n]}\n");
    }
}
