//! Files with logins: docker's config file, and the containers tools' `auth.json`, which has the same format.
//!
//! The parsed file is used again only while its modification time and size stay the same. What a helper answered is used
//! again for a short time only: a program is not run for every request.
//!
//! Formats: docker's CLI reference, "Configuration files": `auths`, keyed by host or by URL, each with
//! `auth` (base64 of `user:password`), `username` and `password`, or `identitytoken`; `credHelpers`, which name a helper
//! for a host, and `credsStore`, the helper for all others. `containers-auth.json(5)`: keys may go on with a namespace or
//! a repository, and the longest counts.

use super::kept::Kept;
use super::watched::{Unread, Watched};
use super::{
    Answer, Credential, DOCKER_HUB, FAILED, Identity, Place, decode_auth, helper, host_of, names_of,
};
use crate::config::{ContainersAuth, DockerConfig};
use crate::secret::Secret;
use serde::Deserialize;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

/// How long a helper's answer is used again. Clouds' tokens live for an hour or more; one that is refused is dropped.
const HELPED: Duration = Duration::from_secs(60);
/// Docker Hub's name at helpers.
const DOCKER_HUB_SERVER: &str = "https://index.docker.io/v1/";

/// What the keys of a file may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keys {
    Hosts,
    Namespaces,
}

/// One file.
#[derive(Debug)]
pub(super) struct AuthFile {
    name: &'static str,
    file: Watched<Contents>,
    keys: Keys,
    /// It is looked for where it usually is: that it is not there says nothing.
    usual: bool,
    /// By helper and server.
    helped: Kept<(String, String), Result<Option<Credential>, String>>,
    /// Where helpers are, if not in the search path.
    helpers: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Contents {
    auths: HashMap<String, Entry>,
    #[serde(rename = "credHelpers")]
    helpers: HashMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

/// One login as docker writes it; pull secrets and plugins do as well.
#[derive(Deserialize, Clone, Default)]
#[serde(default)]
pub(super) struct Entry {
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

impl Entry {
    pub(super) fn credential(&self) -> Result<Credential, &'static str> {
        if !self.identitytoken.is_empty() {
            return Ok(Credential::IdentityToken(Secret::new(&self.identitytoken)));
        }
        if !self.auth.is_empty() {
            return decode_auth(&self.auth);
        }
        if self.username.is_empty() {
            return Err("holds no credentials");
        }
        Ok(Credential::Password { user: self.username.clone(), password: Secret::new(&self.password) })
    }
}

impl AuthFile {
    /// Docker's.
    pub(super) fn docker(config: &DockerConfig) -> Option<Self> {
        Some(Self::at("docker config", config.path()?, Keys::Hosts, false))
    }

    /// Those of podman, buildah and skopeo, in the order they are looked at.
    pub(super) fn containers(config: &ContainersAuth) -> Vec<Self> {
        let named = |path, usual| Self::at("containers auth file", path, Keys::Namespaces, usual);
        match config {
            ContainersAuth::Disabled => Vec::new(),
            ContainersAuth::File(path) => vec![named(path.clone(), false)],
            ContainersAuth::FromEnvironment => {
                let variable =
                    |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
                let user = std::fs::metadata("/proc/self").map_or(0, |own| own.uid());
                let (paths, usual) = containers_paths(variable, user);
                paths.into_iter().map(|path| named(path, usual)).collect()
            }
        }
    }

    fn at(name: &'static str, path: PathBuf, keys: Keys, usual: bool) -> Self {
        Self { name, file: Watched::new(path), keys, usual, helped: Kept::default(), helpers: None }
    }

    /// A missing or unreadable file is no error: the next source is asked, and if the request is refused in the end, the
    /// message says what was wrong with the file.
    pub(super) async fn answer(&self, place: Place<'_>) -> Answer {
        // serde_json's message may quote a value of the wrong type: only the place is passed on.
        let parse = |text: &[u8]| {
            serde_json::from_slice(text)
                .map_err(|e| format!("is not valid (line {}, column {})", e.line(), e.column()))
        };
        let mut quiet = false;
        let (credential, said) = match self.file.read(parse).await {
            Err(Unread { why, missing }) => {
                quiet = missing && self.usual;
                (None, why)
            }
            Ok(contents) => self.find_in(&contents, place).await,
        };
        let source = format!("{} {}", self.name, self.file.path().display());
        Answer { source, credentials: credential.into_iter().collect(), said, quiet }
    }

    /// As docker looks: the helper that is named for the host, else that for all, else the file's own entries.
    async fn find_in(&self, contents: &Contents, place: Place<'_>) -> (Option<Credential>, String) {
        let host = place.host;
        let names = names_of(host);
        let named = names.iter().find_map(|name| contents.helpers.get(*name));
        let named = named.or_else(|| {
            names.contains(&"docker.io").then(|| contents.helpers.get(DOCKER_HUB_SERVER)).flatten()
        });
        let mut tried = String::new();
        if let Some(name) = named.or(Some(&contents.store)).filter(|name| !name.is_empty()) {
            let helper = format!("helper docker-credential-{name}");
            match self.help(name, host).await {
                Ok(Some(credential)) => return (Some(credential), format!("{helper} for {host}")),
                Ok(None) => tried = format!("{helper} knows nothing of {host}; "),
                Err(why) => tried = format!("{helper} {why}; "),
            }
        }
        let found = match self.keys {
            Keys::Hosts => lookup(&contents.auths, host, self.keys).map(|entry| (host.to_owned(), entry)),
            Keys::Namespaces => lookup_namespaces(&contents.auths, place),
        };
        match found {
            None => (None, format!("{tried}has no entry for {host}")),
            Some((key, entry)) => match entry.credential() {
                Ok(credential) => (Some(credential), format!("{tried}entry for {key}")),
                Err(why) => (None, format!("{tried}entry for {key} {why}")),
            },
        }
    }

    /// What a helper says, or said a moment ago.
    async fn help(&self, name: &str, host: &str) -> Result<Option<Credential>, String> {
        let server = if DOCKER_HUB.contains(&host) { DOCKER_HUB_SERVER } else { host };
        let key = (name.to_owned(), server.to_owned());
        if let Some(outcome) = self.helped.get(&key) {
            return outcome;
        }
        let _turn = self.helped.turn(&key).await;
        if let Some(outcome) = self.helped.get(&key) {
            return outcome;
        }
        let outcome = helper::get(name, server, self.helpers.as_ref()).await;
        self.helped.put(key, outcome.clone(), if outcome.is_ok() { HELPED } else { FAILED });
        outcome
    }

    /// The file is read anew, and helpers are asked anew for what was refused.
    pub(super) fn refuse(&self, identity: Identity) {
        self.file.forget();
        // A failure ends by itself.
        let gave = |outcome: &Result<Option<Credential>, String>| {
            outcome.as_ref().is_ok_and(|credential| Identity::of(credential.as_ref()) == identity)
        };
        self.helped.refuse(gave);
    }
}

fn lookup<'a>(auths: &'a HashMap<String, Entry>, host: &str, keys: Keys) -> Option<&'a Entry> {
    let names = names_of(host);
    // An exact key wins over a URL of the same host; among URLs the order is fixed by the text.
    names.iter().find_map(|name| auths.get(*name)).or_else(|| {
        auths
            .iter()
            .filter(|(key, _)| names.contains(&host_of(key)) && (keys == Keys::Hosts || is_host(key)))
            .min_by_key(|(key, _)| *key)
            .map(|(_, e)| e)
    })
}

/// Whether a key is a host or a URL, and not a namespace at a host.
fn is_host(key: &str) -> bool {
    let path =
        key.split_once("://").map_or(key, |(_, rest)| rest).split_once('/').map_or("", |(_, path)| path);
    key.contains("://") || matches!(path.trim_end_matches('/'), "" | "v1" | "v2")
}

/// The longest key that the place is in.
fn lookup_namespaces<'a>(auths: &'a HashMap<String, Entry>, place: Place<'_>) -> Option<(String, &'a Entry)> {
    let names = names_of(place.host);
    let mut rest = place.repository;
    loop {
        let keys = names.iter().map(|name| format!("{name}/{rest}"));
        if let Some(found) = keys.into_iter().find_map(|key| auths.get(&key).map(|entry| (key, entry))) {
            return Some(found);
        }
        match rest.rsplit_once('/') {
            Some((above, _)) => rest = above,
            None => {
                return lookup(auths, place.host, Keys::Namespaces)
                    .map(|entry| (place.host.to_owned(), entry));
            }
        }
    }
}

/// Where the containers tools look, and whether nobody named a place.
fn containers_paths(variable: impl Fn(&str) -> Option<PathBuf>, user: u32) -> (Vec<PathBuf>, bool) {
    if let Some(named) = variable("REGISTRY_AUTH_FILE") {
        return (vec![named], false);
    }
    let run = variable("XDG_RUNTIME_DIR").map(|directory| directory.join("containers/auth.json"));
    let own = PathBuf::from(format!("/run/containers/{user}/auth.json"));
    let home = variable("HOME").map(|home| home.join(".config/containers/auth.json"));
    (run.into_iter().chain([own]).chain(home).collect(), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.into(), password: Secret::new(password) })
    }

    /// What a file said.
    struct Found {
        credential: Option<Credential>,
        tried: String,
    }

    fn docker(path: PathBuf) -> AuthFile {
        AuthFile::docker(&DockerConfig::File(path)).unwrap()
    }

    async fn ask(file: &AuthFile, host: &str) -> Found {
        let Answer { source, credentials, said, .. } =
            file.answer(Place { host, repository: "team/app" }).await;
        Found { credential: credentials.into_iter().next(), tried: format!("{source}: {said}") }
    }

    async fn find(text: &str, host: &str) -> Found {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        ask(&docker(path), host).await
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
        let missing = ask(&docker("/nonexistent/config.json".into()), "r").await;
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
        let mut credentials = docker(path);
        credentials.helpers = Some(directory.path().to_owned());
        for _ in 0..3 {
            let found = ask(&credentials, "cloud.example").await;
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
        credentials.refuse(Identity::of(password("one", "s").as_ref()));
        assert_eq!(ask(&credentials, "cloud.example").await.credential, password("two", "s"));
        assert_eq!(ask(&credentials, "docker.io").await.credential, password("two", "s"));
        assert!(asked().ends_with("https://index.docker.io/v1/\n"), "{}", asked());
        // What no helper knows may be in the file.
        assert_eq!(ask(&credentials, "kept.example").await.credential, password("u", "p"));
        let none = ask(&credentials, "both.example").await;
        assert_eq!(none.credential, None);
        assert!(none.tried.contains("docker-credential-store knows nothing"), "{}", none.tried);
        let broken = ask(&credentials, "broken.example").await;
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
        let credentials = docker(path.clone());
        assert_eq!(ask(&credentials, "r").await.credential, None);
        write("one");
        let first = ask(&credentials, "r").await;
        assert_eq!(first.credential, password("one", "p"));
        write("three");
        let second = ask(&credentials, "r").await;
        assert_eq!(second.credential, password("three", "p"));
        assert_ne!(Identity::of(first.credential.as_ref()), Identity::of(second.credential.as_ref()));
    }

    #[tokio::test]
    async fn the_longest_key_of_a_containers_file_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("auth.json");
        let entry = |user: &str| serde_json::json!({ "username": user, "password": "p" });
        let auths = serde_json::json!({
            "r.example": entry("host"), "r.example/team": entry("team"), "r.example/team/app": entry("app"),
            "docker.io/library": entry("library"), "https://index.docker.io/v1/": entry("hub"),
            "only.example/team": entry("x"),
        });
        std::fs::write(&path, serde_json::json!({ "auths": auths }).to_string()).unwrap();
        let file = AuthFile::containers(&ContainersAuth::File(path.clone())).remove(0);
        for (host, repository, expected) in [
            ("r.example", "team/app", Some("app")),
            ("r.example", "team/app/sub", Some("app")),
            ("r.example", "team/apps", Some("team")),
            ("r.example", "teams/app", Some("host")),
            ("docker.io", "library/x", Some("library")),
            ("registry-1.docker.io", "other/x", Some("hub")),
            ("only.example", "other/app", None),
        ] {
            let answer = file.answer(Place { host, repository }).await;
            let expected: Vec<_> = expected.and_then(|user| password(user, "p")).into_iter().collect();
            assert_eq!(answer.credentials, expected, "{host}/{repository}: {}", answer.said);
        }
        // Docker knows hosts only, whatever follows.
        let answer = docker(path).answer(Place { host: "only.example", repository: "other/app" }).await;
        assert_eq!(answer.credentials, [password("x", "p").unwrap()]);
    }

    #[test]
    fn where_containers_tools_look() {
        let paths = |set: &[(&str, &str)]| {
            let variable =
                |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value));
            let (paths, usual) = containers_paths(variable, 7);
            (paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" "), usual)
        };
        let run = "/run/containers/7/auth.json";
        assert_eq!(paths(&[("REGISTRY_AUTH_FILE", "/x"), ("HOME", "/h")]), ("/x".to_owned(), false));
        assert_eq!(paths(&[]), (run.to_owned(), true));
        let all = format!("/r/containers/auth.json {run} /h/.config/containers/auth.json");
        assert_eq!(paths(&[("XDG_RUNTIME_DIR", "/r"), ("HOME", "/h")]), (all, true));
    }
}
