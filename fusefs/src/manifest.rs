//! What an image's manifest says of its layers: their sizes, and the digests and places of their TOCs.
//!
//! containerd hands a snapshotter the digests of an image's layers but neither their sizes nor the annotations of
//! those above, nor those of podman's zstd:chunked; all stand in the manifest, which is fetched once per image and kept
//! in a small cache. With it every layer opens in one request, and all of them at once.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use estargz::{Announced, Compression, Digest, TarSplit};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use parking_lot::Mutex;
use registry::{Reference, Registry};
use tokio::{sync::OnceCell, time::Instant};

/// containerd passes this annotation of a layer's descriptor on as a label.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Builders note the length of a layer's tar.
const DIFF_SIZE_ANNOTATION: &str = "io.containers.estargz.uncompressed-size";
/// Manifests kept; an image is asked about for the seconds its pull takes.
const CACHED: usize = 64;
/// How long nobody who could do without asks again for a manifest that could not be had.
const GIVEN_UP: Duration = Duration::from_secs(30);

/// One layer as its image's manifest describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestLayer {
    /// Digest of the blob.
    pub digest: String,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Its TOC, where it is annotated.
    pub toc: Option<Announced>,
    /// What the blob is.
    pub media_type: String,
    /// Bytes of its tar, where they are annotated.
    pub diff_size: Option<u64>,
    /// Where they can be told from.
    pub tar_split: Option<TarSplit>,
}

impl ManifestLayer {
    /// Digest of its TOC, where it is annotated.
    pub fn toc_digest(&self) -> Option<Digest> {
        self.toc.map(|toc| toc.digest)
    }
}

/// An image's manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayers {
    /// Digest of the manifest.
    pub digest: String,
    /// Digest of the config; `None` if this is no manifest.
    pub config: Option<String>,
    /// From the bottom up.
    pub layers: Vec<ManifestLayer>,
}

type Layers = Arc<Vec<ManifestLayer>>;
/// Host, repository and manifest digest or tag.
type Key = (String, String, String);

/// Manifests by where they are from. Two layers of one image ask together and cost one request; a failure is not kept.
#[derive(Debug, Default)]
pub struct Manifests(Mutex<Cache>);

#[derive(Debug, Default)]
struct Cache {
    cells: HashMap<Key, Arc<OnceCell<Layers>>>,
    order: VecDeque<Key>,
    /// What could not be had, and when that was found.
    failed: HashMap<Key, Instant>,
}

impl Manifests {
    /// The layers of an image, from the cache or the registry.
    pub async fn layers(
        &self,
        registry: &Registry,
        reference: &Reference,
        digest: Option<&str>,
        deadline: Instant,
    ) -> Result<Layers, registry::Error> {
        let cell = self.cell(key(reference, digest));
        cell.get_or_try_init(|| fetch(registry, reference, digest, deadline)).await.cloned()
    }

    /// The same for one who can do without: `None` if they cannot be had, and for a while after that without asking, so
    /// that the layers of an image that is unpacked do not each wait for a registry that does not answer.
    pub async fn layers_if_any(
        &self,
        registry: &Registry,
        reference: &Reference,
        digest: &str,
        deadline: Instant,
    ) -> Option<Layers> {
        let key = key(reference, Some(digest));
        let cell = self.cell(key.clone());
        let ask = || async {
            if self.0.lock().failed.get(&key).is_some_and(|since| since.elapsed() < GIVEN_UP) {
                return Err(());
            }
            let asking =
                tokio::time::timeout_at(deadline, fetch(registry, reference, Some(digest), deadline));
            let error = match asking.await {
                Ok(Ok(layers)) => return Ok(layers),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it takes too long".to_owned(),
            };
            tracing::debug!(%reference, digest, error, "no manifest; the image counts as an ordinary one");
            let mut cache = self.0.lock();
            cache.failed.retain(|_, since| since.elapsed() < GIVEN_UP);
            if cache.failed.len() < CACHED {
                cache.failed.insert(key.clone(), Instant::now());
            }
            Err(())
        };
        // Somebody with more time may be asking.
        tokio::time::timeout_at(deadline, cell.get_or_try_init(ask)).await.ok()?.ok().cloned()
    }

    fn cell(&self, key: Key) -> Arc<OnceCell<Layers>> {
        let mut cache = self.0.lock();
        if let Some(cell) = cache.cells.get(&key) {
            return cell.clone();
        }
        if cache.order.len() >= CACHED
            && let Some(oldest) = cache.order.pop_front()
        {
            cache.cells.remove(&oldest);
        }
        let cell = Arc::new(OnceCell::new());
        cache.order.push_back(key.clone());
        cache.cells.insert(key, cell.clone());
        cell
    }
}

fn key(reference: &Reference, digest: Option<&str>) -> Key {
    let version = digest.or(reference.digest()).or(reference.tag()).unwrap_or_default().to_owned();
    (reference.host().to_owned(), reference.repository().to_owned(), version)
}

async fn fetch(
    registry: &Registry,
    reference: &Reference,
    digest: Option<&str>,
    deadline: Instant,
) -> Result<Layers, registry::Error> {
    Ok(Arc::new(image(registry, reference, digest, deadline).await?.layers))
}

/// The manifest for this machine that a reference leads to, from the registry.
pub async fn image(
    registry: &Registry,
    reference: &Reference,
    digest: Option<&str>,
    deadline: Instant,
) -> Result<ImageLayers, registry::Error> {
    let mut manifest = registry.manifest(reference, digest, deadline).await?;
    if let Some(platform) = platform_manifest(&manifest.bytes) {
        manifest = registry.manifest(reference, Some(&platform), deadline).await?;
    }
    let (config, layers) = parse(&manifest.bytes);
    Ok(ImageLayers { digest: manifest.digest, config, layers })
}

/// If these bytes are an index: the digest of its manifest for this machine.
fn platform_manifest(bytes: &[u8]) -> Option<String> {
    let index: ImageIndex = serde_json::from_slice(bytes).ok()?;
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let fits = |d: &&oci_spec::image::Descriptor| {
        d.platform()
            .as_ref()
            .is_some_and(|p| p.os().to_string() == "linux" && p.architecture().to_string() == arch)
    };
    index.manifests().iter().find(fits).map(|d| d.digest().to_string())
}

/// The config and layers of a manifest; none if it is not one. What it lacks is then learnt from the blobs themselves.
fn parse(bytes: &[u8]) -> (Option<String>, Vec<ManifestLayer>) {
    let Ok(manifest) = serde_json::from_slice::<ImageManifest>(bytes) else { return (None, Vec::new()) };
    (Some(manifest.config().digest().to_string()), manifest.layers().iter().map(layer).collect())
}

fn layer(layer: &Descriptor) -> ManifestLayer {
    let compression = Compression::of_media_type(layer.media_type().as_ref());
    let annotation = |key: &str| layer.annotations().as_ref()?.get(key).map(String::as_str);
    ManifestLayer {
        digest: layer.digest().to_string(),
        size: layer.size(),
        toc: estargz::announced(compression, annotation),
        tar_split: estargz::announced_tar_split(compression, annotation),
        media_type: layer.media_type().to_string(),
        diff_size: annotation(DIFF_SIZE_ANNOTATION).and_then(|size| size.parse().ok()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    #[test]
    fn sizes_and_toc_digests_are_read_and_anything_else_is_no_manifest() {
        let layer = |digest: &str, kind: &str, annotations: serde_json::Value| {
            serde_json::json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.tar+{kind}"), "digest": digest, "size": 7,
                "annotations": annotations,
            })
        };
        let zstd = serde_json::json!({
            "io.github.containers.zstd-chunked.manifest-checksum": A,
            "io.github.containers.zstd-chunked.manifest-position": "10:20:30:1",
            "io.github.containers.zstd-chunked.tarsplit-position": "38:5:6",
        });
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": A, "size": 1},
            "layers": [
                layer(A, "gzip", serde_json::json!({TOC_DIGEST_ANNOTATION: B, DIFF_SIZE_ANNOTATION: "9"})),
                layer(B, "gzip", serde_json::json!({})),
                layer(B, "zstd", zstd.clone()),
                layer(B, "gzip", zstd),
            ],
        });
        let (config, layers) = parse(manifest.to_string().as_bytes());
        assert_eq!(config.as_deref(), Some(A));
        assert_eq!(layers.len(), 4);
        assert_eq!((layers[0].digest.as_str(), layers[0].size), (A, 7));
        let position = estargz::Position { offset: 10, stored: 20, json: 30 };
        let toc = |digest: &str, position| Some(Announced { digest: digest.parse().unwrap(), position });
        let found: Vec<_> = layers.iter().map(|layer| layer.toc).collect();
        assert_eq!(found, [toc(B, None), None, toc(A, Some(position)), None]);
        assert_eq!((layers[0].diff_size, layers[0].media_type.ends_with("+gzip")), (Some(9), true));
        assert_eq!(layers[1].diff_size, None);
        let position = estargz::Position { offset: 38, stored: 5, json: 6 };
        let splits: Vec<_> = layers.iter().map(|layer| layer.tar_split).collect();
        assert_eq!(splits, [None, None, Some(TarSplit { position, digest: None }), None]);
        assert_eq!(platform_manifest(manifest.to_string().as_bytes()), None);
        for other in [&b""[..], b"{}", b"[1]", b"\xff"] {
            assert_eq!(parse(other), (None, vec![]));
        }
    }
}
