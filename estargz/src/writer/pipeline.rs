//! The machine around the writer: who works on a member at what time.
//!
//! ```text
//!                     +-> pack (as many threads as asked for): compress, sha256 of chunks +
//! caller's thread ----+                                                                 +-> emit: order, write,
//! parse, cut members  +-> hash: sha256 of the whole, of files of several chunks --------+   sha256 of blob, TOC
//! ```
//!
//! Channels are not bounded by number, as members differ in size by five orders of magnitude; a [`Budget`] bounds the
//! bytes of all members between being cut and being written. A member's share is freed by dropping it, wherever that
//! happens, so that no path out of here can lose it.
//!
//! When the output fails, `emit` ends and drops its channel; the packers notice, and then the caller's thread does.
//! When the input fails, the caller's thread hangs up, and all others finish what they have.

use std::io::Write;
use std::num::NonZero;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, Scope, ScopedJoinHandle};

use sha2::{Digest as _, Sha256};

use super::cut::{Chunk, Member, Part, Row};
use super::emit::Emitter;
use super::pack::{Bytes, Packer};
use super::{Error, Options};
use crate::Digest;

/// What a member costs beside its bytes: allocations, rows, queues. Generous, so that a layer of tiny files does not
/// put a hundred thousand members in flight.
const OVERHEAD: usize = 4 << 10;

/// Bounds of the budget. At most: what all members in flight may hold, compressed forms included, however many cores
/// there are. At least: what keeps two cores busy.
const MAX_BUDGET: usize = 128 << 20;
const MIN_BUDGET: usize = 16 << 20;

/// Runs `produce` on this thread and everything behind it on others, until all that it fed is written.
///
/// Returns its result, the emitter, and the hash of all bytes that were fed.
pub(super) fn run<'a, W: Write + Send, T>(
    options: &Options,
    emitter: Emitter<'a, W>,
    produce: impl FnOnce(Feed) -> Result<T, Error>,
) -> Result<(T, Emitter<'a, W>, Sha256), Error> {
    let &Options { threads, chunk_size, .. } = options;
    thread::scope(|scope| {
        let (jobs, queue) = mpsc::channel();
        let (contents, hashed) = mpsc::channel();
        let (done, packed) = mpsc::channel();
        let (found, digests) = mpsc::channel();

        let queue = Arc::new(Mutex::new(queue));
        for number in 0..threads.get() {
            let (queue, done) = (Arc::clone(&queue), done.clone());
            spawn(scope, format!("pack-{number}"), move || pack(&queue, &done, options))?;
        }
        // The packers alone keep the queue: it must go with the last of them.
        drop((queue, done));
        let hasher = spawn(scope, "hash".to_owned(), move || hash(&hashed, &found))?;
        let emitter = spawn(scope, "emit".to_owned(), move || emitter.run(&packed, &digests))?;

        let budget = Arc::new(Budget::new(budget(threads, chunk_size)));
        let produced = produce(Feed { jobs, contents, budget, fed: 0 });
        let (emitter, hash) = (join(emitter), join(hasher));
        // If the output failed, feeding did too, and knows less.
        let emitter = emitter?;
        Ok((produced?, emitter, hash))
    })
}

/// Room for two chunks for each thread, in both forms.
fn budget(threads: NonZero<usize>, chunk_size: u64) -> usize {
    let chunk = usize::try_from(chunk_size).unwrap_or(usize::MAX);
    threads.get().saturating_mul(4).saturating_mul(chunk).clamp(MIN_BUDGET, MAX_BUDGET)
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: String,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, Error> {
    Builder::new().name(name).spawn_scoped(scope, work).map_err(Error::Threads)
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where members go in.
#[derive(Debug)]
pub(super) struct Feed {
    jobs: Sender<Job>,
    contents: Sender<Arc<Content>>,
    budget: Arc<Budget>,
    fed: u64,
}

impl Feed {
    /// Hands on a member; waits while too much is in flight.
    ///
    /// # Errors
    ///
    /// If the output has failed: [`run`] knows how.
    pub(super) fn send(&mut self, member: Member) -> Result<(), Error> {
        let Member { bytes, chunks, rows } = member;
        // Once as it is, once compressed; bytes that do not compress grow by less than the overhead.
        let share = Budget::take(&self.budget, 2 * bytes.len() + OVERHEAD);
        let content = Arc::new(Content { bytes, chunks, _share: share });
        let job = Job { number: self.fed, content: Arc::clone(&content), rows };
        self.fed += 1;
        let sent = self.contents.send(content).is_ok() && self.jobs.send(job).is_ok();
        if sent { Ok(()) } else { Err(Error::Write(std::io::ErrorKind::BrokenPipe.into())) }
    }
}

/// The bytes of a member, read by packer and hasher at the same time.
#[derive(Debug)]
pub(super) struct Content {
    bytes: Vec<u8>,
    pub(super) chunks: Vec<Chunk>,
    _share: Share,
}

impl Content {
    /// Whether a chunk's bytes are all zero.
    pub(super) fn is_zero(&self, chunk: &Chunk) -> bool {
        self.bytes[chunk.range.clone()].iter().all(|byte| *byte == 0)
    }

    /// Bytes of the member, decompressed.
    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
}

#[derive(Debug)]
struct Job {
    number: u64,
    content: Arc<Content>,
    rows: Vec<Row>,
}

/// A member after compression.
#[derive(Debug)]
pub(super) struct Packed {
    /// Its place in the blob: members are numbered from 0.
    pub(super) number: u64,
    pub(super) packed: Bytes,
    /// Digests of its chunks.
    pub(super) digests: Vec<Digest>,
    pub(super) rows: Vec<Row>,
    pub(super) content: Arc<Content>,
}

fn pack(queue: &Mutex<Receiver<Job>>, done: &Sender<Packed>, options: &Options) {
    let mut packer = Packer::new(options);
    loop {
        // Who waits for a job holds the lock; the others wait for the lock instead.
        let job = lock(queue).recv();
        let Ok(Job { number, content, rows }) = job else { return };
        let first_chunk = content.chunks.first().map_or(0, |chunk| chunk.range.end);
        let packed = packer.member(&content.bytes, first_chunk);
        let digests =
            content.chunks.iter().map(|chunk| Digest::of(&content.bytes[chunk.range.clone()])).collect();
        if done.send(Packed { number, packed, digests, rows, content }).is_err() {
            return;
        }
    }
}

/// Everything that can only be hashed in order: all bytes, and the files that have more than one chunk, whose digests
/// are sent on one by one.
fn hash(contents: &Receiver<Arc<Content>>, found: &Sender<Digest>) -> Sha256 {
    let (mut whole, mut file) = (Sha256::new(), Sha256::new());
    for content in contents {
        whole.update(&content.bytes);
        for Chunk { range, part } in &content.chunks {
            if *part != Part::Whole {
                file.update(&content.bytes[range.clone()]);
            }
            if *part == Part::Last {
                // Nobody listens any more if the output failed.
                let _ = found.send(Digest::from_bytes(file.finalize_reset().into()));
            }
        }
    }
    whole
}

/// Bytes that may be in flight.
#[derive(Debug)]
struct Budget {
    free: Mutex<usize>,
    returned: Condvar,
    total: usize,
}

impl Budget {
    fn new(total: usize) -> Self {
        Budget { free: Mutex::new(total), returned: Condvar::new(), total }
    }

    /// Waits until `bytes` are free, or all are: one member always fits.
    fn take(budget: &Arc<Budget>, bytes: usize) -> Share {
        let bytes = bytes.min(budget.total);
        let free = lock(&budget.free);
        let enough = budget.returned.wait_while(free, |free| *free < bytes);
        *enough.unwrap_or_else(PoisonError::into_inner) -= bytes;
        Share { budget: Arc::clone(budget), bytes }
    }
}

/// Bytes of the budget, returned when dropped.
#[derive(Debug)]
struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        *lock(&self.budget.free) += self.bytes;
        self.budget.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_member_always_fits_and_all_comes_back() {
        let budget = Arc::new(Budget::new(100));
        let shares = [Budget::take(&budget, 60), Budget::take(&budget, 40)];
        assert_eq!(*lock(&budget.free), 0);
        drop(shares);
        let all = Budget::take(&budget, 5000);
        assert_eq!(*lock(&budget.free), 0);
        let waiting = {
            let budget = Arc::clone(&budget);
            thread::spawn(move || drop(Budget::take(&budget, 1)))
        };
        drop(all);
        waiting.join().unwrap();
        assert_eq!(*lock(&budget.free), 100);
    }

    #[test]
    fn budgets_follow_threads_within_bounds() {
        let of = |threads, chunk| budget(NonZero::new(threads).unwrap(), chunk);
        assert_eq!(of(1, 1), MIN_BUDGET);
        assert_eq!(of(2, 4 << 20), 32 << 20);
        assert_eq!(of(64, 4 << 20), MAX_BUDGET);
        assert_eq!(of(usize::MAX, u64::MAX), MAX_BUDGET);
    }
}
