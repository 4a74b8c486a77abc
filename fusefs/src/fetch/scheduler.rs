//! Who may talk to the registry now: a read somebody waits for, then prefetch, then fill.
//!
//! While readers' requests are under way, the background runs few beside them: they use what a reader's round trips leave of
//! the link, and take little of what it needs. Fill waits for prefetch. Both give way for a bounded time only,
//! so that a reader whose registry hangs does not hold up the filling of layers from other registries; and one registry never
//! has all of the places. On-demand requests are never held up here; how many a layer may have is its own affair
//! ([`crate::fetch::Flights`]), for the same reason.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch},
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

/// Background requests beside those of readers. With none a link would be empty during a reader's round trips; each one more
/// takes as much of the link from a reader as it has itself.
const BESIDE: usize = 1;

/// Requests under way, by class.
type Active = [usize; 3];

/// Admits requests in the order of their classes.
#[derive(Debug)]
pub struct Scheduler {
    background: Semaphore,
    active: watch::Sender<Active>,
    /// Places for one registry.
    share: usize,
    registries: Mutex<HashMap<String, Weak<Semaphore>>>,
}

/// The right to have one request under way.
#[derive(Debug)]
pub struct Admission<'a> {
    scheduler: &'a Scheduler,
    class: Class,
    _places: Option<(OwnedSemaphorePermit, SemaphorePermit<'a>)>,
}

impl Scheduler {
    /// With a limit on the requests under way at once for prefetch and fill together. One registry has at most three
    /// quarters of these.
    pub fn new(background: usize) -> Scheduler {
        let background = background.max(1);
        Scheduler {
            background: Semaphore::new(background),
            active: watch::Sender::new([0; 3]),
            share: background - background / 4,
            registries: Mutex::default(),
        }
    }

    /// A reader's request: counted, never held up.
    pub fn admit_reader(&self) -> Admission<'_> {
        self.active.send_modify(|active| active[Class::OnDemand as usize] += 1);
        Admission { scheduler: self, class: Class::OnDemand, _places: None }
    }

    /// A request in the background to a registry, when it is its turn.
    pub async fn admit_background(&self, class: Class, registry: &str) -> Admission<'_> {
        let closed = "the semaphore is never closed";
        let own = self.registry(registry).acquire_owned().await.expect(closed);
        let mut changes = self.active.subscribe();
        let place = self.background.acquire().await.expect(closed);
        let until = Instant::now() + GIVE_WAY;
        let may = |active: &Active| {
            let [readers, prefetch, fill] = *active;
            let prefetched = class == Class::Prefetch || prefetch == 0;
            let room = readers == 0 || prefetch + fill < BESIDE;
            prefetched && room || Instant::now() >= until
        };
        loop {
            // An error says that the time is up.
            let _ = tokio::time::timeout_at(until, changes.wait_for(may)).await;
            // Others have seen the same; only some of them may go on.
            let admitted = self.active.send_if_modified(|active| {
                let admitted = may(active);
                active[class as usize] += usize::from(admitted);
                admitted
            });
            if admitted {
                return Admission { scheduler: self, class, _places: Some((own, place)) };
            }
        }
    }

    fn registry(&self, name: &str) -> Arc<Semaphore> {
        let mut registries = self.registries.lock();
        if let Some(known) = registries.get(name).and_then(Weak::upgrade) {
            return known;
        }
        registries.retain(|_, semaphore| semaphore.strong_count() > 0);
        let semaphore = Arc::new(Semaphore::new(self.share));
        registries.insert(name.to_owned(), Arc::downgrade(&semaphore));
        semaphore
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

    /// As many admissions as are given at once.
    fn admitted<'a>(scheduler: &'a Scheduler, class: Class, registry: &str) -> Vec<Admission<'a>> {
        let mut all = Vec::new();
        while let Some(admission) = scheduler.admit_background(class, registry).now_or_never() {
            all.push(admission);
            assert!(all.len() < 100);
        }
        all
    }

    #[tokio::test(start_paused = true)]
    async fn readers_leave_few_places_and_prefetch_passes_fill() {
        let scheduler = Scheduler::new(8);
        assert_eq!(admitted(&scheduler, Class::Fill, "r").len(), 6, "one registry does not get all");
        let reader = scheduler.admit_reader();
        let beside = admitted(&scheduler, Class::Prefetch, "r");
        assert_eq!(beside.len(), BESIDE);
        drop(reader);
        let mut fill = Box::pin(scheduler.admit_background(Class::Fill, "r"));
        assert!(fill.as_mut().now_or_never().is_none(), "prefetch is still under way");
        drop(admitted(&scheduler, Class::Prefetch, "r"));
        drop(beside);
        assert!(fill.as_mut().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_let_in_one_at_a_time() {
        let scheduler = Scheduler::new(8);
        let _reader = scheduler.admit_reader();
        let beside = admitted(&scheduler, Class::Fill, "r");
        let mut waiting: Vec<_> =
            (0..4).map(|_| Box::pin(scheduler.admit_background(Class::Fill, "r"))).collect();
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        drop(beside);
        let now: Vec<_> = waiting.iter_mut().filter_map(|one| one.as_mut().now_or_never()).collect();
        assert_eq!(now.len(), BESIDE);
    }

    #[tokio::test(start_paused = true)]
    async fn readers_and_registries_that_hang_do_not_stop_the_background_for_ever() {
        let scheduler = Scheduler::new(4);
        let _reader = scheduler.admit_reader();
        let _hanging = admitted(&scheduler, Class::Fill, "hangs");
        let begun = tokio::time::Instant::now();
        let other = scheduler.admit_background(Class::Fill, "other").await;
        assert_eq!(begun.elapsed(), GIVE_WAY);
        let _third = scheduler.admit_background(Class::Fill, "hangs").await;
        let mut fourth = Box::pin(scheduler.admit_background(Class::Fill, "hangs"));
        tokio::time::advance(GIVE_WAY * 2).await;
        assert!(fourth.as_mut().now_or_never().is_none(), "three of four places are taken by it");
        drop(other);
        scheduler.admit_background(Class::Fill, "other").await;
    }
}
