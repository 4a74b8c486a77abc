//! Complete layers become plain directories that nothing tells from an unpack, unless their TOC lies.

use std::{
    fs,
    path::{Path, PathBuf},
};

use fusefs::{Below, Fill};
use serde_json::{Value, json};
use support::{
    estargz::{Encoder, Landmark},
    guard,
    layer::{Layer, assert_same, long_path, random},
    zstd::{Dialect, ZstdEncoder},
};

use super::{
    bed::{Bed, LIMIT, REPOSITORY, read, tree, unpacked},
    tree::torture,
};

fn bed() -> Option<Bed> {
    Bed::with(|c| c.fill = Fill::On, false)
}

/// Waits until the layer in a slot is a directory.
#[track_caller]
fn graduated(bed: &Bed, slot: u64) -> PathBuf {
    let layer = bed.plane().layer(slot).unwrap();
    let done = guard::eventually(LIMIT, || layer.graduated().is_some() || layer.audited().is_err());
    assert!(done, "{}", layer.state_json());
    layer.graduated().unwrap_or_else(|| panic!("{}", layer.state_json())).tree.clone()
}

fn error(bed: &Bed, slot: u64) -> String {
    let state: Value = serde_json::from_str(&bed.plane().layer(slot).unwrap().state_json()).unwrap();
    state["error"].as_str().unwrap_or_default().to_owned()
}

fn encoders() -> [Encoder; 6] {
    [
        Encoder::new(),
        Encoder::new().chunk_size(64 << 10),
        Encoder::new().min_chunk_size(1 << 20),
        Encoder::new().min_chunk_size(100_000).chunk_size(64 << 10).landmark(Landmark::None),
        Encoder::new().prioritized(&["usr/bin/ping", "doc.3"]),
        Encoder::new().landmark(Landmark::None),
    ]
}

fn zstd_encoders() -> [ZstdEncoder; 3] {
    [
        ZstdEncoder::new(Dialect::Podman),
        ZstdEncoder::new(Dialect::Stargz).chunk_size(1 << 20),
        ZstdEncoder::podman_before(56),
    ]
}

#[test]
fn a_complete_layer_is_what_an_unpack_gives() {
    let Some(bed) = bed() else { return };
    let layer = torture();
    let zstd = zstd_encoders().map(|encoder| encoder.encode(&layer));
    for (slot, built) in (1..).zip(encoders().map(|encoder| encoder.encode(&layer)).into_iter().chain(zstd)) {
        let image = bed.push(&[&built]);
        let attached = bed.attach(slot, &bed.request(&image, &[&built], 0)).unwrap();
        assert_eq!(attached.tree, None);
        // A reader that has the file open all the while.
        let held = guard::deadline(LIMIT, {
            let path = bed.slot(slot).join("big.bin");
            move || fs::File::open(path).unwrap()
        });
        let made = graduated(&bed, slot);
        assert_same(&unpacked(&layer), &tree(made.clone()));
        assert_same(&unpacked(&layer), &tree(bed.slot(slot)));
        drop(held);
        let dir = made.parent().unwrap();
        assert_eq!(fs::read_dir(dir.join("data")).unwrap().count(), 0, "files are moved, not copied");
        assert!(!dir.join("fs.new").exists());
        // Who comes later gets the directory at once, and asks nobody.
        bed.origin.take_requests();
        let again = bed.attach(slot + 100, &bed.request(&image, &[&built], 0)).unwrap();
        assert_eq!(again.tree.as_deref(), Some(&*made));
        assert_eq!(bed.ranges(), []);
    }
}

#[test]
fn a_blob_can_be_required_to_have_its_digest() {
    let Some(bed) = Bed::with(
        |c| {
            c.fill = Fill::On;
            c.fetch.audits = fusefs::Audits::WithBlob;
        },
        false,
    ) else {
        return;
    };
    let built = Encoder::new().encode(&torture());
    let image = bed.push(&[&built]);
    bed.attach(1, &bed.request(&image, &[&built], 0)).unwrap();
    graduated(&bed, 1);
    let fetched: u64 = bed.ranges().iter().map(|range| range.end - range.start).sum();
    assert!(fetched >= 2 * built.blob.len() as u64 - (64 << 10), "{fetched} of {}", built.blob.len());

    // The same TOC in a blob that is not what its manifest says: nothing that is read tells.
    let layer = Layer::new().file("f", &b"content"[..]);
    let built = Encoder::new().encode(&layer);
    let image = bed.push(&[&built]);
    let mut request = bed.request(&image, &[&built], 0);
    let blob = bed.origin.blob(REPOSITORY, &request.blob_digest).unwrap();
    request.blob_digest = format!("sha256:{}", "ab".repeat(32));
    request.manifest_digest = None;
    bed.origin.put_blob_as(REPOSITORY, &request.blob_digest, blob);
    bed.attach(2, &request).unwrap();
    let told = guard::eventually(LIMIT, || error(&bed, 2).starts_with("blob_mismatch"));
    assert!(told, "{}", error(&bed, 2));
    assert!(bed.plane().layer(2).unwrap().graduated().is_none());
    assert_eq!(read(bed.slot(2).join("f")).unwrap(), b"content");
}

#[test]
fn random_layers_graduate_to_their_trees() {
    let Some(bed) = bed() else { return };
    for seed in 0..12 {
        let layer = random(seed, 40).for_plain_tar();
        let built = match seed as usize % 6 {
            n @ 0..4 => encoders()[n].encode(&layer),
            n => zstd_encoders()[n - 4].encode(&layer),
        };
        let image = bed.push(&[&built]);
        let slot = seed + 1;
        bed.attach(slot, &bed.request(&image, &[&built], 0)).unwrap();
        let made = graduated(&bed, slot);
        assert_same(&unpacked(&layer), &tree(made));
    }
}

#[test]
fn a_toc_that_lies_about_its_tar_keeps_its_layer_lazy() {
    let Some(bed) = bed() else { return };
    let layer = Layer::new()
        .dir("d")
        .file("d/a", &b"first"[..])
        .file("d/b", &b"second"[..])
        .xattr("user.x", "1")
        .symlink("l", "d/a")
        .hardlink("h", "d/a")
        .char_device("c", 1, 3)
        .dir("o")
        .opaque("o")
        .whiteout("w")
        .file("z", &b"last"[..]);
    let entry = |toc: &mut Value, name: &str, change: &dyn Fn(&mut Value)| {
        let entries = toc["entries"].as_array_mut().unwrap();
        let found = entries.iter_mut().find(|e| e["name"].as_str().unwrap().trim_end_matches('/') == name);
        change(found.unwrap_or_else(|| panic!("{name}")));
    };
    type Lie = (&'static str, Box<dyn Fn(&mut Value) + Send + Sync>);
    let set =
        |name: &'static str, key: &'static str, value: Value| -> Box<dyn Fn(&mut Value) + Send + Sync> {
            Box::new(move |toc| entry(toc, name, &|e| e[key] = value.clone()))
        };
    let add = |value: Value| -> Box<dyn Fn(&mut Value) + Send + Sync> {
        Box::new(move |toc| toc["entries"].as_array_mut().unwrap().push(value.clone()))
    };
    let without = |name: &'static str| -> Box<dyn Fn(&mut Value) + Send + Sync> {
        Box::new(move |toc| {
            let entries = toc["entries"].as_array_mut().unwrap();
            entries.retain(|e| e["name"].as_str().unwrap().trim_end_matches('/') != name);
        })
    };
    let lies: Vec<Lie> = vec![
        ("mode", set("d/a", "mode", json!(0o4755))),
        ("owner", set("d/b", "uid", json!(7))),
        ("time", set("d/b", "modtime", json!("2001-01-01T00:00:00Z"))),
        ("mode of a directory", set("d", "mode", json!(0o777))),
        ("link target", set("l", "linkName", json!("/etc/shadow"))),
        ("target of a hard link", set("h", "linkName", json!("d/b"))),
        ("device", set("c", "devMinor", json!(5))),
        ("xattr", set("d/b", "xattrs", json!({"user.x": "Mg=="}))),
        ("name", set("d/b", "name", json!("d/B"))),
        ("an invented file", add(json!({"name": "new", "type": "reg", "size": 0, "mode": 0o644}))),
        ("an invented link", add(json!({"name": "new", "type": "symlink", "linkName": "x", "mode": 0o777}))),
        ("an invented whiteout", add(json!({"name": "d/.wh.c", "type": "reg", "size": 0}))),
        ("an invented opaque directory", add(json!({"name": "d/.wh..wh..opq", "type": "reg", "size": 0}))),
        ("a hidden link", without("l")),
        ("a hidden file", without("d/b")),
        ("a hidden directory", without("d")),
        ("a hidden whiteout", without(".wh.w")),
        ("a hidden opaque marker", without("o/.wh..wh..opq")),
    ];
    for (slot, (what, lie)) in (1..).zip(lies) {
        let built = Encoder::new().edit_toc(lie).encode(&layer);
        let image = bed.push(&[&built]);
        bed.attach(slot, &bed.request(&image, &[&built], 0)).unwrap();
        let layer = bed.plane().layer(slot).unwrap();
        let told = guard::eventually(LIMIT, || error(&bed, slot).starts_with("tar_mismatch"));
        assert!(told, "{what}: {}", layer.state_json());
        assert!(layer.graduated().is_none(), "{what}");
        assert!(!layer.store().dir().join("fs").exists());
        // It is as good a lazy layer as before.
        assert_eq!(read(bed.slot(slot).join("z")).unwrap(), b"last", "{what}");
    }
    // Some builders round times up.
    let late = Layer::new().file("late", &b"x"[..]).mtime_nanos(1_700_000_000, 600_000_000);
    let up = set("late", "modtime", json!("2023-11-14T22:13:21Z"));
    let built = Encoder::new().edit_toc(up).encode(&late);
    let image = bed.push(&[&built]);
    bed.attach(499, &bed.request(&image, &[&built], 0)).unwrap();
    graduated(&bed, 499);
    // The same without a lie.
    let built = Encoder::new().encode(&layer);
    let image = bed.push(&[&built]);
    bed.attach(500, &bed.request(&image, &[&built], 0)).unwrap();
    graduated(&bed, 500);
}

#[test]
fn a_layer_that_occurs_twice_in_a_chain_keeps_its_second_slot() {
    let Some(bed) = bed() else { return };
    let built = Encoder::new().encode(&Layer::new().file("a", &b"a"[..]));
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    let mut repeated = request.clone();
    repeated.below = vec![Below { slot: 1, dir: bed.dir.path().join("none") }];
    let mut graduations = bed.plane().graduations().unwrap();
    bed.attach(1, &request).unwrap();
    bed.attach(2, &repeated).unwrap();
    bed.attach(3, &request).unwrap();
    let made = graduated(&bed, 2);
    let told = bed.runtime.block_on(graduations.recv()).unwrap();
    assert_eq!((told.tree, told.slots.contains(&2)), (made.clone(), false));
    assert_eq!(bed.attach(4, &request).unwrap().tree, Some(made));
    let mut fifth = request.clone();
    fifth.below = vec![Below { slot: 4, dir: bed.dir.path().join("none") }];
    assert_eq!(bed.attach(5, &fifth).unwrap().tree, None);
}

#[test]
fn directories_the_layer_does_not_describe_are_taken_from_the_chain_that_graduates() {
    let Some(bed) = bed() else { return };
    let lower = bed.dir.path().join("lower");
    fs::create_dir_all(lower.join("srv")).unwrap();
    std::os::unix::fs::chown(lower.join("srv"), Some(7), Some(8)).unwrap();
    let built = Encoder::new().encode(&Layer::new().file("srv/a", &b"a"[..]));
    let image = bed.push(&[&built]);
    let plain = bed.request(&image, &[&built], 0);
    let mut over = plain.clone();
    over.below = vec![Below { slot: 99, dir: lower }];
    bed.attach(1, &over).unwrap();
    let made = graduated(&bed, 1);
    use std::os::unix::fs::MetadataExt as _;
    let srv = fs::metadata(made.join("srv")).unwrap();
    assert_eq!((srv.uid(), srv.gid()), (7, 8));
    assert_eq!(bed.attach(2, &over).unwrap().tree, Some(made));
    assert_eq!(bed.attach(3, &plain).unwrap().tree, None, "in this chain the owner is another");
}

#[test]
fn a_graduated_layer_comes_back_without_registry_and_without_its_map() {
    let Some(mut bed) = bed() else { return };
    let layer = torture();
    let built = Encoder::new().encode(&layer);
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    let made = graduated(&bed, 1);
    bed.stop();
    bed.origin.stop();
    fs::remove_file(made.parent().unwrap().join("filled")).unwrap();
    bed.start();
    let attached = bed.runtime.block_on(bed.plane().restore(1, &request)).unwrap();
    assert_eq!(attached.tree, Some(made));
    // Containers from before go on through the mount.
    assert_same(&unpacked(&layer), &tree(bed.slot(1)));
}

/// Takes back a part of what graduation did, as if the process had been killed before.
fn undo(dir: &Path, moved: &[(&str, u32)], removed: &[&str]) {
    fs::rename(dir.join("fs"), dir.join("fs.new")).unwrap();
    for (name, node) in moved {
        fs::rename(dir.join("fs.new").join(name), dir.join("data").join(node.to_string())).unwrap();
    }
    for name in removed {
        fs::remove_file(dir.join("fs.new").join(name)).unwrap();
    }
}

#[test]
fn a_graduation_that_was_cut_off_anywhere_is_finished_at_the_next_start() {
    let Some(mut bed) = bed() else { return };
    let layer = torture().file(long_path(200), &b"deep"[..]);
    let built = Encoder::new().encode(&layer);
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    let made = graduated(&bed, 1);
    let dir = made.parent().unwrap().to_owned();
    let node = |bed: &Bed, path: &str| {
        let shown = bed.plane().layer(1).unwrap();
        path.split('/').fold(0, |dir, name| shown.index().lookup(dir, name.as_bytes()).unwrap())
    };
    let files = ["etc/passwd", "usr/bin/su", "big.bin", "holes"].map(|path| (path, node(&bed, path)));
    type Case<'a> = (&'a [(&'a str, u32)], &'a [&'a str], bool);
    let cases: [Case<'_>; 4] = [
        (&[], &[], true),
        (&[], &["dangling", "dev/null"], false),
        (&files, &["usr/share/doc.2", "usr/share/doc", "run/pipe", "gone"], false),
        (&files[..1], &[], true),
    ];
    for (moved, removed, record) in cases {
        bed.stop();
        undo(&dir, moved, removed);
        if !record {
            fs::remove_file(dir.join("graduated")).unwrap();
        }
        bed.start();
        let attached = bed.runtime.block_on(bed.plane().restore(1, &request)).unwrap();
        assert_eq!(attached.tree, None);
        // Meanwhile every file is found wherever it is.
        assert_same(&unpacked(&layer), &tree(bed.slot(1)));
        assert_same(&unpacked(&layer), &tree(graduated(&bed, 1)));
    }
    bed.origin.take_requests();
    assert_eq!(bed.ranges(), [], "nothing was fetched again");
}

#[test]
fn marks_outlive_the_process() {
    let Some(mut bed) = Bed::new() else { return };
    let layer = torture();
    let built = Encoder::new().encode(&layer);
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    // Read through the mount, which audits as it goes.
    tree(bed.slot(1));
    assert!(bed.plane().layer(1).unwrap().is_complete());
    bed.stop();
    bed.change(|config| config.fill = Fill::On);
    bed.origin.take_requests();
    bed.start();
    bed.runtime.block_on(bed.plane().restore(1, &request)).unwrap();
    assert_same(&unpacked(&layer), &tree(graduated(&bed, 1)));
    let fetched: u64 = bed.ranges().iter().map(|range| range.end - range.start).sum();
    assert!(fetched < built.blob.len() as u64 / 20, "{fetched} bytes: what has no content, not the files");
}
