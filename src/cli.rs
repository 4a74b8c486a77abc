//! The command line.
//!
//! Owns the names, defaults and help texts of commands and options. Decides nothing: each command gets its parsed
//! arguments.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use estargz::writer::{Dialect, Target};

use crate::config::{Config, Level, LogFormat};
use crate::containerd::DEFAULT_ADDRESS;
use crate::convert::DEFAULT_LEVEL;
use crate::transport::Location;

/// Starts containers before their images have arrived.
#[derive(Debug, Parser)]
#[command(name = "lazurite", version, max_term_width = 110)]
#[command(after_help = "Examples:\n  \
    lazurite serve                               run the daemon\n  \
    lazurite check                               see what is missing on this host\n  \
    lazurite pull registry.example.com/app:1.0   pull an image lazily\n  \
    lazurite convert docker://registry.example.com/app:1.0 docker://registry.example.com/app:1.0-esgz")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon that containerd talks to.
    Serve(ServeArgs),
    /// Run the additional layer store that podman, buildah and CRI-O look for layers in.
    Store(StoreArgs),
    /// Hand podman's logins to the store; named in registries.conf.
    StoreHelper(StoreHelperArgs),
    /// Pull an image through containerd; layers that can be lazy are not downloaded.
    Pull(PullArgs),
    /// Convert an image so that its layers can be lazy.
    Convert(Box<ConvertArgs>),
    /// Show what is in an image's layers, and whether they can be lazy.
    Inspect(InspectArgs),
    /// Say with which login an image's registry is asked, where it comes from, and whether it is let in.
    LoginCheck(LoginCheckArgs),
    /// Show what the daemon keeps on disk, and give it back.
    #[command(
        subcommand,
        after_help = "Examples:\n  \
        lazurite cache ls\n  \
        lazurite cache rm 4f1c9d\n  \
        lazurite cache prune --unused 24h"
    )]
    Cache(CacheCommand),
    /// Show the lazy layers, what is here of them, what went wrong, and which layers could not be lazy.
    Status(StatusArgs),
    /// Let go of all lazy layers: attach no more, and unmount when no container uses them.
    Drain(DrainArgs),
    /// Check the kernel, the file system and the configuration of containerd or podman; say how to fix what is wrong.
    Check(CheckArgs),
    /// Show or check configuration files.
    #[command(
        subcommand,
        after_help = "Examples:\n  \
        lazurite config example >/etc/lazurite/config.toml\n  \
        lazurite config check /etc/lazurite/config.toml"
    )]
    Config(ConfigCommand),
    /// Keep a mount while no daemon runs; started by the daemon.
    #[command(hide = true)]
    Keep {
        /// Where it is asked.
        socket: PathBuf,
    },
    /// Ask a file system something that the kernel does not remember; started by the daemon, which must not do it itself.
    #[command(hide = true)]
    Probe {
        /// Where it is mounted.
        mountpoint: PathBuf,
    },
    /// Print the version.
    #[command(after_help = "Example:\n  lazurite version")]
    Version,
}

/// `lazurite serve`
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
    lazurite serve\n  \
    lazurite serve --config ./config.toml --root /srv/lazurite --log-level debug\n\n\
    containerd has to be told of the daemon; `lazurite check` prints what to add to\n\
    its configuration.")]
pub struct ServeArgs {
    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The least severe events that are logged (overrides log.level).
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub log_level: Option<Level>,
    /// How log lines look (overrides log.format).
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Ask a daemon that serves the same root to stop, and go on with its mount
    #[arg(long)]
    pub replace: bool,
}

/// `lazurite store`
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
    lazurite store /var/lib/lazurite-store/mount\n  \
    podman unshare lazurite store ~/.local/share/lazurite-store/mount\n\n\
    podman has to be told of it, in storage.conf:\n  \
    [storage.options]\n  \
    additionallayerstores = [\"/var/lib/lazurite-store/mount:ref\"]")]
pub struct StoreArgs {
    /// Where layers appear; made if it is not there
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,
    /// Where the store's configuration is.
    #[command(flatten)]
    pub config: StoreConfigArgs,
    /// The least severe events that are logged (overrides log.level).
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub log_level: Option<Level>,
    /// How log lines look (overrides log.format).
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Ask a store that serves the same root to stop, and go on with its mount
    #[arg(long)]
    pub replace: bool,
}

/// `lazurite store-helper`
#[derive(Debug, Args)]
#[command(after_help = "Example, in /etc/containers/registries.conf:\n  \
    additional-layer-store-auth-helper = \"/usr/local/bin/lazurite-store-helper\"\n\n\
    No arguments can be given there: a link of this name to lazurite is the same as `lazurite store-helper`.\n\
    Reads {\"<reference>\": {\"username\", \"password\", \"identityToken\"}} from standard input.")]
pub struct StoreHelperArgs {
    /// Where the store's configuration is.
    #[command(flatten)]
    pub config: StoreConfigArgs,
}

/// Where the store's configuration is, and the two places that are often set by hand.
#[derive(Debug, Args)]
pub struct StoreConfigArgs {
    /// Configuration file [default: /etc/lazurite/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where the store keeps its data (overrides the configuration) [default: /var/lib/lazurite-store]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// The store's socket (overrides the configuration) [default: /run/lazurite-store/store.sock]
    #[arg(long, value_name = "SOCKET")]
    pub address: Option<PathBuf>,
}

impl StoreArgs {
    /// Puts the command line's choices over the file's.
    pub fn apply(&self, config: &mut Config) {
        self.config.apply(config);
        config.log.level = self.log_level.unwrap_or(config.log.level);
        config.log.format = self.log_format.unwrap_or(config.log.format);
    }
}

impl StoreConfigArgs {
    /// Puts the command line's choices over the file's.
    pub fn apply(&self, config: &mut Config) {
        if let Some(root) = &self.root {
            config.store.root.clone_from(root);
        }
        if let Some(address) = &self.address {
            config.store.address.clone_from(address);
        }
    }
}

/// Where the daemon's configuration is, and the two places that are often set by hand.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Configuration file [default: /etc/lazurite/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where the daemon keeps its data (overrides the configuration) [default: /var/lib/lazurite]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// The daemon's socket (overrides the configuration) [default: /run/lazurite/lazurite.sock]
    #[arg(long, value_name = "SOCKET")]
    pub address: Option<PathBuf>,
}

impl ServeArgs {
    /// Puts the command line's choices over the file's.
    pub fn apply(&self, config: &mut Config) {
        self.config.apply(config);
        config.log.level = self.log_level.unwrap_or(config.log.level);
        config.log.format = self.log_format.unwrap_or(config.log.format);
    }
}

impl ConfigArgs {
    /// Puts the command line's choices over the file's.
    pub fn apply(&self, config: &mut Config) {
        if let Some(root) = &self.root {
            config.root.clone_from(root);
        }
        if let Some(address) = &self.address {
            config.address.clone_from(address);
        }
    }
}

/// Which containerd a command talks to.
#[derive(Debug, Args)]
pub struct ContainerdArgs {
    /// containerd's socket
    #[arg(long = "address", short = 'a', env = "CONTAINERD_ADDRESS", value_name = "SOCKET")]
    #[arg(default_value = DEFAULT_ADDRESS)]
    pub address: PathBuf,
    /// containerd's namespace (Kubernetes uses k8s.io)
    #[arg(long, short = 'n', env = "CONTAINERD_NAMESPACE", default_value = "default")]
    pub namespace: String,
}

/// `lazurite pull`
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
    lazurite pull registry.example.com/app:1.0\n  \
    lazurite pull --namespace k8s.io --user bob:secret registry.example.com/app@sha256:…\n  \
    lazurite pull --plain-http --json 10.0.0.5:5000/app:latest\n\n\
    Layers that are not lazy are downloaded and unpacked; the summary says why.\n\
    --user, --plain-http and --config are for what this command downloads itself.\n\
    The daemon fetches lazy layers with its own configuration and logins.")]
pub struct PullArgs {
    /// The image: name, name:tag or name@digest
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Which containerd to pull into.
    #[command(flatten)]
    pub containerd: ContainerdArgs,
    /// The snapshotter to pull into, by its name in containerd's proxy_plugins
    #[arg(long, env = "CONTAINERD_SNAPSHOTTER", default_value = "lazurite", value_name = "NAME")]
    pub snapshotter: String,
    /// The platform to take from a multi-platform image: os/architecture[/variant] [default: this host's]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// How the registry is reached.
    #[command(flatten)]
    pub registry: RegistryArgs,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite convert`
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Places:\n  \
    docker://HOST/REPOSITORY:TAG   a registry\n  \
    oci:DIRECTORY[:NAME]           an image layout\n  \
    oci-archive:FILE[:NAME]        an image layout in a tar file\n  \
    containerd:NAME                containerd's image store\n\n\
    Examples:\n  \
    lazurite convert docker://registry.example.com/app:1.0 docker://registry.example.com/app:1.0-esgz\n  \
    lazurite convert --all-platforms docker://registry.example.com/app:1.0 oci:/tmp/app:1.0\n  \
    lazurite convert --prefetch-list files.txt containerd:app:1.0 containerd:app:1.0-esgz\n  \
    lazurite convert --format zstd:chunked docker://registry.example.com/app:1.0 docker://registry.example.com/app:1.0-zst\n\n\
    Layers that are in the wanted format already are used unchanged. What an earlier run has stored at DST\n\
    is not made or sent again. An interrupted run leaves DST's name as it was; run the same command again.")]
pub struct ConvertArgs {
    /// The image: a place (see below)
    #[arg(value_name = "SRC")]
    pub source: Location,
    /// Where the converted image goes
    #[arg(value_name = "DST")]
    pub destination: Location,
    /// A platform to take from a multi-platform image: os/architecture[/variant]; several make an image for these
    /// [default: this host's]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Vec<String>,
    /// Convert for all platforms the image has
    #[arg(long, conflicts_with = "platform")]
    pub all_platforms: bool,
    /// What layers become: ordinary tar.gz, or ordinary tar.zst, which are smaller and are unpacked faster
    #[arg(long, value_enum, default_value_t = LayerFormat::Estargz)]
    pub format: LayerFormat,
    /// Whose zstd:chunked: podman's, which buildah, skopeo and CRI-O read too, or stargz-snapshotter's. Lazurite reads both
    /// [default: podman]
    #[arg(long, value_enum)]
    pub dialect: Option<DialectName>,
    /// Name manifests, configs and layers as OCI does (this is the default)
    #[arg(long, overrides_with = "no_oci")]
    pub oci: bool,
    /// Keep docker's names where the image has them
    #[arg(long)]
    pub no_oci: bool,
    /// Bytes of a file that are compressed together at most: what a read of one byte costs; K, M for KiB, MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "4M")]
    pub chunk_size: u64,
    /// Let small files share a compressed piece until it holds this much: smaller layers, larger reads
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0")]
    pub min_chunk_size: u64,
    /// Compression level, from 1 (fastest) to 12 (smallest)
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_LEVEL)]
    pub level: u8,
    /// Put files first that a program was recorded to read: lines of {"path", "manifestDigest", "layerIndex"}
    #[arg(long, value_name = "FILE")]
    pub record_in: Option<PathBuf>,
    /// Put these files first: a path or a glob (*, ?, [], **) on each line, # begins a comment
    #[arg(long, value_name = "FILE")]
    pub prefetch_list: Option<PathBuf>,
    /// Convert layers again that are in the wanted format already, or were converted by an earlier run
    #[arg(long)]
    pub force: bool,
    /// Layers worked on side by side [default: the number of processors, 4 at most]
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZero<usize>>,
    /// Where a layer is spooled when its files are put in another order [default: $TMPDIR, else /tmp]
    #[arg(long, value_name = "DIR")]
    pub tmpdir: Option<PathBuf>,
    /// Say what would be done to each layer and how long it would take; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How registries are reached.
    #[command(flatten)]
    pub registry: RegistryArgs,
    /// Log in with this name and password where the image is, and nowhere else
    #[arg(long, value_name = "USER:PASSWORD", conflicts_with = "user")]
    pub src_user: Option<String>,
    /// Log in with this name and password where the image goes, and nowhere else
    #[arg(long, value_name = "USER:PASSWORD", conflicts_with = "user")]
    pub dst_user: Option<String>,
    /// Reach over plain http the registry where the image is
    #[arg(long)]
    pub src_plain_http: bool,
    /// Reach over plain http the registry where the image goes
    #[arg(long)]
    pub dst_plain_http: bool,
    /// Which containerd, for containerd:NAME.
    #[command(flatten)]
    pub containerd: ContainerdArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// What layers are converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LayerFormat {
    /// eStargz.
    Estargz,
    /// zstd:chunked.
    #[value(name = "zstd:chunked", alias = "zstdchunked", alias = "zstd-chunked")]
    ZstdChunked,
}

/// The dialects of zstd:chunked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DialectName {
    /// containers/storage's.
    Podman,
    /// stargz-snapshotter's.
    Stargz,
}

impl ConvertArgs {
    /// What layers are converted to.
    pub fn target(&self) -> Target {
        match (self.format, self.dialect) {
            (LayerFormat::Estargz, _) => Target::EStargz,
            (LayerFormat::ZstdChunked, None | Some(DialectName::Podman)) => {
                Target::ZstdChunked(Dialect::Podman)
            }
            (LayerFormat::ZstdChunked, Some(DialectName::Stargz)) => Target::ZstdChunked(Dialect::Stargz),
        }
    }
}

/// `lazurite inspect`
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
    lazurite inspect registry.example.com/app:1.0\n  \
    lazurite inspect --files --json oci:/tmp/app:1.0\n  \
    lazurite inspect --verify ./layer.tar.gz\n\n\
    IMAGE is a reference, a place as `lazurite convert` takes it, or a file with one layer.\n\
    Exit status 1 if --verify finds something wrong.")]
pub struct InspectArgs {
    /// What to inspect
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// A platform to take from a multi-platform image: os/architecture[/variant] [default: this host's]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Vec<String>,
    /// Inspect what the image has for all platforms
    #[arg(long, conflicts_with = "platform")]
    pub all_platforms: bool,
    /// List each layer's files with their offsets
    #[arg(long)]
    pub files: bool,
    /// Read everything and check every digest
    #[arg(long)]
    pub verify: bool,
    /// How registries are reached.
    #[command(flatten)]
    pub registry: RegistryArgs,
    /// Which containerd, for containerd:NAME.
    #[command(flatten)]
    pub containerd: ContainerdArgs,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// How a command reaches registries itself.
#[derive(Debug, Args)]
pub struct RegistryArgs {
    /// Log in with this name and password; docker's logins are then not read
    #[arg(long, short = 'u', value_name = "USER:PASSWORD")]
    pub user: Option<String>,
    /// Reach registries over plain http (loopback addresses always are)
    #[arg(long)]
    pub plain_http: bool,
    /// Configuration file with the mirrors to use [default: /etc/lazurite/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// A number of bytes, or of KiB, MiB or GiB with K, M or G behind it.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        unit => return Err(format!("{unit:?} is no unit; there are K, M and G")),
    };
    let number: u64 = digits.parse().map_err(|_| "a number of bytes, as 65536, 64K or 4M".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "more bytes than there are".to_owned())
}

/// `lazurite check`
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
    lazurite check\n  \
    lazurite check --json\n  \
    CONTAINERD_ADDRESS=/run/k3s/containerd/containerd.sock lazurite check \\\n    \
    --containerd-config /var/lib/rancher/k3s/agent/etc/containerd/config.toml\n  \
    lazurite check --podman\n\n\
    Exit status: 0 when nothing failed (warnings may be printed), 1 otherwise.")]
pub struct CheckArgs {
    /// The daemon's configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// containerd's socket
    #[arg(long, env = "CONTAINERD_ADDRESS", default_value = DEFAULT_ADDRESS, value_name = "SOCKET")]
    pub containerd_address: PathBuf,
    /// containerd's configuration file
    #[arg(long, default_value = "/etc/containerd/config.toml", value_name = "FILE")]
    pub containerd_config: PathBuf,
    /// Check how podman, as this user runs it, is told of the layer store, instead of the daemon and containerd
    #[arg(long, conflicts_with = "containerd_config")]
    pub podman: bool,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite cache`
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// List the layers and what is here of them.
    #[command(after_help = "Example:\n  lazurite cache ls --json")]
    Ls(CacheLsArgs),
    /// Give back the disk that lazy layers take. What they show is fetched again when it is read.
    #[command(after_help = "Example:\n  lazurite cache rm 4f1c9d\n\n\
        Layers that have become directories stay: containers use them. They go with their images.\n\
        Exit status 1 if one of the layers stays.")]
    Rm(CacheRmArgs),
    /// Give back the disk of all lazy layers that were not read lately.
    #[command(after_help = "Example:\n  lazurite cache prune --unused 24h")]
    Prune(CachePruneArgs),
}

impl CacheCommand {
    /// Which daemon is meant.
    pub fn config(&self) -> &ConfigArgs {
        match self {
            Self::Ls(CacheLsArgs { config, .. })
            | Self::Rm(CacheRmArgs { config, .. })
            | Self::Prune(CachePruneArgs { config, .. }) => config,
        }
    }
}

/// `lazurite cache ls`
#[derive(Debug, Args)]
pub struct CacheLsArgs {
    /// Which daemon.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print the list as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite cache rm`
#[derive(Debug, Args)]
pub struct CacheRmArgs {
    /// The layers: digests of a table of contents or a blob, or how they begin
    #[arg(value_name = "DIGEST", required = true)]
    pub layers: Vec<String>,
    /// Which daemon.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite cache prune`
#[derive(Debug, Args)]
pub struct CachePruneArgs {
    /// Only layers that were not read for this long: seconds, or with m, h or d behind it
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "0")]
    pub unused: Duration,
    /// Which daemon.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// A number of seconds, or of minutes, hours or days with m, h or d behind it.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let unit: u64 = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        unit => return Err(format!("{unit:?} is no unit; there are s, m, h and d")),
    };
    let number: u64 = digits.parse().map_err(|_| "a time, as 90, 30m, 24h or 7d".to_owned())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(|| "too long a time".to_owned())
}

/// `lazurite login-check`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    lazurite login-check registry.example.com/app:1.0\n  \
    lazurite login-check --json docker.io/library/busybox\n\n\
    Every source of logins is shown with what it says, in the order they are asked. The first login\n\
    that is let in counts.\n\
    Logins are looked up as the daemon does if it runs as the same user. No secret is printed.\n\
    Exit status 1 if the registry does not give the manifest.")]
pub struct LoginCheckArgs {
    /// The image: name, name:tag or name@digest
    #[arg(value_name = "REF")]
    pub reference: String,
    /// How registries are reached.
    #[command(flatten)]
    pub registry: RegistryArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite status`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  lazurite status\n  lazurite status --json | jq '.fallbacks.counts'\n  \
    lazurite status --address /run/lazurite-store/store.sock\n\n\
    What is printed below a layer is the last thing that went wrong with it, with its\n\
    reason code in front; docs/OPERATIONS.md says what to do about each.")]
pub struct StatusArgs {
    /// Which daemon.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print everything as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite drain`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lazurite drain --timeout 10m\n\n\
    Exit status 1 if containers still use lazy layers when the time is up. The daemon goes on refusing\n\
    lazy layers until it is started again.")]
pub struct DrainArgs {
    /// How long to wait for containers to end: seconds, or with m, h or d behind it
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "0")]
    pub timeout: Duration,
    /// Which daemon.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print a file with every key, its meaning and its default.
    #[command(after_help = "Example:\n  lazurite config example >/etc/lazurite/config.toml")]
    Example,
    /// Print the configuration in force; what differs from the defaults is not commented out.
    #[command(after_help = "Example:\n  lazurite config print --config ./config.toml")]
    Print(ConfigArgs),
    /// Read a file and say what is wrong with it. Exit status 1 if the daemon would not start with it.
    #[command(after_help = "Example:\n  lazurite config check /etc/lazurite/config.toml")]
    Check {
        /// The file
        file: PathBuf,
    },
    /// Print the reference page of all keys, in Markdown.
    #[command(after_help = "Example:\n  lazurite config reference >CONFIGURATION.md")]
    Reference,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_read() {
        for (text, seconds) in
            [("0", 0), ("90", 90), ("90s", 90), ("30m", 1800), ("24h", 86_400), ("7d", 604_800)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "h", "1w", "-1", "1.5h", "999999999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in
            [("0", 0), ("65536", 65536), ("64K", 65536), ("4m", 4 << 20), ("4MiB", 4 << 20), ("1G", 1 << 30)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "K", "4T", "-1", "1.5M", "99999999999G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
