//! One layer: its index, its content store, where its bytes come from, and what is being fetched.
//!
//! Owns nothing itself but the bond of these, and the layer's state for people ([`Layer::state_json`]). Shared by all
//! slots that show it; immutable but for the store's progress and the list of sources.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use estargz::{DecodedMember, Digest};
use parking_lot::Mutex;

use crate::{
    audit::{self, Marks, Mismatch},
    blob::Sources,
    fetch::{Engine, FetchError, Flights, Position, Sign},
    graduate::{GraduateError, Graduated},
    index::Index,
    store::Store,
};

/// A layer that can be read.
#[derive(Debug)]
pub struct Layer {
    index: Index,
    store: Store,
    sources: Sources,
    flights: Flights,
    engine: Arc<Engine>,
    blob_digest: String,
    blob_size: u64,
    tar_split: Option<Digest>,
    last_error: Mutex<Option<String>>,
    changed: AtomicU64,
    /// Seconds since the epoch.
    used: AtomicU64,
    disk_full: AtomicBool,
    position: Position,
    audit: Audit,
    graduated: OnceLock<Graduated>,
    /// It is becoming a directory: nothing of it may go.
    pinned: AtomicBool,
}

/// How the comparison of a layer's TOC with its tar stands.
#[derive(Debug)]
struct Audit {
    /// Not at all if the layer is not to graduate.
    wanted: Audits,
    /// The first difference.
    failed: OnceLock<Mismatch>,
    /// Members that could not be decoded whole: a host may be to blame, but not for ever.
    undecodable: AtomicU32,
}

/// Whether layers are compared with their tars, so that they can graduate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audits {
    /// As members are decoded; the fill fetches what is missing for it.
    On,
    /// And the whole blob's digest, which takes a second download, is compared with the manifest's.
    WithBlob,
    /// Not at all.
    Off,
}

/// Members that may fail to be decoded whole before the layer is said to be no tar.
const MAX_UNDECODABLE: u32 = 8;

impl Layer {
    /// Bonds the parts of a layer whose blob is `blob_size` bytes long and whose TOC names this tar-split.
    pub fn new(
        index: Index,
        store: Store,
        sources: Sources,
        engine: Arc<Engine>,
        blob_digest: String,
        blob_size: u64,
        tar_split: Option<Digest>,
    ) -> Layer {
        let audit =
            Audit { wanted: engine.config().audits, failed: OnceLock::new(), undecodable: AtomicU32::new(0) };
        Layer {
            position: Position::default(),
            audit,
            graduated: OnceLock::new(),
            pinned: AtomicBool::new(false),
            index,
            store,
            sources,
            flights: Flights::new(&engine),
            engine,
            blob_digest,
            blob_size,
            tar_split,
            last_error: Mutex::new(None),
            changed: AtomicU64::new(now()),
            used: AtomicU64::new(seconds()),
            disk_full: AtomicBool::new(false),
        }
    }

    /// The TOC digest: the layer's identity.
    pub fn digest(&self) -> Digest {
        self.index.toc_digest()
    }

    /// Digest of the compressed blob, as the manifest names it.
    pub fn blob_digest(&self) -> &str {
        &self.blob_digest
    }

    /// Size of the compressed blob, in bytes.
    pub fn blob_size(&self) -> u64 {
        self.blob_size
    }

    /// Digest of the tar-split in its blob, where its TOC names one.
    pub fn tar_split(&self) -> Option<Digest> {
        self.tar_split
    }

    /// Its tree.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Its content on disk.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Where its bytes come from.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Where what is fetched in the background goes on.
    pub(crate) fn position(&self) -> &Position {
        &self.position
    }

    pub(crate) fn flights(&self) -> &Flights {
        &self.flights
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Whether every chunk is in the store: the layer then needs no network.
    pub fn is_complete(&self) -> bool {
        (0..self.index.chunks()).all(|c| self.store.has(c))
    }

    /// When it was read last, in seconds since the epoch.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// For how long it was not read.
    pub fn unused(&self) -> Duration {
        Duration::from_secs(seconds().saturating_sub(self.used()))
    }

    /// A reader is here.
    pub(crate) fn note_use(&self) {
        self.engine.note(Sign::Reads);
        let now = seconds();
        // Mostly it says so already, and a line of the cache stays shared.
        if self.used() != now {
            self.used.store(now, Ordering::Relaxed);
        }
    }

    /// The directory it has become.
    pub fn graduated(&self) -> Option<&Graduated> {
        self.graduated.get()
    }

    /// Whether its content must stay: it is a directory, or is becoming one.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Acquire) || self.graduated().is_some()
    }

    /// Lets its content stay, or go again.
    pub(crate) fn pin(&self, pinned: bool) {
        self.pinned.store(pinned, Ordering::Release);
    }

    /// Notes the directory it has become.
    pub(crate) fn note_graduated(&self, graduated: Graduated) {
        let _ = self.graduated.set(graduated);
        self.touch();
    }

    /// Remembers why it could not become a directory.
    pub(crate) fn note_not_graduated(&self, error: &GraduateError) {
        let reason = "graduation_failed";
        tracing::warn!(layer = %self.digest(), reason, %error, "the layer stays lazy");
        self.remember(format!("{reason}: {error}"));
    }

    /// Whether a member's headers have yet to be compared with the TOC.
    pub(crate) fn wants_headers(&self, member: u32) -> bool {
        self.audit.wanted != Audits::Off
            && self.audit.failed.get().is_none()
            && !self.store.is_marked(Marks::of(&self.index).member(member))
    }

    /// Whether any member's headers have.
    pub(crate) fn wants_any_headers(&self) -> bool {
        (0..self.index.members()).any(|member| self.wants_headers(member))
    }

    /// Compares the headers in a member with the TOC.
    pub(crate) fn audit(&self, member: u32, decoded: &DecodedMember) {
        if let Err(mismatch) = audit::member(&self.index, member, decoded, |mark| self.store.set_mark(mark)) {
            self.note_mismatch(mismatch);
        }
    }

    /// A member's chunks are right, but not all of it can be decoded.
    pub(crate) fn note_undecodable(&self, error: &estargz::Error) {
        if self.audit.undecodable.fetch_add(1, Ordering::Relaxed) + 1 == MAX_UNDECODABLE {
            self.note_mismatch(Mismatch { entry: String::new(), why: error.to_string() });
        }
    }

    /// A member cannot be fetched whole.
    pub(crate) fn note_too_long(&self, member: u32) {
        let offset = self.index.member_range(member).start;
        self.note_mismatch(Mismatch {
            entry: String::new(),
            why: format!("too much follows the member at {offset}"),
        });
    }

    fn note_mismatch(&self, mismatch: Mismatch) {
        if self.audit.failed.set(mismatch.clone()).is_ok() {
            let reason = "tar_mismatch";
            tracing::warn!(
                layer = %self.digest(), reason, entry = mismatch.entry, why = mismatch.why,
                "the layer's TOC does not describe its tar: it stays lazy"
            );
            self.remember(format!("{reason}: {mismatch}"));
        }
    }

    /// The blob has another digest than its manifest says.
    pub(crate) fn note_blob_mismatch(&self, found: Digest) {
        let reason = "blob_mismatch";
        tracing::warn!(
            layer = %self.digest(), reason, blob = self.blob_digest, %found,
            "the registry's blob is not what the manifest names: the layer stays lazy"
        );
        self.remember(format!("{reason}: the blob's digest is {found}"));
    }

    /// Whether all of the tar was compared with the TOC: `Err` with the first difference, `Ok(false)` if not all was.
    pub fn audited(&self) -> Result<bool, Mismatch> {
        let marks = Marks::of(&self.index);
        let members = (0..self.index.members()).all(|member| self.store.is_marked(marks.member(member)));
        if members && self.audit.failed.get().is_none() {
            let missing = audit::required(&self.index).find(|(mark, _)| !self.store.is_marked(*mark));
            if let Some((_, name)) = missing {
                self.note_mismatch(Mismatch::new(&name, "the tar does not have it"));
            }
        }
        match self.audit.failed.get() {
            Some(mismatch) => Err(mismatch.clone()),
            None => Ok(members),
        }
    }

    /// What went wrong last, with its reason code in front.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    /// Remembers a failure for [`Layer::state_json`]. It is never a reason to refuse a later read.
    pub(crate) fn note_error(&self, error: &FetchError) {
        self.remember(format!("{}: {error}", error.reason()));
    }

    /// Says once that content can no longer be kept; readers are then served from memory.
    pub(crate) fn note_store_error(&self, error: &io::Error) {
        if !self.disk_full.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                layer = %self.digest(), dir = %self.store.dir().display(), %error, reason = "no_space",
                "content cannot be kept on disk; reads go on, but fetch again each time"
            );
        }
        self.remember(format!("no_space: {error}"));
    }

    fn remember(&self, error: String) {
        // The state file has a fixed size; quoting at most doubles this.
        *self.last_error.lock() = Some(error.chars().filter(char::is_ascii).take(256).collect());
        self.touch();
    }

    pub(crate) fn touch(&self) {
        self.changed.store(now(), Ordering::Relaxed);
    }

    /// When [`Layer::state_json`] last changed, in nanoseconds since the epoch.
    pub fn changed(&self) -> u64 {
        self.changed.load(Ordering::Relaxed)
    }

    /// The state file's content: the keys of stargz-snapshotter's, sizes in bytes of uncompressed content.
    pub fn state_json(&self) -> String {
        let (size, fetched) = (self.index.content_bytes(), self.store.bytes());
        let mut state = serde_json::json!({
            "digest": self.blob_digest,
            "size": size,
            "fetchedSize": fetched,
            "fetchedPercent": if size == 0 { 100.0 } else { fetched as f64 / size as f64 * 100.0 },
            "blobSize": self.blob_size,
            "tocDigest": self.digest().to_string(),
        });
        if let Some(error) = self.last_error.lock().as_ref() {
            state["error"] = error.clone().into();
        }
        state.to_string()
    }
}

/// Coarse, but without a system call.
fn seconds() -> u64 {
    now() / 1_000_000_000
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
