//! Tokens: how many, for whom, how refusals are answered, and where credentials never go.

use crate::{REPOSITORY, blob_gets, config, content, open, options, serving, statuses, token_requests};
use registry::{Config, DockerConfig, Error};
use std::path::Path;
use std::time::Duration;
use support::registry::{Action, Auth, Expired, Rule, ScriptedRegistry, TokenAuth, TokenField};

/// Writes a docker config with one entry.
fn log_in(directory: &Path, host: &str, entry: &str) -> Config {
    let path = directory.join("config.json");
    std::fs::write(&path, format!(r#"{{"auths":{{"{host}":{entry}}}}}"#)).expect("a writable file");
    Config { docker_config: DockerConfig::File(path), ..config() }
}

fn password(user: &str, password: &str) -> String {
    format!(r#"{{"username":"{user}","password":"{password}"}}"#)
}

fn credentials(password: &str) -> Option<(String, String)> {
    Some(("ann".to_owned(), password.to_owned()))
}

#[tokio::test]
async fn eight_readers_make_one_token_request() {
    let data = content(8000);
    let (server, digest) = serving(&data);
    server.set_auth(Auth::Token(TokenAuth::default()));
    let (registry, blob) = open(&server, config(), &digest, Some(8000));
    let all = || async {
        let options = options();
        let reads = (0..8u64).map(|n| blob.read(n * 1000..n * 1000 + 1000, &options));
        for (n, served) in futures::future::join_all(reads).await.into_iter().enumerate() {
            assert_eq!(served.unwrap().bytes[..], data[n * 1000..][..1000]);
        }
    };
    all().await;
    assert_eq!(token_requests(&server), 1);
    all().await;
    assert_eq!(token_requests(&server), 1, "the token is kept");
    assert_eq!(registry.counters().snapshot().auth_refreshes, 0);
    server.revoke_tokens();
    server.take_requests();
    all().await;
    assert_eq!(token_requests(&server), 1, "a token that ended is replaced once for all readers");
}

#[tokio::test]
async fn another_blob_of_the_repository_needs_no_token_request() {
    let (server, digest) = serving(&content(10));
    let other = server.put_blob(REPOSITORY, content(20));
    server.set_auth(Auth::Token(TokenAuth::default()));
    let (registry, blob) = open(&server, config(), &digest, None);
    blob.read(0..10, &options()).await.unwrap();
    let other = registry.blob(&crate::reference(&server), &other, None).unwrap();
    other.read(0..20, &options()).await.unwrap();
    assert_eq!(token_requests(&server), 1);
    assert_eq!(statuses(&blob_gets(&server)), [401, 206, 206]);
}

#[tokio::test]
async fn refused_tokens_are_replaced_once() {
    let data = content(10);
    for (expired, refusal) in [(Expired::Challenge, 401), (Expired::Forbidden, 403)] {
        let (server, digest) = serving(&data);
        server.set_auth(Auth::Token(TokenAuth { max_uses: Some(2), expired, ..TokenAuth::default() }));
        let (registry, blob) = open(&server, config(), &digest, Some(10));
        for _ in 0..3 {
            assert_eq!(blob.read(0..10, &options()).await.unwrap().bytes, data);
        }
        assert_eq!(statuses(&blob_gets(&server)), [401, 206, 206, refusal, 206]);
        assert_eq!(token_requests(&server), 2);
        assert_eq!(registry.counters().snapshot().auth_refreshes, 1);
    }
}

#[tokio::test]
async fn a_lasting_refusal_is_an_error_after_one_refresh() {
    let (server, digest) = serving(&content(10));
    server.set_auth(Auth::Token(TokenAuth { max_uses: Some(0), ..TokenAuth::default() }));
    let (_, blob) = open(&server, config(), &digest, Some(10));
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert!(matches!(&error, Error::AuthDenied { repository, .. } if repository == REPOSITORY), "{error}");
    assert_eq!(statuses(&blob_gets(&server)), [401, 401]);
    assert_eq!(token_requests(&server), 1);
    server.set_auth(Auth::None);
    blob.read(0..10, &options()).await.unwrap();
}

#[tokio::test]
async fn a_refusal_without_any_challenge_is_an_error() {
    let (server, digest) = serving(&content(10));
    server.fault(Rule::new(Action::Status(403, vec![])));
    let (_, blob) = open(&server, config(), &digest, Some(10));
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert!(error.to_string().contains("without a challenge"), "{error}");
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn the_message_of_a_refusal_names_host_repository_and_file() {
    let directory = tempfile::tempdir().unwrap();
    let (server, digest) = serving(&content(10));
    server.set_auth(Auth::Token(TokenAuth { credentials: credentials("right"), ..TokenAuth::default() }));
    for (settings, hint) in [
        (log_in(directory.path(), &server.host(), &password("ann", "wrong")), "entry for"),
        (log_in(directory.path(), "elsewhere.example", &password("ann", "right")), "has no entry for"),
        (config(), "no source of logins is configured"),
    ] {
        let (_, blob) = open(&server, settings, &digest, Some(10));
        let error = blob.read(0..10, &options()).await.unwrap_err();
        let text = error.to_string();
        assert_eq!(error.reason(), "auth_denied", "{text}");
        for part in [server.host().as_str(), REPOSITORY, hint] {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[tokio::test]
async fn every_form_of_credentials_works() {
    let directory = tempfile::tempdir().unwrap();
    let data = content(10);
    let token =
        |field| Auth::Token(TokenAuth { credentials: credentials("pass"), field, ..TokenAuth::default() });
    let basic = Auth::Basic { user: "ann".into(), password: "pass".into() };
    for (auth, entry) in [
        (token(TokenField::Token), password("ann", "pass")),
        (token(TokenField::AccessToken), r#"{"auth":"YW5uOnBhc3M="}"#.to_owned()),
        (token(TokenField::AccessToken), r#"{"auth":"YW5uOng=","identitytoken":"pass"}"#.to_owned()),
        (basic, r#"{"auth":"YW5uOnBhc3M="}"#.to_owned()),
    ] {
        let (server, digest) = serving(&data);
        server.set_auth(auth.clone());
        let (_, blob) = open(&server, log_in(directory.path(), &server.host(), &entry), &digest, None);
        let outcome = blob.read(0..10, &options()).await;
        assert_eq!(outcome.unwrap_or_else(|e| panic!("{auth:?} {entry}: {e}")).bytes, data);
        blob.read(0..10, &options()).await.unwrap();
        assert_eq!(statuses(&blob_gets(&server)), [401, 206, 206]);
    }
}

#[tokio::test]
async fn a_new_password_on_disk_is_used_at_the_next_refusal() {
    let directory = tempfile::tempdir().unwrap();
    let (server, digest) = serving(&content(10));
    server.set_auth(Auth::Basic { user: "ann".into(), password: "first".into() });
    let settings = log_in(directory.path(), &server.host(), &password("ann", "first"));
    let (_, blob) = open(&server, settings, &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    server.set_password("other");
    assert_eq!(blob.read(0..10, &options()).await.unwrap_err().reason(), "auth_denied");
    log_in(directory.path(), &server.host(), &password("ann", "other"));
    blob.read(0..10, &options()).await.unwrap();
}

#[tokio::test]
async fn a_failing_token_server_is_retried() {
    let (server, digest) = serving(&content(10));
    let tokens = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth { realm: Some(tokens.url()), ..TokenAuth::default() }));
    tokens.stop();
    let (_, blob) = open(&server, config(), &digest, Some(10));
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert_eq!(error.reason(), "unavailable", "{error}");
    tokens.restart();
    blob.read(0..10, &options()).await.unwrap();
}

#[tokio::test]
async fn credentials_go_to_the_realm_and_the_token_to_the_registry() {
    let directory = tempfile::tempdir().unwrap();
    let (server, digest) = serving(&content(10));
    let tokens = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth {
        realm: Some(tokens.url()),
        credentials: credentials("pass"),
        ttl: Some(Duration::from_secs(300)),
        ..TokenAuth::default()
    }));
    let settings = log_in(directory.path(), &server.host(), &password("ann", "pass"));
    let (_, blob) = open(&server, settings, &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    let schemes = |server: &ScriptedRegistry| -> Vec<Option<String>> {
        server.requests().into_iter().map(|r| r.authorization.map(|a| a.scheme)).collect()
    };
    assert_eq!(schemes(&tokens), [Some("Basic".to_owned())]);
    assert_eq!(schemes(&server), [None, Some("Bearer".to_owned())]);
    assert!(tokens.requests()[0].query.contains("scope=repository%3Ateam%2Fapp%3Apull"));
}
