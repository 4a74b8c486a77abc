//! Keeping the daemon small: what a download needed for a moment is given back to the system.
//!
//! glibc keeps freed memory for later, by default in an arena for each thread and in ever larger pieces. The daemon's large
//! buffers (members being decoded, requests being received) live for milliseconds and then not at all for days.

use std::sync::Arc;
use std::time::Duration;

use fusefs::Plane;

/// Buffers of this size and more are mapped for themselves, and unmapped when freed. Mapping costs some microseconds and a
/// fault a page: little beside decompressing as much.
#[cfg(target_env = "gnu")]
const MAPPED: i32 = 1 << 20;

/// How often it is seen whether something was downloaded.
const INTERVAL: Duration = Duration::from_secs(2);

/// Settles how memory is allocated. Before any thread is started.
pub fn settle() {
    // SAFETY: mallopt only changes parameters of the allocator; no other thread is running yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Raises the number of files that may be open to what the system allows: each request and each read has one for a moment.
pub fn allow_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::debug!(%error, "the number of open files stays limited");
    }
}

/// Gives back what a burst of downloads has left, once it is over. Ends with the runtime.
pub async fn keep_small(plane: Arc<Plane>) {
    let mut tick = tokio::time::interval(INTERVAL);
    let (mut seen, mut trimmed) = (0, 0);
    loop {
        tick.tick().await;
        let bytes = plane.fetch_counters().compressed_bytes.load(std::sync::atomic::Ordering::Relaxed);
        if bytes == seen && bytes != trimmed {
            trimmed = bytes;
            // SAFETY: malloc_trim may be called at any time from any thread.
            #[cfg(target_env = "gnu")]
            let _ = tokio::task::spawn_blocking(|| unsafe { libc::malloc_trim(0) }).await;
        }
        seen = bytes;
    }
}
