//! What is fetched before anybody asks for it: one request after the other, several at a time.
//!
//! Owns: where in a layer the background goes on. First the range that the builder marked, then whatever a container is
//! reading (from its last miss onwards, so that a sequential reader finds the download ahead of itself), then all the rest
//! in the order of the blob.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use estargz::Digest;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::{
    AtStart, Beside, Claim, Class, FetchError, Need, Shape, View, claim, download, fetch_range, plan,
    priority, recheck, reserve, run,
};
use crate::layer::Layer;

/// How far the background follows one miss before it goes back to the order of the blob, in bytes: a few seconds of a
/// slow link. A reader that is still there misses again, or waits for a download that has begun.
const FOLLOW: u64 = 32 << 20;

/// Where a layer's background work is.
#[derive(Debug, Default)]
pub struct Position {
    /// The next member in the order of the blob.
    next: Mutex<u32>,
    /// One more than the member a reader has missed last; 0 once it was taken note of.
    missed: AtomicU64,
    /// Where following it goes on, and up to which byte of the blob.
    following: Mutex<Option<(u32, u64)>>,
    /// Whether the builder said what a start needs.
    profiled: AtomicBool,
    /// Whether everything is fetched sooner or later: then what a reader will want next is.
    filled: AtomicBool,
    /// Whether the last miss was one of a reader that reads on.
    reads_on: AtomicBool,
}

impl Position {
    /// A reader has missed something, and the member behind it comes next; all the more if it is reading on.
    pub(super) fn missed(&self, behind: u32, reads_on: bool) {
        self.missed.store(u64::from(behind) + 1, Ordering::Relaxed);
        self.reads_on.store(reads_on, Ordering::Relaxed);
    }

    /// Goes back to the beginning, for what failed.
    pub fn rewind(&self) {
        *self.next.lock() = 0;
    }

    /// The builder said what a start needs.
    pub fn set_profiled(&self) {
        self.profiled.store(true, Ordering::Relaxed);
    }

    /// Everything is fetched.
    pub fn set_filled(&self) {
        self.filled.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub(super) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Relaxed)
    }

    fn at_start(&self) -> AtStart {
        if self.profiled.load(Ordering::Relaxed) { AtStart::Wait } else { AtStart::TakeLittle }
    }

    /// Whether a container will most likely need what comes next here.
    fn is_awaited(&self) -> bool {
        self.reads_on.load(Ordering::Relaxed)
            && (self.missed.load(Ordering::Relaxed) != 0 || self.following.lock().is_some())
    }
}

/// What one step in the background did.
#[derive(Debug)]
pub enum Step {
    /// Nothing is missing that nobody fetches.
    Done,
    /// Some members are stored, under way elsewhere, or failed with the error.
    Advanced(Option<Arc<FetchError>>),
    /// The disk is full.
    NoSpace,
}

/// Fetches one request's worth of missing members below `until`, as soon as its class may.
pub async fn background(layer: &Arc<Layer>, position: &Position, until: u32, class: Class) -> Step {
    let engine = layer.engine().clone();
    let urgency = if position.is_awaited() { Class::Prefetch } else { class };
    let room = || engine.pace.room(engine.config.background_request);
    let admission =
        engine.scheduler.admit_background(urgency, position.at_start(), &layer.sources().host(), room).await;
    let size = match (urgency, admission.beside()) {
        // No more than comes in a round trip: a reader who comes now waits no longer than that.
        (Class::Fill, Beside::Start | Beside::Readers) => {
            engine.pace.ahead(engine.config.shape.ahead).clamp(1, engine.config.background_request)
        }
        _ => engine.config.background_request,
    };
    let shape = Shape { gap: engine.config.shape.gap, max_request: size, ahead: 0 };
    // Before anything is claimed: what is claimed must be under way, or a reader who joins waits for nothing.
    let _memory = reserve(&engine.memory, &engine.config, size).await;
    if !engine.cache.has_room(1) {
        return Step::NoSpace;
    }
    let need = if class == Class::Fill { Need::Headers } else { Need::Chunks };
    let batch = next_batch(layer, position, until, need, size);
    if batch.is_empty() {
        return Step::Done;
    }
    recheck(layer, &batch).await;
    // Nothing is claimed yet: a reader who needs it now does not wait for its turn.
    let bytes = batch.iter().map(|&m| fetch_range(layer, m)).map(|bytes| bytes.end - bytes.start).sum();
    engine.pace.admit(bytes).await;
    let deadline = Instant::now() + engine.config.background_deadline;
    let requests = {
        let flights = layer.flights().table.lock();
        plan::requests(&batch, &View { layer, flights: &flights, need }, shape)
    };
    let mut error = None;
    let mut admission = Some(admission);
    // Each is claimed when it begins, or a reader would wait for downloads that have not.
    for request in requests {
        let Claim { requests, .. } = claim(layer, &request.members, need, shape);
        for (request, flights) in requests {
            engine.counters.background_requests.fetch_add(1, Ordering::Relaxed);
            let waits: Vec<_> = flights.iter().map(|f| f.outcome.subscribe()).collect();
            run(layer, request.bytes, flights, class, deadline, &mut admission).await;
            for wait in waits {
                match wait.borrow().as_ref() {
                    Some(Ok(brought)) if brought.unstored => return Step::NoSpace,
                    Some(Err(e)) => error = Some(e.clone()),
                    _ => {}
                }
            }
        }
    }
    Step::Advanced(error)
}

/// The digest of all of a blob's bytes, which are fetched in order for it, as fill is. Nothing is kept of them.
#[derive(Debug, Default)]
pub struct BlobDigest {
    hash: Sha256,
    at: u64,
}

impl BlobDigest {
    /// Goes on by one request. The digest, if that was the last. After an error the next step tries the same bytes again.
    pub async fn step(&mut self, layer: &Arc<Layer>) -> Result<Option<Digest>, Arc<FetchError>> {
        let engine = layer.engine();
        let size = engine.config.background_request;
        let range = self.at..layer.blob_size().min(self.at + size);
        let length = range.end - range.start;
        let room = || engine.pace.room(size);
        let host = layer.sources().host();
        let admission = engine.scheduler.admit_background(Class::Fill, AtStart::Wait, &host, room).await;
        let _memory = reserve(&engine.memory, &engine.config, length).await;
        engine.pace.admit(length).await;
        engine.counters.background_requests.fetch_add(1, Ordering::Relaxed);
        let deadline = Instant::now() + engine.config.background_deadline;
        let (served, _) = download(layer, range.clone(), deadline, None).await?;
        drop(admission);
        let mut hash = self.hash.clone();
        let work = move || {
            let _low = priority::lower();
            hash.update(&served.bytes);
            hash
        };
        self.hash = tokio::task::spawn_blocking(work).await.map_err(|_| FetchError::Aborted)?;
        self.at = range.end;
        let whole = self.at == layer.blob_size();
        Ok(whole.then(|| Digest::from_bytes(self.hash.clone().finalize().into())))
    }
}

/// The members that come next, and nobody else in the background takes.
fn next_batch(layer: &Arc<Layer>, position: &Position, until: u32, need: Need, size: u64) -> Vec<u32> {
    let flights = layer.flights().table.lock();
    let view = View { layer, flights: &flights, need };
    let mut following = position.following.lock();
    if let Some(member) = position.missed.swap(0, Ordering::Relaxed).checked_sub(1) {
        let member = u32::try_from(member).unwrap_or(until);
        if member < until {
            let end = layer.index().member_range(member).start.saturating_add(FOLLOW);
            *following = Some((member, end));
        }
    }
    if let Some((from, end)) = *following {
        let batch = plan::batch(from..until, &view, size);
        let within = batch.first().is_some_and(|&first| layer.index().member_range(first).start < end);
        *following = batch.last().filter(|_| within).map(|&last| (last + 1, end));
        if within {
            return batch;
        }
    }
    let mut next = position.next.lock();
    let batch = plan::batch(*next..until, &view, size);
    *next = batch.last().map_or(until, |&last| last + 1);
    batch
}
