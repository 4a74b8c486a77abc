//! Who may talk to the registry now: a read somebody waits for, then prefetch, then fill.
//!
//! A background request waits until no request of a higher class is under way, and once admitted runs to its end:
//! its ranges are short enough that nobody waits long behind one. On-demand requests never wait for a background
//! one, only for each other, and only beyond a number that no node reaches in ordinary life.

use tokio::sync::{Semaphore, SemaphorePermit, watch};

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
    on_demand: Semaphore,
    background: Semaphore,
    active: watch::Sender<Active>,
}

/// The right to have one request under way.
#[derive(Debug)]
pub struct Admission<'a> {
    scheduler: &'a Scheduler,
    class: Class,
    _permit: SemaphorePermit<'a>,
}

impl Scheduler {
    /// With limits on the requests under way at once for readers, and for prefetch and fill together.
    pub fn new(on_demand: usize, background: usize) -> Scheduler {
        Scheduler {
            on_demand: Semaphore::new(on_demand.max(1)),
            background: Semaphore::new(background.max(1)),
            active: watch::Sender::new([0; 3]),
        }
    }

    /// Waits for its turn.
    pub async fn admit(&self, class: Class) -> Admission<'_> {
        // A reader counts from the moment it asks, so that nothing in the background starts before it.
        let waiting = (class == Class::OnDemand).then(|| self.enter(class));
        let semaphore = if class == Class::OnDemand { &self.on_demand } else { &self.background };
        loop {
            let permit = semaphore.acquire().await.expect("the semaphore is never closed");
            let clear = |active: &Active| active[..class as usize].iter().all(|&n| n == 0);
            if class == Class::OnDemand || clear(&self.active.borrow()) {
                if waiting.is_none() {
                    self.active.send_modify(|active| active[class as usize] += 1);
                }
                std::mem::forget(waiting);
                return Admission { scheduler: self, class, _permit: permit };
            }
            drop(permit);
            let mut changes = self.active.subscribe();
            let _ = changes.wait_for(clear).await;
        }
    }

    fn enter(&self, class: Class) -> Leave<'_> {
        self.active.send_modify(|active| active[class as usize] += 1);
        Leave { scheduler: self, class }
    }

    fn leave(&self, class: Class) {
        self.active.send_modify(|active| active[class as usize] -= 1);
    }
}

/// Takes a count back when a waiting reader gives up.
struct Leave<'a> {
    scheduler: &'a Scheduler,
    class: Class,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.scheduler.leave(self.class);
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.scheduler.leave(self.class);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn readers_pass_prefetch_and_prefetch_passes_fill() {
        let scheduler = Arc::new(Scheduler::new(8, 1));
        let reader = scheduler.admit(Class::OnDemand).await;
        let mut prefetch = Box::pin(scheduler.admit(Class::Prefetch));
        let mut fill = Box::pin(scheduler.admit(Class::Fill));
        assert!(prefetch.as_mut().now_or_never().is_none());
        assert!(fill.as_mut().now_or_never().is_none());
        let second = scheduler.admit(Class::OnDemand).now_or_never().expect("readers do not wait");
        drop((reader, second));
        let admitted = prefetch.await;
        assert!(fill.as_mut().now_or_never().is_none());
        assert!(scheduler.admit(Class::OnDemand).now_or_never().is_some(), "nor behind the background");
        drop(admitted);
        fill.await;
    }

    #[tokio::test]
    async fn a_reader_that_gives_up_waiting_frees_the_background() {
        let scheduler = Scheduler::new(1, 1);
        let first = scheduler.admit(Class::OnDemand).await;
        assert!(scheduler.admit(Class::OnDemand).now_or_never().is_none());
        drop(first);
        assert!(scheduler.admit(Class::Fill).now_or_never().is_some());
    }
}
