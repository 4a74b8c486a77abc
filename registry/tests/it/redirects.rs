//! Redirects: kept, walked again when they end, and never given what belongs to the registry.

use crate::{
    REPOSITORY, blob_gets, config, content, mirrored, open, options, serving, statuses, token_requests,
};
use registry::{Config, Error};
use std::time::Duration;
use support::registry::{Action, Auth, Rule, ScriptedRegistry, TokenAuth};

/// A registry that redirects blobs to a second server.
fn redirecting(data: &[u8], expires_after: Option<u64>) -> (ScriptedRegistry, ScriptedRegistry, String) {
    let (server, digest) = serving(data);
    let storage = ScriptedRegistry::start();
    storage.put_blob(REPOSITORY, data.to_vec());
    server.fault(Rule::new(Action::Redirect { to: storage.url(), expires_after }).path("/blobs/"));
    (server, storage, digest)
}

#[tokio::test]
async fn a_redirect_is_walked_once() {
    let data = content(1000);
    let (server, storage, digest) = redirecting(&data, None);
    let (registry, blob) = open(&server, config(), &digest, Some(1000));
    for at in [0, 500, 999] {
        let served = blob.clone().read(at..at + 1, &options()).await.unwrap();
        assert_eq!(served.bytes[..], data[at as usize..][..1]);
        assert_eq!(served.host.to_string(), server.host(), "blame goes to the registry that redirected");
    }
    assert_eq!(statuses(&server.requests()), [307]);
    assert_eq!(statuses(&storage.requests()), [206, 206, 206]);
    assert_eq!(registry.counters().snapshot().redirects_walked, 1);
    blob.forget_route();
    blob.read(0..1, &options()).await.unwrap();
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn an_ended_redirect_is_walked_again() {
    let data = content(1000);
    let (server, storage, digest) = redirecting(&data, Some(2));
    let (_, blob) = open(&server, config(), &digest, Some(1000));
    for _ in 0..3 {
        assert_eq!(blob.read(10..20, &options()).await.unwrap().bytes, data[10..20]);
    }
    assert_eq!(statuses(&server.requests()), [307, 307]);
    assert_eq!(statuses(&storage.requests()), [206, 206, 403, 206]);
    storage.take_requests();
    server.expire_redirects();
    storage.remove_blob(REPOSITORY, &digest);
    let error = blob.read(10..20, &options()).await.unwrap_err();
    assert_eq!(statuses(&storage.requests()), [403, 404], "walked again once, not more");
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn a_redirect_is_not_kept_beyond_its_time() {
    let (server, storage, digest) = redirecting(&content(10), None);
    let settings = Config { redirect_ttl: Duration::ZERO, ..config() };
    let (_, blob) = open(&server, settings, &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    blob.read(0..10, &options()).await.unwrap();
    assert_eq!((server.requests().len(), storage.requests().len()), (2, 2));
}

#[tokio::test]
async fn a_dead_target_is_walked_around() {
    let data = content(10);
    let (server, storage, digest) = redirecting(&data, None);
    let (_, blob) = open(&server, config(), &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    storage.stop();
    server.clear_all();
    assert_eq!(blob.read(0..10, &options()).await.unwrap().bytes, data);
}

#[tokio::test]
async fn a_target_that_answers_nonsense_is_forgotten() {
    let data = content(10);
    let (server, storage, digest) = redirecting(&data, None);
    let (_, blob) = open(&server, config(), &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    storage.fault(Rule::new(Action::Headers(vec![("Content-Range".into(), "bytes 0-9/11".into())])));
    assert_eq!(blob.read(0..10, &options()).await.unwrap_err().reason(), "bad_response");
    server.clear_all();
    assert_eq!(blob.read(0..10, &options()).await.unwrap().bytes, data, "served by the registry itself");
}

#[tokio::test]
async fn a_kept_redirect_needs_no_token() {
    let (server, _storage, digest) = redirecting(&content(10), None);
    server.set_auth(Auth::Token(TokenAuth { ttl: Some(Duration::from_secs(1)), ..TokenAuth::default() }));
    let (_, blob) = open(&server, config(), &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    server.revoke_tokens();
    server.stop();
    blob.read(0..10, &options()).await.unwrap();
    assert_eq!(token_requests(&server), 1);
}

#[tokio::test]
async fn targets_get_no_credentials_and_no_headers() {
    let data = content(10);
    let (server, storage, digest) = redirecting(&data, None);
    server.set_auth(Auth::Token(TokenAuth::default()));
    let mut settings = mirrored(&server, &[&server]);
    let host = settings.hosts.get_mut(&server.host()).unwrap();
    host.mirrors[0].headers = vec![("X-Pass".into(), "hunter2".into())];
    let (_, blob) = open(&server, settings, &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    blob.read(0..10, &options()).await.unwrap();
    let asked = blob_gets(&server);
    assert_eq!(statuses(&asked), [401, 307]);
    assert!(asked[1].authorization.is_some() && asked[1].headers.contains_key("x-pass"));
    let sent = storage.requests();
    assert_eq!(sent.len(), 2);
    for request in sent {
        assert!(request.authorization.is_none() && !request.headers.contains_key("x-pass"), "{request:?}");
        assert!(!request.headers.contains_key("referer") && !request.headers.contains_key("cookie"));
    }
}

#[tokio::test]
async fn a_challenge_by_a_target_is_not_answered() {
    let directory = tempfile::tempdir().unwrap();
    let (server, digest) = serving(&content(10));
    let (thief, tokens) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    let challenge = format!(r#"Bearer realm="{}/token",service="x""#, tokens.url());
    let refusal = vec![("WWW-Authenticate".to_owned(), challenge)];
    thief.fault(Rule::new(Action::Status(401, refusal)));
    server
        .fault(Rule::new(Action::Status(307, vec![("Location".into(), format!("{}/x?sig=1", thief.url()))])));
    let path = directory.path().join("config.json");
    let entry = |host: String| format!(r#""{host}":{{"username":"ann","password":"pass"}}"#);
    let entries = [&server, &thief, &tokens].map(|server| entry(server.host())).join(",");
    std::fs::write(&path, format!(r#"{{"auths":{{{entries}}}}}"#)).unwrap();
    let settings = Config { docker_config: registry::DockerConfig::File(path), ..config() };
    let (_, blob) = open(&server, settings, &digest, Some(10));
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert!(matches!(&error, Error::AuthDenied { host, .. } if *host == thief.host()), "{error}");
    assert!(tokens.requests().is_empty());
    assert!(thief.requests().iter().all(|request| request.authorization.is_none()));
}

#[tokio::test]
async fn endless_or_unusable_redirects_are_given_up() {
    for location in [Some("/v2/loop"), Some("ftp://127.0.0.1/x"), Some("http://"), None] {
        let (server, digest) = serving(&content(10));
        let headers = location.map(|location| ("Location".to_owned(), location.to_owned()));
        server.fault(Rule::new(Action::Status(302, headers.into_iter().collect())));
        let (_, blob) = open(&server, config(), &digest, Some(10));
        let error = blob.read(0..10, &options()).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }), "{location:?}: {error}");
        assert!(server.requests().len() <= 4, "{location:?}");
    }
}

#[tokio::test]
async fn a_relative_redirect_stays_with_the_host_and_keeps_its_headers() {
    let data = content(10);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Redirect { to: String::new(), expires_after: None }));
    let mut settings = mirrored(&server, &[&server]);
    let host = settings.hosts.get_mut(&server.host()).unwrap();
    host.mirrors[0].headers = vec![("X-Pass".into(), "open".into())];
    let (_, blob) = open(&server, settings, &digest, Some(10));
    assert_eq!(blob.read(0..10, &options()).await.unwrap().bytes, data);
    let asked = server.requests();
    assert_eq!(statuses(&asked), [307, 206]);
    assert!(asked.iter().all(|request| request.headers["x-pass"] == "open"));
}
