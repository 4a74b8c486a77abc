//! Media types of layers and documents: what they say, and their names in OCI and docker.
//!
//! Sources: OCI image specification 1.1, media-types.md and layer.md; docker's manifest v2 schema 2.

use estargz::Compression;

/// The type of an OCI manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The type of an OCI config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// A converted layer's type by family.
const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// docker's types that mean the same as one of OCI's.
const SAME: [(&str, &str); 10] = [
    ("application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.oci.image.index.v1+json"),
    ("application/vnd.docker.distribution.manifest.v2+json", OCI_MANIFEST),
    ("application/vnd.docker.container.image.v1+json", OCI_CONFIG),
    ("application/vnd.docker.image.rootfs.diff.tar", "application/vnd.oci.image.layer.v1.tar"),
    ("application/vnd.docker.image.rootfs.diff.tar.gzip", OCI_GZIP),
    ("application/vnd.docker.image.rootfs.diff.tar.zstd", "application/vnd.oci.image.layer.v1.tar+zstd"),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    ),
    ("application/vnd.docker.image.rootfs.diff.tar+gzip", OCI_GZIP),
];

/// Whose names the documents of the result carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Types {
    /// OCI's, whatever the source has. Only OCI's descriptors have annotations by specification.
    Oci,
    /// The source's.
    Source,
}

impl Types {
    /// The name of what the source calls `media_type`.
    pub fn of(self, media_type: &str) -> &str {
        match self {
            Self::Oci => oci(media_type),
            Self::Source => media_type,
        }
    }

    /// The type of a layer made from a layer of type `media_type`. docker's manifests have no layers in zstd.
    pub fn converted(self, media_type: &str, compression: Compression) -> &'static str {
        match (self, compression) {
            (_, Compression::Zstd) => OCI_ZSTD,
            (Self::Source, _) if media_type.starts_with("application/vnd.docker.") => DOCKER_GZIP,
            _ => OCI_GZIP,
        }
    }
}

/// OCI's name of a type.
pub fn oci(media_type: &str) -> &str {
    SAME.iter().find(|(docker, _)| *docker == media_type).map_or(media_type, |(_, oci)| oci)
}

/// What a conversion can do with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// A tar, compressed in a way that is told from its bytes.
    Tar,
    /// A layer that must not be copied, only referred to.
    NotDistributable,
    /// Something else: encrypted, an attestation, a chart.
    Other,
}

/// Reads a layer's type.
pub fn layer_kind(media_type: &str) -> LayerKind {
    let ending = |prefix: &str| oci(media_type).strip_prefix(prefix);
    let tar = |rest: Option<&str>| matches!(rest, Some("" | "+gzip" | "+zstd"));
    if ending("application/vnd.oci.image.layer.nondistributable.v1.tar").is_some() {
        LayerKind::NotDistributable
    } else if tar(ending("application/vnd.oci.image.layer.v1.tar")) {
        LayerKind::Tar
    } else {
        LayerKind::Other
    }
}

/// Whether a manifest with this type of config is a container image.
pub fn is_image_config(media_type: &str) -> bool {
    oci(media_type) == OCI_CONFIG
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_by_their_types() {
        use LayerKind::{NotDistributable, Other, Tar};
        let cases = [
            ("application/vnd.oci.image.layer.v1.tar", Tar, OCI_GZIP),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Tar, OCI_GZIP),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Tar, OCI_GZIP),
            ("application/vnd.docker.image.rootfs.diff.tar", Tar, DOCKER_GZIP),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Tar, DOCKER_GZIP),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", Tar, DOCKER_GZIP),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", NotDistributable, OCI_GZIP),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", NotDistributable, DOCKER_GZIP),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", Other, OCI_GZIP),
            ("application/vnd.in-toto+json", Other, OCI_GZIP),
            ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", Other, OCI_GZIP),
            ("", Other, OCI_GZIP),
        ];
        for (media_type, kind, converted) in cases {
            assert_eq!(layer_kind(media_type), kind, "{media_type}");
            assert_eq!(Types::Source.converted(media_type, Compression::Gzip), converted, "{media_type}");
            assert_eq!(Types::Oci.converted(media_type, Compression::Gzip), OCI_GZIP, "{media_type}");
            assert_eq!(Types::Oci.converted(media_type, Compression::Zstd), OCI_ZSTD, "{media_type}");
        }
    }

    #[test]
    fn names_in_oci() {
        for (docker, expected) in SAME {
            assert_eq!(Types::Oci.of(docker), expected);
            assert_eq!(Types::Source.of(docker), docker);
            assert_eq!(oci(expected), expected);
        }
        assert!(is_image_config(OCI_CONFIG));
        assert!(is_image_config("application/vnd.docker.container.image.v1+json"));
        assert!(!is_image_config("application/vnd.oci.empty.v1+json"));
    }
}
