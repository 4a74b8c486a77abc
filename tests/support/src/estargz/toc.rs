//! Rows of a TOC and their text as Go's encoder writes it.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

#[derive(Serialize)]
pub(super) struct Toc {
    pub(super) version: u32,
    pub(super) entries: Vec<Row>,
}

/// One TOC entry. Field order and omissions are those of the Go struct, whose every field but name and type is left
/// out when empty.
#[derive(Default, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) size: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) modtime: String,
    #[serde(rename = "linkName", skip_serializing_if = "String::is_empty")]
    pub(super) link_name: String,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) mode: u32,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) uid: u32,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) gid: u32,
    #[serde(rename = "userName", skip_serializing_if = "String::is_empty")]
    pub(super) user_name: String,
    #[serde(rename = "groupName", skip_serializing_if = "String::is_empty")]
    pub(super) group_name: String,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) offset: u64,
    #[serde(rename = "innerOffset", skip_serializing_if = "is_zero")]
    pub(super) inner_offset: u64,
    #[serde(rename = "devMajor", skip_serializing_if = "is_zero")]
    pub(super) dev_major: u32,
    #[serde(rename = "devMinor", skip_serializing_if = "is_zero")]
    pub(super) dev_minor: u32,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) xattrs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) digest: String,
    #[serde(rename = "chunkOffset", skip_serializing_if = "is_zero")]
    pub(super) chunk_offset: u64,
    #[serde(rename = "chunkSize", skip_serializing_if = "is_zero")]
    pub(super) chunk_size: u64,
    #[serde(rename = "chunkDigest", skip_serializing_if = "String::is_empty")]
    pub(super) chunk_digest: String,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// JSON indented by tabs, `<`, `>` and `&` escaped, as Go's encoder does.
pub(crate) fn to_json(value: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::new();
    let tabs = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, tabs);
    value.serialize(&mut serializer).expect("strings and numbers only");
    // these characters stand nowhere but inside strings
    let escaped = String::from_utf8(out).expect("JSON is UTF-8");
    escaped.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026").into_bytes()
}

/// Text as Go's encoder makes it: U+FFFD for each byte that is not part of valid UTF-8.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    let mut out = String::new();
    for part in bytes.utf8_chunks() {
        out.push_str(part.valid());
        out.extend(part.invalid().iter().map(|_| '\u{fffd}'));
    }
    out
}

/// The name of an id when it is not the one told last for it, else nothing.
pub(super) fn changed(last: &mut HashMap<u32, String>, id: u32, name: &str) -> String {
    if name.is_empty() || last.get(&id).is_some_and(|told| told == name) {
        return String::new();
    }
    last.insert(id, name.to_owned());
    name.to_owned()
}

/// A time as RFC 3339 in UTC, rounded to seconds; nothing for the epoch itself.
pub(crate) fn rfc3339((secs, nanos): (i64, u32)) -> String {
    if secs == 0 {
        return String::new();
    }
    let secs = secs + i64::from(nanos >= 500_000_000);
    let (day, second) = (secs.div_euclid(86_400), secs.rem_euclid(86_400));
    // days to civil date, in 400 year eras that begin on 1 March
    let shifted = day + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day_of_month:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc3339() {
        for (time, text) in [
            ((0, 5), ""),
            ((1, 0), "1970-01-01T00:00:01Z"),
            ((-1, 0), "1969-12-31T23:59:59Z"),
            ((951_782_399, 600_000_000), "2000-02-29T00:00:00Z"),
            ((4_102_444_800, 0), "2100-01-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(time), text);
        }
        assert_eq!(lossy(b"a\xe2\x82b\xff\xc3\xa9"), "a\u{fffd}\u{fffd}b\u{fffd}é");
    }
}
