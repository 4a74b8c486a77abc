//! Who may talk to the registry now: a read somebody waits for, then prefetch, then fill.
//!
//! A reader's request is short and comes after another: how long it takes is how long the container takes to start. What is
//! under way in the background when it begins is in its way for as long as that takes on the link. So while a container
//! starts, and a moment after, fill asks for little at a time, and only between readers' requests; of a layer whose builder said
//! what a start needs, it waits altogether, until a container has read for longer than a start takes. Prefetch, which the
//! container will need, runs beside its reads, one request at a time, and between them, as fill does when nobody reads, as many as
//! keep the link busy and no more. Fill waits for prefetch. Both give way for a bounded time only, so that a reader whose registry hangs does not hold up the
//! filling of layers from other registries; and one registry never has all of the places. On-demand requests are never held up
//! here; how many a layer may have is its own affair ([`crate::fetch::Flights`]), for the same reason.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch},
    time::Instant,
};

/// How long a background request gives way to readers none of whose requests ends. These last some round trips; what takes
/// longer than this is slow for a reason that waiting does not mend.
const GIVE_WAY: Duration = Duration::from_secs(1);
/// How long it gives way to others: it is not to starve.
const GIVE_WAY_AT_MOST: Duration = Duration::from_secs(10);

/// After this long without a read a container is taken to have started. Between two reads of one that starts lies what it
/// computes.
const QUIET: Duration = Duration::from_millis(100);

/// After an image was pulled its container's first read is waited for: what a runtime needs to make it.
const PULLED: Duration = Duration::from_millis(300);

/// A container that has read for so long needs more than its builder said.
const STARTING: Duration = Duration::from_secs(2);

/// Why a range is fetched; lower passes higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A reader waits for it.
    OnDemand,
    /// The image's builder said it will be needed, or a reader that reads on will.
    Prefetch,
    /// Everything else.
    Fill,
}

/// What fill does while a container starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtStart {
    /// It waits: what the start needs has been prefetched, the rest would only be in its way.
    Wait,
    /// It takes what readers leave: some of it will be needed.
    TakeLittle,
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
    registries: Mutex<HashMap<String, Weak<Registry>>>,
    born: Instant,
    /// Since when there is reading, and until when it counts, in milliseconds since `born`.
    since: AtomicU64,
    until: AtomicU64,
    /// When a reader's request has ended last, in the same way.
    served: AtomicU64,
}

/// The background's requests to one registry.
#[derive(Debug)]
struct Registry {
    places: Arc<Semaphore>,
    /// One of each class waits for its moment; the others for it, or all would begin when their patience ends.
    turns: [Semaphore; 3],
    /// Under way.
    running: AtomicUsize,
}

/// The right to have one request under way.
#[derive(Debug)]
pub struct Admission<'a> {
    scheduler: &'a Scheduler,
    class: Class,
    background: Option<Background<'a>>,
}

#[derive(Debug)]
struct Background<'a> {
    registry: Arc<Registry>,
    beside: Beside,
    _places: (OwnedSemaphorePermit, SemaphorePermit<'a>),
}

/// What containers do when a request in the background may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// One has begun to read.
    Start,
    /// One has been reading for longer than a start takes.
    Readers,
    /// None reads.
    Nobody,
}

/// What is seen of a container that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Its image was pulled.
    Pulled,
    /// It reads.
    Reads,
}

impl Admission<'_> {
    /// What was found when it was given.
    pub fn beside(&self) -> Beside {
        self.background.as_ref().map_or(Beside::Nobody, |background| background.beside)
    }
}

/// Requests that a registry's link has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// While nobody waits for any.
    pub alone: usize,
    /// Beside those that readers wait for, without taking anything from them.
    pub beside_readers: usize,
}

/// Whether a request in the background may begin now. `running` are those to its registry.
fn may_begin(
    class: Class,
    at_start: AtStart,
    beside: Beside,
    active: Active,
    running: usize,
    room: Room,
) -> bool {
    let [readers, prefetch, _] = active;
    match (class, beside, at_start) {
        (Class::Fill, _, _) if prefetch > 0 => false,
        (Class::Fill, Beside::Start, AtStart::Wait) => false,
        (Class::Fill, Beside::Start | Beside::Readers, _) => {
            readers == 0 && running == 0 || running < room.beside_readers
        }
        _ => running < if readers == 0 { room.alone } else { BESIDE.max(room.beside_readers) },
    }
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
            born: Instant::now(),
            since: AtomicU64::new(0),
            until: AtomicU64::new(0),
            served: AtomicU64::new(0),
        }
    }

    /// A reader's request: counted, never held up.
    pub fn admit_reader(&self) -> Admission<'_> {
        self.note(Sign::Reads);
        self.active.send_modify(|active| active[Class::OnDemand as usize] += 1);
        Admission { scheduler: self, class: Class::OnDemand, background: None }
    }

    /// Milliseconds since `born`.
    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }

    fn at(&self, millis: &AtomicU64) -> Instant {
        self.born + Duration::from_millis(millis.load(Ordering::Relaxed))
    }

    /// A container is about to read, or does.
    pub fn note(&self, sign: Sign) {
        let counts = match sign {
            Sign::Pulled => PULLED,
            Sign::Reads => QUIET,
        };
        let now = self.now();
        let until = now + counts.as_millis() as u64;
        let before = self.until.load(Ordering::Relaxed);
        if before <= now {
            self.since.store(now, Ordering::Relaxed);
        }
        // Mostly it says so already, and a line of the cache stays shared.
        if before < until {
            self.until.fetch_max(until, Ordering::Relaxed);
        }
    }

    /// What containers do now, and when that may be another thing.
    fn beside(&self, now: Instant) -> (Beside, Option<Instant>) {
        let (until, started) = (self.at(&self.until), self.at(&self.since) + STARTING);
        let waited_for = self.active.borrow()[Class::OnDemand as usize] > 0;
        match () {
            () if now >= until && !waited_for => (Beside::Nobody, None),
            () if now >= started => (Beside::Readers, Some(until)),
            () if waited_for => (Beside::Start, Some(started)),
            () => (Beside::Start, Some(until.min(started))),
        }
    }

    /// A request in the background to a registry, when it is its turn and the link has room.
    pub async fn admit_background(
        &self,
        class: Class,
        at_start: AtStart,
        registry: &str,
        room: impl Fn() -> Room,
    ) -> Admission<'_> {
        let closed = "the semaphore is never closed";
        let registry = self.registry(registry);
        let own = registry.places.clone().acquire_owned().await.expect(closed);
        let turn = registry.turns[class as usize].acquire().await.expect(closed);
        let place = self.background.acquire().await.expect(closed);
        let mut changes = self.active.subscribe();
        let begun = Instant::now();
        let beside = loop {
            changes.mark_unchanged();
            let now = Instant::now();
            let until = (begun.max(self.at(&self.served)) + GIVE_WAY).min(begun + GIVE_WAY_AT_MOST);
            let (beside, changes_at) = self.beside(now);
            // Others have seen the same; only some of them may go on.
            let admitted = self.active.send_if_modified(|active| {
                let running = registry.running.load(Ordering::Relaxed);
                let admitted = now >= until || may_begin(class, at_start, beside, *active, running, room());
                if admitted {
                    active[class as usize] += 1;
                    registry.running.fetch_add(1, Ordering::Relaxed);
                }
                admitted
            });
            if admitted {
                break beside;
            }
            let look_again = changes_at.filter(|at| *at > now).map_or(until, |at| at.min(until));
            // An error says that the time is up.
            let _ = tokio::time::timeout_at(look_again, changes.changed()).await;
        };
        drop(turn);
        let background = Some(Background { registry, beside, _places: (own, place) });
        Admission { scheduler: self, class, background }
    }

    fn registry(&self, name: &str) -> Arc<Registry> {
        let mut registries = self.registries.lock();
        if let Some(known) = registries.get(name).and_then(Weak::upgrade) {
            return known;
        }
        registries.retain(|_, registry| registry.strong_count() > 0);
        let registry = Arc::new(Registry {
            places: Arc::new(Semaphore::new(self.share)),
            turns: std::array::from_fn(|_| Semaphore::new(1)),
            running: AtomicUsize::new(0),
        });
        registries.insert(name.to_owned(), Arc::downgrade(&registry));
        registry
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if self.class == Class::OnDemand {
            self.scheduler.served.store(self.scheduler.now(), Ordering::Relaxed);
        }
        self.scheduler.active.send_modify(|active| {
            active[self.class as usize] -= 1;
            if let Some(background) = &self.background {
                background.registry.running.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    const MANY: usize = 100;

    /// On a near link.
    fn room(alone: usize) -> Room {
        Room { alone, beside_readers: 0 }
    }

    /// As many admissions as are given at once.
    fn admitted<'a>(
        scheduler: &'a Scheduler,
        class: Class,
        registry: &str,
        most: usize,
    ) -> Vec<Admission<'a>> {
        let mut all = Vec::new();
        while let Some(admission) =
            scheduler.admit_background(class, AtStart::Wait, registry, || room(most)).now_or_never()
        {
            all.push(admission);
            assert!(all.len() < 100);
        }
        all
    }

    #[test]
    fn fill_waits_for_everybody_and_prefetch_for_few() {
        use AtStart::{TakeLittle, Wait};
        use Beside::{Nobody, Readers, Start};
        use Class::{Fill, Prefetch};
        for (class, at_start, active, beside, running, may) in [
            (Prefetch, Wait, [0, 0, 0], Start, 3, true),
            (Prefetch, Wait, [0, 0, 0], Start, 4, false),
            (Prefetch, Wait, [1, 0, 0], Start, 0, true),
            (Prefetch, Wait, [1, 0, 0], Readers, 1, false),
            (Fill, Wait, [0, 0, 0], Nobody, 3, true),
            (Fill, Wait, [0, 0, 3], Nobody, 4, false),
            (Fill, Wait, [0, 1, 0], Nobody, 0, false),
            (Fill, Wait, [0, 0, 0], Start, 0, false),
            (Fill, TakeLittle, [0, 0, 0], Start, 0, true),
            (Fill, TakeLittle, [0, 0, 1], Start, 1, false),
            (Fill, TakeLittle, [1, 0, 0], Start, 0, false),
            (Fill, Wait, [0, 0, 0], Readers, 0, true),
            (Fill, Wait, [1, 0, 0], Readers, 0, false),
            (Fill, Wait, [0, 0, 1], Readers, 1, false),
        ] {
            assert_eq!(
                may_begin(class, at_start, beside, active, running, room(4)),
                may,
                "{class:?} {active:?} {beside:?} {running}"
            );
        }
    }

    #[test]
    fn on_a_far_link_fill_runs_beside_readers() {
        let far = Room { alone: 6, beside_readers: 4 };
        let may =
            |at_start, beside, running| may_begin(Class::Fill, at_start, beside, [1, 0, 0], running, far);
        assert!(may(AtStart::TakeLittle, Beside::Start, 3) && !may(AtStart::TakeLittle, Beside::Start, 4));
        assert!(may(AtStart::Wait, Beside::Readers, 3) && !may(AtStart::Wait, Beside::Start, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn readers_leave_few_places_and_prefetch_passes_fill() {
        let scheduler = Scheduler::new(8);
        assert_eq!(admitted(&scheduler, Class::Fill, "r", MANY).len(), 6, "one registry does not get all");
        assert_eq!(admitted(&scheduler, Class::Fill, "r", 2).len(), 2, "and no more than its link holds");
        let reader = scheduler.admit_reader();
        let beside = admitted(&scheduler, Class::Prefetch, "r", MANY);
        assert_eq!(beside.len(), BESIDE);
        drop(reader);
        tokio::time::advance(QUIET).await;
        let mut fill = Box::pin(scheduler.admit_background(Class::Fill, AtStart::Wait, "r", || room(MANY)));
        assert!(fill.as_mut().now_or_never().is_none(), "prefetch is still under way");
        drop(admitted(&scheduler, Class::Prefetch, "r", MANY));
        drop(beside);
        assert!(fill.as_mut().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn fill_waits_for_a_start_and_runs_beside_what_reads_on() {
        let scheduler = Scheduler::new(8);
        scheduler.note(Sign::Pulled);
        let begun = Instant::now();
        let first = scheduler.admit_background(Class::Fill, AtStart::Wait, "r", || room(MANY)).await;
        assert_eq!((first.beside(), begun.elapsed()), (Beside::Nobody, PULLED));
        drop(first);
        for _ in 0..STARTING.as_millis() / 50 {
            scheduler.note(Sign::Reads);
            assert!(admitted(&scheduler, Class::Fill, "r", MANY).is_empty());
            tokio::time::advance(Duration::from_millis(50)).await;
        }
        scheduler.note(Sign::Reads);
        let beside = admitted(&scheduler, Class::Fill, "r", MANY);
        assert_eq!(beside.iter().map(Admission::beside).collect::<Vec<_>>(), [Beside::Readers]);
        tokio::time::advance(QUIET).await;
        let then = admitted(&scheduler, Class::Fill, "r", MANY);
        assert_eq!(then[0].beside(), Beside::Nobody);
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_let_in_one_at_a_time() {
        let scheduler = Scheduler::new(8);
        let _reader = scheduler.admit_reader();
        let beside = admitted(&scheduler, Class::Prefetch, "r", MANY);
        let waiting =
            || Box::pin(scheduler.admit_background(Class::Prefetch, AtStart::Wait, "r", || room(MANY)));
        let mut waiting: Vec<_> = (0..4).map(|_| waiting()).collect();
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        drop(beside);
        let now: Vec<_> = waiting.iter_mut().filter_map(|one| one.as_mut().now_or_never()).collect();
        assert_eq!(now.len(), BESIDE);
        // The first was it: their turns come in the order in which they asked.
        drop(waiting.remove(0));
        tokio::time::advance(GIVE_WAY).await;
        let late: Vec<_> = waiting.iter_mut().filter_map(|one| one.as_mut().now_or_never()).collect();
        assert_eq!(late.len(), 1, "the end of patience lets one in, not all");
    }

    #[tokio::test(start_paused = true)]
    async fn readers_and_registries_that_hang_do_not_stop_the_background_for_ever() {
        let scheduler = Scheduler::new(4);
        let _hanging = admitted(&scheduler, Class::Fill, "hangs", 1);
        let reader = scheduler.admit_reader();
        let begun = tokio::time::Instant::now();
        let other = scheduler.admit_background(Class::Fill, AtStart::Wait, "other", || room(MANY)).await;
        assert_eq!(begun.elapsed(), GIVE_WAY, "the reader is never done");
        drop(reader);
        let _second = scheduler.admit_background(Class::Fill, AtStart::Wait, "hangs", || room(1)).await;
        let _third = scheduler.admit_background(Class::Fill, AtStart::Wait, "hangs", || room(1)).await;
        let mut fourth =
            Box::pin(scheduler.admit_background(Class::Fill, AtStart::Wait, "hangs", || room(1)));
        tokio::time::advance(GIVE_WAY * 2).await;
        assert!(fourth.as_mut().now_or_never().is_none(), "three of four places are taken by it");
        drop(other);
        scheduler.admit_background(Class::Fill, AtStart::Wait, "other", || room(MANY)).await;
    }
}
