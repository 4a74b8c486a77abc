//! Gathering what [`super::super::podman`] judges: containers' configuration files, what is mounted where podman works, and
//! one run of podman's own binary.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::io::Errno;
use toml::{Table, Value};

use super::{bounded, read};
use crate::check::Finding;
use crate::check::podman::{self, Helper, Mount, Place, Setup, Store};
use crate::user;

/// How podman, as this user runs it, is set up.
pub async fn podman() -> Vec<Finding> {
    let version = version().await;
    let mut findings = vec![podman::podman(version.as_deref().map_err(String::as_str))];
    let rootless = !user::is_root();
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

/// Where podman mounts, and looks for mounts.
#[derive(Debug, Clone, Copy)]
enum Namespace {
    /// In ours: it is root's, or we are in its own.
    Ours,
    /// In its own, which this process holds while no container runs.
    Held(u32),
    /// In one of its own, which is not there now.
    Gone,
}

impl Namespace {
    fn of_podman(rootless: bool) -> Namespace {
        // Inside, podman goes on as the user it was.
        if !rootless || user::is_unshared() {
            return Namespace::Ours;
        }
        let runtime = variable("XDG_RUNTIME_DIR").map(PathBuf::from);
        let runtime =
            runtime.unwrap_or_else(|| format!("/run/user/{}", rustix::process::geteuid().as_raw()).into());
        let read = || std::fs::read_to_string(runtime.join("libpod/tmp/pause.pid")).ok()?.trim().parse().ok();
        let alive = |pid: &u32| Path::new("/proc").join(pid.to_string()).exists();
        read().filter(alive).map_or(Namespace::Gone, Namespace::Held)
    }

    /// Asks what is at a store's path, within a deadline.
    async fn place(self, store: &Store) -> Place {
        let found = match self {
            Namespace::Held(pid) => {
                tokio::time::timeout(super::PATIENCE, look_inside(pid, &store.path)).await
            }
            Namespace::Ours | Namespace::Gone => {
                // On a thread: one that hangs in the kernel ends with this process.
                let (sender, receiver) = tokio::sync::oneshot::channel();
                let path = store.path.clone();
                std::thread::spawn(move || {
                    let found = look(&path);
                    let _ = sender.send(judge(found, mounted("self", &path)));
                });
                let received = tokio::time::timeout(super::PATIENCE, receiver).await;
                received.map(|place| place.unwrap_or(Place::Silent))
            }
        };
        match (self, found.unwrap_or(Place::Silent)) {
            // A mount in our namespace is of no use to it.
            (Namespace::Gone, Place::Ours) => Place::Outside,
            (Namespace::Held(_), Place::Directory)
                if mounted("self", &store.path).is_some_and(|mount| mount.is_ours()) =>
            {
                Place::Outside
            }
            (_, place) => place,
        }
    }
}

/// Looks at a path. May hang.
fn look(path: &Path) -> io::Result<Metadata> {
    // The kernel remembers attributes of a file system whose program is gone; its size it has to ask for.
    rustix::fs::statfs(path)?;
    std::fs::metadata(path)
}

/// The same in the namespaces of a process: from outside, the kernel lets nobody see file systems that were mounted in a user
/// namespace.
async fn look_inside(pid: u32, path: &Path) -> Place {
    let mut command = tokio::process::Command::new("nsenter");
    command.args(["--user", "--mount", "--preserve-credentials", "--target", &pid.to_string()]);
    command.args(["stat", "--file-system", "--"]).arg(path.join("."));
    command.env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    let said = match command.output().await {
        Err(error) => return Place::Error(error),
        Ok(output) if output.status.success() => {
            return judge(std::fs::metadata("/"), mounted(&pid.to_string(), path));
        }
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    };
    let known = [Errno::NOTCONN, Errno::NOENT, Errno::NOTDIR].map(io::Error::from);
    let text = |error: &io::Error| {
        let text = error.to_string();
        text.split(" (os error").next().unwrap_or_default().to_owned()
    };
    match known.into_iter().find(|error| said.ends_with(&text(error))) {
        Some(error) if error.kind() == io::ErrorKind::NotADirectory => Place::File,
        Some(error) => judge(Err(error), None),
        None => Place::Error(io::Error::other(said)),
    }
}

fn judge(found: io::Result<Metadata>, mounted: Option<Mount>) -> Place {
    match (found, mounted) {
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
