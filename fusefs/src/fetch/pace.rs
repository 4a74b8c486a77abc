//! How fast bytes come, and how fast they may.

use std::{num::NonZero, time::Duration};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// Requests of up to as many bytes count as short, and those of at least `LONG` as long ones: what lies between tells the delay
/// from the rate no better.
const SHORT: u64 = 768 << 10;
const LONG: u64 = 1 << 20;
/// What a reader may be made to wait, on any link, for bytes that it has not asked for.
const PATIENCE: Duration = Duration::from_millis(5);
/// The furthest a first request reaches ahead on any link, in bytes.
const MOST_AHEAD: u64 = 1 << 20;

/// How long what comes takes, measured, and the rate of what is fetched in the background, limited.
#[derive(Debug)]
pub(super) struct Pace {
    limit: Option<NonZero<u64>>,
    /// When the next background request may begin.
    next: Mutex<Instant>,
    measured: Mutex<Measured>,
}

/// Moving averages of requests; `None` until there was one.
#[derive(Debug, Default, Clone, Copy)]
struct Measured {
    short: Option<Average>,
    long: Option<Average>,
}

#[derive(Debug, Clone, Copy)]
struct Average {
    bytes: f64,
    seconds: f64,
}

impl Average {
    fn note(before: Option<Average>, bytes: u64, took: Duration) -> Option<Average> {
        let sample = Average { bytes: bytes as f64, seconds: took.as_secs_f64().max(1e-6) };
        let mix = |old: f64, new: f64| old * 0.75 + new * 0.25;
        Some(before.map_or(sample, |old| Average {
            bytes: mix(old.bytes, sample.bytes),
            seconds: mix(old.seconds, sample.seconds),
        }))
    }
}

impl Measured {
    /// Bytes that come in the time a request takes before its first byte, and in no less than [`PATIENCE`]: asking for so
    /// many more makes it twice as long at most.
    fn ahead(&self) -> Option<f64> {
        let long = self.long?;
        let (rate, delay) = match self.short {
            Some(short) if long.seconds > short.seconds && long.bytes > short.bytes => {
                let rate = (long.bytes - short.bytes) / (long.seconds - short.seconds);
                (rate, (short.seconds - short.bytes / rate).max(0.0))
            }
            _ => (long.bytes / long.seconds, 0.0),
        };
        Some(rate * delay.max(PATIENCE.as_secs_f64()))
    }
}

impl Pace {
    pub(super) fn new(limit: Option<NonZero<u64>>) -> Pace {
        Pace { limit, next: Mutex::new(Instant::now()), measured: Mutex::default() }
    }

    /// Waits until `bytes` more may be fetched in the background.
    pub(super) async fn admit(&self, bytes: u64) {
        let Some(limit) = self.limit else { return };
        let begin = {
            let mut next = self.next.lock();
            let begin = (*next).max(Instant::now());
            *next = begin + Duration::from_secs_f64(bytes as f64 / limit.get() as f64);
            begin
        };
        sleep_until(begin).await;
    }

    /// A request has brought `bytes`.
    pub(super) fn note(&self, bytes: u64, took: Duration) {
        let mut measured = self.measured.lock();
        match bytes {
            0..=SHORT => measured.short = Average::note(measured.short, bytes, took),
            LONG.. => measured.long = Average::note(measured.long, bytes, took),
            _ => {}
        }
    }

    /// How far to reach beyond a reader's miss: `least` bytes at least.
    pub(super) fn ahead(&self, least: u64) -> u64 {
        // Who wants nothing ahead gets nothing.
        if least == 0 {
            return 0;
        }
        let measured = *self.measured.lock();
        measured.ahead().map_or(least, |bytes| (bytes as u64).clamp(least, MOST_AHEAD.max(least)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_background_keeps_to_its_rate_from_the_first_byte_on() {
        let begun = Instant::now();
        let pace = Pace::new(NonZero::new(1_000_000));
        for _ in 0..5 {
            pace.admit(500_000).await;
        }
        assert_eq!(begun.elapsed(), Duration::from_secs(2), "the fifth begins when four have had their time");
        Pace::new(None).admit(u64::MAX).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(2));
    }

    #[tokio::test]
    async fn a_request_reaches_as_far_ahead_as_its_delay_is_worth() {
        let ms = Duration::from_millis;
        let ahead = |short: Duration, long: Duration| {
            let pace = Pace::new(None);
            assert_eq!(pace.ahead(1000), 1000, "nothing is known yet");
            for _ in 0..40 {
                pace.note(250_000, short);
                pace.note(2_250_000, long);
            }
            pace.ahead(1000)
        };
        // 25 MB/s and 20 ms; 1 GB/s and 8 ms; 100 MB/s at once.
        assert!(ahead(ms(30), ms(110)).abs_diff(500_000) < 100);
        assert_eq!(ahead(Duration::from_micros(8250), Duration::from_micros(10_250)), MOST_AHEAD);
        assert!(ahead(Duration::from_micros(2500), Duration::from_micros(22_500)).abs_diff(500_000) < 100);
        // Contradictions come to no more than the rate of long requests.
        assert!(ahead(ms(100), ms(50)) <= 225_001);
        let pace = Pace::new(None);
        pace.note(2 << 20, ms(1));
        assert_eq!((pace.ahead(1000), pace.ahead(0)), (MOST_AHEAD, 0));
    }
}
