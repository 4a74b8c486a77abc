//! Where user names and passwords come from: the docker config file.
//!
//! Asked whenever an authorization is made, never kept as truth: the parsed file is used again only while
//! its modification time and size stay the same, and is dropped when a host refuses what it held. Other
//! sources (helpers, a kubelet's plugins) belong behind [`Credentials::find`].
//!
//! Format: docker's CLI reference, "Configuration files": `auths`, keyed by host or by URL, each with
//! `auth` (base64 of `user:password`), `username` and `password`, or `identitytoken`.

use crate::config::DockerConfig;
use crate::secret::Secret;
use base64::Engine as _;
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

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
}

#[derive(Debug)]
struct Parsed {
    version: (SystemTime, u64),
    auths: Arc<HashMap<String, Entry>>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: HashMap<String, Entry>,
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
        Self { path: config.path(), parsed: Mutex::new(None) }
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
        let (credential, outcome) = match self.auths(path).await {
            Err(why) => (None, why),
            Ok(auths) => match lookup(&auths, host) {
                None => (None, format!("has no entry for {host}")),
                Some(entry) => match entry.credential() {
                    Ok(credential) => (Some(credential), format!("entry for {host}")),
                    Err(why) => (None, format!("entry for {host} {why}")),
                },
            },
        };
        Found { credential, tried: format!("docker config {}: {outcome}", path.display()) }
    }

    /// Reads the file anew at the next search, whatever its times say.
    pub(crate) fn forget(&self) {
        *self.parsed.lock() = None;
    }

    async fn auths(&self, path: &Path) -> Result<Arc<HashMap<String, Entry>>, String> {
        let unreadable = |error: std::io::Error| format!("cannot be read ({error})");
        let metadata = tokio::fs::metadata(path).await.map_err(unreadable)?;
        let version = (metadata.modified().map_err(unreadable)?, metadata.len());
        if let Some(parsed) = self.parsed.lock().as_ref().filter(|parsed| parsed.version == version) {
            return Ok(parsed.auths.clone());
        }
        let text = tokio::fs::read(path).await.map_err(unreadable)?;
        // serde_json's message may quote a value of the wrong type: only the place is passed on.
        let file: File = serde_json::from_slice(&text)
            .map_err(|e| format!("is not valid (line {}, column {})", e.line(), e.column()))?;
        let auths = Arc::new(file.auths);
        *self.parsed.lock() = Some(Parsed { version, auths: auths.clone() });
        Ok(auths)
    }
}

fn lookup<'a>(auths: &'a HashMap<String, Entry>, host: &str) -> Option<&'a Entry> {
    let names = if DOCKER_HUB.contains(&host) { &DOCKER_HUB[..] } else { &[host][..] };
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
            return Err("holds no credentials (are they in a credential helper?)");
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
