//! The documents of a converted image: pure functions from the source's documents and what became of its layers.
//!
//! Everything that is not known to change is kept: history, labels, annotations, keys of extensions. A document in
//! which nothing changes keeps its bytes, hence its digest, so that converting a converted image changes nothing.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, ensure};
use bytes::Bytes;
use estargz::Compression;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::media::Types;
use super::select::ATTESTED;
use crate::image::TOC_DIGEST;
use crate::transport::Raw;

/// The annotation that tells which layer a converted one was made of, and how: see [`super::recipe`].
pub const CONVERTED_FROM: &str = "io.lazurite.converted-from";

/// The annotation that tells the size of the decompressed blob, which containers/storage wants to know.
pub const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";

/// Annotations that describe the bytes of a blob in the format zstd:chunked, by the start of their names.
const ZSTD_CHUNKED: [&str; 2] = ["io.containers.zstd-chunked.", "io.github.containers.zstd-chunked."];

/// What becomes of a layer's descriptor. Where there is none, the layer stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The blob's digest.
    pub digest: String,
    /// The blob's size in bytes.
    pub size: u64,
    /// The digest of its contents, if it is another than before.
    pub diff_id: Option<String>,
    /// Whether the blob is compressed with zstd; otherwise with gzip.
    #[serde(default)]
    pub zstd: bool,
    /// What is said of it besides.
    pub annotations: BTreeMap<String, String>,
}

impl Change {
    /// The layer is the same blob, of which the manifest had not said that it is eStargz.
    pub fn annotated(digest: &str, size: u64, toc_digest: &str) -> Self {
        let annotations = BTreeMap::from([(TOC_DIGEST.to_owned(), toc_digest.to_owned())]);
        Self { digest: digest.to_owned(), size, diff_id: None, zstd: false, annotations }
    }

    /// What the blob is compressed with.
    pub fn compression(&self) -> Compression {
        if self.zstd { Compression::Zstd } else { Compression::Gzip }
    }
}

/// Whether an annotation describes a layer's bytes.
pub fn is_of_blob(key: &str) -> bool {
    [TOC_DIGEST, UNCOMPRESSED_SIZE].contains(&key)
        || ZSTD_CHUNKED.iter().any(|prefix| key.starts_with(prefix))
}

/// A document that others refer to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// What it is.
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
}

impl Target {
    /// How to refer to `document`.
    pub fn of(document: &Raw) -> Self {
        let Raw { media_type, digest, bytes } = document;
        Self { media_type: media_type.clone(), digest: digest.clone(), size: bytes.len() as u64 }
    }
}

/// The image config with the diff ids of the changed layers.
///
/// # Errors
///
/// It is not valid, or names another number of layers than there are.
pub fn config(bytes: &Bytes, changes: &[Option<Change>]) -> anyhow::Result<Bytes> {
    let old: Value = serde_json::from_slice(bytes).context("the image config is not valid")?;
    let mut new = old.clone();
    let Some(diff_ids) = new.pointer_mut("/rootfs/diff_ids").and_then(Value::as_array_mut) else {
        let null = new.pointer("/rootfs/diff_ids").is_some_and(Value::is_null);
        ensure!(changes.is_empty() && null, "the image config names no layers");
        return Ok(bytes.clone());
    };
    ensure!(
        diff_ids.len() == changes.len(),
        "the image config names {} layers and the manifest {}: the image is damaged",
        diff_ids.len(),
        changes.len()
    );
    for (diff_id, change) in diff_ids.iter_mut().zip(changes) {
        if let Some(new) = change.as_ref().and_then(|change| change.diff_id.as_ref()) {
            *diff_id = json!(new);
        }
    }
    if new == old { Ok(bytes.clone()) } else { Ok(serde_json::to_vec(&new)?.into()) }
}

/// The manifest with the new config and the changed layers.
///
/// # Errors
///
/// It is not valid.
pub fn manifest(old: &Raw, types: Types, config: &Bytes, changes: &[Option<Change>]) -> anyhow::Result<Raw> {
    let mut new: Value = serde_json::from_slice(&old.bytes).context("the image manifest is not valid")?;
    let config_digest = estargz::Digest::of(config).to_string();
    let descriptor = &mut new["config"];
    if descriptor["digest"] != json!(config_digest) {
        replace(descriptor, &config_digest, config.len() as u64);
    }
    translate(descriptor, types);
    let layers = new.get_mut("layers").and_then(Value::as_array_mut).map_or(&mut [][..], |layers| layers);
    ensure!(layers.len() == changes.len(), "the image manifest has {} layers", layers.len());
    for (layer, change) in layers.iter_mut().zip(changes) {
        match change {
            Some(change) => apply(layer, types, change)?,
            None => translate(layer, types),
        }
    }
    finished(old, types, new)
}

fn apply(layer: &mut Value, types: Types, change: &Change) -> anyhow::Result<()> {
    let before = layer["mediaType"].as_str().context("a layer without a type")?.to_owned();
    if layer["digest"] == json!(change.digest) {
        translate(layer, types);
    } else {
        layer["mediaType"] = json!(types.converted(&before, change.compression()));
        replace(layer, &change.digest, change.size);
        if let Some(object) = layer.as_object_mut() {
            // The addresses of the old blob.
            object.remove("urls");
        }
        if let Some(annotations) = layer["annotations"].as_object_mut() {
            // They describe the old blob, and podman refuses a layer with those of both kinds.
            annotations.retain(|key, _| !is_of_blob(key));
        }
    }
    for (key, value) in &change.annotations {
        layer["annotations"][key] = json!(value);
    }
    Ok(())
}

/// Lets a descriptor refer to another blob; a copy of the old one inside it goes.
fn replace(descriptor: &mut Value, digest: &str, size: u64) {
    descriptor["digest"] = json!(digest);
    descriptor["size"] = json!(size);
    if let Some(object) = descriptor.as_object_mut() {
        object.remove("data");
    }
}

fn translate(descriptor: &mut Value, types: Types) {
    if let Some(media_type) = descriptor["mediaType"].as_str().map(|old| types.of(old).to_owned()) {
        descriptor["mediaType"] = json!(media_type);
    }
}

/// An index that refers to the converted manifests.
///
/// `converted` maps digests to what takes their place; entries whose digest is not in `kept` are dropped.
///
/// # Errors
///
/// It is not valid.
pub fn index(
    old: &Raw,
    types: Types,
    converted: &HashMap<String, Target>,
    kept: &HashSet<String>,
) -> anyhow::Result<Raw> {
    let mut new: Value = serde_json::from_slice(&old.bytes).context("the image index is not valid")?;
    let mut none = Vec::new();
    let entries = new.get_mut("manifests").and_then(Value::as_array_mut).unwrap_or(&mut none);
    entries.retain(|entry| entry["digest"].as_str().is_some_and(|digest| kept.contains(digest)));
    for entry in entries.iter_mut() {
        let target = entry["digest"].as_str().and_then(|digest| converted.get(digest));
        if let Some(Target { media_type, digest, size }) = target {
            if entry["digest"] != json!(digest) {
                replace(entry, digest, *size);
            }
            entry["mediaType"] = json!(media_type);
        }
        if let Some(attested) = entry.pointer_mut(&format!("/annotations/{ATTESTED}"))
            && let Some(target) = attested.as_str().and_then(|digest| converted.get(digest))
        {
            *attested = json!(target.digest);
        }
    }
    finished(old, types, new)
}

/// The document with its type; the old bytes if it says the same.
fn finished(old: &Raw, types: Types, mut new: Value) -> anyhow::Result<Raw> {
    let media_type = types.of(&old.media_type);
    // The key is optional in OCI.
    if media_type != old.media_type || new.get("mediaType").is_some() {
        new["mediaType"] = json!(media_type);
    }
    let before: Value = serde_json::from_slice(&old.bytes)?;
    if new == before && media_type == old.media_type {
        return Ok(old.clone());
    }
    Ok(Raw::new(media_type, serde_json::to_vec(&new)?))
}

#[cfg(test)]
mod tests;
