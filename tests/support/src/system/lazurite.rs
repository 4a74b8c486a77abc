//! The daemon under test.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use super::{Containerd, PATIENCE, end, patiently, unmount_below};
use crate::guard::{self, ProcessGuard};

/// A running `lazurite serve`, or one that was ended and can be resumed on the same data.
#[derive(Debug)]
pub struct Lazurite {
    binary: PathBuf,
    dir: PathBuf,
    process: Option<ProcessGuard>,
}

impl Lazurite {
    /// Starts `binary serve` with its data, socket and log under `dir`. `config` is the text of its configuration file;
    /// empty means the defaults.
    ///
    /// # Panics
    /// If it does not open its socket; its log is printed.
    pub fn start(binary: &Path, dir: &Path, config: &str) -> Lazurite {
        std::fs::create_dir_all(dir).expect("Lazurite's directory");
        std::fs::write(dir.join("config.toml"), config).expect("Lazurite's configuration");
        let mut lazurite = Lazurite { binary: binary.to_owned(), dir: dir.to_owned(), process: None };
        lazurite.resume();
        lazurite
    }

    /// The socket containerd is told of.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("lazurite.sock")
    }

    /// Where it keeps its data.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Its process id, if it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(ProcessGuard::pid)
    }

    /// What it has logged so far, earlier runs included.
    pub fn log(&self) -> String {
        std::fs::read(self.dir.join("lazurite.log"))
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until the log holds `text`; false if `limit` passes before.
    pub fn wait_log(&self, text: &str, limit: Duration) -> bool {
        guard::eventually(limit, || self.log().contains(text))
    }

    /// Ends it as a service manager does, with SIGTERM.
    ///
    /// # Panics
    /// If it does not end; its log is printed.
    #[track_caller]
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            assert!(end(process), "lazurite serve does not end on SIGTERM: {}", self.log());
        }
    }

    /// Kills it with SIGKILL.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("the killed daemon can be waited for");
        }
    }

    /// Ends it as a crash of its own does, with SIGABRT.
    ///
    /// # Panics
    /// If it does not end.
    pub fn crash(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(rustix::process::Signal::ABORT).expect("the daemon runs");
            assert!(matches!(process.wait_exit(PATIENCE), Ok(Some(_))), "the daemon outlives SIGABRT");
        }
    }

    /// Starts it again after [`Lazurite::stop`] or [`Lazurite::kill`], on the same data.
    ///
    /// # Panics
    /// As [`Lazurite::start`].
    pub fn resume(&mut self) {
        assert!(self.process.is_none(), "lazurite runs already");
        self.spawn(&[]);
    }

    fn spawn(&mut self, more: &[&str]) {
        let mut command = Command::new(&self.binary);
        command.arg("serve").args(more).arg("--config").arg(self.dir.join("config.toml"));
        command.arg("--root").arg(self.root()).arg("--address").arg(self.socket());
        let log = self.dir.join("lazurite.log");
        let served = self.log().matches("serving").count();
        let mut process = ProcessGuard::spawn(&mut command, log).expect("the lazurite binary");
        let ready = guard::eventually(PATIENCE, || {
            // One that is replaced may still answer.
            (process.log().matches("serving").count() > served && UnixStream::connect(self.socket()).is_ok())
                || !matches!(process.wait_exit(Duration::ZERO), Ok(None))
        });
        let alive = matches!(process.wait_exit(Duration::ZERO), Ok(None));
        assert!(ready && alive, "lazurite serve did not start: {}", process.log());
        self.process = Some(process);
    }

    /// Starts another one with `--replace` beside the one that runs, which ends.
    ///
    /// # Panics
    /// As [`Lazurite::start`], or if the old one does not end.
    #[track_caller]
    pub fn replace(&mut self) {
        let mut old = self.process.take().expect("lazurite runs");
        self.spawn(&["--replace"]);
        assert!(
            matches!(old.wait_exit(PATIENCE), Ok(Some(_))),
            "the old daemon does not end: {}",
            self.log()
        );
    }

    /// [`Lazurite::stop`] and [`Lazurite::resume`].
    ///
    /// # Panics
    /// As [`Lazurite::stop`] and [`Lazurite::start`].
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        self.resume();
    }

    /// Runs `lazurite pull --json` into a containerd; `more` are further arguments, the reference among them.
    ///
    /// # Panics
    /// If the program cannot be started.
    pub fn pull(&self, containerd: &Containerd, more: &[&str]) -> Output {
        let mut command = patiently(&self.binary);
        command.args(["pull", "--json", "--plain-http", "--snapshotter", super::SNAPSHOTTER]);
        command.arg("--address").arg(containerd.address());
        command.args(["--namespace", containerd.namespace()]).args(more);
        command.output().expect("the lazurite binary")
    }
}

impl Drop for Lazurite {
    fn drop(&mut self) {
        // No panic here: the test may be in one.
        self.process.take().map(end);
        // A stop leaves a busy mount alone; here nobody needs it any more.
        unmount_below(&self.dir);
    }
}
