//! Layers of every format, and each reason not to mount one.

use estargz::{Opener, Step};
use support::estargz::{Built, Encoder};
use support::layer::Layer;

use super::*;

fn layer() -> Layer {
    Layer::new()
        .dir("etc")
        .file("etc/a", "first\n")
        .file("etc/b", vec![7; 10])
        .symlink("l", "etc/a")
        .dir("empty")
}

fn toc_of(blob: &[u8]) -> Result<TocJson, Error> {
    let size = blob.len() as u64;
    match Opener::new(size, Limits::default())?.feed(0, blob)? {
        Step::Done(json) => Ok(json),
        Step::Need(range) => panic!("{range:?} of a blob that is all there"),
    }
}

fn verdict(built: &Built, named: &Named) -> (bool, Option<&'static str>) {
    let json = toc_of(&built.blob);
    let lazy = lazy(named, json.as_ref().map_err(Clone::clone), &Limits::default());
    (lazy.lazy, lazy.reason)
}

#[test]
fn formats() {
    let tar = layer().tar();
    let estargz = Encoder::new().encode(&layer()).blob;
    let stargz = Encoder::new().legacy().encode(&layer()).blob;
    let zstd = [&[0x28, 0xb5, 0x2f, 0xfd][..], &[0; 600]].concat();
    let chunked = |magic: &[u8]| [&zstd[..], magic].concat();
    let cases: [(&[u8], Format); 8] = [
        (&tar, Format::Tar),
        (&layer().tar_gzip(), Format::Gzip),
        (&estargz, Format::Estargz),
        (&stargz, Format::Stargz),
        (&zstd, Format::Zstd),
        (&chunked(b"GNUlInUx"), Format::ZstdChunked),
        (&chunked(b"GnUlInUx"), Format::ZstdChunked),
        (&[0; 1000], Format::Other),
    ];
    for (blob, expected) in cases {
        let json = toc_of(blob);
        let found = format(&blob[..512.min(blob.len())], &blob[blob.len() - 8..], json.as_ref().ok());
        assert_eq!(found, expected);
    }
}

#[test]
fn each_reason_is_the_daemons() {
    let good = Encoder::new().encode(&layer());
    let named = |built: &Built| Named::As(built.toc_digest.clone());
    assert_eq!(verdict(&good, &named(&good)), (true, None));
    assert_eq!(verdict(&good, &Named::Unknown), (true, None));
    assert_eq!(verdict(&good, &Named::Not), (false, Some("no_toc_digest")));
    assert_eq!(verdict(&good, &Named::As("sha256:x".to_owned())), (false, Some("bad_labels")));
    let other = Named::As(Digest::of(b"").to_string());
    assert_eq!(verdict(&good, &other), (false, Some("verify_failed")));

    let plain = Built { blob: layer().tar_gzip().into(), ..good.clone() };
    assert_eq!(verdict(&plain, &Named::Not), (false, Some("no_toc_digest")));
    assert_eq!(verdict(&plain, &named(&good)), (false, Some("not_estargz")));

    let broken = Encoder::new().footer_offset(1 << 50).encode(&layer());
    assert_eq!(verdict(&broken, &named(&broken)), (false, Some("toc_invalid")));
    let without = Encoder::new().without_digests().encode(&layer());
    assert_eq!(verdict(&without, &named(&without)), (false, Some("toc_invalid")));
    let lossy = Encoder::new().encode(&Layer::new().file(b"\xff", "x"));
    assert_eq!(verdict(&lossy, &named(&lossy)), (false, Some("lossy_names")));
}

#[test]
fn contents_are_counted() {
    let built = Encoder::new().chunk_size(4).prioritized(&["etc/b"]).encode(&layer());
    let json = toc_of(&built.blob).unwrap();
    let toc = json.parse(&Limits::default()).unwrap();
    let contents = contents(built.blob.len() as u64, &json, &toc);
    assert_eq!(contents.toc_digest, built.toc_digest);
    assert_eq!((contents.entries, contents.files, contents.file_bytes, contents.chunks), (5, 2, 16, 5));
    assert_eq!((contents.landmark, contents.prioritized), ("prefetch", vec!["etc/b".to_owned()]));
    assert!(contents.prefetch_bytes > 0 && contents.overhead_bytes < built.blob.len() as u64);

    let files = files(&toc);
    let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["empty", "etc", "etc/a", "etc/b", "l"]);
    assert_eq!((files[2].kind, files[2].size, files[2].chunks.len()), ("file", 6, 2));
    assert_eq!(files[4].target.as_deref(), Some("etc/a"));
    let none = Encoder::new().encode(&layer());
    let json = toc_of(&none.blob).unwrap();
    let contents = super::contents(0, &json, &json.parse(&Limits::default()).unwrap());
    assert_eq!(
        (contents.landmark, contents.prefetch_bytes, contents.prioritized.len()),
        ("no prefetch", 0, 0)
    );
}
