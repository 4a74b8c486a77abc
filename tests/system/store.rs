//! The additional layer store, asked as containers/storage asks: the calls of podman 4.3 and 5.4, in their order.

use std::{
    io::{ErrorKind, Write as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    process::Stdio,
};

use support::{
    system::LayerStore,
    zstd::{Dialect, ZstdEncoder},
};

use super::*;

/// A store, a registry, and an image of three lazy layers in it.
struct Shelf {
    store: LayerStore,
    registry: ScriptedRegistry,
    layers: Vec<Layer>,
    built: Vec<Built>,
    reference: String,
    _dir: tempfile::TempDir,
}

/// By which digest a layer's directory is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Blob,
    Toc,
}

fn layers() -> Vec<Layer> {
    let second = Layer::new().dir("etc").file("etc/motd", &b"second\n"[..]).noise("etc/noise", 300_000, 7);
    let third = Layer::new().dir("tmp").opaque("tmp").whiteout("etc/motd").noise("top", 900_000, 9);
    vec![Layer::new().dir("bin").dir("tmp").mode(0o1777).noise("bin/large", 2_000_000, 3), second, third]
}

impl Shelf {
    fn new(config: &str) -> Option<Shelf> {
        if !guard::require_root_and_fuse() {
            return None;
        }
        let dir = guard::temp_dir();
        let registry = ScriptedRegistry::start();
        let layers = layers();
        let built: Vec<Built> = layers.iter().map(|layer| Encoder::new().encode(layer)).collect();
        let reference = push(&registry, &built.iter().map(LayerBlob::lazy).collect::<Vec<_>>());
        let store = LayerStore::start(Path::new(BINARY), &dir.path().join("store"), config);
        Some(Shelf { store, registry, layers, built, reference, _dir: dir })
    }

    fn dir(&self, digest: &str) -> PathBuf {
        place(&self.store, &self.reference, digest)
    }

    fn name(&self, layer: usize, by: By) -> String {
        match by {
            By::Blob => sha256_digest(&self.built[layer].blob),
            By::Toc => self.built[layer].toc_digest.clone(),
        }
    }

    /// What the store's record says of a layer.
    fn record(&self, layer: usize, by: By) -> Value {
        let text = fs::read(self.store.root().join("refs/2.json")).unwrap();
        let record: Value = serde_json::from_slice(&text).unwrap();
        record["layers"][layer][if by == By::Blob { "by_blob" } else { "by_toc" }].clone()
    }
}

pub(super) fn place(store: &LayerStore, reference: &str, digest: &str) -> PathBuf {
    store.mountpoint().join(base64(reference)).join(digest)
}

/// Go's `base64.StdEncoding`, written down anew.
fn base64(text: &str) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |bytes: &[u8]| {
        let bits = (0..3).fold(0_u32, |bits, n| bits << 8 | u32::from(bytes.get(n).copied().unwrap_or(0)));
        let letter = |n: usize| {
            if n > bytes.len() { '=' } else { char::from(LETTERS[(bits >> (18 - 6 * n) & 63) as usize]) }
        };
        (0..4).map(letter).collect::<String>()
    };
    text.as_bytes().chunks(3).map(group).collect()
}

/// Whether a layer is here, as the client asks: `diff`, `info`, `blob`, and no further after one that is not.
fn is_here(dir: &Path) -> bool {
    let dir = dir.to_owned();
    guard::deadline(LIMIT, move || {
        ["diff", "info", "blob"].iter().all(|name| match fs::metadata(dir.join(name)) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{name}: {error}");
                false
            }
        })
    })
    .unwrap()
}

/// Takes a reference: the answer must be ENOENT.
#[track_caller]
fn take(dir: &Path) {
    let path = dir.join("use");
    let error = guard::deadline(LIMIT, || {
        fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap_err()
    });
    assert_eq!(error.unwrap().raw_os_error(), Some(rustix::io::Errno::NOENT.raw_os_error()));
}

/// Drops a reference: the answer must be ENOENT.
#[track_caller]
fn release(dir: &Path) {
    let dir = dir.to_owned();
    let error = guard::deadline(LIMIT, || fs::remove_dir(dir).unwrap_err()).unwrap();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOENT.raw_os_error()));
}

fn read(path: PathBuf) -> std::io::Result<Vec<u8>> {
    guard::deadline(LIMIT, move || fs::read(path)).unwrap()
}

fn info(dir: &Path) -> Value {
    serde_json::from_slice(&read(dir.join("info")).unwrap()).expect("info is JSON")
}

/// A layer's whole way through a pull.
#[track_caller]
fn pull(dir: &Path) -> Value {
    assert!(is_here(dir), "{}", dir.display());
    take(dir);
    let first = info(dir);
    assert_eq!(info(dir), first);
    take(dir);
    release(dir);
    first
}

/// `layer` as both kinds of overlay mounts need it.
fn shown(layer: &Layer) -> Vec<Expect> {
    let mut tree = layer.expected();
    for found in &mut tree {
        if let Some(mark) = found.xattrs.get(&b"trusted.overlay.opaque"[..]).cloned() {
            found.xattrs.insert(b"user.overlay.opaque".to_vec(), mark);
        }
    }
    tree
}

fn tree(dir: PathBuf) -> Vec<Expect> {
    guard::deadline(LIMIT, move || walk(&dir).unwrap()).unwrap()
}

#[test]
fn both_protocols_are_answered_side_by_side() {
    let Some(shelf) = Shelf::new(ONLY_WHAT_IS_READ) else { return };
    for by in [By::Blob, By::Toc] {
        for (n, built) in shelf.built.iter().enumerate() {
            let dir = shelf.dir(&shelf.name(n, by));
            let size = shelf.layers[n].for_plain_tar().tar().len();
            let said = pull(&dir);
            let mut expected = json!({
                "toc-digest": built.toc_digest, "compressed-size": built.blob.len(), "compression": 2,
                "flags": {"expected-layer-diffid": built.diff_id},
                "diff-size": said["diff-size"],
            });
            if by == By::Blob {
                expected["diff-digest"] = json!(built.diff_id);
                expected["compressed-diff-digest"] = json!(shelf.name(n, By::Blob));
            }
            assert_eq!(said, expected, "{by:?} {n}");
            // The tar in the blob has the table of contents, too.
            assert!(said["diff-size"].as_u64().unwrap() >= size as u64, "{said}");
            assert_same(&shown(&shelf.layers[n]), &tree(dir.join("diff")));
        }
    }
    // Two uses and one that has ended, for each.
    let net = |by| (0..3).all(|n| shelf.record(n, by)["uses"] == 1);
    assert!(guard::eventually(LIMIT, || net(By::Blob) && net(By::Toc)));
    let removed = shelf.dir(&shelf.name(0, By::Toc));
    release(&removed);
    release(&removed);
    assert!(guard::eventually(LIMIT, || shelf.record(0, By::Toc)["uses"] == 0));
    assert!(is_here(&removed), "a count is a hint");

    let root = fs::metadata(shelf.store.mountpoint()).unwrap();
    assert_eq!((root.permissions().mode() & 0o7777, root.uid()), (0o700, 0));
}

#[test]
fn whiteouts_are_those_of_overlayfs_for_root_and_users() {
    let Some(shelf) = Shelf::new("") else { return };
    let dir = shelf.dir(&shelf.name(2, By::Toc));
    assert!(is_here(&dir));
    let whiteout = fs::symlink_metadata(dir.join("diff/etc/motd")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    for name in ["trusted.overlay.opaque", "user.overlay.opaque"] {
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(dir.join("diff/tmp"), name, &mut value).unwrap();
        assert_eq!(&value[..length], b"y", "{name}");
    }
}

#[test]
fn a_blob_is_the_registrys_to_its_last_byte() {
    let Some(shelf) = Shelf::new(ONLY_WHAT_IS_READ) else { return };
    // Longer than one piece, and not a multiple of anything.
    let layer = Layer::new().noise("large", 9_000_017, 5);
    let built = Encoder::new().encode(&layer);
    shelf.registry.put_image("large", "v1", &[LayerBlob::lazy(&built)], &json!({}));
    let digest = sha256_digest(&built.blob);
    let dir = place(&shelf.store, &format!("{}/large:v1", shelf.registry.host()), &digest);
    assert!(is_here(&dir));
    assert_eq!(fs::metadata(dir.join("blob")).unwrap().len(), built.blob.len() as u64);
    assert_eq!(sha256_digest(&read(dir.join("blob")).unwrap()), digest);

    // The registry is away: an error, and no memory of it.
    let other = shelf.dir(&shelf.name(0, By::Blob));
    assert!(is_here(&other));
    shelf.registry.fault(Rule::new(Action::Status(404, vec![])).path("/blobs/"));
    assert!(read(other.join("blob")).is_err());
    shelf.registry.clear_all();
    assert_eq!(sha256_digest(&read(other.join("blob")).unwrap()), shelf.name(0, By::Blob));
}

#[test]
fn all_layers_of_a_reference_are_opened_with_the_first_lookup() {
    let Some(shelf) = Shelf::new(ONLY_WHAT_IS_READ) else { return };
    shelf.registry.take_requests();
    assert!(is_here(&shelf.dir(&shelf.name(2, By::Toc))));
    let asked = shelf.registry.take_requests();
    let manifests = asked.iter().filter(|request| request.path.contains("/manifests/")).count();
    // The config, and the end of each blob.
    let blobs = asked.iter().filter(|request| request.is_blob_get()).count();
    assert_eq!((manifests, blobs), (1, 4), "{asked:#?}");
    for by in [By::Toc, By::Blob] {
        for n in 0..3 {
            pull(&shelf.dir(&shelf.name(n, by)));
        }
    }
    assert_eq!(shelf.registry.take_requests().len(), 0, "all is known");
}

#[test]
fn the_length_of_a_tar_is_told_by_its_tar_split_in_one_request() {
    let config = format!("{ONLY_WHAT_IS_READ}[store]\nlookup_timeout_sec = 8\n");
    let Some(shelf) = Shelf::new(&config) else { return };
    let layer = Layer::new().dir("d").noise("d/large", 300_000, 4).file("d/small", "x");
    let forged = Layer::new().dir("f").noise("f/large", 300_000, 5);
    let wrong = |toc: &mut Value| toc["tarSplitDigest"] = json!(sha256_digest(b"another"));
    let encoder = || ZstdEncoder::new(Dialect::Podman);
    let size = |name: &str, built: &Built, by: By| {
        shelf.registry.put_image(name, "v1", &[LayerBlob::lazy(built)], &json!({}));
        shelf.registry.take_requests();
        let digest = if by == By::Blob { &built.digest } else { &built.toc_digest };
        let dir = place(&shelf.store, &format!("{}/{name}:v1", shelf.registry.host()), digest);
        let size = pull(&dir)["diff-size"].clone();
        (size, shelf.registry.take_requests().iter().filter(|request| request.is_blob_get()).count())
    };
    // The config and the table of contents are fetched for every image.
    let built = encoder().encode(&layer);
    let length = json!(built.uncompressed_size);
    assert_eq!(size("one", &built, By::Blob), (length.clone(), 3), "{}", shelf.store.log());
    assert_eq!(size("one", &built, By::Toc), (length.clone(), 0), "it is known");
    assert_eq!(size("two", &built, By::Toc), (length.clone(), 1), "from the other reference");
    let before = ZstdEncoder::podman_before(56).encode(&layer);
    assert_eq!(size("before", &before, By::Toc), (length, 3), "the manifest has the digest");

    // Where it does not tell, the layer is here all the same.
    let stargz = ZstdEncoder::new(Dialect::Stargz).encode(&layer);
    assert_eq!(size("noted", &stargz, By::Toc), (json!(stargz.uncompressed_size), 2));
    let none = ZstdEncoder::podman_before(40).chunk_size(100_000).encode(&layer);
    assert_eq!(size("none", &none, By::Toc), (json!(-1), 2));
    let other = encoder().edit_toc(wrong).encode(&forged);
    assert_eq!(size("forged", &other, By::Toc), (json!(-1), 3));
    assert!(shelf.store.log().contains("instead of"), "{}", shelf.store.log());
    let gone = encoder().chunk_size(100_000).encode(&forged);
    // Behind the table of contents.
    let fault = shelf.registry.fault(Rule::new(Action::Hang).path(&gone.digest).nth(2));
    assert_eq!(size("gone", &gone, By::Toc).0, json!(-1));
    assert_eq!(shelf.registry.hits(fault), 1);
}

#[test]
fn what_cannot_be_lazy_is_not_here() {
    let Some(shelf) = Shelf::new("") else { return };
    let lazy = &shelf.built[0];
    let plain = LayerBlob::plain(&shelf.layers[1]);
    let mut broken = LayerBlob::lazy(&shelf.built[2]);
    broken.bytes = plain.bytes.slice(1..);
    let blobs = [LayerBlob::lazy(lazy), plain.clone(), broken.clone()];
    shelf.registry.put_image("mixed", "v1", &blobs, &json!({}));
    let mixed = format!("{}/mixed:v1", shelf.registry.host());
    let here = |reference: &str, digest: &str| is_here(&place(&shelf.store, reference, digest));
    assert!(here(&mixed, &sha256_digest(&lazy.blob)) && here(&mixed, &lazy.toc_digest));
    assert!(!here(&mixed, &sha256_digest(&plain.bytes)), "no table of contents");
    assert!(!here(&mixed, &sha256_digest(&broken.bytes)), "not what its annotation says");
    assert!(!here(&mixed, &shelf.built[2].toc_digest));
    assert!(!here(&mixed, &shelf.built[1].toc_digest), "another image's");

    // Twice in one image: overlayfs would refuse the same directory as two lowers.
    let twice = [LayerBlob::lazy(lazy), LayerBlob::lazy(&shelf.built[1]), LayerBlob::lazy(lazy)];
    shelf.registry.put_image("twice", "v1", &twice, &json!({}));
    let twice = format!("{}/twice:v1", shelf.registry.host());
    assert!(!here(&twice, &lazy.toc_digest) && here(&twice, &shelf.built[1].toc_digest));

    for unknown in ["missing:v1", "app:v9", "app@sha256:00"] {
        assert!(!here(&format!("{}/{unknown}", shelf.registry.host()), &lazy.toc_digest), "{unknown}");
    }
    // What is no name of ours.
    for name in ["x", "pool", "aC9hYg"] {
        assert!(fs::metadata(shelf.store.mountpoint().join(name)).is_err(), "{name}");
    }
}

#[test]
fn paths_come_back_after_every_kind_of_end_without_the_registry() {
    let Some(mut shelf) = Shelf::new("") else { return };
    let dirs: Vec<PathBuf> =
        [By::Blob, By::Toc].iter().flat_map(|by| (0..3).map(|n| shelf.dir(&shelf.name(n, *by)))).collect();
    dirs.iter().for_each(|dir| drop(pull(dir)));
    for n in 0..3 {
        let text = format!("layer is local layer={}", shelf.built[n].toc_digest);
        assert!(shelf.store.wait_log(&text, LIMIT), "{}", shelf.store.log());
    }
    let numbers = |dirs: &[PathBuf]| -> Vec<u64> {
        let paths: Vec<PathBuf> =
            dirs.iter().flat_map(|dir| ["", "diff", "info", "blob"].map(|name| dir.join(name))).collect();
        guard::deadline(LIMIT, move || paths.iter().map(|path| fs::metadata(path).unwrap().ino()).collect())
            .unwrap()
    };
    let before = numbers(&dirs);
    assert!(guard::eventually(LIMIT, || shelf.record(2, By::Toc)["uses"] == 1));
    shelf.registry.stop();
    let held = fs::File::open(dirs[0].join("diff/bin")).unwrap();
    for end in 0..4 {
        match end {
            0 => shelf.store.stop(),
            1 => shelf.store.kill(),
            2 => shelf.store.replace(),
            _ => {
                // Nothing is left of the mount, as after a reboot.
                shelf.store.stop();
                support::system::unmount_below(&shelf.store.mountpoint());
            }
        }
        if end != 2 {
            shelf.store.resume();
        }
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_eq!(numbers(&dirs), before, "after end {end}");
        for (n, layer) in shelf.layers.iter().enumerate() {
            assert_same(&shown(layer), &tree(dirs[n].join("diff")));
            assert_same(&shown(layer), &tree(dirs[3 + n].join("diff")));
        }
        assert_eq!(shelf.record(2, By::Toc)["uses"], 1);
    }
    drop(held);
    assert_eq!(shelf.store.log().matches("the mount of the process before goes on").count(), 3);
}

#[test]
fn a_reader_in_the_middle_of_an_end_only_waits() {
    let Some(mut shelf) = Shelf::new(ONLY_WHAT_IS_READ) else { return };
    let dir = shelf.dir(&shelf.name(0, By::Toc));
    assert!(is_here(&dir));
    shelf.store.kill();
    let path = dir.join("diff/bin/large");
    let reader = std::thread::spawn(move || fs::read(path).unwrap());
    shelf.store.resume();
    let found = guard::deadline(LIMIT, || reader.join().unwrap()).unwrap();
    assert!(found == shelf.layers[0].contents()[&b"bin/large"[..]]);
}

#[test]
fn a_tag_that_has_moved_shows_what_it_leads_to_now_and_what_was_pulled_before() {
    let Some(shelf) = Shelf::new("") else { return };
    let old = shelf.dir(&shelf.name(0, By::Toc));
    pull(&old);
    let new = Encoder::new().encode(&Layer::new().noise("new", 5000, 1));
    let gone = Encoder::new().encode(&Layer::new().noise("gone", 5000, 2));
    // Between podman's look at the tag and ours it moved: its layer is not in what we see.
    let blobs = [LayerBlob::lazy(&shelf.built[0]), LayerBlob::lazy(&new)];
    shelf.registry.put_image("app", "v1", &blobs, &json!({}));
    let found = guard::eventually(LIMIT, || is_here(&shelf.dir(&new.toc_digest)));
    assert!(found, "{}", shelf.store.log());
    assert!(!is_here(&shelf.dir(&gone.toc_digest)));
    // What podman has kept leads to the old image for ever.
    for n in 0..3 {
        let dir = shelf.dir(&shelf.name(n, By::Toc));
        assert_eq!(pull(&dir)["toc-digest"], shelf.built[n].toc_digest);
        assert_same(&shown(&shelf.layers[n]), &tree(dir.join("diff")));
    }
}

#[test]
fn a_registry_that_hangs_holds_up_its_own_lookups_and_no_longer_than_allowed() {
    let Some(shelf) = Shelf::new("[store]\nlookup_timeout_sec = 2\n") else { return };
    let known = shelf.dir(&shelf.name(0, By::Toc));
    assert!(is_here(&known));
    let slow = ScriptedRegistry::start();
    push(&slow, &[LayerBlob::lazy(&shelf.built[1])]);
    let hang = slow.fault(Rule::new(Action::Hang));
    let dir = place(&shelf.store, &format!("{}/app:v1", slow.host()), &shelf.built[1].toc_digest);
    let lookups: Vec<_> = (0..8)
        .map(|_| {
            let dir = dir.clone();
            std::thread::spawn(move || is_here(&dir))
        })
        .collect();
    assert!(slow.wait_hits(hang, 1, LIMIT));
    // All threads of the file system answer others meanwhile.
    assert_same(&shown(&shelf.layers[0]), &tree(known.join("diff")));
    for lookup in lookups {
        assert!(!guard::deadline(LIMIT, || lookup.join().unwrap()).unwrap(), "podman pulls it itself");
    }
    slow.clear_all();
    assert!(guard::eventually(LIMIT, || is_here(&dir)), "no failure is remembered for long");
}

#[test]
fn nothing_can_be_changed_in_a_store() {
    let Some(shelf) = Shelf::new("") else { return };
    let dir = shelf.dir(&shelf.name(0, By::Toc));
    assert!(is_here(&dir));
    let refused = |done: std::io::Result<()>| {
        assert_eq!(done.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    };
    refused(fs::create_dir(dir.join("new")));
    refused(fs::write(dir.join("new"), "x"));
    refused(fs::write(dir.join("diff/new"), "x"));
    refused(fs::remove_file(dir.join("info")));
    refused(fs::rename(dir.join("info"), dir.join("other")));
    refused(std::os::unix::fs::symlink("x", dir.join("new")));
    refused(fs::hard_link(dir.join("info"), dir.join("new")));
    refused(fs::set_permissions(dir.join("diff/bin"), fs::Permissions::from_mode(0o777)));
    refused(fs::remove_dir(dir.join("diff")));
    let write = fs::OpenOptions::new().write(true).custom_flags(libc_sync()).open(dir.join("info"));
    refused(write.and_then(|mut file| file.write_all(b"x")));
    assert_eq!(info(&dir)["toc-digest"], shelf.built[0].toc_digest);
}

/// `O_SYNC`: what is written is refused at once.
fn libc_sync() -> i32 {
    rustix::fs::OFlags::SYNC.bits() as i32
}

#[test]
fn a_root_has_one_store_and_a_drained_one_lets_go_of_its_mount() {
    let Some(mut shelf) = Shelf::new("") else { return };
    assert!(is_here(&shelf.dir(&shelf.name(0, By::Toc))));
    let second = shelf.store.command("store").arg(shelf.store.mountpoint()).output().unwrap();
    assert!(!second.status.success() && text(&second).contains("another lazurite"), "{}", text(&second));
    let mounted = || {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(shelf.store.mountpoint().to_str().unwrap())
    };
    assert!(mounted());
    let drained =
        Command::new(BINARY).arg("drain").arg("--address").arg(shelf.store.socket()).output().unwrap();
    assert!(drained.status.success(), "{}", text(&drained));
    assert!(!mounted());
    assert!(shelf.store.mountpoint().is_dir(), "podman fails without it");
    shelf.store.stop();
    assert!(!shelf.store.log().contains("the mount stays"), "{}", shelf.store.log());
}

#[test]
fn status_lists_the_stores_layers_and_who_uses_them() {
    let Some(mut shelf) = Shelf::new(ONLY_WHAT_IS_READ) else { return };
    let status = |shelf: &Shelf, args: &[&str]| {
        let mut status = Command::new(BINARY);
        let output = status.args(["status", "--address"]).arg(shelf.store.socket()).args(args).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let listed = |shelf: &Shelf| -> Value { serde_json::from_str(&status(shelf, &["--json"])).unwrap() };
    assert_eq!(listed(&shelf), json!({ "layers": [], "fallbacks": null }));
    let dirs = [0, 1, 2].map(|n| shelf.dir(&shelf.name(n, By::Toc)));
    for (dir, uses) in dirs.iter().zip([0, 1, 2]) {
        assert!(is_here(dir));
        (0..uses).for_each(|_| take(dir));
    }
    for (n, name) in [(1, "etc/motd"), (1, "etc/noise"), (2, "top")] {
        assert!(read(dirs[n].join("diff").join(name)).is_ok());
    }
    shelf.registry.fault(Rule::new(Action::Status(404, vec![])).path("/blobs/"));
    assert!(read(dirs[0].join("diff/bin/large")).is_err());
    for end in 0..2 {
        let said = listed(&shelf);
        let layers = said["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 3, "{said:#}");
        for (n, layer) in layers.iter().enumerate() {
            let size: usize = shelf.layers[n].contents().values().map(|content| content.len()).sum();
            let state = if n == 0 { "lazy" } else { "local" };
            let seen = ["reference", "blob_digest", "toc_digest", "uses", "content_bytes", "state"];
            let expected = [
                json!(shelf.reference),
                json!(shelf.name(n, By::Blob)),
                json!(shelf.name(n, By::Toc)),
                json!(n),
                json!(size),
                json!(state),
            ];
            assert_eq!(seen.map(|key| layer[key].clone()), expected, "{said:#}");
            assert_eq!(layer["local_bytes"] == layer["content_bytes"], n > 0, "{said:#}");
        }
        if end == 0 {
            assert_eq!(layers[0]["error"]["reason"], "not_found", "{said:#}");
            let table = status(&shelf, &[]);
            assert!(table.contains("USES") && table.contains("not_found: "), "{table}");
            assert!(table.contains(&shelf.reference) && !table.contains("containerd"), "{table}");
            // The next process knows the same.
            shelf.store.stop();
            shelf.store.resume();
        }
    }
}

#[test]
fn the_helper_hands_over_logins_and_says_none_of_them() {
    let Some(shelf) = Shelf::new("log = { level = \"trace\" }\n") else { return };
    let helper = |input: String| {
        // As registries.conf names it: by a link, with nothing behind it.
        let link = shelf.store.root().join("lazurite-store-helper");
        let _ = std::os::unix::fs::symlink(BINARY, &link);
        let mut command = Command::new(link);
        command.env("XDG_RUNTIME_DIR", shelf.store.root());
        command.arg("--address").arg(shelf.store.socket());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let login = json!({ &shelf.reference: {"username": "u", "password": "s3cret", "identityToken": ""} });
    let output = helper(login.to_string());
    assert!(output.status.success() && text(&output).is_empty(), "{}", text(&output));
    for bad in ["", "{}", "{\"x y\":{\"password\":\"s3cret\"}}", "{\"h/r:t\":\"s3cret\"}"] {
        let output = helper(bad.to_owned());
        assert!(!output.status.success() && !text(&output).contains("s3cret"), "{}", text(&output));
    }
    assert!(!shelf.store.log().contains("s3cret"));
}

/// As `podman unshare` does it, in namespaces of the user's own.
const ROOTLESS: &str = r#"
set -e
export HOME=$PWD XDG_DATA_HOME=$PWD/data XDG_RUNTIME_DIR=$PWD/run
mkdir run upper work merged l
serve() {
    mkfifo ready; "$1" store --config config.toml mount >ready 2>>log & read line <ready; rm ready
    [ "$line" = "ready: $PWD/mount" ]
}
serve "$1"
n=0
for digest in $3 $4 $5; do n=$((n + 1)); ln -s "$PWD/mount/$2/$digest/diff" l/$n; done
mount -t overlay overlay -o userxattr,lowerdir=l/3:l/2:l/1,upperdir=upper,workdir=work merged
kill $!; wait $! || true
serve "$1"
(cd merged && find . | sort && stat -c '%a %u:%g' tmp && sha256sum top)
umount merged
"$1" drain --address run/lazurite-store/store.sock
kill $!
"#;

#[test]
fn a_user_has_a_store_in_namespaces_of_his_own() {
    if !guard::require_programs(&["unshare", "timeout"]) {
        return;
    }
    let Some(shelf) = Shelf::new("") else { return };
    let dir = guard::temp_dir();
    fs::write(dir.path().join("config.toml"), "").unwrap();
    let mut command = Command::new("timeout");
    command.args(["60", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ROOTLESS, "sh"]);
    command.arg(BINARY).arg(base64(&shelf.reference));
    command.args(shelf.built.iter().map(|built| &built.toc_digest)).current_dir(dir.path());
    let output = command.output().unwrap();
    let log = fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    assert!(output.status.success(), "{}\n{log}", text(&output));
    let top = sha256_digest(&shelf.layers[2].contents()[&b"top"[..]]);
    let names = [".", "./bin", "./bin/large", "./etc", "./etc/noise", "./tmp", "./top"];
    let expected = format!("{}\n755 0:0\n{}  top\n", names.join("\n"), top.trim_start_matches("sha256:"));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with(&expected), "{}", text(&output));
    assert!(log.contains("the mount of the process before goes on"), "{log}");
}
