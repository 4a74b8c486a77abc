//! What the labels of a Prepare say about the layer.
//!
//! Pure. Two families of labels name the image and the blob; containerd's own (`cri.*`) wins over the one that
//! `ctr-remote` sends (`remote/stargz.*`), and a family counts only when it names both. The TOC digest is an
//! annotation of the layer that containerd passes on because of its prefix; podman's kind of zstd:chunked has another
//! one, which is not passed on, so of such a layer the manifest must be asked. Every digest is checked here, so
//! nothing further in ever sees one that could be mistaken for a path.

use std::collections::BTreeMap;

use crate::filesystem::{AttachError, LayerRequest, Reason};

/// Names the committed snapshot a Prepare stands for; its value is a chain id.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// Set on every lazy snapshot; buildkit looks for it.
pub const REMOTE: &str = "containerd.io/snapshot/remote";
/// Value of [`REMOTE`].
pub const REMOTE_VALUE: &str = "remote snapshot";
/// Set on a committed ordinary snapshot that containerd had offered as a layer: `<reason>: <message>`.
pub const REASON: &str = "containerd.io/snapshot/lazurite.reason";

const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
const PREFETCH: &str = "containerd.io/snapshot/remote/stargz.prefetch";
/// `true` or `false`: whether all of the layer is fetched behind the container, whatever the daemon's configuration says.
/// As an annotation of the layer it is passed on by containerd.
const BACKGROUND_FETCH: &str = "containerd.io/snapshot/lazurite.background-fetch";

/// Where one family of labels keeps the reference, the blob digest and the digests of the layers from this one up.
struct Family {
    reference: &'static str,
    digest: &'static str,
    layers: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        reference: "containerd.io/snapshot/cri.image-ref",
        digest: "containerd.io/snapshot/cri.layer-digest",
        layers: "containerd.io/snapshot/cri.image-layers",
    },
    Family {
        reference: "containerd.io/snapshot/remote/stargz.reference",
        digest: "containerd.io/snapshot/remote/stargz.digest",
        layers: "containerd.io/snapshot/remote/stargz.layers",
    },
];

/// Bytes a [`REASON`] label's value may have; containerd refuses labels of more than 4096 bytes.
const REASON_LIMIT: usize = 512;

/// A layer offered by a Prepare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The labels say everything.
    Named(LayerRequest),
    /// They do not say the TOC digest, but name the manifest that may. The request's is empty until [`Offer::named`].
    Unnamed(LayerRequest),
}

impl Offer {
    /// The request for an unnamed layer whose manifest says this TOC digest, or none.
    pub(crate) fn named(
        request: LayerRequest,
        toc_digest: Option<String>,
    ) -> Result<LayerRequest, AttachError> {
        match toc_digest {
            None => Err(no_toc_digest("nor one of zstd:chunked")),
            Some(toc_digest) if is_digest(&toc_digest) => Ok(LayerRequest { toc_digest, ..request }),
            Some(other) => Err(AttachError::new(
                Reason::BadLabels,
                format!("the manifest names TOC {other:?}, not sha256:<64 lower-case hex digits>"),
            )),
        }
    }
}

/// The layer offered by a Prepare with these labels.
///
/// `None` when it does not stand for a layer at all (no [`TARGET`]); an error when it does, but the layer cannot
/// be attached.
pub fn parse(labels: &BTreeMap<String, String>) -> Option<Result<Offer, AttachError>> {
    let target = get(labels, TARGET)?;
    Some(offer(target, labels))
}

fn no_toc_digest(besides: &str) -> AttachError {
    AttachError::new(
        Reason::NoTocDigest,
        format!(
            "the layer has no annotation {TOC_DIGEST} {besides}; convert the image to eStargz or zstd:chunked to pull it \
             lazily"
        ),
    )
}

/// The layer's blob digest as claimed by the labels, unchecked; for telling layers apart in reports.
pub(crate) fn claimed_layer(labels: &BTreeMap<String, String>) -> Option<&str> {
    FAMILIES.iter().find_map(|family| get(labels, family.digest))
}

/// The labels without those that are empty: an empty value means "no such label" wherever labels are given.
pub(crate) fn without_empty(mut labels: BTreeMap<String, String>) -> BTreeMap<String, String> {
    labels.retain(|_, value| !value.is_empty());
    labels
}

/// The value of a [`REASON`] label for an error.
pub(crate) fn reason_value(error: &AttachError) -> String {
    let mut text = error.to_string();
    text.truncate(text.floor_char_boundary(REASON_LIMIT));
    text
}

fn offer(target: &str, labels: &BTreeMap<String, String>) -> Result<Offer, AttachError> {
    let (toc_digest, manifest_digest) = (get(labels, TOC_DIGEST), get(labels, MANIFEST_DIGEST));
    let named = FAMILIES
        .iter()
        .find_map(|family| Some((family, get(labels, family.reference)?, get(labels, family.digest)?)));
    if toc_digest.is_none() && (manifest_digest.is_none() || named.is_none()) {
        return Err(no_toc_digest("and the client names no manifest that could have one"));
    }
    let (family, reference, layer_digest) = named.ok_or_else(|| {
        AttachError::new(
            Reason::NoReference,
            "the client named neither image nor blob; let containerd pass snapshot annotations \
                 (disable_snapshot_annotations = false, or enable_remote_snapshot_annotations)",
        )
    })?;
    let digests =
        [(TOC_DIGEST, toc_digest), (family.digest, Some(layer_digest)), (MANIFEST_DIGEST, manifest_digest)];
    for (label, digest) in digests.into_iter().filter_map(|(label, digest)| Some((label, digest?))) {
        if !is_digest(digest) {
            let message = format!("label {label} is {digest:?}, not sha256:<64 lower-case hex digits>");
            return Err(AttachError::new(Reason::BadLabels, message));
        }
    }
    let request = LayerRequest {
        target: target.to_owned(),
        reference: reference.to_owned(),
        layer_digest: layer_digest.to_owned(),
        toc_digest: toc_digest.unwrap_or_default().to_owned(),
        manifest_digest: manifest_digest.map(str::to_owned),
        neighbours: neighbours(layer_digest, get(labels, family.layers).unwrap_or_default()),
        // Only a hint, so a value that is no number is no reason to give the layer up.
        prefetch_bytes: get(labels, PREFETCH).and_then(|value| value.parse().ok()),
        background_fetch: get(labels, BACKGROUND_FETCH).and_then(|value| value.parse().ok()),
        // Not in the labels: known once the snapshot has its record.
        below: vec![],
        labels: labels.clone(),
    };
    Ok(if toc_digest.is_some() { Offer::Named(request) } else { Offer::Unnamed(request) })
}

/// The layer, then the digests of the comma-separated list; the list is cut short by clients, and only a hint.
fn neighbours(layer: &str, list: &str) -> Vec<String> {
    let mut digests = vec![layer.to_owned()];
    for digest in list.split(',').filter(|digest| is_digest(digest)) {
        if !digests.iter().any(|known| known == digest) {
            digests.push(digest.to_owned());
        }
    }
    digests
}

fn get<'a>(labels: &'a BTreeMap<String, String>, key: &str) -> Option<&'a str> {
    labels.get(key).map(String::as_str).filter(|value| !value.is_empty())
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> String {
        format!("sha256:{}", format!("{n:02x}").repeat(32))
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn cri() -> BTreeMap<String, String> {
        labels(&[
            (TARGET, "sha256:chain"),
            (TOC_DIGEST, &digest(1)),
            ("containerd.io/snapshot/cri.image-ref", "docker.io/library/a:1"),
            ("containerd.io/snapshot/cri.layer-digest", &digest(2)),
            ("containerd.io/snapshot/cri.image-layers", &format!("{},{}", digest(2), digest(3))),
            ("containerd.io/snapshot/cri.manifest-digest", &digest(4)),
        ])
    }

    fn stargz() -> BTreeMap<String, String> {
        labels(&[
            (TARGET, "sha256:chain"),
            (TOC_DIGEST, &digest(1)),
            ("containerd.io/snapshot/remote/stargz.reference", "example.com/b:2"),
            ("containerd.io/snapshot/remote/stargz.digest", &digest(5)),
            ("containerd.io/snapshot/remote/stargz.layers", &digest(6)),
            (PREFETCH, "1024"),
        ])
    }

    fn named(labels: &BTreeMap<String, String>) -> LayerRequest {
        match parse(labels).unwrap().unwrap() {
            Offer::Named(request) => request,
            Offer::Unnamed(request) => panic!("{request:?} has no name"),
        }
    }

    #[test]
    fn a_layer_without_toc_digest_is_offered_if_its_manifest_is_known() {
        for value in [None, Some("")] {
            let mut labels = cri();
            labels.remove(TOC_DIGEST);
            labels.extend(value.map(|value| (TOC_DIGEST.to_owned(), value.to_owned())));
            let Offer::Unnamed(request) = parse(&labels).unwrap().unwrap() else { panic!("it is named") };
            assert_eq!(
                request,
                LayerRequest { toc_digest: String::new(), labels: labels.clone(), ..named(&cri()) }
            );
            let full = Offer::named(request.clone(), Some(digest(1))).unwrap();
            assert_eq!(full, LayerRequest { labels: labels.clone(), ..named(&cri()) });
            let reason =
                |toc: Option<&str>| Offer::named(request.clone(), toc.map(str::to_owned)).unwrap_err().reason;
            assert_eq!((reason(None), reason(Some("../x"))), (Reason::NoTocDigest, Reason::BadLabels));
            for needed in [
                MANIFEST_DIGEST,
                "containerd.io/snapshot/cri.image-ref",
                "containerd.io/snapshot/cri.layer-digest",
            ] {
                let mut fewer = labels.clone();
                fewer.remove(needed);
                assert_eq!(parse(&fewer).unwrap().unwrap_err().reason, Reason::NoTocDigest, "{needed}");
            }
        }
    }

    #[test]
    fn both_families_are_read() {
        let request = named(&cri());
        assert_eq!(request.target, "sha256:chain");
        assert_eq!(request.reference, "docker.io/library/a:1");
        assert_eq!(request.layer_digest, digest(2));
        assert_eq!(request.toc_digest, digest(1));
        assert_eq!(request.manifest_digest, Some(digest(4)));
        assert_eq!(request.neighbours, [digest(2), digest(3)]);
        assert_eq!(request.prefetch_bytes, None);
        assert_eq!(request.labels, cri());

        let request = named(&stargz());
        assert_eq!(request.reference, "example.com/b:2");
        assert_eq!(request.layer_digest, digest(5));
        assert_eq!(request.neighbours, [digest(5), digest(6)]);
        assert_eq!(request.prefetch_bytes, Some(1024));
    }

    #[test]
    fn an_image_may_say_whether_it_is_fetched_behind_the_container() {
        for (value, expected) in [("true", Some(true)), ("false", Some(false)), ("maybe", None)] {
            let mut labels = cri();
            labels.insert(BACKGROUND_FETCH.to_owned(), value.to_owned());
            assert_eq!(named(&labels).background_fetch, expected);
        }
        assert_eq!(named(&cri()).background_fetch, None);
    }

    #[test]
    fn the_cri_family_wins_when_it_is_complete() {
        let mut both = stargz();
        both.extend(cri());
        assert_eq!(named(&both).reference, "docker.io/library/a:1");
        both.remove("containerd.io/snapshot/cri.layer-digest");
        assert_eq!(named(&both).reference, "example.com/b:2");
    }

    #[test]
    fn what_cannot_be_attached_says_why() {
        let bad: &[(&str, Option<&str>, Reason)] = &[
            (TOC_DIGEST, Some("sha256:../../../etc"), Reason::BadLabels),
            (TOC_DIGEST, Some(&digest(0xab).to_uppercase()), Reason::BadLabels),
            ("containerd.io/snapshot/cri.image-ref", None, Reason::NoReference),
            ("containerd.io/snapshot/cri.layer-digest", None, Reason::NoReference),
            ("containerd.io/snapshot/cri.layer-digest", Some("sha512:00"), Reason::BadLabels),
            ("containerd.io/snapshot/cri.manifest-digest", Some("latest"), Reason::BadLabels),
        ];
        for (label, value, reason) in bad {
            let mut labels = cri();
            labels.remove(*label);
            labels.extend(value.map(|value| (label.to_string(), value.to_string())));
            let error = parse(&labels).unwrap().unwrap_err();
            assert_eq!(error.reason, *reason, "{label} = {value:?}: {error}");
        }
        let mut none = cri();
        none.remove(TARGET);
        assert_eq!(parse(&none), None);
    }

    #[test]
    fn hints_that_are_wrong_are_left_out() {
        let mut labels = cri();
        labels.insert(PREFETCH.into(), "-1".into());
        let list = format!("{},x,{},,{}", digest(9), digest(2), digest(9));
        labels.insert("containerd.io/snapshot/cri.image-layers".into(), list);
        let request = named(&labels);
        assert_eq!(request.prefetch_bytes, None);
        assert_eq!(request.neighbours, [digest(2), digest(9)]);
    }

    #[test]
    fn a_reason_fits_its_label() {
        let error = AttachError::new(Reason::Timeout, "é".repeat(1000));
        let value = reason_value(&error);
        assert!(value.len() <= REASON_LIMIT && value.len() > REASON_LIMIT - 4);
        assert!(value.starts_with("timeout: é"));
    }
}
