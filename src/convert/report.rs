//! The summary of a conversion: what became of each layer, and every digest.

use std::fmt;

use estargz::writer::Target;
use serde::Serialize;

use super::layer::{Done, Fate, Stored};
use crate::image::short;
use crate::progress::size;

/// A finished conversion.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where the image was.
    pub source: String,
    /// Where it is now.
    pub destination: String,
    /// What the destination's name stands for: the digest of a manifest or index.
    pub digest: String,
    /// What that is.
    pub media_type: String,
    /// What layers are converted to.
    pub format: &'static str,
    /// Each manifest.
    pub images: Vec<Image>,
    /// Paths and globs that match nothing in any layer.
    pub not_found: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

/// One manifest.
#[derive(Debug, Serialize)]
pub struct Image {
    /// What it is for, if it is a container image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Its digest.
    pub digest: String,
    /// The digest of what it was made of.
    pub source_digest: String,
    /// The digest of its config.
    pub config_digest: String,
    /// From the bottom up.
    pub layers: Vec<Layer>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Digest of its blob.
    pub digest: String,
    /// Size of its blob in bytes.
    pub size: u64,
    /// Digest of the blob it was made of.
    pub source_digest: String,
    /// Size of that blob in bytes.
    pub source_size: u64,
    /// Digest of its contents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// Digest of its table of contents, as the image names it, if it is lazy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toc_digest: Option<String>,
    /// eStargz or zstd:chunked, if it is lazy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<&'static str>,
    /// What became of it.
    pub outcome: Outcome,
    /// Why, where that is not plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// How its blob came to the destination.
    pub stored: Stored,
    /// Entries with names that are not UTF-8: if there are any, it is not mounted lazily.
    #[serde(skip_serializing_if = "none")]
    pub lossy_names: u64,
    /// Entries because of which podman would refuse it as zstd:chunked: if there are any, it is an ordinary layer.
    #[serde(skip_serializing_if = "none")]
    pub unlike: u64,
}

fn none(count: &u64) -> bool {
    *count == 0
}

/// What became of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was converted.
    Converted,
    /// It was converted by an earlier run.
    AlreadyConverted,
    /// It was what is wanted.
    Reused,
    /// It stays as it is.
    Kept,
}

impl Layer {
    /// The layer that was `digest`, `size` bytes long and annotated like this, now that it is done.
    pub fn new(
        before: &crate::image::Descriptor,
        diff_id: Option<&str>,
        target: Target,
        done: &Done,
    ) -> Self {
        let (outcome, reason) = outcome(&done.fate);
        let change = done.change.as_ref();
        let lazy = outcome != Outcome::Kept;
        let toc = match change {
            Some(change) => estargz::announced(change.compression(), |key| {
                change.annotations.get(key).map(String::as_str)
            }),
            None => before.toc(),
        };
        let toc_digest = toc.filter(|_| lazy).map(|toc| toc.digest.to_string());
        Self {
            digest: change.map_or(&before.digest, |change| &change.digest).clone(),
            size: change.map_or(before.size, |change| change.size),
            source_digest: before.digest.clone(),
            source_size: before.size,
            diff_id: diff_id.map(str::to_owned),
            format: toc_digest.is_some().then(|| name(target)),
            toc_digest,
            outcome,
            reason,
            stored: done.stored,
            lossy_names: done.lossy_names,
            unlike: done.unlike,
        }
    }
}

/// A format's name.
pub fn name(target: Target) -> &'static str {
    match target {
        Target::EStargz => "eStargz",
        Target::ZstdChunked(_) => "zstd:chunked",
    }
}

/// What became of a layer, and why where that is not plain.
pub fn outcome(fate: &Fate) -> (Outcome, Option<&'static str>) {
    match fate {
        Fate::Convert => (Outcome::Converted, None),
        Fate::Earlier(_) => (Outcome::AlreadyConverted, None),
        Fate::Reuse { .. } => (Outcome::Reused, None),
        Fate::Copy(why) | Fate::Leave(why) => (Outcome::Kept, Some(*why)),
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.outcome {
            Outcome::Converted => write!(f, "converted, {}", size(self.size))?,
            Outcome::AlreadyConverted => write!(f, "converted before, {}", size(self.size))?,
            Outcome::Reused => write!(f, "{} already", self.format.unwrap_or("lazy"))?,
            Outcome::Kept => f.write_str("kept")?,
        }
        if let Some(reason) = self.reason {
            write!(f, " ({reason})")?;
        }
        if self.lossy_names > 0 {
            write!(f, ", but not lazy: {} names are not UTF-8", self.lossy_names)?;
        } else if self.unlike > 0 {
            write!(f, ", but not lazy: podman would refuse it for {} of its entries", self.unlike)?;
        }
        match self.stored {
            Stored::Written | Stored::Not => Ok(()),
            Stored::Present => f.write_str(", already there"),
            Stored::Mounted => f.write_str(", taken from the other repository"),
        }
    }
}

impl fmt::Display for Report {
    /// A line for each layer, then the image.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for image in &self.images {
            if self.images.len() > 1 {
                let platform = image.platform.as_deref().unwrap_or("other");
                writeln!(f, "{platform} {}", image.digest)?;
            }
            for layer in &image.layers {
                writeln!(f, "{}  {:>10}  {layer}", short(&layer.source_digest), size(layer.source_size))?;
            }
        }
        if !self.not_found.is_empty() {
            writeln!(f, "in no layer: {}", self.not_found.join(", "))?;
        }
        let layers = || self.images.iter().flat_map(|image| &image.layers);
        let count = |outcome| layers().filter(|layer| layer.outcome == outcome).count();
        let before = count(Outcome::AlreadyConverted) + count(Outcome::Reused);
        write!(
            f,
            "{} {}: {} of {} layers converted, {before} were before, {:.1} s",
            self.destination,
            self.digest,
            count(Outcome::Converted),
            layers().count(),
            self.seconds
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::layer::Told;
    use crate::convert::rewrite::Change;
    use crate::image::{Descriptor, TOC_DIGEST};

    fn digest(n: u32) -> String {
        format!("sha256:{}", n.to_string().repeat(64))
    }

    fn layer(
        n: u32,
        annotations: &[(&str, &str)],
        fate: Fate,
        change: Option<Change>,
        stored: Stored,
    ) -> Layer {
        let before = Descriptor {
            media_type: "l".to_owned(),
            digest: digest(n),
            size: 3 << 20,
            annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            platform: None,
        };
        Layer::new(
            &before,
            Some("sha256:d"),
            Target::EStargz,
            &Done { fate, change, stored, missing: Vec::new(), lossy_names: 0, unlike: 0 },
        )
    }

    fn report() -> Report {
        let toc_digest = digest(6);
        let toc = [(TOC_DIGEST, toc_digest.as_str())];
        let change = Change {
            digest: digest(9),
            size: 4 << 20,
            diff_id: None,
            zstd: false,
            annotations: [(TOC_DIGEST.to_owned(), digest(7))].into(),
        };
        let reused = Fate::Reuse { toc_digest: estargz::Digest::of(b""), told: Told::Yes };
        let layers = vec![
            layer(1, &[], Fate::Convert, Some(change.clone()), Stored::Written),
            layer(2, &[], Fate::Earlier(change.clone()), Some(change), Stored::Present),
            layer(3, &toc, reused.clone(), None, Stored::Mounted),
            layer(4, &toc, reused, None, Stored::Written),
            layer(5, &toc, Fate::Leave("not distributable"), None, Stored::Not),
        ];
        Report {
            source: "docker://r.example/a:1".to_owned(),
            destination: "docker://r.example/a:2".to_owned(),
            digest: "sha256:m".to_owned(),
            media_type: "m".to_owned(),
            format: "eStargz",
            images: vec![Image {
                platform: Some("linux/amd64".to_owned()),
                digest: "sha256:m".to_owned(),
                source_digest: "sha256:s".to_owned(),
                config_digest: "sha256:c".to_owned(),
                layers,
            }],
            not_found: vec!["nothing/*".to_owned()],
            seconds: 1.25,
        }
    }

    #[test]
    fn summary_for_people() {
        let expected = "\
111111111111    3.00 MiB  converted, 4.00 MiB
222222222222    3.00 MiB  converted before, 4.00 MiB, already there
333333333333    3.00 MiB  eStargz already, taken from the other repository
444444444444    3.00 MiB  eStargz already
555555555555    3.00 MiB  kept (not distributable)
in no layer: nothing/*
docker://r.example/a:2 sha256:m: 1 of 5 layers converted, 3 were before, 1.2 s";
        assert_eq!(report().to_string(), expected);
    }

    #[test]
    fn summary_for_programs() {
        let json = serde_json::to_value(report()).unwrap();
        let layers = &json["images"][0]["layers"];
        assert_eq!((&layers[0]["outcome"], &layers[0]["stored"]), (&"converted".into(), &"written".into()));
        assert_eq!((&layers[0]["digest"], &layers[0]["toc_digest"]), (&digest(9).into(), &digest(7).into()));
        assert_eq!((&layers[0]["source_digest"], &layers[0]["size"]), (&digest(1).into(), &(4 << 20).into()));
        assert_eq!(layers[1]["outcome"], "already_converted");
        assert_eq!((&layers[2]["outcome"], &layers[2]["toc_digest"]), (&"reused".into(), &digest(6).into()));
        assert_eq!((&layers[4]["reason"], layers[4].get("toc_digest")), (&"not distributable".into(), None));
    }
}
