//! Running a program that is asked for a login: with a time limit, and with bounds on what it writes.
//!
//! What a program writes is never repeated: it may be the secret. Its standard error goes nowhere, for the same reason.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Programs of clouds ask a service that answers within a second or two.
const LIMIT: Duration = Duration::from_secs(20);
/// Tokens of clouds have some KiB.
const MAX_OUTPUT: u64 = 256 << 10;

/// What a program said.
pub(super) struct Said {
    pub(super) status: ExitStatus,
    pub(super) output: Vec<u8>,
}

/// Runs `command` with `input` on its standard input. It is killed when the caller waits no longer.
///
/// # Errors
///
/// Why it has not answered, without anything it wrote.
pub(super) async fn run(mut command: Command, input: &[u8]) -> Result<Said, String> {
    let call = async {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot be run ({error})"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read its input may answer all the same.
            let _ = stdin.write_all(input).await;
        }
        let mut output = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            let read = stdout.take(MAX_OUTPUT).read_to_end(&mut output).await;
            read.map_err(|error| format!("cannot be read from ({error})"))?;
        }
        let status = child.wait().await.map_err(|error| format!("cannot be waited for ({error})"))?;
        Ok(Said { status, output })
    };
    let called = tokio::time::timeout(LIMIT, call).await;
    called.map_err(|_| format!("has not answered within {LIMIT:?}"))?
}
