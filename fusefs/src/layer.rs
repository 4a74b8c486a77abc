//! One layer: its index, its content store, where its bytes come from, and what is being fetched.
//!
//! Owns nothing itself but the bond of these, and the layer's state for people ([`Layer::state_json`]). Shared by all
//! slots that show it; immutable but for the store's progress and the list of sources.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

use estargz::Digest;
use parking_lot::Mutex;

use crate::{
    blob::Sources,
    fetch::{Engine, FetchError, Flights},
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
    last_error: Mutex<Option<String>>,
    changed: AtomicU64,
    disk_full: AtomicBool,
}

impl Layer {
    /// Bonds the parts of a layer whose blob is `blob_size` bytes long.
    pub fn new(
        index: Index,
        store: Store,
        sources: Sources,
        engine: Arc<Engine>,
        blob_digest: String,
        blob_size: u64,
    ) -> Layer {
        Layer {
            index,
            store,
            sources,
            flights: Flights::new(&engine),
            engine,
            blob_digest,
            blob_size,
            last_error: Mutex::new(None),
            changed: AtomicU64::new(now()),
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

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
