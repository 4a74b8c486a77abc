//! The real components by themselves, without Lazurite: a system test that fails should not have to doubt them.

use std::path::Path;

use support::guard;
use support::system::{self, Containerd, Cri, DockerRegistry, Form, Image};

/// Mounts, cgroups and runc's directories that belong to an instance.
fn leftovers(dir: &Path, namespace: &str) -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
    let mounts = mounts.lines().filter(|line| line.contains(&*dir.to_string_lossy())).map(str::to_owned);
    let places =
        ["/run/containerd/runc", "/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/systemd"];
    let dirs = places.iter().map(|place| Path::new(place).join(namespace)).filter(|path| path.exists());
    mounts.chain(dirs.map(|path| path.display().to_string())).collect()
}

#[test]
fn containerd_pulls_runs_and_leaves_nothing() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let image = Image::busybox();
    let mut registry = DockerRegistry::with_images(&dir.path().join("registry"), &image);
    let mut containerd =
        Containerd::start(&dir.path().join("containerd"), &dir.path().join("none"), Cri::Off);
    let namespace = containerd.namespace().to_owned();
    let reference = image.reference(&registry, Form::Estargz);

    containerd.pull_eagerly("overlayfs", &reference);
    assert!(registry.bytes_sent() > 0);
    assert!(registry.accesses().iter().any(|access| access.path.contains("/blobs/") && access.status == 200));
    assert!(containerd.content().iter().all(|digest| digest.starts_with("sha256:")));

    let output = containerd.run("overlayfs", &reference, &["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");

    let task = containerd.start_task("overlayfs", &reference, &["sleep", "1000"]);
    assert_eq!(task.exec(&["echo", "inside"]).stdout, b"inside\n");
    assert!(containerd.ctr_ok(&["tasks", "ls"]).contains(task.id()));
    drop(task);
    assert_eq!(containerd.ctr_ok(&["containers", "ls", "-q"]), "");

    let mounted = containerd.mount_image("overlayfs", &dir.path().join("image"));
    assert!(mounted.path().join("bin/busybox").is_file());
    drop(mounted);

    // Ports, content and containers survive a restart of either.
    let address = registry.address().to_owned();
    registry.stop();
    registry.resume();
    assert_eq!(registry.address(), address);
    std::mem::forget(containerd.start_task("overlayfs", &reference, &["sleep", "1000"]));
    containerd.stop();
    containerd.resume();
    assert_ne!(containerd.ctr_ok(&["tasks", "ls", "-q"]), "");
    drop(containerd);
    assert_eq!(leftovers(dir.path(), &namespace), Vec::<String>::new());
}

#[test]
fn both_forms_of_the_torture_image_unpack_to_the_same_tree() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let image = Image::torture();
    assert_eq!(image.layers().len(), 6);
    let registry = DockerRegistry::with_images(&dir.path().join("registry"), &image);
    let containerd = Containerd::start(&dir.path().join("containerd"), &dir.path().join("none"), Cri::Off);
    let listings = [Form::Plain, Form::Estargz].map(|form| {
        let reference = image.reference(&registry, form);
        containerd.pull_eagerly("overlayfs", &reference);
        // Names, types, modes, owners, sizes, link counts, times and contents, as busybox sees them.
        let script = "cd / && find bin data deep links modes devices xattrs doomed covered repeated bytes -exec \
                      stat -c '%n %f %u %g %s %h %Y %t %T' {} + | sort && find data links bytes repeated -type f \
                      -exec sha256sum {} + | sort";
        let output = containerd.run("overlayfs", &reference, &["sh", "-c", script]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    let [plain, converted] = listings.each_ref().map(|text| text.lines().collect::<Vec<_>>());
    assert!(plain.len() > 300, "{plain:?}");
    for (plain, converted) in plain.iter().zip(&converted) {
        assert_eq!(plain, converted);
    }
    assert_eq!(plain.len(), converted.len());
}

#[test]
fn containerd_serves_kubernetes_if_asked() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let containerd = Containerd::start(dir.path(), &dir.path().join("none"), Cri::On);
    let plugins = containerd.ctr_ok(&["plugins", "ls"]);
    let cri =
        plugins.lines().find(|line| line.starts_with("io.containerd.grpc.v1 ") && line.contains("cri "));
    assert!(cri.is_some_and(|line| line.trim_end().ends_with("ok")), "{plugins}");
}
