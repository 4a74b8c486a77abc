//! The command line.
//!
//! Owns the names, defaults and help texts of commands and options. Decides nothing: each command gets its parsed
//! arguments.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, Level, LogFormat};
use crate::containerd::DEFAULT_ADDRESS;

/// Starts containers before their images have arrived.
#[derive(Debug, Parser)]
#[command(name = "lazurite", version, max_term_width = 110)]
#[command(after_help = "Examples:\n  \
    lazurite serve                               run the daemon\n  \
    lazurite check                               see what is missing on this host\n  \
    lazurite pull registry.example.com/app:1.0   pull an image lazily")]
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
    /// Pull an image through containerd; layers that can be lazy are not downloaded.
    Pull(PullArgs),
    /// Check the kernel, the file system and containerd's configuration; say how to fix what is wrong.
    Check(CheckArgs),
    /// Show or check configuration files.
    #[command(
        subcommand,
        after_help = "Examples:\n  \
        lazurite config example >/etc/lazurite/config.toml\n  \
        lazurite config check /etc/lazurite/config.toml"
    )]
    Config(ConfigCommand),
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
    /// Log in at the registry with this name and password; docker's logins are then not read
    #[arg(long, short = 'u', value_name = "USER:PASSWORD")]
    pub user: Option<String>,
    /// Reach the registry over plain http (loopback addresses always are)
    #[arg(long)]
    pub plain_http: bool,
    /// Configuration file with the mirrors to use [default: /etc/lazurite/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// `lazurite check`
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
    lazurite check\n  \
    lazurite check --json\n  \
    CONTAINERD_ADDRESS=/run/k3s/containerd/containerd.sock lazurite check \\\n    \
    --containerd-config /var/lib/rancher/k3s/agent/etc/containerd/config.toml\n\n\
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
    /// Print the findings as JSON
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
