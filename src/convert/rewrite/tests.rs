//! Documents before and after, as tables.

use super::*;
use crate::convert::media::{OCI_CONFIG, OCI_MANIFEST};

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn digest(n: u32) -> String {
    format!("sha256:{n:064x}")
}

fn change(n: u32) -> Option<Change> {
    let annotations = BTreeMap::from([(TOC_DIGEST.to_owned(), digest(n + 50))]);
    Some(Change {
        digest: digest(n),
        size: u64::from(n),
        diff_id: Some(digest(n + 100)),
        zstd: false,
        annotations,
    })
}

fn value(raw: &Raw) -> Value {
    serde_json::from_slice(&raw.bytes).unwrap()
}

fn layer(n: u32, media_type: &str) -> Value {
    json!({ "mediaType": media_type, "digest": digest(n), "size": n })
}

#[test]
fn configs_get_new_diff_ids_and_keep_the_rest() {
    let old = json!({
        "architecture": "amd64", "os": "linux", "x-unknown": [1, 2.5],
        "config": { "Cmd": ["/bin/sh"] },
        "history": [{ "created_by": "a" }, { "created_by": "b", "empty_layer": true }, { "created_by": "c" }],
        "rootfs": { "type": "layers", "diff_ids": [digest(1), digest(2)] },
    });
    let bytes = Bytes::from(old.to_string());
    let new = config(&bytes, &[None, change(5)]).unwrap();
    let mut expected = old;
    expected["rootfs"]["diff_ids"][1] = json!(digest(105));
    assert_eq!(serde_json::from_slice::<Value>(&new).unwrap(), expected);

    assert_eq!(config(&bytes, &[None, None]).unwrap(), bytes);
    let annotated = Some(Change::annotated(&digest(1), 1, &digest(9)));
    assert_eq!(config(&bytes, &[annotated, None]).unwrap(), bytes);
    let fewer = config(&bytes, &[None]).unwrap_err().to_string();
    assert_eq!(fewer, "the image config names 2 layers and the manifest 1: the image is damaged");
    assert!(config(&Bytes::from_static(b"{}"), &[]).is_err());
}

#[test]
fn manifests_get_new_layers_and_keep_the_rest() {
    let config = Bytes::from_static(b"{}");
    let mut zstd = layer(2, "application/vnd.oci.image.layer.v1.tar+zstd");
    zstd["annotations"] = json!({
        "kept": "yes",
        "io.github.containers.zstd-chunked.manifest-position": "1:2:3:1",
        "io.containers.zstd-chunked.manifest-checksum": "sha256:0",
        TOC_DIGEST: "sha256:old",
    });
    zstd["urls"] = json!(["https://r.example/old"]);
    zstd["data"] = json!("AA==");
    let other = layer(3, "application/vnd.in-toto+json");
    let old = Raw::new(
        OCI_MANIFEST,
        json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": { "mediaType": OCI_CONFIG, "digest": digest(7), "size": 9, "annotations": { "a": "b" } },
            "layers": [layer(1, "application/vnd.oci.image.layer.v1.tar"), zstd, other],
            "annotations": { "org.opencontainers.image.title": "t" }, "subject": { "digest": digest(77) },
        })
        .to_string(),
    );
    let new = manifest(&old, Types::Oci, &config, &[change(10), change(20), None]).unwrap();
    let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
    let mut first = layer(10, gzip);
    first["annotations"] = json!({ TOC_DIGEST: digest(60) });
    let mut second = layer(20, gzip);
    second["annotations"] = json!({ "kept": "yes", TOC_DIGEST: digest(70) });
    let expected = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": OCI_CONFIG, "digest": estargz::Digest::of(b"{}"), "size": 2, "annotations": { "a": "b" }
        },
        "layers": [first, second, other],
        "annotations": { "org.opencontainers.image.title": "t" }, "subject": { "digest": digest(77) },
    });
    assert_eq!(value(&new), expected);
    assert_eq!((new.media_type.as_str(), new.digest), (OCI_MANIFEST, Raw::new("", new.bytes).digest));
}

#[test]
fn docker_manifests_become_oci_unless_they_shall_not() {
    let config = Bytes::from_static(b"{}");
    let config_digest = estargz::Digest::of(&config);
    let docker = |gzip: &str, foreign: &str, manifest: &str, config: &str| {
        json!({
            "schemaVersion": 2, "mediaType": manifest,
            "config": { "mediaType": config, "digest": config_digest, "size": 2 },
            "layers": [layer(1, gzip), layer(2, foreign)],
        })
    };
    let old = docker(
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        DOCKER_MANIFEST,
        "application/vnd.docker.container.image.v1+json",
    );
    let raw = Raw::new(DOCKER_MANIFEST, old.to_string());
    let oci = manifest(&raw, Types::Oci, &config, &[None, None]).unwrap();
    let expected = docker(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        OCI_MANIFEST,
        OCI_CONFIG,
    );
    assert_eq!((value(&oci), oci.media_type.as_str()), (expected, OCI_MANIFEST));

    assert_eq!(manifest(&raw, Types::Source, &config, &[None, None]).unwrap(), raw);
    let kept = manifest(&raw, Types::Source, &config, &[change(5), None]).unwrap();
    let layers = value(&kept)["layers"].clone();
    assert_eq!(layers[0]["mediaType"], "application/vnd.docker.image.rootfs.diff.tar.gzip");
    assert_eq!(layers[0]["annotations"][TOC_DIGEST], digest(55));
    assert_eq!(layers[1], old["layers"][1]);
    assert_eq!(kept.media_type, DOCKER_MANIFEST);
}

#[test]
fn a_manifest_without_changes_keeps_its_bytes() {
    let config = Bytes::from_static(b"{}");
    let layers = json!([layer(1, "application/vnd.oci.image.layer.v1.tar+gzip")]);
    let text = format!(
        "{{ \"schemaVersion\": 2,\n  \"layers\": {layers}, \"config\": {{\"size\": 2, \"digest\": {:?}}} }}",
        estargz::Digest::of(&config).to_string()
    );
    let raw = Raw::new(OCI_MANIFEST, text);
    for types in [Types::Oci, Types::Source] {
        assert_eq!(manifest(&raw, types, &config, &[None]).unwrap(), raw);
    }
    let annotated =
        manifest(&raw, Types::Oci, &config, &[Some(Change::annotated(&digest(1), 1, &digest(9)))]);
    let annotated = value(&annotated.unwrap());
    assert_eq!(annotated["layers"][0]["digest"], digest(1));
    assert_eq!(annotated["layers"][0]["annotations"], json!({ TOC_DIGEST: digest(9) }));
    assert_eq!(annotated.get("mediaType"), None, "what was not said is not said");
}

#[test]
fn indexes_refer_to_what_was_converted() {
    let entry = |n: u32, media_type: &str, platform: &str| {
        let mut entry = layer(n, media_type);
        entry["platform"] = json!({ "os": "linux", "architecture": platform });
        entry
    };
    let mut attestation = entry(4, OCI_MANIFEST, "unknown");
    attestation["annotations"] =
        json!({ ATTESTED: digest(1), "vnd.docker.reference.type": "attestation-manifest" });
    let old = Raw::new(
        DOCKER_INDEX,
        json!({
            "schemaVersion": 2, "mediaType": DOCKER_INDEX, "annotations": { "a": "b" },
            "manifests": [
                entry(1, DOCKER_MANIFEST, "amd64"), entry(2, DOCKER_MANIFEST, "arm64"), entry(3, OCI_MANIFEST, "386"),
                attestation,
            ],
        })
        .to_string(),
    );
    let target =
        |n: u32| Target { media_type: OCI_MANIFEST.to_owned(), digest: digest(n), size: u64::from(n) };
    let converted = HashMap::from([(digest(1), target(10)), (digest(3), target(3))]);
    let kept = [1, 3, 4].map(digest).into();
    let new = index(&old, Types::Oci, &converted, &kept).unwrap();
    let mut moved = attestation;
    moved["annotations"][ATTESTED] = json!(digest(10));
    let expected = json!({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "annotations": { "a": "b" },
        "manifests": [entry(10, OCI_MANIFEST, "amd64"), entry(3, OCI_MANIFEST, "386"), moved],
    });
    assert_eq!((value(&new), new.media_type.as_str()), (expected, OCI_INDEX));

    let all = [1, 2, 3, 4].map(digest).into();
    assert_eq!(index(&old, Types::Source, &HashMap::new(), &all).unwrap(), old);
}
