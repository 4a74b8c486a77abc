//! The additional layer store under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{PATIENCE, end, unmount_below};
use crate::guard::{self, ProcessGuard};

/// A running `lazurite store`, or one that was ended and can be resumed on the same data.
#[derive(Debug)]
pub struct LayerStore {
    binary: PathBuf,
    dir: PathBuf,
    process: Option<ProcessGuard>,
}

impl LayerStore {
    /// Starts `binary store` with its data, mount, socket and log under `dir`. `config` is the text of its configuration file.
    ///
    /// # Panics
    /// If it does not say that it is ready; its log is printed.
    #[track_caller]
    pub fn start(binary: &Path, dir: &Path, config: &str) -> LayerStore {
        std::fs::create_dir_all(dir).expect("the store's directory");
        std::fs::write(dir.join("config.toml"), config).expect("the store's configuration");
        let mut store = LayerStore { binary: binary.to_owned(), dir: dir.to_owned(), process: None };
        store.resume();
        store
    }

    /// Where layers appear: what storage.conf names.
    pub fn mountpoint(&self) -> PathBuf {
        self.dir.join("made/mount")
    }

    /// Where it keeps its data.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Its socket, as `--address` names it.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("store.sock")
    }

    /// What it has logged so far, earlier runs included.
    pub fn log(&self) -> String {
        std::fs::read(self.dir.join("store.log"))
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until the log holds `text`; false if `limit` passes before.
    pub fn wait_log(&self, text: &str, limit: Duration) -> bool {
        guard::eventually(limit, || self.log().contains(text))
    }

    /// Ends it with SIGTERM.
    ///
    /// # Panics
    /// If it does not end; its log is printed.
    #[track_caller]
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            assert!(end(process), "lazurite store does not end on SIGTERM: {}", self.log());
        }
    }

    /// Kills it with SIGKILL.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("the killed store can be waited for");
        }
    }

    /// Starts it again after [`LayerStore::stop`] or [`LayerStore::kill`], on the same data.
    ///
    /// # Panics
    /// As [`LayerStore::start`].
    #[track_caller]
    pub fn resume(&mut self) {
        assert!(self.process.is_none(), "lazurite store runs already");
        let (mut process, ready) = self.spawn(&[]);
        let alive = matches!(process.wait_exit(Duration::ZERO), Ok(None));
        assert!(ready && alive, "lazurite store did not start: {}", process.log());
        self.process = Some(process);
    }

    /// Starts another one with `--replace` beside the one that runs, which ends.
    ///
    /// # Panics
    /// As [`LayerStore::start`], or if the old one does not end.
    #[track_caller]
    pub fn replace(&mut self) {
        let mut old = self.process.take().expect("lazurite store runs");
        let (process, ready) = self.spawn(&["--replace"]);
        assert!(ready, "lazurite store did not start: {}", process.log());
        self.process = Some(process);
        assert!(matches!(old.wait_exit(PATIENCE), Ok(Some(_))), "the old store does not end: {}", self.log());
    }

    /// Starts one; whether it has said that it is ready, and did not end.
    fn spawn(&self, more: &[&str]) -> (ProcessGuard, bool) {
        let said = |log: &str| log.lines().filter(|line| line.starts_with("ready: ")).count();
        let before = said(&self.log());
        let mut process = ProcessGuard::spawn(
            self.command("store").args(more).arg(self.mountpoint()),
            self.dir.join("store.log"),
        )
        .expect("the lazurite binary");
        let ready = guard::eventually(PATIENCE, || {
            said(&process.log()) > before || !matches!(process.wait_exit(Duration::ZERO), Ok(None))
        });
        let is_ready = ready && said(&process.log()) > before;
        (process, is_ready)
    }

    /// `lazurite` with a command for this store.
    pub fn command(&self, command: &str) -> Command {
        let mut lazurite = Command::new(&self.binary);
        lazurite.arg(command).arg("--config").arg(self.dir.join("config.toml"));
        lazurite.arg("--root").arg(self.root()).arg("--address").arg(self.socket());
        lazurite
    }
}

impl Drop for LayerStore {
    fn drop(&mut self) {
        // No panic here: the test may be in one.
        self.process.take().map(end);
        // A stop leaves the mount; here nobody needs it any more.
        unmount_below(&self.dir);
    }
}
