//! containerd's snapshotter suite (`core/snapshots/testsuite`), test by test, over gRPC and with real mounts.
//!
//! Left out: CloseTwice, which concerns a client's own object (closing ours twice is tested in `calls`). Added at
//! the end: what the suite does not cover and real mounts show.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use containerd_snapshots::{
    api::{
        snapshots::v1::{Info, Kind},
        types::Mount,
    },
    tonic::Code,
};

use crate::{
    fake::FakeFs,
    grpc::{Client, Served, rooted},
    mounts::{Mounted, with_mounts},
    node::offer,
    tree::{Change, apply, file, same},
};

/// A snapshotter and a place to mount.
struct Suite {
    served: Served,
    work: tempfile::TempDir,
}

/// Runs a test of the suite.
fn suite(test: impl AsyncFnOnce(&Suite) + Send + 'static) {
    with_mounts(async move || {
        let suite = Suite { served: Served::new().await, work: tempfile::tempdir().unwrap() };
        test(&suite).await;
    });
}

impl std::ops::Deref for Suite {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.served.client
    }
}

impl Suite {
    /// A path below the work directory; the suite uses such paths as keys and as mount points.
    fn at(&self, name: &str) -> (PathBuf, String) {
        let path = self.work.path().join(name);
        let text = path.to_str().unwrap().to_owned();
        (path, text)
    }

    /// Prepares a snapshot and mounts it at its own key.
    async fn prepare_mounted(&self, name: &str, parent: &str) -> (Mounted, String) {
        let (path, key) = self.at(name);
        let mounts = self.prepare(&key, parent).await.unwrap();
        (Mounted::all(&mounts, &path), key)
    }

    /// Commits one snapshot for each set of changes, each over the one before, and checks every one through a
    /// view against a directory that takes the same changes.
    async fn check_chain(&self, layers: &[Vec<Change>]) {
        let flat = tempfile::tempdir_in(self.work.path()).unwrap();
        let mut parent = String::new();
        for (n, changes) in layers.iter().enumerate() {
            let name = format!("{}-{n}", flat.path().display());
            let key = format!("{name}-prepare");
            let mounts = self.prepare(&key, &parent).await.unwrap();
            apply(&self.mounted(&mounts), changes);
            self.commit(&name, &key).await.unwrap();
            apply(flat.path(), changes);

            let view = format!("{name}-view");
            let mounts = self.view(&view, &name).await.unwrap();
            same(flat.path(), &self.mounted(&mounts));
            self.remove(&view).await.unwrap();
            parent = name;
        }
    }

    fn mounted(&self, mounts: &[Mount]) -> Mounted {
        let target = tempfile::tempdir_in(self.work.path()).unwrap();
        Mounted::all(mounts, &target.keep())
    }
}

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

#[test]
fn basic() {
    suite(async |s| {
        let initial = [
            file("foo", "foo\n", 0o777),
            Change::Dir("a", 0o755),
            Change::Dir("a/b", 0o755),
            Change::Dir("a/b/c", 0o755),
        ];
        let diff = [file("bar", "bar\n", 0o777), file("foo", "bar\n", 0o777), Change::Remove("a/b")];
        let (flat, _) = s.at("flat");
        fs::create_dir(&flat).unwrap();

        let (mounted, preparing) = s.prepare_mounted("preparing", "").await;
        apply(&mounted, &initial);
        drop(mounted);
        let (_, committed) = s.at("committed");
        s.commit(&committed, &preparing).await.unwrap();
        let first = s.stat(&committed).await.unwrap();
        assert_eq!((first.parent.as_str(), first.kind()), ("", Kind::Committed));
        assert_eq!(s.stat(&preparing).await.unwrap_err().code(), Code::NotFound);

        let (mounted, next) = s.prepare_mounted("nextlayer", &committed).await;
        apply(&flat, &initial);
        same(&flat, &mounted);
        apply(&mounted, &diff);
        drop(mounted);
        let active = s.stat(&next).await.unwrap();
        assert_eq!((active.parent.as_str(), active.kind()), (committed.as_str(), Kind::Active));
        let (_, next_committed) = s.at("committed-next");
        s.commit(&next_committed, &next).await.unwrap();
        let second = s.stat(&next_committed).await.unwrap();
        assert_eq!((second.parent.as_str(), second.kind()), (committed.as_str(), Kind::Committed));
        assert_eq!(s.stat(&next).await.unwrap_err().code(), Code::NotFound);

        let walked = s.walk(&[]).await.unwrap();
        for info in [first, second] {
            assert!(walked.contains(&info), "{info:?}");
        }

        let (path, view) = s.at("nextnextlayer");
        let mounts = s.view(&view, &next_committed).await.unwrap();
        apply(&flat, &diff);
        same(&flat, &Mounted::all(&mounts, &path));
        s.remove(&view).await.unwrap();
        let refused = s.remove(&committed).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("remove"));
        s.remove(&next_committed).await.unwrap();
        s.remove(&committed).await.unwrap();
    });
}

#[test]
fn stat_active_and_committed() {
    suite(async |s| {
        let (mounted, preparing) = s.prepare_mounted("preparing", "").await;
        fs::write(mounted.join("foo"), "foo\n").unwrap();
        let info = s.stat(&preparing).await.unwrap();
        assert_eq!((&info.name, info.kind(), info.parent.as_str()), (&preparing, Kind::Active, ""));
        // Committed while it is still mounted.
        let (_, committed) = s.at("committed");
        s.commit(&committed, &preparing).await.unwrap();
        let info = s.stat(&committed).await.unwrap();
        assert_eq!((&info.name, info.kind(), info.parent.as_str()), (&committed, Kind::Committed, ""));
    });
}

#[test]
fn transitivity() {
    suite(async |s| {
        let mut parent = String::new();
        for name in ["a", "b"] {
            let (mounted, key) = s.prepare_mounted(&format!("preparing-{name}"), &parent).await;
            fs::write(mounted.join("foo"), name).unwrap();
            drop(mounted);
            parent = s.at(name).1;
            s.commit(&parent, &key).await.unwrap();
        }
        let a = s.stat(&s.at("a").1).await.unwrap();
        let b = s.stat(&parent).await.unwrap();
        assert_eq!(a.parent, "");
        assert_eq!(b.parent, a.name);
        assert_eq!(s.stat(&b.parent).await.unwrap().parent, "");
    });
}

#[test]
fn prepare_and_view_of_a_live_key_fail() {
    suite(async |s| {
        s.prepare("tmp", "").await.unwrap();
        s.commit("A", "tmp").await.unwrap();
        s.prepare("new", "A").await.unwrap();
        assert!(s.view("new", "A").await.is_err());
        assert!(s.prepare("new", "A").await.is_err());
        s.view("view", "A").await.unwrap();
        assert!(s.view("view", "A").await.is_err());
    });
}

fn time(info: &Info) -> (SystemTime, SystemTime) {
    let [created, updated] = [&info.created_at, &info.updated_at].map(|stamp| {
        let stamp = stamp.as_ref().unwrap();
        UNIX_EPOCH + Duration::new(stamp.seconds as u64, stamp.nanos as u32)
    });
    (created, updated)
}

#[test]
fn update() {
    suite(async |s| {
        let begin = SystemTime::now();
        s.prepare("c1-a", "").await.unwrap();
        s.commit("c1", "c1-a").await.unwrap();
        s.prepare("c2-a", "c1").await.unwrap();
        s.commit("c2", "c2-a").await.unwrap();
        s.prepare("a1", "c2").await.unwrap();
        s.prepare("a2", "").await.unwrap();
        s.view("v1", "c2").await.unwrap();
        s.view("v2", "").await.unwrap();
        let end = SystemTime::now();
        for (name, kind, parent) in [
            ("c1", Kind::Committed, ""),
            ("c2", Kind::Committed, "c1"),
            ("a1", Kind::Active, "c2"),
            ("a2", Kind::Active, ""),
            ("v1", Kind::View, "c2"),
            ("v2", Kind::View, ""),
        ] {
            let mut info = s.stat(name).await.unwrap();
            let (created, updated) = time(&info);
            assert!((begin..=end).contains(&created), "{name}");
            assert_eq!(created, updated);
            assert_eq!((info.name.as_str(), info.kind(), info.parent.as_str()), (name, kind, parent));

            let root = ("containerd.io/gc.root", "now");
            let wanted = labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3"), root]);
            info.parent = "doesnotexist".into();
            info.labels = wanted.clone();
            let before = SystemTime::now();
            let mut info = s.update(info, &[]).await.unwrap();
            let after = SystemTime::now();
            assert_eq!(time(&info).0, created);
            assert!((before..=after).contains(&time(&info).1), "{name}");
            assert_eq!((info.name.as_str(), info.kind(), info.parent.as_str()), (name, kind, parent));
            assert_eq!(info.labels, wanted);

            info.labels = labels(&[("l1", "updated"), ("l4", "v4")]);
            let mut info = s.update(info, &["labels.l1", "labels.l2"]).await.unwrap();
            assert_eq!(info.labels, labels(&[("l1", "updated"), ("l3", "v3"), root]));

            let wanted = labels(&[("l4", "v4"), root]);
            info.labels = wanted.clone();
            let mut info = s.update(info, &["labels"]).await.unwrap();
            assert_eq!(info.labels, wanted);

            info.parent = "doesnotexist".into();
            let refused = s.update(info, &["parent"]).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
        }
    });
}

#[test]
fn remove() {
    suite(async |s| {
        s.prepare("committed-a", "").await.unwrap();
        s.commit("committed-1", "committed-a").await.unwrap();
        s.prepare("reuse-1", "committed-1").await.unwrap();
        s.remove("reuse-1").await.unwrap();
        s.view("reuse-1", "committed-1").await.unwrap();
        s.remove("reuse-1").await.unwrap();
        s.prepare("reuse-1", "").await.unwrap();
        s.remove("committed-1").await.unwrap();
        s.commit("committed-1", "reuse-1").await.unwrap();
    });
}

#[test]
fn walk() {
    suite(async |s| {
        let root = ("containerd.io/gc.root", "check-walk");
        let plain = || labels(&[root]);
        let with = |value| labels(&[("l", value), root]);
        s.prepare_with("a-np", "", plain()).await.unwrap();
        s.prepare_with("p-tmp", "", plain()).await.unwrap();
        s.commit_with("p", "p-tmp", plain()).await.unwrap();
        s.prepare_with("a", "p", plain()).await.unwrap();
        s.view_with("v", "p", plain()).await.unwrap();
        s.prepare_with("p-wl-tmp", "", plain()).await.unwrap();
        s.commit_with("p-wl", "p-wl-tmp", with("1")).await.unwrap();
        s.prepare_with("a-wl", "p-wl", with("2")).await.unwrap();
        s.view_with("v-wl", "p-wl", with("3")).await.unwrap();
        s.prepare_with("a-np-wl", "", with("2")).await.unwrap();
        let rooted = "labels.\"containerd.io/gc.root\"==check-walk";
        let and = |selector: &str| format!("{selector},{rooted}");
        let table: &[(&[&str], &str)] = &[
            (&[rooted], "a a-np a-np-wl a-wl p p-wl v v-wl"),
            (&[&and("kind==active")], "a a-np a-np-wl a-wl"),
            (&[&and("kind==view")], "v v-wl"),
            (&[&and("kind==committed")], "p p-wl"),
            (&["name==p", "name==a-np-wl"], "a-np-wl p"),
            (&["name==a-wl,labels.l"], "a-wl"),
            (&["parent==p"], "a v"),
            (&[&and("parent!=\"\"")], "a a-wl v v-wl"),
            (&["labels.l"], "a-np-wl a-wl p-wl v-wl"),
            (&["labels.l==2"], "a-np-wl a-wl"),
        ];
        for (filters, expected) in table {
            let found = s.walk(filters).await.unwrap();
            let names: BTreeSet<String> = found.into_iter().map(|info| info.name).collect();
            assert_eq!(names.into_iter().collect::<Vec<_>>().join(" "), *expected, "{filters:?}");
        }
    });
}

#[test]
fn stat_in_walk() {
    suite(async |s| {
        s.prepare("c1-a", "").await.unwrap();
        s.commit("c1", "c1-a").await.unwrap();
        s.prepare("a1", "c1").await.unwrap();
        s.view("v1", "c1").await.unwrap();
        for message in s.list(&[]).await.unwrap() {
            for info in message {
                assert_eq!(s.stat(&info.name).await.unwrap(), info);
            }
        }
    });
}

#[test]
fn layer_file_update() {
    suite(async |s| {
        // The original repeats this across second boundaries, to catch changes told by size and time alone.
        for _ in 0..5 {
            s.check_chain(&[
                vec![
                    Change::Dir("etc", 0o700),
                    file("etc/hosts", "mydomain 10.0.0.1", 0o644),
                    file("etc/profile", "PATH=/usr/bin", 0o644),
                ],
                vec![
                    file("etc/hosts", "mydomain 10.0.0.2", 0o644),
                    file("etc/profile", "PATH=/usr/bin", 0o666),
                    Change::Dir("root", 0o700),
                    file("root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644),
                ],
            ])
            .await;
        }
    });
}

#[test]
fn remove_directory_in_lower_layer() {
    suite(async |s| {
        s.check_chain(&[
            vec![Change::Dir("lib", 0o700), file("lib/hidden", "", 0o644)],
            vec![Change::Remove("lib"), Change::Dir("lib", 0o700), file("lib/not-hidden", "", 0o644)],
            vec![file("lib/newfile", "", 0o644)],
        ])
        .await;
    });
}

#[test]
fn chown() {
    suite(async |s| {
        s.check_chain(&[
            vec![
                Change::Dir("opt", 0o700),
                Change::Dir("opt/a", 0o700),
                Change::Dir("opt/a/b", 0o700),
                file("opt/a/b/file.txt", "hello", 0o644),
            ],
            vec![
                Change::Chown("opt", 1),
                Change::Chown("opt/a", 1),
                Change::Chown("opt/a/b", 1),
                Change::Chown("opt/a/b/file.txt", 1),
            ],
        ])
        .await;
    });
}

#[test]
fn directory_permission_on_commit() {
    suite(async |s| {
        s.check_chain(&[
            vec![
                Change::Dir("dir1", 0o700),
                Change::Dir("dir2", 0o700),
                Change::Dir("dir3", 0o700),
                Change::Dir("dir4", 0o700),
                file("dir4/f1", "...", 0o644),
                Change::Dir("dir5", 0o700),
                file("dir5/f1", "...", 0o644),
                Change::Chown("dir1", 1),
                Change::Chown("dir2", 1),
                Change::Chown("dir3", 1),
                Change::Chown("dir5", 1),
                Change::Chown("dir5/f1", 1),
            ],
            vec![
                Change::Chown("dir2", 0),
                Change::Remove("dir3"),
                Change::Chown("dir4", 1),
                Change::Chown("dir4/f1", 1),
            ],
            vec![
                Change::Dir("dir3", 0o700),
                Change::Chown("dir3", 1),
                Change::Remove("dir5"),
                Change::Dir("dir5", 0o700),
                Change::Chown("dir5", 1),
            ],
        ])
        .await;
    });
}

#[test]
fn remove_intermediate_snapshot() {
    suite(async |s| {
        drop(s.prepare_mounted("base", "").await);
        s.commit("committed-base", &s.at("base").1).await.unwrap();
        s.prepare("intermediate", "committed-base").await.unwrap();
        s.commit("committed-inter", "intermediate").await.unwrap();
        s.prepare("top", "committed-inter").await.unwrap();
        assert_eq!(s.remove("committed-inter").await.unwrap_err().code(), Code::FailedPrecondition);
        for key in ["top", "committed-inter", "committed-base"] {
            s.remove(key).await.unwrap();
        }
    });
}

#[test]
fn deleted_files_in_child_snapshot() {
    suite(async |s| {
        s.check_chain(&[
            vec![file("foo", "foo\n", 0o777), file("foobar", "foobar\n", 0o777)],
            vec![Change::Remove("foobar")],
            vec![],
        ])
        .await;
    });
}

#[test]
fn move_file_from_lower_layer() {
    suite(async |s| {
        s.check_chain(&[
            vec![
                Change::Dir("dir1", 0o700),
                file("dir1/f1", "Hello", 0o644),
                Change::Dir("dir2", 0o700),
                file("dir2/f2", "...", 0o644),
            ],
            vec![
                Change::Dir("dir3", 0o700),
                file("dir3/f1", "Hello", 0o644),
                Change::Remove("dir1"),
                Change::Link("dir2/f2", "dir3/f2"),
                Change::Remove("dir2/f2"),
            ],
        ])
        .await;
    });
}

#[test]
fn rename() {
    suite(async |s| {
        // Renaming a directory of a lower layer is what overlayfs cannot do; the suite knows.
        s.check_chain(&[
            vec![
                Change::Dir("dir1", 0o700),
                Change::Dir("somefiles", 0o700),
                file("somefiles/f1", "was here first!", 0o644),
                file("somefiles/f2", "nothing interesting", 0o644),
            ],
            vec![
                file("somefiles/f1-overwrite", "new content 1", 0o644),
                Change::Rename("somefiles/f1-overwrite", "somefiles/f1"),
                Change::Rename("somefiles/f2", "somefiles/f3"),
            ],
        ])
        .await;
    });
}

#[test]
fn view_is_read_only() {
    suite(async |s| {
        let mut parent = String::new();
        // A view of nothing, of one layer (a bind mount) and of two (an overlay).
        for name in ["c1", "c2", ""] {
            let mounts = s.view("view", &parent).await.unwrap();
            let mounted = s.mounted(&mounts);
            let refused = fs::write(mounted.join("testfile"), "testcontent").unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            drop(mounted);
            s.remove("view").await.unwrap();
            if !name.is_empty() {
                s.prepare("tmp", &parent).await.unwrap();
                s.commit(name, "tmp").await.unwrap();
                parent = name.into();
            }
        }
    });
}

#[test]
fn root_permission() {
    suite(async |s| {
        let (mounted, _) = s.prepare_mounted("preparing", "").await;
        assert_eq!(fs::metadata(&*mounted).unwrap().permissions().mode() & 0o777, 0o755);
    });
}

#[test]
fn mounts_of_128_layers() {
    suite(async |s| {
        let (flat, _) = s.at("flat");
        fs::create_dir(&flat).unwrap();
        let mut parent = String::new();
        for n in 0..128 {
            let mut changes = vec![file("overwriteme", format!("{n} WAS HERE!\n"), 0o777)];
            if n == 0 {
                changes.extend([
                    file("bottom", "way at the bottom\n", 0o777),
                    Change::Dir("addhere", 0o755),
                    Change::Dir("onlyme", 0o755),
                    file("onlyme/bottom", "bye!\n", 0o777),
                ]);
            } else {
                changes.extend([
                    file(format!("addhere/file-{n}"), "same\n", 0o755),
                    Change::Remove("onlyme"),
                    Change::Dir("onlyme", 0o755),
                    file(format!("onlyme/file-{n}"), "only me!\n", 0o777),
                ]);
            }
            let (mounted, key) = s.prepare_mounted(&format!("prepare-layer-{n}"), &parent).await;
            same(&flat, &mounted);
            apply(&flat, &changes);
            apply(&mounted, &changes);
            same(&flat, &mounted);
            drop(mounted);
            parent = s.at(&format!("committed-{n}")).1;
            s.commit(&parent, &key).await.unwrap();
        }
        let mounts = s.view("fullview", &parent).await.unwrap();
        same(&flat, &s.mounted(&mounts));
    });
}

// Beyond the suite.

#[test]
fn lazy_layers_are_mounted_through_their_links() {
    suite(async |s| {
        for (target, parent, toc) in [("L0", "", 1), ("L1", "L0", 1)] {
            let labels = offer(target, toc).into_iter().collect();
            let hit = s.prepare_with("k", parent, labels).await.unwrap_err();
            assert_eq!(hit.code(), Code::AlreadyExists);
        }
        // The same layer twice in a chain: overlayfs refuses one directory as two lowers, but these are two.
        let (mounted, key) = s.prepare_mounted("top", "L1").await;
        assert!(mounted.join("layer").exists());
        fs::write(mounted.join("new"), "x").unwrap();
        fs::remove_file(mounted.join("layer")).unwrap();
        let root = fs::metadata(&*mounted).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!((root.uid(), root.gid()), FakeFs::owner());
        drop(mounted);
        s.commit("N2", &key).await.unwrap();
        let mounts = s.view("v", "N2").await.unwrap();
        let mounted = s.mounted(&mounts);
        assert!(mounted.join("new").exists() && !mounted.join("layer").exists());
        drop(mounted);
        let mounts = s.view("v1", "L0").await.unwrap();
        let mounted = s.mounted(&mounts);
        assert!(mounted.join("layer").exists());
        assert!(fs::write(mounted.join("layer"), "x").is_err());
    });
}

#[test]
fn removal_does_not_wait_for_mounts() {
    suite(async |s| {
        // The overlay goes on working without the record, and something mounted inside is left alone.
        s.prepare("tmp", "").await.unwrap();
        s.commit("base", "tmp").await.unwrap();
        let (mounted, key) = s.prepare_mounted("busy", "base").await;
        let id = |mounts: &[Mount]| {
            let upper = mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir=")).unwrap();
            Path::new(upper).parent().unwrap().to_owned()
        };
        let dir = id(&s.mounts(&key).await.unwrap());
        fs::create_dir(dir.join("fs/inner")).unwrap();
        let tmpfs = Mount { r#type: "tmpfs".into(), source: "tmpfs".into(), ..Default::default() };
        let inner = Mounted::all(&[tmpfs], &dir.join("fs/inner"));
        fs::write(inner.join("precious"), "x").unwrap();
        s.remove(&key).await.unwrap();
        s.cleanup().await.unwrap();
        assert!(inner.join("precious").exists());
        drop(inner);
        drop(mounted);
        s.cleanup().await.unwrap();
        assert!(!dir.exists());
    });
}

#[test]
fn a_full_disk_lets_snapshots_be_listed_and_removed() {
    with_mounts(async || {
        let disk = tempfile::tempdir().unwrap();
        let tmpfs = Mount {
            r#type: "tmpfs".into(),
            source: "tmpfs".into(),
            target: String::new(),
            options: vec!["size=48m".into()],
        };
        let mounted = Mounted::all(&[tmpfs], disk.path());
        {
            let fake = std::sync::Arc::new(FakeFs::new(&mounted));
            let snapshotter =
                snapshotter::Snapshotter::open(snapshotter::Config::new(&*mounted), fake).unwrap();
            let labels = || rooted().into_iter().collect();
            for n in 0..20 {
                snapshotter.view(&format!("v{n}"), "", labels()).await.unwrap();
            }
            let mut filler = fs::File::create(mounted.join("filler")).unwrap();
            let full = std::io::copy(&mut std::io::repeat(1), &mut filler).unwrap_err();
            assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
            assert_eq!(snapshotter.list(&[]).await.unwrap().len(), 20);
            for n in 0..20 {
                snapshotter.remove(&format!("v{n}")).await.unwrap();
            }
            assert!(snapshotter.list(&[]).await.unwrap().is_empty());
            snapshotter.close().await;
        }
    });
}
