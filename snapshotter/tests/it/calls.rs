//! Calls on the core, with a data plane that works, fails, hangs or waits.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use snapshotter::{Config, Error, Kind, Reason, Snapshotter, labels};

use crate::{
    fake::{Attach, FakeFs},
    node::{Labels, Node, code, digest, mount, offer, remote, show},
};

#[tokio::test]
async fn a_layer_offered_is_attached_and_committed_under_its_target() {
    let node = Node::new();
    assert_eq!(remote(node.prepare("k", "", offer("T", 1)).await), "T");
    let info = node.stat("T").await.unwrap();
    assert_eq!((info.kind, info.parent.as_str()), (Kind::Committed, ""));
    let mut expected = offer("T", 1);
    expected.insert(labels::REMOTE.into(), labels::REMOTE_VALUE.into());
    assert_eq!(info.labels, expected);
    assert_eq!(info.created, info.updated);
    assert_eq!(node.names().await, ["T"]);

    let slot = *node.fs.attached().keys().next().unwrap();
    let root = node.path(&format!("snapshots/{slot}/fs"));
    assert_eq!(fs::read_link(&root).unwrap(), Path::new(&format!("../../mnt/{slot}")));
    assert!(root.join("layer").exists());
    assert_eq!(node.usage("T").await.unwrap(), FakeFs::usage_of(slot));

    // What is built on it names the link, and starts out with the layer's owner.
    let child = mount(node.prepare("child", "T", Labels::new()).await);
    assert!(child.contains(&format!("lowerdir={}", root.display())), "{child}");
    let upper = child.split("upperdir=").nth(1).unwrap().split(',').next().unwrap();
    let upper = fs::metadata(upper).unwrap();
    assert_eq!((upper.uid(), upper.gid()), FakeFs::owner());
    assert_eq!(upper.mode() & 0o7777, 0o755);
    let view = node.view("view", "T", Labels::new()).await.unwrap();
    assert_eq!(show(&view), format!("bind {} ro,rbind", root.display()));
    assert_eq!(code(&node.mounts("T").await.unwrap_err()), "FailedPrecondition");
}

#[tokio::test]
async fn a_target_already_there_is_not_attached_again() {
    let mut node = Node::new();
    remote(node.prepare("k1", "", offer("T", 1)).await);
    for restarted in [false, true] {
        if restarted {
            node.reopen().await;
        }
        assert_eq!(remote(node.prepare("k2", "", offer("T", 1)).await), "T");
        assert_eq!(node.fs.attempts(), 1);
        assert_eq!(node.names().await, ["T"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_cannot_be_attached_becomes_an_ordinary_snapshot() {
    let mut node = Node::new();
    let table = [
        (Attach::Fails(Reason::NotEstargz), Reason::NotEstargz),
        (Attach::Fails(Reason::Draining), Reason::Draining),
        (Attach::Hangs, Reason::Timeout),
        (Attach::Panics, Reason::Internal),
    ];
    for (n, (behaviour, reason)) in table.into_iter().enumerate() {
        node.fs.behave(behaviour);
        let (key, target) = (format!("k{n}"), format!("T{n}"));
        let mounts = mount(node.prepare(&key, "", offer(&target, 1)).await);
        assert!(mounts.starts_with("bind") && mounts.ends_with("rw,rbind"), "{mounts}");
        assert_eq!(node.stat(&key).await.unwrap().labels, offer(&target, 1));
        assert!(node.fs.attached().is_empty());
        assert_eq!(node.fallback_counts()[&reason], 1);
        let fallback = node.fallbacks().pop().unwrap();
        assert_eq!((fallback.target, fallback.layer_digest), (target.clone(), digest(0xcc)));
        assert_eq!(fallback.error.reason, reason);
        // Seen by the user after containerd has unpacked it, also after a restart in between.
        node.fs.behave(Attach::Works);
        node.reopen().await;
        node.commit(&format!("ns/{target}"), &key, offer(&target, 1)).await.unwrap();
        let labels = node.stat(&format!("ns/{target}")).await.unwrap().labels;
        let text = &labels[labels::REASON];
        assert!(text.starts_with(&format!("{reason}: ")), "{text}");
        assert_eq!(labels.len(), offer(&target, 1).len() + 1);
    }
    assert!(node.fallbacks().is_empty());
}

#[tokio::test]
async fn labels_alone_can_make_a_snapshot_ordinary() {
    let node = Node::new();
    let mut plain = offer("T", 1);
    plain.remove("containerd.io/snapshot/stargz/toc.digest");
    mount(node.prepare("k1", "", plain.clone()).await);
    let mut broken = offer("T", 1);
    broken.insert("containerd.io/snapshot/cri.layer-digest".into(), "../x".into());
    mount(node.prepare("k2", "", broken).await);
    mount(node.prepare("k3", "", Labels::new()).await);
    assert_eq!(node.fs.attempts(), 0);
    let counts = node.fallback_counts();
    assert_eq!((counts[&Reason::NoTocDigest], counts[&Reason::BadLabels], counts.len()), (1, 1, 2));
    node.commit("n1", "k1", plain).await.unwrap();
    assert!(node.stat("n1").await.unwrap().labels[labels::REASON].starts_with("no_toc_digest: "));
    node.commit("n3", "k3", Labels::new()).await.unwrap();
    assert!(node.stat("n3").await.unwrap().labels.is_empty());
    // Attached after all: no longer in the list of those that were not.
    remote(node.prepare("k4", "", offer("T", 1)).await);
    assert!(node.fallbacks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_layer_without_toc_digest_is_lazy_if_its_manifest_has_one() {
    let node = Node::new();
    let unnamed = |target: &str, n: u8| {
        let mut labels = offer(target, n);
        labels.remove("containerd.io/snapshot/stargz/toc.digest");
        labels.insert("containerd.io/snapshot/cri.layer-digest".into(), digest(n));
        labels.insert("containerd.io/snapshot/cri.manifest-digest".into(), digest(0xee));
        labels
    };
    node.fs.describe(&digest(1), Some(&digest(7)));
    node.fs.describe(&digest(2), Some("sha256:../x"));
    node.fs.describe(&digest(3), None);
    remote(node.prepare("k1", "", unnamed("T1", 1)).await);
    assert_eq!(node.remote_snapshots().await.unwrap()[0].request.toc_digest, digest(7));
    // Asked again, the same layer is the one that is there.
    remote(node.prepare("k1b", "", unnamed("T1", 1)).await);
    mount(node.prepare("k2", "", unnamed("T2", 2)).await);
    mount(node.prepare("k3", "", unnamed("T3", 3)).await);
    mount(node.prepare("k4", "", unnamed("T4", 4)).await);
    let counts = node.fallback_counts();
    assert_eq!(
        (counts[&Reason::BadLabels], counts[&Reason::Timeout], counts[&Reason::NoTocDigest]),
        (1, 1, 1)
    );
    assert_eq!(node.fs.asked(), [1, 1, 2, 3, 4].map(digest));
    assert_eq!(node.fs.attempts(), 1);
}

#[tokio::test]
async fn of_many_that_want_a_layer_one_attaches_it() {
    let node = Node::new();
    node.fs.behave(Attach::Waits);
    let first = node.prepare("k1", "", offer("T", 1));
    let same_target = node.prepare("k2", "", offer("T", 1));
    let same_key = node.prepare("k1", "", offer("T", 1));
    let go = async {
        node.fs.entered().await;
        // Another layer does not wait for this one.
        node.fs.behave(Attach::Works);
        remote(node.prepare("k3", "", offer("U", 2)).await);
        node.fs.let_go();
    };
    let (first, same_target, same_key, ()) = tokio::join!(first, same_target, same_key, go);
    for prepared in [first, same_target, same_key] {
        assert_eq!(remote(prepared), "T");
    }
    assert_eq!(node.fs.attempts(), 2);
    assert_eq!(node.names().await, ["T", "U"]);
}

#[tokio::test(start_paused = true)]
async fn waiting_for_anothers_attachment_is_bounded_too() {
    let node = Node::new();
    node.fs.behave(Attach::Hangs);
    let start = tokio::time::Instant::now();
    let (first, second) =
        tokio::join!(node.prepare("k1", "", offer("T", 1)), node.prepare("k2", "", offer("T", 1)));
    mount(first);
    mount(second);
    assert!(start.elapsed() <= node.config().attach_timeout * 2);
    assert_eq!(node.fallback_counts()[&Reason::Timeout], 2);
}

#[tokio::test]
async fn a_snapshot_removed_while_its_layer_is_attached_leaves_nothing() {
    let node = Node::new();
    node.fs.behave(Attach::Waits);
    let removal = async {
        node.fs.entered().await;
        assert_eq!(node.names().await, ["k"]);
        node.remove("k").await.unwrap();
        node.cleanup().await.unwrap();
        node.fs.let_go();
    };
    let (prepared, ()) = tokio::join!(node.prepare("k", "", offer("T", 1)), removal);
    assert_eq!(code(&prepared.unwrap_err()), "NotFound");
    node.cleanup().await.unwrap();
    assert!(node.names().await.is_empty());
    assert!(node.dirs().is_empty());
    assert!(node.fs.attached().is_empty());
}

#[tokio::test]
async fn a_commit_waits_for_the_prepare_of_its_snapshot() {
    let node = Node::new();
    node.fs.behave(Attach::Waits);
    let commit = async {
        node.fs.entered().await;
        let commit = node.commit("n", "k", Labels::new());
        let go = async {
            tokio::task::yield_now().await;
            node.fs.let_go();
        };
        tokio::join!(commit, go).0
    };
    let (prepared, committed) = tokio::join!(node.prepare("k", "", offer("T", 1)), commit);
    assert_eq!(remote(prepared), "T");
    assert_eq!(code(&committed.unwrap_err()), "NotFound");
    assert_eq!(node.names().await, ["T"]);
}

#[tokio::test]
async fn a_name_taken_during_the_attachment_is_left_to_its_owner() {
    let node = Node::new();
    node.prepare("other", "", Labels::new()).await.unwrap();
    node.fs.behave(Attach::Waits);
    let race = async {
        node.fs.entered().await;
        node.commit("T", "other", Labels::new()).await.unwrap();
        node.fs.let_go();
    };
    let (prepared, ()) = tokio::join!(node.prepare("k", "", offer("T", 1)), race);
    assert_eq!(remote(prepared), "T");
    assert_eq!(node.names().await, ["T"]);
    node.cleanup().await.unwrap();
    assert!(node.fs.attached().is_empty());
    assert_eq!(node.dirs().len(), 1);
    // containerd does not find its target there and asks again.
    node.fs.behave(Attach::Works);
    assert_eq!(remote(node.prepare("k", "", offer("T", 1)).await), "T@0");
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_no_call_half_done() {
    let node = Node::new();
    node.fs.behave(Attach::Waits);
    tokio::select! {
        biased;
        _ = node.prepare("k", "", offer("T", 1)) => panic!("not attached yet"),
        () = node.fs.entered() => {}
    }
    node.fs.let_go();
    // The same key meets the call that is still running.
    assert_eq!(remote(node.prepare("k", "", offer("T", 1)).await), "T");
    assert_eq!(node.fs.attempts(), 1);
    assert_eq!(node.names().await, ["T"]);
}

#[tokio::test]
async fn chains_mix_lazy_and_ordinary_layers_and_repeat_them() {
    let node = Node::new();
    remote(node.prepare("k", "", offer("L0", 1)).await);
    // The same layer again, higher up: another slot, so overlayfs sees another directory.
    remote(node.prepare("k", "L0", offer("L1", 1)).await);
    node.commit_ordinary("O2", "L1").await;
    remote(node.prepare("k", "O2", offer("L3", 3)).await);
    node.commit_ordinary("O4", "L3").await;
    let view = show(&node.view("v", "O4", Labels::new()).await.unwrap());
    let lower = view.split("lowerdir=").nth(1).unwrap();
    let ids: Vec<&str> = lower.split(':').map(|dir| dir.rsplit('/').nth(1).unwrap()).collect::<Vec<_>>();
    let kinds: Vec<bool> =
        ids.iter().map(|id| node.path(&format!("snapshots/{id}/fs")).is_symlink()).collect();
    assert_eq!(kinds, [false, true, false, true, true]);
    assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), 5);
    assert_eq!(node.fs.attached().len(), 3);
}

#[tokio::test]
async fn a_target_over_another_parent_gets_a_name_of_its_own() {
    let node = Node::new();
    node.commit_ordinary("ns1/bottom", "").await;
    node.commit_ordinary("ns2/bottom", "").await;
    assert_eq!(remote(node.prepare("k", "ns1/bottom", offer("T", 1)).await), "T");
    let other = remote(node.prepare("k", "ns2/bottom", offer("T", 1)).await);
    assert_ne!(other, "T");
    // What containerd looks for after the answer.
    let filter = [format!("labels.\"{}\"==T,parent==\"ns2/bottom\"", labels::TARGET)];
    let found = node.list(&filter).await.unwrap();
    assert_eq!(
        found.iter().map(|info| (info.name.as_str(), info.kind)).collect::<Vec<_>>(),
        [(other.as_str(), Kind::Committed)]
    );
    assert_eq!(remote(node.prepare("k", "ns2/bottom", offer("T", 1)).await), other);
    assert_eq!(node.fs.attempts(), 2);
}

#[tokio::test]
async fn a_target_served_from_another_toc_is_not_trusted() {
    let node = Node::new();
    remote(node.prepare("k", "", offer("T", 1)).await);
    mount(node.prepare("k", "", offer("T", 2)).await);
    assert_eq!(node.fallback_counts()[&Reason::VerifyFailed], 1);
    assert_eq!(node.fs.attempts(), 1);
}

#[tokio::test]
async fn removal_gives_the_slot_back_and_the_name_free() {
    let node = Node::new();
    remote(node.prepare("k", "", offer("T", 1)).await);
    node.prepare("child", "T", Labels::new()).await.unwrap();
    let refused = node.remove("T").await.unwrap_err();
    assert_eq!(code(&refused), "FailedPrecondition");
    assert!(refused.to_string().contains("remove"));
    node.remove("child").await.unwrap();
    node.remove("T").await.unwrap();
    assert_eq!(code(&node.stat("T").await.unwrap_err()), "NotFound");
    node.cleanup().await.unwrap();
    assert!(node.fs.attached().is_empty());
    assert!(node.dirs().is_empty());
    remote(node.prepare("k", "", offer("T", 1)).await);
    assert!(*node.fs.attached().keys().next().unwrap() > 2);
}

#[tokio::test]
async fn removal_needs_no_cleanup_to_free_the_disk() {
    let mut node = Node::new();
    node.commit_ordinary("n", "").await;
    node.remove("n").await.unwrap();
    node.close().await;
    assert!(node.dirs().is_empty());
}

#[tokio::test]
async fn what_a_crash_left_is_removed_at_the_start_and_its_ids_are_not_used() {
    let mut node = Node::new();
    node.prepare("k", "", Labels::new()).await.unwrap();
    node.close().await;
    // Renamed, but the transaction was lost; and not even renamed.
    for dir in ["41/fs", "new-42/fs", "lost+found"] {
        fs::create_dir_all(node.path("snapshots").join(dir)).unwrap();
    }
    node.open();
    let mounts = mount(node.prepare("k2", "", Labels::new()).await);
    assert!(mounts.contains("/snapshots/43/"), "{mounts}");
    node.close().await;
    assert_eq!(node.dirs().into_iter().collect::<Vec<_>>(), ["1", "43", "lost+found"]);
}

#[tokio::test]
async fn lazy_layers_are_known_after_a_restart_and_can_be_linked_anew() {
    let mut node = Node::new();
    remote(node.prepare("k", "", offer("T", 1)).await);
    node.prepare("active", "", Labels::new()).await.unwrap();
    let slot = *node.fs.attached().keys().next().unwrap();
    // containerd replaces labels; what is needed to attach the layer does not hang on them.
    node.update("T", Labels::from([("x".into(), "y".into())]), vec![]).await.unwrap();
    node.reopen().await;
    let remotes = node.remote_snapshots().await.unwrap();
    assert_eq!(remotes.len(), 1);
    assert_eq!((remotes[0].slot, remotes[0].request.toc_digest.as_str()), (slot, digest(1).as_str()));
    assert_eq!(remotes[0].request.labels, Labels::from([("x".into(), "y".into())]));

    let root = node.path(&format!("snapshots/{slot}/fs"));
    node.link(slot, Path::new("../../layers/x/fs")).await.unwrap();
    assert_eq!(fs::read_link(&root).unwrap(), Path::new("../../layers/x/fs"));
    fs::remove_file(&root).unwrap();
    fs::remove_dir(root.parent().unwrap()).unwrap();
    node.link(slot, Path::new("../../mnt/1")).await.unwrap();
    assert!(root.is_symlink());
    for not_lazy in [slot + 1, 99] {
        assert_eq!(code(&node.link(not_lazy, Path::new("x")).await.unwrap_err()), "NotFound");
    }
}

#[tokio::test]
async fn a_layer_that_graduates_before_its_snapshot_is_committed_is_followed() {
    let node = Node::new();
    node.fs.behave(Attach::Moves);
    remote(node.prepare("k", "", offer("T", 1)).await);
    let slot = *node.fs.attached().keys().next().unwrap();
    let root = node.path(&format!("snapshots/{slot}/fs"));
    assert_eq!(fs::read_link(&root).unwrap(), Path::new(&format!("../../layers/{slot}/fs")));
}

#[tokio::test]
async fn usage_of_each_kind() {
    let node = Node::new();
    let mounts = mount(node.prepare("a", "", Labels::new()).await);
    let upper = mounts.split(' ').nth(1).unwrap().to_owned();
    fs::write(format!("{upper}/file"), vec![7; 50_000]).unwrap();
    let blocks = |path: &str| fs::metadata(path).unwrap().blocks() * 512;
    let expected = blocks(&upper) + blocks(&format!("{upper}/file"));
    let usage = node.usage("a").await.unwrap();
    assert_eq!((usage.size, usage.inodes), (expected, 2));
    node.commit("c", "a", Labels::new()).await.unwrap();
    assert_eq!(node.usage("c").await.unwrap(), usage);
    node.view("v", "c", Labels::new()).await.unwrap();
    assert_eq!(node.usage("v").await.unwrap(), snapshotter::Usage::default());
    assert_eq!(code(&node.usage("none").await.unwrap_err()), "NotFound");
}

#[tokio::test(start_paused = true)]
async fn a_data_plane_that_hangs_holds_no_call_up_for_ever() {
    let node = Node::new();
    remote(node.prepare("k", "", offer("T", 1)).await);
    node.fs.behave(Attach::Hangs);
    let error = node.usage("T").await.unwrap_err();
    assert_eq!(code(&error), "Unavailable");
    assert!(error.to_string().contains("Usage"), "{error}");
    node.stat("T").await.unwrap();
}

#[tokio::test]
async fn closing_twice_is_closing() {
    let mut node = Node::new();
    node.commit_ordinary("n", "").await;
    node.snapshotter.as_ref().unwrap().close().await;
    node.reopen().await;
    assert_eq!(node.names().await, ["n"]);
}

#[tokio::test]
async fn roots_that_overlay_cannot_name_are_refused() {
    let node = Node::new();
    for root in ["relative", "/tmp/a:b", "/tmp/a,b", "/tmp/a\\b"] {
        let refused = Snapshotter::open(Config::new(root), node.fs.clone()).unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument(_)), "{root}: {refused}");
    }
}

#[test]
fn opening_without_a_runtime_is_an_error_not_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let fs = std::sync::Arc::new(FakeFs::new(dir.path()));
    assert_eq!(code(&Snapshotter::open(Config::new(dir.path()), fs).unwrap_err()), "Internal");
}
