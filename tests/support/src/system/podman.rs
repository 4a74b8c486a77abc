//! podman, of either of the two generations that ask a layer store differently, on a store of the test's own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use super::{patiently, said};
use crate::guard;

/// Which podman.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodmanRelease {
    /// The machine's own: 4.3.1 on Debian bookworm. Up to 5.0 podman asks a layer store for every layer, by the digest of
    /// the blob.
    Four,
    /// 5.4.2 of Debian trixie, made by `tests/support/podman5.sh`. From 5.1 podman asks for layers that have the
    /// annotation of a table of contents, by that digest.
    Five,
}

/// Runs a command in a mount namespace of its own, which ends with the last process in it, so no mount of podman outlives
/// its containers. What podman keeps at a fixed place, as the cache of which registry has which blob, goes to `state`.
/// Where a root is given, its /usr and /etc lie over the machine's: all else, the store's mount and /dev/fuse among it, is
/// where it always is. crun refuses machines that have both generations of cgroups; it is shown the second alone, and no
/// container gets one.
const ENTER: &str = r#"
state=$1 root=$2; shift 2
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /var/lib/containers
mount --bind "$state" /var/lib/containers
if [ -n "$root" ]; then mount --bind "$root/etc" /etc; mount --bind "$root/usr" /usr; fi
exec "$@"
"#;

/// A podman whose images, containers and configuration are below a directory of the test's own.
///
/// Registries on loopback are asked over plain http. Containers use the machine's network and no cgroups. Each command
/// starts afresh, as always with podman; what mounts there are, a restarted store's for instance, is seen by the next.
#[derive(Debug)]
pub struct Podman {
    dir: PathBuf,
    root: Option<PathBuf>,
}

impl Podman {
    /// Whether this machine can run it. If not, says so on standard error.
    ///
    /// # Panics
    /// As [`super::available`].
    #[track_caller]
    pub fn available(release: PodmanRelease) -> bool {
        let programs: &[&str] = match release {
            PodmanRelease::Four => &["podman", "conmon", "crun", "timeout", "unshare"],
            PodmanRelease::Five => &["apt-get", "dpkg-deb", "timeout", "unshare"],
        };
        guard::require_root_and_fuse() && guard::require_programs(programs)
    }

    /// One without images. `dir` is made if need be and belongs to it.
    ///
    /// # Panics
    /// If the configuration cannot be written or podman cannot be made.
    pub fn new(release: PodmanRelease, dir: &Path) -> Podman {
        let root = match release {
            PodmanRelease::Four => None,
            PodmanRelease::Five => Some(five().to_owned()),
        };
        for sub in ["tmp", "state", "home/.config/containers"] {
            std::fs::create_dir_all(dir.join(sub)).expect("podman's directories");
        }
        let podman = Podman { dir: dir.to_owned(), root };
        podman.write("containers.conf", &containers_conf(dir));
        podman.write(
            "home/.config/containers/policy.json",
            r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
        );
        podman.set_store(None);
        podman.set_auth_helper(None);
        podman
    }

    /// Names an additional layer store by its mount point, or none, from the next command on. Every command fails while
    /// the path is missing.
    ///
    /// # Panics
    /// If the configuration cannot be written.
    pub fn set_store(&self, store: Option<&Path>) {
        self.set_storage_options(&store.map_or(String::new(), |mount| {
            format!("additionallayerstores = [{:?}]\n", format!("{}:ref", mount.display()))
        }));
    }

    /// Sets lines of `[storage.options]` in place of those that were set, from the next command on.
    ///
    /// # Panics
    /// If the configuration cannot be written.
    pub fn set_storage_options(&self, options: &str) {
        let (graph, run) = (self.graphroot(), self.dir.join("run"));
        self.write(
            "storage.conf",
            &format!("[storage]\ndriver = \"overlay\"\ngraphroot = {graph:?}\nrunroot = {run:?}\n[storage.options]\n{options}"),
        );
    }

    /// Names the program that is given the logins of pulls, or none, from the next command on.
    ///
    /// # Panics
    /// If the configuration cannot be written.
    pub fn set_auth_helper(&self, program: Option<&Path>) {
        let helper =
            program.map_or(String::new(), |path| format!("additional-layer-store-auth-helper = {path:?}\n"));
        self.write(
            "registries.conf",
            &format!("{helper}[[registry]]\nlocation = \"127.0.0.1\"\ninsecure = true\n"),
        );
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.join(name), text).expect("podman's configuration");
    }

    /// Where it keeps layers and images.
    pub fn graphroot(&self) -> PathBuf {
        self.dir.join("graph")
    }

    /// The variables that lead a program of containers/storage to this instance.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let at = |name| self.dir.join(name).into_os_string();
        vec![
            ("HOME", at("home")),
            ("TMPDIR", at("tmp")),
            ("CONTAINERS_CONF", at("containers.conf")),
            ("CONTAINERS_STORAGE_CONF", at("storage.conf")),
            ("CONTAINERS_REGISTRIES_CONF", at("registries.conf")),
            ("PODMAN_IGNORE_CGROUPSV1_WARNING", "1".into()),
        ]
    }

    /// Runs `podman` to its end, or to a deadline.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn run(&self, args: &[&str]) -> Output {
        self.enter(&[&["podman"], args].concat())
    }

    /// As [`Podman::run`], for what must succeed; returns standard output.
    ///
    /// # Panics
    /// If it fails; what it said is printed.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "podman {}: {}", args.join(" "), said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs any command where podman runs: with its configuration, in a mount namespace.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn enter(&self, command: &[&str]) -> Output {
        let mut enter = patiently("unshare");
        enter.args(["--mount", "--propagation", "slave", "sh", "-ec", ENTER, "sh"]);
        enter.arg(self.dir.join("state")).arg(self.root.as_deref().unwrap_or(Path::new(""))).args(command);
        enter.env_remove("STORAGE_DRIVER").env_remove("STORAGE_OPTS").env_remove("CONTAINER_HOST");
        enter.envs(self.environment()).output().expect("unshare")
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // No panic here: the test may be in one. A store that is gone must not keep podman from ending containers.
        self.set_store(None);
        let removed = self.run(&["rm", "--all", "--force", "--time", "0"]);
        if !removed.status.success() {
            eprintln!("containers of podman may be left: {}", said(&removed));
        }
    }
}

/// The root with podman 5, made once per machine.
fn five() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("podman5.sh");
        let output = Command::new(&script).output().expect("tests/support/podman5.sh can be started");
        assert!(output.status.success(), "{}: {}", script.display(), said(&output));
        String::from_utf8_lossy(&output.stdout).trim().into()
    })
}

/// Locks, state and temporary files stay below `dir`; nothing needs systemd, a network or a keyring of its own, or limits
/// above those of the test.
fn containers_conf(dir: &Path) -> String {
    format!(
        "[containers]\n\
         cgroups = \"disabled\"\n\
         netns = \"host\"\n\
         ipcns = \"host\"\n\
         utsns = \"host\"\n\
         pids_limit = 0\n\
         keyring = false\n\
         default_sysctls = []\n\
         default_ulimits = []\n\
         log_driver = \"k8s-file\"\n\
         [engine]\n\
         runtime = \"crun\"\n\
         cgroup_manager = \"cgroupfs\"\n\
         events_logger = \"file\"\n\
         lock_type = \"file\"\n\
         tmp_dir = {:?}\n\
         image_copy_tmp_dir = {:?}\n",
        dir.join("libpod"),
        dir.join("tmp"),
    )
}
