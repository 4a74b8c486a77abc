//! Which manifests of an index are converted: a pure function.

use std::collections::HashSet;

use crate::image::{Descriptor, Platform, choose};

/// In an index, what an attestation is about (docker buildx).
pub const ATTESTED: &str = "vnd.docker.reference.digest";

/// The platforms of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// All that the source has: an index stays one.
    All,
    /// Nothing was said: this host's from an index, a single image whatever it is for.
    Any,
    /// These: of one its manifest, of several an index with them.
    These(Vec<Platform>),
}

impl Wanted {
    /// The platforms that were named on the command line, each once.
    ///
    /// # Errors
    ///
    /// A platform has another form.
    pub fn named(platforms: &[String]) -> anyhow::Result<Self> {
        let mut parsed = Vec::new();
        for text in platforms {
            let platform = Platform::parse(text)?;
            if !parsed.contains(&platform) {
                parsed.push(platform);
            }
        }
        Ok(if parsed.is_empty() { Self::Any } else { Self::These(parsed) })
    }
}

/// The digests of the entries that serve `platforms`, and of the attestations about these.
///
/// # Errors
///
/// Nothing serves one of them; the message lists what there is.
pub fn select(entries: &[Descriptor], platforms: &[Platform]) -> anyhow::Result<HashSet<String>> {
    let mut kept = HashSet::new();
    for platform in platforms {
        kept.insert(choose(entries, platform)?.digest.clone());
    }
    let about = |entry: &&Descriptor| entry.annotations.get(ATTESTED).is_some_and(|of| kept.contains(of));
    let attestations: Vec<String> = entries.iter().filter(about).map(|entry| entry.digest.clone()).collect();
    kept.extend(attestations);
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_their_attestations() {
        let entry = |n: u32, platform: &str, about: Option<u32>| Descriptor {
            media_type: "m".to_owned(),
            digest: n.to_string(),
            size: 1,
            annotations: about.map(|n| (ATTESTED.to_owned(), n.to_string())).into_iter().collect(),
            platform: Some(Platform::parse(platform).unwrap()),
        };
        let entries = [
            entry(1, "linux/amd64", None),
            entry(2, "linux/arm64", None),
            entry(3, "unknown/unknown", Some(1)),
            entry(4, "unknown/unknown", Some(2)),
        ];
        let cases: [(&[&str], &[&str]); 4] = [
            (&["linux/amd64"], &["1", "3"]),
            (&["linux/arm64", "linux/aarch64"], &["2", "4"]),
            (&["linux/amd64", "linux/arm64"], &["1", "2", "3", "4"]),
            (&[], &[]),
        ];
        for (platforms, expected) in cases {
            let platforms: Vec<Platform> = platforms.iter().map(|p| Platform::parse(p).unwrap()).collect();
            let expected: HashSet<String> = expected.iter().map(|&digest| digest.to_owned()).collect();
            assert_eq!(select(&entries, &platforms).unwrap(), expected);
        }
        assert!(select(&entries, &[Platform::parse("linux/s390x").unwrap()]).is_err());
    }

    #[test]
    fn platforms_of_the_command_line() {
        let wanted =
            |texts: &[&str]| Wanted::named(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>());
        let arm = Platform::parse("linux/arm64").unwrap();
        assert_eq!(wanted(&[]).unwrap(), Wanted::Any);
        assert_eq!(wanted(&["linux/arm64", "linux/aarch64"]).unwrap(), Wanted::These(vec![arm]));
        assert!(wanted(&["arm64"]).is_err());
    }
}
