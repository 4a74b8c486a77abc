//! Logins from every source: which is used for what, and what follows a refusal.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::{
    REPOSITORY, blob_gets, config, content, open, options, reference, serving, statuses, token_requests,
};
use registry::{
    Blob, Config, ContainersAuth, DockerConfig, Error, KubeletPlugins, LoginKind, PullCredentials, PullLogin,
    Reference, Registry, UploadOptions,
};
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use support::guard;
use support::registry::{Action, Auth, Expired, Rule, ScriptedRegistry, TokenAuth};
use support::system::{DockerRegistry, LOGIN};

/// A login for `user`, as a pull brings it.
pub fn brought(user: &str, password: &str) -> PullLogin {
    PullLogin { username: user.into(), password: password.into(), ..PullLogin::default() }
}

/// A store with these logins for the server's repository, the newest last.
fn pulls(server: &ScriptedRegistry, logins: &[(&str, &str)]) -> PullCredentials {
    let pulls = PullCredentials::default();
    for (user, password) in logins {
        pulls.remember(&reference(server).to_string(), brought(user, password)).unwrap();
    }
    pulls
}

/// A plugin for one host that answers with what is in its file `login`, and notes its calls.
pub struct Plugin(tempfile::TempDir);

impl Plugin {
    pub fn new(kind: &str) -> Self {
        let plugin = Self(guard::temp_dir());
        let version = "credentialprovider.kubelet.k8s.io/v1";
        let file = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: cloud\n  \
             matchImages: [HOST]\n  defaultCacheDuration: 12h\n  apiVersion: {version}\n"
        );
        // Ports are no globs: the file is completed when the host is known.
        std::fs::write(plugin.path().join("config.yaml"), file).unwrap();
        let path = plugin.path().display();
        let head = format!(
            r#"{{"kind":"CredentialProviderResponse","apiVersion":"{version}","cacheKeyType":"{kind}","auth":"#
        );
        let script =
            format!("#!/bin/sh\necho call >>{path}/calls\necho '{head}'\ncat {path}/login\necho '}}'\n");
        support::write_script(&plugin.path().join("cloud"), &script);
        plugin
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// From now on it answers with this login for images of `host`.
    pub fn knows(&self, host: &str, user: &str, password: &str) {
        let config = self.path().join("config.yaml");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text.replace("HOST", &format!("{host:?}"))).unwrap();
        let login = json!({ host: { "username": user, "password": password } });
        std::fs::write(self.path().join("login"), login.to_string()).unwrap();
    }

    fn calls(&self) -> usize {
        std::fs::read_to_string(self.path().join("calls")).unwrap_or_default().lines().count()
    }

    pub fn settings(&self) -> Option<KubeletPlugins> {
        Some(KubeletPlugins { config: self.path().join("config.yaml"), directory: self.path().to_owned() })
    }

    fn config(&self) -> Config {
        Config { kubelet_plugins: self.settings(), ..config() }
    }
}

fn basic(password: &str) -> Auth {
    Auth::Basic { user: "ann".into(), password: password.into() }
}

fn tokens(password: &str, expired: Expired) -> Auth {
    let credentials = Some(("ann".to_owned(), password.to_owned()));
    Auth::Token(TokenAuth { credentials, expired, ..TokenAuth::default() })
}

/// Writes a file with these entries by host.
fn logins_file(path: &Path, entries: &[(&str, Value)]) {
    let auths: serde_json::Map<String, Value> =
        entries.iter().map(|(key, entry)| ((*key).to_owned(), entry.clone())).collect();
    std::fs::write(path, json!({ "auths": auths }).to_string()).unwrap();
}

fn entry(user: &str, password: &str) -> Value {
    json!({ "username": user, "password": password })
}

async fn reads(blob: &Blob, data: &[u8]) {
    assert_eq!(blob.read(0..data.len() as u64, &options()).await.unwrap().bytes, data);
}

#[tokio::test]
async fn a_real_registry_takes_what_a_pull_brought_and_what_a_plugin_says() {
    if !guard::require_programs(&["docker-registry"]) {
        return;
    }
    let directory = guard::temp_dir();
    let mut server = DockerRegistry::start(directory.path());
    let image: Reference = format!("{}/{REPOSITORY}:v1", server.address()).parse().unwrap();
    let (data, registry) = (content(300_000), Registry::new(config()).unwrap());
    let digest = support::sha256_digest(&data);
    registry.put_blob(&image, &digest, data.clone().into(), UploadOptions::default()).await.unwrap();
    server.lock();
    let blob =
        |settings: Config| Registry::new(settings).unwrap().blob(&image, &digest, Some(300_000)).unwrap();
    let error = blob(config()).read(0..10, &options()).await.unwrap_err();
    assert_eq!(error.reason(), "auth_denied", "{error}");

    let store = PullCredentials::default();
    let brings = blob(Config { pull_credentials: Some(store.clone()), ..config() });
    let error = brings.read(0..10, &options()).await.unwrap_err();
    assert!(error.to_string().contains("CRI pulls: no pull of"), "{error}");
    store.remember(&image.to_string(), brought(LOGIN.0, LOGIN.1)).unwrap();
    reads(&brings, &data).await;

    let plugin = Plugin::new("Registry");
    plugin.knows(server.address(), LOGIN.0, LOGIN.1);
    let asks = blob(plugin.config());
    reads(&asks, &data).await;
    reads(&asks, &data).await;
    assert_eq!(plugin.calls(), 1);
}

#[tokio::test]
async fn a_running_source_goes_on_after_one_refresh_when_a_plugins_password_was_rotated() {
    let data = content(100);
    let forbidden = tokens("first", Expired::Forbidden);
    for auth in [basic("first"), tokens("first", Expired::Challenge), forbidden] {
        let (server, digest) = serving(&data);
        server.set_auth(auth.clone());
        let plugin = Plugin::new("Registry");
        plugin.knows(&server.host(), "ann", "first");
        let (_, blob) = open(&server, plugin.config(), &digest, Some(100));
        reads(&blob, &data).await;
        for password in ["second", "third"] {
            server.set_password(password);
            server.revoke_tokens();
            plugin.knows(&server.host(), "ann", password);
            server.take_requests();
            let before = plugin.calls();
            let all = (0..8).map(|_| reads(&blob, &data));
            futures::future::join_all(all).await;
            assert_eq!(plugin.calls(), before + 1, "{auth:?}: run anew once for all readers");
            server.take_requests();
            reads(&blob, &data).await;
            assert_eq!(statuses(&blob_gets(&server)), [206], "{auth:?}");
            // What follows a refusal stays for a moment; the next rotation is not that quick.
            tokio::time::pause();
            tokio::time::advance(std::time::Duration::from_secs(3)).await;
            tokio::time::resume();
        }
    }
}

#[tokio::test]
async fn a_403_without_a_challenge_has_the_plugin_run_anew() {
    let data = content(10);
    let (server, digest) = serving(&data);
    server.set_auth(basic("first"));
    let plugin = Plugin::new("Registry");
    plugin.knows(&server.host(), "ann", "first");
    let (registry, blob) = open(&server, plugin.config(), &digest, Some(10));
    reads(&blob, &data).await;
    server.take_requests();
    // As ECR answers when its twelve hours are over.
    server.set_auth(Auth::None);
    server.fault(Rule::new(Action::Status(403, vec![])).times(1));
    plugin.knows(&server.host(), "ann", "second");
    reads(&blob, &data).await;
    let asked = blob_gets(&server);
    assert_eq!((statuses(&asked), plugin.calls()), (vec![403, 206], 2));
    let shown = asked.iter().map(|request| request.authorization.clone().unwrap().fingerprint);
    assert_ne!(shown.clone().next(), shown.clone().next_back(), "the second time it was the new password");
    assert_eq!(registry.counters().snapshot().auth_refreshes, 1);
}

#[tokio::test]
async fn an_older_login_is_tried_when_the_newest_is_refused() {
    let data = content(10);
    for auth in [basic("right"), tokens("right", Expired::Challenge)] {
        let (server, digest) = serving(&data);
        server.set_auth(auth.clone());
        let store = pulls(&server, &[("ann", "right"), ("bob", "x"), ("cid", "y")]);
        let settings = Config { pull_credentials: Some(store.clone()), ..config() };
        let (registry, blob) = open(&server, settings, &digest, Some(10));
        assert!(registry.pull_credentials().is_some());
        reads(&blob, &data).await;
        server.take_requests();
        reads(&blob, &data).await;
        assert_eq!(statuses(&server.requests()), [206], "{auth:?}: the refused ones are passed over");
        // A new one is the newest, and the one before is still there when it is refused.
        store.remember(&reference(&server).to_string(), brought("dan", "z")).unwrap();
        reads(&blob, &data).await;
        let error = {
            store.forget(&reference(&server).to_string()).unwrap();
            server.revoke_tokens();
            blob.read(0..10, &options()).await.unwrap_err()
        };
        assert!(error.to_string().contains("no pull of"), "{auth:?}: {error}");
    }
}

#[tokio::test]
async fn the_next_source_is_asked_when_the_first_ones_login_is_refused() {
    let directory = guard::temp_dir();
    let data = content(10);
    for auth in [basic("right"), tokens("right", Expired::Forbidden)] {
        let (server, digest) = serving(&data);
        server.set_auth(auth);
        let plugin = Plugin::new("Image");
        plugin.knows(&server.host(), "ann", "ended");
        let (docker, containers) = (directory.path().join("config.json"), directory.path().join("auth.json"));
        logins_file(&docker, &[(&server.host(), entry("ann", "old"))]);
        logins_file(&containers, &[(&format!("{}/team", server.host()), entry("ann", "wrong"))]);
        let settings = Config {
            pull_credentials: Some(pulls(&server, &[("ann", "gone")])),
            docker_config: DockerConfig::File(docker),
            containers_auth: ContainersAuth::File(containers.clone()),
            ..plugin.config()
        };
        let (registry, blob) = open(&server, settings, &digest, Some(10));
        let error = blob.read(0..10, &options()).await.unwrap_err();
        let words = error.to_string();
        let mut rest = words.as_str();
        for part in [
            &format!("auth failed at host {} for repository {REPOSITORY} (tried: ", server.host()),
            "CRI pulls: login of a pull of",
            "(refused); kubelet plugins: cloud for",
            "(refused); docker config ",
            "(refused); containers auth file ",
            "/team (refused)",
        ] {
            rest = rest.split_once(part).unwrap_or_else(|| panic!("{part}: {words}")).1;
        }
        for secret in ["gone", "ended", "old", "wrong"] {
            assert!(!words.contains(&format!("\"{secret}")), "{words}");
        }
        // The last of them is put right: it is used, whatever the others say.
        logins_file(&containers, &[(&format!("{}/team", server.host()), entry("ann", "right"))]);
        reads(&blob, &data).await;
        let login = registry.logins(&reference(&server)).await.unwrap().remove(0);
        let sources: Vec<&str> =
            login.answers.iter().map(|answer| answer.source.split(" /").next().unwrap()).collect();
        assert_eq!(sources, ["CRI pulls", "kubelet plugins", "docker config", "containers auth file"]);
        assert!(login.answers.iter().all(|answer| answer.kind == LoginKind::Password), "{login:?}");
    }
}

#[tokio::test]
async fn a_registry_that_refused_everybody_for_a_while_is_shown_all_logins_again() {
    let data = content(10);
    for auth in [basic("right"), tokens("right", Expired::Challenge)] {
        let (server, digest) = serving(&data);
        server.set_auth(auth.clone());
        let store = pulls(&server, &[("ann", "right"), ("bob", "x")]);
        let settings = Config { pull_credentials: Some(store), ..config() };
        let (_, blob) = open(&server, settings, &digest, Some(10));
        reads(&blob, &data).await;
        server.set_password("lost");
        server.revoke_tokens();
        for _ in 0..2 {
            assert_eq!(blob.read(0..10, &options()).await.unwrap_err().reason(), "auth_denied", "{auth:?}");
        }
        server.set_password("right");
        reads(&blob, &data).await;
    }
}

#[tokio::test]
async fn a_login_of_one_repository_is_not_used_for_another() {
    let data = content(10);
    for auth in [basic("pass"), tokens("pass", Expired::Challenge)] {
        let (server, digest) = serving(&data);
        server.put_blob("team/other", data.clone());
        server.set_auth(auth);
        let settings = Config { pull_credentials: Some(pulls(&server, &[("ann", "pass")])), ..config() };
        let (registry, blob) = open(&server, settings, &digest, Some(10));
        reads(&blob, &data).await;
        server.take_requests();
        let other: Reference = format!("{}/team/other:v1", server.host()).parse().unwrap();
        let other = registry.blob(&other, &digest, Some(10)).unwrap();
        let error = other.read(0..10, &options()).await.unwrap_err();
        assert!(
            matches!(&error, Error::AuthDenied { repository, .. } if repository == "team/other"),
            "{error}"
        );
        assert!(server.requests().iter().all(|request| request.authorization.is_none()));
    }
}

#[tokio::test]
async fn tokens_of_two_identities_are_not_mixed() {
    let data = content(10);
    let (server, digest) = serving(&data);
    server.set_auth(tokens("ann's", Expired::Challenge));
    let store = pulls(&server, &[("ann", "ann's")]);
    let (_, blob) =
        open(&server, Config { pull_credentials: Some(store.clone()), ..config() }, &digest, None);
    reads(&blob, &data).await;
    // Another pod's login comes: the token that is kept was not given for it.
    store.forget(&reference(&server).to_string()).unwrap();
    store.remember(&reference(&server).to_string(), brought("bob", "bob's")).unwrap();
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert_eq!(error.reason(), "auth_denied", "{error}");
}

#[tokio::test]
async fn a_registry_token_is_shown_as_it_is() {
    let data = content(10);
    let (server, digest) = serving(&data);
    server.set_auth(Auth::Token(TokenAuth::default()));
    let mut stream = TcpStream::connect(server.host()).unwrap();
    let query = format!("service={}&scope=repository%3Ateam%2Fapp%3Apull", server.host().replace(':', "%3A"));
    let host = server.host();
    write!(stream, "GET /token?{query} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let body = &answer[answer.find('{').unwrap()..=answer.rfind('}').unwrap()];
    let token = serde_json::from_str::<Value>(body).unwrap()["token"].as_str().unwrap().to_owned();
    server.take_requests();
    let store = PullCredentials::default();
    let login = PullLogin { registry_token: token, ..brought("ann", "unused") };
    store.remember(&reference(&server).to_string(), login).unwrap();
    let (_, blob) = open(&server, Config { pull_credentials: Some(store), ..config() }, &digest, None);
    reads(&blob, &data).await;
    assert_eq!((statuses(&blob_gets(&server)), token_requests(&server)), (vec![401, 206], 0));
}

#[tokio::test]
async fn eight_readers_do_not_notice_that_tokens_end_every_second() {
    let data = content(8000);
    let (server, digest) = serving(&data);
    let ttl = Some(std::time::Duration::from_secs(1));
    server.set_auth(Auth::Token(TokenAuth { ttl, ..TokenAuth::default() }));
    let (_, blob) = open(&server, config(), &digest, Some(8000));
    let reader = async |n: usize| {
        let options = options();
        while token_requests(&server) < 4 {
            let at = n * 1000;
            let served = blob.read(at as u64..at as u64 + 1000, &options).await.unwrap();
            assert_eq!(served.bytes[..], data[at..][..1000]);
        }
    };
    futures::future::join_all((0..8).map(reader)).await;
}
