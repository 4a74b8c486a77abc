//! Digest strings: validation before they reach a URL, and verification of whole objects.
//!
//! Grammar and the registered algorithms: OCI image-spec, `descriptor.md`, "Digests". Only the registered
//! ones are accepted, so a digest can never carry a path, a query or another surprise into a URL.

use crate::Error;
use sha2::{Digest as _, Sha256, Sha512};
use std::fmt;

/// A valid digest, `sha256:<64 hex>` or `sha512:<128 hex>`, lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Digest(String);

impl Digest {
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let bad = |why| Error::BadDigest { digest: text.chars().take(160).collect(), why };
        let (algorithm, hex) = text.split_once(':').ok_or_else(|| bad("no algorithm before a colon"))?;
        let length = match algorithm {
            "sha256" => 64,
            "sha512" => 128,
            _ => return Err(bad("the algorithm is neither sha256 nor sha512")),
        };
        if hex.len() != length {
            return Err(bad("the hex part has the wrong length for its algorithm"));
        }
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad("the hex part has other characters than 0-9 and a-f"));
        }
        Ok(Self(text.to_owned()))
    }

    /// The sha256 digest of `bytes`.
    pub(crate) fn sha256(bytes: &[u8]) -> Self {
        Self(format!("sha256:{:x}", Sha256::digest(bytes)))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Of the same algorithm, for bytes that come in pieces.
    pub(crate) fn hasher(&self) -> Hasher {
        if self.0.starts_with("sha512:") {
            Hasher::Sha512(Sha512::new())
        } else {
            Hasher::Sha256(Sha256::new())
        }
    }

    /// `Err` holds the digest the bytes really have.
    pub(crate) fn verify(&self, bytes: &[u8]) -> Result<(), Self> {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        let actual = hasher.finish();
        if actual == *self { Ok(()) } else { Err(actual) }
    }
}

/// A digest in the making.
#[derive(Debug, Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        Digest(match self {
            Self::Sha256(hasher) => format!("sha256:{:x}", hasher.finalize()),
            Self::Sha512(hasher) => format!("sha512:{:x}", hasher.finalize()),
        })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn only_registered_algorithms_and_lower_hex() {
        assert!(Digest::parse(&format!("sha256:{HEX}")).is_ok());
        assert!(Digest::parse(&format!("sha512:{HEX}{HEX}")).is_ok());
        for odd in [
            String::new(),
            HEX.to_owned(),
            format!("sha256:{}", &HEX[1..]),
            format!("sha256:{HEX}0"),
            format!("sha256:{}", HEX.to_uppercase()),
            format!("md5:{}", &HEX[..32]),
            format!("sha256:../../../{}", &HEX[9..]),
            "sha256:../../etc/passwd".to_owned(),
            format!("sha256:{}?x", &HEX[2..]),
            format!("sha256: {}", &HEX[1..]),
            format!("sha256:{}\u{e9}", &HEX[2..]),
            format!("SHA256:{HEX}"),
            format!("/sha256:{HEX}"),
        ] {
            assert!(matches!(Digest::parse(&odd), Err(Error::BadDigest { .. })), "{odd}");
        }
    }

    #[test]
    fn verification_names_the_actual_digest() {
        let empty = Digest::parse(&format!("sha256:{HEX}")).unwrap();
        assert_eq!(empty.verify(b""), Ok(()));
        assert_eq!(empty.verify(b"x"), Err(Digest::sha256(b"x")));
        let wide = Digest(format!("sha512:{:x}", Sha512::digest(b"x")));
        assert_eq!(wide.verify(b"x"), Ok(()));
        assert!(wide.verify(b"y").is_err());
    }
}
