//! `lazurite store`: the daemon that containers/storage (podman, buildah, CRI-O, skopeo) looks for layers in.
//!
//! The same data plane as `lazurite serve` under other names, and without containerd: what is shown is kept by references
//! ([`fusefs::Refs`]), not by snapshots. Owns the order of start and stop.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use fusefs::{Audits, OpaqueXattr, Plane, Refs, Stay};
use registry::Registry;
use tokio::signal::unix::{SignalKind, signal};

use super::control::{self, Role};
use super::{
    GRACE, Mount, Others, RUNTIME_GRACE, cri, keeper, listen, lock, memory, plane, restore, watchdog,
};
use crate::config::Config;

/// The mount answers within this, or something is wrong.
const ANSWER: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
///
/// The daemon cannot start, another one among the reasons; or it ends by itself.
pub fn run(config: &Config, mountpoint: &Path, others: Others) -> anyhow::Result<()> {
    memory::settle();
    memory::allow_files();
    let root = std::path::absolute(config.store.root()).context("finding the root directory")?;
    super::create_root(&root)?;
    let mountpoint = place(mountpoint)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("lazurite").build()?;
    let _lock = lock(&root, others)?;
    let result = runtime.block_on(serve(config, &root, &mountpoint));
    if let Ok(Mount::Left) = result {
        // As with snapshots: what was asked is answered by the next process.
        std::process::exit(0);
    }
    runtime.shutdown_timeout(RUNTIME_GRACE);
    result.map(drop)
}

/// A mountpoint as the mount table has it: its parent without links. It may be a mount that waits for us, and is not looked at.
fn place(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(mountpoint).context("finding the mountpoint")?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        anyhow::bail!("{} cannot be mounted on: name a directory of its own", path.display());
    };
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    Ok(fs::canonicalize(parent).with_context(|| format!("finding {}", parent.display()))?.join(name))
}

async fn serve(config: &Config, root: &Path, mountpoint: &Path) -> anyhow::Result<Mount> {
    let mut hosts = config.registry();
    let pulls = hosts.pull_credentials.get_or_insert_default().clone();
    let registry = Registry::new(hosts).context("setting up the registry client")?;
    let plane = Plane::start(settings(config, root, mountpoint), registry.clone())
        .with_context(|| format!("setting up {}", root.display()))?;
    let refs = Refs::open(&plane, registry, config.store.lookup_timeout())
        .with_context(|| format!("reading what is known of references under {}", root.display()))?;
    let shown: BTreeMap<_, _> = refs.shown().into_iter().collect();
    plane.expect(shown.keys().copied());
    plane
        .serve_refs(keeper::find(root), refs.clone())
        .with_context(|| format!("mounting at {}", mountpoint.display()))?;
    let absent = plane::Absent::default();
    restore::restore(&plane, shown, &absent).await;
    let (job, wanted) = (plane.clone(), refs.layers());
    tokio::task::spawn_blocking(move || {
        if let Err(error) = job.collect(&wanted) {
            tracing::warn!(%error, "looking for layers nobody names");
        }
    });
    tokio::spawn(memory::keep_small(plane.clone()));
    tokio::spawn(watchdog::watch(plane.clone()));

    let address = config.store.address();
    let control_address = control::address(&address);
    let listener = listen(&control_address, "this store another --address").await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let shutdown = async move {
        let mut stopped = stopped;
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let role = Role::Store(refs.clone(), cri::remember(pulls));
    let mut server = tokio::spawn(control::serve(listener, plane.clone(), role, absent, shutdown));
    // Who waits for us to be ready calls podman next, which fails where nothing answers.
    watchdog::look(&plane, ANSWER).await.context("the mount does not answer")?;
    tracing::info!(mountpoint = %mountpoint.display(), root = %root.display(), "serving");
    let _ = writeln!(std::io::stdout(), "ready: {}", mountpoint.display());
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping");
    stop.send_replace(true);
    let _ = tokio::time::timeout(GRACE, &mut server).await;
    let _ = fs::remove_file(&control_address);
    let left = tokio::task::spawn_blocking(move || {
        refs.flush();
        plane.stop()
    });
    Ok(if left.await? { Mount::Left } else { Mount::Gone })
}

/// The data plane's settings.
fn settings(config: &Config, root: &Path, mountpoint: &Path) -> fusefs::PlaneConfig {
    let mut settings = plane::settings(config, root, snapshotter::Config::new(root).overlay);
    settings.mountpoint = mountpoint.to_owned();
    settings.stay = Stay::UntilDrained;
    // Root's overlays look for one mark, a user's for the other, and both may use the same store.
    settings.opaque = OpaqueXattr::Both;
    // podman has linked its layers to the mount for good: a directory beside it would be of no use.
    settings.fetch.audits = Audits::Off;
    settings.attach_deadline = config.store.lookup_timeout();
    settings
}
