//! zstd:chunked, in both dialects.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use estargz::writer::{Dialect, Error, Options, Pattern, Target, ZstdChunked};
use estargz::{Announced, Compression, Landmark, Limits, Opener, Step, VerifiedToc, announced};
use proptest::prelude::*;
use serde_json::Value;
use support::estargz::Encoder;
use support::layer::{Layer, random};
use support::zstd::ZstdEncoder;

use super::{Built, build, gzip, options};
use crate::roundtrip::{assert_same_contents, assert_same_tree};

fn podman() -> Options {
    Options { target: Target::ZstdChunked(Dialect::Podman), chunk_size: 64 << 10, ..options() }
}

fn stargz() -> Options {
    Options { target: Target::ZstdChunked(Dialect::Stargz), ..podman() }
}

fn unzstd(blob: &[u8]) -> Vec<u8> {
    zstd::decode_all(blob).unwrap()
}

/// Opens a blob by what its annotations say, and checks that its footer says the same.
fn opened(built: &Built) -> VerifiedToc {
    if built.summary.unlike > 0 {
        assert_eq!(built.summary.annotations(), []);
        return built.toc();
    }
    let annotations: BTreeMap<String, String> = built.summary.annotations().into_iter().collect();
    let said = announced(Compression::Zstd, |key| annotations.get(key).map(String::as_str)).unwrap();
    let Announced { digest, position: Some(position) } = said else { panic!("{said:?}") };
    assert_eq!(digest, built.summary.toc_digest);
    let mut opener = Opener::at(built.summary.blob_size, position, Limits::default()).unwrap();
    let Ok(Step::Done(json)) = opener.feed(0, &built.blob) else { panic!("it is all there") };
    let toc = json.verify(&digest, &Limits::default()).unwrap();
    assert_eq!(toc, built.toc());
    toc
}

/// Puts the tar together from the tar-split, as `podman push` does.
fn reassembled(built: &Built, contents: &BTreeMap<Vec<u8>, bytes::Bytes>) -> Vec<u8> {
    let ZstdChunked { tar_split: Some((place, digest)), .. } = built.summary.zstd.unwrap() else {
        panic!("no tar-split")
    };
    let stored = &built.blob[place.offset as usize..(place.offset + place.stored) as usize];
    assert_eq!(estargz::Digest::of(stored), digest);
    let lines = unzstd(stored);
    assert_eq!(lines.len() as u64, place.json);
    let mut tar = Vec::new();
    for (position, line) in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).enumerate() {
        let line: Value = serde_json::from_slice(line).unwrap();
        assert_eq!(line["position"], position);
        match line["type"].as_u64() {
            Some(1) if line["payload"].is_null() => assert!(line.get("size").is_none()),
            Some(1) => {
                let name = line["name"].as_str().unwrap().trim_start_matches("./");
                let content = &contents[name.as_bytes()];
                assert_eq!(line["size"], content.len());
                tar.extend_from_slice(content);
            }
            Some(2) => tar.extend(STANDARD.decode(line["payload"].as_str().unwrap()).unwrap()),
            _ => panic!("{line}"),
        }
    }
    tar
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_layers(seed: u64, entries in 0_usize..50, chunk_size in 5000_u64..200_000, end in 0_usize..40) {
        let layer = random(seed, entries);
        // As tar programs pad it.
        let tar = [layer.tar(), vec![0; 512 * end]].concat();
        for options in [podman(), stargz()] {
            let options = Options { chunk_size, ..options };
            let built = build(&gzip(&tar), &options).unwrap();
            let toc = opened(&built);
            assert_same_tree(&toc, &layer);
            assert_same_contents(&toc, &built.blob, &layer);
            let inner = unzstd(&built.blob);
            prop_assert_eq!(inner.len() as u64, built.summary.uncompressed_size);
            prop_assert_eq!(estargz::Digest::of(&inner), built.summary.diff_id);
            if options.target == podman().target {
                prop_assert_eq!(&inner, &tar);
                prop_assert_eq!(toc.landmark(), Landmark::Absent);
            } else {
                prop_assert_eq!(&inner[1024..], &tar[..]);
                prop_assert_eq!(toc.landmark(), Landmark::NoPrefetch);
            }
            // Nothing depends on the threads, and doing it again changes nothing.
            let threads = 1.try_into().unwrap();
            prop_assert_eq!(&build(&tar, &Options { threads, ..options.clone() }).unwrap(), &built);
            prop_assert_eq!(&build(&built.blob, &options).unwrap().blob, &built.blob);
        }
    }

    #[test]
    fn the_tar_split_is_the_tar_without_contents(seed: u64, entries in 0_usize..40) {
        // One name twice is two contents; the tar-split knows them by their places only.
        let mut layer = random(seed, entries);
        let mut seen = std::collections::BTreeSet::new();
        layer.entries_mut().retain(|entry| seen.insert(entry.name.clone()));
        let contents: BTreeMap<_, _> = layer.entries().iter().map(|entry| {
            (String::from_utf8(entry.name.clone()).unwrap().trim_start_matches("./").into(), entry.payload())
        }).collect();
        let built = build(&layer.tar(), &podman()).unwrap();
        prop_assert_eq!(reassembled(&built, &contents), layer.tar());
    }
}

#[test]
fn rows_are_those_of_podman() {
    let layer = Layer::new()
        .dir("d")
        .names("root", "root")
        .file("d/one", "content")
        .mtime_nanos(1_600_000_000, 5)
        .file("empty", "")
        .sparse("some", 200_000, &[(0, b"x")])
        .file("zeros", vec![0; 1000]);
    let built = build(&layer.tar(), &podman()).unwrap();
    opened(&built);
    let rows = built.rows();
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
    assert_eq!(rows[0]["name"], "d/");
    assert!(rows[0].get("userName").is_none());
    let one = row("d/one");
    assert_eq!(one["modtime"], "2020-09-13T12:26:40.000000005Z");
    assert_eq!(one["digest"], support::sha256_digest(b"content"));
    let (start, end) =
        (one["offset"].as_u64().unwrap() as usize, one["endOffset"].as_u64().unwrap() as usize);
    assert_eq!(unzstd(&built.blob[start..end]), b"content");
    for key in ["chunkDigest", "chunkSize", "chunkType", "innerOffset"] {
        assert!(one.get(key).is_none() && row("zeros").get(key).is_none(), "{key}");
    }
    assert!(row("empty").get("digest").is_none() && row("empty").get("offset").is_none());

    let chunks: Vec<&Value> = rows.iter().filter(|row| row["name"] == "some").collect();
    assert_eq!(chunks.len(), 4);
    let sizes: Vec<_> = chunks.iter().map(|row| row["chunkSize"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [65_536, 65_536, 65_536, 200_000 - 3 * 65_536]);
    let types: Vec<_> = chunks.iter().map(|row| row.get("chunkType").and_then(Value::as_str)).collect();
    assert_eq!(types, [None, Some("zeros"), Some("zeros"), Some("zeros")]);
    let (last, end) = (chunks[3]["offset"].as_u64().unwrap(), chunks[0]["endOffset"].as_u64().unwrap());
    assert_eq!(unzstd(&built.blob[last as usize..end as usize]).len() as u64, sizes[3]);
    assert!(chunks[1].get("endOffset").is_none());
    let toc = built.toc();
    assert_eq!(toc.chunks().iter().filter(|chunk| chunk.zeros).count(), 3);

    let stargz = build(&layer.tar(), &stargz()).unwrap();
    let rows = stargz.rows();
    let one = rows.iter().find(|row| row["name"] == "d/one").unwrap();
    assert_eq!(one["chunkDigest"], one["digest"]);
    assert!(rows.iter().all(|row| row.get("endOffset").is_none() && row.get("chunkType").is_none()));
}

#[test]
fn annotations_are_those_of_one_dialect() {
    let tar = Layer::new().file("f", "f").tar();
    let keys = |options: &Options| {
        let annotations = build(&tar, options).unwrap().summary.annotations();
        annotations.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
    };
    let podman = keys(&podman());
    assert_eq!(podman.len(), 4);
    assert!(podman.iter().all(|key| key.starts_with("io.github.containers.zstd-chunked.")), "{podman:?}");
    let stargz = keys(&stargz());
    assert_eq!(
        stargz,
        [
            "containerd.io/snapshot/stargz/toc.digest",
            "io.containers.estargz.uncompressed-size",
            "io.containers.zstd-chunked.manifest-checksum",
            "io.containers.zstd-chunked.manifest-position",
        ]
    );
    assert_eq!(keys(&options()), stargz[..2]);
}

#[test]
fn every_lazy_format_can_become_every_other() {
    let layer = random(7, 40);
    let inputs = [
        Encoder::new().encode(&layer),
        ZstdEncoder::new(support::zstd::Dialect::Podman).encode(&layer),
        ZstdEncoder::new(support::zstd::Dialect::Stargz).encode(&layer),
    ];
    for input in &inputs {
        for options in [options(), podman(), stargz()] {
            let built = build(&input.blob, &options).unwrap();
            assert_same_tree(&built.toc(), &layer);
            assert_same_contents(&built.toc(), &built.blob, &layer);
        }
    }
    // What does not end is only taken where the frames say that it does.
    let tar = layer.tar();
    assert!(matches!(build(&tar[..tar.len() - 1024], &podman()), Err(Error::Truncated { .. })));
}

#[test]
fn what_podman_would_refuse_is_not_annotated() {
    let file = |name: &[u8]| Layer::new().dir("d").file(name, "x");
    let with = |at: usize, bytes: &[u8], entry: usize| {
        let mut tar = Layer::new().dir("d").file("d/f", "x").symlink("l", "d").tar();
        // The header of the entry, 512 bytes each; the file has a block of content too.
        let header = &mut tar[[0, 512, 1536][entry]..][..512];
        header[at..at + bytes.len()].copy_from_slice(bytes);
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar
    };
    for (unlike, tar) in [
        (0, file(b"d/f").tar()),
        (1, file(b"d/\xff").tar()),
        (1, file(b"d/f").file("./d//f", "again").tar()),
        (0, with(124, b"00000000000", 0)),
        (1, with(124, b"00000000007", 0)),
        (1, with(124, b"00000000007", 2)),
        (1, with(337, b"0000007", 1)),
        (1, with(157, b"target", 1)),
    ] {
        let built = build(&tar, &podman()).unwrap();
        assert_eq!(built.summary.unlike, unlike);
        assert_eq!(built.summary.annotations().is_empty(), unlike > 0);
        assert_eq!(unzstd(&built.blob), tar);
        // stargz-snapshotter compares nothing.
        let built = build(&tar, &stargz()).unwrap();
        assert_eq!((built.summary.unlike, built.summary.annotations().len()), (0, 4));
    }
}

#[test]
fn long_runs_of_headers_and_prioritized_files() {
    let mut layer = Layer::new().file("first", "1");
    for n in 0..2500 {
        layer = layer.file(format!("{n}"), "");
    }
    layer = layer.file("last", "2");
    let built = build(&layer.tar(), &podman()).unwrap();
    assert_same_contents(&opened(&built), &built.blob, &layer);
    assert_eq!(unzstd(&built.blob), layer.tar());

    let options = Options { prioritized: vec![Pattern::path("last")], ..stargz() };
    let built = build(&layer.tar(), &options).unwrap();
    let toc = opened(&built);
    assert!(matches!(toc.landmark(), Landmark::Prefetch { .. }));
    assert_same_contents(&toc, &built.blob, &layer);
}

#[test]
fn what_a_dialect_cannot_say_is_refused() {
    for (name, options) in [
        ("min_chunk_size", Options { min_chunk_size: 1, ..podman() }),
        ("min_chunk_size", Options { min_chunk_size: 1, ..stargz() }),
        ("prioritized", Options { prioritized: vec![Pattern::path("a")], ..podman() }),
    ] {
        let error = build(&Layer::new().tar(), &options).unwrap_err();
        assert!(matches!(error, Error::BadOption { name: found, .. } if found == name), "{error}");
    }
}

/// `zstd` itself is happy with the whole, and skips what is none of its business.
#[test]
fn the_program_zstd_reads_it() {
    let layer = random(3, 30);
    let built = build(&layer.tar(), &podman()).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &built.blob).unwrap();
    match std::process::Command::new("zstd").arg("-dc").arg(file.path()).output() {
        Ok(output) => assert_eq!(output.stdout, layer.tar()),
        Err(error) => {
            eprintln!("SKIPPED: no zstd here: {error}");
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI has zstd");
        }
    }
}
