//! What to do with a Prepare that offers a layer.
//!
//! Pure. containerd learns of a lazy layer by the answer "already exists", then looks for a committed snapshot
//! that carries the target as its label [`labels::TARGET`] and has the parent it named. Its name is free, so
//! there are two places for a layer: the target itself, and, where that name is held by a snapshot over another
//! parent (another namespace unpacked the layer below by itself; the old image is not collected yet), a name
//! that adds the parent's id.
//!
//! A snapshot already there answers only if it is verified against the same TOC digest: nothing ties a chain id
//! to a TOC before the whole layer is read, so whoever made the first image could otherwise choose the contents
//! of everyone's second.

use crate::{
    filesystem::{AttachError, LayerRequest, Reason},
    labels,
    record::{Kind, Record},
};

/// A name a lazy layer may be committed under, and who holds it.
#[derive(Debug)]
pub(crate) struct Place {
    pub name: String,
    pub holder: Option<Record>,
}

/// What a Prepare does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Nothing; the layer is committed under this name.
    Exists(String),
    /// Attaches the layer and commits it under the name.
    Lazy { name: String, request: Box<LayerRequest> },
    /// Creates a snapshot for containerd to unpack into; with the reason, if a layer was offered.
    Ordinary(Option<AttachError>),
}

/// The names for a target over the parent with this id, or 0 for none, in order of preference.
pub(crate) fn names(target: &str, parent: u64) -> [String; 2] {
    [target.to_owned(), format!("{target}@{parent}")]
}

/// Decides, given who holds the [`names`].
pub(crate) fn decide(request: LayerRequest, parent: &str, places: Vec<Place>) -> Decision {
    let mut free = None;
    for Place { name, holder } in places {
        let Some(holder) = holder else {
            free = free.or(Some(name));
            continue;
        };
        if !answers(&holder, &request.target, parent) {
            continue;
        }
        return match holder.remote {
            Some(served) if served.toc_digest != request.toc_digest => {
                Decision::Ordinary(Some(AttachError::new(
                    Reason::VerifyFailed,
                    format!(
                        "{} is already served from a layer with TOC {}, this image says {}; they are not \
                         known to be the same, so the layer is unpacked",
                        request.target, served.toc_digest, request.toc_digest
                    ),
                )))
            }
            _ => Decision::Exists(name),
        };
    }
    match free {
        Some(name) => Decision::Lazy { name, request: request.into() },
        None => Decision::Ordinary(Some(AttachError::new(
            Reason::Internal,
            format!("all names for {} are held by other snapshots", request.target),
        ))),
    }
}

/// Whether containerd will find this snapshot when told that the target exists over the parent.
fn answers(record: &Record, target: &str, parent: &str) -> bool {
    record.kind == Kind::Committed
        && record.parent == parent
        && record.labels.get(labels::TARGET).is_some_and(|label| label == target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;

    fn request(toc: &str) -> LayerRequest {
        LayerRequest {
            target: "T".into(),
            reference: "r".into(),
            layer_digest: "l".into(),
            toc_digest: toc.into(),
            manifest_digest: None,
            neighbours: vec![],
            prefetch_bytes: None,
            background_fetch: None,
            below: vec![],
            labels: Default::default(),
        }
    }

    /// A committed holder over a parent, lazy with a TOC or ordinary.
    fn holder(parent: &str, toc: Option<&str>) -> Record {
        let mut holder = record("x", Kind::Committed, parent);
        holder.labels.insert(labels::TARGET.into(), "T".into());
        holder.remote = toc.map(request);
        holder
    }

    fn outcome(holders: [Option<Record>; 2]) -> String {
        let places =
            names("T", 3).into_iter().zip(holders).map(|(name, holder)| Place { name, holder }).collect();
        match decide(request("toc"), "P", places) {
            Decision::Exists(name) => format!("exists {name}"),
            Decision::Lazy { name, .. } => format!("lazy {name}"),
            Decision::Ordinary(error) => format!("ordinary {}", error.unwrap().reason),
        }
    }

    #[test]
    fn decisions() {
        let same = || Some(holder("P", Some("toc")));
        let unpacked = || Some(holder("P", None));
        let forged = || Some(holder("P", Some("other")));
        let elsewhere = || Some(holder("Q", Some("toc")));
        let unlabelled = || Some(Record { labels: Default::default(), ..holder("P", Some("toc")) });
        let active = || Some(Record { kind: Kind::Active, ..holder("P", None) });
        let table = [
            ([None, None], "lazy T"),
            ([same(), None], "exists T"),
            ([unpacked(), None], "exists T"),
            ([None, same()], "exists T@3"),
            ([forged(), None], "ordinary verify_failed"),
            ([elsewhere(), None], "lazy T@3"),
            ([elsewhere(), same()], "exists T@3"),
            ([elsewhere(), forged()], "ordinary verify_failed"),
            ([unlabelled(), None], "lazy T@3"),
            ([active(), None], "lazy T@3"),
            ([active(), elsewhere()], "ordinary internal"),
        ];
        for (holders, expected) in table {
            assert_eq!(outcome(holders.clone()), expected, "{holders:?}");
        }
    }
}
