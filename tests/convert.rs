//! `lazurite convert` and `lazurite inspect` as users run them: results that other tools read, every place an image can
//! be at, and every way a run can end early.
//!
//! Where something must go wrong, the test kit's registry plays it; everything else is real.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use flate2::read::MultiGzDecoder;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::{
    estargz::{Encoder, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_DIGEST_ANNOTATION, TOC_NAME},
    guard::{self, MountGuard, ProcessGuard},
    layer::{Expect, Layer, assert_same, walk},
    registry::{Action, Auth, INDEX, LayerBlob, MANIFEST, Platform, Rule, ScriptedRegistry},
    sha256_digest,
    system::{self, Containerd, Cri, DockerRegistry, Form, Image, Lazurite, SNAPSHOTTER},
};

#[path = "convert/zstd.rs"]
mod zstd_chunked;

const BINARY: &str = env!("CARGO_BIN_EXE_lazurite");
/// Longer than anything here takes; only a bug reaches it.
const LIMIT: Duration = Duration::from_secs(120);

fn command(args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "180", BINARY]).args(args);
    // Runs know nothing of each other but what the destination tells.
    command.env("XDG_CACHE_HOME", "/dev/null");
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Runs a command of Lazurite that prints JSON.
#[track_caller]
fn lazurite(args: &[&str]) -> Value {
    let output = command(args).arg("--json").output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output));
    serde_json::from_slice(&output.stdout).expect("the result is JSON")
}

#[track_caller]
fn convert(args: &[&str]) -> Value {
    lazurite(&[&["convert"], args].concat())
}

/// Runs a command that must fail; what it says.
#[track_caller]
fn fails(args: &[&str]) -> String {
    let output = command(args).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output));
    String::from_utf8(output.stderr).unwrap()
}

/// Runs another program, which must succeed.
#[track_caller]
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new("timeout").args(["120", program]).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A field of every layer of a result, from the bottom up.
fn each(result: &Value, field: &str) -> Vec<String> {
    let images = result["images"].as_array().unwrap().iter();
    let layers = images.flat_map(|image| image["layers"].as_array().unwrap());
    layers.map(|layer| layer[field].as_str().unwrap_or("-").to_owned()).collect()
}

/// The blob of a layout.
fn blob(layout: &Path, digest: &str) -> Vec<u8> {
    fs::read(layout.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))).unwrap()
}

fn document(layout: &Path, digest: &str) -> Value {
    serde_json::from_slice(&blob(layout, digest)).unwrap()
}

fn unpacked(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    MultiGzDecoder::new(blob).read_to_end(&mut tar).unwrap();
    tar
}

/// A tree without what eStargz adds to every layer, and without the root's time, which that changes.
fn without_ours(mut tree: Vec<Expect>) -> Vec<Expect> {
    let ours = [TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK].map(str::as_bytes);
    tree.retain(|entry| !ours.contains(&entry.path.as_slice()));
    tree[0].mtime = (0, 0);
    tree
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn put(registry: &ScriptedRegistry, tag: &str, layers: &[LayerBlob]) -> String {
    registry.put_image("app", tag, layers, &json!({"config": {"Cmd": ["/bin/sh"]}, "x-kept": [1, 2]}));
    format!("docker://{}/app:{tag}", registry.host())
}

/// Two small layers.
fn small() -> Vec<LayerBlob> {
    let bottom = Layer::new().dir("etc").file("etc/a", "first\n").noise("etc/b", 100_000, 1);
    let top = Layer::new().dir("etc").whiteout("etc/a").symlink("l", "etc/b").file("empty", "");
    [bottom, top].iter().map(LayerBlob::plain).collect()
}

/// A layer that is too long to be held in memory by a push.
fn long() -> LayerBlob {
    LayerBlob::plain(&Layer::new().noise("long", 20 << 20, 7))
}

fn at(place: &str, path: &Path) -> String {
    format!("{place}:{}", path.display())
}

#[test]
fn other_tools_read_the_result_like_any_image() {
    if !system::available() || !guard::require_programs(&["ctr-remote", "skopeo", "umoci"]) {
        return;
    }
    let dir = guard::temp_dir();
    let dir = dir.path();
    let image = Image::torture();
    let source = DockerRegistry::with_images(&dir.join("source"), &image);
    let registry = DockerRegistry::start(&dir.join("registry"));
    let plain = image.reference(&source, Form::Plain);
    let converted = format!("{}/torture:esgz", registry.address());
    let result = convert(&[&format!("docker://{plain}"), &format!("docker://{converted}")]);
    assert_eq!(each(&result, "outcome"), ["converted"; 6]);

    // containerd unpacks both to the same tree, and ctr-remote finds our TOC digests.
    let tree = |name: &str, reference: &str, toc_digests: Option<&Value>| {
        let none = dir.join("none");
        let containerd = Containerd::start(&dir.join(name), &none, Cri::Off);
        containerd.pull_eagerly("overlayfs", reference);
        for layer in
            toc_digests.into_iter().flat_map(|result| result["images"][0]["layers"].as_array().unwrap())
        {
            let address = containerd.address();
            let said = run(
                "ctr-remote",
                &[
                    "--address",
                    address.to_str().unwrap(),
                    "--namespace",
                    containerd.namespace(),
                    "image",
                    "get-toc-digest",
                    layer["digest"].as_str().unwrap(),
                ],
            );
            assert_eq!(said.trim(), layer["toc_digest"]);
        }
        let mounted = containerd.mount_image("overlayfs", &dir.join(format!("{name}-tree")));
        let root = mounted.path().to_owned();
        without_ours(guard::deadline(LIMIT, move || walk(&root).unwrap()).unwrap())
    };
    assert_same(&tree("plain", &plain, None), &tree("converted", &converted, Some(&result)));

    // So do skopeo and umoci.
    let tree = |name: &str, reference: &str| {
        let (layout, bundle) = (dir.join(format!("{name}-oci")), dir.join(format!("{name}-bundle")));
        let layout = format!("{}:{name}", layout.display());
        run(
            "skopeo",
            &["copy", "--src-tls-verify=false", &format!("docker://{reference}"), &format!("oci:{layout}")],
        );
        run("umoci", &["unpack", "--image", &layout, bundle.to_str().unwrap()]);
        without_ours(walk(&bundle.join("rootfs")).unwrap())
    };
    assert_same(&tree("umoci-plain", &plain), &tree("umoci-converted", &converted));
}

#[test]
fn lazurite_mounts_the_result_lazily_and_takes_it_as_it_is() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let dir = dir.path();
    let image = Image::torture();
    let source = DockerRegistry::with_images(&dir.join("source"), &image);
    let registry = DockerRegistry::start(&dir.join("registry"));
    let converted = format!("{}/torture:esgz", registry.address());
    let from = format!("docker://{}", image.reference(&source, Form::Plain));
    let to = format!("docker://{converted}");
    let first = convert(&[&from, &to]);

    let daemon = Lazurite::start(Path::new(BINARY), &dir.join("lazurite"), "");
    let containerd = Containerd::start(&dir.join("containerd"), &daemon.socket(), Cri::Off);
    let pulled = daemon.pull(&containerd, &[&converted]);
    let pulled: Value =
        serde_json::from_slice(&pulled.stdout).unwrap_or_else(|_| panic!("{}", text(&pulled)));
    let outcomes: Vec<&str> =
        pulled["layers"].as_array().unwrap().iter().map(|layer| layer["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["lazy", "lazy", "lazy", "lazy", "lazy", "unpacked"], "{pulled:#}");
    let said = containerd.run(SNAPSHOTTER, &converted, &["/bin/sh", "-c", "echo runs"]);
    assert_eq!(text(&said), "runs\n");

    // Inspection says the same, and why.
    let inspected = lazurite(&["inspect", "--verify", &to]);
    let layers = inspected["images"][0]["layers"].as_array().unwrap();
    for (layer, outcome) in layers.iter().zip(&outcomes) {
        assert_eq!(layer["lazy"], *outcome == "lazy", "{layer:#}");
        assert_eq!(layer["findings"]["problems"], json!([]), "{layer:#}");
    }
    assert_eq!(layers[5]["reason"], "lossy_names");

    // Converting it again changes nothing, and neither does converting what ctr-remote has made.
    let again = convert(&[&to, &format!("docker://{}/other:esgz", registry.address())]);
    assert_eq!(each(&again, "outcome"), ["reused"; 6]);
    assert_eq!(each(&again, "stored"), ["mounted"; 6], "docker-registry mounts from the other repository");
    assert_eq!(again["digest"], first["digest"]);
    let theirs = format!("docker://{}", image.reference(&source, Form::Estargz));
    let layout = dir.join("theirs");
    let kept = convert(&[&theirs, &at("oci", &layout)]);
    assert_eq!(each(&kept, "outcome"), ["reused"; 6]);
    let digest = lazurite(&["inspect", &theirs])["digest"].clone();
    assert_eq!(kept["digest"], digest);
    // Even when it is forced, our own output is what comes out.
    let forced = convert(&["--force", &to, &at("oci", &layout)]);
    assert_eq!(each(&forced, "outcome"), ["converted"; 6]);
    assert_eq!(forced["digest"], first["digest"]);
}

#[test]
fn images_pass_through_every_place_unchanged() {
    if !system::available() || !guard::require_programs(&["skopeo"]) {
        return;
    }
    let dir = guard::temp_dir();
    let dir = dir.path();
    let source = ScriptedRegistry::start();
    let registry = DockerRegistry::start(&dir.join("registry"));
    let none = dir.join("none");
    let containerd = Containerd::start(&dir.join("containerd"), &none, Cri::Off);
    let address = containerd.address();
    let scope = ["--address", address.to_str().unwrap(), "--namespace", containerd.namespace()];

    let first = convert(&[&put(&source, "v1", &small()), &at("oci", &dir.join("layout:v1"))]);
    let places = [
        at("oci", &dir.join("layout:v1")),
        at("oci-archive", &dir.join("image.tar:a/b:v1")),
        "containerd:r.example/app:v1".to_owned(),
        format!("docker://{}/app:v1", registry.address()),
        "containerd:app:v2".to_owned(),
        at("oci-archive", &dir.join("other.tar")),
        at("oci", &dir.join("other")),
    ];
    for pair in places.windows(2) {
        let moved = convert(&[&scope[..], &[&pair[0], &pair[1]]].concat());
        assert_eq!(moved["digest"], first["digest"], "{pair:?}");
        assert_eq!(each(&moved, "outcome"), ["reused"; 2], "{pair:?}");
        let inspected = lazurite(&[&["inspect"], &scope[..], &["--verify", &pair[1]]].concat());
        assert_eq!(each(&inspected, "digest"), each(&moved, "digest"));
    }
    let raw = |place: String| sha256_digest(run("skopeo", &["inspect", "--raw", &place]).as_bytes());
    assert_eq!(raw(at("oci-archive", &dir.join("image.tar:a/b:v1"))), first["digest"]);
    assert_eq!(raw(at("oci", &dir.join("other"))), first["digest"]);
    let images = containerd.ctr_ok(&["images", "ls", "-q"]);
    let images: Vec<&str> = images.lines().collect();
    assert_eq!(images, ["docker.io/library/app:v2", "r.example/app:v1"]);

    // Nothing that is not written is kept, nothing that is written is collected.
    let leases = containerd.ctr_ok(&["leases", "ls", "-q"]);
    assert_eq!(leases, "");
    containerd.ctr_ok(&["leases", "create", "--id", "empty"]);
    containerd.ctr_ok(&["leases", "rm", "--sync", "empty"]);
    let inspected = lazurite(&[&["inspect"], &scope[..], &["--verify", "containerd:app:v2"]].concat());
    assert_eq!(inspected["digest"], first["digest"]);
    assert!(containerd.ctr_ok(&["content", "active"]).lines().count() <= 1);

    // What was pulled for one platform only says so.
    let error = fails(&[&["convert"], &scope[..], &["containerd:nothing:here", "oci:/nowhere"]].concat());
    assert!(error.contains("there is no image containerd:nothing:here"), "{error}");
}

#[test]
fn sixty_layers() {
    let registry = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let mut layers: Vec<LayerBlob> = (0..60)
        .map(|n| {
            let layer =
                Layer::new().dir(format!("d{n}")).file(format!("d{n}/f"), format!("{n}\n").repeat(1000));
            LayerBlob::plain(&layer.whiteout(format!("d{}", (n + 59) % 60)))
        })
        .collect();
    layers[30] = layers[7].clone();
    layers[59] = layers[7].clone();
    let layout = dir.path().join("out");
    let source = put(&registry, "v1", &layers);
    let result = convert(&[&source, &at("oci", &layout)]);
    assert_eq!(each(&result, "outcome"), ["converted"; 60]);
    let digests = each(&result, "digest");
    assert_eq!(digests.iter().collect::<BTreeSet<_>>().len(), 58);
    assert_eq!((&digests[30], &digests[59]), (&digests[7], &digests[7]));
    let reads = registry.requests();
    let repeated = sha256_digest(&layers[7].bytes);
    let whole = reads.iter().filter(|r| r.is_blob_get() && r.path.contains(&repeated) && r.bytes_sent > 100);
    assert_eq!(whole.count(), 1, "what occurs three times is read once");

    let manifest = document(&layout, result["digest"].as_str().unwrap());
    let config = document(&layout, manifest["config"]["digest"].as_str().unwrap());
    assert_eq!(config["history"].as_array().unwrap().len(), 60);
    assert_eq!((&config["x-kept"], &config["config"]["Cmd"]), (&json!([1, 2]), &json!(["/bin/sh"])));
    for (n, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        let bytes = blob(&layout, layer["digest"].as_str().unwrap());
        let tar = unpacked(&bytes);
        assert_eq!(config["rootfs"]["diff_ids"][n], sha256_digest(&tar), "layer {n}");
        assert_eq!(layer["annotations"]["io.containers.estargz.uncompressed-size"], tar.len().to_string());
        assert!(layer["annotations"][TOC_DIGEST_ANNOTATION].is_string());
    }
}

#[test]
fn platforms_and_what_belongs_to_them() {
    let registry = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let layer = |name: &str| LayerBlob::plain(&Layer::new().file(name, name.repeat(100)));
    let shared = layer("shared");
    let images = ["amd64", "arm64"].map(|architecture| {
        let extras = json!({ "architecture": architecture });
        registry.put_image("app", architecture, &[shared.clone(), layer(architecture)], &extras)
    });
    // An attestation, as docker's builder makes them.
    let statement = registry.put_blob("app", &b"{}"[..]);
    let attestation = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": statement, "size": 2 },
        "layers": [{ "mediaType": "application/vnd.in-toto+json", "digest": statement, "size": 2 }],
    })
    .to_string();
    let attestation_digest = registry.put_manifest("app", "attestation", MANIFEST, attestation.clone());
    let mut entries: Vec<Value> = ["amd64", "arm64"]
        .iter()
        .zip(&images)
        .map(|(architecture, image)| {
            json!({
                "mediaType": MANIFEST, "digest": image.manifest, "size": image.manifest_size,
                "platform": { "os": "linux", "architecture": architecture }, "annotations": { "kept": "yes" },
            })
        })
        .collect();
    entries.push(json!({
        "mediaType": MANIFEST, "digest": attestation_digest, "size": attestation.len(),
        "platform": { "os": "unknown", "architecture": "unknown" },
        "annotations": { "vnd.docker.reference.digest": images[1].manifest },
    }));
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
    registry.put_manifest("app", "all", INDEX, index.to_string());
    let source = format!("docker://{}/app:all", registry.host());

    let layout = dir.path().join("out");
    let all = convert(&["--all-platforms", &source, &at("oci", &layout)]);
    let platforms: Vec<&str> = all["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| image["platform"].as_str().unwrap_or("-"))
        .collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64", "-"]);
    assert_eq!(each(&all, "outcome"), ["converted", "converted", "converted", "converted", "kept"]);
    let digests = each(&all, "digest");
    assert_eq!(digests[0], digests[2], "the layer of both platforms is one blob");
    let root = document(&layout, all["digest"].as_str().unwrap());
    let entries = root["manifests"].as_array().unwrap();
    for (entry, image) in entries.iter().zip(all["images"].as_array().unwrap()) {
        assert_eq!(entry["digest"], image["digest"]);
        assert_eq!(entry["size"], blob(&layout, image["digest"].as_str().unwrap()).len());
    }
    assert_eq!(
        (&entries[0]["annotations"]["kept"], &entries[1]["platform"]["architecture"]),
        (&json!("yes"), &json!("arm64"))
    );
    assert_eq!(entries[2]["digest"], attestation_digest);
    assert_eq!(entries[2]["annotations"]["vnd.docker.reference.digest"], entries[1]["digest"]);

    let again = convert(&["--all-platforms", &at("oci", &layout), &at("oci", &dir.path().join("again"))]);
    assert_eq!(again["digest"], all["digest"]);
    let one = convert(&["--platform", "linux/arm64", &source, &at("oci", &layout)]);
    assert_eq!(one["digest"], all["images"][1]["digest"], "one platform is its manifest");
    let several =
        convert(&["--platform", "linux/arm64", "--platform", "linux/amd64", &source, &at("oci", &layout)]);
    assert_eq!(several["digest"], all["digest"]);
    let error = fails(&["convert", "--platform", "linux/s390x", &source, &at("oci", &layout)]);
    assert!(error.contains("only for: linux/amd64, linux/arm64"), "{error}");
}

#[test]
fn dockers_documents_become_ocis_unless_they_shall_not() {
    if !guard::require_programs(&["docker-registry", "skopeo"]) {
        return;
    }
    let dir = guard::temp_dir();
    let dir = dir.path();
    let scripted = ScriptedRegistry::start();
    let registry = DockerRegistry::start(&dir.join("registry"));
    let docker = format!("docker://{}/app:docker", registry.address());
    let insecure = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    let source = put(&scripted, "v1", &small());
    run("skopeo", &[&["copy", "--format", "v2s2"], &insecure[..], &[&source, &docker]].concat());

    let types = |flag: &str| {
        let layout = dir.join(flag.trim_start_matches('-'));
        let result = convert(&[flag, &docker, &at("oci", &layout)]);
        let manifest = document(&layout, result["digest"].as_str().unwrap());
        let layer = &manifest["layers"][0];
        assert!(layer["annotations"][TOC_DIGEST_ANNOTATION].is_string(), "{manifest:#}");
        [&result["media_type"], &manifest["mediaType"], &manifest["config"]["mediaType"], &layer["mediaType"]]
            .map(|value| value.as_str().unwrap().trim_start_matches("application/vnd.").to_owned())
    };
    let oci = ["oci.image.manifest.v1+json", "oci.image.config.v1+json", "oci.image.layer.v1.tar+gzip"];
    assert_eq!(types("--oci"), [oci[0], oci[0], oci[1], oci[2]]);
    let docker = [
        "docker.distribution.manifest.v2+json",
        "docker.container.image.v1+json",
        "docker.image.rootfs.diff.tar.gzip",
    ];
    assert_eq!(types("--no-oci"), [docker[0], docker[0], docker[1], docker[2]]);
}

#[test]
fn files_that_are_asked_for_come_first() {
    let registry = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let dir = dir.path();
    let bottom = Layer::new()
        .dir("usr")
        .dir("usr/lib")
        .noise("usr/lib/z.so", 50_000, 1)
        .noise("usr/lib/a.so", 50_000, 2)
        .dir("bin")
        .noise("bin/tool", 50_000, 3);
    let layers = [LayerBlob::plain(&bottom), LayerBlob::plain(&Layer::new().file("app", "x"))];
    let source = put(&registry, "v1", &layers);
    let spool = dir.join("spool");
    fs::create_dir(&spool).unwrap();
    let tmpdir = ["--tmpdir", spool.to_str().unwrap()];
    let list = dir.join("list");
    fs::write(&list, "# first what starts it\n/bin/tool\n\nusr/**/a*\nnowhere/*\n").unwrap();
    let layout = at("oci", &dir.join("listed"));
    let args = ["--prefetch-list", list.to_str().unwrap(), &source, &layout];
    let result = convert(&[&tmpdir[..], &args].concat());
    assert_eq!(result["not_found"], json!(["nowhere/*"]));
    let inspected = lazurite(&["inspect", "--files", &layout]);
    let layers = inspected["images"][0]["layers"].as_array().unwrap();
    assert_eq!(layers[0]["contents"]["prioritized"], json!(["bin/tool", "usr/lib/a.so"]));
    assert_eq!(layers[1]["contents"]["landmark"], "no prefetch");
    let offset = |path: &str| {
        let files = layers[0]["files"].as_array().unwrap();
        files.iter().find(|file| file["path"] == path).unwrap()["chunks"][0]["offset"].as_u64().unwrap()
    };
    let prefetch = layers[0]["contents"]["prefetch_bytes"].as_u64().unwrap();
    assert!(offset("bin/tool") < offset("usr/lib/a.so") && offset("usr/lib/a.so") < prefetch);
    assert!(prefetch < offset("usr/lib/z.so"));
    assert_eq!(names(&spool), Vec::<String>::new());

    // The same again changes nothing; another list does, on the same blobs.
    let listed =
        convert(&["--prefetch-list", list.to_str().unwrap(), &layout, &at("oci", &dir.join("again"))]);
    assert_eq!(listed["digest"], result["digest"]);
    let manifest = lazurite(&["inspect", &source])["digest"].as_str().unwrap().to_owned();
    let record = dir.join("record");
    let line = |path: &str, layer: u64| {
        json!({ "path": path, "manifestDigest": manifest, "layerIndex": layer }).to_string()
    };
    fs::write(&record, [line("app", 1), line("usr/lib/z.so", 0), line("app", 1)].join("\n")).unwrap();
    let recorded = at("oci", &dir.join("recorded"));
    let result = convert(&["--record-in", record.to_str().unwrap(), &layout, &recorded]);
    assert_eq!(each(&result, "outcome"), ["converted", "converted"]);
    let inspected = lazurite(&["inspect", &recorded]);
    let first = |layer: usize| inspected["images"][0]["layers"][layer]["contents"]["prioritized"].clone();
    assert_eq!((first(0), first(1)), (json!(["usr/lib/z.so"]), json!(["app"])));
    fs::write(&record, "bin/tool\n").unwrap();
    let error = fails(&["convert", "--record-in", record.to_str().unwrap(), &source, &recorded]);
    assert!(error.contains("line 1 is not a record"), "{error}");
}

#[test]
fn an_earlier_result_is_used() {
    let registry = ScriptedRegistry::start();
    let base = small();
    let top = |text: &str| LayerBlob::plain(&Layer::new().file("app", text.to_owned()));
    let to = format!("docker://{}/app:esgz", registry.host());
    let first = convert(&[&put(&registry, "v1", &[base.clone(), vec![top("one")]].concat()), &to]);
    assert_eq!(each(&first, "outcome"), ["converted"; 3]);

    registry.take_requests();
    let second = convert(&[&put(&registry, "v2", &[base, vec![top("two")]].concat()), &to]);
    assert_eq!(each(&second, "outcome"), ["already_converted", "already_converted", "converted"]);
    assert_eq!(each(&second, "digest")[..2], each(&first, "digest")[..2]);
    let log = registry.requests();
    for digest in &each(&second, "source_digest")[..2] {
        assert!(!log.iter().any(|r| r.is_blob_get() && r.path.contains(digest)), "{digest} is not read");
    }
    let manifest = registry.manifest("app", "esgz").unwrap();
    assert_eq!(sha256_digest(&manifest.1), second["digest"]);

    // Other options are other layers, and a blob that is gone is made again.
    let other = convert(&["--chunk-size", "64K", "--dry-run", &put_again(&registry), &to]);
    let outcomes: BTreeSet<&str> =
        other["layers"].as_array().unwrap().iter().map(|layer| layer["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["converted"].into());
    registry.remove_blob("app", &each(&second, "digest")[0]);
    let third = convert(&[&put_again(&registry), &to]);
    assert_eq!(each(&third, "outcome"), ["converted", "already_converted", "already_converted"]);
    assert_eq!(third["digest"], second["digest"]);
    let forced = convert(&["--force", &put_again(&registry), &to]);
    assert_eq!(each(&forced, "outcome"), ["converted"; 3]);
    assert_eq!(each(&forced, "stored"), ["present"; 3], "what is there is not sent again");
    assert_eq!(forced["digest"], second["digest"]);
}

/// The source of the second conversion above.
fn put_again(registry: &ScriptedRegistry) -> String {
    format!("docker://{}/app:v2", registry.host())
}

#[test]
fn a_dry_run_writes_nothing() {
    let registry = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let source = put(&registry, "v1", &small());
    let layout = dir.path().join("out");
    for to in
        [at("oci", &layout), at("oci-archive", &layout), format!("docker://{}/app:esgz", registry.host())]
    {
        let estimate = convert(&["--dry-run", &source, &to]);
        assert_eq!(estimate["layers"].as_array().unwrap().len(), 2);
        assert!(estimate["bytes_read"].as_u64().unwrap() > 100_000, "{estimate:#}");
        assert!(estimate["seconds"].as_f64().unwrap() > 0.0);
    }
    assert!(!layout.exists());
    assert!(registry.requests().iter().all(|r| ["GET", "HEAD"].contains(&r.method.as_str())));
}

/// A conversion that is interrupted when `ready`; its exit status and what it said.
#[track_caller]
fn interrupted(
    dir: &Path,
    args: &[&str],
    ready: impl FnOnce(&mut ProcessGuard) -> bool,
) -> (Option<i32>, String) {
    let mut command = Command::new(BINARY);
    command.arg("convert").args(args).env("XDG_CACHE_HOME", dir);
    let mut process = ProcessGuard::spawn(&mut command, dir.join("log")).unwrap();
    assert!(ready(&mut process), "{}", process.log());
    process.signal(Signal::INT).unwrap();
    let status = process.wait_exit(LIMIT).unwrap().expect("it ends");
    (status.code(), process.log())
}

#[test]
fn an_interrupted_push_leaves_no_name_and_no_upload_and_a_rerun_goes_on() {
    let (source, registry) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    let dir = guard::temp_dir();
    let from = put(&source, "v1", &[small(), vec![long()]].concat());
    let to = format!("docker://{}/app:esgz", registry.host());
    let spool = dir.path().join("spool");
    fs::create_dir(&spool).unwrap();
    let list = dir.path().join("list");
    fs::write(&list, "long\n").unwrap();
    let args = ["--prefetch-list", list.to_str().unwrap(), "--tmpdir", spool.to_str().unwrap(), &from, &to];

    let hang = registry.fault(Rule::new(Action::Hang).method("PATCH"));
    let (status, said) = interrupted(dir.path(), &args, |_| {
        let puts = || registry.requests().iter().filter(|r| r.method == "PUT" && r.status == 201).count();
        registry.wait_hits(hang, 1, LIMIT) && guard::eventually(LIMIT, || puts() == 2)
    });
    assert_eq!(status, Some(130), "{said}");
    assert!(said.contains("interrupted"), "{said}");
    assert_eq!(registry.manifest("app", "esgz"), None);
    assert_eq!(registry.uploads_open(), 0, "{:#?}", registry.requests());
    assert_eq!(names(&spool), Vec::<String>::new());

    registry.clear(hang);
    registry.take_requests();
    let result = convert(&args);
    assert_eq!(each(&result, "stored"), ["present", "present", "written"]);
    assert_eq!(registry.uploads_open(), 0);
    let manifest = registry.manifest("app", "esgz").unwrap();
    assert_eq!(sha256_digest(&manifest.1), result["digest"]);
    let posts = registry.requests().iter().filter(|r| r.method == "POST").count();
    assert_eq!(posts, 2, "the long layer and the config");
}

#[test]
fn a_rerun_makes_no_layer_again_that_an_interrupted_run_has_stored() {
    let (source, registry) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    let dir = guard::temp_dir();
    let last = LayerBlob::plain(&Layer::new().noise("last", 20 << 20, 8));
    let from = put(&source, "v1", &[small(), vec![long(), last.clone()]].concat());
    let to = format!("docker://{}/app:esgz", registry.host());
    let digest = sha256_digest(&last.bytes);
    let stall = source.fault(Rule::new(Action::Stall { after: 1000 }).path(digest).method("GET"));
    let (status, said) = interrupted(dir.path(), &["--jobs", "1", &from, &to], |_| {
        let puts = || registry.requests().iter().filter(|r| r.method == "PUT" && r.status == 201).count();
        source.wait_hits(stall, 1, LIMIT) && guard::eventually(LIMIT, || puts() == 3)
    });
    assert_eq!(status, Some(130), "{said}");
    assert_eq!((registry.manifest("app", "esgz"), registry.uploads_open()), (None, 0));

    source.clear(stall);
    source.take_requests();
    registry.take_requests();
    let rerun =
        command(&["convert", "--json", &from, &to]).env("XDG_CACHE_HOME", dir.path()).output().unwrap();
    let result: Value = serde_json::from_slice(&rerun.stdout).unwrap_or_else(|_| panic!("{}", text(&rerun)));
    let (earlier, made) = ("already_converted", "converted");
    assert_eq!(each(&result, "outcome"), [earlier, earlier, earlier, made]);
    let again = sha256_digest(&long().bytes);
    assert!(source.requests().iter().all(|r| !r.path.contains(&again)), "what is stored is not read again");
    let posts = registry.requests().iter().filter(|r| r.method == "POST").count();
    assert_eq!(posts, 2, "the last layer and the config");
    assert_eq!(names(&dir.path().join("lazurite/convert")), Vec::<String>::new());
    let whole = convert(&["--force", &from, &at("oci", &dir.path().join("whole"))]);
    assert_eq!(whole["digest"], result["digest"]);
}

#[test]
fn an_interrupted_run_leaves_no_half_of_a_file() {
    let source = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let from = put(&source, "v1", &[small(), vec![long()]].concat());
    let digest = sha256_digest(&long().bytes);
    for place in ["oci", "oci-archive"] {
        let out = dir.path().join(place);
        let stall =
            source.fault(Rule::new(Action::Stall { after: 1000 }).path(digest.as_str()).method("GET"));
        let (status, said) = interrupted(dir.path(), &[&from, &at(place, &out)], |process| {
            source.wait_hits(stall, 3, LIMIT) && process.wait_log("converted", LIMIT)
        });
        source.clear(stall);
        assert_eq!(status, Some(130), "{said}");
        if place == "oci" {
            assert_eq!(names(&out), ["blobs", "oci-layout"]);
            assert!(names(&out.join("blobs/sha256")).iter().all(|name| name.len() == 64));
        }
    }
    let mut left = names(dir.path());
    left.retain(|name| name != "log" && name != "lazurite");
    assert_eq!(left, ["oci"], "the archive has not appeared");
    let result = convert(&[&from, &at("oci", &dir.path().join("oci"))]);
    assert_eq!(each(&result, "stored")[2], "written");
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_behind() {
    if !guard::require_root() {
        return;
    }
    let source = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let from = put(&source, "v1", &[long()]);
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=8m", "tmpfs", disk.to_str().unwrap()]);
    let disk = MountGuard::new(disk);
    for place in ["oci", "oci-archive"] {
        let error = fails(&["convert", &from, &at(place, &disk.path().join(place))]);
        assert!(error.contains("No space left on device"), "{error}");
    }
    assert_eq!(names(disk.path()), ["oci"]);
    assert_eq!(names(&disk.path().join("oci/blobs/sha256")), Vec::<String>::new());
    assert!(!disk.path().join("oci/index.json").exists());
    let spool = disk.path().to_str().unwrap();
    let list = dir.path().join("list");
    fs::write(&list, "long\n").unwrap();
    let args = ["convert", "--prefetch-list", list.to_str().unwrap(), "--tmpdir", spool, &from];
    let error = fails(&[&args[..], &[&at("oci", &dir.path().join("out"))]].concat());
    assert!(error.contains("No space left on device"), "{error}");
    assert_eq!(names(disk.path()), ["oci"]);
}

#[test]
fn connections_that_drop_and_registries_that_refuse() {
    let (source, registry) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    let layers = [small(), vec![long()]].concat();
    let from = put(&source, "v1", &layers);
    let to = format!("docker://{}/app:esgz", registry.host());
    source.fault(
        Rule::new(Action::Truncate(100_000)).path(sha256_digest(&long().bytes)).method("GET").times(2),
    );
    registry.fault(Rule::new(Action::AcceptThenReset(1 << 20)).method("PATCH").nth(2));
    registry.fault(Rule::new(Action::Status(503, Vec::new())).method("PUT").times(1));
    let result = convert(&[&from, &to]);
    let inspected = lazurite(&["inspect", "--verify", &to]);
    assert_eq!(inspected["digest"], result["digest"]);

    // Wrong bytes of the source go nowhere.
    source.fault(Rule::new(Action::FlipBit(8 * 50_000)).path(sha256_digest(&layers[0].bytes)).method("GET"));
    let other = format!("docker://{}/other:esgz", registry.host());
    let error = fails(&["convert", &from, &other]);
    assert!(error.contains(&sha256_digest(&layers[0].bytes)), "{error}");
    assert_eq!(registry.manifest("other", "esgz"), None);
    source.clear_all();

    let login = |password: &str| Auth::Basic { user: "bob".to_owned(), password: password.to_owned() };
    registry.set_auth(login("secret"));
    let error = fails(&["convert", &from, &other]);
    assert!(error.contains("auth failed"), "{error}");
    let error = fails(&["convert", "--dst-user", "bob:wrong", &from, &other]);
    assert!(error.contains("auth failed") && !error.contains("wrong"), "{error}");
    let error = fails(&["convert", "--user", "bob:secret", &from, &other]);
    assert!(error.contains("--dst-user") && !error.contains("secret"), "{error}");
    let result = convert(&["--dst-user", "bob:secret", &from, &other]);
    assert_eq!(sha256_digest(&registry.manifest("other", "esgz").unwrap().1), result["digest"]);
    let error = fails(&[
        "convert",
        &from,
        &format!("docker://{}/a@{}", registry.host(), "sha256:".to_owned() + &"0".repeat(64)),
    ]);
    assert!(error.contains("give a tag"), "{error}");
}

#[test]
fn layers_of_every_kind() {
    let registry = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let layer = Layer::new().dir("etc").file("etc/a", "first\n").noise("b", 50_000, 5);
    let built = Encoder::new().encode(&layer);
    let kind = |suffix: &str, bytes: Vec<u8>| LayerBlob {
        bytes: bytes.into(),
        media_type: format!("application/vnd.oci.image.layer.{suffix}"),
        ..LayerBlob::plain(&layer)
    };
    let unannotated = LayerBlob { annotations: BTreeMap::new(), ..LayerBlob::lazy(&built) };
    let forged = Encoder::new().forge_toc(|toc| toc["version"] = json!(7)).encode(&layer);
    let layers = [
        kind("v1.tar", layer.tar()),
        kind("v1.tar+zstd", zstd::stream::encode_all(&layer.tar()[..], 3).unwrap()),
        kind("nondistributable.v1.tar+gzip", layer.tar_gzip()),
        LayerBlob::lazy(&built),
        unannotated,
        LayerBlob::lazy(&forged),
        LayerBlob::lazy(&Encoder::new().legacy().without_digests().encode(&layer)),
    ];
    let source = put(&registry, "v1", &layers);
    let layout = dir.path().join("out");
    let result = convert(&[&source, &at("oci", &layout)]);
    let expected = ["converted", "converted", "kept", "reused", "reused", "converted", "converted"];
    assert_eq!(each(&result, "outcome"), expected);
    assert_eq!(each(&result, "stored")[2], "not");
    assert_eq!(each(&result, "toc_digest")[4], built.toc_digest, "the manifest had not named it");
    let digests = each(&result, "digest");
    assert_eq!(digests[0], digests[1], "compression of the source does not matter");

    let inspected = command(&["inspect", "--json", "--verify", &at("oci", &layout)]).output().unwrap();
    let inspected: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    let lazy: Vec<bool> = inspected["images"][0]["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["lazy"].as_bool().unwrap())
        .collect();
    assert_eq!(lazy, [true, true, false, true, true, true, true], "{inspected:#}");
    let formats: Vec<Value> = lazurite(&["inspect", &source])["images"][0]["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["format"].clone())
        .collect();
    assert_eq!(formats, ["tar", "zstd", "other", "eStargz", "eStargz", "eStargz", "stargz"]);

    // A layer that is no tar fails by name, and nothing is left of it.
    let bad = put(&registry, "bad", &[kind("v1.tar", vec![7; 5000])]);
    let error = fails(&["convert", &bad, &at("oci", &dir.path().join("bad"))]);
    assert!(error.contains(&sha256_digest(&[7; 5000])) && error.contains("tar header"), "{error}");
    assert_eq!(names(&dir.path().join("bad/blobs/sha256")), Vec::<String>::new());
}

#[test]
fn damage_is_found_by_inspection() {
    let dir = guard::temp_dir();
    let built = Encoder::new().encode(&Layer::new().noise("a", 100_000, 1).file("b", "x"));
    let file = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let good = file("good", &built.blob);
    let said = command(&["inspect", "--files", "--verify", good.to_str().unwrap()]).output().unwrap();
    assert!(said.status.success(), "{}", text(&said));
    let said = text(&said);
    assert!(said.contains("eStargz  lazy") && said.contains(&built.toc_digest), "{said}");
    assert!(said.contains("verified: 2 chunks") && said.contains(" a\n"), "{said}");

    let bad = file("bad", &built.flip(8 * 50_000).blob);
    let output = command(&["inspect", "--verify", "--json", bad.to_str().unwrap()]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_ne!(found["images"][0]["layers"][0]["findings"]["problems"], json!([]));

    let registry = ScriptedRegistry::start();
    let image = put(&registry, "v1", &[LayerBlob::lazy(&built)]);
    let forged =
        Encoder::new().forge_toc(|toc| toc["version"] = json!(7)).encode(&Layer::new().file("b", "x"));
    let other = Encoder::new().encode(&Layer::new().file("b", "y"));
    let lying = LayerBlob { annotations: LayerBlob::lazy(&other).annotations, ..LayerBlob::lazy(&built) };
    let plain = LayerBlob { annotations: LayerBlob::lazy(&other).annotations, ..small()[0].clone() };
    for (layer, reason) in
        [(LayerBlob::lazy(&forged), "toc_invalid"), (lying, "verify_failed"), (plain, "not_estargz")]
    {
        let image = put(&registry, "lying", &[layer]);
        let output = command(&["inspect", "--verify", &image]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains(&format!("WRONG: {reason}")), "{}", text(&output));
        assert!(command(&["inspect", &image]).output().unwrap().status.success());
    }
    registry.fault(Rule::new(Action::FlipBit(8 * 50_000)).path("/blobs/").method("GET"));
    let output = command(&["inspect", "--verify", &image]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("WRONG: "), "{}", text(&output));
    registry.clear_all();

    let other = registry.put_index(
        "app",
        "all",
        &[(&registry.put_image("app", "x", &small(), &json!({})), Platform::new("plan9", "mips"))],
    );
    let error = fails(&["inspect", &format!("{}/app@{other}", registry.host())]);
    assert!(error.contains("only for: plan9/mips"), "{error}");
    assert!(fails(&["inspect", "./no-such-file"]).contains("no-such-file"));
}
