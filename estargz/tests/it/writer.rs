//! The writer from outside: layers in, blobs out, opened again.

#[path = "writer/faults.rs"]
mod faults;
#[path = "writer/memory.rs"]
mod memory;
#[path = "writer/model.rs"]
mod model;
#[path = "writer/order.rs"]
mod order;
#[path = "writer/tools.rs"]
mod tools;
#[path = "writer/zstd.rs"]
mod zstd_chunked;

use std::io::{Cursor, Read, Write};

use bytes::Bytes;
use estargz::writer::{Error, Level, Options, Pattern, Summary, convert};
use estargz::{Limits, VerifiedToc};
use flate2::Compression;
use flate2::bufread::{GzDecoder, MultiGzDecoder};
use flate2::write::GzEncoder;
use support::estargz::Encoder;
use support::layer::{Layer, random};
use support::sha256_digest;

use crate::open;
use crate::roundtrip::{assert_same_contents, assert_same_tree};

/// A blob and what was said of it.
#[derive(Debug, PartialEq)]
struct Built {
    blob: Bytes,
    summary: Summary,
}

/// Default options, but fast and with threads whatever the machine has.
fn options() -> Options {
    Options { level: Level::new(1).unwrap(), threads: 2.try_into().unwrap(), ..Options::default() }
}

fn build(input: &[u8], options: &Options) -> Result<Built, Error> {
    let mut blob = Vec::new();
    let summary = convert(input, &mut blob, options, || Ok(Cursor::new(Vec::new())), &())?;
    Ok(Built { blob: blob.into(), summary })
}

impl Built {
    fn toc(&self) -> VerifiedToc {
        let limits = Limits::default();
        open(&self.blob, 1 << 20, &limits).unwrap().verify(&self.summary.toc_digest, &limits).unwrap()
    }

    /// The entries of the JSON.
    fn rows(&self) -> Vec<serde_json::Value> {
        let json = open(&self.blob, 1 << 20, &Limits::default()).unwrap();
        assert_eq!(json.bytes().len() as u64, self.summary.toc_json_size);
        let toc: serde_json::Value = serde_json::from_slice(json.bytes()).unwrap();
        toc["entries"].as_array().unwrap().clone()
    }

    fn names(&self) -> Vec<String> {
        self.rows().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Checks everything that the summary says of the bytes.
    fn check(&self) {
        let Summary { blob_digest, blob_size, diff_id, uncompressed_size, .. } = &self.summary;
        assert_eq!(
            (self.blob.len() as u64, sha256_digest(&self.blob)),
            (*blob_size, blob_digest.to_string())
        );
        let tar = gunzip(&self.blob);
        assert_eq!((tar.len() as u64, sha256_digest(&tar)), (*uncompressed_size, diff_id.to_string()));
    }
}

fn gunzip(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    MultiGzDecoder::new(blob).read_to_end(&mut tar).unwrap();
    tar
}

fn gzip(tar: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(tar).unwrap();
    gzip.finish().unwrap()
}

fn zstd(tar: &[u8]) -> Vec<u8> {
    zstd::encode_all(tar, 1).unwrap()
}

/// Decompressed sizes of all members, the TOC's and the footer included.
fn members(mut blob: &[u8]) -> Vec<usize> {
    let mut sizes = Vec::new();
    while !blob.is_empty() {
        let mut member = GzDecoder::new(blob);
        sizes.push(member.read_to_end(&mut Vec::new()).unwrap());
        blob = member.into_inner();
    }
    sizes
}

#[test]
fn an_empty_layer() {
    let built = build(&Layer::new().tar(), &options()).unwrap();
    built.check();
    assert_eq!(built.names(), [".no.prefetch.landmark"]);
    assert_eq!((built.summary.entries, built.summary.chunks, built.summary.tar_size), (0, 0, 1024));
    assert_eq!(built.toc().inodes().len(), 1);
}

#[test]
fn small_files_share_members_if_asked_to() {
    let mut layer = Layer::new();
    for n in 0..100 {
        layer = layer.noise(format!("{n}"), 100, n);
    }
    let apart = build(&layer.tar(), &options()).unwrap();
    let shared = build(&layer.tar(), &Options { min_chunk_size: 10_000, ..options() }).unwrap();
    // Of the blob's members four hold no file: the landmark's header, the landmark, TOC and footer.
    assert_eq!(members(&apart.blob).len(), 100 + 4);
    // A file takes a block and a header's; the landmark shares too.
    let sizes = members(&shared.blob);
    assert_eq!(sizes.len(), 3 + 102_usize.div_ceil(10));
    assert!(sizes[1..sizes.len() - 3].iter().all(|size| (10_000..11_100).contains(size)), "{sizes:?}");
    assert_same_contents(&shared.toc(), &shared.blob, &layer);
    assert!(shared.blob.len() < apart.blob.len());
    let inner = |built: &Built| built.rows().iter().filter(|row| row.get("innerOffset").is_some()).count();
    assert_eq!((inner(&apart), inner(&shared)), (0, 101 - 11));
}

#[test]
fn long_runs_of_headers_are_split() {
    let mut layer = Layer::new().file("first", "1");
    for n in 0..2500 {
        layer = layer.file(format!("{n}"), "");
    }
    layer = layer.file("last", "2");
    for min_chunk_size in [0, 2000] {
        let built = build(&layer.tar(), &Options { min_chunk_size, ..options() }).unwrap();
        built.check();
        let most = members(&built.blob).into_iter().rev().skip(2).max().unwrap();
        assert!(most < (1 << 20) + 2048, "{most}");
        let toc = built.toc();
        assert_same_contents(&toc, &built.blob, &layer);
        // The TOC does not name a member without chunks.
        assert_eq!(toc.members().len(), if min_chunk_size == 0 { 3 } else { 2 });
    }
}

#[test]
fn chunk_sizes_are_kept() {
    let layer =
        Layer::new().noise("exact", 3000, 1).noise("more", 3001, 2).noise("less", 2999, 3).file("one", "1");
    for (chunk_size, chunks) in [(1000, 3 + 4 + 3 + 1), (3000, 1 + 2 + 1 + 1), (1, 9001)] {
        let built = build(&layer.tar(), &Options { chunk_size, ..options() }).unwrap();
        let toc = built.toc();
        assert_same_contents(&toc, &built.blob, &layer);
        assert_eq!((toc.chunks().len(), built.summary.chunks), (chunks, chunks as u64));
        for row in built.rows() {
            let Some(offset) = row.get("offset") else { panic!("{row}: all these have payload") };
            assert!(offset.as_u64() > Some(0));
            let shorter = row["size"].as_u64().unwrap_or(chunk_size) % chunk_size != 0;
            let is_last = row["type"] == "reg" && row["size"].as_u64() < Some(chunk_size);
            assert!(row.get("chunkSize").is_some() || is_last || shorter || row["type"] == "chunk", "{row}");
        }
    }
}

#[test]
fn names_that_are_not_utf8_survive_in_the_tar() {
    let layer = Layer::new()
        .file(b"caf\xe9".as_slice(), "x")
        .symlink("link", b"\xff")
        .file("plain", "")
        .xattr(b"user.\xfe", "");
    let built = build(&layer.tar(), &options()).unwrap();
    assert_eq!(built.summary.lossy_names, 3);
    assert!(built.toc().lossy_names());
    assert_eq!(built.names()[1..], ["caf\u{fffd}", "link", "plain"]);
    let tar = gunzip(&built.blob);
    assert!(
        tar.windows(layer.tar().len() - 1024)
            .any(|window| window == &layer.tar()[..layer.tar().len() - 1024])
    );
}

#[test]
fn times_keep_their_fraction() {
    let layer = Layer::new()
        .file("a", "")
        .mtime_nanos(1_600_000_000, 123_456_789)
        .file("b", "")
        .mtime_nanos(-3, 500_000_000)
        .file("c", "")
        .mtime(0)
        .dir("d")
        .mtime_nanos(0, 1);
    let built = build(&layer.tar(), &options()).unwrap();
    assert_same_tree(&built.toc(), &layer);
    let times: Vec<_> =
        built.rows()[1..].iter().map(|row| row["modtime"].as_str().map(str::to_owned)).collect();
    let expected =
        ["2020-09-13T12:26:40.123456789Z", "1969-12-31T23:59:57.5Z", "", "1970-01-01T00:00:00.000000001Z"];
    assert_eq!(times, expected.map(|time| (!time.is_empty()).then(|| time.to_owned())));
}

#[test]
fn files_of_the_format_are_made_anew() {
    let layer = Layer::new().dir("etc").file("etc/passwd", "root").hardlink("link", "etc/passwd");
    let expected = build(&layer.tar(), &options()).unwrap();
    let littered = Layer::new()
        .file("./stargz.index.json", "{}")
        .dir("etc")
        .file(".prefetch.landmark", "old")
        .file("etc/passwd", "root")
        .hardlink("link", "etc/passwd")
        .file("/.no.prefetch.landmark", "")
        .symlink("stargz.index.json", "x");
    let built = build(&littered.tar(), &options()).unwrap();
    assert_eq!(built.blob, expected.blob);
    // Deeper they are ordinary names.
    let deeper = build(&Layer::new().file("etc/stargz.index.json", "{}").tar(), &options()).unwrap();
    assert_eq!(deeper.names()[1..], ["etc/stargz.index.json"]);
}

#[test]
fn layers_of_other_encoders_give_the_same_blob() {
    let mut layers = vec![Layer::new().dir("etc").file("etc/passwd", "root").noise("big", 50_000, 1)];
    // An encoder with landmarks drops what is listed twice.
    layers.extend((0..20).map(|seed| random(seed, 40)).filter(|layer| !lists_twice(layer)).take(5));
    for layer in layers {
        let expected = build(&layer.tar(), &options()).unwrap();
        for encoder in [
            Encoder::new(),
            Encoder::new().chunk_size(9000).min_chunk_size(4000),
            Encoder::new().legacy(),
            Encoder::new().prioritized(&[]),
        ] {
            let other = encoder.encode(&layer);
            let built = build(&other.blob, &options()).unwrap();
            assert_eq!(built.blob, expected.blob);
        }
    }
}

fn lists_twice(layer: &Layer) -> bool {
    let mut names: Vec<_> = layer.entries().iter().map(|entry| entry.name.clone()).collect();
    names.sort();
    names.windows(2).any(|pair| pair[0] == pair[1])
}

#[test]
fn everything_but_places_is_as_an_independent_encoder_says() {
    for seed in 0..12 {
        let layer = random(seed, 50);
        let chunk_size = 20_000;
        let built = build(&layer.tar(), &Options { chunk_size, ..options() }).unwrap();
        let encoder = Encoder::new().level(1).chunk_size(chunk_size);
        // Without landmark, it keeps what is listed twice.
        let other = encoder.clone().landmark(support::estargz::Landmark::None).encode(&layer);
        let placeless = |mut row: serde_json::Value| {
            row.as_object_mut().unwrap().remove("offset");
            row
        };
        let ours: Vec<_> = built.rows().into_iter().skip(1).map(placeless).collect();
        let theirs: Vec<_> =
            other.toc()["entries"].as_array().unwrap().iter().cloned().map(placeless).collect();
        assert_eq!(ours, theirs);

        if !lists_twice(&layer) {
            // The same tar in the same members.
            let other = encoder.encode(&layer);
            let (ours, theirs) = (gunzip(&built.blob), gunzip(&other.blob));
            let toc = ours.windows(17).position(|window| window == b"stargz.index.json").unwrap();
            assert!(ours[..toc] == theirs[..toc]);
            let (mut ours, mut theirs) = (members(&built.blob), members(&other.blob));
            for sizes in [&mut ours, &mut theirs] {
                sizes.truncate(sizes.len() - 2);
            }
            assert_eq!(ours, theirs);
        }
    }
}

#[test]
fn bad_options_are_refused() {
    let refused = |options: Options| match build(&[0; 1024], &options) {
        Err(Error::BadOption { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(Options { chunk_size: 0, ..options() }), "chunk_size");
    assert_eq!(refused(Options { chunk_size: (64 << 20) + 1, ..options() }), "chunk_size");
    assert_eq!(refused(Options { min_chunk_size: u64::MAX, ..options() }), "min_chunk_size");
    assert!(Level::new(0).is_err() && Level::new(13).is_err() && Level::new(12).unwrap().get() == 12);
}
