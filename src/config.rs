//! The configuration: what can be set, its defaults, and where it is read from.
//!
//! Owns every key of the configuration file. The structs below are the single source: the example file
//! (`config.toml.example`), the reference page (`docs/CONFIGURATION.md`), the names the reader knows and the
//! defaults are all derived from them, and tests compare. Names follow stargz-snapshotter's wherever the meaning
//! is equal, so that a file written for it is accepted as it is; what it has and Lazurite does not need is listed
//! with the reason in [`incumbent`].
//!
//! Only this module, `hosts` (containerd's files) and the command line know TOML. The libraries are handed plain structs: [`Config::registry`]
//! and [`Config::fetch`].
//!
//! Invariants: a key in the example has an effect; a key with no effect is named with the reason when it is read;
//! no value is changed silently except that a time limit of 0 stands for its default, as documented at each key.

mod convert;
mod declare;
pub mod incumbent;
mod read;
mod render;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;

use crate::containerd::DEFAULT_ADDRESS;
use declare::{Section, Setting, Table, quoted, section};

pub use convert::Prefetch;
pub use read::{Fault, Notice, distance, line_of, parse};
pub use render::{render, render_reference};

/// Where the configuration is looked for when none is named.
pub const DEFAULT_PATH: &str = "/etc/lazurite/config.toml";

section! {
    /// Lazurite's configuration. Every key may be left out; the lines below show the defaults.
    /// A file written for stargz-snapshotter is accepted: keys that have no meaning here are named at start.
    "" => Config {
        /// Everything Lazurite keeps: snapshot records, layers, indexes and the mount of lazy layers.
        /// Must be on a file system that can be an overlayfs lower directory (ext4, xfs, btrfs).
        root: PathBuf = PathBuf::from("/var/lib/lazurite"),
        /// The unix socket containerd's proxy_plugins entry names.
        address: PathBuf = PathBuf::from("/run/lazurite/lazurite.sock"),
        /// Bytes from the start of a layer to fetch ahead when its builder marked none. 0 fetches only what was
        /// marked. Starting a container never waits for it.
        prefetch_size: u64 = 0,
        /// Do not fetch the marked (or prefetch_size) start of a layer ahead of the rest.
        noprefetch: bool = false,
        /// Do not download what no container has read. Layers then stay lazy for ever and need the registry.
        no_background_fetch: bool = false,
        /// Do not turn layers into plain directories once all of them is here. Containers then read them through the
        /// mount for ever.
        no_graduation: bool = false,
        /// Background downloads at a time in the whole daemon; reads by containers are not counted and overtake
        /// them. 0 means the default.
        max_concurrency: u64 = 8,
    } tables {
        /// What the daemon writes about itself.
        log: Log,
        /// Limits on downloading.
        fetch: FetchLimits,
        /// What is kept on disk.
        cache: CacheLimits,
        /// For whoever watches the node.
        health: Health,
        /// Deadlines and retries of downloads.
        blob: Blob,
        /// containerd's settings of registries.
        registry: RegistryHosts,
        /// Registries and mirrors.
        resolver: Resolver,
        /// Logins of kubelet's plugins.
        kubelet_plugins: KubeletPlugins,
        /// Logins in docker's file.
        docker_config: DockerConfig,
        /// Logins in the containers tools' files.
        containers_auth: ContainersAuth,
        /// Logins in secrets of Kubernetes.
        kubeconfig_keychain: KubeconfigKeychain,
        /// The logins of pods.
        cri_keychain: CriKeychain,
        /// The additional layer store.
        store: Store,
    }
}

section! {
    /// What the daemon writes about itself, to standard error.
    "log" => Log {
        /// The least severe events that are written: error, warn, info, debug or trace.
        level: Level = Level::Info,
        /// text for people, json for log collectors (one object a line).
        format: LogFormat = LogFormat::Text,
    }
}

section! {
    /// Limits on downloading.
    "fetch" => FetchLimits {
        /// Compressed bytes being downloaded or waiting to be decompressed in the background at any time; the readers
        /// of one layer may have as much again. Bounds memory. 0 means the default.
        max_in_flight_bytes: u64 = 64 << 20,
        /// Bytes a second that are downloaded in the background at most, reads by containers not counted. 0 means no limit.
        max_background_bytes_per_sec: u64 = 0,
        /// Before a layer becomes a plain directory, download its blob once more, in order, and compare its digest with the
        /// manifest's. What containers see is verified without: by the digests in the table of contents.
        check_blob_digest: bool = false,
        /// Do not ask registries for the manifests of images whose layers come without a TOC digest. One request for each
        /// image (on Docker Hub it counts as a pull) tells which of them podman, buildah or skopeo have made as
        /// zstd:chunked; without it these are unpacked.
        no_manifest_lookup: bool = false,
    }
}

section! {
    /// What is kept on disk.
    "cache" => CacheLimits {
        /// Bytes of content that all layers may keep together. At the limit the background stops, and readers push
        /// out what lazy layers have, the least recently used first; layers that have become directories stay. 0
        /// means that the disk is the limit.
        max_bytes: u64 = 0,
        /// How much is pushed out at a time: down to this share of max_bytes, in percent.
        low_water_percent: u64 = 90,
    }
}

section! {
    /// For whoever watches the node.
    "health" => Health {
        /// Address and port (127.0.0.1:9099) where `GET /healthz` says 200 as long as the mount of lazy layers answers,
        /// and 503 with the reason when it does not. Empty: nowhere.
        address: String = String::new(),
    }
}

section! {
    /// Deadlines and retries of downloads.
    "blob" => Blob {
        /// How long a container's read may wait for bytes that are not here yet, over all retries and hosts, in
        /// seconds. After it the read fails with an input/output error. 0 means the default.
        fetching_timeout_sec: u64 = 300,
        /// How often a download that failed at every host goes round all of them again, within the time above.
        /// 0 tries each host once.
        max_retries: u32 = 16,
        /// The pause before the second round, in milliseconds; it doubles with every further one.
        min_wait_msec: u64 = 200,
        /// The longest pause between rounds, in milliseconds.
        max_wait_msec: u64 = 30_000,
    }
}

section! {
    /// containerd's settings of registries: mirrors, certificates, headers, in a hosts.toml for each.
    "registry" => RegistryHosts {
        /// Directories with a directory for each registry and a hosts.toml in it, separated by colons; the first that
        /// knows a registry, or has a _default, is used. Read while the daemon runs: a change is used by the next
        /// request. The default is containerd's, then what k3s and RKE2 make of their registries.yaml. Empty: none.
        config_path: Directories = Directories::containerd(),
    }
}

section! {
    /// Registries and mirrors, as stargz-snapshotter has them: asked before what hosts.toml says (see registry).
    "resolver" => Resolver {
        /// How long a registry may be silent, before its first byte and between bytes, before the request is given
        /// up, in seconds. A slow but steady transfer is not cut off. 0 means the default.
        request_timeout_sec: u64 = 30,
        /// How long connecting to a registry may take, in seconds. 0 means the default.
        connect_timeout_sec: u64 = 10,
        /// Let registries that are elsewhere redirect to addresses of this machine and its link (loopback, 169.254.0.0/16):
        /// otherwise such a redirect is refused, since the node's own services answer there.
        allow_local_redirects: bool = false,
    } tables {
        /// Mirrors by the registry host that image references name.
        host: BTreeMap<String, Host>,
    }
}

/// What is known about one registry host.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct Host {
    /// Tried in this order before the host itself.
    pub mirrors: Vec<Mirror>,
}

section! {
    /// A host to ask before the registry that references name; several are tried in the order given, and the
    /// registry itself last. Naming the registry as its own mirror with insecure = true is how plain http is
    /// allowed for it (loopback hosts need no entry).
    "resolver.host.*.mirrors" => Mirror {
        /// Host name or address, with a port if it is not the default.
        host: String = String::new(),
        /// Use plain http.
        insecure: bool = false,
        /// As resolver.request_timeout_sec, for this mirror. 0 means the same as there; below 0 only
        /// blob.fetching_timeout_sec limits a request.
        request_timeout_sec: i64 = 0,
        /// Headers sent to this mirror and not to where it redirects; a value is a string or a list of strings.
        header: Headers = Headers::default(),
    }
}

section! {
    /// Logins, from here on, in the order in which sources are asked for them: when a registry wants one, so that a new
    /// login is seen without a restart, and anew when one is refused. `lazurite login-check` shows what each source says.
    /// First kubelet's credential provider plugins, as kubelet is told of them: both keys or none.
    "kubelet_plugins" => KubeletPlugins {
        /// kubelet's --image-credential-provider-config: the file that names the plugins. Empty: none are asked. An answer
        /// that is not to be kept (cacheDuration 0) is used for 2 seconds. Providers with tokenAttributes are passed over.
        config: PathBuf = PathBuf::new(),
        /// kubelet's --image-credential-provider-bin-dir: the directory with the programs.
        bin_dir: PathBuf = PathBuf::new(),
    }
}

section! {
    /// Docker's configuration file, with the credential helpers that it names.
    "docker_config" => DockerConfig {
        /// Whether it is looked at.
        enable: bool = true,
        /// The docker configuration file with logins. Empty: $DOCKER_CONFIG/config.json if that is set, else
        /// ~/.docker/config.json of the user the daemon runs as.
        path: PathBuf = PathBuf::new(),
    }
}

section! {
    /// The logins of pods (image pull secrets), which containerd does not pass on: the kubelet is pointed at a socket of
    /// the daemon (--image-service-endpoint), which passes everything on to containerd and remembers the logins it sees.
    /// They are the first that are used.
    "cri_keychain" => CriKeychain {
        /// Serve that socket.
        enable_keychain: bool = false,
        /// Where the kubelet connects. Root's alone.
        listen_path: PathBuf = PathBuf::from("/run/lazurite/cri.sock"),
        /// containerd's socket. That of k3s and RKE2 is /run/k3s/containerd/containerd.sock.
        image_service_path: PathBuf = PathBuf::from(DEFAULT_ADDRESS),
    }
}

section! {
    /// The file in which podman, buildah and skopeo keep logins. Its keys may be namespaces and repositories; the longest
    /// counts.
    "containers_auth" => ContainersAuth {
        /// Whether it is looked at.
        enable: bool = true,
        /// The file. Empty: $REGISTRY_AUTH_FILE if that is set, else $XDG_RUNTIME_DIR/containers/auth.json,
        /// /run/containers/UID/auth.json and ~/.config/containers/auth.json, one after the other.
        path: PathBuf = PathBuf::new(),
    }
}

section! {
    /// Secrets of the types kubernetes.io/dockerconfigjson and kubernetes.io/dockercfg. Any of them that fits an image's
    /// name may be used for it, whichever pod it is for.
    "kubeconfig_keychain" => KubeconfigKeychain {
        /// Ask an apiserver for secrets. A list is used for a minute, and a read waits for it 3 seconds at most.
        enable_keychain: bool = false,
        /// How it is reached: a kubeconfig file with a client certificate, a token or a tokenFile. Empty: $KUBECONFIG, else
        /// ~/.kube/config.
        kubeconfig_path: PathBuf = PathBuf::new(),
        /// The namespaces whose secrets are used; the user of the kubeconfig file must be allowed to list them there.
        namespaces: Vec<String> = Vec::new(),
    }
}

section! {
    /// The additional layer store of podman, buildah and CRI-O: `lazurite store`. It has its own data and socket; all that is
    /// said above of downloads, registries and logs is true of it, too.
    "store" => Store {
        /// Everything it keeps. Must be on a file system that can be an overlayfs lower directory. Empty:
        /// /var/lib/lazurite-store, or for a user $XDG_DATA_HOME/lazurite-store.
        root: PathBuf = PathBuf::new(),
        /// Where `lazurite store-helper` reaches it; `.control` is put behind the name. Empty: /run/lazurite-store/store.sock,
        /// or for a user $XDG_RUNTIME_DIR/lazurite-store/store.sock.
        address: PathBuf = PathBuf::new(),
        /// How long the look for a layer may hold up a pull, in seconds; after it podman pulls the layer itself. 0 means the
        /// default.
        lookup_timeout_sec: u64 = 30,
    }
}

impl Config {
    /// Reads the file named, or the default one. A default file that does not exist is the default configuration.
    ///
    /// # Errors
    ///
    /// The file cannot be read (a named file must exist), or [`parse`] refuses it.
    pub fn load(named: Option<&Path>) -> Result<(Self, Vec<Notice>), Fault> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(path) {
            Ok(text) => parse(&path.display().to_string(), &text),
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok((Self::default(), Vec::new()))
            }
            Err(error) => Err(Fault::file(path, error)),
        }
    }

    /// Every table with a fixed name and fixed keys, in the order of the example.
    fn sections(&self) -> Vec<Section> {
        vec![
            Table::section(self),
            self.log.section(),
            self.fetch.section(),
            self.cache.section(),
            self.health.section(),
            self.blob.section(),
            self.registry.section(),
            self.resolver.section(),
            self.kubelet_plugins.section(),
            self.docker_config.section(),
            self.containers_auth.section(),
            self.kubeconfig_keychain.section(),
            self.cri_keychain.section(),
            self.store.section(),
        ]
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Failures only.
    Error,
    /// Also what an operator should look at.
    Warn,
    /// Also what happens to layers and snapshots.
    Info,
    /// Also every request to a registry.
    Debug,
    /// Everything.
    Trace,
}

impl Setting for Level {
    const KIND: &'static str = "one of \"error\", \"warn\", \"info\", \"debug\", \"trace\"";

    fn toml(&self) -> String {
        format!("{:?}", format!("{self:?}").to_lowercase())
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Setting for LogFormat {
    const KIND: &'static str = "one of \"text\", \"json\"";

    fn toml(&self) -> String {
        format!("{:?}", format!("{self:?}").to_lowercase())
    }
}

/// Directories, written as one string with colons between.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(from = "String")]
pub struct Directories(pub Vec<PathBuf>);

impl Directories {
    /// Where containerd's hosts.toml files are: its own place, and where k3s and RKE2 write them.
    fn containerd() -> Self {
        "/etc/containerd/certs.d:/var/lib/rancher/k3s/agent/etc/containerd/certs.d:\
         /var/lib/rancher/rke2/agent/etc/containerd/certs.d"
            .to_owned()
            .into()
    }
}

impl From<String> for Directories {
    fn from(text: String) -> Self {
        Self(text.split(':').filter(|path| !path.is_empty()).map(PathBuf::from).collect())
    }
}

impl Setting for Directories {
    const KIND: &'static str = "paths with colons between";

    fn toml(&self) -> String {
        let paths: Vec<String> = self.0.iter().map(|path| path.display().to_string()).collect();
        quoted(&paths.join(":"))
    }
}

/// Request headers by name. The values may be credentials, so `Debug` shows only the names.
#[derive(Clone, PartialEq, Default, Deserialize)]
#[serde(transparent)]
pub struct Headers(pub BTreeMap<String, OneOrMore>);

impl std::fmt::Debug for Headers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Setting for Headers {
    const KIND: &'static str = "a table of strings or lists of strings";

    fn toml(&self) -> String {
        if self.0.is_empty() {
            return "{}".to_owned();
        }
        let pairs: Vec<String> =
            self.0.iter().map(|(name, value)| format!("{} = {}", quoted(name), value.toml())).collect();
        format!("{{ {} }}", pairs.join(", "))
    }
}

/// A header's value or values.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
pub enum OneOrMore {
    /// One value.
    One(String),
    /// The header is sent once for each.
    More(Vec<String>),
}

impl OneOrMore {
    fn values(&self) -> &[String] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::More(values) => values,
        }
    }

    fn toml(&self) -> String {
        match self {
            Self::One(value) => quoted(value),
            Self::More(values) => {
                let values: Vec<String> = values.iter().map(|value| quoted(value)).collect();
                format!("[{}]", values.join(", "))
            }
        }
    }
}

impl std::fmt::Debug for OneOrMore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

#[cfg(test)]
mod tests;
