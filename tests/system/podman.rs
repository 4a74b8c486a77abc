//! podman, of both generations, on the images of a registry: what it does by itself and what must be the same on a layer
//! store.

use std::io::Read as _;
use std::os::fd::AsRawFd as _;

use flate2::read::MultiGzDecoder;
use rustix::mount::{MountFlags, mount};
use support::system::{LayerStore, Podman, PodmanRelease};

use super::*;

const BOTH: [PodmanRelease; 2] = [PodmanRelease::Four, PodmanRelease::Five];
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// What a container says of [`layers`]: a file of the lower layer, one that the upper one covers, one it takes away, and
/// the number of links of another.
const LOOK: &str =
    "cat data/below data/covered; test ! -e data/gone && echo gone; busybox stat -c %h data/link";
const SEEN: &str = "below\nabove\ngone\n2\n";

/// A podman that has seen nothing yet, and an image of lazy layers in a registry. Fields end in order.
struct PodmanStand {
    podman: Podman,
    registry: ScriptedRegistry,
    reference: String,
    layers: Vec<LayerBlob>,
    dir: tempfile::TempDir,
}

fn layers() -> Vec<LayerBlob> {
    let lower = base()
        .dir("data")
        .file("data/below", "below\n")
        .file("data/covered", "covered\n")
        .file("data/gone", "not yet\n")
        .noise("data/noise", 300_000, 1);
    let upper = Layer::new()
        .dir("data")
        .file("data/covered", "above\n")
        .whiteout("data/gone")
        .file("data/file", "linked\n")
        .hardlink("data/link", "data/file")
        .noise("data/more", 200_000, 2);
    [lower, upper].map(|layer| LayerBlob::lazy(&Encoder::new().chunk_size(64 << 10).encode(&layer))).into()
}

impl PodmanStand {
    fn new(release: PodmanRelease) -> Option<PodmanStand> {
        if !Podman::available(release) {
            return None;
        }
        let dir = guard::temp_dir();
        let registry = ScriptedRegistry::start();
        let layers = layers();
        let reference = push(&registry, &layers);
        let podman = Podman::new(release, &dir.path().join("podman"));
        Some(PodmanStand { podman, registry, reference, layers, dir })
    }

    /// Digests of the layers that podman itself has fetched from `repository`, in their order in the image.
    fn fetched(&self, repository: &str, layers: &[LayerBlob]) -> Vec<String> {
        let requests = self.registry.requests();
        let podman = |request: &&Logged| {
            let agent = request.headers.get("user-agent");
            request.is_blob_get() && agent.is_some_and(|agent| agent.starts_with("containers/"))
        };
        let paths: BTreeSet<&str> =
            requests.iter().filter(podman).map(|request| request.path.as_str()).collect();
        let digests = digests(layers).into_iter();
        digests.filter(|d| paths.contains(format!("/v2/{repository}/blobs/{d}").as_str())).collect()
    }

    /// The layers of an image in the registry.
    #[track_caller]
    fn pushed(&self, repository: &str, tag: &str) -> Vec<LayerBlob> {
        let (_, manifest) = self.registry.manifest(repository, tag).expect("the manifest was pushed");
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let layers = manifest["layers"].as_array().unwrap().iter().zip(&self.layers);
        let layer = |(layer, original): (&Value, &LayerBlob)| LayerBlob {
            bytes: self
                .registry
                .blob(repository, layer["digest"].as_str().unwrap())
                .expect("its layer was pushed"),
            diff_id: original.diff_id.clone(),
            media_type: layer["mediaType"].as_str().unwrap().to_owned(),
            annotations: serde_json::from_value(layer["annotations"].clone()).unwrap_or_default(),
        };
        layers.map(layer).collect()
    }
}

fn digests(layers: &[LayerBlob]) -> Vec<String> {
    layers.iter().map(|layer| sha256_digest(&layer.bytes)).collect()
}

/// All that is done with an image from its pull to its end, the same with a layer store and without; the digests of the
/// layers that podman has fetched for it.
#[track_caller]
fn life(stand: &PodmanStand) -> Vec<String> {
    let PodmanStand { podman, registry, reference, layers, dir } = stand;
    podman.ok(&["pull", reference]);
    let images: Value = serde_json::from_str(&podman.ok(&["images", "--format", "json"])).unwrap();
    assert_eq!(images[0]["Names"], json!([reference]), "{images:#}");
    assert!(images[0]["Size"].as_u64().unwrap() > 500_000, "{images:#}");
    assert_eq!(podman.ok(&["run", "--rm", reference, "/bin/sh", "-c", LOOK]), SEEN);

    // A container that goes on while others come and go, and writes.
    podman.ok(&["run", "--detach", "--name", "long", reference, "/bin/sh", "-c", "busybox sleep 600"]);
    podman.ok(&["exec", "long", "/bin/sh", "-c", "echo written >data/covered"]);
    assert_eq!(
        podman.ok(&["exec", "long", "/bin/sh", "-c", "cat data/covered data/below"]),
        "written\nbelow\n"
    );
    // It compares the container's own layer with all below; what else there is are the mount points podman makes.
    let differs = podman.ok(&["diff", "long"]);
    let differs: Vec<&str> = differs.lines().filter(|line| line.contains("/data/")).collect();
    assert_eq!(differs, ["C /data/covered"]);
    podman.ok(&["rm", "--force", "--time", "0", "long"]);

    let archive = |name: &str, format: &str| {
        let path = dir.path().join(name).into_os_string().into_string().unwrap();
        podman.ok(&["save", "--quiet", "--format", format, "--output", &path, reference]);
        path
    };
    let (docker, oci) = (archive("docker.tar", "docker-archive"), archive("oci.tar", "oci-archive"));
    for layer in layers {
        let name = layer.diff_id.trim_start_matches("sha256:").to_owned() + ".tar";
        let tar = Command::new("tar")
            .args(["--extract", "--to-stdout", "--file", &docker, &name])
            .output()
            .unwrap();
        assert_eq!(sha256_digest(&tar.stdout), layer.diff_id, "{}", text(&tar));
    }

    podman.ok(&["push", "--quiet", reference, &format!("{}/copy:v1", registry.host())]);
    // Packed anew, or the very blobs where podman knows that the registry has them.
    for layer in stand.pushed("copy", "v1") {
        let mut tar = Vec::new();
        MultiGzDecoder::new(&*layer.bytes).read_to_end(&mut tar).unwrap();
        assert_eq!(sha256_digest(&tar), layer.diff_id);
    }

    podman.ok(&["rmi", reference]);
    assert_eq!(podman.ok(&["images", "--all", "--quiet"]), "");
    assert_eq!(fs::read_dir(podman.graphroot().join("overlay/l")).unwrap().count(), 0, "no layer is left");

    // What was saved stands for itself.
    let fetched = stand.fetched("app", layers);
    podman.set_store(None);
    let loaded = podman.ok(&["load", "--quiet", "--input", &oci]);
    let loaded = loaded.trim().rsplit(": ").next().unwrap();
    assert_eq!(podman.ok(&["run", "--rm", loaded, "/bin/sh", "-c", LOOK]), SEEN);
    assert_eq!(stand.fetched("app", layers), fetched);
    fetched
}

#[test]
fn podman_lives_with_an_image() {
    for release in BOTH {
        let Some(stand) = PodmanStand::new(release) else { return };
        assert_eq!(life(&stand), digests(&stand.layers), "without a store {release:?} fetches all layers");
    }
}

impl PodmanStand {
    /// Gives podman a layer store.
    fn with_store(&self, config: &str) -> LayerStore {
        let store = LayerStore::start(Path::new(BINARY), &self.dir.path().join("store"), config);
        self.podman.set_store(Some(&store.mountpoint()));
        store
    }
}

/// Who says to use the layers of the store's references, all together.
fn uses(store: &LayerStore) -> u64 {
    let records = fs::read_dir(store.root().join("refs")).unwrap().map(|entry| entry.unwrap().path());
    let records = records.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let count = |path: PathBuf| -> u64 {
        let record: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let entries = record["layers"].as_array().unwrap().iter().flat_map(|l| [&l["by_blob"], &l["by_toc"]]);
        entries.map(|entry| entry["uses"].as_u64().unwrap()).sum()
    };
    records.map(count).sum()
}

#[test]
fn podman_lives_with_an_image_of_a_layer_store_and_downloads_nothing() {
    for release in BOTH {
        let Some(stand) = PodmanStand::new(release) else { return };
        let store = stand.with_store("");
        assert_eq!(life(&stand), [""; 0], "{release:?}: {}", store.log());
        assert!(guard::eventually(LIMIT, || uses(&store) == 0), "{release:?}: {}", store.log());
    }
}

#[test]
fn what_podman_has_from_a_store_outlives_the_stores_process() {
    for release in BOTH {
        let Some(stand) = PodmanStand::new(release) else { return };
        let PodmanStand { podman, reference, .. } = &stand;
        let mut store = stand.with_store("");
        podman.ok(&["pull", reference]);
        podman.ok(&["run", "--detach", "--name", "long", reference, "/bin/sh", "-c", "busybox sleep 600"]);
        assert!(guard::eventually(LIMIT, || store.log().matches("layer is local").count() == 2));
        stand.registry.stop();
        for end in 0..3 {
            match end {
                0 => store.kill(),
                1 => store.stop(),
                _ => store.replace(),
            }
            if end < 2 {
                store.resume();
            }
            fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
            assert_eq!(podman.ok(&["exec", "long", "/bin/sh", "-c", LOOK]), SEEN, "{release:?} {end}");
            assert_eq!(podman.ok(&["run", "--rm", reference, "/bin/sh", "-c", LOOK]), SEEN);
            assert!(podman.ok(&["images"]).contains("app"));
        }
        // Drained, its mountpoint is a directory like any other, and podman goes on with what it has itself.
        podman.ok(&["rm", "--force", "--time", "0", "long"]);
        let drained =
            Command::new(BINARY).arg("drain").arg("--address").arg(store.socket()).output().unwrap();
        assert!(drained.status.success(), "{}", text(&drained));
        podman.ok(&["ps", "--all"]);
    }
}

#[test]
fn an_image_may_be_lazy_in_part() {
    for release in BOTH {
        let Some(stand) = PodmanStand::new(release) else { return };
        let _store = stand.with_store("");
        let middle = LayerBlob::plain(&Layer::new().dir("data").file("data/middle", "middle\n"));
        let lazy = [stand.layers[0].clone(), stand.layers[1].clone()];
        let blobs = [lazy[0].clone(), middle.clone(), lazy[1].clone()];
        stand.registry.put_image("mixed", "v1", &blobs, &json!({}));
        let reference = format!("{}/mixed:v1", stand.registry.host());
        stand.podman.ok(&["pull", &reference]);
        let look = format!("{LOOK}; cat data/middle");
        let seen = stand.podman.ok(&["run", "--rm", &reference, "/bin/sh", "-c", &look]);
        assert_eq!(seen, format!("{SEEN}middle\n"));
        assert_eq!(stand.fetched("mixed", &blobs), digests(&[middle]), "{release:?}");
        stand.podman.ok(&["rmi", &reference]);
    }
}

#[test]
fn a_login_that_podman_hands_over_is_the_stores_for_that_repository() {
    // The other generation does not know of helpers.
    let Some(stand) = PodmanStand::new(PodmanRelease::Five) else { return };
    let store = stand.with_store("[docker_config]\nenable = false\n[containers_auth]\nenable = false\n");
    let helper = stand.dir.path().join("helper");
    let script = format!("#!/bin/sh\nexec {BINARY} store-helper --address {}\n", store.socket().display());
    support::write_script(&helper, &script);
    stand.registry.set_auth(Auth::Basic { user: "u".to_owned(), password: "s3cret".to_owned() });
    let pull = ["pull", "--creds", "u:s3cret", &stand.reference];
    stand.podman.ok(&pull);
    assert_eq!(stand.fetched("app", &stand.layers), digests(&stand.layers), "the store is not let in");
    stand.podman.ok(&["rmi", &stand.reference]);

    stand.registry.take_requests();
    stand.podman.set_auth_helper(Some(&helper));
    stand.podman.ok(&pull);
    assert_eq!(stand.fetched("app", &stand.layers), [""; 0], "{}", store.log());
    assert_eq!(stand.podman.ok(&["run", "--rm", &stand.reference, "/bin/sh", "-c", LOOK]), SEEN);
    assert!(!store.log().contains("s3cret"));

    // Another repository of the same registry is another matter.
    stand.registry.put_image("other", "v1", &stand.layers, &json!({}));
    stand.podman.set_auth_helper(None);
    stand.podman.ok(&["pull", "--creds", "u:s3cret", &format!("{}/other:v1", stand.registry.host())]);
    let refused = format!("reference={}/other:v1 reason=\"auth_denied\"", stand.registry.host());
    assert!(store.log().contains(&refused), "{}", store.log());
}

#[test]
fn the_file_of_podman_login_is_the_stores_too() {
    for release in BOTH {
        let Some(stand) = PodmanStand::new(release) else { return };
        let file = stand.dir.path().join("auth.json").into_os_string().into_string().unwrap();
        let config = format!("[docker_config]\nenable = false\n[containers_auth]\npath = {file:?}\n");
        let store = stand.with_store(&config);
        stand.registry.set_auth(Auth::Basic { user: "u".to_owned(), password: "s3cret".to_owned() });
        let host = stand.registry.host();
        stand.podman.ok(&["login", "--authfile", &file, "--username", "u", "--password", "s3cret", &host]);
        stand.podman.ok(&["pull", "--authfile", &file, &stand.reference]);
        assert_eq!(stand.fetched("app", &stand.layers), [""; 0], "{release:?}: {}", store.log());
    }
}

/// Saves an image in both formats; returns what podman says to Docker's, of which 4.3 makes none with zstd layers.
#[track_caller]
fn save(stand: &PodmanStand, reference: &str, layers: &[LayerBlob]) -> String {
    let path = |name: &str| stand.dir.path().join(name).into_os_string().into_string().unwrap();
    let entry = |archive: &str, name: &str| {
        let tar = Command::new("tar").args(["--extract", "--to-stdout", "--file", archive, name]).output();
        tar.unwrap().stdout
    };
    let (docker, oci) = (path("docker.tar"), path("oci.tar"));
    let said = stand.podman.run(&["save", "--quiet", "--output", &docker, reference]);
    if said.status.success() {
        for LayerBlob { diff_id, .. } in layers {
            let name = diff_id.replace("sha256:", "") + ".tar";
            assert_eq!(sha256_digest(&entry(&docker, &name)), *diff_id);
        }
    }
    stand.podman.ok(&["save", "--quiet", "--format", "oci-archive", "--output", &oci, reference]);
    let blob = |descriptor: &Value| {
        entry(&oci, &format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/")))
    };
    let index: Value = serde_json::from_slice(&entry(&oci, "index.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
    let saved = manifest["layers"].as_array().unwrap().iter().map(|layer| {
        let mut tar = Vec::new();
        MultiGzDecoder::new(&*blob(layer)).read_to_end(&mut tar).unwrap();
        sha256_digest(&tar)
    });
    assert!(saved.eq(layers.iter().map(|layer| layer.diff_id.clone())));
    text(&said)
}

#[test]
fn podman_pushes_zstd_chunked_and_both_generations_pull_it() {
    let Some(stand) = PodmanStand::new(PodmanRelease::Five) else { return };
    let reference = format!("{}/chunked:v1", stand.registry.host());
    stand.podman.ok(&["pull", &stand.reference]);
    let format = ["--compression-format", "zstd:chunked", "--format", "oci"];
    stand.podman.ok(&[&["push"], &format[..], &[&stand.reference, &reference]].concat());
    let layers = stand.pushed("chunked", "v1");
    assert_eq!(layers.len(), 2);
    for layer in &layers {
        assert_eq!(layer.media_type, ZSTD);
        let annotation =
            |name| layer.annotations[&format!("io.github.containers.zstd-chunked.{name}")].clone();
        // Where the table of contents is: offset, length, length unpacked, type.
        let position: Vec<usize> =
            annotation("manifest-position").split(':').map(|number| number.parse().unwrap()).collect();
        let table = &layer.bytes[position[0]..][..position[1]];
        assert_eq!(sha256_digest(table), annotation("manifest-checksum"));
        assert!(layer.bytes.ends_with(b"GNUlInUx"));
    }
    let mut saved = Vec::new();
    for release in BOTH {
        let Some(other) = PodmanStand::new(release) else { return };
        other.podman.ok(&["pull", &reference]);
        assert_eq!(other.podman.ok(&["run", "--rm", &reference, "/bin/sh", "-c", LOOK]), SEEN);
        saved.push(save(&other, &reference, &layers));
    }
    assert_eq!(stand.fetched("chunked", &layers), digests(&layers));

    // With a store neither downloads any of it.
    stand.registry.take_requests();
    for (release, saved) in BOTH.into_iter().zip(saved) {
        let Some(other) = PodmanStand::new(release) else { return };
        let store = other.with_store("");
        other.podman.ok(&["pull", &reference]);
        assert_eq!(other.podman.ok(&["run", "--rm", &reference, "/bin/sh", "-c", LOOK]), SEEN);
        // The older one must know how long a layer's tar is.
        assert_eq!(save(&other, &reference, &layers), saved, "{release:?}: {}", store.log());
        assert_eq!(stand.fetched("chunked", &layers), [""; 0], "{release:?}: {}", store.log());
        other.podman.ok(&["rmi", &reference]);
    }
}

#[test]
fn what_podman_has_packed_is_the_same_tree_for_podman_for_containerd_and_unpacked() {
    let Some(stand) = PodmanStand::new(PodmanRelease::Five) else { return };
    let Some(containerd) = Stand::new("no_graduation = true\n") else { return };
    let image = Image::python();
    let source = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
    let plain = image.reference(&source, Form::Plain);
    let reference = format!("{}/python:v1", stand.registry.host());
    stand.podman.ok(&["pull", "--quiet", &plain]);
    let format = ["--compression-format", "zstd:chunked", "--format", "oci"];
    stand.podman.ok(&[&["push", "--quiet"], &format[..], &[&plain, &reference]].concat());

    containerd.containerd.pull_eagerly("overlayfs", &reference);
    let eager = described(containerd.tree("overlayfs"), containerd.started);
    containerd.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    assert!(eager.len() > 500, "{} entries", eager.len());
    let summary = containerd.pull(&reference);
    assert!(outcomes(&summary).iter().all(|outcome| outcome == "lazy"), "{summary:#}");
    assert_same(&eager, &described(containerd.tree(SNAPSHOTTER), containerd.started));

    for release in BOTH {
        let Some(other) = PodmanStand::new(release) else { return };
        let store = other.with_store("");
        other.podman.ok(&["pull", "--quiet", &reference]);
        let seen = other.podman.ok(&["run", "--rm", &reference, "python3", "-c", "print(6 * 7)"]);
        assert_eq!(seen, "42\n", "{release:?}");
        // As podman mounts it.
        let (_, manifest) = stand.registry.manifest("python", "v1").unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let name = |layer: &Value| match release {
            PodmanRelease::Four => layer["digest"].clone(),
            PodmanRelease::Five => {
                layer["annotations"]["io.github.containers.zstd-chunked.manifest-checksum"].clone()
            }
        };
        let layers = manifest["layers"].as_array().unwrap().iter().rev().map(name);
        let diffs: Vec<String> = layers
            .map(|name| store::place(&store, &reference, name.as_str().unwrap()).join("diff"))
            .map(|path| path.into_os_string().into_string().unwrap())
            .collect();
        let target = other.dir.path().join("tree");
        fs::create_dir(&target).unwrap();
        let mounted = guard::MountGuard::new(&target);
        let options =
            std::ffi::CString::new(format!("lowerdir={}", diffs.join(":").replace("sha256:", "sha256\\:")))
                .unwrap();
        mount("overlay", &target, "overlay", MountFlags::RDONLY, Some(options.as_c_str())).unwrap();
        let mut tree = guard::deadline(LIMIT, move || walk(&target).unwrap()).unwrap();
        tree[0].mtime = (0, 0);
        assert_same(&eager, &described(tree, containerd.started));
        drop(mounted);
        other.podman.ok(&["rmi", &reference]);
    }
}

#[test]
fn podman_pulls_what_we_have_packed_in_part() {
    let Some(stand) = PodmanStand::new(PodmanRelease::Five) else { return };
    let reference = format!("{}/ours:v1", stand.registry.host());
    let (from, to) = (format!("docker://{}", stand.reference), format!("docker://{reference}"));
    let converted = Command::new("timeout")
        .args(["300", BINARY, "convert", "--format", "zstd:chunked", &from, &to])
        .output()
        .unwrap();
    assert!(converted.status.success(), "{}", text(&converted));
    stand.podman.set_storage_options("pull_options = {enable_partial_images = \"true\"}\n");
    let pulled = stand.podman.run(&["--log-level", "debug", "pull", &reference]);
    let said = text(&pulled);
    assert!(pulled.status.success(), "{said}");
    assert_eq!(said.matches("Retrieved partial blob").count(), 2, "{said}");
    assert_eq!(stand.podman.ok(&["run", "--rm", &reference, "/bin/sh", "-c", LOOK]), SEEN);
    let saved = stand.dir.path().join("saved.tar").into_os_string().into_string().unwrap();
    stand.podman.ok(&["save", "--quiet", "--output", &saved, &reference]);
}

/// A file system of ours by its name, whose program answers nothing, and is gone once the file is closed.
fn mute(path: &Path) -> fs::File {
    let device = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let data = std::ffi::CString::new(data).unwrap();
    mount("lazurite", path, "fuse.lazurite", MountFlags::RDONLY, Some(data.as_c_str())).unwrap();
    device
}

#[test]
fn check_says_how_podman_and_its_store_are() {
    for release in BOTH {
        if !Podman::available(release) || !system::available() {
            return;
        }
        let dir = guard::temp_dir();
        let (store, helper) = (dir.path().join("store"), dir.path().join("helper"));
        let podman = Podman::new(release, &dir.path().join("podman"));
        let check = || {
            let output = podman.enter(&[BINARY, "check", "--podman", "--json"]);
            let findings: Vec<Value> =
                serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
            let about = |subject: &str| {
                let found: Vec<&Value> =
                    findings.iter().filter(|finding| finding["subject"] == subject).collect();
                format!("{found:?}")
            };
            (
                output.status.code(),
                about("podman"),
                about("podman storage") + &about("layer store"),
                about("layer store logins"),
            )
        };
        let (code, version, said, logins) = check();
        let asks = if release == PodmanRelease::Four { "every layer" } else { "table of contents" };
        assert_eq!(code, Some(1), "{said}");
        assert!(
            version.contains(asks) && said.contains("names no additional layer store"),
            "{version} {said}"
        );
        assert!(logins.contains("does not hand its logins"), "{logins}");

        podman.set_store(Some(&store));
        let judged = |wanted: &str| {
            let (code, _, said, _) = check();
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains(wanted), "{said}");
        };
        judged("does not exist: every command of podman fails");
        assert_eq!(podman.run(&["images"]).status.code(), Some(125), "as is said");
        fs::create_dir(&store).unwrap();
        judged("nothing is mounted");
        podman.ok(&["images"]);
        let _mount = guard::MountGuard::new(&store);
        let device = mute(&store);
        judged("does not answer");
        drop(device);
        // A child that was just started may hold the device until it runs another program.
        assert!(guard::eventually(LIMIT, || rustix::fs::statfs(&store).is_err()));
        judged("is gone: every command of podman fails");
        assert_eq!(podman.run(&["images"]).status.code(), Some(125), "as is said");

        let lazurite = LayerStore::start(Path::new(BINARY), &dir.path().join("lazurite"), "");
        podman.set_store(Some(&lazurite.mountpoint()));
        support::write_script(&helper, "#!/bin/sh\n");
        podman.set_auth_helper(Some(&helper));
        let (code, _, said, logins) = check();
        assert_eq!(code, Some(0), "{said}");
        assert!(
            said.contains("is mounted and answers") && logins.contains("hands its logins"),
            "{said} {logins}"
        );
    }
}
