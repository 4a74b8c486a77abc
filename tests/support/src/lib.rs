//! Test kit: layer fixtures, a scriptable registry, guards for daemons and mounts.
//!
//! Depends on none of the crates it tests, so that it stays an independent second reading of the formats.

pub mod estargz;
pub mod guard;
pub mod layer;
pub mod registry;
pub mod system;

use sha2::{Digest, Sha256};

/// Lower hex of the sha256 of `bytes`, without prefix.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// `sha256:<lower hex>` of `bytes`, as OCI descriptors name content.
pub fn sha256_digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256_hex(bytes))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
