//! Who may talk to the registry now: a read somebody waits for, then prefetch, then fill.
//!
//! A background request waits while requests of a higher class are under way, and once admitted runs to its end: its
//! ranges are short enough that nobody waits long behind one. It waits for a bounded time only, so that a reader whose
//! registry hangs does not hold up the filling of layers from other registries. On-demand requests are never held up
//! here; how many a layer may have is its own affair ([`crate::fetch::Flights`]), for the same reason.

use std::time::Duration;

use tokio::{
    sync::{Semaphore, SemaphorePermit, watch},
    time::Instant,
};

/// How long a background request gives way. Readers' requests last some round trips; what takes longer than this is
/// slow for a reason that waiting does not mend.
const GIVE_WAY: Duration = Duration::from_secs(1);

/// Why a range is fetched; lower passes higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A reader waits for it.
    OnDemand,
    /// The image's builder said it will be needed.
    Prefetch,
    /// Everything else.
    Fill,
}

/// Requests under way, by class.
type Active = [usize; 3];

/// Admits requests in the order of their classes.
#[derive(Debug)]
pub struct Scheduler {
    background: Semaphore,
    active: watch::Sender<Active>,
}

/// The right to have one request under way.
#[derive(Debug)]
pub struct Admission<'a> {
    scheduler: &'a Scheduler,
    class: Class,
    _permit: Option<SemaphorePermit<'a>>,
}

impl Scheduler {
    /// With a limit on the requests under way at once for prefetch and fill together.
    pub fn new(background: usize) -> Scheduler {
        Scheduler { background: Semaphore::new(background.max(1)), active: watch::Sender::new([0; 3]) }
    }

    /// A reader's request: counted, never held up.
    pub fn admit_reader(&self) -> Admission<'_> {
        self.enter(Class::OnDemand, None)
    }

    /// A request in the background, when it is its turn.
    pub async fn admit_background(&self, class: Class) -> Admission<'_> {
        let mut changes = self.active.subscribe();
        let clear = |active: &Active| active[..class as usize].iter().all(|&n| n == 0);
        let until = Instant::now() + GIVE_WAY;
        loop {
            // An error says that the time is up.
            let _ = tokio::time::timeout_at(until, changes.wait_for(clear)).await;
            let permit = self.background.acquire().await.expect("the semaphore is never closed");
            // While it waited for its place a request of a higher class may have come.
            if clear(&self.active.borrow()) || Instant::now() >= until {
                return self.enter(class, Some(permit));
            }
        }
    }

    fn enter<'a>(&'a self, class: Class, permit: Option<SemaphorePermit<'a>>) -> Admission<'a> {
        self.active.send_modify(|active| active[class as usize] += 1);
        Admission { scheduler: self, class, _permit: permit }
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.scheduler.active.send_modify(|active| active[self.class as usize] -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn readers_pass_prefetch_and_prefetch_passes_fill() {
        let scheduler = Scheduler::new(4);
        let reader = scheduler.admit_reader();
        let mut prefetch = Box::pin(scheduler.admit_background(Class::Prefetch));
        let mut fill = Box::pin(scheduler.admit_background(Class::Fill));
        assert!(prefetch.as_mut().now_or_never().is_none());
        assert!(fill.as_mut().now_or_never().is_none());
        drop(reader);
        let admitted = prefetch.as_mut().now_or_never().expect("nobody reads");
        assert!(fill.as_mut().now_or_never().is_none());
        drop(admitted);
        assert!(fill.as_mut().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_hangs_does_not_stop_the_background_for_ever() {
        let scheduler = Scheduler::new(1);
        let _reader = scheduler.admit_reader();
        let begun = tokio::time::Instant::now();
        let fill = scheduler.admit_background(Class::Fill).await;
        assert_eq!(begun.elapsed(), GIVE_WAY);
        let mut second = Box::pin(scheduler.admit_background(Class::Fill));
        tokio::time::advance(GIVE_WAY * 2).await;
        assert!(second.as_mut().now_or_never().is_none(), "there is one place in the background");
        drop(fill);
        second.await;
    }
}
