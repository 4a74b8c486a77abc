//! Where user names and passwords come from: the docker config file.
//!
//! Asked whenever an authorization is made, never kept as truth: the parsed file is used again only while
//! its modification time and size stay the same, and is dropped when a host refuses what it held. The same holds for
//! what a helper answered, which is used again for a short time only: a program is not run for every request. Other
//! sources (a kubelet's plugins) belong behind [`Credentials::find`].
//!
//! Format: docker's CLI reference, "Configuration files": `auths`, keyed by host or by URL, each with
//! `auth` (base64 of `user:password`), `username` and `password`, or `identitytoken`; `credHelpers`, which name a helper
//! for a host, and `credsStore`, the helper for all others.

mod helper;

use crate::config::DockerConfig;
use crate::secret::Secret;
use base64::Engine as _;
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// How long a helper's answer is used again. Clouds' tokens live for an hour or more; one that is refused is dropped.
const HELPED: Duration = Duration::from_secs(60);
/// Docker Hub's name at helpers.
const DOCKER_HUB_SERVER: &str = "https://index.docker.io/v1/";
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
}

/// Tells identities apart without keeping their secrets: a token is never used for another identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Identity {
    Anonymous,
    Known([u8; 32]),
}

/// The answer to a search, with words on where it was searched.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) credential: Option<Credential>,
    /// For the message of a refusal; names files, never their contents.
    pub(crate) tried: String,
}

impl Found {
    pub(crate) fn identity(&self) -> Identity {
        let fields = match &self.credential {
            None => return Identity::Anonymous,
            Some(Credential::Password { user, password }) => ["password", user.as_str(), password.expose()],
            Some(Credential::IdentityToken(token)) => ["token", "", token.expose()],
        };
        let mut hash = Sha256::new();
        for field in fields {
            hash.update((field.len() as u64).to_le_bytes());
            hash.update(field);
        }
        Identity::Known(hash.finalize().into())
    }
}

/// The source of credentials.
#[derive(Debug)]
pub(crate) struct Credentials {
    path: Option<PathBuf>,
    parsed: Mutex<Option<Parsed>>,
    /// By helper and server.
    helped: Mutex<HashMap<(String, String), Helped>>,
    /// Where helpers are, if not in the search path.
    helpers: Option<PathBuf>,
}

#[derive(Debug)]
struct Parsed {
    version: (SystemTime, u64),
    file: Arc<File>,
}

#[derive(Debug)]
struct Helped {
    at: Instant,
    credential: Option<Credential>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    auths: HashMap<String, Entry>,
    #[serde(rename = "credHelpers")]
    helpers: HashMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Deserialize, Clone, Default)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Credentials {
    pub(crate) fn new(config: &DockerConfig) -> Self {
        Self { path: config.path(), parsed: Mutex::default(), helped: Mutex::default(), helpers: None }
    }

    /// The credential for `host`. A missing or unreadable file is no error: the request goes out
    /// anonymously, and if it is refused, the message says what was wrong with the file.
    pub(crate) async fn find(&self, host: &str) -> Found {
        let Some(path) = &self.path else {
            return Found {
                credential: None,
                tried: "anonymous access; no docker config is configured".into(),
            };
        };
        let (credential, outcome) = match self.file(path).await {
            Err(why) => (None, why),
            Ok(file) => self.find_in(&file, host).await,
        };
        Found { credential, tried: format!("docker config {}: {outcome}", path.display()) }
    }

    /// As docker looks: the helper that is named for the host, else that for all, else the file's own entries.
    async fn find_in(&self, file: &File, host: &str) -> (Option<Credential>, String) {
        let names = names_of(host);
        let named = names.iter().find_map(|name| file.helpers.get(*name));
        let named = named
            .or_else(|| names.contains(&"docker.io").then(|| file.helpers.get(DOCKER_HUB_SERVER)).flatten());
        let mut tried = String::new();
        if let Some(name) = named.or(Some(&file.store)).filter(|name| !name.is_empty()) {
            let helper = format!("helper docker-credential-{name}");
            match self.help(name, host).await {
                Ok(Some(credential)) => return (Some(credential), format!("{helper} for {host}")),
                Ok(None) => tried = format!("{helper} knows nothing of {host}; "),
                Err(why) => tried = format!("{helper} {why}; "),
            }
        }
        match lookup(&file.auths, host) {
            None => (None, format!("{tried}has no entry for {host}")),
            Some(entry) => match entry.credential() {
                Ok(credential) => (Some(credential), format!("{tried}entry for {host}")),
                Err(why) => (None, format!("{tried}entry for {host} {why}")),
            },
        }
    }

    /// What a helper says, or said a moment ago.
    async fn help(&self, name: &str, host: &str) -> Result<Option<Credential>, String> {
        let server = if DOCKER_HUB.contains(&host) { DOCKER_HUB_SERVER } else { host };
        let key = (name.to_owned(), server.to_owned());
        if let Some(helped) = self.helped.lock().get(&key).filter(|helped| helped.at.elapsed() < HELPED) {
            return Ok(helped.credential.clone());
        }
        let credential = helper::get(name, server, self.helpers.as_ref()).await?;
        let mut helped = self.helped.lock();
        helped.retain(|_, helped| helped.at.elapsed() < HELPED);
        helped.insert(key, Helped { at: Instant::now(), credential: credential.clone() });
        Ok(credential)
    }

    /// Reads the file and asks helpers anew at the next search.
    pub(crate) fn forget(&self) {
        *self.parsed.lock() = None;
        self.helped.lock().clear();
    }

    async fn file(&self, path: &Path) -> Result<Arc<File>, String> {
        let unreadable = |error: std::io::Error| format!("cannot be read ({error})");
        let metadata = tokio::fs::metadata(path).await.map_err(unreadable)?;
        let version = (metadata.modified().map_err(unreadable)?, metadata.len());
        if let Some(parsed) = self.parsed.lock().as_ref().filter(|parsed| parsed.version == version) {
            return Ok(parsed.file.clone());
        }
        let text = tokio::fs::read(path).await.map_err(unreadable)?;
        // serde_json's message may quote a value of the wrong type: only the place is passed on.
        let file: File = serde_json::from_slice(&text)
            .map_err(|e| format!("is not valid (line {}, column {})", e.line(), e.column()))?;
        let file = Arc::new(file);
        *self.parsed.lock() = Some(Parsed { version, file: file.clone() });
        Ok(file)
    }
}

/// The names under which a host's login may be kept.
fn names_of(host: &str) -> Vec<&str> {
    if DOCKER_HUB.contains(&host) { DOCKER_HUB.to_vec() } else { vec![host] }
}

fn lookup<'a>(auths: &'a HashMap<String, Entry>, host: &str) -> Option<&'a Entry> {
    let names = names_of(host);
    // An exact key wins over a URL of the same host; among URLs the order is fixed by the text.
    names.iter().find_map(|name| auths.get(*name)).or_else(|| {
        auths
            .iter()
            .filter(|(key, _)| names.contains(&host_of(key)))
            .min_by_key(|(key, _)| *key)
            .map(|(_, e)| e)
    })
}

/// `https://host:port/v1/` and `host:port/v1/` name `host:port`.
fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

impl Entry {
    fn credential(&self) -> Result<Credential, &'static str> {
        if !self.identitytoken.is_empty() {
            return Ok(Credential::IdentityToken(Secret::new(&self.identitytoken)));
        }
        if !self.auth.is_empty() {
            let decoded = base64::engine::general_purpose::STANDARD
                .decode(self.auth.trim())
                .ok()
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .ok_or("has an auth that is not base64 text")?;
            let (user, password) = decoded.split_once(':').ok_or("has an auth without a colon")?;
            // docker pads old entries with NUL.
            let password = Secret::new(password.trim_end_matches('\0'));
            return Ok(Credential::Password { user: user.to_owned(), password });
        }
        if self.username.is_empty() {
            return Err("holds no credentials");
        }
        Ok(Credential::Password { user: self.username.clone(), password: Secret::new(&self.password) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.into(), password: Secret::new(password) })
    }

    async fn find(text: &str, host: &str) -> Found {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        Credentials::new(&DockerConfig::File(path)).find(host).await
    }

    #[tokio::test]
    async fn entries() {
        let file = r#"{
            "auths": {
                "https://index.docker.io/v1/": {"auth": "aHViOnB3OndpdGg6Y29sb25z"},
                "r.example": {"username": "u", "password": "p"},
                "https://r.example/v2/": {"username": "other", "password": "x"},
                "http://plain.example:5000": {"auth": "dTpwAAA="},
                "id.example": {"auth": "dTpw", "identitytoken": "t0k"},
                "helper.example": {},
                "broken.example": {"auth": "!!"},
                "colonless.example": {"auth": "dXNlcg=="}
            },
            "credsStore": "desktop", "HttpHeaders": {"x": "y"}
        }"#;
        for (host, expected) in [
            ("docker.io", password("hub", "pw:with:colons")),
            ("registry-1.docker.io", password("hub", "pw:with:colons")),
            ("r.example", password("u", "p")),
            ("plain.example:5000", password("u", "p")),
            ("id.example", Some(Credential::IdentityToken(Secret::new("t0k")))),
            ("plain.example", None),
            ("helper.example", None),
            ("broken.example", None),
            ("colonless.example", None),
            ("unknown.example", None),
        ] {
            let found = find(file, host).await;
            assert_eq!(found.credential, expected, "{host}: {}", found.tried);
            assert!(found.tried.contains("config.json"), "{}", found.tried);
        }
    }

    #[tokio::test]
    async fn a_bad_file_is_described_not_quoted() {
        for text in ["", "{", r#"{"auths": {"r.example": {"auth": 5}}}"#, r#"{"auths": {"r": "hunter2"}}"#] {
            let found = find(text, "r.example").await;
            assert_eq!(found.credential, None);
            assert!(found.tried.contains("is not valid (line"), "{}", found.tried);
            assert!(!found.tried.contains("hunter2"), "{}", found.tried);
        }
        let missing =
            Credentials::new(&DockerConfig::File("/nonexistent/config.json".into())).find("r").await;
        assert!(missing.tried.contains("cannot be read"), "{}", missing.tried);
    }

    #[tokio::test]
    async fn helpers_are_asked_once_a_minute_and_anew_after_a_refusal() {
        let directory = tempfile::tempdir().unwrap();
        let config = r#"{
            "auths": {"kept.example": {"username": "u", "password": "p"}, "both.example": {}},
            "credHelpers": {"cloud.example": "cloud", "broken.example": "missing", "https://index.docker.io/v1/": "cloud"},
            "credsStore": "store"
        }"#;
        let path = directory.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        let script = |name: &str, body: &str| {
            let path = directory.path().join(format!("docker-credential-{name}"));
            support::write_script(&path, &format!("#!/bin/sh\nread server\n{body}\n"));
        };
        script("store", "echo credentials not found in native keychain; exit 1");
        let answer = |user: &str| {
            let count = directory.path().join("asked");
            script(
                "cloud",
                &format!(
                    "echo $server >> {}; echo '{{\"Username\":\"{user}\",\"Secret\":\"s\"}}'",
                    count.display()
                ),
            );
        };
        answer("one");
        let asked = || std::fs::read_to_string(directory.path().join("asked")).unwrap_or_default();
        let mut credentials = Credentials::new(&DockerConfig::File(path));
        credentials.helpers = Some(directory.path().to_owned());
        for _ in 0..3 {
            let found = credentials.find("cloud.example").await;
            assert_eq!(found.credential, password("one", "s"), "{}", found.tried);
            assert!(
                found.tried.contains("helper docker-credential-cloud for cloud.example"),
                "{}",
                found.tried
            );
        }
        assert_eq!(asked(), "cloud.example\n", "once");
        // It was rotated, and the old one refused.
        answer("two");
        credentials.forget();
        assert_eq!(credentials.find("cloud.example").await.credential, password("two", "s"));
        assert_eq!(credentials.find("docker.io").await.credential, password("two", "s"));
        assert!(asked().ends_with("https://index.docker.io/v1/\n"), "{}", asked());
        // What no helper knows may be in the file.
        assert_eq!(credentials.find("kept.example").await.credential, password("u", "p"));
        let none = credentials.find("both.example").await;
        assert_eq!(none.credential, None);
        assert!(none.tried.contains("docker-credential-store knows nothing"), "{}", none.tried);
        let broken = credentials.find("broken.example").await;
        assert!(broken.tried.contains("docker-credential-missing cannot be run"), "{}", broken.tried);
    }

    #[tokio::test]
    async fn a_changed_file_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let write = |user: &str| {
            std::fs::write(&path, format!(r#"{{"auths":{{"r":{{"username":"{user}","password":"p"}}}}}}"#))
                .unwrap();
        };
        let credentials = Credentials::new(&DockerConfig::File(path.clone()));
        assert_eq!(credentials.find("r").await.credential, None);
        write("one");
        let first = credentials.find("r").await;
        assert_eq!(first.credential, password("one", "p"));
        write("three");
        let second = credentials.find("r").await;
        assert_eq!(second.credential, password("three", "p"));
        assert_ne!(first.identity(), second.identity());
    }
}
