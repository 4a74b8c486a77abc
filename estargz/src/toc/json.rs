//! The JSON document of a TOC, handed on entry by entry.
//!
//! ```json
//! {"version": 1, "entries": [{"name": "bin/", "type": "dir", "mode": 493}, ...]}
//! ```
//!
//! Entries borrow from the text and are not collected, so that a TOC takes no memory twice and the limit on
//! their number stops the parser at the first one too many. Go's encoder, which writes these documents, gives
//! `null` for an empty list; unknown keys are skipped. Meaning is given to the fields in `tree` and `payload`.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::shorten;
use crate::{Digest, Error};

/// One entry as written. Absent fields are empty or 0, as writers omit such values.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Entry<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    pub(super) kind: Cow<'a, str>,
    pub(super) size: i64,
    #[serde(borrow)]
    pub(super) modtime: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) link_name: Cow<'a, str>,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    #[serde(borrow)]
    pub(super) user_name: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) group_name: Cow<'a, str>,
    /// Blob offset of the member that holds the payload.
    pub(super) offset: i64,
    pub(super) inner_offset: i64,
    pub(super) dev_major: i64,
    pub(super) dev_minor: i64,
    /// Names and base64 values, in the order of the document.
    #[serde(borrow)]
    pub(super) xattrs: Xattrs<'a>,
    /// Digest of the whole file.
    #[serde(borrow)]
    pub(super) digest: Cow<'a, str>,
    pub(super) chunk_offset: i64,
    pub(super) chunk_size: i64,
    #[serde(borrow)]
    pub(super) chunk_digest: Cow<'a, str>,
    /// Empty, or `zeros`.
    #[serde(borrow)]
    pub(super) chunk_type: Cow<'a, str>,
}

#[derive(Debug, Default)]
pub(super) struct Xattrs<'a>(pub(super) Vec<(Cow<'a, str>, Cow<'a, str>)>);

/// A text that borrows where it can, also as a key.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Calls `each` for every entry of the document `json`, in order, until it fails. Returns the digest of the tar-split, where
/// the document names one that is one.
///
/// # Errors
///
/// [`Error::BadJson`], or what `each` returned.
pub(super) fn read<'a>(
    json: &'a [u8],
    mut each: impl FnMut(Entry<'a>) -> Result<(), Error>,
) -> Result<Option<Digest>, Error> {
    // Checked here as a whole, which is faster than text by text.
    let json = str::from_utf8(json).map_err(|error| {
        let (line, column) = place(&json[..error.valid_up_to()]);
        Error::BadJson { line, column, why: "not UTF-8".to_owned() }
    })?;
    let mut failed = None;
    let mut json = serde_json::Deserializer::from_str(json);
    let document = Document { each: &mut each, failed: &mut failed };
    let result = document.deserialize(&mut json).and_then(|tar_split| json.end().map(|()| tar_split));
    match (failed, result) {
        (Some(error), _) => Err(error),
        (None, Ok(tar_split)) => Ok(tar_split),
        (None, Err(error)) => {
            let text = error.to_string();
            // The place is a field of its own.
            let why = text.rsplit_once(" at line ").map_or(&*text, |(why, _)| why);
            Err(Error::BadJson { line: error.line(), column: error.column(), why: shorten(why) })
        }
    }
}

/// Line and column of the byte behind `text`.
fn place(text: &[u8]) -> (usize, usize) {
    let line_start = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    let newlines = text.iter().filter(|&&byte| byte == b'\n').count();
    (newlines + 1, text.len() - line_start + 1)
}

/// The top-level object. serde knows only its own errors: one of `each` is put aside in `failed`.
struct Document<'s, F> {
    each: &'s mut F,
    failed: &'s mut Option<Error>,
}

impl<'a, F: FnMut(Entry<'a>) -> Result<(), Error>> DeserializeSeed<'a> for Document<'_, F> {
    type Value = Option<Digest>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a, F: FnMut(Entry<'a>) -> Result<(), Error>> Visitor<'a> for Document<'_, F> {
    type Value = Option<Digest>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TOC: an object with version and entries")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut version, mut seen, mut tar_split) = (None, false, None);
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "version" => version = Some(map.next_value::<i64>()?),
                "entries" if seen => return Err(de::Error::duplicate_field("entries")),
                "entries" => {
                    map.next_value_seed(Entries { each: self.each, failed: self.failed })?;
                    seen = true;
                }
                "tarSplitDigest" => {
                    tar_split =
                        map.next_value::<Option<Text<'a>>>()?.and_then(|Text(text)| text.parse().ok());
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        match version {
            _ if !seen => Err(de::Error::missing_field("entries")),
            Some(1) => Ok(tar_split),
            Some(other) => Err(de::Error::custom(format_args!("TOC version {other} is not supported"))),
            None => Err(de::Error::missing_field("version")),
        }
    }
}

/// The value of `entries`.
struct Entries<'s, F> {
    each: &'s mut F,
    failed: &'s mut Option<Error>,
}

impl<'a, F: FnMut(Entry<'a>) -> Result<(), Error>> DeserializeSeed<'a> for Entries<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'a, F: FnMut(Entry<'a>) -> Result<(), Error>> Visitor<'a> for Entries<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(entry) = seq.next_element()? {
            if let Err(error) = (self.each)(entry) {
                *self.failed = Some(error);
                return Err(de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Xattrs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Xattrs::default())
    }
}

impl<'a> Visitor<'a> for Xattrs<'_> {
    type Value = Xattrs<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of xattr names to base64 values")
    }

    fn visit_unit<E>(self) -> Result<Xattrs<'a>, E> {
        Ok(Xattrs::default())
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Xattrs<'a>, A::Error> {
        let mut xattrs = Vec::new();
        while let Some((Text(name), value)) = map.next_entry::<_, Option<Text<'a>>>()? {
            xattrs.push((name, value.map(|Text(value)| value).unwrap_or_default()));
        }
        Ok(Xattrs(xattrs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(json: &str) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        read(json.as_bytes(), |entry| {
            names.push(format!("{}:{}", entry.kind, entry.name));
            Ok(())
        })?;
        Ok(names)
    }

    #[test]
    fn entries_come_in_order_and_unknown_keys_are_skipped() {
        let json = r#"{ "x": [{}], "entries": [
            {"name": "a", "type": "dir", "unknown": {"deep": [1.5, null]}},
            {"type": "reg", "name": "b\u0026c"}
        ], "version": 1 }
        "#;
        assert_eq!(names(json).unwrap(), ["dir:a", "reg:b&c"]);
    }

    #[test]
    fn texts_are_borrowed_unless_escaped() {
        let json = br#"{"version":1,"entries":[{"name":"plain","linkName":"a\/b",
            "xattrs":{"user.a":"AA==","user.\u0062":null}}]}"#;
        read(json, |entry| {
            assert!(matches!(entry.name, Cow::Borrowed("plain")));
            assert!(matches!(&entry.link_name, Cow::Owned(text) if text == "a/b"));
            assert!(matches!(entry.xattrs.0[0], (Cow::Borrowed("user.a"), Cow::Borrowed("AA=="))));
            assert_eq!(entry.xattrs.0[1], (Cow::Borrowed("user.b"), Cow::Borrowed("")));
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn empty_lists_as_go_writes_them() {
        for json in [
            r#"{"version":1,"entries":null}"#,
            r#"{"version":1,"entries":[]}"#,
            r#"{"entries":[],"version":1}"#,
        ] {
            assert_eq!(names(json).unwrap(), [""; 0], "{json}");
        }
        assert_eq!(names(r#"{"version":1,"entries":[{"xattrs":null}]}"#).unwrap(), [":"]);
    }

    #[test]
    fn the_digest_of_a_tar_split_is_read_if_it_is_one() {
        let digest = Digest::of(b"split");
        let read = |value: &str| {
            let json = format!(r#"{{"version":1,"entries":[],"tarSplitDigest":{value}}}"#);
            read(json.as_bytes(), |_| Ok(()))
        };
        assert_eq!(read(&format!("\"{digest}\"")), Ok(Some(digest)));
        for none in ["null", "\"\"", "\"sha512:00\""] {
            assert_eq!(read(none), Ok(None), "{none}");
        }
        assert!(read("7").is_err());
    }

    #[test]
    fn other_documents_are_errors() {
        let deep = format!(r#"{{"version":1,"x":{}}}"#, "[".repeat(100_000));
        for json in [
            "",
            "null",
            "[]",
            "{}",
            "7",
            r#"{"version":1}"#,
            r#"{"entries":[]}"#,
            r#"{"version":2,"entries":[]}"#,
            r#"{"version":"1","entries":[]}"#,
            r#"{"version":1,"entries":{}}"#,
            r#"{"version":1,"entries":"x"}"#,
            r#"{"version":1,"entries":[7]}"#,
            r#"{"version":1,"entries":[null]}"#,
            r#"{"version":1,"entries":[],"entries":[]}"#,
            r#"{"version":1,"entries":[{"name":"a","name":"b"}]}"#,
            r#"{"version":1,"entries":[{"name":7}]}"#,
            r#"{"version":1,"entries":[{"size":1.5}]}"#,
            r#"{"version":1,"entries":[{"size":9223372036854775808}]}"#,
            r#"{"version":1,"entries":[{"size":"1"}]}"#,
            r#"{"version":1,"entries":[{"xattrs":[]}]}"#,
            r#"{"version":1,"entries":[{"xattrs":{"a":1}}]}"#,
            r#"{"version":1,"entries":[{"name":"\ud800"}]}"#,
            r#"{"version":1,"entries":[{}"#,
            r#"{"version":1,"entries":[]} x"#,
            &deep,
        ] {
            let error = names(json).unwrap_err();
            assert!(matches!(error, Error::BadJson { .. }), "{error}: {}", shorten(json));
        }
        let not_utf8 = read(b"{\"version\":1,\n\"entries\":[{\"name\":\"\xff\"}]}", |_| Ok(()));
        assert_eq!(not_utf8, Err(Error::BadJson { line: 2, column: 21, why: "not UTF-8".to_owned() }));

        let message = names("{\n\"version\": x}").unwrap_err().to_string();
        assert_eq!(message, "TOC JSON, line 2 column 12: expected value; rebuild the layer");
    }

    #[test]
    fn an_error_of_the_callback_stops_the_parser() {
        let json = br#"{"version":1,"entries":[{"name":"a"},{"name":"b"},7"#;
        let mut calls = 0;
        let error = read(json, |entry| {
            calls += 1;
            if entry.name == "b" { Err(Error::entry("b", "no")) } else { Ok(()) }
        });
        assert_eq!(error, Err(Error::entry("b", "no")));
        assert_eq!(calls, 2);
    }
}
