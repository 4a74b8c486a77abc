//! The summary of a pull: what became of each layer, and why.
//!
//! The reasons are the snapshotter's words; nothing is added to them.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::image::short;
use crate::progress::size;

/// A finished pull.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The name the image is recorded under.
    pub reference: String,
    /// Digest of what the name stands for: an index or a manifest.
    pub digest: String,
    /// Digest of the platform's manifest.
    pub manifest_digest: String,
    /// Which platform.
    pub platform: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The snapshotter that has the layers.
    pub snapshotter: String,
    /// How long it took.
    pub seconds: f64,
    /// From the bottom up.
    pub layers: Vec<Layer>,
}

/// One layer of a finished pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Digest of its blob.
    pub digest: String,
    /// Size of its blob in bytes.
    pub size: u64,
    /// The name of its snapshot.
    pub chain_id: String,
    /// How the snapshot came about.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How a layer's snapshot came about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The snapshotter took it; nothing was downloaded.
    Lazy,
    /// It was there before.
    Present {
        /// Whether it had been taken lazily.
        lazy: bool,
    },
    /// It was downloaded and unpacked.
    Unpacked {
        /// Why the snapshotter did not take it, if it says: `code: message`.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
}

impl Outcome {
    fn is_lazy(&self) -> bool {
        matches!(self, Self::Lazy | Self::Present { lazy: true })
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Unpacked { reason } => reason.as_deref(),
            _ => None,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lazy => f.write_str("lazy"),
            Self::Present { lazy: true } => f.write_str("already present (lazy)"),
            Self::Present { lazy: false } => f.write_str("already present"),
            Self::Unpacked { reason: None } => f.write_str("unpacked"),
            Self::Unpacked { reason: Some(reason) } => write!(f, "unpacked ({})", code(reason)),
        }
    }
}

/// The code of a reason, which is `code: message`.
fn code(reason: &str) -> &str {
    reason.split(':').next().unwrap_or(reason)
}

impl fmt::Display for Report {
    /// A line for each layer, then each reason once in full, then the image.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in &self.layers {
            writeln!(f, "{}  {:>10}  {}", short(&layer.digest), size(layer.size), layer.outcome)?;
        }
        let reasons: BTreeSet<&str> = self.layers.iter().filter_map(|layer| layer.outcome.reason()).collect();
        for reason in reasons {
            writeln!(f, "{reason}")?;
        }
        let lazy = self.layers.iter().filter(|layer| layer.outcome.is_lazy()).count();
        let (image, digest, all, seconds) = (&self.reference, &self.digest, self.layers.len(), self.seconds);
        write!(f, "{image} {digest}: {lazy} of {all} layers lazy, {seconds:.1} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let layer = |digit: char, outcome| Layer {
            digest: format!("sha256:{}", digit.to_string().repeat(64)),
            size: 3 << 20,
            chain_id: "sha256:c".to_owned(),
            outcome,
        };
        Report {
            reference: "docker.io/library/a:1".to_owned(),
            digest: "sha256:d".to_owned(),
            manifest_digest: "sha256:m".to_owned(),
            platform: "linux/amd64".to_owned(),
            namespace: "default".to_owned(),
            snapshotter: "lazurite".to_owned(),
            seconds: 1.25,
            layers: vec![
                layer('1', Outcome::Lazy),
                layer('2', Outcome::Present { lazy: true }),
                layer('3', Outcome::Present { lazy: false }),
                layer(
                    '4',
                    Outcome::Unpacked { reason: Some("draining: no new layers are taken".to_owned()) },
                ),
                layer(
                    '5',
                    Outcome::Unpacked { reason: Some("draining: no new layers are taken".to_owned()) },
                ),
                layer('6', Outcome::Unpacked { reason: None }),
            ],
        }
    }

    #[test]
    fn summary_for_people() {
        let expected = "\
111111111111    3.00 MiB  lazy
222222222222    3.00 MiB  already present (lazy)
333333333333    3.00 MiB  already present
444444444444    3.00 MiB  unpacked (draining)
555555555555    3.00 MiB  unpacked (draining)
666666666666    3.00 MiB  unpacked
draining: no new layers are taken
docker.io/library/a:1 sha256:d: 2 of 6 layers lazy, 1.2 s";
        assert_eq!(report().to_string(), expected);
    }

    #[test]
    fn summary_for_programs() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["layers"][0]["outcome"], "lazy");
        assert_eq!(json["layers"][1]["lazy"], true);
        assert_eq!(json["layers"][3]["reason"], "draining: no new layers are taken");
        assert_eq!(json["layers"][5].get("reason"), None);
        assert_eq!(json["reference"], "docker.io/library/a:1");
    }
}
