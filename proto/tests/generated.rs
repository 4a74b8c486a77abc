//! The committed code is what the definitions come to, and shows no secrets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use proto::cri::{AuthConfig, PullImageRequest};

#[test]
fn the_generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    let definitions = ["lazurite/v1/control.proto", "runtime/v1/api.proto"];
    tonic_prost_build::configure()
        .out_dir(dir.path())
        .skip_debug(["runtime.v1.AuthConfig"])
        .compile_protos(&definitions.map(|path| root.join(path)), &[root.to_owned()])
        .unwrap();
    for name in ["lazurite.v1.rs", "runtime.v1.rs"] {
        let generated = fs::read_to_string(dir.path().join(name)).unwrap();
        let committed = root.join("src/generated").join(name);
        if std::env::var_os("BLESS").is_some() {
            fs::write(&committed, &generated).unwrap();
        }
        assert!(
            fs::read_to_string(&committed).unwrap() == generated,
            "{} is out of date: BLESS=1 cargo test -p proto",
            committed.display()
        );
    }
}

#[test]
fn logins_are_not_shown() {
    let auth = AuthConfig { password: "hunter2".to_owned(), ..Default::default() };
    let request = PullImageRequest { image: None, auth: Some(auth) };
    let shown = format!("{request:?}");
    assert!(shown.contains("AuthConfig(hidden)") && !shown.contains("hunter2"), "{shown}");
}
