//! Random calls against a model: after every step, restarts included, the snapshotter lists what a map holds.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{prelude::*, sample::select};
use snapshotter::{Kind, Prepared, Reason, labels};

use crate::{
    fake::{Attach, FakeFs},
    node::{Labels, Node, code, digest, offer, show},
};

#[derive(Clone, Debug)]
enum Step {
    Prepare { key: &'static str, parent: &'static str, offer: Option<(&'static str, u8)>, attach: Attach },
    View { key: &'static str, parent: &'static str },
    Commit { name: &'static str, key: &'static str },
    Remove { key: &'static str },
    Update { key: &'static str, label: &'static str, value: &'static str, all: bool },
    Cleanup,
    Reopen,
    Crash,
}

/// Few names, so that steps meet; a name is a key as often as a parent.
const NAMES: [&str; 8] = ["k0", "k1", "n0", "n1", "T0", "T1", "T0@1", "T1@2"];
const PARENTS: [&str; 8] = ["", "", "n0", "n1", "T0", "T1", "T0@1", "k0"];

fn step() -> impl Strategy<Value = Step> {
    let name = || select(&NAMES[..]);
    let parent = || select(&PARENTS[..]);
    let layer = (select(&["T0", "T1"][..]), select(&[1, 1, 1, 2][..]));
    let attach = select(
        &[
            Attach::Works,
            Attach::Works,
            Attach::Works,
            Attach::Fails(Reason::NotFound),
            Attach::Hangs,
            Attach::Panics,
        ][..],
    );
    prop_oneof![
        6 => (select(&["k0", "k1", "T1"][..]), parent(), proptest::option::weighted(0.7, layer), attach)
            .prop_map(|(key, parent, offer, attach)| Step::Prepare { key, parent, offer, attach }),
        1 => (name(), parent()).prop_map(|(key, parent)| Step::View { key, parent }),
        3 => (name(), name()).prop_map(|(name, key)| Step::Commit { name, key }),
        3 => name().prop_map(|key| Step::Remove { key }),
        1 => (name(), select(&["a", labels::TARGET][..]), select(&["", "1"][..]), any::<bool>())
            .prop_map(|(key, label, value, all)| Step::Update { key, label, value, all }),
        1 => Just(Step::Cleanup),
        1 => Just(Step::Reopen),
        1 => Just(Step::Crash),
    ]
}

#[derive(Clone, Debug)]
struct Snapshot {
    id: u64,
    kind: Kind,
    parent: String,
    labels: Labels,
    /// TOC of the layer attached.
    toc: Option<u8>,
    fallback: Option<Reason>,
}

#[derive(Debug, Default)]
struct Model {
    snapshots: BTreeMap<String, Snapshot>,
    ids: u64,
}

/// What a call answers: nothing to say, a new name, or a code.
type Answer = Result<Option<String>, &'static str>;

impl Model {
    fn create(&mut self, kind: Kind, key: &str, parent: &str, labels: Labels) -> Result<(), &'static str> {
        match self.snapshots.get(parent) {
            None if !parent.is_empty() => return Err("NotFound"),
            Some(found) if found.kind != Kind::Committed => return Err("InvalidArgument"),
            _ if self.snapshots.contains_key(key) => return Err("AlreadyExists"),
            _ => {}
        }
        self.ids += 1;
        let snapshot =
            Snapshot { id: self.ids, kind, parent: parent.into(), labels, toc: None, fallback: None };
        self.snapshots.insert(key.into(), snapshot);
        Ok(())
    }

    fn prepare(&mut self, key: &str, parent: &str, layer: Option<(&str, u8)>, attach: Attach) -> Answer {
        let Some((target, toc)) = layer else {
            return self.create(Kind::Active, key, parent, Labels::new()).map(|()| None);
        };
        let parent_id = self.snapshots.get(parent).map_or(0, |found| found.id);
        let mut names = vec![target.to_owned(), format!("{target}@{parent_id}")];
        names.retain(|name| name != key);
        let there = names.iter().find(|name| {
            self.snapshots.get(*name).is_some_and(|found| {
                found.kind == Kind::Committed
                    && found.parent == parent
                    && found.labels.get(labels::TARGET).is_some_and(|label| label == target)
            })
        });
        let mut fallback = None;
        if let Some(name) = there {
            match self.snapshots[name].toc {
                Some(served) if served != toc => fallback = Some(Reason::VerifyFailed),
                _ => return Ok(Some(name.clone())),
            }
        }
        let free = names.into_iter().find(|name| !self.snapshots.contains_key(name));
        self.create(Kind::Active, key, parent, offer(target, toc))?;
        let reason = match (fallback, &free, attach) {
            (Some(reason), ..) => reason,
            (None, None, _) => Reason::Internal,
            (None, Some(name), Attach::Works | Attach::Moves) => {
                let mut snapshot = self.snapshots.remove(key).unwrap();
                snapshot.kind = Kind::Committed;
                snapshot.toc = Some(toc);
                snapshot.labels.insert(labels::REMOTE.into(), labels::REMOTE_VALUE.into());
                self.snapshots.insert(name.clone(), snapshot);
                return Ok(Some(name.clone()));
            }
            (None, Some(_), Attach::Fails(reason)) => reason,
            (None, Some(_), Attach::Hangs) => Reason::Timeout,
            (None, Some(_), Attach::Panics | Attach::Waits) => Reason::Internal,
        };
        self.snapshots.get_mut(key).unwrap().fallback = Some(reason);
        Ok(None)
    }

    fn commit(&mut self, name: &str, key: &str, labels: Labels) -> Answer {
        let kind = self.snapshots.get(key).ok_or("NotFound")?.kind;
        if self.snapshots.contains_key(name) {
            return Err("AlreadyExists");
        }
        if kind != Kind::Active {
            return Err("FailedPrecondition");
        }
        let mut snapshot = self.snapshots.remove(key).unwrap();
        snapshot.kind = Kind::Committed;
        snapshot.labels = labels;
        self.snapshots.insert(name.into(), snapshot);
        Ok(None)
    }

    fn remove(&mut self, key: &str) -> Answer {
        self.snapshots.get(key).ok_or("NotFound")?;
        if self.snapshots.values().any(|other| other.parent == key) {
            return Err("FailedPrecondition");
        }
        self.snapshots.remove(key);
        Ok(None)
    }

    fn update(&mut self, key: &str, label: &str, value: &str, all: bool) -> Answer {
        let snapshot = self.snapshots.get_mut(key).ok_or("NotFound")?;
        if all {
            // Where the reason of a fallback would be, it is replaced like any other label.
            snapshot.fallback = snapshot.fallback.filter(|_| snapshot.kind != Kind::Committed);
            snapshot.labels.clear();
        }
        snapshot.labels.insert(label.into(), value.into());
        snapshot.labels.retain(|_, value| !value.is_empty());
        Ok(None)
    }

    fn ancestors(&self, snapshot: &Snapshot) -> Vec<u64> {
        let mut ids = vec![];
        let mut parent = self.snapshots.get(&snapshot.parent);
        while let Some(found) = parent {
            ids.push(found.id);
            parent = self.snapshots.get(&found.parent);
        }
        ids
    }
}

async fn take(node: &mut Node, model: &mut Model, step: &Step) {
    let given = Labels::from([("c".to_owned(), "1".to_owned())]);
    let (actual, expected): (Answer, Answer) = match step {
        Step::Prepare { key, parent, offer: layer, attach } => {
            node.fs.behave(*attach);
            let labels = layer.map_or_else(Labels::new, |(target, toc)| offer(target, toc));
            let actual = node.prepare(key, parent, labels).await;
            node.fs.behave(Attach::Works);
            let actual = actual.map_err(|error| code(&error)).map(|prepared| match prepared {
                Prepared::Remote { name } => Some(name),
                Prepared::Mounts(_) => None,
            });
            (actual, model.prepare(key, parent, *layer, *attach))
        }
        Step::View { key, parent } => {
            let actual = node.view(key, parent, given.clone()).await;
            let expected = model.create(Kind::View, key, parent, given);
            (actual.map(|_| None).map_err(|error| code(&error)), expected.map(|()| None))
        }
        Step::Commit { name, key } => {
            let actual = node.commit(name, key, given.clone()).await;
            (actual.map(|()| None).map_err(|error| code(&error)), model.commit(name, key, given))
        }
        Step::Remove { key } => {
            let actual = node.remove(key).await;
            (actual.map(|()| None).map_err(|error| code(&error)), model.remove(key))
        }
        Step::Update { key, label, value, all } => {
            let labels = Labels::from([(label.to_string(), value.to_string())]);
            let paths = if *all { vec![] } else { vec![format!("labels.{label}")] };
            let actual = node.update(key, labels, paths).await;
            (actual.map(|_| None).map_err(|error| code(&error)), model.update(key, label, value, *all))
        }
        Step::Cleanup => {
            node.cleanup().await.unwrap();
            check_disk(node, model);
            (Ok(None), Ok(None))
        }
        Step::Reopen => {
            node.reopen().await;
            (Ok(None), Ok(None))
        }
        Step::Crash => {
            node.crash().await;
            (Ok(None), Ok(None))
        }
    };
    assert_eq!(actual, expected);
}

/// After a cleanup the disk and the data plane hold what the records name, and no more.
fn check_disk(node: &Node, model: &Model) {
    let ids: BTreeSet<String> = model.snapshots.values().map(|snapshot| snapshot.id.to_string()).collect();
    assert_eq!(node.dirs(), ids);
    let lazy: BTreeSet<u64> = model
        .snapshots
        .values()
        .filter(|snapshot| snapshot.toc.is_some())
        .map(|snapshot| snapshot.id)
        .collect();
    assert_eq!(node.fs.attached().into_keys().collect::<BTreeSet<_>>(), lazy);
    for snapshot in model.snapshots.values() {
        let root = node.path(&format!("snapshots/{}/fs", snapshot.id));
        assert_eq!(root.is_symlink(), snapshot.toc.is_some());
    }
}

async fn check(node: &Node, model: &Model) {
    let infos = node.list(&[]).await.unwrap();
    assert_eq!(
        infos.iter().map(|info| &info.name).collect::<Vec<_>>(),
        model.snapshots.keys().collect::<Vec<_>>()
    );
    for mut info in infos {
        let expected = &model.snapshots[&info.name];
        assert_eq!(node.stat(&info.name).await.unwrap(), info);
        if let Some(reason) = info.labels.remove(labels::REASON) {
            assert!(reason.starts_with(expected.fallback.unwrap().as_str()));
        } else {
            assert!(expected.fallback.is_none() || expected.kind == Kind::Active);
        }
        assert_eq!(
            (info.kind, &info.parent, &info.labels),
            (expected.kind, &expected.parent, &expected.labels)
        );
        match node.mounts(&info.name).await {
            Ok(mounts) => {
                let mounts = show(&mounts);
                let own = expected.kind == Kind::Active || expected.parent.is_empty();
                let named: BTreeSet<String> = mounts
                    .split("/snapshots/")
                    .skip(1)
                    .map(|rest| rest.split('/').next().unwrap().to_owned())
                    .collect();
                let ids = model.ancestors(expected).into_iter().chain(own.then_some(expected.id));
                assert_eq!(named, ids.map(|id| id.to_string()).collect(), "{mounts}");
            }
            Err(error) => {
                assert_eq!((code(&error), expected.kind), ("FailedPrecondition", Kind::Committed));
            }
        }
        let usage = node.usage(&info.name).await.unwrap();
        match (expected.kind, expected.toc) {
            (_, Some(_)) => assert_eq!(usage, FakeFs::usage_of(expected.id)),
            (Kind::View, None) => assert_eq!(usage.inodes, 0),
            _ => assert_eq!(usage.inodes, 1),
        }
    }
    let remotes = node.remote_snapshots().await.unwrap();
    let remotes: BTreeMap<u64, String> =
        remotes.into_iter().map(|remote| (remote.slot, remote.request.toc_digest)).collect();
    let expected = model.snapshots.values().filter_map(|snapshot| Some((snapshot.id, digest(snapshot.toc?))));
    assert_eq!(remotes, expected.collect());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_snapshotter_is_a_map(steps in proptest::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut node = Node::new();
            let mut model = Model::default();
            for step in &steps {
                take(&mut node, &mut model, step).await;
                check(&node, &model).await;
            }
            take(&mut node, &mut model, &Step::Cleanup).await;
        });
    }
}
