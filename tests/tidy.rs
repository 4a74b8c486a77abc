//! Rules of the tree that the compiler does not know.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Which crate of the workspace may use which, in programs (not in tests).
const EDGES: &[(&str, &[&str])] = &[
    ("lazurite", &["estargz", "fusefs", "proto", "registry", "snapshotter"]),
    ("fusefs", &["estargz", "registry"]),
    ("estargz", &[]),
    ("registry", &[]),
    ("snapshotter", &[]),
    ("proto", &[]),
    ("support", &[]),
];

/// What a crate must not pull in itself: the rules of docs/ARCHITECTURE.md, "who may not".
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("estargz", &["tokio", "async-trait", "futures", "reqwest", "fuser", "rustix", "libc", "memmap2"]),
    ("registry", &["fuser", "flate2", "memmap2", "containerd-client", "containerd-snapshots"]),
    ("snapshotter", &["fuser", "reqwest", "flate2", "hyper"]),
    ("fusefs", &["reqwest", "containerd-snapshots", "containerd-client", "tonic", "clap", "toml"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn crates_depend_on_each_other_only_as_drawn() {
    let metadata = MetadataCommand::new().manifest_path(root().join("Cargo.toml")).no_deps().exec().unwrap();
    let members: BTreeSet<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(members, EDGES.iter().map(|(name, _)| *name).collect(), "a crate came or went: draw it");
    for package in &metadata.packages {
        let normal: BTreeSet<&str> = package
            .dependencies
            .iter()
            .filter(|d| d.kind == DependencyKind::Normal)
            .map(|d| d.name.as_str())
            .collect();
        let allowed: BTreeSet<&str> = EDGES
            .iter()
            .filter(|(name, _)| *name == package.name.as_str())
            .flat_map(|(_, to)| to.iter().copied())
            .collect();
        let actual: BTreeSet<&str> = normal.intersection(&members).copied().collect();
        assert!(
            actual.is_subset(&allowed),
            "{} depends on {actual:?}, allowed are {allowed:?}",
            package.name
        );
        for (name, forbidden) in FORBIDDEN.iter().filter(|(name, _)| *name == package.name.as_str()) {
            for dependency in *forbidden {
                assert!(!normal.contains(dependency), "{name} must do without {dependency}");
            }
        }
    }
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !["target", ".git", "corpus", "generated"].contains(&name.as_str()) {
                rust_files(&path, found);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    rust_files(root(), &mut files);
    assert!(files.len() > 30, "the tree was not found");
    files
        .into_iter()
        .map(|f| (f.strip_prefix(root()).unwrap().to_owned(), fs::read_to_string(&f).unwrap()))
        .collect()
}

#[test]
fn modules_say_what_they_own_and_stay_one_idea() {
    for (path, text) in sources() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert_ne!(name, "mod.rs", "{}: use foo.rs beside foo/", path.display());
        // The macro call of a fuzz target must come first.
        if !path.starts_with("estargz/fuzz") {
            assert!(
                text.starts_with("//!"),
                "{} does not open with its module documentation",
                path.display()
            );
        }
        let lines = text.lines().count();
        assert!(lines <= 900, "{} has {lines} lines: more than one idea?", path.display());
        for (number, line) in text.lines().enumerate() {
            let at = || format!("{}:{}", path.display(), number + 1);
            assert!(
                !(line.trim_start().starts_with("pub use ") && line.contains("::*")),
                "{}: glob re-export",
                at()
            );
            // Built of two parts, so that this file passes its own test.
            assert!(!line.contains(concat!("#[ig", "nore")), "{}: a test that does not run", at());
            assert!(!line.contains(concat!("TO", "DO")), "{}: do it, or open an issue", at());
        }
    }
}

#[test]
fn the_remote_success_is_answered_in_one_place() {
    // Only the gRPC adapter may turn a lazy Prepare into containerd's ALREADY_EXISTS.
    let places: Vec<PathBuf> = sources()
        .into_iter()
        .filter(|(path, text)| path.starts_with("snapshotter/src") && text.contains("Status::already_exists"))
        .map(|(path, _)| path)
        .collect();
    assert_eq!(places, [PathBuf::from("snapshotter/src/service.rs")]);
}

#[test]
fn documents_link_to_what_exists() {
    let mut documents = vec![root().join("README.md"), root().join("CONTRIBUTING.md")];
    for dir in ["docs", "docs/design"] {
        documents.extend(fs::read_dir(root().join(dir)).unwrap().map(|e| e.unwrap().path()));
    }
    for document in documents.iter().filter(|d| d.extension().is_some_and(|e| e == "md")) {
        let text = fs::read_to_string(document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let target = document.parent().unwrap().join(file);
            assert!(target.exists(), "{} links to {link}, which does not exist", document.display());
        }
    }
}
