//! What each call does to the records, and when it may.
//!
//! The codes are those of containerd's own metadata store, which its garbage collector and unpacker rely on.

use std::{collections::BTreeMap, time::SystemTime};

use super::WriteTx;
use crate::{
    Error,
    error::Result,
    filesystem::{LayerRequest, Usage},
    labels,
    record::{Info, Kind, Owner, Record},
};

/// A view or active snapshot to be.
#[derive(Debug)]
pub(crate) struct Creation {
    pub kind: Kind,
    pub key: String,
    /// Empty for none.
    pub parent: String,
    pub labels: BTreeMap<String, String>,
    pub fallback: Option<String>,
}

/// An active snapshot to be committed.
#[derive(Debug)]
pub(crate) struct Commit {
    pub key: String,
    /// The id the key had when the work began; another by now is another snapshot.
    pub id: u64,
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub usage: Usage,
    pub owner: Owner,
    pub remote: Option<LayerRequest>,
}

pub(crate) fn create(tx: &mut WriteTx<'_>, creation: Creation) -> Result<Record> {
    named("key", &creation.key)?;
    let mut owner = None;
    let mut ancestors = vec![];
    if !creation.parent.is_empty() {
        let parent = tx.get(&creation.parent)?.ok_or_else(|| {
            Error::NotFound(format!("parent snapshot {:?} does not exist", creation.parent))
        })?;
        if parent.kind != Kind::Committed {
            let message = format!("parent snapshot {:?} is not committed", creation.parent);
            return Err(Error::InvalidArgument(message));
        }
        owner = parent.owner;
        ancestors.push(parent.id);
        ancestors.extend(parent.ancestors);
    }
    free(tx, &creation.key)?;
    let now = SystemTime::now();
    let record = Record {
        name: creation.key,
        id: tx.new_id()?,
        kind: creation.kind,
        parent: creation.parent,
        ancestors,
        labels: labels::without_empty(creation.labels),
        created: now,
        updated: now,
        usage: Usage::default(),
        owner,
        remote: None,
        fallback: creation.fallback,
    };
    tx.put(&record)?;
    Ok(record)
}

/// Checks that a commit of `key` under `name` is in order, and gives the record of `key`.
pub(crate) fn committable(tx: &super::ReadTx, key: &str, name: &str) -> Result<Record> {
    named("name", name)?;
    let record = tx.require(key)?;
    in_order(&record, tx.get(name)?.is_some(), name)?;
    Ok(record)
}

pub(crate) fn commit(tx: &mut WriteTx<'_>, commit: Commit) -> Result<()> {
    let mut record = tx.get(&commit.key)?.filter(|record| record.id == commit.id).ok_or_else(|| {
        Error::NotFound(format!(
            "snapshot {:?} was removed while it was being prepared or committed",
            commit.key
        ))
    })?;
    in_order(&record, tx.get(&commit.name)?.is_some(), &commit.name)?;
    free(tx, &commit.name)?;
    tx.take_name(&commit.key)?;
    let now = SystemTime::now();
    record.name = commit.name;
    record.kind = Kind::Committed;
    record.created = now;
    record.updated = now;
    record.usage = commit.usage;
    record.owner = Some(commit.owner);
    record.remote = commit.remote;
    record.labels = labels::without_empty(commit.labels);
    if let Some(reason) = record.fallback.take() {
        record.labels.insert(labels::REASON.to_owned(), reason);
    }
    tx.put(&record)
}

/// Removes the snapshot; its directory and slot become garbage.
pub(crate) fn remove(tx: &mut WriteTx<'_>, key: &str) -> Result<()> {
    let ids = match tx.get(key)? {
        Some(record) => vec![record.id],
        None => tx.damaged_ids(key)?,
    };
    if ids.is_empty() {
        return Err(Error::no_such_snapshot(key));
    }
    for id in ids {
        if tx.has_children(id)? {
            let message = format!("cannot remove snapshot with child: {key:?} is the parent of others");
            return Err(Error::FailedPrecondition(message));
        }
        tx.take_id(id)?;
    }
    tx.take_name(key)
}

/// Removes the snapshot if it is still the one with this id.
pub(crate) fn remove_exactly(tx: &mut WriteTx<'_>, key: &str, id: u64) -> Result<()> {
    match tx.get(key)? {
        Some(record) if record.id == id => remove(tx, key),
        _ => Ok(()),
    }
}

/// Notes why an active snapshot is ordinary, if it is still the one with this id.
pub(crate) fn note_fallback(tx: &mut WriteTx<'_>, key: &str, id: u64, reason: String) -> Result<()> {
    match tx.get(key)? {
        Some(mut record) if record.id == id => {
            record.fallback = Some(reason);
            tx.put(&record)
        }
        _ => Err(Error::NotFound(format!("snapshot {key:?} was removed while it was being prepared"))),
    }
}

/// Replaces labels: all of them, or those named by `paths` (`labels`, `labels.<label>`).
pub(crate) fn update(
    tx: &mut WriteTx<'_>,
    name: &str,
    labels: BTreeMap<String, String>,
    paths: &[String],
) -> Result<Info> {
    let mut record = tx.require(name)?;
    if paths.is_empty() {
        record.labels = labels;
    } else {
        for path in paths {
            if path == "labels" {
                record.labels = labels.clone();
            } else if let Some(label) = path.strip_prefix("labels.") {
                record.labels.insert(label.to_owned(), labels.get(label).cloned().unwrap_or_default());
            } else {
                let message =
                    format!("cannot update field {path:?} of snapshot {name:?}; only labels may change");
                return Err(Error::InvalidArgument(message));
            }
        }
    }
    record.labels = labels::without_empty(record.labels);
    record.updated = SystemTime::now();
    tx.put(&record)?;
    Ok(record.info())
}

fn in_order(record: &Record, name_taken: bool, name: &str) -> Result<()> {
    if name_taken {
        return Err(taken(name));
    }
    if record.kind != Kind::Active {
        let message = format!("snapshot {:?} is not active but {}", record.name, record.kind.as_str());
        return Err(Error::FailedPrecondition(message));
    }
    Ok(())
}

/// Makes sure a name can be given, also when a record that cannot be read has it. The id of such a record stays
/// live while others build on its directory.
fn free(tx: &mut WriteTx<'_>, name: &str) -> Result<()> {
    if tx.get(name)?.is_some() {
        return Err(taken(name));
    }
    for id in tx.damaged_ids(name)? {
        if !tx.has_children(id)? {
            tx.take_id(id)?;
        }
    }
    Ok(())
}

fn taken(name: &str) -> Error {
    Error::AlreadyExists(format!("snapshot {name:?} already exists"))
}

fn named(what: &str, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::InvalidArgument(format!("the {what} of a snapshot may not be empty")));
    }
    Ok(())
}
