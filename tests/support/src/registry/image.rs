//! OCI documents for the layers of a test: config, manifest, index.
//!
//! Source: OCI image specification 1.1, `config.md`, `manifest.md`, `image-index.md`.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::estargz::Built;
use crate::layer::Layer;
use crate::sha256_digest;

/// Media type of an OCI manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image config.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a gzipped layer.
pub const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Media type of a layer in zstd.
pub const LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// A layer as an image lists it.
#[derive(Clone, Debug)]
pub struct LayerBlob {
    /// The blob.
    pub bytes: Bytes,
    /// Digest of the decompressed blob.
    pub diff_id: String,
    /// Media type of the blob.
    pub media_type: String,
    /// Annotations of the descriptor.
    pub annotations: BTreeMap<String, String>,
}

impl LayerBlob {
    /// A lazy layer with the annotations its build gives it.
    pub fn lazy(built: &Built) -> LayerBlob {
        LayerBlob {
            bytes: built.blob.clone(),
            diff_id: built.diff_id.clone(),
            media_type: built.media_type.to_owned(),
            annotations: built.annotations.clone(),
        }
    }

    /// An ordinary layer: the tar, gzipped.
    pub fn plain(layer: &Layer) -> LayerBlob {
        LayerBlob {
            bytes: layer.tar_gzip().into(),
            diff_id: sha256_digest(&layer.tar()),
            media_type: LAYER_GZIP.to_owned(),
            annotations: BTreeMap::new(),
        }
    }
}

/// Digests of what an image is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageDigests {
    /// Of the manifest.
    pub manifest: String,
    /// Length of the manifest in bytes.
    pub manifest_size: u64,
    /// Of the config.
    pub config: String,
    /// Of the layers, lowest first.
    pub layers: Vec<String>,
}

/// What an image runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// In the names of Go: `amd64`, `arm64`.
    pub architecture: String,
    /// `v7`, or nothing.
    pub variant: Option<String>,
}

impl Platform {
    /// That of this machine.
    pub fn host() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Another one.
    pub fn new(os: &str, architecture: &str) -> Platform {
        Platform { os: os.to_owned(), architecture: architecture.to_owned(), variant: None }
    }
}

/// The config of an image for this machine; `extras` is merged into it, objects key by key.
pub(super) fn config(layers: &[LayerBlob], extras: &Value) -> Vec<u8> {
    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
    let platform = Platform::host();
    let mut config = json!({
        "created": "2020-09-13T12:26:40Z",
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": layers.iter().map(|_| json!({ "created_by": "test" })).collect::<Vec<_>>(),
    });
    merge(&mut config, extras);
    config.to_string().into_bytes()
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (into, from) => *into = from.clone(),
    }
}

/// The manifest of an image.
pub(super) fn manifest(config: &[u8], layers: &[LayerBlob]) -> Vec<u8> {
    let descriptors = layers.iter().map(|layer| {
        let mut descriptor = json!({
            "mediaType": layer.media_type,
            "digest": sha256_digest(&layer.bytes),
            "size": layer.bytes.len(),
        });
        if !layer.annotations.is_empty() {
            descriptor["annotations"] = json!(layer.annotations);
        }
        descriptor
    });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": { "mediaType": CONFIG, "digest": sha256_digest(config), "size": config.len() },
        "layers": descriptors.collect::<Vec<_>>(),
    });
    manifest.to_string().into_bytes()
}

/// An index of manifests.
pub(super) fn index(images: &[(&ImageDigests, Platform)]) -> Vec<u8> {
    let manifests = images.iter().map(|(image, platform)| {
        let mut entry = json!({
            "mediaType": MANIFEST,
            "digest": image.manifest,
            "size": image.manifest_size,
            "platform": { "os": platform.os, "architecture": platform.architecture },
        });
        if let Some(variant) = &platform.variant {
            entry["platform"]["variant"] = json!(variant);
        }
        entry
    });
    let manifests: Vec<Value> = manifests.collect();
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests }).to_string().into_bytes()
}
