//! Sound layers, and damage in each place.

use futures::{StreamExt, stream};
use serde_json::Value;
use support::estargz::{Built, Encoder};
use support::layer::Layer;
use support::sha256_digest;
use tokio::task::spawn_blocking;

use super::*;
use crate::convert::pipe;

fn layer() -> Layer {
    Layer::new()
        .dir("etc")
        .file("etc/a", "first\n")
        .noise("etc/b", 10_000, 1)
        .file("empty", "")
        .noise("c", 5000, 2)
}

fn toc(blob: &[u8]) -> Toc {
    let size = blob.len() as u64;
    match estargz::Opener::new(size, Limits::default()).unwrap().feed(0, blob).unwrap() {
        estargz::Step::Done(json) => json.parse(&Limits::default()).unwrap(),
        estargz::Step::Need(range) => panic!("{range:?} of a blob that is all there"),
    }
}

/// Feeds a blob in small pieces.
async fn check(blob: &[u8], expected: Expected) -> Findings {
    let pieces: Vec<_> = blob.chunks(777).map(|piece| Ok(bytes::Bytes::copy_from_slice(piece))).collect();
    let (feed, inlet) = pipe::inlet();
    let checking = spawn_blocking(move || verify(inlet, &expected).unwrap());
    pipe::feed(feed, stream::iter(pieces).boxed(), |_| {}).await.unwrap();
    checking.await.unwrap()
}

fn expect(built: &Built) -> Expected {
    Expected {
        blob: Some(built.digest.parse().unwrap()),
        size: built.blob.len() as u64,
        diff_id: Some(built.diff_id.parse().unwrap()),
        toc: Some(toc(&built.blob)),
        contents: Contents::Tar,
    }
}

#[tokio::test]
async fn sound_layers() {
    for encoder in [
        Encoder::new(),
        Encoder::new().chunk_size(1000),
        Encoder::new().chunk_size(1000).min_chunk_size(3000),
        Encoder::new().prioritized(&["c"]),
    ] {
        let built = encoder.encode(&layer());
        let findings = check(&built.blob, expect(&built)).await;
        assert_eq!(findings.problems, Vec::<String>::new());
        assert_eq!(findings.verified[..2], ["blob", "contents"]);
        assert!(findings.verified[2].ends_with(" chunks"), "{findings:?}");
    }
    let tar = layer().tar();
    let gzip = layer().tar_gzip();
    let zstd = zstd::stream::encode_all(&tar[..], 3).unwrap();
    for blob in [&tar, &gzip, &zstd] {
        let expected = Expected {
            blob: Some(Digest::of(blob)),
            size: blob.len() as u64,
            diff_id: Some(Digest::of(&tar)),
            toc: None,
            contents: Contents::Tar,
        };
        let findings = check(blob, expected).await;
        assert_eq!(
            (findings.problems.len(), &findings.verified[..]),
            (0, &["blob".to_owned(), "contents".into()][..])
        );
        assert_eq!(findings.uncompressed_size, tar.len() as u64);
    }
    let tiny = Expected { diff_id: Some(Digest::of(b"ab")), contents: Contents::Tar, ..Expected::of(2) };
    assert_eq!(check(b"ab", tiny).await.verified, ["contents"]);
}

#[tokio::test]
async fn damage_is_found() {
    let built = Encoder::new().chunk_size(1000).encode(&layer());
    // A bit in the noise of a file, which is stored about as it is.
    let flipped = built.flip(8 * (built.blob.len() as u64 / 3));
    let findings = check(&flipped.blob, expect(&built)).await;
    let problems = findings.problems.join("\n");
    assert!(problems.contains("the blob has"), "{problems}");
    assert!(problems.contains("the member at "), "{problems}");
    assert!(!findings.verified.iter().any(|what| what.ends_with("chunks")));

    let short = &built.blob[..built.blob.len() / 2];
    let findings = check(short, expect(&built)).await;
    let problems = findings.problems.join("\n");
    assert!(
        problems.contains("is not in the blob") && problems.contains("cannot be decompressed"),
        "{problems}"
    );

    let other = Expected { diff_id: Some(Digest::of(b"")), ..expect(&built) };
    let findings = check(&built.blob, other).await;
    assert_eq!(findings.problems.len(), 1);
    assert!(findings.problems[0].starts_with("the contents have digest"));
}

#[tokio::test]
async fn a_toc_that_lies_is_found() {
    let lie = |key: &'static str, path: &'static str| {
        move |toc: &mut Value| {
            for entry in toc["entries"].as_array_mut().unwrap() {
                if entry["name"] == path {
                    entry[key] = sha256_digest(b"lie").into();
                }
            }
        }
    };
    for (key, path, said) in [
        ("chunkDigest", "etc/b", "the member at"),
        ("digest", "etc/b", "etc/b: the file has"),
        ("digest", "empty", "empty: an"),
    ] {
        let built = Encoder::new().chunk_size(1000).edit_toc(lie(key, path)).encode(&layer());
        let problems = check(&built.blob, expect(&built)).await.problems.join("\n");
        assert!(problems.contains(said), "{key} of {path}: {problems}");
    }
    let without = Encoder::new().without_digests().encode(&layer());
    let problems = check(&without.blob, expect(&without)).await.problems;
    assert!(problems[0].ends_with("have no digest in the TOC"), "{problems:?}");
}

#[tokio::test]
async fn many_problems_are_cut_short() {
    let layer = (0..100).fold(Layer::new(), |layer, n| layer.noise(format!("f{n}"), 100, n));
    let built = Encoder::new()
        .edit_toc(|toc| {
            for entry in toc["entries"].as_array_mut().unwrap() {
                // The two must agree for the TOC to be accepted at all.
                entry["digest"] = sha256_digest(b"lie").into();
                entry["chunkDigest"] = sha256_digest(b"lie").into();
            }
        })
        .encode(&layer);
    let problems = check(&built.blob, expect(&built)).await.problems;
    assert_eq!(problems.len(), MAX_PROBLEMS + 1);
    assert!(problems[MAX_PROBLEMS].starts_with("and "), "{problems:?}");
}
