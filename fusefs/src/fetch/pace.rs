//! How fast bytes come, and how fast they may.
//!
//! The link is measured as congestion control by model does it: its rate is the highest that was seen lately over any
//! request's life, with the bytes of all requests that were under way meanwhile; its delay is the least that a request
//! lately took beyond what its bytes take at that rate.

use std::{
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use super::scheduler::Room;

/// What a reader may be made to wait, on any link, for bytes that it has not asked for.
const PATIENCE: Duration = Duration::from_millis(5);
/// The furthest a first request reaches ahead on any link, in bytes.
const MOST_AHEAD: u64 = 1 << 20;
/// A link with this delay is empty for most of a reader's request: what is fetched beside it takes little from it.
const FAR: f64 = 0.05;
/// Requests that are remembered: a link that has become slower is seen after as many.
const LATELY: usize = 32;

/// How long what comes takes, measured, and the rate of what is fetched in the background, limited.
#[derive(Debug)]
pub(super) struct Pace {
    limit: Option<NonZero<u64>>,
    /// When the next background request may begin.
    next: Mutex<Instant>,
    /// Compressed bytes of all requests, counted as they come.
    arrived: Arc<AtomicU64>,
    measured: Mutex<Measured>,
}

/// The last requests, in a ring.
#[derive(Debug)]
struct Measured {
    samples: [Option<Sample>; LATELY],
    next: usize,
}

/// One request.
#[derive(Debug, Clone, Copy)]
struct Sample {
    bytes: u64,
    /// What arrived in its time, its own bytes among it.
    arrived: u64,
    seconds: f64,
}

/// A request that has begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    at: Instant,
    arrived: u64,
}

/// What is known of the link.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Link {
    /// Bytes a second.
    rate: f64,
    /// Seconds from asking to the first byte.
    delay: f64,
}

impl Measured {
    fn link(&self) -> Option<Link> {
        let samples = || self.samples.iter().flatten();
        let rate = samples().map(|s| s.arrived as f64 / s.seconds).reduce(f64::max)?;
        let delay = samples().map(|s| (s.seconds - s.bytes as f64 / rate).max(0.0)).reduce(f64::min)?;
        (rate > 0.0).then_some(Link { rate, delay })
    }
}

impl Pace {
    pub(super) fn new(limit: Option<NonZero<u64>>) -> Pace {
        let measured = Mutex::new(Measured { samples: [None; LATELY], next: 0 });
        Pace { limit, next: Mutex::new(Instant::now()), arrived: Arc::default(), measured }
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

    /// The counter that a request's bytes are to be added to as they come.
    pub(super) fn arrived(&self) -> &Arc<AtomicU64> {
        &self.arrived
    }

    /// A request begins.
    pub(super) fn begin(&self) -> Begun {
        Begun { at: Instant::now(), arrived: self.arrived.load(Ordering::Relaxed) }
    }

    /// It has brought its `bytes`.
    pub(super) fn note(&self, begun: Begun, bytes: u64) {
        let arrived = self.arrived.load(Ordering::Relaxed).saturating_sub(begun.arrived);
        let seconds = begun.at.elapsed().as_secs_f64().max(1e-6);
        let mut measured = self.measured.lock();
        let next = measured.next;
        measured.samples[next] = Some(Sample { bytes, arrived, seconds });
        measured.next = (next + 1) % LATELY;
    }

    /// How far to reach beyond a reader's miss: `least` bytes at least, and as many as come in the time a request takes
    /// before its first byte, and in no less than [`PATIENCE`]. Asking for so many more makes it twice as long at most.
    pub(super) fn ahead(&self, least: u64) -> u64 {
        // Who wants nothing ahead gets nothing.
        if least == 0 {
            return 0;
        }
        let link = self.measured.lock().link();
        let bytes = link.map_or(0.0, |link| link.rate * link.delay.max(PATIENCE.as_secs_f64()));
        (bytes as u64).clamp(least, MOST_AHEAD.max(least))
    }

    /// How many requests of `bytes` the link has room for: to keep it busy what it holds twice over, as far as is known, so
    /// that more shows where there is more; and one that comes while another is being asked for.
    pub(super) fn room(&self, bytes: u64) -> Room {
        let link = self.measured.lock().link();
        let holds = link.map_or(0.0, |link| link.rate * link.delay);
        let alone = 1 + (2.0 * holds / bytes.max(1) as f64).ceil().max(1.0) as usize;
        let far = link.is_some_and(|link| link.delay >= FAR);
        Room { alone, beside_readers: if far { alone - 2 } else { 0 } }
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

    const MIB: u64 = 1 << 20;

    /// A link that has carried requests of 2 MiB, `lanes` at a time, and a small one alone.
    async fn measured(rate: f64, delay: Duration, lanes: u64) -> Pace {
        let pace = Pace::new(None);
        for bytes in [2 * MIB, 64 << 10] {
            let lanes = if bytes > MIB { lanes } else { 1 };
            let begun: Vec<Begun> = (0..lanes).map(|_| pace.begin()).collect();
            tokio::time::advance(delay + Duration::from_secs_f64((bytes * lanes) as f64 / rate)).await;
            pace.arrived().fetch_add(bytes * lanes, Ordering::Relaxed);
            begun.into_iter().for_each(|begun| pace.note(begun, bytes));
        }
        pace
    }

    #[tokio::test(start_paused = true)]
    async fn requests_reach_ahead_and_run_beside_each_other_as_the_link_has_room() {
        let ms = Duration::from_millis;
        let unknown = Pace::new(None);
        assert_eq!((unknown.ahead(1000), unknown.ahead(0), unknown.room(2 * MIB).alone), (1000, 0, 2));
        // 200 Mbit/s and 20 ms hold half a megabyte.
        let pace = measured(25e6, ms(20), 4).await;
        assert!(pace.ahead(1000).abs_diff(500_000) < 100_000, "{}", pace.ahead(1000));
        assert_eq!(pace.room(2 * MIB), Room { alone: 2, beside_readers: 0 });
        // 1 Gbit/s and 100 ms hold twelve; with what 4 lanes of 2 MiB have shown of it more are tried.
        let pace = measured(125e6, ms(100), 4).await;
        assert_eq!(pace.ahead(1000), MOST_AHEAD);
        let room = pace.room(2 * MIB);
        assert!((6..=10).contains(&room.alone) && room.beside_readers == room.alone - 2, "{room:?}");
        // A near one is worth the patience for ahead and no more lanes.
        let pace = measured(100e6, ms(0), 1).await;
        assert!(pace.ahead(1000).abs_diff(500_000) < 1000, "{}", pace.ahead(1000));
        assert_eq!(pace.room(2 * MIB).alone, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_that_has_become_slower_is_seen_to_be() {
        let pace = measured(100e6, Duration::ZERO, 1).await;
        for _ in 0..LATELY {
            let begun = pace.begin();
            tokio::time::advance(Duration::from_secs(1)).await;
            pace.arrived().fetch_add(MIB, Ordering::Relaxed);
            pace.note(begun, MIB);
        }
        assert_eq!(pace.ahead(1000), 5242, "5 ms of 1 MiB/s");
    }
}
