//! Image references: parsing with docker's normalisation.
//!
//! Grammar: the `reference` package of the CNCF distribution project (name components, tag of at most 128
//! characters, name of at most 255) and docker's familiar names: no host means `docker.io`, and a name of
//! one component there means `library/<name>`. A parsed reference is safe to put into a URL path.

use crate::Error;
use crate::digest::Digest;
use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

const DOCKER_HUB: &str = "docker.io";
const NAME_LIMIT: usize = 255;
const TAG_LIMIT: usize = 128;

/// A normalised image reference: host, repository, and a tag, a digest or both.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The registry's host, with its port if one was given: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository at that host: `library/ubuntu`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag. `latest` is filled in when the text has neither tag nor digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, `sha256:<hex>`.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_ref().map(Digest::as_str)
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|why| Error::BadReference { reference: without_user(text), why })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.contains("://") {
        return Err("write host/repository:tag without a scheme");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            (rest, Some(Digest::parse(digest).map_err(|_| "what follows the @ is not a digest")?))
        }
        None => (text, None),
    };
    let last_component = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest[last_component..].find(':') {
        Some(colon) => {
            let (name, tag) = rest.split_at(last_component + colon);
            (name, Some(check_tag(&tag[1..])?))
        }
        None => (rest, None),
    };
    let (host, repository) = match name.split_once('/') {
        Some((first, others)) if is_host(first) => (first, others),
        _ => (DOCKER_HUB, name),
    };
    check_host(host)?;
    let host = if host == "index.docker.io" { DOCKER_HUB } else { host };
    check_repository(repository)?;
    let repository = if host == DOCKER_HUB && !repository.contains('/') {
        format!("library/{repository}")
    } else {
        repository.to_owned()
    };
    if host.len() + 1 + repository.len() > NAME_LIMIT {
        return Err("the name is longer than 255 characters");
    }
    if name.len() == 64 && name.bytes().all(is_hex) {
        return Err("64 hex digits are an image ID, not a name");
    }
    let tag = tag.or_else(|| digest.is_none().then_some("latest")).map(str::to_owned);
    Ok(Reference { host: host.to_owned(), repository, tag, digest })
}

/// Docker's rule for telling `host/name` from `namespace/name`.
fn is_host(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase())
}

/// `name`, `name:port`, `[v6]` or `[v6]:port`.
pub(crate) fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or("the host has a [ without ]")?;
            address.parse::<Ipv6Addr>().map_err(|_| "the host in brackets is not an IPv6 address")?;
            match port {
                "" => return Ok(()),
                _ => ("", Some(port.strip_prefix(':').ok_or("the host has text after ]")?)),
            }
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    if port.is_some_and(|port| port.bytes().any(|b| !b.is_ascii_digit()) || port.parse::<u16>().is_err()) {
        return Err("the host's port is not a number from 0 to 65535");
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if host.starts_with('[') || name.split('.').all(label) {
        Ok(())
    } else {
        Err("the host is not letters, digits and hyphens between dots")
    }
}

pub(crate) fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository has upper case letters");
    }
    if repository.split('/').all(is_component) {
        Ok(())
    } else {
        Err(
            "each part of the repository is lower case letters and digits, with single . or _, double __ or hyphens between",
        )
    }
}

/// Runs of `[a-z0-9]` with exactly one separator between: `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !(bytes.first().is_some_and(|&b| word(b)) && bytes.last().is_some_and(|&b| word(b))) {
        return false;
    }
    bytes
        .split(|&b| word(b))
        .all(|gap| matches!(gap, b"" | b"." | b"_" | b"__") || gap.iter().all(|&b| b == b'-'))
}

fn check_tag(tag: &str) -> Result<&str, &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let valid = tag.len() <= TAG_LIMIT
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
    valid.then_some(tag).ok_or("the tag is not up to 128 letters, digits, _, . and -")
}

fn is_hex(b: u8) -> bool {
    matches!(b, b'0'..=b'9' | b'a'..=b'f')
}

/// What may be printed of a text that is no reference: somebody may have written `user:password@host/name`.
fn without_user(text: &str) -> String {
    let shown = match text.rsplit_once('@') {
        Some((_, after)) if !after.starts_with("sha") => format!("***@{after}"),
        _ => text.to_owned(),
    };
    shown.chars().take(NAME_LIMIT + TAG_LIMIT).collect()
}

impl fmt::Display for Reference {
    /// The canonical form, which parses to the same reference: `docker.io/library/ubuntu:latest`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalisation() {
        for (text, canonical) in [
            ("ubuntu", "docker.io/library/ubuntu:latest"),
            ("ubuntu:22.04", "docker.io/library/ubuntu:22.04"),
            ("library/ubuntu", "docker.io/library/ubuntu:latest"),
            ("docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
            ("index.docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
            ("docker.io/me/app:v1", "docker.io/me/app:v1"),
            ("me/app", "docker.io/me/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("localhost:5000/app:5000", "localhost:5000/app:5000"),
            ("localhost:5000", "docker.io/library/localhost:5000"),
            ("ghcr.io/o/r/x:a_b-c.d", "ghcr.io/o/r/x:a_b-c.d"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("[fd00::1]/app", "[fd00::1]/app:latest"),
            ("10.0.0.1:80/a/b/c", "10.0.0.1:80/a/b/c:latest"),
            ("HOST/app", "HOST/app:latest"),
            ("a.b/c__d/e.f_g/h--i---j", "a.b/c__d/e.f_g/h--i---j:latest"),
        ] {
            let parsed: Reference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(parsed.to_string(), canonical, "{text}");
            assert_eq!(canonical.parse::<Reference>().unwrap(), parsed, "{text}");
        }
    }

    #[test]
    fn digests_and_tags() {
        let both: Reference = format!("r.io/x:v1@{D}").parse().unwrap();
        assert_eq!((both.host(), both.repository()), ("r.io", "x"));
        assert_eq!((both.tag(), both.digest()), (Some("v1"), Some(D)));
        let pinned: Reference = format!("ubuntu@{D}").parse().unwrap();
        assert_eq!((pinned.tag(), pinned.digest()), (None, Some(D)));
        assert_eq!(pinned.to_string(), format!("docker.io/library/ubuntu@{D}"));
    }

    #[test]
    fn odd_references_are_refused() {
        let long_name = format!("r.io/{}", "a".repeat(251));
        let long_tag = format!("r.io/a:{}", "t".repeat(129));
        let hex = "a".repeat(64);
        for odd in [
            "",
            " ",
            ":",
            "/",
            "@",
            "a:",
            "a@",
            "a:b:c",
            "/a",
            "a/",
            "a//b",
            "A",
            "r.io/A",
            "r.io/",
            "r.io/a_-b",
            "r.io/a___b",
            "r.io/a..b",
            "r.io/.a",
            "r.io/a-",
            "r.io/../../etc",
            "r.io/%2e%2e/x",
            "r.io/a?b",
            "r.io/a#b",
            "r.io/a b",
            "r.io/a\n",
            "r.io/\u{e9}",
            "-r.io/a",
            "r-.io/a",
            "r..io/a",
            "r.io:/a",
            "r.io:x/a",
            "r.io:65536/a",
            "r.io:+1/a",
            "[::1/a",
            "[zz]/a",
            "[::1]x/a",
            "https://r.io/a",
            "r.io/a:-x",
            "r.io/a:x@sha256:00",
            "r.io/a@latest",
            "user:pw@r.io/a",
            &long_name,
            &long_tag,
            &hex,
        ] {
            match odd.parse::<Reference>() {
                Err(Error::BadReference { .. }) => {}
                other => panic!("{odd:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_password_in_a_bad_reference_is_not_repeated() {
        for text in ["https://me:hunter2@r.io/a", "me:hunter2@r.io/a"] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }
}
