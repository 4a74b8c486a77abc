//! What to download, when, and only once.
//!
//! Owns: turning missing chunks into range requests ([`plan`]), the order of requests ([`scheduler`]), what is fetched
//! without being asked for ([`background`](mod@background)), what comes although less was asked for ([`sweep`]), what need not
//! be fetched at all ([`zeros`](mod@zeros)), and the table of members under way. May not: choose hosts, parse formats beyond
//! asking `estargz` to decode a member, or answer FUSE.
//!
//! The unit is the member. A task *claims* free members under one lock, fetches the ranges that hold them, decodes
//! and verifies on the blocking pool (never more at once than there are cores), stores, and ends their flights; anyone
//! else who needs one of them waits for its flight. A failure ends the flight with the error and is remembered
//! nowhere: the next reader starts afresh.
//!
//! Invariants: a member is asked for by at most one task at a time; a reader never waits for a background request
//! that has not started (claims are made after admission); bytes that fail verification reach nobody.

use std::{
    collections::HashMap,
    num::NonZero,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use estargz::{ChunkSpec, DecodedMember, VerifiedChunk};
use parking_lot::Mutex;
use registry::{HostTag, ReadOptions, Served};
use tokio::{
    sync::{Semaphore, SemaphorePermit, watch},
    time::Instant,
};

use crate::{
    cache::{Cache, CacheConfig},
    index::Index,
    layer::{Audits, Layer},
};

pub mod ahead;
mod background;
mod pace;
pub mod plan;
pub(crate) mod priority;
mod scheduler;
mod sweep;
mod zeros;

pub use background::{BlobDigest, Position, Step, background};
use pace::Pace;
pub use plan::Shape;
use plan::{Members, Request};
pub use scheduler::Class;
pub(crate) use scheduler::Sign;
use scheduler::{Admission, AtStart, Beside, Scheduler};
use sweep::{Sweep, Taker};
pub use zeros::zeros;

/// Bytes that fail verification are asked for this often in all, from other hosts where there are any. More would
/// only make a reader wait longer for the same wrong bytes.
const VERIFY_ATTEMPTS: u32 = 3;

/// Compressed bytes that may follow a member's chunks and are fetched along.
const MAX_HEADERS: u64 = 1 << 20;

/// Bytes of headers that may follow a member's chunks.
const MAX_RUN: u64 = 32 << 20;

/// Compressed bytes decoded in one go: some milliseconds of a core.
const CPU_PART: u64 = 256 << 10;

/// Why bytes could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// No source gave the range in time.
    #[error("{source_name}: bytes {start}-{end}: {error}")]
    Registry {
        /// The source asked.
        source_name: Arc<str>,
        /// First byte asked for.
        start: u64,
        /// Last byte asked for.
        end: u64,
        /// What the client said.
        error: Arc<registry::Error>,
    },
    /// The bytes came but are not what the TOC promised.
    #[error("{source_name}: member at {offset} from {host}: {error}")]
    Verify {
        /// The source asked.
        source_name: Arc<str>,
        /// The member's offset in the blob.
        offset: u64,
        /// Who sent them.
        host: HostTag,
        /// What is wrong with them.
        error: Arc<estargz::Error>,
    },
    /// The task that fetched it ended without a result.
    #[error("the download was given up")]
    Aborted,
    /// No result within the read's deadline.
    #[error("no result within the deadline")]
    Deadline,
}

impl FetchError {
    /// Whether asking again at once is of no use: wrong bytes were asked for as often as is useful.
    pub fn is_verdict(&self) -> bool {
        matches!(self, FetchError::Verify { .. })
    }

    /// The reason code under which it is logged and counted.
    pub fn reason(&self) -> &'static str {
        match self {
            FetchError::Registry { error, .. } => error.reason(),
            FetchError::Verify { .. } => "verify_failed",
            FetchError::Aborted => "aborted",
            FetchError::Deadline => "timeout",
        }
    }
}

/// Settings of the engine.
#[derive(Debug, Clone, Copy)]
pub struct FetchConfig {
    /// How requests for readers are formed.
    pub shape: Shape,
    /// Bytes of one request in the background.
    pub background_request: u64,
    /// Requests under way at once for the readers of one layer.
    pub on_demand: usize,
    /// Requests under way at once for prefetch and fill together.
    pub background: usize,
    /// Of these for one layer.
    pub lanes: usize,
    /// Compressed bytes under way or waiting to be decoded: in the background altogether, for readers by layer.
    pub in_flight_bytes: u64,
    /// How long one background request may take.
    pub background_deadline: Duration,
    /// Whether the headers of tars are compared with TOCs.
    pub audits: Audits,
    /// Compressed bytes a second in the background altogether, at most.
    pub background_rate: Option<NonZero<u64>>,
    /// How much is kept.
    pub cache: CacheConfig,
}

impl Default for FetchConfig {
    fn default() -> Self {
        FetchConfig {
            // A round trip at 100 Mbit/s and 20 ms carries 256 KiB: reading over less than that is free, and reaching
            // that far ahead doubles a request's time at most.
            shape: Shape { gap: 64 << 10, max_request: 8 << 20, ahead: 256 << 10 },
            // A reader may have to wait for one that has begun: 0.17 s at 100 Mbit/s. With four lanes 8 MiB are under way,
            // which is what a link of 1 Gbit/s and 64 ms holds.
            background_request: 2 << 20,
            on_demand: 64,
            background: 8,
            lanes: 4,
            in_flight_bytes: 64 << 20,
            background_deadline: Duration::from_secs(120),
            audits: Audits::On,
            background_rate: None,
            cache: CacheConfig::default(),
        }
    }
}

/// Counts since start.
#[derive(Debug, Default)]
pub struct FetchCounters {
    /// Requests for readers.
    pub on_demand_requests: AtomicU64,
    /// Requests for prefetch and fill.
    pub background_requests: AtomicU64,
    /// Compressed bytes received.
    pub compressed_bytes: AtomicU64,
    /// Verified bytes stored.
    pub stored_bytes: AtomicU64,
    /// Members whose bytes failed verification.
    pub verify_failures: AtomicU64,
}

/// What all layers of a process share to fetch.
#[derive(Debug)]
pub struct Engine {
    scheduler: Scheduler,
    cpu: Arc<Semaphore>,
    /// The same for what is decoded in the background, at low priority: a reader must not wait for it to let go of a core.
    background_cpu: Arc<Semaphore>,
    pace: Pace,
    /// KiB of memory for background requests.
    memory: Semaphore,
    config: FetchConfig,
    limits: estargz::Limits,
    counters: FetchCounters,
    cache: Cache,
}

impl Engine {
    /// With its settings.
    pub fn new(config: FetchConfig, limits: estargz::Limits) -> Engine {
        let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
        Engine {
            scheduler: Scheduler::new(config.background),
            cpu: Arc::new(Semaphore::new(cores)),
            background_cpu: Arc::new(Semaphore::new(cores)),
            pace: Pace::new(config.background_rate),
            memory: Semaphore::new(in_flight_kib(&config) as usize),
            config,
            limits,
            counters: FetchCounters::default(),
            cache: Cache::new(config.cache),
        }
    }

    /// What all layers keep.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Its settings.
    pub fn config(&self) -> &FetchConfig {
        &self.config
    }

    /// Its counts.
    pub fn counters(&self) -> &FetchCounters {
        &self.counters
    }

    /// A container reads, or is about to: what is fetched in the background keeps out of its way.
    pub(crate) fn note(&self, sign: Sign) {
        self.scheduler.note(sign);
    }

    /// Its limits on formats.
    pub fn limits(&self) -> &estargz::Limits {
        &self.limits
    }
}

fn in_flight_kib(config: &FetchConfig) -> u32 {
    // The upper bound is the semaphore's own.
    (config.in_flight_bytes / 1024).clamp(1, u64::from(u32::MAX >> 3)) as u32
}

/// Waits until a request of `bytes` fits into a memory. One that never fits goes alone.
async fn reserve<'a>(memory: &'a Semaphore, config: &FetchConfig, bytes: u64) -> SemaphorePermit<'a> {
    let kib = bytes.div_ceil(1024).min(u64::from(in_flight_kib(config))) as u32;
    memory.acquire_many(kib).await.expect("the semaphore is never closed")
}

/// Verified chunks by their numbers, as they came. A reader takes them from here, so that it does not depend on their being
/// stored, nor on their staying so.
pub type Chunks = HashMap<u32, Bytes>;

/// What became of a member.
#[derive(Debug, Default)]
struct Brought {
    /// For a reader all of its chunks that were missing; in the background only those that could not be stored.
    chunks: Chunks,
    /// Whether some of them could not be stored: the disk is full.
    unstored: bool,
}

type Outcome = Result<Arc<Brought>, Arc<FetchError>>;

/// The members of one layer under way, and the bounds on what its readers ask for. The bounds are the layer's own:
/// readers of a layer whose registry hangs must not use up what others need.
#[derive(Debug)]
pub struct Flights {
    table: Mutex<HashMap<u32, watch::Receiver<Option<Outcome>>>>,
    requests: Semaphore,
    /// In KiB.
    memory: Semaphore,
    streams: Mutex<ahead::Streams>,
    sweep: Sweep,
}

impl Flights {
    /// For a layer of an engine.
    pub fn new(engine: &Engine) -> Flights {
        Flights {
            table: Mutex::default(),
            requests: Semaphore::new(engine.config.on_demand.max(1)),
            memory: Semaphore::new(in_flight_kib(&engine.config) as usize),
            streams: Mutex::default(),
            sweep: Sweep::default(),
        }
    }
}

/// The duty to end one member's flight.
#[derive(Debug)]
struct Flight {
    layer: Arc<Layer>,
    member: u32,
    outcome: watch::Sender<Option<Outcome>>,
}

impl Flight {
    /// Ends it: first nobody joins any more, then those who have hear of it.
    fn end(self, outcome: Outcome) {
        self.layer.flights().table.lock().remove(&self.member);
        self.outcome.send_replace(Some(outcome));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // Ended in order: the place in the table may be another's by now.
        if self.outcome.borrow().is_none() {
            self.layer.flights().table.lock().remove(&self.member);
        }
        self.outcome.send_if_modified(|outcome| {
            let dropped = outcome.is_none();
            outcome.get_or_insert_with(|| Err(Arc::new(FetchError::Aborted)));
            dropped
        });
    }
}

/// A layer as the planner sees it, under the lock of its flights.
struct View<'a> {
    layer: &'a Layer,
    flights: &'a HashMap<u32, watch::Receiver<Option<Outcome>>>,
    need: Need,
}

/// What a member is fetched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Its chunks.
    Chunks,
    /// These, or the headers between them.
    Headers,
}

impl Members for View<'_> {
    fn count(&self) -> u32 {
        self.layer.index().members()
    }

    fn bytes(&self, member: u32) -> Range<u64> {
        fetch_range(self.layer, member)
    }

    fn is_free(&self, member: u32) -> bool {
        !self.flights.contains_key(&member)
            && (self.layer.index().member_chunks(member).any(|c| !self.layer.store().has(c))
                || self.need == Need::Headers && self.layer.wants_headers(member))
    }
}

impl View<'_> {
    /// How many bytes of the blob free members take; no more is counted than is enough to exceed `enough`.
    fn free_bytes(&self, members: Range<u32>, enough: u64) -> u64 {
        let free =
            members.filter(|&m| self.is_free(m)).map(|m| self.bytes(m)).map(|bytes| bytes.end - bytes.start);
        let mut total = 0;
        free.take_while(|bytes| {
            total += bytes;
            total <= enough
        })
        .for_each(drop);
        total
    }
}

/// The bytes of the blob that are enough to decode a member's chunks.
fn fetch_range(layer: &Layer, member: u32) -> Range<u64> {
    member_bytes(layer.index(), member)
}

fn member_bytes(index: &Index, member: u32) -> Range<u64> {
    let range = index.member_range(member);
    let decoded = index.member_chunks(member).last().map_or(0, |c| {
        let spec = index.chunk(c).spec;
        spec.inner_offset.saturating_add(spec.size)
    });
    // A TOC can claim any distance between members. Deflate never grows data by more than a few bytes in 16 KiB;
    // this allows for far worse encoders and still bounds a request by the chunks' own limits. Behind the chunks come the
    // headers of what has no content; writers compress them to a small part, and end a member after some of them.
    let bound = decoded.saturating_add(decoded / 8).saturating_add(MAX_HEADERS);
    range.start..range.end.min(range.start.saturating_add(bound))
}

/// The longest request that any single member of an index needs, in bytes.
pub(crate) fn widest_member(index: &Index) -> u64 {
    (0..index.members())
        .map(|m| member_bytes(index, m))
        .map(|range| range.end - range.start)
        .max()
        .unwrap_or(0)
}

/// The chunks of a member that are not in the store, ascending by inner offset.
fn missing(layer: &Layer, member: u32) -> Vec<(u32, ChunkSpec)> {
    layer
        .index()
        .member_chunks(member)
        .filter(|&c| !layer.store().has(c))
        .map(|c| (c, layer.index().chunk(c).spec))
        .collect()
}

/// Members claimed for fetching, as requests, and those somebody else fetches.
struct Claim {
    requests: Vec<(Request, Vec<Flight>)>,
    others: Vec<watch::Receiver<Option<Outcome>>>,
}

fn claim(layer: &Arc<Layer>, members: &[u32], need: Need, shape: Shape) -> Claim {
    let mut flights = layer.flights().table.lock();
    let view = View { layer, flights: &flights, need };
    let others = members.iter().filter_map(|m| view.flights.get(m).cloned()).collect();
    let wanted: Vec<u32> = members.iter().copied().filter(|&m| view.is_free(m)).collect();
    let requests = plan::requests(&wanted, &view, shape);
    let requests = requests
        .into_iter()
        .map(|request| {
            let mut mine: Vec<Flight> = Vec::with_capacity(request.members.len());
            for &member in &request.members {
                let (outcome, receiver) = watch::channel(None);
                flights.insert(member, receiver);
                mine.push(Flight { layer: layer.clone(), member, outcome });
            }
            // What a reader waits for is decoded before what came along.
            mine.sort_by_key(|f| (wanted.binary_search(&f.member).is_err(), f.member));
            (request, mine)
        })
        .collect();
    Claim { requests, others }
}

/// What is to be asked for when a reader misses members (ascending): these with what lies behind them as far as a request's
/// delay is worth, and if it reads on, more in a request beside, so that it does not wait for that.
fn claim_for_reader(layer: &Arc<Layer>, members: &[u32]) -> Claim {
    let (Some(&first), Some(&last)) = (members.first(), members.last()) else {
        return Claim { requests: Vec::new(), others: Vec::new() };
    };
    let mut shape = layer.engine().config.shape;
    shape.ahead = layer.engine().pace.ahead(shape.ahead);
    let ahead = {
        let flights = layer.flights().table.lock();
        let view = View { layer, flights: &flights, need: Need::Chunks };
        let missing = |members: Range<u32>| view.free_bytes(members, shape.gap);
        let mut streams = layer.flights().streams.lock();
        streams.ahead(first..last + 1, shape.ahead, shape.max_request, shape.gap, missing)
    };
    let reads_on = ahead > shape.ahead;
    layer.position().missed(last + 1, reads_on);
    let mut claimed = claim(layer, members, Need::Chunks, shape);
    // The background follows it otherwise.
    if reads_on && !layer.position().is_filled() {
        let batch = {
            let flights = layer.flights().table.lock();
            let view = View { layer, flights: &flights, need: Need::Chunks };
            plan::batch(last + 1..view.count(), &view, ahead)
        };
        let near = layer.index().member_range(last).end.saturating_add(ahead);
        let batch: Vec<u32> =
            batch.into_iter().take_while(|&m| layer.index().member_range(m).start < near).collect();
        let beside = claim(layer, &batch, Need::Chunks, Shape { ahead: 0, ..shape });
        claimed.requests.extend(beside.requests);
    }
    claimed
}

/// Brings members in for a reader. On success every chunk of theirs is in the map returned, or was in the
/// store.
pub async fn on_demand(
    layer: &Arc<Layer>,
    members: &[u32],
    deadline: Instant,
) -> Result<Chunks, Arc<FetchError>> {
    recheck(layer, members).await;
    let Claim { requests, others } = claim_for_reader(layer, members);
    let mut waits = others;
    for (request, flights) in requests {
        // What comes along ahead is nobody's to wait for.
        let awaited = flights.iter().filter(|f| members.binary_search(&f.member).is_ok());
        waits.extend(awaited.map(|f| f.outcome.subscribe()));
        let layer = layer.clone();
        // A task of its own: the download serves others too, and goes on when this reader is killed.
        tokio::spawn(async move {
            let engine = layer.engine().clone();
            let mut admission = Some(engine.scheduler.admit_reader());
            let mine = layer.flights();
            let _request = mine.requests.acquire().await.expect("the semaphore is never closed");
            let _memory =
                reserve(&mine.memory, &engine.config, request.bytes.end - request.bytes.start).await;
            engine.counters.on_demand_requests.fetch_add(1, Ordering::Relaxed);
            run(&layer, request.bytes, flights, Class::OnDemand, deadline, &mut admission).await;
        });
    }
    let mut brought = Chunks::new();
    for mut wait in waits {
        let outcome = tokio::time::timeout_at(deadline, wait.wait_for(Option::is_some)).await;
        match outcome.map(|o| o.ok().and_then(|o| o.clone())) {
            Ok(Some(Ok(member))) => brought.extend(member.chunks.iter().map(|(c, b)| (*c, b.clone()))),
            Ok(Some(Err(error))) => return Err(error),
            Ok(None) => return Err(Arc::new(FetchError::Aborted)),
            Err(_) => return Err(Arc::new(FetchError::Deadline)),
        }
    }
    Ok(brought)
}

/// Takes what is useful from bytes that were fetched for another purpose: members that lie wholly in them.
pub async fn offer(layer: &Arc<Layer>, start: u64, bytes: Bytes) {
    let end = start + bytes.len() as u64;
    let inside = |m: &u32| {
        let range = fetch_range(layer, *m);
        range.start >= start && range.end <= end
    };
    let members: Vec<u32> = (0..layer.index().members()).filter(inside).collect();
    // No gap and no look-ahead: exactly these members are claimed.
    let shape = Shape { gap: 0, max_request: u64::MAX, ahead: 0 };
    for (_, flights) in claim(layer, &members, Need::Headers, shape).requests {
        // What does not verify is fetched when it is needed.
        decode(layer, bytes.clone(), start, flights, Class::Prefetch).await;
    }
}

/// Hashes chunks again that a reboot made suspect, so that only what is really gone is fetched.
async fn recheck(layer: &Arc<Layer>, members: &[u32]) {
    let suspects: Vec<u32> = members
        .iter()
        .flat_map(|&m| layer.index().member_chunks(m))
        .filter(|&c| layer.store().is_suspect(c))
        .collect();
    if !suspects.is_empty() {
        let layer = layer.clone();
        let recheck = move || {
            for chunk in suspects {
                layer.store().recheck(layer.index(), &layer.index().chunk(chunk));
            }
        };
        // A panic in there leaves the chunks absent, and they are fetched.
        let _ = tokio::task::spawn_blocking(recheck).await;
    }
}

/// Fetches a range, decodes and stores the members in it, and ends their flights. What is decoded takes no place on the link:
/// the admission ends before.
async fn run(
    layer: &Arc<Layer>,
    bytes: Range<u64>,
    mut flights: Vec<Flight>,
    class: Class,
    deadline: Instant,
    admission: &mut Option<Admission<'_>>,
) {
    let mut avoid = None;
    let mut range = bytes;
    for attempt in 1..=VERIFY_ATTEMPTS {
        let (served, source_name) = match obtain(layer, range.clone(), deadline, avoid.clone()).await {
            Ok(Obtained::Bytes(served, source_name)) => (served, source_name),
            Ok(Obtained::Passed) => {
                let stored = |flight: &Flight| missing(layer, flight.member).is_empty();
                let (stored, missed): (Vec<_>, Vec<_>) = flights.into_iter().partition(stored);
                stored.into_iter().for_each(|flight| flight.end(Ok(Arc::default())));
                // It broke off, or there was no room.
                flights = missed;
                if flights.is_empty() {
                    return;
                }
                continue;
            }
            Err(error) => return fail(layer, flights, error),
        };
        admission.take();
        let host = served.host;
        let Some((failed, error)) = decode(layer, served.bytes, range.start, flights, class).await else {
            return;
        };
        layer.engine().counters.verify_failures.fetch_add(failed.len() as u64, Ordering::Relaxed);
        // Only what failed is asked for again, if possible of another host.
        let (first, rest) = failed.split_first().expect("an error has its flight");
        range = rest
            .iter()
            .map(|f| fetch_range(layer, f.member))
            .fold(fetch_range(layer, first.member), |all, one| {
                all.start.min(one.start)..all.end.max(one.end)
            });
        let name = source_name.clone();
        let error = FetchError::Verify {
            source_name,
            offset: range.start,
            host: host.clone(),
            error: Arc::new(error),
        };
        if attempt == VERIFY_ATTEMPTS {
            return fail(layer, failed, error);
        }
        layer.sources().demote(&name);
        tracing::warn!(layer = %layer.digest(), attempt, %error, "bytes failed verification, asking again");
        flights = failed;
        avoid = Some(host);
    }
}

/// How a range of the blob came.
enum Obtained {
    /// By a request, from the source named.
    Bytes(Served, Arc<str>),
    /// With all of the blob: what could be made of it is stored.
    Passed,
}

/// Brings a range of the blob, by a request or with all of the blob if a host sends that.
async fn obtain(
    layer: &Arc<Layer>,
    range: Range<u64>,
    deadline: Instant,
    avoid: Option<HostTag>,
) -> Result<Obtained, FetchError> {
    let sweep = &layer.flights().sweep;
    let passed = sweep.passed(&range);
    tokio::pin!(passed);
    let error = tokio::select! {
        () = &mut passed => return Ok(Obtained::Passed),
        downloaded = download(layer, range.clone(), deadline, avoid) => match downloaded {
            Ok((served, source_name)) => return Ok(Obtained::Bytes(served, source_name)),
            Err(error) => error,
        },
    };
    // No host may be left but the one that sends all of it.
    tokio::select! {
        biased;
        () = passed => Ok(Obtained::Passed),
        () = sweep.over() => Err(error),
        () = tokio::time::sleep_until(deadline) => Err(error),
    }
}

/// Fetches a range of the blob, and names the source it came from.
async fn download(
    layer: &Arc<Layer>,
    range: Range<u64>,
    deadline: Instant,
    avoid: Option<HostTag>,
) -> Result<(Served, Arc<str>), FetchError> {
    let Engine { pace, counters, .. } = &**layer.engine();
    let whole = Arc::new(Taker(Arc::downgrade(layer)));
    let options = ReadOptions { deadline, avoid, arrived: Some(pace.arrived().clone()), whole: Some(whole) };
    let begun = pace.begin();
    let (start, end) = (range.start, range.end.saturating_sub(1));
    match layer.sources().read(range, &options).await {
        Ok((served, source_name)) => {
            counters.compressed_bytes.fetch_add(served.bytes.len() as u64, Ordering::Relaxed);
            pace.note(begun, served.bytes.len() as u64);
            Ok((served, source_name))
        }
        Err((error, source_name)) => {
            Err(FetchError::Registry { source_name, start, end, error: Arc::new(error) })
        }
    }
}

fn fail(layer: &Layer, flights: Vec<Flight>, error: FetchError) {
    let error = Arc::new(error);
    layer.note_error(&error);
    for flight in flights {
        flight.end(Err(error.clone()));
    }
}

/// Decodes, verifies and stores on the blocking pool, and ends the flights that went well; the others come back with
/// the last one's error. A core is held for a small part of the work at a time, so that a reader's part comes between
/// two parts of a fill.
async fn decode(
    layer: &Arc<Layer>,
    blob: Bytes,
    start: u64,
    flights: Vec<Flight>,
    class: Class,
) -> Option<(Vec<Flight>, estargz::Error)> {
    let mut failed: Vec<Flight> = Vec::new();
    let mut last = None;
    let mut flights = flights.into_iter().peekable();
    while flights.peek().is_some() {
        let mut bytes = 0;
        let mut part = Vec::new();
        while let Some(flight) = flights.next_if(|_| bytes < CPU_PART) {
            let range = fetch_range(layer, flight.member);
            bytes += range.end - range.start;
            part.push(flight);
        }
        let engine = layer.engine().clone();
        let cores = if class == Class::OnDemand { &engine.cpu } else { &engine.background_cpu };
        let core = cores.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (layer, blob) = (layer.clone(), blob.clone());
        let work = move || {
            let _core = core;
            let _low = (class != Class::OnDemand).then(priority::lower);
            decode_part(&layer, &blob, start, part, class)
        };
        // A panic in there drops the flights, which ends them as aborted.
        if let Ok((flights, Some(error))) = tokio::task::spawn_blocking(work).await {
            failed.extend(flights);
            last = Some(error);
        }
    }
    layer.touch();
    last.map(|error| (failed, error))
}

fn decode_part(
    layer: &Layer,
    blob: &Bytes,
    start: u64,
    flights: Vec<Flight>,
    class: Class,
) -> (Vec<Flight>, Option<estargz::Error>) {
    let (mut failed, mut last) = (Vec::new(), None);
    for flight in flights {
        let at =
            usize::try_from(layer.index().member_range(flight.member).start - start).unwrap_or(usize::MAX);
        let member = blob.get(at..).unwrap_or_default();
        match decode_one(layer, flight.member, member, class) {
            Ok(brought) => flight.end(Ok(Arc::new(brought))),
            Err(error) => {
                failed.push(flight);
                last = Some(error);
            }
        }
    }
    (failed, last)
}

fn decode_one(layer: &Layer, member: u32, bytes: &[u8], class: Class) -> Result<Brought, estargz::Error> {
    let wanted = missing(layer, member);
    let compression = layer.index().compression();
    let (whole, limits) = (layer.index().member_range(member), layer.engine().limits());
    // Behind its chunks a member has headers. What is more than that is not looked at, nor allocated for.
    let chunks_end = layer.index().member_chunks(member).last().map_or(0, |last| {
        let spec = layer.index().chunk(last).spec;
        spec.inner_offset.saturating_add(spec.size)
    });
    let within = chunks_end.saturating_add(MAX_RUN).min(limits.member_bytes);
    let whole_limits = estargz::Limits { member_bytes: within, ..*limits };
    let whole = usize::try_from(whole.end - whole.start).ok().and_then(|length| bytes.get(..length));
    let chunks = match whole.map(|whole| DecodedMember::decode(compression, whole, &whole_limits)) {
        Some(Ok(decoded)) => {
            let chunks =
                wanted.iter().map(|(_, spec)| decoded.chunk(*spec)).collect::<Result<Vec<_>, _>>()?;
            if layer.wants_headers(member) {
                layer.audit(member, &decoded);
            }
            chunks
        }
        not_whole => {
            // What is wrong behind the chunks is no reason to refuse them.
            let specs: Vec<ChunkSpec> = wanted.iter().map(|(_, spec)| *spec).collect();
            let chunks = estargz::decode_member(compression, bytes, &specs, limits)?;
            match not_whole {
                Some(Err(error)) => layer.note_undecodable(&error),
                _ if layer.wants_headers(member) => layer.note_too_long(member),
                _ => {}
            }
            chunks
        }
    };
    let mut brought = Brought::default();
    for ((id, _), chunk) in wanted.into_iter().zip(chunks) {
        if !keep(layer, id, &chunk, class) {
            brought.unstored = true;
            brought.chunks.insert(id, chunk.data().clone());
        }
        if class == Class::OnDemand {
            brought.chunks.insert(id, chunk.into_data());
        }
    }
    Ok(brought)
}

/// Stores a chunk; `false` if there is no room.
fn keep(layer: &Layer, id: u32, chunk: &VerifiedChunk, class: Class) -> bool {
    let room = layer.engine().cache.admit(chunk.spec().size, class);
    match room.and_then(|()| layer.store().put(layer.index(), &layer.index().chunk(id), chunk)) {
        Ok(()) => {
            let stored = chunk.data().len() as u64;
            layer.engine().counters.stored_bytes.fetch_add(stored, Ordering::Relaxed);
            true
        }
        Err(error) => {
            layer.note_store_error(&error);
            false
        }
    }
}
