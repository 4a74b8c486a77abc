//! Counts of what the process asked of its registries.

use std::sync::atomic::{AtomicU64, Ordering};

/// Live counters of one [`Registry`](crate::Registry).
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    bytes_received: AtomicU64,
    retries: AtomicU64,
    auth_refreshes: AtomicU64,
    redirects_walked: AtomicU64,
}

/// The counters at one moment. All only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CounterSnapshot {
    /// HTTP requests sent, token requests and redirect hops included.
    pub requests: u64,
    /// Body bytes of manifests and blobs received, skipped ones included.
    pub bytes_received: u64,
    /// Attempts made because an earlier one for the same read failed or was cut short.
    pub retries: u64,
    /// Times a host refused us and authorization was fetched anew.
    pub auth_refreshes: u64,
    /// Redirects followed.
    pub redirects_walked: u64,
}

impl Counters {
    /// The present values.
    pub fn snapshot(&self) -> CounterSnapshot {
        CounterSnapshot {
            requests: self.requests.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
            retries: self.retries.load(Ordering::Relaxed),
            auth_refreshes: self.auth_refreshes.load(Ordering::Relaxed),
            redirects_walked: self.redirects_walked.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn auth_refresh(&self) {
        self.auth_refreshes.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn redirect(&self) {
        self.redirects_walked.fetch_add(1, Ordering::Relaxed);
    }
}
