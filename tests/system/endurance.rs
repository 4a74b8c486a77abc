//! What goes on for long or at once: a registry that falls silent, many cycles, two namespaces that pull and remove the same image.

use std::time::Instant;

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest, snapshots_client::SnapshotsClient,
};
use tonic::{Code, transport::Channel};

use super::{survival::amount, *};

/// Longer than the bound on Prepare, which waits longest.
const BOUND: Duration = Duration::from_secs(30);

/// Makes a daemon's calls as containerd does, each within [`BOUND`].
struct Caller {
    runtime: tokio::runtime::Runtime,
    client: SnapshotsClient<Channel>,
}

impl Caller {
    fn new(stand: &Stand) -> Caller {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let socket = stand.lazurite.socket();
        let channel = runtime.block_on(containerd_client::connect(socket)).unwrap();
        Caller { runtime, client: SnapshotsClient::new(channel) }
    }

    #[track_caller]
    fn call<T>(
        &self,
        call: impl AsyncFnOnce(SnapshotsClient<Channel>) -> Result<T, tonic::Status>,
    ) -> Result<T, Code> {
        let begun = Instant::now();
        let answer =
            self.runtime.block_on(async { tokio::time::timeout(BOUND, call(self.client.clone())).await });
        let answer = answer.unwrap_or_else(|_| panic!("no answer within {:?}", begun.elapsed()));
        answer.map_err(|status| status.code())
    }

    #[track_caller]
    fn prepare(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<(), Code> {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
            ..Default::default()
        };
        self.call(async |mut client| client.prepare(request).await.map(drop))
    }

    /// Prepares a lazy layer as containerd does when it pulls.
    #[track_caller]
    fn prepare_layer(&self, name: &str, image: &Pushed) -> Result<(), Code> {
        self.prepare(
            &format!("extract-{name}"),
            "",
            &[
                ("containerd.io/snapshot.ref", name),
                ("containerd.io/snapshot/cri.image-ref", &image.reference),
                ("containerd.io/snapshot/cri.layer-digest", &image.layer),
                ("containerd.io/snapshot/cri.image-layers", &image.layer),
                ("containerd.io/snapshot/stargz/toc.digest", &image.toc),
            ],
        )
    }

    #[track_caller]
    fn remove(&self, key: &str) -> Result<(), Code> {
        let request = RemoveSnapshotRequest { key: key.to_owned(), ..Default::default() };
        self.call(async |mut client| client.remove(request).await.map(drop))
    }

    /// How many snapshots there are.
    #[track_caller]
    fn count(&self) -> usize {
        let list = async |mut client: SnapshotsClient<Channel>| {
            let mut stream = client.list(ListSnapshotsRequest::default()).await?.into_inner();
            let mut count = 0;
            while let Some(part) = stream.message().await? {
                count += part.info.len();
            }
            Ok(count)
        };
        self.call(list).unwrap()
    }
}

/// An image of one lazy layer.
struct Pushed {
    reference: String,
    layer: String,
    toc: String,
}

fn push_one(registry: &ScriptedRegistry, name: &str, layer: &Layer) -> Pushed {
    let built = Encoder::new().encode(layer);
    let image = registry.put_image(name, "v1", &[LayerBlob::lazy(&built)], &json!({}));
    Pushed {
        reference: format!("{}/{name}:v1", registry.host()),
        layer: image.layers[0].clone(),
        toc: built.toc_digest.clone(),
    }
}

/// What a daemon holds: descriptors, mounts below its root, entries of its directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    /// Without sockets: how many connections rest in a pool depends on how many were in use at once.
    descriptors: usize,
    mounts: usize,
    entries: usize,
}

fn held(stand: &Stand) -> Held {
    let pid = stand.lazurite.pid().unwrap();
    let root = stand.lazurite.root();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let entries = |dir: &str| fs::read_dir(root.join(dir)).map_or(0, Iterator::count);
    let links = descriptors(pid).into_iter().filter_map(|fd| fs::read_link(fd).ok());
    Held {
        descriptors: links.filter(|link| !link.to_string_lossy().starts_with("socket:")).count(),
        mounts: mounts.matches(root.to_str().unwrap()).count(),
        entries: entries("snapshots") + entries("layers"),
    }
}

fn descriptors(pid: u32) -> Vec<PathBuf> {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn resident_kib(stand: &Stand) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", stand.lazurite.pid().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The registry takes connections and answers nothing for `LAZURITE_SILENCE` seconds, in the midst of reads.
#[test]
fn a_registry_that_falls_silent_holds_up_no_call_and_reads_go_on_after_it() {
    let Some(stand) = Stand::new(&format!("{ONLY_WHAT_IS_READ}[blob]\nfetching_timeout_sec = 900\n")) else {
        return;
    };
    let silence = Duration::from_secs(amount("LAZURITE_SILENCE", 2));
    let registry = ScriptedRegistry::start();
    let layer = (0..8).fold(base(), |layer, n| layer.noise(format!("data/{n}"), 900_000, n + 1));
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().chunk_size(128 << 10).encode(&layer))]);
    let other = push_one(&registry, "other", &Layer::new().noise("other", 50_000, 99));
    stand.pull(&reference);
    let caller = Caller::new(&stand);
    let files = Files::of(&stand, &layer);
    let read = |n: u64| files.read(n);
    read(0);
    // In the midst of the first file.
    let stall = registry.fault(Rule::new(Action::Stall { after: 50_000 }).path("/blobs/").times(1));
    let hang = registry.fault(Rule::new(Action::Hang).path("/v2/"));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (1..8).map(|n| scope.spawn(move || read(n))).collect();
        assert!(registry.wait_hits(hang, 1, LIMIT));
        let (begun, mut rounds, mut longest) = (Instant::now(), 0, Duration::ZERO);
        // A pull of another image gets its answer as well: containerd then unpacks it, or fails, by itself.
        let prepared = scope.spawn(|| {
            let begun = Instant::now();
            (caller.prepare_layer("other", &other), begun.elapsed())
        });
        while begun.elapsed() < silence {
            let call = Instant::now();
            let key = format!("round-{rounds}");
            let top = stand.snapshots();
            assert_eq!(caller.prepare(&key, &top[0], &[]), Ok(()));
            let (k, p) = (key.clone(), top[0].clone());
            caller
                .call(async |mut client| {
                    let snapshotter = String::new;
                    client.mounts(MountsRequest { snapshotter: snapshotter(), key: k.clone() }).await?;
                    client.usage(UsageRequest { snapshotter: snapshotter(), key: k.clone() }).await?;
                    client.usage(UsageRequest { snapshotter: snapshotter(), key: p.clone() }).await?;
                    client.stat(StatSnapshotRequest { snapshotter: snapshotter(), key: p.clone() }).await
                })
                .unwrap();
            assert_eq!(caller.remove(&key), Ok(()));
            longest = longest.max(call.elapsed());
            rounds += 1;
        }
        assert!(readers.iter().all(|reader| !reader.is_finished()), "reads wait");
        let silent = begun.elapsed();
        registry.clear(hang);
        registry.clear(stall);
        let (answer, took) = prepared.join().unwrap();
        let expected = if silence > BOUND { Ok(()) } else { Err(Code::AlreadyExists) };
        assert_eq!(
            answer, expected,
            "an ordinary snapshot in its place, or a lazy one once the registry answers"
        );
        eprintln!("silent for {silent:?}: {rounds} rounds of calls, longest {longest:?}; Prepare {took:?}");
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
}

/// `LAZURITE_CYCLES` times Prepare, Commit and Remove, of a lazy layer and of a container on it.
#[test]
fn cycles_leave_nothing_behind() {
    let Some(stand) = Stand::new(ONLY_WHAT_IS_READ) else { return };
    let registry = ScriptedRegistry::start();
    let image = push_one(&registry, "app", &base());
    let caller = Caller::new(&stand);
    let cycle = |n: u64| {
        let (layer, container, committed) =
            (format!("layer-{n}"), format!("container-{n}"), format!("commit-{n}"));
        assert_eq!(caller.prepare_layer(&layer, &image), Err(Code::AlreadyExists), "it is mounted lazily");
        assert_eq!(caller.prepare(&container, &layer, &[]), Ok(()));
        let commit = CommitSnapshotRequest { name: committed.clone(), key: container, ..Default::default() };
        caller.call(async |mut client| client.commit(commit).await.map(drop)).unwrap();
        assert_eq!(caller.remove(&layer), Err(Code::FailedPrecondition), "it has a child");
        assert_eq!(caller.remove(&committed), Ok(()));
        assert_eq!(caller.remove(&layer), Ok(()));
    };
    let settled = |before: Held| {
        let same = guard::eventually(LIMIT, || held(&stand) == before);
        assert!(same, "{before:?}, then {:?}", held(&stand));
    };
    // The first ones make what stays: connections, buffers, the database's pages.
    (0..20).for_each(cycle);
    assert!(guard::eventually(LIMIT, || held(&stand).entries == 0), "{:?}", held(&stand));
    let (before, resident) = (held(&stand), resident_kib(&stand));
    let open = || descriptors(stand.lazurite.pid().unwrap()).len();
    let connected = open();
    let cycles = amount("LAZURITE_CYCLES", 60);
    (20..20 + cycles).for_each(cycle);
    settled(before);
    assert_eq!(caller.count(), 0);
    assert!(open() < connected + 16, "{connected} descriptors, sockets among them, then {}", open());
    let (then, disk) = (resident_kib(&stand), disk_bytes(&stand.lazurite.root()));
    eprintln!(
        "{cycles} cycles: {before:?} before and after; {resident} KiB resident, then {then} KiB; {disk} bytes on disk"
    );
    assert!(then < resident + (8 << 10), "{resident} KiB, then {then} KiB");
    assert!(disk < 8 << 20, "{disk} bytes on disk");
}

fn disk_bytes(root: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let files = fs::read_dir(root).unwrap().filter_map(|entry| entry.unwrap().metadata().ok());
    files.filter(|file| file.is_file()).map(|file| file.blocks() * 512).sum()
}

#[test]
fn two_namespaces_that_pull_and_remove_the_same_image_at_once_leave_nothing() {
    let Some(stand) = Stand::new("") else { return };
    let registry = ScriptedRegistry::start();
    let layers: Vec<Built> =
        (0..3).map(|n| Encoder::new().encode(&base().noise(format!("data{n}"), 300_000, n + 1))).collect();
    let reference = push(&registry, &layers.iter().map(LayerBlob::lazy).collect::<Vec<_>>());
    let rounds = amount("LAZURITE_RACES", 3);
    stand.pull(&reference);
    stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    assert!(guard::eventually(LIMIT, || held(&stand).entries == 0), "{:?}", held(&stand));
    let before = held(&stand);
    let namespaces =
        [stand.containerd.namespace().to_owned(), format!("{}-other", stand.containerd.namespace())];
    std::thread::scope(|scope| {
        for (number, namespace) in namespaces.iter().enumerate() {
            let (stand, reference) = (&stand, &reference);
            scope.spawn(move || {
                for round in 0..rounds {
                    let pulled = Command::new("timeout")
                        .args(["60", BINARY, "pull", "--plain-http", "--namespace", namespace, "--address"])
                        .arg(stand.containerd.address())
                        .arg(reference)
                        .output()
                        .unwrap();
                    assert!(pulled.status.success(), "{namespace} {round}: {}", text(&pulled));
                    let id = format!("c{number}-{round}");
                    let run = ["--namespace", namespace, "run", "--rm", "--snapshotter", SNAPSHOTTER];
                    let said = stand
                        .containerd
                        .ctr(&[&run[..], &[reference, &id, "/bin/sh", "-c", "echo $((6 * 7))"]].concat());
                    assert_eq!(said.stdout, b"42\n", "{namespace} {round}: {}", text(&said));
                    stand.containerd.ctr_ok(&["--namespace", namespace, "images", "rm", "--sync", reference]);
                }
            });
        }
    });
    // What one namespace removed while the other prepared it is taken by the next collection, which a removal causes.
    for namespace in &namespaces {
        stand.containerd.ctr(&["--namespace", namespace, "leases", "rm", "--sync", "none"]);
    }
    let settled = guard::eventually(LIMIT, || held(&stand) == before);
    assert!(settled, "{before:?}, then {:?}: {:?}", held(&stand), stand.snapshots());
}
