//! Test kit: layer fixtures, a scriptable registry, guards for daemons and mounts.
//!
//! Depends on none of the crates it tests, so that it stays an independent second reading of the formats.

pub mod estargz;
pub mod guard;
pub mod layer;
pub mod log;
pub mod registry;
pub mod system;
pub mod zstd;

use std::path::Path;
use std::process::Command;

use sha2::{Digest, Sha256};

/// Lower hex of the sha256 of `bytes`, without prefix.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// `sha256:<lower hex>` of `bytes`, as OCI descriptors name content.
pub fn sha256_digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256_hex(bytes))
}

/// Makes an executable script. Another process writes it: a child that a thread of ours starts meanwhile would inherit our
/// descriptor, and what is open for writing cannot be executed (ETXTBSY).
///
/// # Panics
/// If it cannot be written.
pub fn write_script(path: &Path, script: &str) {
    let text = path.with_extension("text");
    std::fs::write(&text, script).expect("a script's text");
    let installed = Command::new("install").arg("-m755").arg(&text).arg(path).status().expect("install");
    assert!(installed.success(), "install {}: {installed}", path.display());
    std::fs::remove_file(&text).expect("a script's text");
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
