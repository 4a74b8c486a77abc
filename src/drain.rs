//! `lazurite drain`: waits until no container uses a lazy layer, and says meanwhile who does.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use proto::control::DrainRequest;
use serde_json::json;
use tokio::time::Instant;

use crate::cli::DrainArgs;
use crate::config::Config;
use crate::containerd::refused;
use crate::{daemon, signals};

/// How often it is looked whether containers have ended.
const INTERVAL: Duration = Duration::from_secs(1);

/// Drains, until nobody is in the way or the time is up.
///
/// # Errors
///
/// The daemon cannot be reached or refuses.
pub async fn run(args: &DrainArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let mut client = daemon::client(&config.address).await?;
    let until = Instant::now() + args.timeout;
    let mut told = BTreeSet::new();
    let (busy, status) = loop {
        let answer = client.drain(DrainRequest {}).await.map_err(refused("cannot drain"))?;
        let busy: BTreeSet<String> = answer.into_inner().busy.into_iter().collect();
        if busy.is_empty() {
            break (busy, ExitCode::SUCCESS);
        }
        if busy != told && !args.json {
            writeln!(std::io::stderr(), "still in use by {}", list(&busy))?;
        }
        told.clone_from(&busy);
        if Instant::now() >= until {
            break (busy, ExitCode::FAILURE);
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            signal = signals::interrupted() => break (busy, ExitCode::from(signal?)),
        }
    };
    let mut out = std::io::stdout();
    match (args.json, busy.is_empty()) {
        (true, drained) => writeln!(out, "{}", json!({ "drained": drained, "busy": busy }))?,
        (false, true) => writeln!(out, "drained: the lazy layers are unmounted")?,
        (false, false) => {
            writeln!(out, "not drained: {} mounts use lazy layers; end their containers", busy.len())?;
        }
    }
    Ok(status)
}

fn list(busy: &BTreeSet<String>) -> String {
    let first: Vec<&str> = busy.iter().take(5).map(String::as_str).collect();
    let more = busy.len().saturating_sub(first.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", first.join(", "))
}
