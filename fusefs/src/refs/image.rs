//! Which layers of an image can be shown, from its documents: pure functions.

use std::collections::HashMap;

use serde::Deserialize;

use super::record::{Compression, Entry, LayerRecord, RefRecord};
use crate::manifest::{ImageLayers, ManifestLayer};

/// Bytes of a config at most.
pub const CONFIG_LIMIT: u64 = 8 << 20;
/// Layers of an image at most: containers/storage takes no more than 500 either. A record is as long as the square of it.
const LAYERS: usize = 512;
/// Layers that a tag is remembered to have led to at most; those that come then are pulled.
const ALL_LAYERS: usize = 8192;
/// Go has sizes in 64 bits with a sign.
const SIZE: u64 = i64::MAX as u64;
/// Manifests that a tag is remembered to have led to; what older ones brought stays.
const MANIFESTS: usize = 64;

/// The diff ids of an image's config; none if it is not one.
pub fn diff_ids(config: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Vec<String>,
    }
    serde_json::from_slice::<Config>(config).map_or(Vec::new(), |config| config.rootfs.diff_ids)
}

/// A layer that can be shown, and the numbers of its slots are given by `number`.
fn layer(layer: &ManifestLayer, diff_id: &str, number: &mut impl FnMut() -> u32) -> Option<LayerRecord> {
    let compression = match layer.media_type.as_str() {
        kind if kind.ends_with("+gzip") || kind.ends_with(".gzip") => Compression::Gzip,
        kind if kind.ends_with("+zstd") || kind.ends_with(".zstd") => Compression::Zstd,
        _ => return None,
    };
    if layer.size > SIZE {
        return None;
    }
    Some(LayerRecord {
        blob_digest: layer.digest.clone(),
        blob_size: layer.size,
        toc_digest: layer.toc_digest()?.to_string(),
        diff_id: diff_id.to_owned(),
        diff_size: layer.diff_size.filter(|size| *size <= SIZE),
        tar_split: layer.tar_split,
        estimated_size: None,
        compression,
        by_blob: Entry::at(number()),
        by_toc: Entry::at(number()),
        below: Vec::new(),
    })
}

/// Adds to a reference what it leads to now. A layer that occurs twice in the image is left out: its paths would be the same,
/// and overlayfs refuses one directory as two lowers.
pub fn add(
    record: &mut RefRecord,
    image: &ImageLayers,
    diff_ids: &[String],
    mut number: impl FnMut() -> u32,
) {
    if !record.manifests.contains(&image.digest) {
        if record.manifests.len() >= MANIFESTS {
            record.manifests.remove(0);
        }
        record.manifests.push(image.digest.clone());
    }
    let all = record.layers.len() + image.layers.len();
    if diff_ids.len() != image.layers.len() || image.layers.len() > LAYERS || all > ALL_LAYERS {
        // podman unpacks such an image, or refuses it.
        return;
    }
    let mut seen: HashMap<String, u32> = HashMap::new();
    for layer in &image.layers {
        *seen.entry(layer.digest.clone()).or_default() += 1;
        if let Some(digest) = layer.toc_digest() {
            *seen.entry(digest.to_string()).or_default() += 1;
        }
    }
    let is_once = |digest: &str| seen.get(digest) == Some(&1);
    let mut below: Vec<usize> = Vec::new();
    for (described, diff_id) in image.layers.iter().zip(diff_ids) {
        let Some(toc_digest) = described.toc_digest().map(|digest| digest.to_string()) else { continue };
        if !is_once(&described.digest) || !is_once(&toc_digest) {
            continue;
        }
        let known = record
            .layers
            .iter()
            .position(|known| known.blob_digest == described.digest && known.toc_digest == toc_digest);
        let place = match known {
            Some(place) => place,
            None => {
                let Some(mut new) = layer(described, diff_id, &mut number) else { continue };
                new.below = below.iter().rev().copied().collect();
                record.layers.push(new);
                record.layers.len() - 1
            }
        };
        below.push(place);
    }
}

#[cfg(test)]
mod tests {
    use estargz::Announced;

    use super::*;

    fn digest(letter: char) -> String {
        format!("sha256:{}", letter.to_string().repeat(64))
    }

    fn described(blob: char, toc: Option<char>) -> ManifestLayer {
        ManifestLayer {
            digest: digest(blob),
            size: 10,
            toc: toc.map(|toc| Announced { digest: digest(toc).parse().unwrap(), position: None }),
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            diff_size: None,
            tar_split: None,
        }
    }

    fn image(name: &str, layers: &[(char, Option<char>)]) -> ImageLayers {
        ImageLayers {
            digest: name.to_owned(),
            config: Some(digest('f')),
            layers: layers.iter().map(|&(blob, toc)| described(blob, toc)).collect(),
        }
    }

    fn ids(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("diff{n}")).collect()
    }

    #[test]
    fn lazy_layers_get_numbers_and_know_what_is_below() {
        let mut record = RefRecord::new(2, "h/r:t".to_owned(), 0);
        let mut next = 3;
        let mut number = || {
            next += 1;
            next - 1
        };
        let first = image("m1", &[('0', Some('a')), ('1', None), ('2', Some('c'))]);
        add(&mut record, &first, &ids(3), &mut number);
        let seen: Vec<_> =
            record.layers.iter().map(|l| (l.diff_id.as_str(), l.by_blob.slot, l.by_toc.slot)).collect();
        assert_eq!(seen, [("diff0", 3, 4), ("diff2", 5, 6)]);
        assert_eq!(record.layers[1].below, [0]);
        // The tag has moved: what is known keeps its place and numbers.
        let second = image("m2", &[('0', Some('a')), ('3', Some('d'))]);
        add(&mut record, &second, &ids(2), &mut number);
        add(&mut record, &second, &ids(2), &mut number);
        assert_eq!(record.manifests, ["m1", "m2"]);
        assert_eq!(record.layers.len(), 3);
        assert_eq!((record.layers[2].by_blob.slot, &record.layers[2].below[..]), (7, &[0][..]));
    }

    #[test]
    fn what_cannot_be_shown_rightly_is_left_out() {
        let add_to_new = |image: &ImageLayers, ids: &[String]| {
            let mut record = RefRecord::new(2, "h/r:t".to_owned(), 0);
            add(&mut record, image, ids, || 9);
            record.layers.len()
        };
        assert_eq!(add_to_new(&image("m", &[('0', Some('a')), ('0', Some('a'))]), &ids(2)), 0, "twice");
        assert_eq!(
            add_to_new(&image("m", &[('0', Some('a')), ('1', Some('a'))]), &ids(2)),
            0,
            "the same tree"
        );
        assert_eq!(add_to_new(&image("m", &[('0', Some('a'))]), &ids(2)), 0, "another config");
        let mut plain = image("m", &[('0', Some('a'))]);
        plain.layers[0].media_type = "application/vnd.oci.image.layer.v1.tar".to_owned();
        assert_eq!(add_to_new(&plain, &ids(1)), 0);
        plain = image("m", &[('0', Some('a'))]);
        plain.layers[0].size = u64::MAX;
        assert_eq!(add_to_new(&plain, &ids(1)), 0);
        let many: Vec<(char, Option<char>)> =
            (0..=LAYERS).map(|_| ('0', None)).chain([('1', Some('a'))]).collect();
        assert_eq!(add_to_new(&image("m", &many), &ids(many.len())), 0);
        assert_eq!(add_to_new(&image("m", &[('0', Some('a'))]), &ids(1)), 1);
    }

    #[test]
    fn a_config_that_is_none_has_no_diff_ids() {
        assert_eq!(diff_ids(br#"{"rootfs":{"type":"layers","diff_ids":["a","b"]}}"#), ["a", "b"]);
        for other in [&b""[..], b"{}", b"[]", br#"{"rootfs":{}}"#, br#"{"rootfs":{"diff_ids":[1]}}"#] {
            assert!(diff_ids(other).is_empty());
        }
    }
}
