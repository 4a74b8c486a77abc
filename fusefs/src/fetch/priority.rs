//! Decoding in the background takes only the time that nobody else wants: the container that starts is on the same cores.

use rustix::process::{Pid, geteuid, getpriority_process, setpriority_process};
use rustix::thread::gettid;

/// The nicest there is: a sixtieth of the time beside one thread that works, all of it beside none.
const NICE: i32 = 19;

/// While this lives the thread has low priority. Raising it again takes the privilege that mounting takes as well.
pub(crate) struct Low {
    thread: Pid,
    before: i32,
}

/// Lowers the calling thread's priority.
pub(crate) fn lower() -> Option<Low> {
    // On Linux a thread has a priority of its own.
    let thread = gettid();
    // Without the privilege to raise it again, it would stay low for whatever the thread does next.
    if !geteuid().is_root() {
        return None;
    }
    let before = getpriority_process(Some(thread)).ok()?;
    setpriority_process(Some(thread), NICE).ok()?;
    Some(Low { thread, before })
}

impl Drop for Low {
    fn drop(&mut self) {
        let _ = setpriority_process(Some(self.thread), self.before);
    }
}
