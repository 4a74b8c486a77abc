//! Gathering what [`super::host`], [`super::setup`] and [`super::podman`] judge: files, the file system, sockets, and one run
//! of containerd's or podman's own binary. Every wait is bounded; what cannot be had becomes a finding.

mod podman;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::snapshots::StatSnapshotRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use rustix::fs::Mode;
use toml::Table;
use tonic::{Code, Status};

use super::setup::{Plugin, Setup};
use super::{Finding, host, setup};
use crate::cli::CheckArgs;
use crate::config::{Config, line_of};
use crate::containerd::{Containerd, connect, said};
use crate::hosts;

pub use podman::podman;

/// Nothing asked here takes long in a daemon that is well.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the kernel has to offer.
pub fn kernel() -> Vec<Finding> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let fuse = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    vec![host::kernel(&release), host::fuse(fuse.as_ref().map(drop)), host::overlay(&filesystems)]
}

/// The disk for layers, what is set for registries, and whether our own daemon answers.
pub async fn host(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    match filesystem(&config.root) {
        Ok((magic, free, total)) => {
            findings.push(host::filesystem(&config.root, magic));
            findings.push(host::space(&config.root, free, total));
        }
        Err(error) => findings.push(host::no_filesystem(&config.root, &error)),
    }
    findings.extend(registries(config));
    findings.push(daemon(&config.address).await);
    findings
}

/// What is set for registries.
pub fn registries(config: &Config) -> Option<Finding> {
    let (read, faults) = hosts::faults(&config.registry.config_path.0);
    host::registries(read, &faults)
}

/// Magic number, free and total bytes of the file system that holds `root` or will hold it.
fn filesystem(root: &Path) -> io::Result<(u64, u64, u64)> {
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let directory = rustix::fs::open(existing, rustix::fs::OFlags::PATH, Mode::empty())?;
    let kind = rustix::fs::fstatfs(&directory)?;
    let size = rustix::fs::fstatvfs(&directory)?;
    // The type is signed on some architectures; magic numbers have 32 bits.
    let magic = u64::from(kind.f_type as u32);
    Ok((magic, size.f_bavail.saturating_mul(size.f_frsize), size.f_blocks.saturating_mul(size.f_frsize)))
}

/// Whether our daemon answers at its socket.
async fn daemon(address: &Path) -> Finding {
    let subject = "lazurite daemon";
    let fix = "systemctl start lazurite\n(or run: lazurite serve)";
    let request = StatSnapshotRequest { snapshotter: String::new(), key: "lazurite-check".to_owned() };
    let asked = bounded(async {
        let mut snapshots =
            SnapshotsClient::new(connect(address).await.map_err(|error| format!("{error:#}"))?);
        match snapshots.stat(request).await {
            Err(status) if status.code() != Code::NotFound => Err(said(&status)),
            _ => Ok(()),
        }
    });
    match asked.await {
        Ok(()) => Finding::ok(subject, format!("answers at {}", address.display())),
        Err(why) => Finding::fail(subject, format!("does not answer at {}: {why}", address.display()), fix),
    }
}

/// How containerd is set up and what it says of itself.
pub async fn containerd(args: &CheckArgs, config: &Config) -> Vec<Finding> {
    let subject = "containerd";
    let address = &args.containerd_address;
    let mut findings = Vec::new();
    let live = bounded(live(address)).await;
    findings.push(match &live {
        Ok(live) => Finding::ok(subject, format!("{} answers at {}", live.version, address.display())),
        Err(why) => Finding::fail(
            subject,
            why.clone(),
            "systemctl start containerd\n(or name its socket with --containerd-address)",
        ),
    });

    let path = &args.containerd_config;
    let file = match read(path) {
        Ok(file) => file,
        Err(why) => {
            findings.push(Finding::fail("containerd config", why, "Correct the file."));
            return findings;
        }
    };
    let dump = match dump(path).await {
        Ok(dump) => Some(dump),
        Err(why) if file.is_some() => {
            findings.push(Finding::warn(
                "containerd config",
                format!("only {} itself is checked, without defaults and imports: {why}", path.display()),
                "Have containerd in PATH to check the configuration in force.",
            ));
            None
        }
        Err(_) => None,
    };
    let shown =
        (path.display().to_string(), config.address.display().to_string(), config.root.display().to_string());
    let setup = Setup {
        version: live.as_ref().ok().and_then(|live| setup::version(&live.version)),
        file: file.as_ref(),
        effective: dump.as_ref().or(file.as_ref()),
        path: &shown.0,
        address: &shown.1,
        root: &shown.2,
    };
    findings.extend(setup.findings());
    if let (Ok(live), Some(name)) = (&live, setup.name()) {
        findings.push(setup::loaded(&live.snapshotters, name));
    }
    findings
}

/// A running containerd.
struct Live {
    version: String,
    snapshotters: Vec<Plugin>,
}

async fn live(address: &Path) -> Result<Live, String> {
    let refused = |status: Status| format!("at {}: {}", address.display(), said(&status));
    let containerd = Containerd::connect(address, "default").await.map_err(|error| format!("{error:#}"))?;
    let version = containerd.version().version(()).await.map_err(refused)?.into_inner().version;
    let filters = vec!["type==io.containerd.snapshotter.v1".to_owned()];
    let plugins = containerd.introspection().plugins(PluginsRequest { filters }).await.map_err(refused)?;
    let snapshotters = plugins.into_inner().plugins.into_iter();
    let snapshotters = snapshotters
        .map(|plugin| Plugin { id: plugin.id, error: plugin.init_err.map(|status| status.message) });
    Ok(Live { version, snapshotters: snapshotters.collect() })
}

async fn bounded<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let late = || Err(format!("no answer within {} s", PATIENCE.as_secs()));
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| late())
}

/// A configuration file; `None` if there is none.
fn read(path: &Path) -> Result<Option<Table>, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            text.parse().map(Some).map_err(|error| format!("{} is not valid: {error}", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{} cannot be read: {error}", path.display())),
    }
}

/// The configuration containerd would run with: defaults, the file and its imports together.
async fn dump(path: &PathBuf) -> Result<Table, String> {
    let mut command = tokio::process::Command::new("containerd");
    command.arg("--config").arg(path).args(["config", "dump"]).stdin(Stdio::null()).kill_on_drop(true);
    let output = bounded(async {
        command.output().await.map_err(|error| format!("containerd cannot be run: {error}"))
    })
    .await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "`containerd config dump` fails: {}",
            said.lines().next_back().unwrap_or_default()
        ));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    text.parse().map_err(|error| invalid("what `containerd config dump` prints", &text, &error))
}

fn invalid(what: &str, text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map_or(1, |span| line_of(text, span.start));
    format!("{what} is not valid TOML: line {line}: {}", error.message())
}
