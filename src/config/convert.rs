//! From the file's words to the settings of the libraries.
//!
//! The file keeps the incumbent's units and meanings of zero; the libraries take durations and enums. Pure: what
//! containerd's files say of registries is handed on as something that reads them when asked.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fusefs::{Audits, CacheConfig, Fill};

use super::{Config, Host, Mirror};
use crate::hosts::Live;

/// What the data plane is told about fetching.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// How long one read by a container may wait for missing bytes, over all retries and hosts.
    pub read_deadline: Duration,
    /// What is fetched ahead of the rest when a layer is attached.
    pub prefetch: Prefetch,
    /// Whether everything else follows.
    pub fill: Fill,
    /// Background downloads at a time in the whole daemon, at least 1.
    pub background_downloads: usize,
    /// Compressed bytes being downloaded or waiting to be decompressed, at least 1.
    pub in_flight_bytes: u64,
    /// Whether manifests are asked for the TOC digests of layers that come without.
    pub find_tocs: bool,
    /// Compressed bytes a second in the background, at most.
    pub background_rate: Option<NonZero<u64>>,
    /// What a layer is compared with before it becomes a directory.
    pub audits: Audits,
    /// How much is kept on disk.
    pub cache: CacheConfig,
}

/// What is fetched ahead when a layer is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefetch {
    /// Nothing.
    Off,
    /// What the layer's builder marked.
    On {
        /// Bytes from the start of a layer without a mark.
        unmarked_bytes: u64,
    },
}

impl Config {
    /// The data plane's settings.
    pub fn fetch(&self) -> Fetch {
        let initial = Config::default();
        let downloads = or_default(self.max_concurrency, initial.max_concurrency);
        Fetch {
            read_deadline: self.read_deadline(),
            prefetch: match self.noprefetch {
                true => Prefetch::Off,
                false => Prefetch::On { unmarked_bytes: self.prefetch_size },
            },
            fill: if self.no_background_fetch { Fill::Off } else { Fill::On },
            background_downloads: usize::try_from(downloads).unwrap_or(usize::MAX),
            audits: match (self.no_graduation, self.fetch.check_blob_digest) {
                (true, _) => Audits::Off,
                (false, true) => Audits::WithBlob,
                (false, false) => Audits::On,
            },
            cache: CacheConfig {
                most: NonZero::new(self.cache.max_bytes),
                low_water: u8::try_from(self.cache.low_water_percent.min(100)).unwrap_or(100),
            },
            find_tocs: !self.fetch.no_manifest_lookup,
            background_rate: NonZero::new(self.fetch.max_background_bytes_per_sec),
            in_flight_bytes: or_default(self.fetch.max_in_flight_bytes, initial.fetch.max_in_flight_bytes),
        }
    }

    /// How long one read may take; also what limits a request without a limit of its own.
    fn read_deadline(&self) -> Duration {
        seconds(self.blob.fetching_timeout_sec, Config::default().blob.fetching_timeout_sec)
    }

    /// The registry client's settings.
    pub fn registry(&self) -> registry::Config {
        let initial = Config::default();
        let silence = seconds(self.resolver.request_timeout_sec, initial.resolver.request_timeout_sec);
        let min_wait = Duration::from_millis(self.blob.min_wait_msec);
        registry::Config {
            hosts: self
                .resolver
                .host
                .iter()
                .map(|(name, host)| (name.clone(), self.host(name, host)))
                .collect(),
            host_source: match self.registry.config_path.0.is_empty() {
                true => None,
                false => Some(Arc::new(Live::new(self.registry.config_path.0.clone()))),
            },
            connect_timeout: seconds(self.resolver.connect_timeout_sec, initial.resolver.connect_timeout_sec),
            first_byte_timeout: silence,
            idle_timeout: silence,
            retries: self.blob.max_retries,
            backoff_min: min_wait,
            backoff_max: Duration::from_millis(self.blob.max_wait_msec).max(min_wait),
            pull_credentials: self.cri_keychain.enable_keychain.then(registry::PullCredentials::default),
            kubelet_plugins: given(&self.kubelet_plugins.config).map(|config| registry::KubeletPlugins {
                config,
                directory: self.kubelet_plugins.bin_dir.clone(),
            }),
            docker_config: match (self.docker_config.enable, given(&self.docker_config.path)) {
                (false, _) => registry::DockerConfig::Disabled,
                (true, None) => registry::DockerConfig::FromEnvironment,
                (true, Some(path)) => registry::DockerConfig::File(path),
            },
            containers_auth: match (self.containers_auth.enable, given(&self.containers_auth.path)) {
                (false, _) => registry::ContainersAuth::Disabled,
                (true, None) => registry::ContainersAuth::FromEnvironment,
                (true, Some(path)) => registry::ContainersAuth::File(path),
            },
            pull_secrets: self.kubeconfig_keychain.enable_keychain.then(|| registry::KubernetesSecrets {
                kubeconfig: given(&self.kubeconfig_keychain.kubeconfig_path),
                namespaces: self.kubeconfig_keychain.namespaces.clone(),
            }),
            allow_local_redirects: self.resolver.allow_local_redirects,
            ..registry::Config::default()
        }
    }

    /// A mirror that is the registry itself only says how the registry is reached, unless it adds something else.
    fn host(&self, name: &str, host: &Host) -> registry::HostConfig {
        let itself = |mirror: &&Mirror| mirror.host == name;
        let plain = Mirror::default();
        let adds = |mirror: &Mirror| {
            mirror.header != plain.header || mirror.request_timeout_sec != plain.request_timeout_sec
        };
        registry::HostConfig {
            insecure: host.mirrors.iter().filter(itself).any(|mirror| mirror.insecure),
            mirrors: host
                .mirrors
                .iter()
                .filter(|mirror| !itself(mirror) || adds(mirror))
                .map(|mirror| self.mirror(mirror))
                .collect(),
        }
    }

    fn mirror(&self, mirror: &Mirror) -> registry::MirrorConfig {
        registry::MirrorConfig {
            host: mirror.host.clone(),
            insecure: mirror.insecure,
            headers: mirror
                .header
                .0
                .iter()
                .flat_map(|(name, values)| {
                    values.values().iter().map(move |value| (name.clone(), value.clone()))
                })
                .collect(),
            request_timeout: match mirror.request_timeout_sec {
                0 => None,
                limit => Some(u64::try_from(limit).map_or(self.read_deadline(), Duration::from_secs)),
            },
        }
    }
}

/// A path that may be left empty.
fn given(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

fn or_default(value: u64, initial: u64) -> u64 {
    if value == 0 { initial } else { value }
}

fn seconds(value: u64, initial: u64) -> Duration {
    Duration::from_secs(or_default(value, initial))
}
