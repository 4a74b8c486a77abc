//! What the head of an answer claims about a range, checked before a byte is believed. Pure.
//!
//! A 206 must be for the range asked for or a beginning of it (servers may cap their answers), of a blob of
//! the known size. A 200 is the whole blob; whether its beginning is skipped is up to the caller. Formats: RFC
//! 9110, sections 14.4 and 15.3.7.

use crate::retry::Cause;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderMap};
use std::ops::Range;

/// A range that starts deeper inside than this is not skipped to in a whole blob: at 100 MB/s it would
/// cost more than 80 ms, and the next range more again.
pub(crate) const SKIP_LIMIT: u64 = 8 << 20;

/// How to read a body that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Bytes before the asked range.
    pub(crate) skip: u64,
    /// Bytes of the asked range that follow.
    pub(crate) take: u64,
    /// The blob's size, if the answer tells.
    pub(crate) total: Option<u64>,
    /// The range was ignored although it was not the whole blob.
    pub(crate) range_ignored: bool,
}

/// Checks the head of an answer to `range`, for a blob of `known` size.
pub(crate) fn check(
    status: StatusCode,
    headers: &HeaderMap,
    range: &Range<u64>,
    known: Option<u64>,
) -> Result<Plan, Cause> {
    let content_range = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    match status {
        StatusCode::PARTIAL_CONTENT => {
            let text = content_range.ok_or_else(|| Cause::Nonsense("206 without Content-Range".into()))?;
            let (sent, total) = parse(text).ok_or_else(|| odd("unusable Content-Range", text))?;
            let sent = sent.ok_or_else(|| odd("206 with an unsatisfied Content-Range", text))?;
            check_size(total, range, known)?;
            if sent.start != range.start || sent.end > range.end {
                return Err(odd("other bytes than asked for: Content-Range", text));
            }
            Ok(Plan { skip: 0, take: sent.end - sent.start, total, range_ignored: false })
        }
        StatusCode::RANGE_NOT_SATISFIABLE => {
            check_size(content_range.and_then(parse).and_then(|(_, total)| total), range, known)?;
            Err(Cause::Nonsense("416 for a range inside the blob".into()))
        }
        _ => {
            let total =
                headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
            check_size(total, range, known)?;
            let whole = range.start == 0 && known.or(total) == Some(range.end);
            Ok(Plan { skip: range.start, take: range.end - range.start, total, range_ignored: !whole })
        }
    }
}

/// A size announced by the host against the known one, or against the range if none is known.
fn check_size(total: Option<u64>, range: &Range<u64>, known: Option<u64>) -> Result<(), Cause> {
    match (total, known) {
        (Some(total), Some(known)) if total != known => {
            Err(Cause::Nonsense(format!("the blob is said to have {total} bytes and should have {known}")))
        }
        (Some(total), None) if range.end > total => {
            Err(Cause::OutOfBounds { range: range.clone(), size: total })
        }
        _ => Ok(()),
    }
}

fn odd(what: &str, header: &str) -> Cause {
    Cause::Nonsense(format!("{what} {:?}", header.chars().take(80).collect::<String>()))
}

/// `bytes 0-9/100`, `bytes 0-9/*` or `bytes */100`, as (range, total).
fn parse(value: &str) -> Option<(Option<Range<u64>>, Option<u64>)> {
    let number = |text: &str| -> Option<u64> {
        text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
    };
    let (unit, rest) = value.trim().split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim().split_once('/')?;
    let total = if total == "*" { None } else { Some(number(total)?) };
    let range = match range {
        "*" => None,
        _ => {
            let (first, last) = range.split_once('-')?;
            let (first, last) = (number(first)?, number(last)?);
            if first > last || total.is_some_and(|total| last >= total) {
                return None;
            }
            Some(first..last.checked_add(1)?)
        }
    };
    Some((range, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_range() {
        for (text, expected) in [
            ("bytes 0-9/100", Some((Some(0..10), Some(100)))),
            ("bytes 0-9/*", Some((Some(0..10), None))),
            ("bytes */100", Some((None, Some(100)))),
            ("Bytes 90-99/100", Some((Some(90..100), Some(100)))),
            ("bytes 90-100/100", None),
            ("bytes 9-0/100", None),
            ("bytes=0-9/100", None),
            ("bytes 0-9", None),
            ("bytes -9/100", None),
            ("bytes +0-9/100", None),
            ("bytes 0-18446744073709551615/*", None),
            ("items 0-9/100", None),
            ("", None),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    fn answer(
        status: u16,
        header: Option<(&'static str, &str)>,
        range: Range<u64>,
        known: Option<u64>,
    ) -> Result<Plan, Cause> {
        let mut headers = HeaderMap::new();
        if let Some((name, value)) = header {
            headers.insert(name, value.parse().unwrap());
        }
        check(StatusCode::from_u16(status).unwrap(), &headers, &range, known)
    }

    #[test]
    fn partial() {
        let exact = Plan { skip: 0, take: 5, total: Some(100), range_ignored: false };
        let range = |value| Some(("content-range", value));
        assert_eq!(answer(206, range("bytes 5-9/100"), 5..10, Some(100)), Ok(exact.clone()));
        assert_eq!(answer(206, range("bytes 5-9/100"), 5..10, None), Ok(exact.clone()));
        assert_eq!(
            answer(206, range("bytes 5-9/*"), 5..10, Some(100)),
            Ok(Plan { total: None, ..exact.clone() })
        );
        for wrong in
            ["bytes 0-4/100", "bytes 4-8/100", "bytes 5-10/100", "bytes 5-9/101", "bytes */100", "nonsense"]
        {
            let outcome = answer(206, range(wrong), 5..10, Some(100));
            assert!(matches!(outcome, Err(Cause::Nonsense(_))), "{wrong}: {outcome:?}");
        }
        assert_eq!(answer(206, range("bytes 5-6/100"), 5..10, Some(100)), Ok(Plan { take: 2, ..exact }));
        assert!(matches!(answer(206, None, 5..10, Some(100)), Err(Cause::Nonsense(_))));
        assert_eq!(
            answer(206, range("bytes 5-7/8"), 5..10, None),
            Err(Cause::OutOfBounds { range: 5..10, size: 8 })
        );
    }

    #[test]
    fn whole() {
        let length = |value| Some(("content-length", value));
        let plan = |skip, take, total, range_ignored| Ok(Plan { skip, take, total, range_ignored });
        assert_eq!(answer(200, length("100"), 0..100, Some(100)), plan(0, 100, Some(100), false));
        assert_eq!(answer(200, length("100"), 0..100, None), plan(0, 100, Some(100), false));
        assert_eq!(answer(200, length("100"), 40..50, Some(100)), plan(40, 10, Some(100), true));
        assert_eq!(answer(200, None, 0..10, None), plan(0, 10, None, true));
        assert!(matches!(answer(200, length("99"), 0..10, Some(100)), Err(Cause::Nonsense(_))));
        assert!(matches!(answer(200, length("5"), 0..10, None), Err(Cause::OutOfBounds { size: 5, .. })));
    }

    #[test]
    fn unsatisfiable() {
        let size = |value| Some(("content-range", value));
        assert!(matches!(answer(416, None, 5..10, Some(100)), Err(Cause::Nonsense(_))));
        assert!(matches!(answer(416, size("bytes */7"), 5..10, Some(100)), Err(Cause::Nonsense(_))));
        assert!(matches!(
            answer(416, size("bytes */7"), 5..10, None),
            Err(Cause::OutOfBounds { size: 7, .. })
        ));
    }
}
