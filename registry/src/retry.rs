//! What a failure means and what to do next. Pure: clocks, randomness and sleeping are the caller's.
//!
//! A [`Cause`] is one host's failure at one attempt. Some are final for this read and host (there is no such
//! blob), others may pass (a 503). Within a round the next host is tried at once; [`decide`] says how long
//! to wait before all hosts are tried again, or that the read is lost.

use crate::Error;
use crate::digest::Digest;
use reqwest::StatusCode;
use std::fmt;
use std::ops::Range;
use std::time::{Duration, SystemTime};

/// Why one host did not deliver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Refused with fresh credentials. `host` may be the target of a redirect.
    Denied { host: String, tried: String },
    /// No such object there.
    Missing,
    /// The answer contradicts the request.
    Nonsense(String),
    /// A whole blob was sent where a range deep inside was asked for.
    RangeIgnored,
    /// The bytes have this digest.
    Mismatch(Digest),
    /// More bytes than allowed.
    TooLarge { size: u64, limit: u64 },
    /// The blob turns out to have only `size` bytes.
    OutOfBounds { range: Range<u64>, size: u64 },
    /// The host has forgotten an upload.
    Lost(String),
    /// A time limit passed.
    Silent(String),
    /// Cannot serve now; `hold` is the wait it asked for.
    Down { why: String, hold: Option<Duration> },
}

impl Cause {
    pub(crate) fn down(why: impl Into<String>) -> Self {
        Self::Down { why: why.into(), hold: None }
    }

    /// Whether asking the same host again in this read is pointless.
    pub(crate) fn is_final(&self) -> bool {
        !matches!(self, Self::Silent(_) | Self::Down { .. })
    }

    /// The public error, with the names a reader of it needs.
    pub(crate) fn into_error(self, what: String, repository: &str, host: &str) -> Error {
        let host = host.to_owned();
        match self {
            Self::Denied { host, tried } => {
                Error::AuthDenied { host, repository: repository.to_owned(), tried }
            }
            Self::Missing => Error::NotFound { what, host },
            Self::Nonsense(why) => Error::BadResponse { what, host, why },
            Self::RangeIgnored => Error::RangeIgnored { what, host },
            Self::Mismatch(actual) => Error::DigestMismatch { what, host, actual: actual.to_string() },
            Self::TooLarge { size, limit } => Error::TooLarge { what, size, limit },
            Self::OutOfBounds { range, size } => Error::OutOfBounds { what, range, size },
            Self::Lost(why) => Error::UploadLost { what, host, why },
            Self::Silent(why) => Error::Timeout { what, host, why },
            Self::Down { why, .. } => Error::Unavailable { what, host, why },
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied { host, tried } => write!(f, "auth failed at {host} (tried: {tried})"),
            Self::Missing => f.write_str("not found"),
            Self::Nonsense(why) => write!(f, "bad response: {why}"),
            Self::RangeIgnored => f.write_str("ignores ranges"),
            Self::Mismatch(actual) => write!(f, "sent bytes with digest {actual}"),
            Self::TooLarge { size, limit } => write!(f, "{size} bytes, more than {limit}"),
            Self::OutOfBounds { size, .. } => write!(f, "the blob has only {size} bytes"),
            Self::Lost(why) | Self::Silent(why) | Self::Down { why, .. } => f.write_str(why),
        }
    }
}

/// What a status says, apart from its headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Deliver,
    Redirect,
    /// Log in (again). 403 counts: some registries answer it, without a challenge, for an expired token.
    Refused,
    Missing,
    Later,
    Nonsense,
}

/// The meaning of an answer to a GET.
pub(crate) fn classify(status: StatusCode) -> Verdict {
    match status.as_u16() {
        200 | 206 => Verdict::Deliver,
        301 | 302 | 303 | 307 | 308 => Verdict::Redirect,
        401 | 403 => Verdict::Refused,
        404 | 410 => Verdict::Missing,
        408 | 425 | 429 | 500..=599 => Verdict::Later,
        _ => Verdict::Nonsense,
    }
}

/// `Retry-After` (RFC 9110, section 10.2.3): seconds or an HTTP date, which lies `now` or later.
pub(crate) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// Exponential back-off: `min * 2^attempt`, at most `max`, scaled to 50-100% by `jitter` in `0..1` so that
/// readers that failed together do not return together.
pub(crate) fn backoff(attempt: u32, min: Duration, max: Duration, jitter: f64) -> Duration {
    let full = min.saturating_mul(1u32.checked_shl(attempt).unwrap_or(u32::MAX)).min(max);
    full.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// How often and how fast to try again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) retries: u32,
    pub(crate) backoff_min: Duration,
    pub(crate) backoff_max: Duration,
}

/// A round over all hosts that delivered nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    /// 0 for the first.
    pub(crate) number: u32,
    /// The shortest wait asked for, if every host worth asking asked for one.
    pub(crate) hold: Option<Duration>,
    /// Time to the deadline.
    pub(crate) remaining: Duration,
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Wait(Duration),
    GiveUp,
}

/// Waits at most half of the time that is left, so that the last chance is not slept through; a wait that a
/// host asked for is not shortened, and given up when it is too long.
pub(crate) fn decide(round: Round, policy: &Policy, jitter: f64) -> Next {
    if round.number >= policy.retries || round.remaining.is_zero() {
        return Next::GiveUp;
    }
    match round.hold {
        Some(hold) if hold < round.remaining => Next::Wait(hold),
        Some(_) => Next::GiveUp,
        None => {
            let wanted = backoff(round.number, policy.backoff_min, policy.backoff_max, jitter);
            let wait = wanted.min(round.remaining / 2);
            if wait < wanted.min(policy.backoff_min / 2) { Next::GiveUp } else { Next::Wait(wait) }
        }
    }
}

/// The time one host may take out of what `remaining` holds for it and the `others` after it: a silent
/// mirror must leave time for the origin.
pub(crate) fn share(remaining: Duration, others: usize) -> Duration {
    remaining / u32::try_from(others + 1).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn retry_after_forms() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        for (value, expected) in [
            ("0", Some(Duration::ZERO)),
            ("120", Some(120 * S)),
            (" 3 ", Some(3 * S)),
            ("Wed, 21 Oct 2015 07:28:30 GMT", Some(30 * S)),
            ("Wednesday, 21-Oct-15 07:28:30 GMT", Some(30 * S)),
            ("Wed, 21 Oct 2015 07:00:00 GMT", Some(Duration::ZERO)),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(retry_after(value, now), expected, "{value:?}");
        }
    }

    #[test]
    fn backoff_doubles_is_capped_and_jittered() {
        assert_eq!(backoff(0, S, 60 * S, 1.0), S);
        assert_eq!(backoff(0, S, 60 * S, 0.0), S / 2);
        assert_eq!(backoff(3, S, 60 * S, 1.0), 8 * S);
        assert_eq!(backoff(3, S, 60 * S, 0.5), 6 * S);
        assert_eq!(backoff(6, S, 60 * S, 1.0), 60 * S);
        assert_eq!(backoff(u32::MAX, S, 60 * S, 1.0), 60 * S);
        assert_eq!(backoff(40, Duration::MAX, Duration::from_secs(9), 1.0), 9 * S);
    }

    #[test]
    fn decisions_after_a_round() {
        let policy = Policy { retries: 3, backoff_min: S, backoff_max: 30 * S };
        for (number, hold, remaining, expected) in [
            (0, None, 100 * S, Next::Wait(S)),
            (2, None, 100 * S, Next::Wait(4 * S)),
            (3, None, 100 * S, Next::GiveUp),
            (2, None, 6 * S, Next::Wait(3 * S)),
            (2, None, S / 2, Next::GiveUp),
            (0, None, Duration::ZERO, Next::GiveUp),
            (0, Some(5 * S), 100 * S, Next::Wait(5 * S)),
            (0, Some(Duration::ZERO), 100 * S, Next::Wait(Duration::ZERO)),
            (0, Some(5 * S), 5 * S, Next::GiveUp),
        ] {
            let round = Round { number, hold, remaining };
            assert_eq!(decide(round, &policy, 1.0), expected, "{round:?}");
        }
    }

    #[test]
    fn statuses() {
        for (status, verdict) in [
            (200, Verdict::Deliver),
            (206, Verdict::Deliver),
            (307, Verdict::Redirect),
            (304, Verdict::Nonsense),
            (401, Verdict::Refused),
            (403, Verdict::Refused),
            (404, Verdict::Missing),
            (410, Verdict::Missing),
            (416, Verdict::Nonsense),
            (400, Verdict::Nonsense),
            (429, Verdict::Later),
            (503, Verdict::Later),
        ] {
            assert_eq!(classify(StatusCode::from_u16(status).unwrap()), verdict, "{status}");
        }
    }

    #[test]
    fn time_is_shared_with_the_hosts_still_to_come() {
        assert_eq!(share(30 * S, 0), 30 * S);
        assert_eq!(share(30 * S, 2), 10 * S);
    }
}
