//! The file `info`: a layer as containers/storage records it (JSON of its `Layer`, storage/layers.go).
//!
//! Two protocols ask for it. Until c/storage 1.53 (podman 5.0, CRI-O 1.30) a layer's directory is named by the digest of its
//! blob, and `diff-digest` is mandatory: the layer's identity there is made of it. From 1.54 on it is named by the digest of its
//! TOC, which is all that a lazy layer is verified against. There `diff-digest` stays away: it would let another image, which
//! names the same DiffID, use this layer, though nobody has compared the two.

use serde_json::json;

use super::record::{By, LayerRecord};

/// What is said of a layer under one of its names. `diff_size` is the length of its tar in bytes; where it is not known exactly
/// it stays away from those who can do without.
pub fn info(layer: &LayerRecord, by: By) -> Vec<u8> {
    let flags = json!({ "expected-layer-diffid": layer.diff_id });
    let text = match by {
        By::Blob => json!({
            "toc-digest": layer.toc_digest,
            "compressed-diff-digest": layer.blob_digest,
            "compressed-size": layer.blob_size,
            "diff-digest": layer.diff_id,
            // Without a number `podman images` fails.
            "diff-size": layer.diff_size.or(layer.estimated_size).unwrap_or(layer.blob_size),
            "compression": layer.compression.number(),
            "flags": flags,
        }),
        By::Toc => json!({
            "toc-digest": layer.toc_digest,
            "compressed-size": layer.blob_size,
            "diff-size": layer.diff_size.and_then(|size| i64::try_from(size).ok()).unwrap_or(-1),
            "compression": layer.compression.number(),
            "flags": flags,
        }),
    };
    text.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::{
        super::record::{Compression, Entry},
        *,
    };

    fn layer(diff_size: Option<u64>) -> LayerRecord {
        LayerRecord {
            blob_digest: "sha256:b".to_owned(),
            blob_size: 100,
            toc_digest: "sha256:t".to_owned(),
            diff_id: "sha256:d".to_owned(),
            diff_size,
            tar_split: None,
            estimated_size: Some(4096),
            compression: Compression::Gzip,
            by_blob: Entry::at(2),
            by_toc: Entry::at(3),
            below: Vec::new(),
        }
    }

    fn said(layer: &LayerRecord, by: By) -> serde_json::Value {
        serde_json::from_slice(&info(layer, by)).unwrap()
    }

    #[test]
    fn the_old_protocol_has_the_layers_identity_and_a_size_always() {
        let expected = |size: u64| {
            json!({
                "toc-digest": "sha256:t", "compressed-diff-digest": "sha256:b", "compressed-size": 100,
                "diff-digest": "sha256:d", "diff-size": size, "compression": 2,
                "flags": {"expected-layer-diffid": "sha256:d"},
            })
        };
        assert_eq!(said(&layer(Some(2048)), By::Blob), expected(2048));
        assert_eq!(said(&layer(None), By::Blob), expected(4096));
    }

    #[test]
    fn the_new_protocol_claims_nothing_that_was_not_verified() {
        let expected = |size: i64| {
            json!({
                "toc-digest": "sha256:t", "compressed-size": 100, "diff-size": size, "compression": 2,
                "flags": {"expected-layer-diffid": "sha256:d"},
            })
        };
        assert_eq!(said(&layer(Some(2048)), By::Toc), expected(2048));
        assert_eq!(said(&layer(None), By::Toc), expected(-1));
        let zstd = LayerRecord { compression: Compression::Zstd, ..layer(None) };
        assert_eq!(said(&zstd, By::Toc)["compression"], 4);
    }
}
