//! What an earlier run has left at the destination: layers that need not be converted again.
//!
//! A converted layer's annotation tells its recipe: which blob it was made of, and with which options. Conversion is
//! deterministic, so the same recipe gives the same layer. There is no other memory between runs.

use std::collections::HashMap;

use estargz::writer::{Dialect, Target};
use estargz::{Compression, Digest};

use super::plan::Task;
use super::rewrite::{CONVERTED_FROM, Change, is_of_blob};
use crate::image::{Descriptor, Document, INDEX_DEPTH, ImageConfig};
use crate::transport::{Raw, Source};

/// Raised when the same options give other bytes than before.
const VERSION: u32 = 1;

/// The options that decide a layer's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What is built.
    pub target: Target,
    /// Bytes of a chunk, at most.
    pub chunk_size: u64,
    /// Bytes that a member has at least before a file begins a new one.
    pub min_chunk_size: u64,
    /// Compression level.
    pub level: u8,
}

/// Documents looked into: more platforms than there are.
const MAX_DOCUMENTS: usize = 256;

/// From which layer, and how, a layer is made: the value of [`CONVERTED_FROM`].
pub fn recipe(task: &Task, shape: &Shape) -> String {
    let Shape { target, chunk_size, min_chunk_size, level } = shape;
    let first = match task.first.is_empty() {
        true => "-".to_owned(),
        false => {
            let lines: String = task.first.iter().map(|first| format!("{first:?}\n")).collect();
            Digest::of(lines.as_bytes()).to_string()
        }
    };
    // Nothing for eStargz, which was the only one.
    let format = match target {
        Target::EStargz => "",
        Target::ZstdChunked(Dialect::Podman) => " format=zstd:chunked dialect=podman",
        Target::ZstdChunked(Dialect::Stargz) => " format=zstd:chunked dialect=stargz",
    };
    format!(
        "{} {VERSION} chunk-size={chunk_size} min-chunk-size={min_chunk_size} level={level} first={first}{format}",
        task.layer.digest
    )
}

/// Layers by their recipes.
pub type Earlier = HashMap<String, Change>;

/// Reads what the destination's name stands for. What cannot be read is as good as absent.
pub async fn read(destination: &dyn Source) -> Earlier {
    let mut earlier = Earlier::new();
    match destination.root().await {
        Ok(Some(root)) => gather(destination, root, &mut earlier).await,
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "the destination cannot be read"),
    }
    earlier
}

async fn gather(source: &dyn Source, root: Raw, earlier: &mut Earlier) {
    let mut documents = vec![(root, 0)];
    let mut left = MAX_DOCUMENTS;
    while let Some((raw, depth)) = documents.pop() {
        match Document::parse(&raw.media_type, &raw.bytes) {
            Ok(Document::Index(entries)) if depth < INDEX_DEPTH => {
                for entry in entries.iter().take(left) {
                    left -= 1;
                    documents.extend(source.document(entry).await.map(|raw| (raw, depth + 1)));
                }
            }
            Ok(Document::Manifest(manifest)) => {
                if !manifest.layers.iter().any(|layer| layer.annotations.contains_key(CONVERTED_FROM)) {
                    continue;
                }
                let Ok(bytes) = source.small(&manifest.config).await else { continue };
                let Ok(config) = ImageConfig::parse(&bytes, &manifest) else { continue };
                let layers = manifest.layers.iter().zip(&config.diff_ids);
                earlier.extend(layers.filter_map(|(layer, diff_id)| converted(layer, diff_id)));
            }
            Ok(Document::Index(_)) | Err(_) => {}
        }
    }
}

/// The layer with its recipe, if it has one.
fn converted(layer: &Descriptor, diff_id: &str) -> Option<(String, Change)> {
    let recipe = layer.annotations.get(CONVERTED_FROM)?;
    let zstd = layer.compression() == Compression::Zstd;
    // One that podman would refuse is not annotated.
    if !zstd {
        layer.toc()?;
    }
    diff_id.parse::<Digest>().ok()?;
    let ours = layer.annotations.iter().filter(|(key, _)| is_of_blob(key) || *key == CONVERTED_FROM);
    let annotations = ours.map(|(key, value)| (key.clone(), value.clone())).collect();
    let change = Change {
        digest: layer.digest.clone(),
        size: layer.size,
        diff_id: Some(diff_id.to_owned()),
        zstd,
        annotations,
    };
    Some((recipe.clone(), change))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::media::LayerKind;
    use crate::convert::priority::First;
    use crate::convert::rewrite::UNCOMPRESSED_SIZE;
    use crate::image::TOC_DIGEST;

    fn digest(n: u32) -> String {
        format!("sha256:{n:064x}")
    }

    fn layer(annotations: &[(&str, &str)]) -> Descriptor {
        Descriptor {
            media_type: "l".to_owned(),
            digest: digest(1),
            size: 9,
            annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            platform: None,
        }
    }

    #[test]
    fn whatever_changes_the_bytes_changes_the_recipe() {
        let task = |first: &[&str]| Task {
            layer: layer(&[]),
            first: first.iter().map(|&path| First::Path(path.to_owned())).collect(),
            kind: LayerKind::Tar,
        };
        let shape = Shape { target: Target::EStargz, chunk_size: 4 << 20, min_chunk_size: 0, level: 6 };
        let plain = recipe(&task(&[]), &shape);
        assert_eq!(plain, format!("{} 1 chunk-size=4194304 min-chunk-size=0 level=6 first=-", digest(1)));
        let others = [
            recipe(&task(&["a"]), &shape),
            recipe(&task(&["a", "b"]), &shape),
            recipe(&task(&["b", "a"]), &shape),
            recipe(&task(&[]), &Shape { level: 7, ..shape }),
            recipe(&task(&[]), &Shape { chunk_size: 1, ..shape }),
            recipe(&task(&[]), &Shape { min_chunk_size: 1, ..shape }),
            recipe(&task(&[]), &Shape { target: Target::ZstdChunked(Dialect::Podman), ..shape }),
            recipe(&task(&[]), &Shape { target: Target::ZstdChunked(Dialect::Stargz), ..shape }),
        ];
        let mut all: Vec<&String> = others.iter().chain([&plain]).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 9);
    }

    #[test]
    fn only_layers_that_tell_everything_are_taken() {
        let toc = digest(2);
        let full =
            [(TOC_DIGEST, toc.as_str()), (CONVERTED_FROM, "r"), (UNCOMPRESSED_SIZE, "7"), ("other", "x")];
        let (key, change) = converted(&layer(&full), &digest(3)).unwrap();
        assert_eq!((key.as_str(), change.diff_id, change.size), ("r", Some(digest(3)), 9));
        assert_eq!(change.annotations.len(), 3, "what is not ours comes from the source");
        assert!(converted(&layer(&full[..1]), &digest(3)).is_none());
        assert!(converted(&layer(&full[1..]), &digest(3)).is_none());
        assert!(converted(&layer(&[(TOC_DIGEST, "x"), (CONVERTED_FROM, "r")]), &digest(3)).is_none());
        assert!(converted(&layer(&full), "x").is_none());

        let checksum = "io.github.containers.zstd-chunked.manifest-checksum";
        let podman = Descriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar+zstd".to_owned(),
            ..layer(&[(checksum, &toc), (CONVERTED_FROM, "r"), ("other", "x")])
        };
        let (_, change) = converted(&podman, &digest(3)).unwrap();
        assert_eq!((change.annotations.len(), &change.annotations[checksum], change.zstd), (2, &toc, true));
    }
}
