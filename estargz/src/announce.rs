//! What an image's manifest says of a layer's table of contents: its digest, and in zstd:chunked its place.
//!
//! Pure. The names of annotations are here.

use crate::inflate::Compression;
use crate::{Digest, Position};

/// The digest of the TOC's JSON; eStargz, and zstd:chunked as stargz-snapshotter writes it.
pub(crate) const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Bytes of the decompressed blob, which containers/storage and stargz-store want to know.
pub(crate) const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";
/// Before `manifest-checksum` (the digest of the TOC as it is compressed) and `manifest-position`: by containers/storage
/// since 1.45.
pub(crate) const PREFIX: &str = "io.github.containers.zstd-chunked.";
/// The same by containers/storage before that, and by stargz-snapshotter.
pub(crate) const OLD_PREFIX: &str = "io.containers.zstd-chunked.";

/// A table of contents as a manifest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The trusted digest, for [`TocJson::verify`](crate::TocJson::verify).
    pub digest: Digest,
    /// Where it is, if that is said; it only saves reading the blob's footer.
    pub position: Option<Position>,
}

/// Reads the annotations of a layer's descriptor, of which is known what the layer is compressed with. `None` if they name
/// no table of contents. Nothing that is not zstd is zstd:chunked, whatever is said of it.
///
/// Where both kinds of digest are named it is that of the JSON, because it is what containerd passes on. (podman refuses
/// such an image.) A digest that is none counts as not named.
pub fn announced<'a>(
    compression: Compression,
    annotation: impl Fn(&str) -> Option<&'a str>,
) -> Option<Announced> {
    let digest = announced_digest(compression, &annotation)?.parse().ok()?;
    let position = of_zstd_chunked(compression, &annotation, "manifest-position").and_then(Position::parse);
    Some(Announced { digest, position })
}

/// The digest that [`announced`] reads, as it is written; it may be none.
pub fn announced_digest<'a>(
    compression: Compression,
    annotation: impl Fn(&str) -> Option<&'a str>,
) -> Option<&'a str> {
    annotation(TOC_DIGEST).or_else(|| of_zstd_chunked(compression, &annotation, "manifest-checksum"))
}

fn of_zstd_chunked<'a>(
    compression: Compression,
    annotation: impl Fn(&str) -> Option<&'a str>,
    name: &str,
) -> Option<&'a str> {
    let find = || [PREFIX, OLD_PREFIX].iter().find_map(|prefix| annotation(&format!("{prefix}{name}")));
    if compression == Compression::Zstd { find() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_prefix_and_either_digest() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let of = |pairs: &[(&str, &str)]| {
            announced(Compression::Zstd, |key| {
                pairs.iter().find(|(name, _)| *name == key).map(|(_, value)| *value)
            })
        };
        let position = Position { offset: 10, stored: 20, json: 30 };
        for prefix in [PREFIX, OLD_PREFIX] {
            let checksum = format!("{prefix}manifest-checksum");
            let place = format!("{prefix}manifest-position");
            let (text, json) = (a.to_string(), b.to_string());
            assert_eq!(
                of(&[(&checksum, &text), (&place, "10:20:30:1")]),
                Some(Announced { digest: a, position: Some(position) })
            );
            assert_eq!(
                of(&[(&checksum, &text), (&place, "10")]),
                Some(Announced { digest: a, position: None })
            );
            assert_eq!(
                of(&[(&checksum, &text), (&place, "10:20:30:1"), (TOC_DIGEST, &json)]),
                Some(Announced { digest: b, position: Some(position) })
            );
            assert_eq!(of(&[(&place, "10:20:30:1")]), None);
            assert_eq!(of(&[(&checksum, "sha256:x")]), None);
        }
        assert_eq!(of(&[(TOC_DIGEST, &a.to_string())]), Some(Announced { digest: a, position: None }));
        assert_eq!(of(&[]), None);
        let text = a.to_string();
        let podman = |key: &str| key.ends_with("manifest-checksum").then_some(&*text);
        assert!(announced(Compression::Zstd, podman).is_some());
        assert_eq!(announced(Compression::Gzip, podman), None);
        assert_eq!(announced_digest(Compression::Zstd, |_| Some("x")), Some("x"));
    }
}
