//! Gathering what [`super::super::podman`] judges: containers' configuration files, what is mounted where podman works, and
//! one run of podman's own binary.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::io::Errno;
use toml::{Table, Value};

use super::{bounded, read};
use crate::check::Finding;
use crate::check::podman::{self, Helper, Mount, Place, Setup, Store};

/// How podman, as this user runs it, is set up.
pub async fn podman() -> Vec<Finding> {
    let version = version().await;
    let mut findings = vec![podman::podman(version.as_deref().map_err(String::as_str))];
    let rootless = !rustix::process::geteuid().is_root();
    let path = storage_conf(rootless);
    let storage = match read(&path) {
        Ok(storage) => storage,
        Err(why) => {
            findings.push(podman::unusable(why));
            return findings;
        }
    };
    let namespace = Namespace::of_podman(rootless);
    let mut stores = Vec::new();
    for store in storage.as_ref().map(podman::stores).unwrap_or_default() {
        let place = namespace.place(&store).await;
        stores.push((store, place));
    }
    let driver = std::env::var("STORAGE_DRIVER").ok().filter(|driver| !driver.is_empty());
    let setup = Setup {
        path: &path,
        storage: storage.as_ref(),
        driver: driver.as_deref(),
        stores: &stores,
        rootless,
    };
    findings.extend(setup.findings());
    findings.push(logins());
    findings
}

async fn version() -> Result<String, String> {
    let mut command = tokio::process::Command::new("podman");
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let ran =
        bounded(async { command.output().await.map_err(|error| format!("podman cannot be run: {error}")) });
    let output = ran.await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(format!("`podman --version` fails: {}", text(&output.stderr))),
    }
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn home() -> PathBuf {
    variable("HOME").unwrap_or_default().into()
}

/// The storage.conf that is read (containers/storage, types/utils.go).
fn storage_conf(rootless: bool) -> PathBuf {
    if let Some(path) = variable("CONTAINERS_STORAGE_CONF") {
        return path.into();
    }
    if rootless {
        let config = variable("XDG_CONFIG_HOME").map_or_else(|| home().join(".config"), PathBuf::from);
        return config.join("containers/storage.conf");
    }
    let (own, shipped) = ("/etc/containers/storage.conf", "/usr/share/containers/storage.conf");
    PathBuf::from(if Path::new(own).exists() || !Path::new(shipped).exists() { own } else { shipped })
}

/// The helper for logins as registries.conf and its drop-ins name it, the last of them. A user's own file keeps the
/// system's drop-ins away (containers/image, pkg/sysregistriesv2, `newConfigWrapper`). A file that is not valid says nothing.
fn logins() -> Finding {
    let (system, user) = (Path::new("/etc/containers"), home().join(".config/containers"));
    let own = user.join("registries.conf");
    let (main, dirs) = match variable("CONTAINERS_REGISTRIES_CONF") {
        Some(path) => (path.into(), vec![system, &user]),
        None if own.exists() => (own, vec![user.as_path()]),
        None => (system.join("registries.conf"), vec![system, &user]),
    };
    let mut files = vec![main.clone()];
    for dir in dirs {
        let entries = std::fs::read_dir(dir.join("registries.conf.d")).into_iter().flatten().flatten();
        let mut dropped: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        dropped.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
        dropped.sort();
        files.append(&mut dropped);
    }
    let named = |path: &PathBuf| {
        let table: Table = read(path).ok()??;
        table.get("additional-layer-store-auth-helper").and_then(Value::as_str).map(str::to_owned)
    };
    let helper = files.iter().filter_map(named).next_back().map(|path| {
        let found = std::fs::metadata(&path);
        let executable = found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0);
        Helper { path: path.into(), executable }
    });
    podman::logins(&main, helper.as_ref())
}

/// The mount namespace podman works in.
struct Namespace {
    /// The process that holds rootless podman's namespaces while no container runs.
    pause: Option<u32>,
    rootless: bool,
}

impl Namespace {
    fn of_podman(rootless: bool) -> Namespace {
        let runtime = variable("XDG_RUNTIME_DIR").map(PathBuf::from);
        let runtime =
            runtime.unwrap_or_else(|| format!("/run/user/{}", rustix::process::geteuid().as_raw()).into());
        let read = || std::fs::read_to_string(runtime.join("libpod/tmp/pause.pid")).ok()?.trim().parse().ok();
        let alive = |pid: &u32| Path::new("/proc").join(pid.to_string()).exists();
        Namespace { pause: rootless.then(read).flatten().filter(alive), rootless }
    }

    /// Asks what is at a store's path, on a thread: one that hangs in the kernel ends with this process.
    async fn place(&self, store: &Store) -> Place {
        let (pause, rootless, path) = (self.pause, self.rootless, store.path.clone());
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let place = match pause {
                Some(pid) => look(&pid.to_string(), &format!("/proc/{pid}/root"), &path),
                None => look("self", "", &path),
            };
            // A rootless store is mounted in podman's namespace, which therefore exists; a mount in ours is of no use.
            let outside = match place {
                Place::Ours => rootless && pause.is_none(),
                Place::Directory => {
                    pause.is_some() && mounted("self", &path).is_some_and(|mount| mount.is_ours())
                }
                _ => false,
            };
            let _ = sender.send(if outside { Place::Outside } else { place });
        });
        match tokio::time::timeout(super::PATIENCE, receiver).await {
            Ok(Ok(place)) => place,
            Ok(Err(_)) | Err(_) => Place::Silent,
        }
    }
}

/// What is at `path` for a process whose root directory is seen as `root`. May hang.
fn look(process: &str, root: &str, path: &Path) -> Place {
    let seen = PathBuf::from(root.to_owned() + &path.to_string_lossy());
    // The kernel remembers attributes of a file system whose program is gone; its size it has to ask for.
    let found = rustix::fs::statfs(&seen).map_err(io::Error::from).and_then(|_| std::fs::metadata(&seen));
    match (found, mounted(process, path)) {
        (Err(error), _) if error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => Place::Dead,
        (Err(error), _) => Place::Error(error),
        (Ok(found), _) if !found.is_dir() => Place::File,
        (Ok(_), None) => Place::Directory,
        (Ok(_), Some(mount)) if mount.is_ours() => Place::Ours,
        (Ok(_), Some(mount)) => Place::Foreign(mount.kind),
    }
}

/// What is mounted at `path` in the namespace of a process, the uppermost if there are several.
fn mounted(process: &str, path: &Path) -> Option<Mount> {
    let table = std::fs::read(format!("/proc/{process}/mountinfo")).ok()?;
    // The table has no symlinks. The path itself is not touched: it may be a mount in our namespace, too, and hang.
    let real = match (path.parent().and_then(|parent| parent.canonicalize().ok()), path.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    };
    Mount::at(&String::from_utf8_lossy(&table), &real)
}
