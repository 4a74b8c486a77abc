//! The client against scripted registries on loopback. One binary; each module covers one promise.

mod auth;
mod docker_registry;
mod hosts;
mod live;
mod logins;
mod manifests;
mod pull_secrets;
mod push;
mod reads;
mod redirects;
mod secrecy;
mod stream;
mod tls;
mod token_service;
mod upload;

use registry::{
    Blob, Config, ContainersAuth, DockerConfig, HostConfig, MirrorConfig, ReadOptions, Reference, Registry,
};
use std::time::Duration;
use support::registry::{Logged, ScriptedRegistry};
use tokio::time::Instant;

const REPOSITORY: &str = "team/app";

/// Quick retries, no credentials, no host settings.
fn config() -> Config {
    Config {
        docker_config: DockerConfig::Disabled,
        containers_auth: ContainersAuth::Disabled,
        retries: 3,
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(20),
        ..Config::default()
    }
}

/// `config` with these mirrors before `origin`.
fn mirrored(origin: &ScriptedRegistry, mirrors: &[&ScriptedRegistry]) -> Config {
    let mirrors =
        mirrors.iter().map(|mirror| MirrorConfig { host: mirror.host(), ..Default::default() }).collect();
    let mut config = config();
    config.hosts.insert(origin.host(), HostConfig { insecure: false, mirrors });
    config
}

/// Bytes of which no two stretches of a few are alike.
fn content(length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ (at >> 3) as u8)
        .collect()
}

fn reference(server: &ScriptedRegistry) -> Reference {
    format!("{}/{REPOSITORY}:v1", server.host()).parse().expect("a reference")
}

/// A blob of `server` as seen by a new client.
fn open(server: &ScriptedRegistry, config: Config, digest: &str, size: Option<u64>) -> (Registry, Blob) {
    let registry = Registry::new(config).expect("usable settings");
    let blob = registry.blob(&reference(server), digest, size).expect("a digest");
    (registry, blob)
}

/// A server with one blob.
fn serving(data: &[u8]) -> (ScriptedRegistry, String) {
    let server = ScriptedRegistry::start();
    let digest = server.put_blob(REPOSITORY, data.to_vec());
    (server, digest)
}

/// Far enough away for any machine; a test that needs it fails.
fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn options() -> ReadOptions {
    ReadOptions::until(later())
}

fn blob_gets(server: &ScriptedRegistry) -> Vec<Logged> {
    server.requests().into_iter().filter(Logged::is_blob_get).collect()
}

fn token_requests(server: &ScriptedRegistry) -> usize {
    server.requests().iter().filter(|request| request.path == "/token").count()
}

fn statuses(requests: &[Logged]) -> Vec<u16> {
    requests.iter().map(|request| request.status).collect()
}
