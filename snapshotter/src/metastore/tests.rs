//! The metastore over real files: transactions, ids, damage, reopening.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, atomic::AtomicBool},
};

use parking_lot::Mutex;
use redb::StorageBackend;

use super::{
    rules::{Commit, Creation},
    *,
};
use crate::{
    Usage, labels,
    record::{Kind, Owner},
};

fn open(dir: &tempfile::TempDir) -> Metastore {
    Metastore::open(&dir.path().join("snapshots.redb"), 1).unwrap()
}

fn labelled(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

fn create(store: &Metastore, kind: Kind, key: &str, parent: &str) -> Result<Record> {
    let labels = labelled(&[("l", "1"), ("empty", "")]);
    let creation = Creation { kind, key: key.into(), parent: parent.into(), labels, fallback: None };
    store.write(|tx| rules::create(tx, creation))
}

fn commit(store: &Metastore, name: &str, key: &str) -> Result<u64> {
    let id = store.read(|tx| rules::committable(tx, key, name))?.id;
    let commit = Commit {
        key: key.into(),
        id,
        name: name.into(),
        labels: labelled(&[("c", "1"), ("empty", "")]),
        usage: Usage { size: 1, inodes: 2 },
        owner: Owner { uid: 3, gid: 4 },
        remote: None,
    };
    store.write(|tx| rules::commit(tx, commit))?;
    Ok(id)
}

fn committed(store: &Metastore, name: &str, parent: &str) -> u64 {
    create(store, Kind::Active, "tmp", parent).unwrap();
    commit(store, name, "tmp").unwrap()
}

fn remove(store: &Metastore, key: &str) -> Result<()> {
    store.write(|tx| rules::remove(tx, key))
}

fn names(store: &Metastore) -> String {
    let all = store.read(|tx| tx.all(|_| true)).unwrap();
    all.iter().map(|record| record.name.as_str()).collect::<Vec<_>>().join(" ")
}

/// The variant of an error, and a word its text holds.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, variant: &str, word: &str) {
    let error = result.unwrap_err();
    assert!(format!("{error:?}").starts_with(variant), "{error:?} is not {variant}");
    assert!(error.to_string().contains(word), "{error:?} does not speak of {word}");
}

#[test]
fn a_life() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let base = committed(&store, "base", "");
    let active = create(&store, Kind::Active, "a", "base").unwrap();
    assert_eq!(active.ancestors, [base]);
    assert_eq!(active.owner, Some(Owner { uid: 3, gid: 4 }));
    assert_eq!(active.labels, labelled(&[("l", "1")]));
    assert_eq!(active.created, active.updated);
    commit(&store, "top", "a").unwrap();
    let top = store.read(|tx| tx.require("top")).unwrap();
    assert_eq!((top.id, top.kind), (active.id, Kind::Committed));
    assert_eq!(top.labels, labelled(&[("c", "1")]));
    assert_eq!(top.created, top.updated);
    assert_eq!(top.usage, Usage { size: 1, inodes: 2 });
    let view = create(&store, Kind::View, "v", "top").unwrap();
    assert_eq!(view.ancestors, [active.id, base]);
    drop(store);

    let store = open(&dir);
    assert_eq!(names(&store), "base top v");
    assert_eq!(store.read(|tx| tx.by_id(active.id)).unwrap(), Some(top));
    for key in ["v", "top", "base"] {
        remove(&store, key).unwrap();
    }
    assert_eq!(names(&store), "");
    assert!(!store.read(|tx| tx.is_live(base)).unwrap());
}

#[test]
fn what_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    committed(&store, "base", "");
    create(&store, Kind::Active, "a", "base").unwrap();
    create(&store, Kind::View, "v", "").unwrap();
    let before = names(&store);

    refused(create(&store, Kind::Active, "", ""), "InvalidArgument", "key");
    refused(create(&store, Kind::Active, "a", ""), "AlreadyExists", "\"a\"");
    refused(create(&store, Kind::View, "base", ""), "AlreadyExists", "\"base\"");
    refused(create(&store, Kind::View, "b", "none"), "NotFound", "parent");
    refused(create(&store, Kind::Active, "b", "a"), "InvalidArgument", "not committed");
    refused(commit(&store, "b", "none"), "NotFound", "\"none\"");
    refused(commit(&store, "base", "a"), "AlreadyExists", "\"base\"");
    refused(commit(&store, "a", "a"), "AlreadyExists", "\"a\"");
    refused(commit(&store, "b", "v"), "FailedPrecondition", "view");
    refused(commit(&store, "b", "base"), "FailedPrecondition", "committed");
    refused(commit(&store, "", "a"), "InvalidArgument", "name");
    refused(remove(&store, "none"), "NotFound", "\"none\"");
    refused(remove(&store, "base"), "FailedPrecondition", "remove");
    let update =
        |name: &str, path: &str| store.write(|tx| rules::update(tx, name, labelled(&[]), &[path.into()]));
    refused(update("none", "labels"), "NotFound", "\"none\"");
    refused(update("a", "parent"), "InvalidArgument", "\"parent\"");
    refused(update("a", "labelsx"), "InvalidArgument", "\"labelsx\"");

    // A commit or note whose snapshot was replaced meanwhile.
    let a = store.read(|tx| tx.require("a")).unwrap();
    remove(&store, "a").unwrap();
    create(&store, Kind::Active, "a", "base").unwrap();
    refused(store.write(|tx| rules::note_fallback(tx, "a", a.id, "r".into())), "NotFound", "removed");
    store.write(|tx| rules::remove_exactly(tx, "a", a.id)).unwrap();
    assert_eq!(names(&store), before);
}

#[test]
fn updates() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let start = &[("a", "1"), ("b", "2"), ("c.d/e", "3")][..];
    let given = &[("a", "9"), ("b", ""), ("x", "8")][..];
    let table = [
        (&[][..], &[("a", "9"), ("x", "8")][..]),
        (&["labels"], &[("a", "9"), ("x", "8")]),
        (&["labels.a"], &[("a", "9"), ("b", "2"), ("c.d/e", "3")]),
        (&["labels.b", "labels.c.d/e"], &[("a", "1")]),
        (&["labels.x", "labels.none"], &[("a", "1"), ("b", "2"), ("c.d/e", "3"), ("x", "8")]),
    ];
    let born = create(&store, Kind::View, "v", "").unwrap();
    for (paths, expected) in table {
        let paths: Vec<String> = paths.iter().map(|path| path.to_string()).collect();
        store.write(|tx| rules::update(tx, "v", labelled(start), &[])).unwrap();
        let info = store.write(|tx| rules::update(tx, "v", labelled(given), &paths)).unwrap();
        assert_eq!(info.labels, labelled(expected), "{paths:?}");
        assert_eq!(info.created, born.created);
        assert!(info.updated >= born.updated);
        assert_eq!(store.read(|tx| tx.require("v")).unwrap().info(), info);
    }
}

#[test]
fn the_reason_of_a_fallback_becomes_a_label_when_committed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let id = create(&store, Kind::Active, "a", "").unwrap().id;
    store.write(|tx| rules::note_fallback(tx, "a", id, "timeout: slow".into())).unwrap();
    assert_eq!(store.read(|tx| tx.require("a")).unwrap().labels, labelled(&[("l", "1")]));
    commit(&store, "n", "a").unwrap();
    let record = store.read(|tx| tx.require("n")).unwrap();
    assert_eq!(record.labels, labelled(&[("c", "1"), (labels::REASON, "timeout: slow")]));
    assert_eq!(record.fallback, None);
}

#[test]
fn ids_are_never_given_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let mut last = create(&store, Kind::Active, "k", "").unwrap().id;
    // Failed after the id was drawn.
    store
        .write(|tx| {
            last = rules::create(
                tx,
                Creation {
                    kind: Kind::View,
                    key: "x".into(),
                    parent: String::new(),
                    labels: BTreeMap::new(),
                    fallback: None,
                },
            )?
            .id;
            Err::<(), _>(Error::Unavailable("no".into()))
        })
        .unwrap_err();
    remove(&store, "k").unwrap();
    let next = create(&store, Kind::Active, "k", "").unwrap().id;
    assert!(next > last);
    drop(store);
    assert!(create(&open(&dir), Kind::Active, "k2", "").unwrap().id > next);
    let store = Metastore::open(&dir.path().join("snapshots.redb"), 100).unwrap();
    assert_eq!(create(&store, Kind::Active, "k3", "").unwrap().id, 100);
}

fn damage(store: &Metastore, name: &str) {
    store
        .write(|tx| tx.tables.snapshots.insert(name, &b"\x01{damaged"[..]).map(drop).map_err(failure))
        .unwrap();
}

#[test]
fn a_damaged_record_costs_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let bottom = committed(&store, "bottom", "");
    let middle = committed(&store, "middle", "bottom");
    committed(&store, "other", "");
    let top = create(&store, Kind::Active, "top", "middle").unwrap();
    damage(&store, "middle");
    drop(store);

    let store = open(&dir);
    assert_eq!(names(&store), "bottom other top");
    refused(store.read(|tx| tx.require("middle")), "NotFound", "\"middle\"");
    assert_eq!(store.read(|tx| tx.require("top")).unwrap().ancestors, [middle, bottom]);
    assert!(store.read(|tx| tx.is_live(middle)).unwrap());
    refused(remove(&store, "middle"), "FailedPrecondition", "remove");
    refused(remove(&store, "bottom"), "FailedPrecondition", "remove");

    // The name can be given anew; the child keeps its lower directory.
    let again = committed(&store, "middle", "bottom");
    assert!(store.read(|tx| tx.is_live(middle)).unwrap());
    damage(&store, "middle");
    refused(remove(&store, "middle"), "FailedPrecondition", "remove");
    remove(&store, "top").unwrap();
    assert!(!store.read(|tx| tx.is_live(top.id)).unwrap());
    remove(&store, "middle").unwrap();
    assert!(!store.read(|tx| Ok(tx.is_live(middle)? || tx.is_live(again)?)).unwrap());
    remove(&store, "bottom").unwrap();
    refused(remove(&store, "middle"), "NotFound", "\"middle\"");
    assert_eq!(names(&store), "other");
}

#[test]
fn a_damaged_record_nothing_builds_on_gives_its_directory_up_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let old = committed(&store, "n", "");
    damage(&store, "n");
    let new = create(&store, Kind::Active, "n", "").unwrap().id;
    assert!(!store.read(|tx| tx.is_live(old)).unwrap());
    assert!(store.read(|tx| tx.is_live(new)).unwrap());
}

/// A file in memory on a disk that can be full.
#[derive(Clone, Debug, Default)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
}

impl Disk {
    fn check(&self) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        out.copy_from_slice(&self.bytes.lock()[offset as usize..][..out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.bytes.lock().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.check()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        self.bytes.lock()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}

#[test]
fn a_full_disk_fails_calls_only_while_it_is_full() {
    let disk = Disk::default();
    let backend = disk.clone();
    let opener = move || Ok(redb::Builder::new().create_with_backend(backend.clone())?);
    let store = Metastore::with_opener(Box::new(opener), 1).unwrap();
    create(&store, Kind::Active, "a", "").unwrap();
    disk.full.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        refused(create(&store, Kind::Active, "b", ""), "Internal", "snapshots.redb");
    }
    disk.full.store(false, Ordering::Relaxed);
    assert_eq!(names(&store), "a");
    create(&store, Kind::Active, "b", "").unwrap();
    assert_eq!(names(&store), "a b");
}
