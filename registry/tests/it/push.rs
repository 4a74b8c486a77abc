//! What a repository has, mounts, manifests: asked of the origin alone, with a token that may push.

use crate::{REPOSITORY, config, content, later, mirrored, reference, serving, statuses, token_requests};
use registry::{Error, Reference, Registry};
use std::time::Duration;
use support::registry::{Action, Auth, Logged, MANIFEST, Rule, ScriptedRegistry, TokenAuth};
use support::sha256_digest;
use tokio::time::Instant;

const DOCUMENT: &[u8] = br#"{"schemaVersion":2}"#;

fn client() -> Registry {
    Registry::new(config()).expect("usable settings")
}

fn of_method<'a>(requests: &'a [Logged], method: &str) -> Vec<&'a Logged> {
    requests.iter().filter(|request| request.method == method).collect()
}

/// `server` with tokens for everything but this.
fn withholding(server: &ScriptedRegistry, repository: &str, action: &str) {
    let withheld = vec![(repository.to_owned(), action.to_owned())];
    server.set_auth(Auth::Token(TokenAuth { withheld, ..TokenAuth::default() }));
}

#[tokio::test]
async fn what_is_there_is_known_by_its_size() {
    let (server, digest) = serving(&content(1000));
    server.set_auth(Auth::Token(TokenAuth::default()));
    let registry = client();
    assert_eq!(registry.has_blob(&reference(&server), &digest, later()).await.unwrap(), Some(1000));
    let missing = sha256_digest(b"missing");
    assert_eq!(registry.has_blob(&reference(&server), &missing, later()).await.unwrap(), None);
    let error = registry.has_blob(&reference(&server), "sha256:../x", later()).await.unwrap_err();
    assert!(matches!(error, Error::BadDigest { .. }), "{error}");
    assert_eq!(statuses(&of_method_owned(&server, "HEAD")), [401, 200, 404]);
    assert_eq!(token_requests(&server), 1);
    let scope = &server.requests()[1].query;
    assert!(scope.contains("scope=repository%3Ateam%2Fapp%3Apull%2Cpush"), "{scope}");
}

fn of_method_owned(server: &ScriptedRegistry, method: &str) -> Vec<Logged> {
    server.requests().into_iter().filter(|request| request.method == method).collect()
}

#[tokio::test]
async fn a_redirect_tells_what_is_there_unless_its_target_refuses() {
    let (server, digest) = serving(&content(1000));
    let storage = ScriptedRegistry::start();
    storage.put_blob(REPOSITORY, content(1000));
    server.fault(Rule::new(Action::Redirect { to: storage.url(), expires_after: None }));
    let has = async || client().has_blob(&reference(&server), &digest, later()).await.unwrap();
    assert_eq!(has().await, Some(1000));
    storage.fault(Rule::new(Action::Status(403, vec![])));
    assert_eq!(has().await, None);
}

#[tokio::test]
async fn mirrors_are_never_asked() {
    let (origin, digest) = serving(&content(100));
    let mirror = ScriptedRegistry::start();
    let registry = Registry::new(mirrored(&origin, &[&mirror])).unwrap();
    let target = reference(&origin);
    registry.has_blob(&target, &digest, later()).await.unwrap();
    registry.mount_blob(&target, &digest, "other", later()).await.unwrap();
    registry.put_manifest(&target, MANIFEST, DOCUMENT.into(), later()).await.unwrap();
    let new = sha256_digest(b"new");
    registry.put_blob(&target, &new, "new".into(), Default::default()).await.unwrap();
    assert_eq!(origin.blob(REPOSITORY, &new).unwrap(), "new");
    assert!(mirror.requests().is_empty());
}

#[tokio::test]
async fn a_mount_copies_nothing_and_leaves_nothing_open() {
    let server = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth::default()));
    let digest = server.put_blob("other/app", content(100));
    let registry = client();
    assert!(registry.mount_blob(&reference(&server), &digest, "other/app", later()).await.unwrap());
    assert_eq!(server.blob(REPOSITORY, &digest).unwrap(), content(100));
    let token = server.requests().into_iter().find(|request| request.path == "/token").unwrap();
    let scopes = "scope=repository%3Ateam%2Fapp%3Apull%2Cpush&scope=repository%3Aother%2Fapp%3Apull";
    assert!(token.query.contains(scopes), "{}", token.query);

    let missing = sha256_digest(b"missing");
    assert!(!registry.mount_blob(&reference(&server), &missing, "other/app", later()).await.unwrap());
    assert_eq!(server.uploads_open(), 0, "the upload that was begun instead is cancelled");
    assert_eq!(statuses(&of_method_owned(&server, "DELETE")), [204]);

    for odd in ["../x", "Other", "", "a?b=c"] {
        let error = registry.mount_blob(&reference(&server), &digest, odd, later()).await.unwrap_err();
        assert!(matches!(error, Error::BadReference { .. }), "{odd}: {error}");
    }
}

#[tokio::test]
async fn a_refused_mount_is_no_error_and_a_silent_host_is() {
    let server = ScriptedRegistry::start();
    let digest = server.put_blob("secret/app", content(100));
    withholding(&server, "secret/app", "pull");
    let mount =
        async |deadline| client().mount_blob(&reference(&server), &digest, "secret/app", deadline).await;
    assert!(!mount(later()).await.unwrap());
    server.set_auth(Auth::None);
    let refusal = server.fault(Rule::new(Action::Status(405, vec![])).method("POST"));
    assert!(!mount(later()).await.unwrap());
    server.clear(refusal);
    server.fault(Rule::new(Action::Status(503, vec![])).times(2));
    assert!(mount(later()).await.unwrap());
    server.fault(Rule::new(Action::Hang));
    let error = mount(Instant::now() + Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn manifests_by_tag_and_by_digest() {
    let server = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth::default()));
    let registry = client();
    let digest = sha256_digest(DOCUMENT);
    let tagged = reference(&server);
    assert_eq!(registry.put_manifest(&tagged, MANIFEST, DOCUMENT.into(), later()).await.unwrap(), digest);
    let expected = Some((MANIFEST.to_owned(), DOCUMENT.into()));
    assert_eq!(server.manifest(REPOSITORY, "v1"), expected);
    let other = br#"{"schemaVersion":2,"x":1}"#;
    let other_digest = sha256_digest(other);
    let pinned: Reference = format!("{}/{REPOSITORY}@{other_digest}", server.host()).parse().unwrap();
    let put = registry.put_manifest(&pinned, MANIFEST, other[..].into(), later()).await.unwrap();
    assert_eq!(put, other_digest);
    assert!(server.manifest(REPOSITORY, &other_digest).is_some());
    let requests = server.requests();
    let puts = of_method(&requests, "PUT");
    assert_eq!(puts.iter().map(|put| put.status).collect::<Vec<_>>(), [401, 201, 201]);
    assert!(puts[1].path.ends_with("/manifests/v1") && puts[2].path.ends_with(&other_digest));
    assert_eq!(registry.manifest(&tagged, None, later()).await.unwrap().digest, digest);
}

#[tokio::test]
async fn manifests_that_cannot_be_right_are_not_sent() {
    let server = ScriptedRegistry::start();
    let registry = client();
    let target = reference(&server);
    let pinned: Reference = format!("{target}@{}", sha256_digest(b"other")).parse().unwrap();
    let put = async |reference: &Reference, media_type: &str, bytes: Vec<u8>| {
        registry.put_manifest(reference, media_type, bytes.into(), later()).await.unwrap_err()
    };
    let error = put(&pinned, MANIFEST, DOCUMENT.to_vec()).await;
    assert!(matches!(error, Error::BadDigest { .. }), "{error}");
    let error = put(&target, MANIFEST, vec![b' '; (4 << 20) + 1]).await;
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let error = put(&target, "a\nb", DOCUMENT.to_vec()).await;
    assert!(matches!(error, Error::Config { .. }), "{error}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn what_the_registry_says_of_a_manifest_is_heard() {
    let server = ScriptedRegistry::start();
    let registry = client();
    let target = reference(&server);
    let put =
        async |bytes: &'static [u8]| registry.put_manifest(&target, MANIFEST, bytes.into(), later()).await;
    let error = put(br#"{"layers":[{"digest":"sha256:00"}]}"#).await.unwrap_err();
    assert!(matches!(error, Error::BadResponse { .. }), "{error}");
    for part in ["400", "MANIFEST_BLOB_UNKNOWN", REPOSITORY, "manifest v1", &server.host()] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    let lie = vec![("Docker-Content-Digest".to_owned(), sha256_digest(b"other"))];
    let lying = server.fault(Rule::new(Action::Headers(lie)));
    let error = put(DOCUMENT).await.unwrap_err();
    assert!(error.to_string().contains(&sha256_digest(b"other")), "{error}");
    server.clear(lying);
    server.fault(Rule::new(Action::AcceptThenReset(u64::MAX)).times(1));
    server.fault(Rule::new(Action::Status(429, vec![("Retry-After".into(), "0".into())])).times(1));
    assert_eq!(put(DOCUMENT).await.unwrap(), sha256_digest(DOCUMENT), "put again after a drop");
}

#[tokio::test]
async fn pushing_where_only_pulling_is_allowed_is_denied() {
    let server = ScriptedRegistry::start();
    withholding(&server, REPOSITORY, "push");
    let error =
        client().put_manifest(&reference(&server), MANIFEST, DOCUMENT.into(), later()).await.unwrap_err();
    assert!(matches!(&error, Error::AuthDenied { repository, .. } if repository == REPOSITORY), "{error}");
    let error = client().upload(&reference(&server), Default::default()).await.unwrap_err();
    assert!(matches!(error, Error::AuthDenied { .. }), "{error}");
    assert_eq!(server.uploads_open(), 0);
}

#[tokio::test]
async fn a_host_that_asks_for_too_little_gets_what_it_wants() {
    let server = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth::default()));
    // A challenge for pulling, as if for a GET, in place of the one for pushing.
    let challenge = format!(
        r#"Bearer realm="{}/token",service="{}",scope="repository:{REPOSITORY}:pull""#,
        server.url(),
        server.host()
    );
    let front = ScriptedRegistry::start();
    let refusal = vec![("WWW-Authenticate".to_owned(), challenge)];
    front.fault(Rule::new(Action::Status(401, refusal)).times(1));
    client().put_manifest(&reference(&front), MANIFEST, DOCUMENT.into(), later()).await.unwrap();
    let token = &server.requests()[0];
    assert!(token.query.contains("%3Apull%2Cpush"), "{}", token.query);
    assert_eq!(statuses(&front.requests()), [401, 201]);
}
