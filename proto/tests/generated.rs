//! The committed code is what the definitions come to.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

#[test]
fn the_generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .out_dir(dir.path())
        .compile_protos(&[root.join("lazurite/v1/control.proto")], &[root.to_owned()])
        .unwrap();
    let generated = fs::read_to_string(dir.path().join("lazurite.v1.rs")).unwrap();
    let committed = root.join("src/generated/lazurite.v1.rs");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&committed, &generated).unwrap();
    }
    assert!(
        fs::read_to_string(&committed).unwrap() == generated,
        "{} is out of date: BLESS=1 cargo test -p proto",
        committed.display()
    );
}
