//! A private containerd with Lazurite as a proxy plugin, driven through `ctr`.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{PATIENCE, SNAPSHOTTER, end, patiently, said, unmount_below};
use crate::guard::{self, ProcessGuard};

/// Numbers containers and namespaces of this process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Takes a container's streams from the shim, which passes them as 3 and 4 and waits for 5 to be closed (containerd,
/// runtime/v2/logging). It reads to the end also when the shim, at the end, tells it to go. Without it the last lines
/// get lost on a busy machine: `ctr` ends before it has read them, and so does the shim that writes to one file.
const LOGGER: &str = "#!/bin/sh
trap '' TERM
cat <&3 >\"$1.out\" 5>&- &
cat <&4 >\"$1.err\" 5>&- &
exec 5>&-
wait
";

/// Whether containerd also serves Kubernetes' interface (CRI) on its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cri {
    /// Not served.
    Off,
    /// Served, with Lazurite as the snapshotter of pulled images.
    On,
}

/// A containerd of the test's own.
#[derive(Debug)]
pub struct Containerd {
    dir: PathBuf,
    namespace: String,
    process: Option<ProcessGuard>,
}

impl Containerd {
    /// Starts containerd with everything it keeps under `dir` and the snapshotter [`SNAPSHOTTER`] behind the socket
    /// `lazurite` ([`super::Lazurite::socket`]), where nobody needs to listen yet.
    ///
    /// # Panics
    /// If it does not answer; its log is printed.
    pub fn start(dir: &Path, lazurite: &Path, cri: Cri) -> Containerd {
        std::fs::create_dir_all(dir.join("cni")).expect("containerd's directory");
        std::fs::write(dir.join("config.toml"), config(dir, lazurite, cri))
            .expect("containerd's configuration");
        let logger = dir.join("logger");
        std::fs::write(&logger, LOGGER).expect("the logger");
        std::fs::set_permissions(&logger, Permissions::from_mode(0o755)).expect("the logger's mode");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("lazurite-test-{}-{number}", std::process::id());
        let mut containerd = Containerd { dir: dir.to_owned(), namespace, process: None };
        containerd.resume();
        containerd
    }

    /// Its socket.
    pub fn address(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// The namespace that [`Containerd::ctr`] works in, different for every instance.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default()
    }

    /// Ends it with SIGTERM. Containers go on: their shims are processes of their own.
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            end(process);
        }
    }

    /// Starts it again after [`Containerd::stop`].
    ///
    /// # Panics
    /// As [`Containerd::start`].
    pub fn resume(&mut self) {
        assert!(self.process.is_none(), "containerd runs already");
        assert!(self.answers(), "containerd does not answer: {}", self.log());
    }

    /// Starts the process; false if that fails or it does not answer.
    fn answers(&mut self) -> bool {
        let mut command = Command::new("containerd");
        command.arg("--config").arg(self.dir.join("config.toml"));
        let Ok(process) = ProcessGuard::spawn(&mut command, self.dir.join("containerd.log")) else {
            return false;
        };
        self.process = Some(process);
        guard::eventually(PATIENCE, || self.ctr(&["version"]).status.success())
    }

    /// Runs `ctr` in the instance's namespace.
    ///
    /// # Panics
    /// If `ctr` cannot be started.
    pub fn ctr(&self, args: &[&str]) -> Output {
        let mut command = patiently("ctr");
        command.arg("--address").arg(self.address()).args(["--namespace", &self.namespace]).args(args);
        command.env_remove("CONTAINERD_SNAPSHOTTER").output().expect("ctr")
    }

    /// As [`Containerd::ctr`], for what must succeed; returns standard output.
    ///
    /// # Panics
    /// If it fails; what it said is printed.
    #[track_caller]
    pub fn ctr_ok(&self, args: &[&str]) -> String {
        let output = self.ctr(args);
        assert!(output.status.success(), "ctr {}: {}", args.join(" "), said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Pulls over plain http and unpacks everything, as any client without laziness does.
    ///
    /// # Panics
    /// If the pull fails.
    #[track_caller]
    pub fn pull_eagerly(&self, snapshotter: &str, reference: &str) {
        let mut args = vec!["images", "pull", "--plain-http", "--snapshotter", snapshotter];
        // ctr of containerd 2 pulls through the transfer service unless told otherwise; older ones know no other way.
        if self.ctr_ok(&["images", "pull", "--help"]).contains("--local") {
            args.push("--local");
        }
        args.push(reference);
        self.ctr_ok(&args);
    }

    /// Digests in the content store of the namespace.
    ///
    /// # Panics
    /// If containerd does not answer.
    #[track_caller]
    pub fn content(&self) -> Vec<String> {
        self.ctr_ok(&["content", "ls", "-q"]).lines().map(str::to_owned).collect()
    }

    /// Runs a command in a new container to its end; its output and exit status are the container's. If it could not
    /// be started, standard error has what `ctr` said.
    ///
    /// # Panics
    /// If `ctr` cannot be started.
    pub fn run(&self, snapshotter: &str, image: &str, command: &[&str]) -> Output {
        let id = self.next_id();
        self.logged(&id, &["run", "--rm", "--snapshotter", snapshotter], &[image, &id], command)
    }

    /// Runs `ctr OPTIONS OPERANDS COMMAND` with the output going to files, by way of [`LOGGER`].
    fn logged(&self, name: &str, options: &[&str], operands: &[&str], command: &[&str]) -> Output {
        let files = self.dir.join(name);
        let uri = format!("binary://{}?{}", self.dir.join("logger").display(), files.display());
        let mut output = self.ctr(&[options, &["--log-uri", &uri], operands, command].concat());
        let read = |extension| std::fs::read(files.with_extension(extension));
        // No files: the container did not start.
        if let (Ok(stdout), Ok(stderr)) = (read("out"), read("err")) {
            (output.stdout, output.stderr) = (stdout, [stderr, output.stderr].concat());
        }
        output
    }

    /// Starts a container that goes on; it is killed on drop.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_task(&self, snapshotter: &str, image: &str, command: &[&str]) -> Task<'_> {
        let id = self.next_id();
        let mut args = vec!["run", "--detach", "--null-io", "--snapshotter", snapshotter, image, &id];
        args.extend(command);
        self.ctr_ok(&args);
        Task { containerd: self, id }
    }

    /// Mounts the one image the namespace has in a snapshotter read-only at `target`, which is made; unmounted on drop.
    /// (`ctr images mount` of containerd 1.6 always takes overlayfs, whatever snapshotter it is told.)
    ///
    /// # Panics
    /// If it cannot be mounted, or the snapshotter holds more than one chain of committed snapshots.
    #[track_caller]
    pub fn mount_image(&self, snapshotter: &str, target: &Path) -> ImageMount<'_> {
        std::fs::create_dir_all(target).expect("the mount point");
        let target = target.to_str().expect("a mount point in UTF-8").to_owned();
        let mount = ImageMount {
            containerd: self,
            snapshotter: snapshotter.to_owned(),
            target,
            view: self.next_id(),
        };
        // One command: nothing refers to the view, so containerd's collection may take it at any time. What it names
        // belongs to the image and stays.
        let commands =
            mount.snapshots(&["view", "-t", &mount.target, &mount.view, &self.top_snapshot(snapshotter)]);
        let output = patiently("sh").args(["-ec", &commands]).output().expect("sh");
        assert!(output.status.success(), "{commands}: {}", said(&output));
        mount
    }

    /// The committed snapshot that is nobody's parent.
    #[track_caller]
    fn top_snapshot(&self, snapshotter: &str) -> String {
        let list = self.ctr_ok(&["snapshots", "--snapshotter", snapshotter, "ls"]);
        let rows: Vec<Vec<&str>> =
            list.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        let parents: Vec<&str> = rows.iter().filter(|row| row.len() == 3).map(|row| row[1]).collect();
        let committed = rows.iter().filter(|row| row.last() == Some(&"Committed")).map(|row| row[0]);
        let tops: Vec<&str> = committed.filter(|name| !parents.contains(name)).collect();
        assert_eq!(tops.len(), 1, "one image in {snapshotter}: {list}");
        tops[0].to_owned()
    }

    fn next_id(&self) -> String {
        format!("c{}", NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Removes the empty directories that runc and its cgroups leave behind.
    fn sweep(&self) {
        let _ = std::fs::remove_dir(Path::new("/run/containerd/runc").join(&self.namespace));
        // cgroup v1 has a hierarchy per controller, v2 one for all.
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain([root.to_owned()]) {
            let _ = std::fs::remove_dir(hierarchy.join(&self.namespace));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Only a running containerd can end containers. No panic here: the test may be in one.
        if self.process.is_none() && !self.answers() {
            eprintln!("containerd does not come back; containers of {} may be left", self.namespace);
        }
        let tasks = self.ctr(&["tasks", "ls", "-q"]);
        for id in String::from_utf8_lossy(&tasks.stdout).lines() {
            self.ctr(&["tasks", "delete", "--force", id]);
        }
        self.stop();
        unmount_below(&self.dir);
        self.sweep();
    }
}

/// A running container.
#[derive(Debug)]
pub struct Task<'a> {
    containerd: &'a Containerd,
    id: String,
}

impl Task<'_> {
    /// Runs one more process in the container to its end; the output is as of [`Containerd::run`].
    ///
    /// # Panics
    /// If `ctr` cannot be started.
    pub fn exec(&self, command: &[&str]) -> Output {
        let exec = self.containerd.next_id();
        self.containerd.logged(&exec, &["tasks", "exec", "--exec-id", &exec], &[&self.id], command)
    }

    /// Its name in containerd.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.containerd.ctr(&["tasks", "delete", "--force", &self.id]);
        self.containerd.ctr(&["containers", "delete", &self.id]);
    }
}

/// A mounted image.
#[derive(Debug)]
pub struct ImageMount<'a> {
    containerd: &'a Containerd,
    snapshotter: String,
    target: String,
    view: String,
}

impl ImageMount<'_> {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        Path::new(&self.target)
    }

    #[track_caller]
    fn snapshots(&self, args: &[&str]) -> String {
        let mut all = vec!["snapshots", "--snapshotter", &self.snapshotter];
        all.extend(args);
        self.containerd.ctr_ok(&all)
    }
}

impl Drop for ImageMount<'_> {
    fn drop(&mut self) {
        let _ = patiently("umount").arg(&self.target).output();
        self.containerd.ctr(&["snapshots", "--snapshotter", &self.snapshotter, "rm", &self.view]);
    }
}

/// Content is not shared between namespaces, so that what one test fetched spares another nothing.
fn config(dir: &Path, lazurite: &Path, cri: Cri) -> String {
    let data = lazurite.parent().unwrap_or(dir).join("root");
    let (dir, lazurite, data) = (dir.display(), lazurite.display(), data.display());
    let cri = match cri {
        Cri::Off => String::new(),
        // Without the table `runtimes`, containerd 2 drops the keys beside it when it migrates a version 2 file.
        Cri::On => format!(
            r#"
            [plugins."io.containerd.grpc.v1.cri".containerd]
              snapshotter = "{SNAPSHOTTER}"
              disable_snapshot_annotations = false
              [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
                runtime_type = "io.containerd.runc.v2"
            [plugins."io.containerd.grpc.v1.cri".cni]
              bin_dir = "{dir}/cni"
              conf_dir = "{dir}/cni"
            "#
        ),
    };
    let disabled = if cri.is_empty() { r#""io.containerd.grpc.v1.cri""# } else { "" };
    format!(
        r#"
        version = 2
        root = "{dir}/root"
        state = "{dir}/state"
        disabled_plugins = [{disabled}]
        [grpc]
          address = "{dir}/containerd.sock"
        [ttrpc]
          address = "{dir}/containerd.sock.ttrpc"
        [plugins."io.containerd.metadata.v1.bolt"]
          content_sharing_policy = "isolated"
        {cri}
        [proxy_plugins.{SNAPSHOTTER}]
          type = "snapshot"
          address = "{lazurite}"
          [proxy_plugins.{SNAPSHOTTER}.exports]
            root = "{data}"
        "#
    )
}
