//! Decoding in the background takes only the time that nobody else wants: the container that starts is on the same cores.

use rustix::process::{Pid, getpriority_process, setpriority_process};
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
    let before = getpriority_process(Some(thread)).ok()?;
    setpriority_process(Some(thread), NICE).ok()?;
    Some(Low { thread, before })
}

impl Drop for Low {
    fn drop(&mut self) {
        // Without the privilege the thread stays as it is: slower, and right.
        let _ = setpriority_process(Some(self.thread), self.before);
    }
}
