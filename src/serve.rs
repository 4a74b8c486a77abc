//! `lazurite serve`: the daemon.
//!
//! Owns the order of start and stop, the lock on the root directory, the socket, and the few lines that plug the data
//! plane into the control plane. Start needs no network: layers come back from their indexes.

mod control;
mod cri;
mod health;
mod keeper;
mod memory;
mod plane;
mod restore;
mod store;
mod watchdog;

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use fusefs::Plane;
use registry::{PullCredentials, Registry};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal};
use snapshotter::{Remote, Snapshotter};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
};

use crate::config::Config;

pub use control::address as control_address;
use restore::Restoring;

pub use keeper::run as keep;
pub use store::run as store;
pub use watchdog::probe;

/// After a signal, calls under way have this long to end. A call that waits for a registry may not hold up a stop.
const GRACE: Duration = Duration::from_secs(5);
/// What is left after that (threads in system calls) may not either.
const RUNTIME_GRACE: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
///
/// The daemon cannot start, another one among the reasons; or it ends by itself.
pub fn run(config: &Config, others: Others) -> anyhow::Result<()> {
    memory::settle();
    memory::allow_files();
    // Mount options name directories, and the daemon's own working directory means nothing to who mounts them.
    let root = std::path::absolute(&config.root).context("finding the root directory")?;
    create_root(&root)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("lazurite").build()?;
    // All that takes a while comes before a daemon that is replaced stops answering.
    let prepared = async {
        let registry = Registry::new(config.registry()).context("setting up the registry client")?;
        let overlay = snapshotter::Config::new(&root).overlay;
        let pulls = registry.pull_credentials();
        let plane = Plane::start(plane::settings(config, &root, overlay), registry)
            .with_context(|| format!("setting up {}", root.display()))?;
        let known = match others {
            Others::Stop => restore::open_ahead(&plane, &config.address, &root).await,
            Others::Refuse => Vec::new(),
        };
        anyhow::Ok((plane, known, pulls))
    };
    let (plane, known, pulls) = runtime.block_on(prepared)?;
    let _lock = lock(&root, others)?;
    let result = runtime.block_on(serve(config, &root, plane, known, pulls));
    if let Ok(Mount::Left) = result {
        // What readers wait for was not answered: giving it up would be an error to them, ending is a pause.
        std::process::exit(0);
    }
    runtime.shutdown_timeout(RUNTIME_GRACE);
    result.map(drop)
}

/// What became of the mount at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mount {
    /// The next daemon goes on with it.
    Left,
    /// It is gone, or nobody can go on with it.
    Gone,
}

/// `pulls` is where logins go that the kubelet sends, if they are to be seen.
async fn serve(
    config: &Config,
    root: &Path,
    plane: Arc<Plane>,
    known: Vec<Remote>,
    pulls: Option<PullCredentials>,
) -> anyhow::Result<Mount> {
    let settings = snapshotter::Config::new(root);
    let mount = || {
        plane
            .serve(keeper::find(root))
            .with_context(|| format!("mounting lazy layers under {}", root.display()))
    };
    // Readers wait for their own layer only, callers until all are back.
    let absent = plane::Absent::default();
    let mut restoring = Restoring::new(plane.clone(), root, absent.clone());
    if !known.is_empty() {
        plane.look_again();
        plane.expect_others(true);
        plane.expect(known.iter().map(|remote| remote.slot));
        mount()?;
        restoring.begin(known);
    }
    let listener = listen(&config.address, "this daemon another --address").await?;
    let control = control::address(&config.address);
    let control_listener = listen(&control, "this daemon another --address").await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let shutdown = || {
        let mut stopped = stopped.clone();
        async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }
    };
    let keychain = &config.cri_keychain;
    if let Some(pulls) = pulls {
        let listener = listen(&keychain.listen_path, "cri_keychain.listen_path another value").await?;
        let containerd = keychain.image_service_path.clone();
        tokio::spawn(cri::serve(listener, containerd, cri::remember(pulls), shutdown()));
    }
    let snapshotter = Arc::new(Snapshotter::open(settings, Arc::new(plane::Port::new(plane.clone(), root)))?);
    if let Some(graduations) = plane.graduations() {
        tokio::spawn(plane::relink(graduations, snapshotter.clone()));
    }
    let remotes = restoring.left(snapshotter.remote_snapshots().await?);
    plane.expect(remotes.iter().map(|remote| remote.slot));
    plane.expect_others(false);
    if !plane.is_serving() {
        mount()?;
    }
    restoring.begin(remotes);
    restoring.finish(&snapshotter).await;
    tokio::spawn(memory::keep_small(plane.clone()));
    tokio::spawn(watchdog::watch(plane.clone()));
    if !config.health.address.is_empty() {
        health::serve(&config.health.address, plane.clone()).await?;
    }

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut server = tokio::spawn(snapshotter::service::serve(listener, snapshotter.clone(), shutdown()));
    let role = control::Role::Snapshotter(snapshotter.clone());
    tokio::spawn(control::serve(control_listener, plane.clone(), role, absent, shutdown()));
    tracing::info!(address = %config.address.display(), root = %root.display(), "serving");
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let ended = tokio::select! {
        result = &mut server => Some(result),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
    };
    let failed = ended.map(|result| match result {
        Ok(Ok(())) => anyhow::anyhow!("the gRPC server ended by itself"),
        Ok(Err(error)) => anyhow::Error::new(error).context("the gRPC server failed"),
        Err(panic) => anyhow::Error::new(panic).context("the gRPC server panicked"),
    });
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping");
    stop.send_replace(true);
    let calls = async {
        if failed.is_none() {
            let _ = server.await;
        }
        snapshotter.close().await;
    };
    if tokio::time::timeout(GRACE, calls).await.is_err() {
        tracing::warn!("calls still under way are cut off");
    }
    // The next daemon binds anew; a client must not connect to nobody.
    let _ = fs::remove_file(&config.address);
    let _ = fs::remove_file(&control);
    if keychain.enable_keychain {
        let _ = fs::remove_file(&keychain.listen_path);
    }
    let left = tokio::task::spawn_blocking(move || plane.stop()).await?;
    match (failed, left) {
        // As with a stop: the next daemon goes on with the mount, and readers wait for it.
        (Some(error), true) => {
            tracing::error!("{error:#}");
            std::process::exit(1);
        }
        (Some(error), false) => Err(error),
        (None, true) => Ok(Mount::Left),
        (None, false) => Ok(Mount::Gone),
    }
}

/// The root is root's alone: set-id programs of images lie under it.
fn create_root(root: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .with_context(|| format!("creating the root directory {}", root.display()))
}

/// What becomes of a daemon that serves the same root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// It stays, and we do not start.
    Refuse,
    /// It is asked to stop, and waited for.
    Stop,
}

/// How long a daemon that is replaced may take to stop: its own limits are shorter.
const REPLACED: Duration = Duration::from_secs(30);

/// One daemon per root: held until the process ends, however it ends.
fn lock(root: &Path, others: Others) -> anyhow::Result<File> {
    let path = root.join("lock");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        if others == Others::Stop && stop(&file, holder.trim())? {
            return owned(file);
        }
        bail!(
            "another lazurite (process {}) serves {}; stop it, or give this one another --root",
            holder.trim(),
            root.display()
        );
    }
    owned(file)
}

/// Writes into the lock who has it.
fn owned(mut file: File) -> anyhow::Result<File> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// Asks the process that holds a lock to stop; whether the lock is ours then.
fn stop(lock: &File, holder: &str) -> anyhow::Result<bool> {
    let process = holder.parse().ok().and_then(Pid::from_raw);
    let process = process.with_context(|| format!("the lock does not name a process: {holder:?}"))?;
    // The lock is held, so the process that wrote its number lives.
    rustix::process::kill_process(process, Signal::TERM)
        .with_context(|| format!("asking process {holder} to stop"))?;
    let until = Instant::now() + REPLACED;
    while Instant::now() < until {
        if rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(false)
}

/// Listens on a socket that is root's alone; `else_give` is what to do if somebody else does.
async fn listen(address: &Path, else_give: &str) -> anyhow::Result<UnixListener> {
    if let Some(dir) = address.parent().filter(|d| !d.as_os_str().is_empty()) {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    if address.exists() {
        if UnixStream::connect(address).await.is_ok() {
            bail!("something already listens on {}; give {else_give}", address.display());
        }
        fs::remove_file(address)
            .with_context(|| format!("removing the stale socket {}", address.display()))?;
    }
    let listener =
        UnixListener::bind(address).with_context(|| format!("listening on {}", address.display()))?;
    fs::set_permissions(address, Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_has_one_daemon_and_the_second_is_told_which() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path(), Others::Refuse).unwrap();
        let error = lock(dir.path(), Others::Refuse).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
        drop(first);
        lock(dir.path(), Others::Refuse).unwrap();
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("run/lazurite.sock");
        let live = listen(&address, "it another").await.unwrap();
        let error = listen(&address, "it another").await.unwrap_err().to_string();
        assert!(error.contains("already listens") && error.ends_with("; give it another"), "{error}");
        drop(live);
        listen(&address, "it another").await.unwrap();
        assert_eq!(fs::metadata(&address).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
