//! Telling the service manager that the daemon lives: only as long as its mount answers.
//!
//! The look through the mount is a process of its own (`lazurite probe`): the daemon must not wait for what it serves itself. It
//! asks for the file system's statistics, which no kernel remembers, so that an answer is one of ours. Without an answer the
//! service manager is not told, ends the daemon in the end, and starts the next, which goes on with the mount.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use fusefs::Plane;
use sd_notify::NotifyState;
use tokio::process::Command;

/// Looks through the mount and tells, as often as the service manager wants. Without one that wants it, returns at once.
pub async fn watch(plane: Arc<Plane>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    // Twice in the time, as systemd recommends; half of that for an answer.
    let mut tick = tokio::time::interval(limit / 2);
    loop {
        tick.tick().await;
        match look(&plane, limit / 4).await {
            Ok(()) => {
                let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            }
            Err(error) => {
                tracing::error!(%error, "the mount does not answer: the service manager is not told that we live")
            }
        }
    }
}

/// Looks through the mount, if there is one: one that was drained has none.
///
/// # Errors
///
/// It does not answer within the limit.
pub async fn look(plane: &Plane, limit: Duration) -> anyhow::Result<()> {
    if plane.is_serving() { answers(&plane.mountpoint(), limit).await } else { Ok(()) }
}

async fn answers(mountpoint: &Path, limit: Duration) -> anyhow::Result<()> {
    let mut probe = Command::new("/proc/self/exe");
    probe.arg("probe").arg(mountpoint).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    let status = tokio::time::timeout(limit, probe.status()).await.context("no answer in time")?;
    anyhow::ensure!(status.context("no process to look with")?.success(), "looking failed");
    Ok(())
}

/// `lazurite probe`: asks the file system mounted there.
///
/// # Errors
///
/// It is not ours, or its connection has ended.
pub fn probe(mountpoint: &Path) -> anyhow::Result<()> {
    /// `FUSE_SUPER_MAGIC` of linux/magic.h.
    const FUSE: i64 = 0x6573_5546;
    let found = rustix::fs::statfs(mountpoint).with_context(|| mountpoint.display().to_string())?;
    #[allow(clippy::useless_conversion, reason = "the type differs by architecture")]
    let kind = i64::from(found.f_type);
    anyhow::ensure!(kind == FUSE, "{} is not mounted", mountpoint.display());
    Ok(())
}
