//! Settings of the client. Plain values: the binary owns files and their format.

use crate::keychain::pulls::PullCredentials;
use crate::origin::{HostSource, OriginHosts};
use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Settings of a [`Registry`](crate::Registry).
#[derive(Debug, Clone)]
pub struct Config {
    /// Settings per origin host as it stands in references (`docker.io`, `registry.example:5000`).
    pub hosts: HashMap<String, HostConfig>,
    /// What else is known of origins, and may change at any time.
    pub host_source: Option<Arc<dyn HostSource>>,
    /// Logins that image pulls brought along, asked for before all others.
    pub pull_credentials: Option<PullCredentials>,
    /// kubelet's credential provider plugins, asked next.
    pub kubelet_plugins: Option<KubeletPlugins>,
    /// The docker config file, asked next.
    pub docker_config: DockerConfig,
    /// The containers tools' `auth.json`, asked next.
    pub containers_auth: ContainersAuth,
    /// Pull secrets of Kubernetes, asked last.
    pub pull_secrets: Option<KubernetesSecrets>,
    /// Time to establish a connection, TLS included.
    pub connect_timeout: Duration,
    /// Time from an established connection to the head of the answer.
    pub first_byte_timeout: Duration,
    /// Longest silence inside a body.
    pub idle_timeout: Duration,
    /// Rounds over all hosts after the first one, and resumptions of one read at one host. The caller's
    /// deadline is the real bound; this one only ends a read whose deadline is very far.
    pub retries: u32,
    /// Wait after the first failed round; doubled after each further one.
    pub backoff_min: Duration,
    /// Upper bound of that wait.
    pub backoff_max: Duration,
    /// How long the target of a redirect is used again before the registry is asked anew.
    pub redirect_ttl: Duration,
    /// Follow redirects, and token servers, of hosts elsewhere to addresses of this machine and its link. Otherwise only hosts
    /// that are there themselves may point there: nobody else is to make a node ask its own services.
    pub allow_local_redirects: bool,
    /// The `User-Agent` header.
    pub user_agent: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hosts: HashMap::new(),
            host_source: None,
            pull_credentials: None,
            kubelet_plugins: None,
            docker_config: DockerConfig::default(),
            containers_auth: ContainersAuth::default(),
            pull_secrets: None,
            connect_timeout: Duration::from_secs(10),
            first_byte_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(30),
            // 0.2 s doubling to 30 s: 16 rounds wait about four minutes in all, enough for a registry's restart.
            retries: 16,
            backoff_min: Duration::from_millis(200),
            backoff_max: Duration::from_secs(30),
            // The shortest-lived signed URLs in use (ghcr.io) last about five minutes.
            redirect_ttl: Duration::from_secs(240),
            allow_local_redirects: false,
            user_agent: concat!("lazurite/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// More than any setting means; keeps arithmetic on instants from overflowing.
pub(crate) const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl Config {
    /// The same with every duration at most a day.
    pub(crate) fn bounded(mut self) -> Self {
        for duration in [
            &mut self.connect_timeout,
            &mut self.first_byte_timeout,
            &mut self.idle_timeout,
            &mut self.backoff_min,
            &mut self.backoff_max,
            &mut self.redirect_ttl,
        ] {
            *duration = (*duration).min(LONGEST);
        }
        let mirrors = self.hosts.values_mut().flat_map(|host| &mut host.mirrors);
        mirrors.filter_map(|mirror| mirror.request_timeout.as_mut()).for_each(|t| *t = (*t).min(LONGEST));
        self
    }

    /// The same with one source of logins: this docker config file.
    pub fn only_docker_config(self, path: PathBuf) -> Self {
        Self {
            pull_credentials: None,
            kubelet_plugins: None,
            docker_config: DockerConfig::File(path),
            containers_auth: ContainersAuth::Disabled,
            pull_secrets: None,
            ..self
        }
    }

    /// What is known of `origin` beside [`Config::hosts`] now.
    pub(crate) fn hosts_now(&self, origin: &str) -> Option<Arc<OriginHosts>> {
        self.host_source.as_ref().map(|source| source.hosts(origin))
    }
}

/// Settings of one origin host that hold as long as the process.
#[derive(Debug, Clone, Default)]
pub struct HostConfig {
    /// Speak plain http to the origin. Loopback hosts get plain http without this.
    pub insecure: bool,
    /// Asked in this order, before all other hosts.
    pub mirrors: Vec<MirrorConfig>,
}

/// A host that serves the same blobs as an origin.
#[derive(Clone, Default)]
pub struct MirrorConfig {
    /// `host` or `host:port`.
    pub host: String,
    /// Speak plain http to it. Loopback hosts get plain http without this.
    pub insecure: bool,
    /// Headers for every request to this mirror, never forwarded to another host.
    pub headers: Vec<(String, String)>,
    /// In place of [`Config::first_byte_timeout`] for this mirror.
    pub request_timeout: Option<Duration>,
}

impl fmt::Debug for MirrorConfig {
    /// Header values may be secrets: only the names are shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("MirrorConfig")
            .field("host", &self.host)
            .field("insecure", &self.insecure)
            .field("headers", &names)
            .field("request_timeout", &self.request_timeout)
            .finish()
    }
}

/// Where the docker config file is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DockerConfig {
    /// `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
    #[default]
    FromEnvironment,
    /// This file.
    File(PathBuf),
    /// None.
    Disabled,
}

impl DockerConfig {
    /// The file to read, if there is a place for one.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let from = |variable| std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
        match self {
            Self::FromEnvironment => from("DOCKER_CONFIG")
                .or_else(|| from("HOME").map(|home| home.join(".docker")))
                .map(|directory| directory.join("config.json")),
            Self::File(path) => Some(path.clone()),
            Self::Disabled => None,
        }
    }
}

/// Where the containers tools (podman, buildah, skopeo) keep logins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ContainersAuth {
    /// `$REGISTRY_AUTH_FILE`; else `$XDG_RUNTIME_DIR/containers/auth.json`, `/run/containers/<uid>/auth.json` and
    /// `~/.config/containers/auth.json`, one after the other.
    #[default]
    FromEnvironment,
    /// This file.
    File(PathBuf),
    /// None.
    Disabled,
}

/// kubelet's credential provider plugins, as kubelet is told of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeletPlugins {
    /// `--image-credential-provider-config`: a `CredentialProviderConfig`, YAML or JSON.
    pub config: PathBuf,
    /// `--image-credential-provider-bin-dir`: where the programs are.
    pub directory: PathBuf,
}

/// Pull secrets that are read from an apiserver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesSecrets {
    /// The kubeconfig file; `$KUBECONFIG`, else `~/.kube/config`, if `None`.
    pub kubeconfig: Option<PathBuf>,
    /// The namespaces whose secrets are used.
    pub namespaces: Vec<String>,
}
