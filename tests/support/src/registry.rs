//! A registry that does what a test tells it, mishaps included, and keeps a log.
//!
//! [`ScriptedRegistry`] is an HTTP/1.1 server on a loopback port of its own, on a thread of its own; any number may
//! run, as origin, mirror, token server or target of redirects. It answers `/v2/`, manifests, blobs with single
//! ranges (206, 416) and `/token`, and takes uploads, mounts and manifests. What goes wrong is said with [`Rule`]s.
//!
//! A request is authenticated first; a refused one meets no rule. Rules are tried in the order they were added, the
//! first that applies acts; [`Action::Delay`] and [`Action::Headers`] let later ones act too. Ranges that are several
//! or malformed are answered with the whole content and logged as what they were.
//!
//! Tests wait for conditions on the log ([`ScriptedRegistry::wait`], [`ScriptedRegistry::until`]), not for times.

mod auth;
mod fault;
mod image;
mod log;
mod push;
mod server;

use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::oneshot;

pub use auth::{Auth, Expired, TokenAuth, TokenField};
pub use fault::{Action, Rule, RuleId};
pub use image::{CONFIG, INDEX, ImageDigests, LAYER_GZIP, LAYER_ZSTD, LayerBlob, MANIFEST, Platform};
pub use log::{Authorization, Logged, RangeAsked};

use crate::sha256_digest;
use fault::ActiveRule;
use server::Shared;

/// A running server; dropping it ends it.
#[derive(Debug)]
pub struct ScriptedRegistry {
    shared: Arc<Shared>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl ScriptedRegistry {
    /// A server without content on a free port of 127.0.0.1.
    ///
    /// # Panics
    /// If no port or thread is to be had.
    pub fn start() -> ScriptedRegistry {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared::new(address));
        let running = Mutex::new(Some(run(listener, shared.clone())));
        ScriptedRegistry { shared, running }
    }

    /// Closes the port and all connections. Content, rules and log stay.
    pub fn stop(&self) {
        if let Some(running) = self.running.lock().take() {
            let _ = running.stop.send(());
            let _ = running.thread.join();
        }
    }

    /// Opens the same port again after [`ScriptedRegistry::stop`].
    ///
    /// # Panics
    /// If another process has taken the port.
    pub fn restart(&self) {
        let mut running = self.running.lock();
        if running.is_none() {
            let listener = TcpListener::bind(self.shared.address).expect("the port is still free");
            *running = Some(run(listener, self.shared.clone()));
        }
    }

    /// `127.0.0.1:<port>`.
    pub fn host(&self) -> String {
        self.shared.host()
    }

    /// `http://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("http://{}", self.host())
    }

    /// Holds a blob; returns its digest.
    pub fn put_blob(&self, repository: &str, bytes: impl Into<Bytes>) -> String {
        let bytes = bytes.into();
        let digest = sha256_digest(&bytes);
        self.put_blob_as(repository, &digest, bytes);
        digest
    }

    /// Holds bytes under a digest that need not be theirs.
    pub fn put_blob_as(&self, repository: &str, digest: &str, bytes: impl Into<Bytes>) {
        let (key, bytes) = ((repository.to_owned(), digest.to_owned()), bytes.into());
        self.shared.change(|state| state.blobs.insert(key, bytes));
    }

    /// The bytes of a blob it holds.
    pub fn blob(&self, repository: &str, digest: &str) -> Option<Bytes> {
        let key = (repository.to_owned(), digest.to_owned());
        self.shared.look(|state| state.blobs.get(&key).cloned())
    }

    /// Media type and bytes of a manifest it holds, by tag or digest.
    pub fn manifest(&self, repository: &str, reference: &str) -> Option<(String, Bytes)> {
        let key = (repository.to_owned(), reference.to_owned());
        self.shared.look(|state| state.manifests.get(&key).cloned())
    }

    /// Begins an upload as a request would; returns its path and query, for another server to name as the place to
    /// send a blob to.
    pub fn open_upload(&self, repository: &str) -> String {
        self.shared.change(|state| {
            let id = push::open(state, repository);
            push::location(state, &id)
        })
    }

    /// Uploads begun and neither finished nor cancelled.
    pub fn uploads_open(&self) -> usize {
        self.shared.look(|state| state.uploads.len())
    }

    /// Forgets all uploads, as a registry that clears away what stays open.
    pub fn drop_uploads(&self) {
        self.shared.change(|state| state.uploads.clear());
    }

    /// Forgets a blob.
    pub fn remove_blob(&self, repository: &str, digest: &str) {
        let key = (repository.to_owned(), digest.to_owned());
        self.shared.change(|state| state.blobs.remove(&key));
    }

    /// Holds a manifest under its digest and `tag`; returns the digest.
    pub fn put_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> String {
        let bytes = bytes.into();
        let digest = sha256_digest(&bytes);
        self.shared.change(|state| {
            for reference in [tag, digest.as_str()] {
                let key = (repository.to_owned(), reference.to_owned());
                state.manifests.insert(key, (media_type.to_owned(), bytes.clone()));
            }
        });
        digest
    }

    /// Holds an image for this machine: layers (lowest first), config, manifest. `extras` is merged into the config:
    /// `json!({"config": {"Cmd": ["/bin/sh"]}})`, or `Value::Null` for nothing.
    pub fn put_image(
        &self,
        repository: &str,
        tag: &str,
        layers: &[LayerBlob],
        extras: &Value,
    ) -> ImageDigests {
        let config = image::config(layers, extras);
        let manifest = image::manifest(&config, layers);
        ImageDigests {
            manifest_size: manifest.len() as u64,
            manifest: self.put_manifest(repository, tag, MANIFEST, manifest),
            config: self.put_blob(repository, config),
            layers: layers.iter().map(|layer| self.put_blob(repository, layer.bytes.clone())).collect(),
        }
    }

    /// Holds an index of images that are there already; returns its digest.
    pub fn put_index(&self, repository: &str, tag: &str, images: &[(&ImageDigests, Platform)]) -> String {
        self.put_manifest(repository, tag, INDEX, image::index(images))
    }

    /// Puts a rule in force, after those there are.
    pub fn fault(&self, rule: Rule) -> RuleId {
        self.shared.change(|state| {
            state.last_rule += 1;
            let id = RuleId(state.last_rule);
            state.rules.push(ActiveRule::new(id, rule));
            id
        })
    }

    /// Ends a rule; what hangs by it goes on.
    pub fn clear(&self, rule: RuleId) {
        self.shared.change(|state| state.rules.retain(|active| active.id != rule));
    }

    /// Ends all rules.
    pub fn clear_all(&self) {
        self.shared.change(|state| state.rules.clear());
    }

    /// How often a rule in force has acted; 0 for one that was cleared.
    pub fn hits(&self, rule: RuleId) -> u64 {
        self.shared
            .look(|state| state.rules.iter().find(|active| active.id == rule).map_or(0, |active| active.hits))
    }

    /// Says who may read and write from now on. Tokens that are out stay good.
    pub fn set_auth(&self, auth: Auth) {
        auth::announce(&self.host(), &auth);
        self.shared.change(|state| state.auth = auth);
    }

    /// Changes the password of the authentication there is; without one, or without a user, nothing.
    pub fn set_password(&self, new: &str) {
        let mut auth = self.shared.look(|state| state.auth.clone());
        match &mut auth {
            Auth::Basic { password, .. } => *password = new.to_owned(),
            Auth::Token(TokenAuth { credentials: Some((_, password)), .. }) => *password = new.to_owned(),
            Auth::Token(_) | Auth::None => {}
        }
        self.set_auth(auth);
    }

    /// Ends all tokens for this server, wherever they were issued.
    pub fn revoke_tokens(&self) {
        auth::revoke(&self.host());
    }

    /// Ends all signatures this server has put into redirects.
    pub fn expire_redirects(&self) {
        auth::expire_signatures(&self.host());
    }

    /// All requests so far, in order of arrival.
    pub fn requests(&self) -> Vec<Logged> {
        self.shared.look(|state| state.log.iter().map(|(_, logged)| logged.clone()).collect())
    }

    /// All requests so far, forgetting them.
    pub fn take_requests(&self) -> Vec<Logged> {
        self.shared.change(|state| state.log.drain(..).map(|(_, logged)| logged).collect())
    }

    /// Connections open now.
    pub fn open_connections(&self) -> u64 {
        self.shared.look(|state| state.open)
    }

    /// Connections accepted so far.
    pub fn accepted_connections(&self) -> u64 {
        self.shared.look(|state| state.accepted)
    }

    /// Blocks until the log fulfils `ready`; false if it does not within `limit`.
    pub fn wait(&self, limit: Duration, mut ready: impl FnMut(&[Logged]) -> bool) -> bool {
        self.shared.block_until(limit, |state| ready(&logged(&state.log)))
    }

    /// Waits until the log fulfils `ready`, on any runtime. Without limit: wrap it in a timeout.
    pub async fn until(&self, mut ready: impl FnMut(&[Logged]) -> bool) {
        self.shared.until(|state| ready(&logged(&state.log))).await;
    }

    /// Blocks until a rule has acted `count` times; false if it has not within `limit`.
    pub fn wait_hits(&self, rule: RuleId, count: u64, limit: Duration) -> bool {
        self.shared.block_until(limit, |state| {
            state.rules.iter().any(|active| active.id == rule && active.hits >= count)
        })
    }

    /// Waits until a rule has acted `count` times, on any runtime. Without limit: wrap it in a timeout.
    pub async fn until_hits(&self, rule: RuleId, count: u64) {
        self.shared
            .until(|state| state.rules.iter().any(|active| active.id == rule && active.hits >= count))
            .await;
    }

    /// Blocks until `count` connections are open; false if that is not so within `limit`.
    pub fn wait_connections(&self, count: u64, limit: Duration) -> bool {
        self.shared.block_until(limit, |state| state.open == count)
    }
}

impl Drop for ScriptedRegistry {
    fn drop(&mut self) {
        self.stop();
    }
}

fn logged(log: &[(u64, Logged)]) -> Vec<Logged> {
    log.iter().map(|(_, logged)| logged.clone()).collect()
}

fn run(listener: TcpListener, shared: Arc<Shared>) -> Running {
    listener.set_nonblocking(true).expect("a socket can be non-blocking");
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name(format!("registry {}", shared.host()))
        .spawn(move || server::run(listener, shared, stopped))
        .expect("a thread");
    Running { stop, thread }
}

#[cfg(test)]
mod tests;
