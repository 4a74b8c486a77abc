//! pax records: `<length> <key>=<value>\n`, the length counting itself.
//!
//! Source: POSIX.1-2017 pax(1), "pax Extended Header". Later records win over earlier ones of the same key; an empty
//! value means that the header's own field counts.

use super::header::Why;
use crate::Timestamp;

/// Records in their order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Records(Vec<(Vec<u8>, Vec<u8>)>);

impl Records {
    /// # Errors
    ///
    /// If `body` is not made of records, or one holds a NUL where a name belongs.
    pub(super) fn parse(mut body: &[u8]) -> Result<Self, Why> {
        let mut records = Vec::new();
        while !body.is_empty() {
            let (key, value, rest) = record(body).ok_or("a pax record of it is malformed")?;
            let named = match key {
                b"path" | b"linkpath" | b"uname" | b"gname" => value,
                _ => key,
            };
            if named.contains(&0) {
                return Err("a pax record of it holds NUL in a name".into());
            }
            records.push((key.to_vec(), value.to_vec()));
            body = rest;
        }
        Ok(Records(records))
    }

    /// All records in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().map(|(key, value)| (&key[..], &value[..]))
    }

    /// The value of `key`, unless it is empty.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        let last = self.0.iter().rev().find(|(other, _)| other == key.as_bytes())?;
        Some(&last.1[..]).filter(|value| !value.is_empty())
    }

    /// The value of `key` as an integer, if there is one.
    pub(super) fn integer(&self, key: &str) -> Result<Option<i64>, Why> {
        let bad = || format!("its pax record {key} is not a number").into();
        self.get(key).map(|value| decimal(value).ok_or_else(bad)).transpose()
    }

    /// The value of `key` as a time, if there is one.
    pub(super) fn time(&self, key: &str) -> Result<Option<Timestamp>, Why> {
        let bad = || format!("its pax record {key} is not a time").into();
        self.get(key).map(|value| time(value).ok_or_else(bad)).transpose()
    }

    /// Appends a record to `body`.
    pub(super) fn write(body: &mut Vec<u8>, key: &[u8], value: &[u8]) {
        let rest = key.len() + value.len() + 3; // blank, '=' and newline
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        for part in [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"] {
            body.extend_from_slice(part);
        }
    }
}

/// Splits off the first record.
fn record(body: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = body.iter().take(20).position(|&byte| byte == b' ')?;
    let len = usize::try_from(decimal(&body[..blank])?).ok()?;
    let (record, rest) = body.split_at_checked(len)?;
    let text = record.get(blank + 1..)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|&byte| byte == b'=')?;
    (equals > 0).then_some((&text[..equals], &text[equals + 1..], rest))
}

/// Decimal digits, perhaps with a minus sign.
pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with a fraction of any length, of which nine digits count.
fn time(text: &[u8]) -> Option<Timestamp> {
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let whole = parts.next()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let secs = decimal(whole)?;
    let digits = fraction.iter().map(|byte| u32::from(byte - b'0')).chain(std::iter::repeat(0));
    let nanos = digits.take(9).fold(0, |nanos, digit| nanos * 10 + digit);
    if whole.starts_with(b"-") && nanos > 0 {
        return Some(Timestamp { secs: secs.checked_sub(1)?, nanos: 1_000_000_000 - nanos });
    }
    Some(Timestamp { secs, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip() {
        let long = [b'x'; 95];
        let pairs: [(&[u8], &[u8]); 6] = [
            (b"path", b"a/b"),
            (b"SCHILY.xattr.user.a", b"\0=\n\xff"),
            (b"size", b""),
            (b"k", b"12345"), // 11 bytes, and 9 digits fewer would be 10
            (b"c", &long),
            (b"path", b"last"),
        ];
        let mut body = Vec::new();
        for (key, value) in pairs {
            Records::write(&mut body, key, value);
        }
        assert!(body.starts_with(b"12 path=a/b\n"));
        let records = Records::parse(&body).unwrap();
        assert_eq!(records.iter().collect::<Vec<_>>(), pairs);
        assert_eq!(records.get("path"), Some(&b"last"[..]));
        assert_eq!(records.get("size"), None);
        assert_eq!(records.integer("size"), Ok(None));
        assert_eq!(records.integer("k"), Ok(Some(12345)));
        assert!(records.integer("path").is_err());
    }

    #[test]
    fn malformed_records() {
        for body in [
            &b"x"[..],
            b"6 a=b",
            b"7 a=b\n",
            b"5 a=b\n",
            b"6 a=b\nx",
            b"6 ab \n",
            b"5 =b\n",
            b"-6 a=b\n",
            b"+6 a=b\n",
            b" 6 a=b\n",
            b"0 ",
            b"99999999999999999999 a=b\n",
            b"13 path=a\0bc\n",
            b"7 \0a=b\n",
        ] {
            assert!(Records::parse(body).is_err(), "{}", body.escape_ascii());
        }
        assert!(Records::parse(b"6 a=b\n").is_ok() && Records::parse(b"006 a=b\n").is_err());
        assert!(Records::parse(b"8 a=b\0c\n").is_ok());
    }

    #[test]
    fn times() {
        for (text, secs, nanos) in [
            ("0", 0, 0),
            ("1350244992.023960108", 1_350_244_992, 23_960_108),
            ("1.5", 1, 500_000_000),
            ("1.", 1, 0),
            ("1.0000000009", 1, 0),
            ("-1", -1, 0),
            ("-1.75", -2, 250_000_000),
            ("-0.25", -1, 750_000_000),
        ] {
            assert_eq!(time(text.as_bytes()), Some(Timestamp { secs, nanos }), "{text}");
        }
        for text in ["", ".5", "1.5.5", "1.x", "x", "1e3", "+1", "1.-5", "9223372036854775808"] {
            assert_eq!(time(text.as_bytes()), None, "{text}");
        }
    }
}
