//! What containerd and a remote snapshotter are told of an image's layers in labels: pure functions.

use std::collections::HashMap;

use crate::image::Descriptor;

/// The largest value a label may have together with its key, in bytes (containerd: labels/validate.go).
const LABEL_LIMIT: usize = 4096;

/// Annotations whose keys start so are handed to the snapshotter (containerd: core/snapshots, FilterInheritedLabels).
const SNAPSHOT_PREFIX: &str = "containerd.io/snapshot/";

/// The chain id a remote snapshotter is asked to commit the layer under.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// What is said of a layer to the snapshotter.
#[derive(Debug)]
pub struct LayerLabels<'a> {
    /// The image's name as it will be recorded.
    pub reference: &'a str,
    /// Digest of the platform's manifest.
    pub manifest_digest: &'a str,
    /// The image's layers from the bottom up.
    pub layers: &'a [Descriptor],
}

impl LayerLabels<'_> {
    /// The labels of layer `n` when its snapshot is prepared and committed.
    ///
    /// They are what containerd's own unpacker sends when annotations are on (pkg/snapshotters/annotations.go and
    /// core/unpack): its chain id, the image's name and digests, and those annotations of the layer that are meant
    /// for snapshotters, in particular the TOC digest.
    pub fn of(&self, n: usize, chain_id: &str) -> HashMap<String, String> {
        let layer = &self.layers[n];
        let mut labels: HashMap<String, String> = layer
            .annotations
            .iter()
            .filter(|(key, _)| key.starts_with(SNAPSHOT_PREFIX))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let own = [
            ("cri.image-ref", self.reference.to_owned()),
            ("cri.layer-digest", layer.digest.clone()),
            ("cri.manifest-digest", self.manifest_digest.to_owned()),
            ("cri.image-layers", image_layers(&self.layers[n..])),
        ];
        labels.extend(own.map(|(key, value)| (format!("{SNAPSHOT_PREFIX}{key}"), value)));
        labels.insert(SNAPSHOT_REF.to_owned(), chain_id.to_owned());
        labels
    }
}

/// The digests of `layers` with commas between, as many as a label holds.
fn image_layers(layers: &[Descriptor]) -> String {
    let room = LABEL_LIMIT - SNAPSHOT_PREFIX.len() - "cri.image-layers".len();
    let mut list = String::new();
    for layer in layers {
        let comma = if list.is_empty() { "" } else { "," };
        if list.len() + comma.len() + layer.digest.len() > room {
            break;
        }
        list.push_str(comma);
        list.push_str(&layer.digest);
    }
    list
}

/// The label that says which repository of which registry a blob came from (containerd:
/// docker.AppendDistributionSourceLabel): repositories of one registry are listed with commas.
pub fn source_label(
    present: &HashMap<String, String>,
    host: &str,
    repository: &str,
) -> Option<(String, String)> {
    let key = format!("containerd.io/distribution.source.{host}");
    let mut repositories: Vec<&str> = present.get(&key).map_or(Vec::new(), |list| list.split(',').collect());
    if repositories.contains(&repository) {
        return None;
    }
    repositories.push(repository);
    repositories.sort_unstable();
    let list = repositories.join(",");
    (key.len() + list.len() <= LABEL_LIMIT).then_some((key, list))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: usize) -> String {
        format!("sha256:{n:064x}")
    }

    fn layer(n: usize, annotations: &[(&str, &str)]) -> Descriptor {
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Descriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            digest: digest(n),
            size: 10,
            annotations: annotations.collect(),
            platform: None,
        }
    }

    #[test]
    fn layers_are_labelled_as_containerd_labels_them() {
        let toc = ("containerd.io/snapshot/stargz/toc.digest", "sha256:toc");
        let layers = [
            layer(0, &[("other", "x"), toc, ("containerd.io/snapshots/no", "y")]),
            layer(1, &[]),
            layer(2, &[]),
        ];
        let labels = LayerLabels { reference: "r.example/a:1", manifest_digest: "sha256:m", layers: &layers };
        let expected: HashMap<String, String> = [
            ("containerd.io/snapshot.ref", "sha256:chain".to_owned()),
            ("containerd.io/snapshot/cri.image-ref", "r.example/a:1".to_owned()),
            ("containerd.io/snapshot/cri.layer-digest", digest(0)),
            ("containerd.io/snapshot/cri.manifest-digest", "sha256:m".to_owned()),
            ("containerd.io/snapshot/cri.image-layers", format!("{},{},{}", digest(0), digest(1), digest(2))),
            ("containerd.io/snapshot/stargz/toc.digest", "sha256:toc".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        assert_eq!(labels.of(0, "sha256:chain"), expected);

        let top = labels.of(2, "sha256:top");
        assert_eq!(top["containerd.io/snapshot/cri.image-layers"], digest(2));
        assert!(!top.contains_key(toc.0));
    }

    #[test]
    fn the_list_of_layers_is_cut_to_what_a_label_holds() {
        let layers: Vec<Descriptor> = (0..70).map(|n| layer(n, &[])).collect();
        let labels = LayerLabels { reference: "r", manifest_digest: "m", layers: &layers };
        let list = |n: usize| labels.of(n, "c")["containerd.io/snapshot/cri.image-layers"].clone();
        assert_eq!(list(0).len(), 4031);
        assert_eq!(list(0).split(',').count(), 56);
        assert_eq!(list(0).split(',').next_back(), Some(digest(55).as_str()));
        assert_eq!(list(14).split(',').count(), 56);
        assert_eq!(list(15).split(',').count(), 55);
    }

    #[test]
    fn sources_are_added_to_those_known() {
        let key = "containerd.io/distribution.source.r.example".to_owned();
        let label = |present: &str, repository: &str| {
            let present = HashMap::from([(key.clone(), present.to_owned())]);
            source_label(&present, "r.example", repository).map(|(_, list)| list)
        };
        assert_eq!(source_label(&HashMap::new(), "r.example", "a/b"), Some((key.clone(), "a/b".to_owned())));
        assert_eq!(label("c", "a/b"), Some("a/b,c".to_owned()));
        assert_eq!(label("a/b,c", "a/b"), None);
        assert_eq!(label(&"x".repeat(4050), "a/b"), None, "containerd refuses longer labels");
    }
}
