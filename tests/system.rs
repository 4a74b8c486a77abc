//! The whole system on real components: Debian's containerd, runc, docker-registry and ctr-remote.
//!
//! Each test has a stand of its own and may run beside the others. What a registry must do wrong, or must be counted
//! to the request, is played by the test kit's registry; everything else is real.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{
    estargz::{Built, Encoder},
    guard,
    layer::{Expect, Kind, Layer, assert_same, walk},
    registry::{Action, Auth, LayerBlob, Logged, Rule, ScriptedRegistry, TokenAuth},
    sha256_digest,
    system::{self, Containerd, Cri, DockerRegistry, Form, Image, Lazurite, SNAPSHOTTER},
};

#[path = "system/cri.rs"]
mod cri;
#[path = "system/endurance.rs"]
mod endurance;
#[path = "system/hosts.rs"]
mod hosts;
#[path = "system/logins.rs"]
mod logins;
#[path = "system/podman.rs"]
mod podman;
#[path = "system/store.rs"]
mod store;
#[path = "system/survival.rs"]
mod survival;
#[path = "system/zstd.rs"]
mod zstd;

const BINARY: &str = env!("CARGO_BIN_EXE_lazurite");
/// Longer than anything here takes; only a bug reaches it.
const LIMIT: Duration = Duration::from_secs(60);
const ONLY_WHAT_IS_READ: &str = "no_background_fetch = true\nnoprefetch = true\n";

/// containerd with Lazurite behind it. Fields end in order.
struct Stand {
    containerd: Containerd,
    lazurite: Lazurite,
    dir: tempfile::TempDir,
    /// Seconds since the epoch.
    started: i64,
}

impl Stand {
    fn new(config: &str) -> Option<Stand> {
        if !system::available() {
            return None;
        }
        let dir = guard::temp_dir();
        // A release build's, to see how long things take.
        let binary = std::env::var_os("LAZURITE_BINARY").unwrap_or_else(|| BINARY.into());
        let lazurite = Lazurite::start(Path::new(&binary), &dir.path().join("lazurite"), config);
        let containerd = Containerd::start(&dir.path().join("containerd"), &lazurite.socket(), Cri::Off);
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        Some(Stand { containerd, lazurite, dir, started })
    }

    /// Pulls with `lazurite pull`; the summary.
    #[track_caller]
    fn pull(&self, reference: &str) -> Value {
        let output = self.lazurite.pull(&self.containerd, &[reference]);
        assert!(output.status.success(), "pull {reference}: {}", text(&output));
        serde_json::from_slice(&output.stdout).expect("the summary is JSON")
    }

    #[track_caller]
    fn run(&self, reference: &str, command: &[&str]) -> String {
        let output = self.containerd.run(SNAPSHOTTER, reference, command);
        assert!(output.status.success(), "{command:?}: {}\n{}", text(&output), self.lazurite.log());
        String::from_utf8(output.stdout).unwrap()
    }

    fn snapshots(&self) -> Vec<String> {
        let list = self.containerd.ctr_ok(&["snapshots", "--snapshotter", SNAPSHOTTER, "ls"]);
        list.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    }

    fn labels(&self, snapshot: &str) -> Value {
        let info = self.containerd.ctr_ok(&["snapshots", "--snapshotter", SNAPSHOTTER, "info", snapshot]);
        serde_json::from_str::<Value>(&info).unwrap()["Labels"].clone()
    }

    /// The image's tree as a container would see it, but for the root's own time, which is that of the unpacking where
    /// no layer has an entry for it. Looking is done by a command of its own process.
    fn tree(&self, snapshotter: &str) -> Vec<Expect> {
        let target = self.dir.path().join(format!("tree-{snapshotter}"));
        let mounted = self.containerd.mount_image(snapshotter, &target);
        let root = mounted.path().to_owned();
        let mut tree = guard::deadline(LIMIT, move || walk(&root).unwrap()).unwrap();
        tree[0].mtime = (0, 0);
        tree
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// `outcome` of each layer, lowest first, and the reason code of those that are not lazy.
fn outcomes(summary: &Value) -> Vec<String> {
    let layer = |layer: &Value| {
        let outcome = layer["outcome"].as_str().unwrap().to_owned();
        match layer["reason"].as_str() {
            Some(reason) => format!("{outcome} ({})", reason.split(':').next().unwrap()),
            None => outcome,
        }
    };
    summary["layers"].as_array().unwrap().iter().map(layer).collect()
}

/// A tree without what is a trace of unpacking: the files of the format itself, which a lazy layer hides, and the times
/// of directories that no layer describes, which are later than the test's start.
fn described(mut tree: Vec<Expect>, started: i64) -> Vec<Expect> {
    tree.retain(|e| e.path != b"stargz.index.json" && e.path != b".no.prefetch.landmark");
    for found in
        tree.iter_mut().filter(|e| e.kind == Kind::Directory && (e.mtime.0 >= started || e.mtime == (0, 0)))
    {
        found.mtime = (0, 0);
    }
    tree
}

/// A shell and what a test adds to it.
fn base() -> Layer {
    let busybox = fs::read("/bin/busybox").or_else(|_| fs::read("/usr/bin/busybox")).expect("busybox-static");
    Layer::new()
        .dir("bin")
        .program("bin/busybox", busybox)
        .symlink("bin/sh", "busybox")
        .dir("tmp")
        .mode(0o1777)
}

/// The files `data/<number>` of the only lazy layer there is, read through the mount.
struct Files {
    dir: PathBuf,
    contents: BTreeMap<Vec<u8>, bytes::Bytes>,
}

impl Files {
    fn of(stand: &Stand, layer: &Layer) -> Files {
        let (links, _) = places(&stand.lazurite.root());
        let dir = stand.lazurite.root().join("snapshots/1").join(&links[0]).join("data");
        Files { dir, contents: layer.contents() }
    }

    #[track_caller]
    fn read(&self, n: u64) {
        let found = fs::read(self.dir.join(n.to_string())).unwrap();
        assert!(found == self.contents[format!("data/{n}").as_bytes()], "data/{n} has other bytes");
    }
}

fn push(registry: &ScriptedRegistry, layers: &[LayerBlob]) -> String {
    registry.put_image("app", "v1", layers, &json!({"config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}}));
    format!("{}/app:v1", registry.host())
}

#[test]
fn python_runs_from_an_image_of_ctr_remote_with_part_of_it_fetched() {
    let Some(stand) = Stand::new(ONLY_WHAT_IS_READ) else { return };
    let image = Image::python();
    let registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    let summary = stand.pull(&reference);
    assert_eq!(outcomes(&summary), ["lazy", "lazy", "lazy"], "{summary:#}");
    let said = stand.run(&reference, &["/usr/bin/python3", "/app/hello.py"]);
    assert!(said.contains("OpenSSL"), "{said}");

    let sizes: u64 = summary["layers"].as_array().unwrap().iter().map(|l| l["size"].as_u64().unwrap()).sum();
    let fetched = registry.bytes_sent();
    assert!(fetched * 2 < sizes, "{fetched} of {sizes} bytes were fetched");
    for snapshot in stand.snapshots() {
        assert_eq!(stand.labels(&snapshot)["containerd.io/snapshot/remote"], "remote snapshot");
    }
    let blobs: BTreeSet<&str> =
        summary["layers"].as_array().unwrap().iter().map(|l| l["digest"].as_str().unwrap()).collect();
    let content = stand.containerd.content();
    assert!(!content.is_empty() && content.iter().all(|d| !blobs.contains(d.as_str())), "{content:?}");
}

#[test]
fn the_trees_of_lazy_images_equal_the_unpacked_ones() {
    let Some(stand) = Stand::new("no_graduation = true\n") else { return };
    for image in [Image::torture(), Image::python()] {
        let registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
        let reference = image.reference(&registry, Form::Estargz);
        stand.containerd.pull_eagerly("overlayfs", &reference);
        let eager = stand.tree("overlayfs");
        let content = stand.containerd.content();
        // As after a cold pull: what the eager pull left in the content store would be of no use, but proves nothing.
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
        assert!(stand.containerd.content().len() < content.len());
        let summary = stand.pull(&reference);
        assert!(outcomes(&summary).iter().filter(|o| *o == "lazy").count() >= 3, "{summary:#}");
        assert!(eager.len() > 50, "{} has a tree", image.name());
        assert_same(&described(eager, stand.started), &described(stand.tree(SNAPSHOTTER), stand.started));
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    }
}

/// Where the snapshots of lazy layers lead, and the number of those that lead to a directory of their own.
fn places(root: &Path) -> (Vec<PathBuf>, usize) {
    let snapshots = fs::read_dir(root.join("snapshots")).unwrap().map(|entry| entry.unwrap().path());
    let links: Vec<PathBuf> = snapshots.filter_map(|dir| fs::read_link(dir.join("fs")).ok()).collect();
    let graduated = links.iter().filter(|link| link.starts_with("../../layers")).count();
    (links, graduated)
}

#[test]
fn images_become_plain_directories_behind_the_container_and_then_need_no_daemon() {
    let Some(mut stand) = Stand::new("") else { return };
    for (image, stay) in [(Image::torture(), 1), (Image::python(), 0)] {
        let mut registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
        let reference = image.reference(&registry, Form::Estargz);
        stand.containerd.pull_eagerly("overlayfs", &reference);
        let eager = described(stand.tree("overlayfs"), stand.started);
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
        stand.pull(&reference);
        let is_python = image.name() == "python";
        let sleep = if is_python { "exec sleep 600" } else { "busybox sleep 600" };
        let sleep = ["/bin/sh", "-c", sleep];
        let before = stand.containerd.start_task(SNAPSHOTTER, &reference, &sleep);
        // One layer of the torture image occurs twice, and the second keeps its slot.
        let root = stand.lazurite.root();
        let graduated = || {
            let (links, graduated) = places(&root);
            graduated > 0 && graduated + stay == links.len()
        };
        assert!(guard::eventually(LIMIT, graduated), "{:?} {}", places(&root), stand.lazurite.log());
        // It goes on through the mount.
        assert_eq!(text(&before.exec(&["/bin/sh", "-c", "echo still"])), "still\n");
        drop(before);
        assert_same(&eager, &described(stand.tree(SNAPSHOTTER), stand.started));

        // Started on directories alone, a container goes on without daemon and registry, on pages never read before.
        if is_python {
            let after = stand.containerd.start_task(SNAPSHOTTER, &reference, &sleep);
            stand.lazurite.kill();
            registry.stop();
            let said =
                after.exec(&["/usr/bin/python3", "-c", "import json, sqlite3; print(json.dumps([1]))"]);
            assert_eq!(text(&said), "[1]\n");
            drop(after);
            stand.lazurite.resume();
            let connected =
                || stand.containerd.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "ls"]).status.success();
            assert!(guard::eventually(LIMIT, connected));
            assert_same(&eager, &described(stand.tree(SNAPSHOTTER), stand.started));
        }
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    }
}

#[test]
fn directories_no_layer_describes_look_as_after_an_unpack() {
    let Some(stand) = Stand::new("") else { return };
    let registry = ScriptedRegistry::start();
    let first = base().dir("var").dir("var/mail").mode(0o2775).owner(0, 8);
    let second =
        Layer::new().file("tmp/x", &b"x"[..]).file("var/mail/root", &b"m"[..]).file("opt/app/bin", &b"b"[..]);
    let third = Layer::new().file("opt/app/more", &b"c"[..]).file("var/mail/other", &b"o"[..]);
    let lazy = |layer: &Layer| LayerBlob::lazy(&Encoder::new().encode(layer));
    for blobs in [
        [lazy(&first), lazy(&second), lazy(&third)],
        [LayerBlob::plain(&first), lazy(&second), lazy(&third)],
        [lazy(&first), LayerBlob::plain(&second), lazy(&third)],
    ] {
        let reference = push(&registry, &blobs);
        stand.containerd.pull_eagerly("overlayfs", &reference);
        let eager = stand.tree("overlayfs");
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
        stand.pull(&reference);
        assert_same(&described(eager, stand.started), &described(stand.tree(SNAPSHOTTER), stand.started));
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    }
}

#[test]
fn mixed_and_plain_images_run_with_a_reason_for_each_plain_layer() {
    let Some(stand) = Stand::new("") else { return };
    let registry = ScriptedRegistry::start();
    let lazy = |layer: &Layer| LayerBlob::lazy(&Encoder::new().encode(layer));
    let app = Layer::new().dir("app").file("app/name", &b"lazurite\n"[..]);
    let plain = Layer::new().dir("etc").file("etc/motd", &b"plain\n"[..]).whiteout("tmp");
    let reference = push(&registry, &[lazy(&base()), LayerBlob::plain(&plain), lazy(&app)]);
    let summary = stand.pull(&reference);
    assert_eq!(outcomes(&summary), ["lazy", "unpacked (no_toc_digest)", "lazy"]);
    let said = stand.run(&reference, &["/bin/sh", "-c", "busybox cat /app/name /etc/motd; busybox ls /"]);
    assert!(said.starts_with("lazurite\nplain\napp\nbin\n") && !said.contains("tmp"), "{said}");
    assert!(stand.lazurite.log().contains("no_toc_digest"));

    let plain_image = Image::busybox();
    let registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &plain_image);
    let reference = plain_image.reference(&registry, Form::Plain);
    assert_eq!(outcomes(&stand.pull(&reference)), ["unpacked (no_toc_digest)"]);
    assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "echo plain"]), "plain\n");
    // ctr hands no labels down at all; the image is an ordinary one.
    stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    stand.containerd.pull_eagerly(SNAPSHOTTER, &reference);
    assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "echo again"]), "again\n");
}

#[test]
fn a_cold_image_costs_one_range_a_layer_one_manifest_and_one_token() {
    let Some(stand) = Stand::new(ONLY_WHAT_IS_READ) else { return };
    let (registry, storage) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    registry.set_auth(Auth::Token(TokenAuth::default()));
    let layers: Vec<Built> = (0..4)
        .map(|n| {
            Encoder::new().encode(&Layer::new().noise(format!("f{n}a"), 400_000, n + 1).noise(
                format!("f{n}b"),
                400_000,
                n + 9,
            ))
        })
        .collect();
    let blobs: Vec<LayerBlob> = layers.iter().map(LayerBlob::lazy).collect();
    let reference = push(&registry, &blobs);
    push(&storage, &blobs);
    registry.fault(Rule::new(Action::Redirect { to: storage.url(), expires_after: None }).path("/blobs/"));
    assert_eq!(outcomes(&stand.pull(&reference)), ["lazy"; 4]);
    // `lazurite pull` is a client of its own: it asks for manifest and config with its own token.
    let daemon = |r: &Logged| r.headers.contains_key("range") || r.path.contains("/blobs/");
    let log = registry.requests();
    let tokens = log.iter().filter(|r| r.path.contains("/token")).count();
    assert_eq!(tokens, 2, "one for the client, one for the daemon: {log:#?}");
    let manifests = log.iter().filter(|r| r.path.contains("/manifests/") && r.status == 200).count();
    assert_eq!(manifests, 2, "one for the client, one for the daemon");
    for layer in &layers {
        let ranges =
            storage.requests().iter().filter(|r| daemon(r) && r.path.contains(&layer.digest)).count();
        assert_eq!(ranges, 1, "one range of {}", layer.digest);
    }
    let redirects = log.iter().filter(|r| r.status == 307).count();
    assert!(redirects <= layers.len() + 1, "one walk for each blob: {redirects}");
}

#[test]
fn crafted_layers_are_unpacked_as_usual() {
    let Some(stand) = Stand::new("") else { return };
    let registry = ScriptedRegistry::start();
    let file = |name: &str| Layer::new().file(name, &b"content\n"[..]);
    let entry =
        |entry: Value| move |toc: &mut Value| toc["entries"].as_array_mut().unwrap().push(entry.clone());
    let hostile = [
        Encoder::new().footer_offset(1 << 50).encode(&file("a")),
        Encoder::new().edit_toc(entry(json!({"name": "../x", "type": "reg"}))).encode(&file("b")),
        Encoder::new()
            .edit_toc(entry(json!({"name": "l", "type": "hardlink", "linkName": "l"})))
            .encode(&file("c")),
        Encoder::new().forge_toc(entry(json!({"name": "forged", "type": "reg"}))).encode(&file("d")),
    ];
    let mut blobs = vec![LayerBlob::lazy(&Encoder::new().encode(&base()))];
    blobs.extend(hostile.iter().map(LayerBlob::lazy));
    let reference = push(&registry, &blobs);
    let expected = [
        "lazy",
        "unpacked (toc_invalid)",
        "unpacked (toc_invalid)",
        "unpacked (toc_invalid)",
        "unpacked (verify_failed)",
    ];
    assert_eq!(outcomes(&stand.pull(&reference)), expected);
    let said = stand.run(&reference, &["/bin/sh", "-c", "busybox cat /a /b /c /d; busybox ls /"]);
    assert!(said.starts_with(&"content\n".repeat(4)) && !said.contains("forged"), "{said}");
}

#[test]
fn a_registry_that_refuses_or_lacks_a_layer_is_said_so() {
    let Some(stand) = Stand::new("[blob]\nmax_retries = 0\n") else { return };
    let registry = ScriptedRegistry::start();
    let built = Encoder::new().encode(&base());
    let reference = push(&registry, &[LayerBlob::lazy(&built)]);
    // Once: without credentials there is nothing to ask again with; the download that follows must succeed.
    registry.fault(Rule::new(Action::Status(403, Vec::new())).path(built.digest.as_str()).times(1));
    assert_eq!(outcomes(&stand.pull(&reference)), ["unpacked (auth_denied)"]);
    assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "echo ok"]), "ok\n");
}

#[test]
fn after_a_restart_without_registry_local_images_start_new_containers() {
    let Some(mut stand) = Stand::new("") else { return };
    let image = Image::busybox();
    let mut registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    assert_eq!(outcomes(&stand.pull(&reference)), ["lazy"]);
    assert!(stand.lazurite.wait_log("layer is local", LIMIT), "{}", stand.lazurite.log());
    registry.stop();
    for how in ["stopped", "killed"] {
        match how {
            "stopped" => stand.lazurite.stop(),
            _ => stand.lazurite.kill(),
        }
        stand.lazurite.resume();
        // containerd connects again after a pause of its own, of up to 3 s.
        let connected =
            || stand.containerd.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "ls"]).status.success();
        assert!(guard::eventually(LIMIT, connected), "{how}");
        assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "echo alive"]), "alive\n", "{how}");
    }
}

#[test]
fn removed_images_leave_nothing() {
    let Some(stand) = Stand::new("") else { return };
    let image = Image::torture();
    let registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    for _ in 0..2 {
        stand.pull(&reference);
        stand.run(&reference, &["/bin/sh", "-c", "true"]);
        assert!(!stand.snapshots().is_empty());
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
        assert_eq!(stand.snapshots(), Vec::<String>::new());
        for dir in ["snapshots", "layers"] {
            let dir = stand.lazurite.root().join(dir);
            let empty = || fs::read_dir(&dir).unwrap().next().is_none();
            assert!(guard::eventually(LIMIT, empty), "{} is empty: {}", dir.display(), stand.lazurite.log());
        }
    }
}

#[test]
fn another_namespace_and_the_older_label_family_get_the_same_layers() {
    let Some(stand) = Stand::new(ONLY_WHAT_IS_READ) else { return };
    let image = Image::busybox();
    let registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    let rpull = Command::new("timeout")
        .args(["60", "ctr-remote", "--namespace", stand.containerd.namespace(), "--address"])
        .arg(stand.containerd.address())
        .args(["images", "rpull", "--plain-http", "--snapshotter", SNAPSHOTTER, &reference])
        .output()
        .unwrap();
    assert!(rpull.status.success(), "{}", text(&rpull));
    let snapshots = stand.snapshots();
    assert_eq!(snapshots.len(), 1);
    let labels = stand.labels(&snapshots[0]);
    assert_eq!(labels["containerd.io/snapshot/remote"], "remote snapshot", "{labels:#}");
    assert!(labels["containerd.io/snapshot/remote/stargz.reference"].is_string(), "{labels:#}");
    assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "echo old labels"]), "old labels\n");

    let other = format!("{}-other", stand.containerd.namespace());
    let output = Command::new("timeout")
        .args(["60", BINARY, "pull", "--plain-http", "--namespace", &other, "--address"])
        .arg(stand.containerd.address())
        .arg(&reference)
        .output()
        .unwrap();
    assert!(output.status.success() && text(&output).contains("1 of 1 layers lazy"), "{}", text(&output));
    let links: Vec<PathBuf> =
        fs::read_dir(stand.lazurite.root().join("mnt")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(links.len(), 1, "one slot serves both: {links:?}");
    let args = ["--namespace", &other, "images", "rm", "--sync", &reference];
    stand.containerd.ctr_ok(&args);
}

#[test]
fn a_stop_does_not_wait_for_a_registry_that_hangs() {
    let Some(mut stand) = Stand::new("") else { return };
    let registry = ScriptedRegistry::start();
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&base()))]);
    let hang = registry.fault(Rule::new(Action::Hang).path("/blobs/sha256"));
    let stuck = std::thread::scope(|scope| {
        let pull = scope.spawn(|| stand.lazurite.pull(&stand.containerd, &[&reference]));
        assert!(registry.wait_hits(hang, 1, LIMIT), "somebody waits for the registry");
        // Calls that need no registry answer meanwhile.
        assert_eq!(stand.snapshots().len(), 0);
        registry.clear(hang);
        pull.join().unwrap()
    });
    assert!(stuck.status.success(), "{}", text(&stuck));
    registry.fault(Rule::new(Action::Hang).path("/blobs/sha256"));
    stand.lazurite.stop();
    assert!(stand.lazurite.log().contains("stopping"));
    assert!(!stand.lazurite.socket().exists());
}

#[test]
fn a_stop_does_not_wait_for_containers() {
    let Some(mut stand) = Stand::new("") else { return };
    let registry = ScriptedRegistry::start();
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&base()))]);
    stand.pull(&reference);
    let task = stand.containerd.start_task(SNAPSHOTTER, &reference, &["/bin/sh", "-c", "busybox sleep 600"]);
    // Panics if it does not end.
    stand.lazurite.stop();
    stand.lazurite.resume();
    drop(task);
}

#[test]
fn a_service_manager_hears_when_the_daemon_is_ready_and_when_it_stops() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let (notify, log) = (dir.path().join("notify.sock"), dir.path().join("daemon.log"));
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = Command::new(BINARY);
    command.args(["serve", "--log-format", "json", "--root"]).arg(dir.path().join("root"));
    command.arg("--address").arg(dir.path().join("l.sock")).env("NOTIFY_SOCKET", &notify);
    let _mount = guard::MountGuard::new(dir.path().join("root/mnt"));
    let mut daemon = guard::ProcessGuard::spawn(&mut command, &log).unwrap();
    let hear = || {
        let mut said = [0; 64];
        let len = manager.recv(&mut said).unwrap();
        String::from_utf8_lossy(&said[..len]).trim().to_owned()
    };
    assert_eq!(hear(), "READY=1");
    let device = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let device =
        device.lines().find(|l| l.contains(&format!("{}/mnt", dir.path().join("root").display()))).unwrap();
    let device = device.split(' ').nth(2).unwrap();
    let read_ahead = fs::read_to_string(format!("/sys/class/bdi/{device}/read_ahead_kb")).unwrap();
    assert!(read_ahead.trim().parse::<u32>().unwrap() >= 1024, "{read_ahead}");
    daemon.signal(Signal::TERM).unwrap();
    assert_eq!(hear(), "STOPPING=1");
    assert!(daemon.wait_exit(LIMIT).unwrap().unwrap().success());
    for line in fs::read_to_string(&log).unwrap().lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        assert!(event["level"].is_string() && event["timestamp"].is_string(), "{line}");
    }
}

#[test]
fn the_cache_is_listed_and_given_back() {
    let Some(mut stand) = Stand::new("no_graduation = true\n") else { return };
    let image = Image::busybox();
    let mut registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    stand.pull(&reference);
    assert!(stand.lazurite.wait_log("layer is local", LIMIT), "{}", stand.lazurite.log());
    let socket = stand.lazurite.socket();
    let cache = |args: &[&str]| {
        let mut command = Command::new("timeout");
        command.args(["60", BINARY, "cache"]).args(args).arg("--address").arg(&socket);
        command.output().unwrap()
    };
    let list = || -> Value { serde_json::from_slice(&cache(&["ls", "--json"]).stdout).unwrap() };
    let listed = list();
    let layer = &listed["layers"][0];
    assert_eq!((&layer["state"], &layer["local_bytes"]), (&json!("local"), &layer["content_bytes"]));
    assert!(layer["content_bytes"].as_u64().unwrap() > 500_000 && listed["most_bytes"].is_null());
    let table = text(&cache(&["ls"]));
    assert!(table.contains("local") && table.contains(&registry.address().to_string()), "{table}");

    let kept: Value = serde_json::from_slice(&cache(&["prune", "--unused", "1h", "--json"]).stdout).unwrap();
    assert_eq!(kept["evicted"][0]["bytes"], 0, "{kept:#}");
    let hex = layer["toc_digest"].as_str().unwrap().trim_start_matches("sha256:")[..10].to_owned();
    let gone = cache(&["rm", &hex]);
    assert!(gone.status.success() && text(&gone).contains("given back"), "{}", text(&gone));
    assert_eq!(
        (&list()["layers"][0]["local_bytes"], &list()["layers"][0]["state"]),
        (&json!(0), &json!("lazy"))
    );
    let wrong = cache(&["rm", "ffff"]);
    assert!(!wrong.status.success() && text(&wrong).contains("cache ls"), "{}", text(&wrong));

    // What is read comes back, and is missed without the registry.
    assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "echo back"]), "back\n");
    assert!(list()["layers"][0]["local_bytes"].as_u64().unwrap() > 0);
    registry.stop();
    stand.lazurite.stop();
    let nobody = cache(&["ls"]);
    assert!(!nobody.status.success() && text(&nobody).contains("is it running?"), "{}", text(&nobody));
}

#[test]
fn status_says_what_is_lazy_and_what_went_wrong() {
    let config = format!("{ONLY_WHAT_IS_READ}[blob]\nmax_retries = 0\n");
    let Some(mut stand) = Stand::new(&config) else { return };
    let image = Image::busybox();
    let mut open = DockerRegistry::with_images(&stand.dir.path().join("open"), &image);
    let locked = DockerRegistry::locked(&stand.dir.path().join("locked"), &image);
    let socket = stand.lazurite.socket();
    let status = |args: &[&str]| {
        let mut command = Command::new("timeout");
        command.args(["60", BINARY, "status"]).args(args).arg("--address").arg(&socket);
        command.output().unwrap()
    };
    let said = || -> Value { serde_json::from_slice(&status(&["--json"]).stdout).unwrap() };
    assert_eq!(said(), json!({"layers": [], "fallbacks": {"counts": {}, "last": []}}));

    // Who pulls has a login, the daemon has none.
    let refused = image.reference(&locked, Form::Estargz);
    let login = format!("{}:{}", system::LOGIN.0, system::LOGIN.1);
    let output = stand.lazurite.pull(&stand.containerd, &["--user", &login, &refused]);
    assert!(output.status.success(), "{}", text(&output));
    stand.containerd.ctr_ok(&["images", "rm", "--sync", &refused]);
    let fallbacks = &said()["fallbacks"];
    assert_eq!(fallbacks["counts"], json!({"auth_denied": 1}), "{fallbacks:#}");
    let message = fallbacks["last"][0]["message"].as_str().unwrap();
    let place = format!("auth failed at host {} for repository busybox (tried: ", locked.address());
    assert!(message.contains(&place), "{message}");
    let table = text(&status(&[]));
    assert!(table.contains("1  auth_denied\n") && table.contains(&place), "{table}");

    let reference = image.reference(&open, Form::Estargz);
    stand.pull(&reference);
    let layer = &said()["layers"][0];
    assert_eq!((&layer["state"], &layer["reference"]), (&json!("lazy"), &json!(reference)), "{layer:#}");
    assert!(layer["local_bytes"].as_u64() < layer["content_bytes"].as_u64() && layer["error"].is_null());

    // A layer that is not on disk any more, and whose registry does not answer.
    stand.lazurite.stop();
    fs::remove_dir_all(stand.lazurite.root().join("layers")).unwrap();
    open.stop();
    stand.lazurite.resume();
    assert!(guard::eventually(LIMIT, || said()["layers"][0]["state"] == "error"), "{:#}", said());
    let layer = &said()["layers"][0];
    assert_eq!((&layer["error"]["reason"], &layer["reference"]), (&json!("unavailable"), &json!(reference)));
    let table = text(&status(&[]));
    assert!(table.contains("error") && table.contains(" unavailable: "), "{table}");
    open.resume();
    assert!(guard::eventually(LIMIT, || said()["layers"][0]["state"] == "lazy"), "{:#}", said());
    assert_eq!(said()["layers"][0]["error"], Value::Null);
    stand.lazurite.stop();
    let nobody = status(&[]);
    assert!(!nobody.status.success() && text(&nobody).contains("is it running?"), "{}", text(&nobody));
}

#[test]
fn one_root_has_one_daemon() {
    let Some(stand) = Stand::new("") else { return };
    let second = Command::new("timeout")
        .args(["20", BINARY, "serve", "--root"])
        .arg(stand.lazurite.root())
        .arg("--address")
        .arg(stand.dir.path().join("second.sock"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1), "{}", text(&second));
    let pid = stand.lazurite.pid().unwrap().to_string();
    assert!(text(&second).contains(&format!("process {pid}")), "{}", text(&second));
}

#[test]
fn check_finds_what_is_wrong_and_what_is_right() {
    let Some(stand) = Stand::new("") else { return };
    let check = |config: &Path| {
        let output = Command::new("timeout")
            .args(["30", BINARY, "check", "--json", "--containerd-config"])
            .arg(config)
            .arg("--containerd-address")
            .arg(stand.containerd.address())
            .arg("--address")
            .arg(stand.lazurite.socket())
            .arg("--root")
            .arg(stand.lazurite.root())
            .output()
            .unwrap();
        (output.status.code(), text(&output))
    };
    let (code, said) = check(&stand.dir.path().join("containerd/config.toml"));
    assert_eq!(code, Some(0), "{said}");
    let bare = stand.dir.path().join("bare.toml");
    fs::write(&bare, "version = 2\n").unwrap();
    let (code, said) = check(&bare);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("proxy_plugins"), "{said}");
}
