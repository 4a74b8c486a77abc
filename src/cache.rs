//! `lazurite cache`: what the daemon keeps on disk, and giving it back.
//!
//! Talks to the daemon's control socket; decides nothing.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::control::control_client::ControlClient;
use proto::control::{EvictRequest, EvictResponse, Layer, ListLayersRequest, State};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::cli::{CacheCommand, CacheLsArgs, CachePruneArgs, CacheRmArgs};
use crate::config::Config;
use crate::containerd::refused;
use crate::daemon;
use crate::image::short;
use crate::progress::size;

/// Runs one of the commands.
///
/// # Errors
///
/// The daemon cannot be reached or refuses.
pub async fn run(command: &CacheCommand, config: &Config) -> anyhow::Result<ExitCode> {
    let mut daemon = daemon::client(&config.address).await?;
    match command {
        CacheCommand::Ls(CacheLsArgs { json, .. }) => {
            let answer = daemon.list_layers(ListLayersRequest {}).await;
            let answer = answer.map_err(refused("cannot list the layers"))?.into_inner();
            let text = match json {
                true => serde_json::to_string_pretty(&json!({
                    "layers": answer.layers.iter().map(as_json).collect::<Vec<_>>(),
                    "most_bytes": (answer.most_bytes > 0).then_some(answer.most_bytes),
                }))?,
                false => table(&answer.layers, answer.most_bytes, now()),
            };
            writeln!(std::io::stdout(), "{text}")?;
            Ok(ExitCode::SUCCESS)
        }
        CacheCommand::Rm(CacheRmArgs { layers, json, .. }) => {
            let known = daemon.list_layers(ListLayersRequest {}).await;
            let known = known.map_err(refused("cannot list the layers"))?.into_inner().layers;
            let toc_digests =
                layers.iter().map(|name| resolve(name, &known)).collect::<anyhow::Result<Vec<_>>>()?;
            evict(&mut daemon, EvictRequest { toc_digests, unused_seconds: 0 }, *json).await
        }
        CacheCommand::Prune(CachePruneArgs { unused, json, .. }) => {
            let request = EvictRequest { toc_digests: Vec::new(), unused_seconds: unused.as_secs() };
            evict(&mut daemon, request, *json).await
        }
    }
}

/// The layer that is meant: a TOC or blob digest, or the beginning of one's hex digits.
fn resolve(name: &str, known: &[Layer]) -> anyhow::Result<String> {
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    let is = |digest: &str| digest.strip_prefix("sha256:").is_some_and(|digits| digits.starts_with(hex));
    let mut found = known.iter().filter(|layer| is(&layer.toc_digest) || is(&layer.blob_digest));
    match (hex.is_empty(), found.next(), found.next()) {
        (false, Some(layer), None) => Ok(layer.toc_digest.clone()),
        (false, Some(_), Some(_)) => anyhow::bail!("several layers begin with {name}; give more of it"),
        _ => anyhow::bail!("the daemon has no layer {name}; `lazurite cache ls` lists them"),
    }
}

/// The exit status is 1 if a layer that was named could not go.
async fn evict(
    daemon: &mut ControlClient<Channel>,
    request: EvictRequest,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let named = !request.toc_digests.is_empty();
    let answer = daemon.evict(request).await.map_err(refused("cannot evict"))?.into_inner();
    let EvictResponse { evicted } = &answer;
    let refusals = evicted.iter().filter(|one| !one.refused.is_empty());
    let text = match json {
        true => {
            let evicted = evicted.iter().map(|one| {
                let refused = Some(&one.refused).filter(|why| !why.is_empty());
                json!({ "toc_digest": one.toc_digest, "bytes": one.bytes, "refused": refused })
            });
            serde_json::to_string_pretty(&json!({ "evicted": evicted.collect::<Vec<Value>>() }))? + "\n"
        }
        false => {
            let mut text = String::new();
            for one in evicted.iter().filter(|one| one.bytes > 0) {
                writeln!(text, "{}  {} given back", short(&one.toc_digest), size(one.bytes))?;
            }
            for one in refusals.clone().filter(|_| named) {
                writeln!(text, "{}  stays: {}", short(&one.toc_digest), one.refused)?;
            }
            let total = evicted.iter().map(|one| one.bytes).sum();
            writeln!(text, "{} in all", size(total))?;
            text
        }
    };
    write!(std::io::stdout(), "{text}")?;
    Ok(if named && refusals.count() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What has become of a layer, in a word.
pub fn state(layer: &Layer) -> &'static str {
    match layer.state() {
        State::Unspecified => "unknown",
        State::Lazy => "lazy",
        State::Local => "local",
        State::Graduated => "graduated",
    }
}

fn as_json(layer: &Layer) -> Value {
    json!({
        "toc_digest": layer.toc_digest,
        "blob_digest": layer.blob_digest,
        "source": layer.source,
        "content_bytes": layer.content_bytes,
        "local_bytes": layer.local_bytes,
        "state": state(layer),
        "used": layer.used,
        "slots": layer.slots,
        "error": Some(&layer.error).filter(|error| !error.is_empty()),
    })
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn table(layers: &[Layer], most: u64, now: u64) -> String {
    let mut layers: Vec<&Layer> = layers.iter().collect();
    layers.sort_by_key(|layer| std::cmp::Reverse(layer.local_bytes));
    let mut text = format!(
        "{:<12}  {:<9}  {:>10}  {:>10}  {:>9}  {}\n",
        "LAYER", "STATE", "LOCAL", "OF", "USED", "FROM"
    );
    for layer in &layers {
        let age = Duration::from_secs(now.saturating_sub(layer.used));
        text += &format!(
            "{:<12}  {:<9}  {:>10}  {:>10}  {:>9}  {}\n",
            short(&layer.toc_digest),
            state(layer),
            size(layer.local_bytes),
            size(layer.content_bytes),
            ago(age),
            layer.source.split('@').next().unwrap_or_default()
        );
        if !layer.error.is_empty() {
            text += &format!("    {}\n", layer.error);
        }
    }
    let local = layers.iter().map(|layer| layer.local_bytes).sum();
    let limit = if most > 0 { format!(" of {} at most", size(most)) } else { String::new() };
    text + &format!("{} layers, {}{limit}", layers.len(), size(local))
}

fn ago(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(toc: &str, blob: &str) -> Layer {
        Layer {
            toc_digest: format!("sha256:{toc:0<64}"),
            blob_digest: format!("sha256:{blob:0<64}"),
            source: "r.example/app@sha256:x".to_owned(),
            content_bytes: 4 << 20,
            local_bytes: 1 << 20,
            state: State::Lazy.into(),
            used: 1000,
            slots: vec![1],
            error: "timeout: slow".to_owned(),
        }
    }

    #[test]
    fn layers_are_named_by_the_beginning_of_a_digest() {
        let known = [layer("aa1", "bb1"), layer("aa2", "cc1")];
        for (name, found) in [("aa1", 0), ("sha256:aa2", 1), ("bb", 0), ("cc10", 1)] {
            assert_eq!(resolve(name, &known).unwrap(), known[found].toc_digest);
        }
        assert!(resolve("aa", &known).unwrap_err().to_string().contains("several"));
        for name in ["", "sha256:", "dd"] {
            assert!(resolve(name, &known).unwrap_err().to_string().contains("no layer"), "{name}");
        }
    }

    #[test]
    fn a_table_says_what_is_where() {
        let text = table(&[layer("aa1", "bb1")], 8 << 20, 1000 + 300);
        let lines: Vec<&str> = text.lines().collect();
        let row: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(row, ["aa1000000000", "lazy", "1.00", "MiB", "4.00", "MiB", "5", "min", "r.example/app"]);
        assert_eq!(lines[2], "    timeout: slow");
        assert_eq!(lines[3], "1 layers, 1.00 MiB of 8.00 MiB at most");
    }
}
