//! How fast bytes come, and how fast they may.

use std::{
    num::NonZero,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// Requests of fewer bytes measure the way to the registry, not the link.
const TELLING: u64 = 256 << 10;
/// What a reader may be made to wait for bytes that it has not asked for.
const PATIENCE: Duration = Duration::from_millis(5);
/// The furthest a first request reaches ahead on any link, in bytes.
const MOST_AHEAD: u64 = 1 << 20;

/// The rate of what comes, measured, and of what is fetched in the background, limited.
#[derive(Debug)]
pub(super) struct Pace {
    limit: Option<NonZero<u64>>,
    /// When the next background request may begin.
    next: Mutex<Instant>,
    /// Bytes a second of one request, a moving average; 0 until one was measured.
    rate: AtomicU64,
}

impl Pace {
    pub(super) fn new(limit: Option<NonZero<u64>>) -> Pace {
        Pace { limit, next: Mutex::new(Instant::now()), rate: AtomicU64::new(0) }
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
        if bytes < TELLING {
            return;
        }
        let sample = (bytes as f64 / took.as_secs_f64().max(1e-6)) as u64;
        let before = self.rate.load(Ordering::Relaxed);
        // A race loses a sample.
        let rate = if before == 0 { sample } else { before / 4 * 3 + sample / 4 };
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// How far to reach beyond a reader's miss: `least` bytes, and on a fast link as many as come in a moment.
    pub(super) fn ahead(&self, least: u64) -> u64 {
        let rate = self.rate.load(Ordering::Relaxed);
        let moment = (rate as f64 * PATIENCE.as_secs_f64()) as u64;
        // Who wants nothing ahead gets nothing.
        if least == 0 { 0 } else { moment.clamp(least, MOST_AHEAD.max(least)) }
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
    async fn fast_links_are_reached_ahead_on() {
        let pace = Pace::new(None);
        assert_eq!(pace.ahead(1000), 1000, "nothing is known yet");
        pace.note(100, Duration::from_nanos(1));
        assert_eq!(pace.ahead(1000), 1000, "a short request tells nothing");
        pace.note(1 << 20, Duration::from_millis(100));
        assert_eq!(pace.ahead(1000), 52_428);
        for _ in 0..30 {
            pace.note(2 << 20, Duration::from_millis(2));
        }
        assert_eq!(pace.ahead(1000), MOST_AHEAD);
        assert_eq!(pace.ahead(0), 0);
    }
}
