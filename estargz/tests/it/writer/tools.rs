//! What the system's own tools make of it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use support::layer::{LongNames, assert_same, walk};

use super::*;

/// Runs a program on `input` and returns what it writes.
fn run(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", output.status);
    output.stdout
}

#[test]
fn gzip_decompresses_it_to_the_diff_id() {
    let built = build(&random(3, 80).tar(), &options()).unwrap();
    let tar = run("gzip", &["-dc"], &built.blob);
    assert_eq!(sha256_digest(&tar), built.summary.diff_id.to_string());
    assert_eq!(tar.len() as u64, built.summary.uncompressed_size);
}

#[test]
fn tar_lists_everything_in_order() {
    let layer = Layer::new()
        .dir("etc")
        .file("etc/passwd", "root")
        .file("empty", "")
        .symlink("s", "x")
        .noise("n", 9000, 1);
    let built = build(&layer.tar(), &Options { chunk_size: 1000, ..options() }).unwrap();
    let names = String::from_utf8(run("tar", &["--list", "--gzip", "--file=-"], &built.blob)).unwrap();
    let expected = [".no.prefetch.landmark", "etc/", "etc/passwd", "empty", "s", "n", "stargz.index.json"];
    assert_eq!(names.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn tar_unpacks_the_same_tree() {
    // Owners, devices and trusted attributes.
    if !support::guard::require_root() {
        return;
    }
    for (seed, style) in [(1, LongNames::Gnu), (2, LongNames::Pax), (3, LongNames::Gnu)] {
        let layer = random(seed, 100).for_plain_tar().long_names(style);
        let first = layer.entries().iter().rev().take(5).map(|entry| Pattern::path(&entry.name)).collect();
        let built =
            build(&layer.tar(), &Options { chunk_size: 10_000, prioritized: first, ..options() }).unwrap();
        let unpacked = tempfile::tempdir().unwrap();
        let target = format!("--directory={}", unpacked.path().display());
        let flags = [
            "--extract",
            "--gzip",
            "--file=-",
            "--xattrs",
            "--xattrs-include=*",
            "--same-owner",
            "-p",
            "--delay-directory-restore",
            "--warning=no-timestamp",
            "--numeric-owner",
        ];
        run("tar", &[&flags[..], &[&target]].concat(), &built.blob);
        let own = ["stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"];
        let found = own.iter().filter(|name| fs::remove_file(unpacked.path().join(name)).is_ok()).count();
        assert_eq!(found, 2, "a landmark and the TOC");
        let mut expected = layer.expected();
        let mut actual = walk(unpacked.path()).unwrap();
        // The root's time changed with the two files.
        for tree in [&mut expected, &mut actual] {
            tree.retain(|entry| !entry.path.is_empty());
        }
        assert_same(&expected, &actual);
    }
}

/// Makes a sparse file of 300 KiB in `directory`, its data where `offsets` say.
fn sparse_file(directory: &Path, offsets: &[u64]) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(directory.join("sparse")).unwrap();
    file.set_len(300 << 10).unwrap();
    for offset in offsets {
        file.write_all_at(format!("data at {offset}").as_bytes(), *offset).unwrap();
    }
    fs::read(directory.join("sparse")).unwrap()
}

#[test]
fn sparse_files_of_tar_are_filled() {
    let many: Vec<u64> = (0..37).map(|n| n * 8192).collect();
    for offsets in [&[][..], &[0], &[100 << 10], &[0, 200 << 10], &many] {
        let directory = tempfile::tempdir().unwrap();
        let content = sparse_file(directory.path(), offsets);
        let layer = Layer::new().file("sparse", content);
        let target = format!("--directory={}", directory.path().display());
        let mut blobs = Vec::new();
        for style in [
            &["--format=gnu"][..],
            &["--format=pax", "--sparse-version=0.0"],
            &["--format=pax", "--sparse-version=0.1"],
            &["--format=pax", "--sparse-version=1.0"],
        ] {
            let create = [
                "--create",
                "--sparse",
                "--file=-",
                "--mtime=@1600000000",
                "--owner=0",
                "--group=0",
                "--mode=0644",
            ];
            let tar = run("tar", &[&create[..], style, &[&target, "sparse"]].concat(), b"");
            let built = build(&tar, &Options { chunk_size: 100_000, ..options() }).unwrap();
            let toc = built.toc();
            assert_same_contents(&toc, &built.blob, &layer);
            assert_eq!(
                build(&built.blob, &Options { chunk_size: 100_000, ..options() }).unwrap().blob,
                built.blob
            );
            let out = run("tar", &["--extract", "--gzip", "--file=-", "--to-stdout", "sparse"], &built.blob);
            assert!(out == layer.contents()[&b"sparse"[..]], "{style:?}");
            blobs.push(built);
        }
    }
}
