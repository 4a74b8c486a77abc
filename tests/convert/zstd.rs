//! `--format zstd:chunked`.

use std::io::Write as _;

use support::zstd::{Dialect, OLD_PREFIX, PREFIX, ZstdEncoder};

use super::*;

fn to_zstd<'a>(dialect: &'a str, args: &[&'a str]) -> Value {
    convert(&[&["--format", "zstd:chunked", "--dialect", dialect], args].concat())
}

/// The layers' descriptors in a layout with one image.
fn descriptors(layout: &Path, result: &Value) -> Vec<Value> {
    let manifest = document(layout, result["images"][0]["digest"].as_str().unwrap());
    manifest["layers"].as_array().unwrap().clone()
}

fn keys(descriptor: &Value) -> Vec<&str> {
    descriptor["annotations"].as_object().unwrap().keys().map(String::as_str).collect()
}

/// What the program `zstd` makes of a blob.
fn decompressed(blob: &[u8]) -> Vec<u8> {
    let mut child = Command::new("timeout")
        .args(["60", "zstd", "-dc"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, blob) = (child.stdin.take().unwrap(), blob.to_vec());
    let feeding = std::thread::spawn(move || stdin.write_all(&blob));
    let output = child.wait_with_output().unwrap();
    feeding.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

#[test]
fn the_result_is_the_same_tar_with_the_annotations_of_one_dialect() {
    if !guard::require_programs(&["zstd"]) {
        return;
    }
    let registry = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let source = put(&registry, "v1", &small());
    let layout = dir.path().join("podman");
    // It is the default.
    let result = convert(&["--format", "zstd:chunked", &source, &at("oci", &layout)]);
    assert_eq!(
        (&result["format"], each(&result, "format")),
        (&json!("zstd:chunked"), vec!["zstd:chunked".to_owned(); 2])
    );
    let plain: Vec<String> = small().iter().map(|layer| layer.diff_id.clone()).collect();
    assert_eq!(each(&result, "diff_id"), plain, "whoever has unpacked the layer has it");
    for (descriptor, diff_id) in descriptors(&layout, &result).iter().zip(&plain) {
        assert_eq!(descriptor["mediaType"], "application/vnd.oci.image.layer.v1.tar+zstd");
        let keys = keys(descriptor);
        assert_eq!(keys[4], "io.lazurite.converted-from");
        assert!(keys.len() == 5 && keys[..4].iter().all(|key| key.starts_with(PREFIX)), "{keys:?}");
        let blob = blob(&layout, descriptor["digest"].as_str().unwrap());
        assert_eq!(sha256_digest(&decompressed(&blob)), *diff_id);
    }
    let checksums: Vec<String> = descriptors(&layout, &result)
        .iter()
        .map(|layer| layer["annotations"][format!("{PREFIX}manifest-checksum")].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(each(&result, "toc_digest"), checksums);

    let layout = dir.path().join("stargz");
    let result = to_zstd("stargz", &[&source, &at("oci", &layout)]);
    for descriptor in descriptors(&layout, &result) {
        let position = format!("{OLD_PREFIX}manifest-position");
        assert!(
            keys(&descriptor).contains(&TOC_DIGEST_ANNOTATION) && keys(&descriptor).contains(&&*position)
        );
        assert!(!keys(&descriptor).iter().any(|key| key.starts_with(PREFIX)));
    }
}

#[test]
fn what_is_there_already_is_used_and_what_is_of_the_other_kind_is_not() {
    let registry = ScriptedRegistry::start();
    let dir = guard::temp_dir();
    let source = put(&registry, "v1", &small());
    let to = format!("docker://{}/app:zst", registry.host());
    let first = to_zstd("podman", &[&source, &to]);
    assert_eq!(each(&first, "outcome"), ["converted"; 2]);
    let again = to_zstd("podman", &[&source, &to]);
    assert_eq!(each(&again, "outcome"), ["already_converted"; 2]);
    assert_eq!(again["digest"], first["digest"]);
    // The same image in another format is another recipe.
    let other = convert(&["--dry-run", &source, &to]);
    assert_eq!((&other["layers"][0]["outcome"], &other["format"]), (&json!("converted"), &json!("eStargz")));
    let other = to_zstd("stargz", &["--dry-run", &source, &to]);
    assert_eq!(other["layers"][0]["outcome"], "converted");

    let layout = |name: &str| at("oci", &dir.path().join(name));
    let reused = to_zstd("podman", &[&to, &layout("a")]);
    assert_eq!(
        (each(&reused, "outcome"), &reused["digest"]),
        (vec!["reused".to_owned(); 2], &first["digest"])
    );
    let forced = to_zstd("podman", &["--force", &to, &layout("b")]);
    assert_eq!(forced["digest"], first["digest"]);
    let stargz = to_zstd("stargz", &[&to, &layout("c")]);
    assert_eq!(each(&stargz, "outcome"), ["converted"; 2]);
    let there = to_zstd("stargz", &[&layout("c"), &layout("d")]);
    assert_eq!(
        (each(&there, "outcome"), &there["digest"]),
        (vec!["reused".to_owned(); 2], &stargz["digest"])
    );
    // Back: without anything of podman's left, and from stargz's without anything of its.
    let back = convert(&[&to, &layout("e")]);
    assert_eq!(each(&back, "format"), ["eStargz"; 2]);
    for descriptor in descriptors(&dir.path().join("e"), &back) {
        assert_eq!(descriptor["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
        assert!(!keys(&descriptor).iter().any(|key| key.starts_with(PREFIX)), "{descriptor:#}");
    }
    let podman = to_zstd("podman", &[&layout("d"), &layout("f")]);
    for descriptor in descriptors(&dir.path().join("f"), &podman) {
        assert!(!keys(&descriptor).contains(&TOC_DIGEST_ANNOTATION), "podman refuses both: {descriptor:#}");
    }

    // Layers that others have made.
    let layer = Layer::new().noise("a", 100_000, 1).file("b", "x");
    for (name, encoder) in [
        ("podman", ZstdEncoder::new(Dialect::Podman)),
        ("podman", ZstdEncoder::podman_before(56)),
        ("podman", ZstdEncoder::podman_before(40)),
        ("stargz", ZstdEncoder::new(Dialect::Stargz)),
    ] {
        let theirs = put(&registry, "theirs", &[LayerBlob::lazy(&encoder.encode(&layer))]);
        let result = to_zstd(name, &["--dry-run", &theirs, &layout("g")]);
        assert_eq!(result["layers"][0]["outcome"], "reused", "{encoder:?}");
    }
}

#[test]
fn a_layer_that_podman_would_refuse_becomes_an_ordinary_one() {
    let registry = ScriptedRegistry::start();
    let twice = Layer::new().file("f", "first").file("f", "second");
    let source = put(&registry, "v1", &[small()[0].clone(), LayerBlob::plain(&twice)]);
    let to = format!("docker://{}/app:zst", registry.host());
    let result = to_zstd("podman", &[&source, &to]);
    assert_eq!(each(&result, "outcome"), ["converted"; 2]);
    assert_eq!(
        (each(&result, "format"), &result["images"][0]["layers"][1]["unlike"]),
        (vec!["zstd:chunked".to_owned(), "-".to_owned()], &json!(1))
    );
    let found = lazurite(&["inspect", "--verify", &to]);
    let layer = &found["images"][0]["layers"][1];
    assert_eq!((&layer["lazy"], &layer["reason"]), (&json!(false), &json!("no_toc_digest")), "{found:#}");
    assert!(layer["media_type"].as_str().unwrap().ends_with("tar+zstd"));
    // It is remembered all the same, and doing it again changes nothing.
    let again = to_zstd("podman", &[&source, &to]);
    assert_eq!(each(&again, "outcome"), ["already_converted"; 2]);
    assert_eq!(again["digest"], result["digest"]);
    let own = to_zstd("podman", &[&to, &format!("docker://{}/app:own", registry.host())]);
    assert_eq!(
        (each(&own, "outcome"), &own["digest"]),
        (vec!["reused".to_owned(), "converted".to_owned()], &result["digest"])
    );
}

#[test]
fn inspection_tells_the_format_and_finds_damage() {
    let layer = Layer::new().noise("a", 100_000, 1).file("b", "x");
    let registry = ScriptedRegistry::start();
    for dialect in [Dialect::Podman, Dialect::Stargz] {
        let built = ZstdEncoder::new(dialect).encode(&layer);
        let image = put(&registry, "v1", &[LayerBlob::lazy(&built)]);
        let found = lazurite(&["inspect", "--verify", &image]);
        let told = &found["images"][0]["layers"][0];
        assert_eq!((&told["format"], &told["lazy"]), (&json!("zstd:chunked"), &json!(true)), "{found:#}");
        assert_eq!(told["named_toc_digest"], built.toc_digest);
        assert_eq!(told["findings"]["problems"], json!([]), "{found:#}");
        let digests = [&told["contents"]["toc_digest"], &told["contents"]["toc_stored_digest"]];
        assert!(digests.contains(&&json!(built.toc_digest)));

        let damaged = LayerBlob { bytes: built.flip(8 * 50_000).blob, ..LayerBlob::lazy(&built) };
        let image = put(&registry, "damaged", &[damaged]);
        let output = command(&["inspect", "--verify", &image]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        let other = LayerBlob::lazy(&ZstdEncoder::new(dialect).encode(&Layer::new().file("b", "y")));
        let lying = LayerBlob { annotations: other.annotations, ..LayerBlob::lazy(&built) };
        let found = lazurite(&["inspect", &put(&registry, "lying", &[lying])]);
        assert_eq!(found["images"][0]["layers"][0]["lazy"], false, "{found:#}");
    }
}

#[test]
fn what_cannot_be_is_said_before_anything_is_read() {
    let dir = guard::temp_dir();
    let list = dir.path().join("list");
    fs::write(&list, "etc/b\n").unwrap();
    let (from, to) = (at("oci", &dir.path().join("none")), at("oci", &dir.path().join("to")));
    for (args, expected) in [
        (vec!["--dialect", "stargz"], "--format zstd:chunked"),
        (vec!["--format", "zstd:chunked", "--no-oci"], "--no-oci"),
        (vec!["--format", "zstd:chunked", "--min-chunk-size", "1M"], "min_chunk_size"),
        (vec!["--format", "zstd:chunked", "--prefetch-list", list.to_str().unwrap()], "--dialect stargz"),
    ] {
        let said = fails(&[&["convert"], &args[..], &[&from, &to]].concat());
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let registry = ScriptedRegistry::start();
    let source = put(&registry, "v1", &small());
    let result = to_zstd("stargz", &["--prefetch-list", list.to_str().unwrap(), &source, &to]);
    assert_eq!(result["not_found"], json!([]));
    let found = lazurite(&["inspect", &to]);
    assert_eq!(found["images"][0]["layers"][0]["contents"]["prioritized"], json!(["etc/b"]), "{found:#}");
}
