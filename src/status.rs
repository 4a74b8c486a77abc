//! `lazurite status`: the lazy layers, of a store who uses them, and what became of those that could not be lazy.
//!
//! Asks the daemon's control socket and puts together what it says; decides nothing.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::Write as _;

use proto::control::{
    Fallback, Layer, ListFallbacksRequest, ListFallbacksResponse, ListLayersRequest, ListSlotsRequest, Slot,
};
use serde_json::{Value, json};
use snapshotter::LayerRequest;
use tonic::Code;

use crate::cache::state;
use crate::cli::StatusArgs;
use crate::config::Config;
use crate::containerd::refused;
use crate::daemon;
use crate::image::short;
use crate::progress::size;

/// As many of the layers that could not be lazy are named; JSON has all that the daemon remembers.
const SHOWN: usize = 10;

/// Prints the state of the daemon that runs.
///
/// # Errors
///
/// The daemon cannot be reached or refuses.
pub async fn run(args: &StatusArgs, config: &Config) -> anyhow::Result<()> {
    let mut daemon = daemon::client(&config.address).await?;
    let slots = daemon.list_slots(ListSlotsRequest {}).await;
    let slots = slots.map_err(refused("cannot list the slots"))?.into_inner().slots;
    let layers = daemon.list_layers(ListLayersRequest {}).await;
    let layers = layers.map_err(refused("cannot list the layers"))?.into_inner().layers;
    let fallbacks = match daemon.list_fallbacks(ListFallbacksRequest {}).await {
        Ok(fallbacks) => Some(fallbacks.into_inner()),
        Err(status) if status.code() == Code::Unimplemented => None,
        Err(status) => return Err(refused("cannot list the layers left to containerd")(status)),
    };
    let rows = rows(&slots, &layers)?;
    let mut out = std::io::stdout();
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&as_json(&rows, fallbacks.as_ref()))?)?,
        false => write!(out, "{}", table(&rows, fallbacks.as_ref()))?,
    }
    Ok(())
}

/// A slot, and the layer in it if it is there.
#[derive(Debug)]
struct Row<'a> {
    slot: u64,
    request: LayerRequest,
    layer: Option<&'a Layer>,
    /// What went wrong last, with the reason code in front; empty for nothing.
    error: &'a str,
    /// How many say that they use it, of a store.
    uses: u64,
}

impl Row<'_> {
    fn state(&self) -> &'static str {
        match self.layer {
            Some(layer) => state(layer),
            None if self.error.is_empty() => "opening",
            None => "error",
        }
    }
}

fn rows<'a>(slots: &'a [Slot], layers: &'a [Layer]) -> anyhow::Result<Vec<Row<'a>>> {
    let of: BTreeMap<u64, &Layer> =
        layers.iter().flat_map(|layer| layer.slots.iter().map(move |&slot| (slot, layer))).collect();
    let row = |slot: &'a Slot| {
        let layer = of.get(&slot.slot).copied();
        let error = layer.map_or(&slot.error, |layer| &layer.error);
        let request = serde_json::from_slice(&slot.layer)?;
        Ok(Row { slot: slot.slot, request, layer, error, uses: slot.uses })
    };
    slots.iter().map(row).collect()
}

/// Without `fallbacks` it is a store, which knows who uses what.
fn as_json(rows: &[Row<'_>], fallbacks: Option<&ListFallbacksResponse>) -> Value {
    let row = |row: &Row<'_>| {
        json!({
            "slot": row.slot,
            "state": row.state(),
            "reference": row.request.reference,
            "toc_digest": row.request.toc_digest,
            "blob_digest": row.request.layer_digest,
            "content_bytes": row.layer.map(|layer| layer.content_bytes),
            "local_bytes": row.layer.map(|layer| layer.local_bytes),
            "uses": fallbacks.is_none().then_some(row.uses),
            "error": row.error.split_once(": ").map(|(reason, message)| {
                json!({ "reason": reason, "message": message })
            }),
        })
    };
    let fallback = |one: &Fallback| {
        json!({
            "target": one.target,
            "blob_digest": Some(&one.blob_digest).filter(|digest| !digest.is_empty()),
            "reason": one.reason,
            "message": one.message,
        })
    };
    json!({
        "layers": rows.iter().map(row).collect::<Vec<_>>(),
        "fallbacks": fallbacks.map(|fallbacks| json!({
            "counts": fallbacks.counts.iter().collect::<BTreeMap<_, _>>(),
            "last": fallbacks.last.iter().map(fallback).collect::<Vec<_>>(),
        })),
    })
}

fn table(rows: &[Row<'_>], fallbacks: Option<&ListFallbacksResponse>) -> String {
    let uses = |uses: &dyn Display| fallbacks.map_or_else(|| format!("{uses:>4}  "), |_| String::new());
    let mut text = format!(
        "{:>5}  {}{:<9}  {:>10}  {:>10}  {:<12}  {}\n",
        "SLOT",
        uses(&"USES"),
        "STATE",
        "LOCAL",
        "OF",
        "LAYER",
        "IMAGE"
    );
    for row in rows {
        let bytes = |bytes: fn(&Layer) -> u64| row.layer.map_or("-".to_owned(), |layer| size(bytes(layer)));
        text += &format!(
            "{:>5}  {}{:<9}  {:>10}  {:>10}  {:<12}  {}\n",
            row.slot,
            uses(&row.uses),
            row.state(),
            bytes(|layer| layer.local_bytes),
            bytes(|layer| layer.content_bytes),
            short(&row.request.toc_digest),
            row.request.reference
        );
        if !row.error.is_empty() {
            text += &format!("       {}\n", printable(row.error));
        }
    }
    let Some(fallbacks) = fallbacks else { return text };
    if fallbacks.counts.is_empty() {
        return text + "No layer was left to containerd since the daemon started.\n";
    }
    text += "\nLeft to containerd since the daemon started, by reason:\n";
    for (reason, count) in fallbacks.counts.iter().collect::<BTreeMap<_, _>>() {
        text += &format!("{count:>7}  {reason}\n");
    }
    // An ordinary image is no fault of anyone's.
    let failed = |one: &&Fallback| one.reason != snapshotter::Reason::NoTocDigest.as_str();
    let last: Vec<&Fallback> = fallbacks.last.iter().rev().filter(failed).take(SHOWN).collect();
    if !last.is_empty() {
        text += "\nThe last of them that were meant to be lazy, the latest first:\n";
    }
    for Fallback { target, blob_digest, reason, message } in last {
        let digest = if blob_digest.is_empty() { target } else { blob_digest };
        text += &format!("{:<12}  {reason}: {}\n", short(digest), printable(message));
    }
    text
}

/// A message without what could move a terminal's cursor: registries have a part in it.
fn printable(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use proto::control::State;

    use super::*;

    fn slot(slot: u64, error: &str) -> Slot {
        let request = LayerRequest {
            target: "sha256:target".to_owned(),
            reference: format!("r.example/app:{slot}"),
            layer_digest: format!("sha256:b{slot:063}"),
            toc_digest: format!("sha256:a{slot:063}"),
            manifest_digest: None,
            neighbours: Vec::new(),
            prefetch_bytes: None,
            background_fetch: None,
            below: Vec::new(),
            labels: BTreeMap::new(),
        };
        Slot { slot, layer: serde_json::to_vec(&request).unwrap(), error: error.to_owned(), uses: slot }
    }

    fn layer(slots: &[u64], state: State, error: &str) -> Layer {
        Layer {
            content_bytes: 4 << 20,
            local_bytes: 1 << 20,
            state: state.into(),
            slots: slots.to_vec(),
            error: error.to_owned(),
            ..Layer::default()
        }
    }

    fn fallback(reason: &str, blob: &str) -> Fallback {
        let (target, blob_digest) = (format!("sha256:c{:063}", 0), blob.to_owned());
        Fallback { target, blob_digest, reason: reason.to_owned(), message: format!("about {reason}") }
    }

    fn example() -> (Vec<Slot>, Vec<Layer>, ListFallbacksResponse) {
        let slots = vec![
            slot(1, ""),
            slot(2, ""),
            slot(3, ""),
            slot(4, "auth_denied: auth failed: \u{1b}x"),
            slot(5, ""),
        ];
        let layers =
            vec![layer(&[1, 3], State::Lazy, "timeout: no answer"), layer(&[2], State::Graduated, "")];
        let counts = [("no_toc_digest".to_owned(), 3), ("auth_denied".to_owned(), 12)].into();
        let last = vec![
            fallback("auth_denied", ""),
            fallback("no_toc_digest", ""),
            fallback("not_found", &format!("sha256:d{:063}", 0)),
        ];
        (slots, layers, ListFallbacksResponse { counts, last })
    }

    #[test]
    fn a_table_says_what_is_in_each_slot_and_why_others_are_not() {
        let (slots, layers, fallbacks) = example();
        let text = table(&rows(&slots, &layers).unwrap(), Some(&fallbacks));
        let expected = " SLOT  STATE           LOCAL          OF  LAYER         IMAGE
    1  lazy         1.00 MiB    4.00 MiB  a00000000000  r.example/app:1
       timeout: no answer
    2  graduated    1.00 MiB    4.00 MiB  a00000000000  r.example/app:2
    3  lazy         1.00 MiB    4.00 MiB  a00000000000  r.example/app:3
       timeout: no answer
    4  error               -           -  a00000000000  r.example/app:4
       auth_denied: auth failed: x
    5  opening             -           -  a00000000000  r.example/app:5

Left to containerd since the daemon started, by reason:
     12  auth_denied
      3  no_toc_digest

The last of them that were meant to be lazy, the latest first:
d00000000000  not_found: about not_found
c00000000000  auth_denied: about auth_denied
";
        assert_eq!(text, expected);
        let nothing = table(&[], Some(&ListFallbacksResponse::default()));
        assert!(
            nothing.ends_with("No layer was left to containerd since the daemon started.\n"),
            "{nothing}"
        );
    }

    #[test]
    fn json_has_reasons_and_messages_apart() {
        let (slots, layers, fallbacks) = example();
        let said = as_json(&rows(&slots, &layers).unwrap(), Some(&fallbacks));
        assert_eq!(
            said["layers"][3]["error"],
            json!({ "reason": "auth_denied", "message": "auth failed: \u{1b}x" })
        );
        assert_eq!(said["layers"][1]["error"], Value::Null);
        assert_eq!(
            (&said["layers"][1]["state"], &said["layers"][3]["state"]),
            (&json!("graduated"), &json!("error"))
        );
        assert_eq!(said["fallbacks"]["counts"], json!({ "auth_denied": 12, "no_toc_digest": 3 }));
        assert_eq!(said["fallbacks"]["last"][0]["blob_digest"], Value::Null);
        assert_eq!(said["fallbacks"]["last"][2]["reason"], "not_found");
        assert_eq!(said["layers"][0]["uses"], Value::Null);
    }

    #[test]
    fn a_store_has_users_and_leaves_nothing_to_containerd() {
        let (slots, layers, _) = example();
        let rows = rows(&slots[1..4], &layers).unwrap();
        let expected = " SLOT  USES  STATE           LOCAL          OF  LAYER         IMAGE
    2     2  graduated    1.00 MiB    4.00 MiB  a00000000000  r.example/app:2
    3     3  lazy         1.00 MiB    4.00 MiB  a00000000000  r.example/app:3
       timeout: no answer
    4     4  error               -           -  a00000000000  r.example/app:4
       auth_denied: auth failed: x
";
        assert_eq!(table(&rows, None), expected);
        let said = as_json(&rows, None);
        assert_eq!((&said["layers"][1]["uses"], &said["fallbacks"]), (&json!(3), &Value::Null));
    }
}
