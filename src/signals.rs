//! The signals that ask a command to stop.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Ends when the user or the system wants the command to stop, with the exit status that says so: 128 and the
/// signal's number, as shells have it.
///
/// # Errors
///
/// Signals cannot be listened for.
pub async fn interrupted() -> anyhow::Result<u8> {
    let listen = |kind| signal(kind).context("cannot listen for signals");
    let mut hangup = listen(SignalKind::hangup())?;
    let mut int = listen(SignalKind::interrupt())?;
    let mut term = listen(SignalKind::terminate())?;
    Ok(tokio::select! {
        _ = hangup.recv() => 129,
        _ = int.recv() => 130,
        _ = term.recv() => 143,
    })
}
