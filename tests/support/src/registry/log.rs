//! What a server saw and did, request by request.

use std::collections::BTreeMap;
use std::ops::Range;

/// One request and how it was answered so far. Entries are in order of arrival.
#[derive(Clone, Debug)]
pub struct Logged {
    /// Method, upper case.
    pub method: String,
    /// Path without query.
    pub path: String,
    /// Query without `?`, empty if there is none.
    pub query: String,
    /// The `Range` header.
    pub range: Option<RangeAsked>,
    /// Status of the answer; 0 while there is none, for ever if the connection was reset.
    pub status: u16,
    /// Bytes of the request's body that were taken.
    pub bytes_received: u64,
    /// Bytes of the body given to the connection.
    pub bytes_sent: u64,
    /// Whether the whole body was given to the connection.
    pub finished: bool,
    /// The `Authorization` header, not readable any more.
    pub authorization: Option<Authorization>,
    /// All other headers, names in lower case.
    pub headers: BTreeMap<String, String>,
}

impl Logged {
    /// The range asked for if it was one with both ends, end exclusive.
    pub fn single(&self) -> Option<Range<u64>> {
        match &self.range {
            Some(RangeAsked::Single(range)) => Some(range.clone()),
            _ => None,
        }
    }

    /// Whether it asked for content of a blob.
    pub fn is_blob_get(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/")
    }
}

/// A `Range` header by its shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RangeAsked {
    /// `bytes=a-b`, here with the end exclusive.
    Single(Range<u64>),
    /// `bytes=a-`.
    From(u64),
    /// `bytes=-n`.
    Suffix(u64),
    /// Several ranges, verbatim.
    Multi(String),
    /// Anything else, verbatim.
    Invalid(String),
}

impl RangeAsked {
    /// Reads a header. RFC 9110, section 14.
    pub(super) fn parse(header: &str) -> RangeAsked {
        let invalid = || RangeAsked::Invalid(header.to_owned());
        let Some(ranges) = header.strip_prefix("bytes=") else { return invalid() };
        if ranges.contains(',') {
            return RangeAsked::Multi(header.to_owned());
        }
        let Some((first, last)) = ranges.split_once('-') else { return invalid() };
        match (first.parse::<u64>(), last.parse::<u64>()) {
            (Ok(first), Ok(last)) if first <= last && last < u64::MAX => RangeAsked::Single(first..last + 1),
            (Ok(first), Err(_)) if last.is_empty() => RangeAsked::From(first),
            (Err(_), Ok(length)) if first.is_empty() => RangeAsked::Suffix(length),
            _ => invalid(),
        }
    }

    /// The bytes of a content of `size` to answer with: `None` for all of it and status 200, `Some(Err)` if there
    /// are no such bytes.
    pub(super) fn resolve(&self, size: u64) -> Option<Result<Range<u64>, ()>> {
        let range = match self {
            RangeAsked::Single(range) => range.start..range.end.min(size),
            RangeAsked::From(first) => *first..size,
            RangeAsked::Suffix(length) => size.saturating_sub(*length)..size,
            RangeAsked::Multi(_) | RangeAsked::Invalid(_) => return None,
        };
        Some(if range.start < range.end { Ok(range) } else { Err(()) })
    }
}

/// An `Authorization` header by its scheme and a fingerprint of the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// `Basic` or `Bearer`.
    pub scheme: String,
    /// The first 12 hex digits of the credentials' sha256: equal for equal credentials.
    pub fingerprint: String,
}

impl Authorization {
    pub(super) fn of(header: &str) -> Authorization {
        let (scheme, rest) = header.split_once(' ').unwrap_or((header, ""));
        let fingerprint = crate::sha256_hex(rest.as_bytes())[..12].to_owned();
        Authorization { scheme: scheme.to_owned(), fingerprint }
    }
}
