//! A snapshot's record and its encoding.
//!
//! ```text
//! value of the table `snapshots`:  | version: u8 = 1 | JSON of the record, UTF-8 |
//! ```
//!
//! The name is the table's key and not part of the value. A record holds the ids of all its ancestors, so that
//! mounts are computed from one record alone and a damaged ancestor does not take its descendants with it.

use std::{collections::BTreeMap, time::SystemTime};

use serde::{Deserialize, Serialize};

use crate::{
    Error,
    error::Result,
    filesystem::{LayerRequest, Usage},
};

/// Version of the encoding written; older ones stay readable when a newer one is added.
const VERSION: u8 = 1;

/// What a snapshot is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Mounted read-only, never committed.
    View,
    /// Mounted writable; may be committed.
    Active,
    /// Immutable; may be a parent.
    Committed,
}

impl Kind {
    /// The kind as filters spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// Owner of a snapshot's root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// Everything known of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Key of an active snapshot or view, name of a committed one.
    #[serde(skip)]
    pub name: String,
    /// Number of the directory `snapshots/<id>` and of the slot; never 0, never reused.
    pub id: u64,
    pub kind: Kind,
    /// Name of the parent; empty for none.
    pub parent: String,
    /// Ids of the parent, its parent and so on.
    pub ancestors: Vec<u64>,
    pub labels: BTreeMap<String, String>,
    pub created: SystemTime,
    pub updated: SystemTime,
    /// Known for committed ordinary snapshots only; others are measured when asked for.
    pub usage: Usage,
    /// Owner of the root directory; none while it is whatever the daemon creates.
    pub owner: Option<Owner>,
    /// The layer attached in the slot, for a committed lazy snapshot.
    pub remote: Option<LayerRequest>,
    /// Why this active snapshot is ordinary though containerd offered a layer: `<code>: <message>`.
    pub fallback: Option<String>,
}

impl Record {
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![VERSION];
        serde_json::to_writer(&mut bytes, self).map_err(|source| {
            Error::internal(format!("encoding the record of snapshot {:?}", self.name), source)
        })?;
        Ok(bytes)
    }

    /// The record stored under `name`, or why it cannot be read.
    pub fn decode(name: &str, bytes: &[u8]) -> std::result::Result<Record, String> {
        match bytes.split_first() {
            Some((&VERSION, json)) => {
                let mut record: Record = serde_json::from_slice(json).map_err(|error| error.to_string())?;
                record.name = name.to_owned();
                if let Some(request) = &mut record.remote {
                    request.labels = record.labels.clone();
                    request.below = record.ancestors.clone();
                }
                Ok(record)
            }
            Some((version, _)) => Err(format!("version {version} is not known to this release")),
            None => Err("it is empty".into()),
        }
    }

    /// What containerd is told of the snapshot.
    pub fn info(&self) -> Info {
        Info {
            name: self.name.clone(),
            parent: self.parent.clone(),
            kind: self.kind,
            labels: self.labels.clone(),
            created: self.created,
            updated: self.updated,
        }
    }
}

/// A snapshot as containerd sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Key of an active snapshot or view, name of a committed one.
    pub name: String,
    /// Name of the parent; empty for none.
    pub parent: String,
    /// What the snapshot is good for.
    pub kind: Kind,
    /// Labels; none has an empty value.
    pub labels: BTreeMap<String, String>,
    /// When the snapshot was created, or committed.
    pub created: SystemTime,
    /// When the labels last changed; equal to `created` at birth.
    pub updated: SystemTime,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(name: &str, kind: Kind, parent: &str) -> Record {
        let now = SystemTime::now();
        Record {
            name: name.into(),
            id: 1,
            kind,
            parent: parent.into(),
            ancestors: vec![],
            labels: BTreeMap::new(),
            created: now,
            updated: now,
            usage: Usage::default(),
            owner: None,
            remote: None,
            fallback: None,
        }
    }

    #[test]
    fn decoding_gives_back_what_was_encoded() {
        let mut full = record("n", Kind::Committed, "p");
        full.ancestors = vec![3, 1];
        full.labels.insert("a".into(), "b".into());
        full.owner = Some(Owner { uid: 5, gid: 6 });
        full.usage = Usage { size: u64::MAX, inodes: 7 };
        full.remote = Some(LayerRequest {
            target: "t".into(),
            reference: "r".into(),
            layer_digest: "d".into(),
            toc_digest: "c".into(),
            manifest_digest: None,
            neighbours: vec!["d".into()],
            prefetch_bytes: Some(9),
            background_fetch: Some(false),
            below: full.ancestors.clone(),
            labels: full.labels.clone(),
        });
        for record in [full, record("n", Kind::View, "")] {
            assert_eq!(Record::decode("n", &record.encode().unwrap()), Ok(record));
        }
    }

    #[test]
    fn unreadable_bytes_are_told_apart() {
        assert!(Record::decode("n", b"").unwrap_err().contains("empty"));
        assert!(Record::decode("n", b"\x02{}").unwrap_err().contains("version 2"));
        assert!(Record::decode("n", b"\x01{").is_err());
    }
}
