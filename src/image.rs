//! An image as its documents describe it: pure functions.
//!
//! Owns reading manifests, indexes and configs (OCI and docker schema 2), the choice of a platform, chain ids, and the
//! labels by which containerd's garbage collector follows an image. No I/O.

use std::collections::HashMap;

use anyhow::{Context, bail, ensure};
use estargz::Compression;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The annotation of an eStargz layer without which it cannot be verified lazily.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// How deep indexes may nest.
pub const INDEX_DEPTH: usize = 4;

/// Go writes `null` for a list or map without anything in it.
fn nothing<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Reads a document. A list in the place of an object is refused, which serde would take for its fields in order.
fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8], objects: &[&str]) -> anyhow::Result<T> {
    let value: Value = serde_json::from_slice(bytes)?;
    for path in objects {
        if let Some(found) = value.pointer(path) {
            ensure!(found.is_object(), "{:?} is no object", if path.is_empty() { "/" } else { path });
        }
    }
    for list in ["layers", "manifests"] {
        let entries = value.get(list).and_then(Value::as_array);
        ensure!(entries.into_iter().flatten().all(Value::is_object), "an entry of {list:?} is no object");
    }
    Ok(serde_json::from_value(value)?)
}

/// One blob as a manifest or index refers to it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: String,
    /// `algorithm:hex`.
    pub digest: String,
    /// Size in bytes.
    pub size: u64,
    /// What the builder noted, among it a layer's TOC digest.
    #[serde(default, deserialize_with = "nothing")]
    pub annotations: HashMap<String, String>,
    /// In an index: what the manifest is for.
    #[serde(default)]
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// What is said of the layer's table of contents.
    pub fn toc(&self) -> Option<estargz::Announced> {
        estargz::announced(self.compression(), |key| self.annotations.get(key).map(String::as_str))
    }

    /// The TOC digest as it is written, which may be none: of the kind that containerd passes on, else of podman's.
    pub fn named_toc_digest(&self) -> Option<&str> {
        estargz::announced_digest(self.compression(), |key| self.annotations.get(key).map(String::as_str))
    }

    /// What a layer is compressed with, if it is at all.
    pub fn compression(&self) -> Compression {
        Compression::of_media_type(&self.media_type)
    }
}

/// An operating system and a processor.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// As Go names it.
    pub os: String,
    /// As Go names it.
    pub architecture: String,
    /// The processor's version, mostly for arm; empty for none.
    #[serde(default)]
    pub variant: String,
}

/// What a reference leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// Manifests for several platforms.
    Index(Vec<Descriptor>),
    /// One image.
    Manifest(Manifest),
}

/// One image for one platform.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// How to run it, and the diff ids of its layers.
    pub config: Descriptor,
    /// From the bottom up.
    #[serde(default, deserialize_with = "nothing")]
    pub layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default, deserialize_with = "nothing")]
    manifests: Vec<Descriptor>,
}

/// What of an image's config is needed to unpack it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// What the image is for.
    pub platform: Platform,
    /// Digests of the uncompressed layers from the bottom up.
    pub diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(flatten)]
    platform: Platform,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "nothing")]
    diff_ids: Vec<String>,
}

impl ConfigFile {
    fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        parse(bytes, &["", "/rootfs"]).context("the image config is not valid")
    }
}

impl Document {
    /// Reads what the registry sent as `media_type`.
    ///
    /// # Errors
    ///
    /// It is neither a manifest nor an index of OCI or docker schema 2, or not valid.
    pub fn parse(media_type: &str, bytes: &[u8]) -> anyhow::Result<Self> {
        match media_type {
            "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json" => {
                let index: Index = parse(bytes, &[""]).context("the image index is not valid")?;
                Ok(Self::Index(index.manifests))
            }
            "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json" => {
                Ok(Self::Manifest(parse(bytes, &["", "/config"]).context("the image manifest is not valid")?))
            }
            other => bail!("the reference leads to a document of type {other}, which is not an image"),
        }
    }

    /// Labels that keep what this document refers to alive as long as itself (containerd: images.ChildGCLabels).
    ///
    /// An index refers to the manifests of all platforms, also to those that are not pulled.
    pub fn gc_labels(&self) -> HashMap<String, String> {
        let numbered = |letter: &str, children: &[Descriptor]| -> HashMap<String, String> {
            let key = |n| format!("containerd.io/gc.ref.content.{letter}.{n}");
            children.iter().enumerate().map(|(n, child)| (key(n), child.digest.clone())).collect()
        };
        match self {
            Self::Index(manifests) => numbered("m", manifests),
            Self::Manifest(manifest) => {
                let mut labels = numbered("l", &manifest.layers);
                labels
                    .insert("containerd.io/gc.ref.content.config".to_owned(), manifest.config.digest.clone());
                labels
            }
        }
    }
}

impl ImageConfig {
    /// Reads the config of `manifest`.
    ///
    /// # Errors
    ///
    /// The config is not valid, or belongs to another manifest.
    pub fn parse(bytes: &[u8], manifest: &Manifest) -> anyhow::Result<Self> {
        let file = ConfigFile::parse(bytes)?;
        let (layers, diff_ids) = (manifest.layers.len(), file.rootfs.diff_ids);
        ensure!(
            diff_ids.len() == layers,
            "the image config names {} layers and the manifest {layers}: the image is damaged",
            diff_ids.len()
        );
        Ok(Self { platform: file.platform.normal(), diff_ids })
    }

    /// Checks that the image runs on `wanted`. An image may be reached without an index, so its manifest was not
    /// necessarily chosen by platform.
    ///
    /// # Errors
    ///
    /// It is for another platform.
    pub fn check_platform(&self, wanted: &Platform) -> anyhow::Result<()> {
        let platform = &self.platform;
        ensure!(
            wanted.distance(platform).is_some(),
            "the image is for platform {platform}, not for {wanted}; to take it all the same, say --platform {platform}"
        );
        Ok(())
    }
}

/// The diff ids of an image config, from the bottom up.
///
/// # Errors
///
/// It is not valid.
pub fn diff_ids(config: &[u8]) -> anyhow::Result<Vec<String>> {
    Ok(ConfigFile::parse(config)?.rootfs.diff_ids)
}

/// Chain ids from diff ids, both from the bottom up (OCI image-spec, config.md, "Layer ChainID").
pub fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            None => diff_id.clone(),
            Some(below) => estargz::Digest::of(format!("{below} {diff_id}").as_bytes()).to_string(),
        });
    }
    chain
}

impl Platform {
    /// This host's.
    pub fn host() -> Self {
        Self {
            os: std::env::consts::OS.to_owned(),
            architecture: std::env::consts::ARCH.to_owned(),
            variant: String::new(),
        }
        .normal()
    }

    /// Reads `os/architecture[/variant]`.
    ///
    /// # Errors
    ///
    /// It has another form.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] => (os, architecture, variant),
            _ => bail!("{text:?} is not a platform; expected os/architecture or os/architecture/variant"),
        };
        Ok(Self { os: os.to_owned(), architecture: architecture.to_owned(), variant: variant.to_owned() }
            .normal())
    }

    /// The usual name where several are in use (containerd: platforms/database.go).
    fn normal(mut self) -> Self {
        let (architecture, variant) = match (self.architecture.as_str(), self.variant.as_str()) {
            ("x86_64" | "x86-64" | "amd64", "" | "v1") => ("amd64", ""),
            ("x86_64" | "x86-64", variant) => ("amd64", variant),
            ("i386" | "i486" | "i586" | "i686" | "x86" | "386", _) => ("386", ""),
            ("aarch64" | "arm64", "" | "8" | "v8" | "v8.0") => ("arm64", ""),
            ("aarch64", variant) => ("arm64", variant),
            ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
            ("armel", _) | ("arm", "6") => ("arm", "v6"),
            ("arm", "5") => ("arm", "v5"),
            ("powerpc64" | "ppc64le", variant) => ("ppc64le", variant),
            ("loongarch64", variant) => ("loong64", variant),
            (architecture, variant) => (architecture, variant),
        };
        (self.architecture, self.variant) = (architecture.to_owned(), variant.to_owned());
        self
    }

    /// How well a manifest's platform serves this one: lower is better, `None` not at all.
    ///
    /// A processor runs code for older versions of itself, the newest of them best. One without a version named runs
    /// only code without one.
    fn distance(&self, offered: &Self) -> Option<u32> {
        let offered = offered.clone().normal();
        if (&self.os, &self.architecture) != (&offered.os, &offered.architecture) {
            return None;
        }
        if self.variant == offered.variant {
            return Some(0);
        }
        let version = |variant: &str| match variant {
            "" => Some(0),
            variant => variant.strip_prefix('v')?.split('.').next()?.parse::<u32>().ok(),
        };
        version(&self.variant)?.checked_sub(version(&offered.variant)?)
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

/// The manifest of an index that serves `platform` best; the first of equals.
///
/// # Errors
///
/// None does; the message lists what there is.
pub fn choose<'a>(manifests: &'a [Descriptor], platform: &Platform) -> anyhow::Result<&'a Descriptor> {
    let offered = || manifests.iter().filter_map(|entry| Some((entry, entry.platform.as_ref()?)));
    let best = offered()
        .filter_map(|(entry, theirs)| Some((platform.distance(theirs)?, entry)))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, entry)| entry);
    // An index made by hand may hold a single manifest without saying what it is for.
    let only = match manifests {
        [entry] if entry.platform.is_none() => Some(entry),
        _ => None,
    };
    best.or(only).with_context(|| {
        let known =
            offered().map(|(_, theirs)| theirs.to_string()).filter(|name| !name.starts_with("unknown/"));
        let known: Vec<String> = known.collect();
        format!("the image has nothing for platform {platform}, only for: {}", known.join(", "))
    })
}

/// A digest short enough for a line.
pub fn short(digest: &str) -> String {
    let hex = digest.rsplit(':').next().unwrap_or(digest);
    hex.chars().take(12).collect()
}

#[cfg(test)]
mod tests;
