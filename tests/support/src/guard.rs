//! What must end with its test, and what a test may ask of the machine.
//!
//! A test that panics still unmounts, kills and deletes: everything here acts on drop. Guards drop in the reverse
//! order of their making, so make the directory first, then the daemon, then the mount.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

/// How often conditions that nothing announces (a log file, an exit) are looked at.
const POLL: Duration = Duration::from_millis(5);

/// An empty directory that is deleted on drop.
///
/// # Panics
/// If there is no space for one.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("lazurite-test-").tempdir().expect("a temporary directory")
}

/// Detaches whatever is mounted at a path when dropped (`umount2` with `MNT_DETACH`), layer by layer if mounted over
/// several times. Harmless if nothing is.
#[derive(Debug)]
pub struct MountGuard {
    path: PathBuf,
}

impl MountGuard {
    /// Guards `path`; make it before the mount, so that a failure in between leaves nothing.
    pub fn new(path: impl Into<PathBuf>) -> MountGuard {
        MountGuard { path: path.into() }
    }

    /// The path guarded.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        // NOFOLLOW: a symlink at the path must not lead to somebody else's mount
        while unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
    }
}

/// A process that is killed and waited for on drop. Its output goes to a log file, whose end is printed when the
/// test panics.
#[derive(Debug)]
pub struct ProcessGuard {
    child: Child,
    name: String,
    log: PathBuf,
}

impl ProcessGuard {
    /// Starts `command` with no input and both outputs appended to `log`.
    ///
    /// # Errors
    /// If the log cannot be opened or the program not started; the program is named.
    pub fn spawn(command: &mut Command, log: impl Into<PathBuf>) -> io::Result<ProcessGuard> {
        let log = log.into();
        let name = command.get_program().to_string_lossy().into_owned();
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{name}: {error}"));
        let out = File::options().create(true).append(true).open(&log).map_err(named)?;
        let err = out.try_clone().map_err(named)?;
        let child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().map_err(named)?;
        Ok(ProcessGuard { child, name, log })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `ESRCH` if the process was waited for already.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Err(rustix::io::Errno::SRCH.into()); // its number may be another's by now
        }
        kill_process(Pid::from_child(&self.child), signal).map_err(Into::into)
    }

    /// Kills the process (`SIGKILL`) and waits for it.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    /// Waits for the process to end by itself; `None` if it has not within `limit`.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn wait_exit(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let until = Instant::now() + limit;
        loop {
            match self.child.try_wait()? {
                None if Instant::now() < until => std::thread::sleep(POLL),
                ended => return Ok(ended),
            }
        }
    }

    /// What the process has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until the log holds `text`; false if the process ends or `limit` passes before.
    pub fn wait_log(&mut self, text: &str, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let ended = !matches!(self.child.try_wait(), Ok(None));
            if self.log().contains(text) {
                return true;
            }
            if ended || Instant::now() >= until {
                return false;
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for ProcessGuard {
    fn drop(&mut self) {
        let ended = self.child.try_wait().ok().flatten();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let state = match ended {
                None => "was running".to_owned(),
                Some(status) => match status.signal() {
                    Some(signal) => format!("was ended by signal {signal}"),
                    None => format!("had ended with {status}"),
                },
            };
            eprintln!("--- {} ({}) {state}; end of {}:", self.name, self.child.id(), self.log.display());
            eprintln!("{}", tail(&self.log(), 60));
        }
    }
}

/// The last `count` lines.
fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// [`deadline`] passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedOut(pub Duration);

impl std::fmt::Display for TimedOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not done after {:?}", self.0)
    }
}

impl std::error::Error for TimedOut {}

/// Runs `work` on a thread of its own and waits for it at most `limit`, for calls that may hang in the kernel. A panic
/// of `work` goes on here. A thread cannot be killed: when time is up it goes on, and ends with the process at the
/// latest, or stays in the kernel until the mount it hangs on is gone.
///
/// # Errors
/// [`TimedOut`] when `limit` has passed.
pub fn deadline<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TimedOut> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(limit) {
        Ok(value) => Ok(value),
        Err(mpsc::RecvTimeoutError::Timeout) => Err(TimedOut(limit)),
        // the sender is gone without a value: only a panic does that
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("a thread that did not panic has sent its value"),
        },
    }
}

/// Waits until `ready`, looking every few milliseconds; false if `limit` passes before.
pub fn eventually(limit: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    loop {
        if ready() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

/// Whether this machine lets a test mount FUSE file systems as root. If not, says so on standard error.
///
/// # Panics
/// If not, and `CI=true`: where all tests are to run, a skipped one is a failure.
#[track_caller]
pub fn require_root_and_fuse() -> bool {
    if !rustix::process::geteuid().is_root() {
        return skip("not root");
    }
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => true,
        Err(error) => skip(&format!("/dev/fuse: {error}")),
    }
}

/// Whether this test is run by root. If not, as [`require_root_and_fuse`].
#[track_caller]
pub fn require_root() -> bool {
    rustix::process::geteuid().is_root() || skip("not root")
}

/// Whether all these programs are in `PATH`. If not, as [`require_root_and_fuse`].
#[track_caller]
pub fn require_programs(names: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| !std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
        .collect();
    missing.is_empty() || skip(&format!("not installed: {}", missing.join(", ")))
}

/// Whether this machine has the IPv6 loopback address. If not, as [`require_root_and_fuse`].
#[track_caller]
pub fn require_ipv6() -> bool {
    match std::net::TcpListener::bind("[::1]:0") {
        Ok(_) => true,
        Err(error) => skip(&format!("[::1]: {error}")),
    }
}

/// Says why a test does not run; always false.
#[track_caller]
fn skip(why: &str) -> bool {
    let place = std::panic::Location::caller();
    assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED under CI=true: {why}");
    // straight to the stream: the test harness swallows what eprintln! prints in tests that pass
    let _ = writeln!(io::stderr(), "SKIPPED: {}:{}: {why}", place.file(), place.line());
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str, log: &Path) -> ProcessGuard {
        ProcessGuard::spawn(Command::new("sh").args(["-c", script]), log).unwrap()
    }

    #[test]
    fn processes_end_with_their_guard() {
        let dir = temp_dir();
        let log = dir.path().join("log");
        let mut guard = shell("echo ready; exec sleep 1000", &log);
        assert!(guard.wait_log("ready", LIMIT));
        let proc = PathBuf::from(format!("/proc/{}", guard.pid()));
        assert!(proc.exists());
        assert!(guard.wait_exit(Duration::ZERO).unwrap().is_none());
        drop(guard);
        assert!(!proc.exists());

        let mut guard = shell("echo going; exit 3", &log);
        assert_eq!(guard.wait_exit(LIMIT).unwrap().unwrap().code(), Some(3));
        assert!(!guard.wait_log("never", LIMIT), "an ended process writes no more");
        assert_eq!(guard.log(), "ready\ngoing\n");
        assert!(guard.signal(Signal::TERM).is_err());

        let mut guard = shell("exec sleep 1000", &log);
        guard.signal(Signal::TERM).unwrap();
        assert_eq!(guard.wait_exit(LIMIT).unwrap().unwrap().signal(), Some(15));
        assert!(
            ProcessGuard::spawn(&mut Command::new("/no/program"), &log)
                .unwrap_err()
                .to_string()
                .contains("/no/program")
        );
    }

    #[test]
    fn mounts_end_with_their_guard() {
        if !require_root() {
            return;
        }
        let dir = temp_dir();
        let mounted = || {
            let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
            table.contains(dir.path().to_str().unwrap())
        };
        let guard = MountGuard::new(dir.path());
        for _ in 0..2 {
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("none", guard.path(), "tmpfs", flags, None).unwrap();
        }
        assert!(mounted());
        drop(guard);
        assert!(!mounted());
    }

    #[test]
    fn deadlines_pass_values_panics_and_time() {
        assert_eq!(deadline(LIMIT, || 7), Ok(7));
        let (_keep, never) = mpsc::channel::<()>();
        let short = Duration::from_millis(10);
        assert_eq!(deadline(short, move || never.recv().is_ok()), Err(TimedOut(short)));
        let panic = std::panic::catch_unwind(|| deadline(LIMIT, || panic!("inside"))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"inside"));
    }

    #[test]
    fn conditions_and_programs() {
        let mut count = 0;
        assert!(eventually(LIMIT, || {
            count += 1;
            count == 3
        }));
        assert!(!eventually(Duration::ZERO, || false));
        assert!(require_programs(&["sh", "tar"]));
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
    }
}
