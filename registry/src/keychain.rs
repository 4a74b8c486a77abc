//! Where logins come from: a chain of sources, asked in order when a request needs one.
//!
//! Nothing found is kept as truth. Sources that take time keep what they said for a while, and drop it when a host refuses
//! it; the next search asks them anew. A login that was refused is passed over for some time if there is another.
//!
//! The sources, each of which may be left out: what image pulls brought along ([`pulls`]), kubelet's credential provider
//! plugins ([`plugin`]), docker's and the containers tools' files ([`file`]), pull secrets of Kubernetes ([`secrets`]).
//!
//! Invariants: a login is searched for a host and a repository, and none is used for what it was not given for; no message
//! has a secret in it.

mod file;
mod helper;
mod kept;
mod kubeconfig;
mod pattern;
mod plugin;
mod program;
pub(crate) mod pulls;
mod secrets;
mod watched;

use crate::config::Config;
use crate::secret::Secret;
use crate::transport::Transport;
use base64::Engine as _;
use file::AuthFile;
use parking_lot::Mutex;
use plugin::Plugins;
use pulls::PullCredentials;
use secrets::PullSecrets;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// How long it is remembered that a program or a service has failed: one that hangs must not be waited for by every read.
const FAILED: Duration = Duration::from_secs(10);
/// How long a login that was refused is tried only after all others.
const REFUSED_FOR: Duration = Duration::from_secs(300);
/// Refusals remembered.
const MAX_REFUSALS: usize = 1024;
/// Docker Hub's names: references say `docker.io`, requests go to `registry-1`, `docker login` writes `index`.
const DOCKER_HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// What proves who we are to one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    Password {
        user: String,
        password: Secret,
    },
    /// An OAuth2 refresh token, traded for access tokens at the token endpoint.
    IdentityToken(Secret),
    /// What the host takes as it is.
    AccessToken(Secret),
}

/// Tells identities apart without keeping their secrets: a token is never used for another identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Identity {
    Anonymous,
    Known([u8; 32]),
}

impl Identity {
    pub(crate) fn of(credential: Option<&Credential>) -> Self {
        let fields = match credential {
            None => return Self::Anonymous,
            Some(Credential::Password { user, password }) => ["password", user.as_str(), password.expose()],
            Some(Credential::IdentityToken(token)) => ["token", "", token.expose()],
            Some(Credential::AccessToken(token)) => ["access", "", token.expose()],
        };
        let mut hash = Sha256::new();
        for field in fields {
            hash.update((field.len() as u64).to_le_bytes());
            hash.update(field);
        }
        Self::Known(hash.finalize().into())
    }
}

/// What a login is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// The name credentials of the host are kept under.
    pub(crate) host: &'a str,
    pub(crate) repository: &'a str,
}

impl fmt::Display for Place<'_> {
    /// As images are named in full.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", canonical(self.host), self.repository)
    }
}

/// What one source said. Nothing but the credentials is secret.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// The source's name.
    pub(crate) source: String,
    /// The one to be tried first is the first.
    pub(crate) credentials: Vec<Credential>,
    /// What was found, or why nothing was.
    pub(crate) said: String,
    /// Not worth a word in the message of a refusal.
    quiet: bool,
}

/// The answer to a search, with words on where it was searched.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) credential: Option<Credential>,
    /// It was refused lately, and there is no other.
    pub(crate) refused: bool,
    /// For the message of a refusal; names files, never their contents.
    pub(crate) tried: String,
}

impl Found {
    pub(crate) fn identity(&self) -> Identity {
        Identity::of(self.credential.as_ref())
    }
}

/// All sources, and what came of their answers.
#[derive(Debug)]
pub(crate) struct Keychain {
    sources: Vec<Source>,
    /// By host, repository and identity: until when.
    refused: Mutex<HashMap<(String, String, Identity), Instant>>,
}

#[derive(Debug)]
enum Source {
    Pulls(PullCredentials),
    Plugins(Plugins),
    File(AuthFile),
    Secrets(PullSecrets),
}

impl Source {
    async fn answer(&self, place: Place<'_>) -> Answer {
        match self {
            Self::Pulls(pulls) => pulls.answer(place),
            Self::Plugins(plugins) => plugins.answer(place).await,
            Self::File(file) => file.answer(place).await,
            Self::Secrets(secrets) => secrets.answer(place).await,
        }
    }

    /// Takes note that this identity was refused somewhere: what it keeps of it is to be had anew.
    fn refuse(&self, identity: Identity) {
        match self {
            // Nobody can be asked anew: the next pull brings another.
            Self::Pulls(_) => {}
            Self::Plugins(plugins) => plugins.refuse(identity),
            Self::File(file) => file.refuse(identity),
            Self::Secrets(secrets) => secrets.refuse(identity),
        }
    }
}

impl Keychain {
    pub(crate) fn new(config: &Config, transport: &Transport) -> Self {
        let pulls = config.pull_credentials.clone().map(Source::Pulls);
        let plugins = config.kubelet_plugins.as_ref().map(|plugins| Source::Plugins(Plugins::new(plugins)));
        let files = AuthFile::docker(&config.docker_config).into_iter();
        let files = files.chain(AuthFile::containers(&config.containers_auth)).map(Source::File);
        let secrets = config.pull_secrets.as_ref();
        let secrets = secrets.map(|secrets| Source::Secrets(PullSecrets::new(secrets, transport.clone())));
        Self {
            sources: pulls.into_iter().chain(plugins).chain(files).chain(secrets).collect(),
            refused: Mutex::default(),
        }
    }

    /// The first login that was not refused lately, else the first one. Sources after it are not asked.
    pub(crate) async fn find(&self, place: Place<'_>) -> Found {
        let mut tried = Vec::new();
        let mut first = None;
        for source in &self.sources {
            let Answer { source, credentials, said, quiet } = source.answer(place).await;
            let usable =
                credentials.iter().find(|credential| !self.is_refused(place, Identity::of(Some(credential))));
            let refused = if usable.is_none() && !credentials.is_empty() { " (refused)" } else { "" };
            if !quiet {
                tried.push(format!("{source}: {said}{refused}"));
            }
            if usable.is_some() {
                return Found { credential: usable.cloned(), refused: false, tried: tried.join("; ") };
            }
            first = first.or(credentials.into_iter().next());
        }
        if tried.is_empty() {
            tried.push("anonymous access; no source of logins is configured".to_owned());
        }
        let refused = first.is_some() || self.is_refused(place, Identity::Anonymous);
        Found { credential: first, refused, tried: tried.join("; ") }
    }

    /// What every source says, in their order.
    pub(crate) async fn ask_all(&self, place: Place<'_>) -> Vec<Answer> {
        let mut answers = Vec::with_capacity(self.sources.len());
        for source in &self.sources {
            answers.push(source.answer(place).await);
        }
        answers
    }

    /// Takes note of a refusal: sources are asked anew for this identity, and if it was `proven` that nothing but the
    /// identity itself was refused, it is tried after all others for a while.
    pub(crate) fn refuse(&self, place: Place<'_>, identity: Identity, proven: bool) {
        if proven {
            let now = Instant::now();
            let mut refused = self.refused.lock();
            if refused.len() >= MAX_REFUSALS {
                refused.retain(|_, until| *until > now);
            }
            if refused.len() >= MAX_REFUSALS {
                refused.clear();
            }
            refused.insert(key(place, identity), now + REFUSED_FOR);
        }
        self.sources.iter().for_each(|source| source.refuse(identity));
    }

    /// Forgets who was refused here: everybody was, which says nothing of who is to be tried first.
    pub(crate) fn pardon(&self, place: Place<'_>) {
        let here = |(host, repository, _): &(String, String, Identity)| {
            host == place.host && repository == place.repository
        };
        self.refused.lock().retain(|refusal, _| !here(refusal));
    }

    fn is_refused(&self, place: Place<'_>, identity: Identity) -> bool {
        self.refused.lock().get(&key(place, identity)).is_some_and(|until| *until > Instant::now())
    }
}

fn key(place: Place<'_>, identity: Identity) -> (String, String, Identity) {
    (place.host.to_owned(), place.repository.to_owned(), identity)
}

/// The names under which a host's login may be kept.
fn names_of(host: &str) -> Vec<&str> {
    if DOCKER_HUB.contains(&host) { DOCKER_HUB.to_vec() } else { vec![host] }
}

/// A host's name as references have it.
fn canonical(host: &str) -> &str {
    if DOCKER_HUB.contains(&host) { DOCKER_HUB[0] } else { host }
}

/// `https://host:port/v1/` and `host:port/v1/` name `host:port`.
fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

/// The login in docker's `auth`: base64 of `user:password`.
fn decode_auth(auth: &str) -> Result<Credential, &'static str> {
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(auth.trim())
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or("has an auth that is not base64 text")?;
    let (user, password) = decoded.split_once(':').ok_or("has an auth without a colon")?;
    // docker pads old entries with NUL.
    let password = Secret::new(password.trim_end_matches('\0'));
    Ok(Credential::Password { user: user.to_owned(), password })
}

/// Where in a YAML or JSON text something is wrong. The parser's own words may quote it.
fn parse_yaml<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    serde_saphyr::from_slice(text).map_err(|error| match error.location() {
        Some(at) => format!("is not valid (line {}, column {})", at.line(), at.column()),
        None => "is not valid".to_owned(),
    })
}
