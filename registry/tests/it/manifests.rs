//! Whole objects: manifests by tag and digest, small blobs, verified and bounded.

use crate::{REPOSITORY, config, content, later, mirrored, reference, serving};
use registry::{Error, Reference, Registry};
use support::registry::{Action, Auth, MANIFEST, Rule, ScriptedRegistry, TokenAuth};

const DOCUMENT: &[u8] = br#"{"schemaVersion":2}"#;

#[tokio::test]
async fn by_tag_and_by_digest() {
    let server = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth::default()));
    let digest = server.put_manifest(REPOSITORY, "v1", MANIFEST, DOCUMENT);
    let registry = Registry::new(config()).unwrap();
    let pinned: Reference = format!("{}/{REPOSITORY}@{digest}", server.host()).parse().unwrap();
    for (reference, given) in
        [(reference(&server), None), (reference(&server), Some(digest.as_str())), (pinned, None)]
    {
        let manifest = registry.manifest(&reference, given, later()).await.unwrap();
        assert_eq!(manifest.bytes, DOCUMENT);
        assert_eq!((manifest.media_type.as_str(), manifest.digest.as_str()), (MANIFEST, digest.as_str()));
    }
    let asked = server.requests();
    assert!(asked[0].path.ends_with("/manifests/v1") && asked.last().unwrap().path.ends_with(&digest));
    for part in ["oci.image.manifest.v1", "oci.image.index.v1", "manifest.v2", "manifest.list.v2"] {
        assert!(asked[0].headers["accept"].contains(part), "{part}");
    }
    assert!(asked.iter().all(|request| request.range.is_none() && request.method == "GET"));
}

#[tokio::test]
async fn wrong_bytes_send_us_to_the_next_host() {
    let (mirror, origin) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    for server in [&mirror, &origin] {
        server.put_manifest(REPOSITORY, "v1", MANIFEST, DOCUMENT);
        server.put_blob(REPOSITORY, content(100));
    }
    let digest = support::sha256_digest(DOCUMENT);
    let blob = support::sha256_digest(&content(100));
    mirror.fault(Rule::new(Action::FlipBit(9)));
    let registry = Registry::new(mirrored(&origin, &[&mirror])).unwrap();
    let manifest = registry.manifest(&reference(&origin), Some(&digest), later()).await.unwrap();
    assert_eq!(manifest.bytes, DOCUMENT);
    assert_eq!(registry.blob_bytes(&reference(&origin), &blob, 100, later()).await.unwrap(), content(100));
    origin.fault(Rule::new(Action::FlipBit(9)));
    let error = registry.manifest(&reference(&origin), Some(&digest), later()).await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    assert_eq!(error.reason(), "verify_failed");
}

#[tokio::test]
async fn limits_hold() {
    let (server, digest) = serving(&content(101));
    let registry = Registry::new(config()).unwrap();
    let error = registry.blob_bytes(&reference(&server), &digest, 100, later()).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { limit: 100, .. }), "{error}");
    assert_eq!(registry.blob_bytes(&reference(&server), &digest, 101, later()).await.unwrap(), content(101));
    server.put_manifest(REPOSITORY, "v1", MANIFEST, vec![b' '; (4 << 20) + 1]);
    let error = registry.manifest(&reference(&server), None, later()).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn a_truncated_document_is_fetched_again() {
    let (server, digest) = serving(&content(1000));
    server.fault(Rule::new(Action::Truncate(500)).nth(1));
    let registry = Registry::new(config()).unwrap();
    assert_eq!(
        registry.blob_bytes(&reference(&server), &digest, 1000, later()).await.unwrap(),
        content(1000)
    );
}

#[tokio::test]
async fn an_unknown_tag_is_not_found() {
    let server = ScriptedRegistry::start();
    let registry = Registry::new(config()).unwrap();
    let error = registry.manifest(&reference(&server), None, later()).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("manifest v1") && error.to_string().contains(REPOSITORY), "{error}");
}
