//! What containers notice of a daemon that stops, dies, is replaced or drained: nothing, as far as it goes.

use super::*;

#[test]
fn containers_on_lazy_layers_outlive_the_daemon() {
    let Some(mut stand) = Stand::new(ONLY_WHAT_IS_READ) else { return };
    let registry = ScriptedRegistry::start();
    // A file for each round that nobody has read before.
    let layer = (0..8).fold(base(), |layer, n| layer.noise(format!("data/{n}"), 600_000, n + 1));
    let contents = layer.contents();
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&layer))]);
    stand.pull(&reference);
    let task = stand.containerd.start_task(SNAPSHOTTER, &reference, &["/bin/sh", "-c", "busybox sleep 600"]);
    let sum = |n: u64| {
        let said = text(&task.exec(&["/bin/sh", "-c", &format!("busybox sha256sum < /data/{n}")]));
        let expected = sha256_digest(&contents[format!("data/{n}").as_bytes()]);
        assert_eq!(
            said.split_whitespace().next().map(|hex| format!("sha256:{hex}")),
            Some(expected),
            "{said}"
        );
    };
    sum(0);
    for n in 1..8 {
        // Programs too are read again.
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        match n % 3 {
            0 => stand.lazurite.stop(),
            _ => stand.lazurite.kill(),
        }
        if n == 4 {
            // A reader that comes while nobody serves waits for the next daemon.
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| sum(n));
                assert!(!reader.is_finished());
                stand.lazurite.resume();
                reader.join().unwrap();
            });
            continue;
        }
        stand.lazurite.resume();
        sum(n);
    }
    let log = stand.lazurite.log();
    assert_eq!(log.matches("the mount of the process before goes on").count(), 7, "{log}");
    drop(task);
}

/// How much of it a test does: in CI as much as shows that it works, by hand as much as one likes.
pub(super) fn amount(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap())
}

#[test]
fn readers_see_no_error_however_often_the_daemon_is_killed() {
    let ends = |lazurite: &mut Lazurite, kill: u64| {
        match kill % 5 {
            0 => lazurite.stop(),
            // A crash of its own making.
            1 => lazurite.crash(),
            _ => lazurite.kill(),
        }
        lazurite.resume();
    };
    readers_compare_every_byte("killed", amount("LAZURITE_KILLS", 12), ends);
}

#[test]
fn readers_see_no_error_however_often_the_daemon_is_replaced() {
    let ends = |lazurite: &mut Lazurite, _: u64| lazurite.replace();
    readers_compare_every_byte("replaced", amount("LAZURITE_REPLACES", 5), ends);
}

/// Readers on the mount itself and through an overlay, and a container, while the daemon ends again and again, with
/// `LAZURITE_LAYERS` layers beside. The waits are told on standard error.
fn readers_compare_every_byte(what: &str, times: u64, ends: impl Fn(&mut Lazurite, u64)) {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    let Some(mut stand) = Stand::new("no_graduation = true\n") else { return };
    let registry = ScriptedRegistry::start();
    let mut layer = (0..6).fold(base(), |layer, n| layer.noise(format!("data/large{n}"), 1_500_000, n + 1));
    layer = layer.noise("data/probed", 3000, 99);
    layer = (0..60).fold(layer, |layer, n| layer.noise(format!("data/small{n}"), 3000, 100 + n));
    let contents = layer.contents();
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().chunk_size(256 << 10).encode(&layer))]);
    stand.pull(&reference);
    let mounted = stand.containerd.mount_image(SNAPSHOTTER, &stand.dir.path().join("tree"));
    let overlay = mounted.path().join("data");
    let others = amount("LAZURITE_LAYERS", 10);
    for image in 0..others.div_ceil(50) {
        let layers: Vec<LayerBlob> = (image * 50..others.min(image * 50 + 50))
            .map(|n| {
                LayerBlob::lazy(&Encoder::new().encode(&Layer::new().noise(format!("other{n}"), 5000, n + 1)))
            })
            .collect();
        registry.put_image(&format!("others{image}"), "v1", &layers, &json!({}));
        stand.pull(&format!("{}/others{image}:v1", registry.host()));
    }
    let slots = fs::read_dir(stand.lazurite.root().join("snapshots")).unwrap();
    let last = slots.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u64>().ok());
    let direct: Vec<_> = last.map(|slot| stand.lazurite.root().join(format!("mnt/{slot}/data"))).collect();
    let direct =
        guard::deadline(LIMIT, move || direct.into_iter().find(|dir| dir.exists()).unwrap()).unwrap();
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        use std::io::Read as _;
        let mut file = fs::File::open(path)?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let probed = direct.join("probed");
    // From here on it is local: a wait is a wait for the daemon.
    read(&probed).unwrap();
    let script = "sum() { busybox cat /data/* | busybox sha256sum; }; first=$(sum)\n\
        while :; do if [ \"$(sum)\" = \"$first\" ]; then echo same; else echo other; fi >> /tmp/log; done";
    let task = stand.containerd.start_task(SNAPSHOTTER, &reference, &["/bin/sh", "-c", script]);

    let (done, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let waits = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8_u64)
            .map(|reader| {
                let (done, reads, contents, read) = (&done, &reads, &contents, &read);
                let dir = if reader % 2 == 0 { &direct } else { &overlay };
                scope.spawn(move || {
                    let mut n = reader;
                    while !done.load(Ordering::Relaxed) {
                        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let name = if n >> 60 == 0 {
                            format!("large{}", (n >> 33) % 6)
                        } else {
                            format!("small{}", (n >> 33) % 60)
                        };
                        let expected = &contents[format!("data/{name}").as_bytes()];
                        let found = read(&dir.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
                        assert!(found == *expected, "{name} has other bytes");
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let prober = scope.spawn(|| {
            let mut waits = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let begun = std::time::Instant::now();
                read(&probed).unwrap();
                waits.push(begun.elapsed());
            }
            waits
        });
        for kill in 0..times {
            // Some reads pass between two kills, at no certain moment.
            let before = reads.load(Ordering::Relaxed);
            assert!(guard::eventually(LIMIT, || {
                reads.load(Ordering::Relaxed) > before + 20 + kill % 7 * 10
                    || readers.iter().any(|r| r.is_finished())
            }));
            if kill % 4 == 0 {
                fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
            }
            ends(&mut stand.lazurite, kill);
        }
        done.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        prober.join().unwrap()
    });
    // Of each time the longest wait of who asks all the time, and nobody else.
    let mut waits = waits;
    waits.sort();
    let waits = waits.split_off(waits.len().saturating_sub(times as usize));
    let at = |share: usize| waits.get(waits.len() * share / 100).copied().unwrap_or_default();
    let total = reads.load(Ordering::Relaxed);
    eprintln!(
        "{what} {times} times, {others} layers beside, {total} reads; waits: median {:?}, 90 % {:?}, 99 % {:?}, longest {:?}",
        at(50),
        at(90),
        at(99),
        waits.last()
    );
    let log = text(&task.exec(&["/bin/sh", "-c", "busybox sort < /tmp/log | busybox uniq"]));
    assert_eq!(log, "same\n", "what the container has read");
    drop(task);
    drop(mounted);
}

/// The process that keeps the mount of a daemon.
fn keeper(root: &Path) -> Option<i32> {
    let socket = root.join("keeper.sock");
    let is_keeper = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
        words.get(1) == Some(&&b"keep"[..]) && words.get(2) == Some(&socket.as_os_str().as_encoded_bytes())
    };
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    all.into_iter().find(is_keeper)
}

#[test]
fn a_daemon_that_dies_with_its_keeper_takes_old_containers_along_and_no_new_ones() {
    let Some(mut stand) = Stand::new(ONLY_WHAT_IS_READ) else { return };
    let registry = ScriptedRegistry::start();
    let layer = base().noise("data/a", 600_000, 1);
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&layer))]);
    stand.pull(&reference);
    let old = stand.containerd.start_task(SNAPSHOTTER, &reference, &["/bin/sh", "-c", "busybox sleep 600"]);
    let keeper = keeper(&stand.lazurite.root()).expect("a process keeps the mount");
    stand.lazurite.kill();
    rustix::process::kill_process(rustix::process::Pid::from_raw(keeper).unwrap(), Signal::KILL).unwrap();
    stand.lazurite.resume();
    assert!(
        stand.lazurite.log().contains("detached the mount of an earlier process"),
        "{}",
        stand.lazurite.log()
    );
    let connected =
        || stand.containerd.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "ls"]).status.success();
    assert!(guard::eventually(LIMIT, connected));
    // What was read is in the kernel, what was not is lost to the old container, and there for a new one.
    let lost = old.exec(&["/bin/sh", "-c", "busybox wc -c < /data/a || echo lost"]);
    assert!(text(&lost).contains("lost") || !lost.status.success(), "{}", text(&lost));
    assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "busybox wc -c < /data/a"]), "600000\n");
    drop(old);
}

#[test]
fn a_new_version_takes_the_place_of_the_daemon_and_draining_ends_it() {
    let Some(mut stand) = Stand::new(ONLY_WHAT_IS_READ) else { return };
    let registry = ScriptedRegistry::start();
    let layer = base().noise("data/a", 600_000, 1).noise("data/b", 600_000, 2);
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&layer))]);
    stand.pull(&reference);
    let task = stand.containerd.start_task(SNAPSHOTTER, &reference, &["/bin/sh", "-c", "busybox sleep 600"]);
    assert_eq!(task.exec(&["/bin/sh", "-c", "busybox wc -c < /data/a"]).stdout, b"600000\n");
    stand.lazurite.replace();
    assert!(
        stand.lazurite.log().contains("the mount of the process before goes on"),
        "{}",
        stand.lazurite.log()
    );
    assert_eq!(task.exec(&["/bin/sh", "-c", "busybox wc -c < /data/b"]).stdout, b"600000\n");

    let socket = stand.lazurite.socket();
    let drain = || {
        let mut command = Command::new("timeout");
        command.args(["60", BINARY, "drain", "--json", "--address"]).arg(&socket);
        let output = command.output().unwrap();
        (output.status.code(), serde_json::from_slice::<Value>(&output.stdout).unwrap())
    };
    let (code, said) = drain();
    assert_eq!((code, &said["drained"]), (Some(1), &json!(false)), "{said:#}");
    assert_eq!(said["busy"].as_array().unwrap().len(), 1);
    drop(task);
    // The snapshot of the container goes with it, its mount already has.
    assert!(guard::eventually(LIMIT, || drain() == (Some(0), json!({ "drained": true, "busy": [] }))));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(stand.lazurite.root().join("mnt").to_str().unwrap()));
    // containerd connects again after a pause of its own.
    let connected =
        || stand.containerd.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "ls"]).status.success();
    assert!(guard::eventually(LIMIT, connected));
    stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    assert_eq!(outcomes(&stand.pull(&reference)), ["unpacked (draining)"]);
}

/// systemd's part, as sd_notify(3) and sd_listen_fds(3) have it: descriptors stored by name, and handed to the next process.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    stored: Vec<(String, std::os::fd::OwnedFd)>,
    heard: Vec<String>,
}

impl Manager {
    fn new(dir: &Path) -> Manager {
        let path = dir.join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Manager { socket, path, stored: Vec::new(), heard: Vec::new() }
    }

    /// Receives until a message has this line.
    fn hear(&mut self, wanted: &str) {
        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
        loop {
            let mut text = [0; 256];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [std::io::IoSliceMut::new(&mut text)];
            let got = recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
            let text = String::from_utf8_lossy(&text[..got]).into_owned();
            let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key).map(str::to_owned));
            let name = value("FDNAME=").unwrap_or_default();
            if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
                self.stored.retain(|(stored, _)| *stored != name);
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    assert!(text.contains("FDSTORE=1"), "{text}");
                    self.stored.extend(fds.map(|fd| (name.clone(), fd)));
                }
            }
            self.heard.extend(text.lines().map(str::to_owned));
            if text.lines().any(|line| line == wanted) {
                return;
            }
        }
    }

    /// Starts the daemon as a unit with a store, with what is stored.
    fn start(&self, dir: &Path) -> guard::ProcessGuard {
        use std::os::fd::AsRawFd as _;
        use std::os::unix::process::CommandExt as _;
        // Only the process itself knows its number.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh", BINARY, "serve", "--root"]);
        command.arg(dir.join("root")).arg("--address").arg(dir.join("l.sock"));
        command.arg("--config").arg(dir.join("config.toml"));
        let names: Vec<&str> = self.stored.iter().map(|(name, _)| name.as_str()).collect();
        command.env("NOTIFY_SOCKET", &self.path).env("FDSTORE", "8").env("WATCHDOG_USEC", "2000000");
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        // Above the numbers they shall get, so that none is overwritten before it was passed on.
        let high: Vec<_> =
            self.stored.iter().map(|(_, fd)| rustix::io::fcntl_dupfd_cloexec(fd, 100).unwrap()).collect();
        let numbers: Vec<i32> = high.iter().map(|fd| fd.as_raw_fd()).collect();
        // SAFETY: dup2 may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for (target, number) in (3..).zip(&numbers) {
                    if libc::dup2(*number, target) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let process = guard::ProcessGuard::spawn(&mut command, dir.join("daemon.log")).unwrap();
        drop(high);
        process
    }
}

#[test]
fn a_service_manager_keeps_the_mount_of_a_daemon_that_is_killed() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let dir = dir.path();
    fs::write(dir.join("config.toml"), ONLY_WHAT_IS_READ).unwrap();
    let _mount = guard::MountGuard::new(dir.join("root/mnt"));
    let mut manager = Manager::new(dir);
    let mut daemon = manager.start(dir);
    manager.hear("READY=1");
    let mut names: Vec<&str> = manager.stored.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["lazurite-fuse", "lazurite-init"]);
    assert!(!dir.join("root/keeper.sock").exists(), "no process keeps what the service manager keeps");
    manager.hear("WATCHDOG=1");

    let containerd = Containerd::start(&dir.join("containerd"), &dir.join("l.sock"), Cri::Off);
    let registry = ScriptedRegistry::start();
    let layer = (0..4).fold(base(), |layer, n| layer.noise(format!("data/{n}"), 400_000, n + 1));
    let contents = layer.contents();
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&layer))]);
    let mut pull = Command::new("timeout");
    pull.args(["60", BINARY, "pull", "--plain-http", "--namespace", containerd.namespace(), "--address"]);
    let pulled = pull.arg(containerd.address()).arg(&reference).output().unwrap();
    assert!(pulled.status.success(), "{}", text(&pulled));
    let mounted = containerd.mount_image(SNAPSHOTTER, &dir.join("tree"));
    let data = mounted.path().join("data");
    for (n, signal) in [(0, Signal::KILL), (1, Signal::TERM), (2, Signal::KILL)] {
        let path = data.join(n.to_string());
        assert!(
            guard::deadline(LIMIT, move || fs::read(path).unwrap()).unwrap()
                == contents[format!("data/{n}").as_bytes()]
        );
        daemon.signal(signal).unwrap();
        daemon.wait_exit(LIMIT).unwrap().unwrap();
        manager.heard.clear();
        daemon = manager.start(dir);
        manager.hear("READY=1");
        assert!(!manager.heard.iter().any(|line| line.starts_with("FDSTORE")), "{:?}", manager.heard);
    }
    let path = data.join("3");
    assert!(guard::deadline(LIMIT, move || fs::read(path).unwrap()).unwrap() == contents[&b"data/3"[..]]);
    drop(mounted);
    // Nobody uses it any more: a stop ends it, and the store is emptied.
    daemon.signal(Signal::TERM).unwrap();
    manager.hear("FDNAME=lazurite-init");
    assert_eq!(manager.stored.len(), 0);
    assert!(daemon.wait_exit(LIMIT).unwrap().unwrap().success());
}

#[test]
fn whoever_watches_the_node_is_told_whether_the_mount_answers() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let Some(stand) = Stand::new(&format!("[health]\naddress = \"127.0.0.1:{port}\"\n")) else { return };
    let ask = |request: &str| {
        use std::io::{Read as _, Write as _};
        let mut connection = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        connection.set_read_timeout(Some(LIMIT)).unwrap();
        write!(connection, "{request} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(ask("GET /healthz").starts_with("HTTP/1.1 200 OK"), "{}", ask("GET /healthz"));
    assert!(ask("GET /other").starts_with("HTTP/1.1 404"));
    assert!(ask("POST /healthz").starts_with("HTTP/1.1 405"));
    let unmounted =
        Command::new("umount").arg("--lazy").arg(stand.lazurite.root().join("mnt")).status().unwrap();
    assert!(unmounted.success());
    assert!(guard::eventually(LIMIT, || ask("GET /healthz").starts_with("HTTP/1.1 503")));
    assert!(ask("GET /healthz").contains("the mount does not answer"), "{}", ask("GET /healthz"));
}
