//! Documents, platforms and chain ids, as tables.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::*;

fn digest(n: usize) -> String {
    format!("sha256:{n:064x}")
}

fn layer(n: usize, annotations: &[(&str, &str)]) -> Descriptor {
    Descriptor {
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        digest: digest(n),
        size: 10,
        annotations: annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        platform: None,
    }
}

fn manifest(layers: usize) -> Manifest {
    Manifest { config: layer(1000, &[]), layers: (0..layers).map(|n| layer(n, &[])).collect() }
}

fn parse(media_type: &str, document: Value) -> anyhow::Result<Document> {
    Document::parse(media_type, document.to_string().as_bytes())
}

#[test]
fn oci_and_docker_documents_are_read() {
    let image = json!({
        "schemaVersion": 2,
        "config": { "mediaType": "c", "digest": digest(9), "size": 3 },
        "layers": [{ "mediaType": "l", "digest": digest(1), "size": 4, "annotations": { "a": "b" } }],
    });
    let index = json!({ "manifests": [
        { "mediaType": "m", "digest": digest(2), "size": 5, "platform": { "os": "linux", "architecture": "arm", "variant": "v7" } },
        { "mediaType": "m", "digest": digest(3), "size": 5 },
    ] });
    for prefix in ["oci.image.manifest.v1", "docker.distribution.manifest.v2"] {
        let Document::Manifest(manifest) =
            parse(&format!("application/vnd.{prefix}+json"), image.clone()).unwrap()
        else {
            panic!("{prefix}")
        };
        assert_eq!(manifest.config.digest, digest(9));
        assert_eq!(manifest.layers[0].annotations["a"], "b");
    }
    for prefix in ["oci.image.index.v1", "docker.distribution.manifest.list.v2"] {
        let Document::Index(manifests) =
            parse(&format!("application/vnd.{prefix}+json"), index.clone()).unwrap()
        else {
            panic!("{prefix}")
        };
        assert_eq!(manifests[0].platform.as_ref().unwrap().to_string(), "linux/arm/v7");
        assert_eq!(manifests[1].platform, None);
    }
    // What Go writes for nothing, and lists in the places of objects.
    let oci = "application/vnd.oci.image.manifest.v1+json";
    let config = json!({ "mediaType": "c", "digest": digest(9), "size": 3, "annotations": null });
    let Document::Manifest(empty) = parse(oci, json!({ "config": config, "layers": null })).unwrap() else {
        panic!()
    };
    assert_eq!(empty.layers, []);
    let listed = json!(["c", digest(9), 3, {}, null]);
    for hostile in [
        json!([config, []]),
        json!({ "config": listed, "layers": [] }),
        json!({ "config": config, "layers": [listed] }),
    ] {
        assert!(parse(oci, hostile.clone()).unwrap_err().to_string().contains("not valid"), "{hostile}");
    }
    assert!(diff_ids(br#"{"os":"o","architecture":"a","rootfs":[["x"]]}"#).is_err());
    let old = parse("application/vnd.docker.distribution.manifest.v1+prettyjws", json!({})).unwrap_err();
    assert!(old.to_string().contains("manifest.v1+prettyjws"), "{old}");
    assert!(parse("application/vnd.oci.image.manifest.v1+json", json!({ "layers": [] })).is_err());
}

#[test]
fn documents_keep_what_they_refer_to() {
    let labels = |pairs: &[(&str, usize)]| -> HashMap<String, String> {
        pairs.iter().map(|(key, n)| (format!("containerd.io/gc.ref.content.{key}"), digest(*n))).collect()
    };
    assert_eq!(
        Document::Manifest(manifest(2)).gc_labels(),
        labels(&[("config", 1000), ("l.0", 0), ("l.1", 1)])
    );
    let index = Document::Index(vec![layer(4, &[]), layer(5, &[])]);
    assert_eq!(index.gc_labels(), labels(&[("m.0", 4), ("m.1", 5)]));
}

#[test]
fn chain_ids_follow_the_image_specification() {
    let diff_ids = [
        "sha256:e1356c47624e2d2e0f59a4bf8a3a1b1f2f4b8e8d9b6a4d9d9cf0a2a1b6f8d3c1".to_owned(),
        digest(1),
        digest(2),
    ];
    let chain = chain_ids(&diff_ids);
    assert_eq!(chain[0], diff_ids[0]);
    let second = estargz::Digest::of(format!("{} {}", diff_ids[0], diff_ids[1]).as_bytes()).to_string();
    assert_eq!(chain[1], second);
    assert_eq!(chain[2], estargz::Digest::of(format!("{second} {}", diff_ids[2]).as_bytes()).to_string());
    assert_eq!(chain_ids(&[]), Vec::<String>::new());
    // Worked out with sha256sum.
    let known = chain_ids(&[digest(1), digest(2)]);
    assert_eq!(known[1], "sha256:e0213565073dd272477933ef550455db21856966e444074f1492aef0939305ac");
}

#[test]
fn image_configs_must_fit_manifest_and_platform() {
    let amd64 = Platform::parse("linux/amd64").unwrap();
    let config = |os: &str, diff_ids: &[String]| {
        json!({ "architecture": "amd64", "os": os, "config": {}, "rootfs": { "type": "layers", "diff_ids": diff_ids } })
            .to_string()
    };
    let ids = [digest(7), digest(8)];
    let good = ImageConfig::parse(config("linux", &ids).as_bytes(), &manifest(2)).unwrap();
    assert_eq!(good, ImageConfig { platform: amd64.clone(), diff_ids: ids.to_vec() });

    let fewer = ImageConfig::parse(config("linux", &ids).as_bytes(), &manifest(3)).unwrap_err();
    assert_eq!(fewer.to_string(), "the image config names 2 layers and the manifest 3: the image is damaged");
    good.check_platform(&amd64).unwrap();
    let other = ImageConfig::parse(config("windows", &ids).as_bytes(), &manifest(2)).unwrap();
    let other = other.check_platform(&amd64).unwrap_err();
    assert!(other.to_string().ends_with("say --platform windows/amd64"), "{other}");
}

#[test]
fn the_best_platform_is_chosen() {
    let entry = |n: usize, platform: &str| Descriptor {
        platform: (!platform.is_empty()).then(|| Platform::parse(platform).unwrap()),
        ..layer(n, &[])
    };
    let all = [
        entry(0, "linux/arm64"),
        entry(1, "linux/arm/v6"),
        entry(2, "linux/arm/v7"),
        entry(3, "linux/amd64"),
        entry(4, "linux/amd64/v3"),
        entry(5, "unknown/unknown"),
        entry(6, "windows/amd64"),
        entry(7, ""),
    ];
    let cases = [
        ("linux/amd64", Some(3)),
        ("linux/x86_64", Some(3)),
        ("linux/amd64/v2", Some(3)),
        ("linux/amd64/v4", Some(4)),
        ("linux/arm64", Some(0)),
        ("linux/aarch64", Some(0)),
        ("linux/arm64/v8", Some(0)),
        ("linux/arm64/v9", Some(0)),
        ("linux/arm", Some(2)),
        ("linux/arm/v6", Some(1)),
        ("linux/arm/v5", None),
        ("linux/s390x", None),
        ("windows/amd64", Some(6)),
    ];
    for (wanted, expected) in cases {
        let chosen = choose(&all, &Platform::parse(wanted).unwrap()).ok().map(|found| found.digest.clone());
        assert_eq!(chosen, expected.map(digest), "{wanted}");
    }
    let none = choose(&all, &Platform::parse("linux/s390x").unwrap()).unwrap_err().to_string();
    assert_eq!(
        none,
        "the image has nothing for platform linux/s390x, only for: linux/arm64, linux/arm/v6, linux/arm/v7, \
         linux/amd64, linux/amd64/v3, windows/amd64"
    );
    let only = [entry(7, "")];
    assert_eq!(choose(&only, &Platform::host()).unwrap().digest, digest(7));
}

#[test]
fn platforms_are_read() {
    assert!(Platform::parse("linux").is_err());
    assert!(Platform::parse("a/b/c/d").is_err());
    assert_eq!(Platform::parse("linux/aarch64/v8").unwrap().to_string(), "linux/arm64");
    assert_eq!(Platform::host(), Platform::host().normal());
}
