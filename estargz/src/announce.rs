//! What an image's manifest says of a layer's table of contents: its digest, and in zstd:chunked its place.
//!
//! Pure. The names of annotations are here.

use crate::inflate::Compression;
use crate::{Digest, Position, TarSplit};

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

/// Reads what the annotations say of the tar-split, by which the length of the layer's tar can be told. `None` if they say
/// nothing of it, as for any layer but podman's zstd:chunked.
pub fn announced_tar_split<'a>(
    compression: Compression,
    annotation: impl Fn(&str) -> Option<&'a str>,
) -> Option<TarSplit> {
    let position = of_zstd_chunked(compression, &annotation, "tarsplit-position")?;
    let digest = of_zstd_chunked(compression, &annotation, "tarsplit-checksum");
    let position = Position::parse_tar_split(position)?;
    Some(TarSplit { position, digest: digest.and_then(|digest| digest.parse().ok()) })
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

    #[test]
    fn a_tar_split_has_a_position_and_perhaps_a_digest() {
        let of = |compression, position: Option<&str>, checksum: Option<&str>| {
            announced_tar_split(compression, |key| match key.strip_prefix(PREFIX)? {
                "tarsplit-position" => position,
                "tarsplit-checksum" => checksum,
                _ => None,
            })
        };
        let (digest, position) = (Digest::of(b"a"), Position { offset: 10, stored: 20, json: 30 });
        let (zstd, text) = (Compression::Zstd, digest.to_string());
        assert_eq!(of(zstd, Some("10:20:30"), None), Some(TarSplit { position, digest: None }));
        assert_eq!(
            of(zstd, Some("10:20:30"), Some(&text)),
            Some(TarSplit { position, digest: Some(digest) })
        );
        assert_eq!(of(zstd, Some("10:20:30"), Some("x")), Some(TarSplit { position, digest: None }));
        assert_eq!(of(Compression::Gzip, Some("10:20:30"), None), None);
        for bad in
            ["", "10", "10:20", "10:20:30:1", "10:20:-1", "10:20:+1", "10::30", "10:20:99999999999999999999"]
        {
            assert_eq!(of(zstd, Some(bad), Some(&text)), None, "{bad}");
        }
        assert_eq!(of(zstd, None, Some(&text)), None);
    }
}
