//! Random layers through an independent encoder and back: the tree and the bytes are those of the tar.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use estargz::fuzzing::check;
use estargz::{
    ChunkSpec, Compression, Format, Kind, Landmark, Limits, Opener, Step, Toc, VerifiedToc, announced,
    decode_member,
};
use proptest::prelude::*;
use support::estargz::{Built, Encoder, Landmark as Marked};
use support::layer::{self, Layer, random};
use support::zstd::{Dialect, ZstdEncoder};

use crate::{digest, open};

fn verified(built: &Built, speculative: u64) -> VerifiedToc {
    let limits = Limits::default();
    let json = open(&built.blob, speculative, &limits).unwrap();
    assert_eq!(json.bytes(), built.toc_json);
    assert_eq!(json.toc_offset(), built.toc_offset);
    let digests = [Some(json.digest()), json.stored_digest()];
    assert!(digests.contains(&Some(digest(&built.toc_digest))));
    json.verify(&digest(&built.toc_digest), &limits).unwrap()
}

/// Every path with the number of its inode.
fn paths(toc: &Toc) -> BTreeMap<Vec<u8>, u32> {
    let mut paths = BTreeMap::from([(Vec::new(), 0)]);
    let mut open = vec![(Vec::new(), 0)];
    while let Some((path, number)) = open.pop() {
        for (name, child) in &toc.inodes()[number as usize].children {
            let path = if path.is_empty() { name.clone() } else { [&path[..], b"/", name].concat() };
            paths.insert(path.clone(), *child);
            open.push((path, *child));
        }
    }
    paths
}

fn is_mark(path: &[u8]) -> bool {
    path.rsplit(|byte| *byte == b'/').next().is_some_and(|name| name.starts_with(b".wh."))
}

/// Compares a TOC with what the fixture says an unpack gives. Whiteouts and opaque marks, which an unpack turns into
/// something else, are compared by name.
pub fn assert_same_tree(toc: &Toc, layer: &Layer) {
    let mut paths = paths(toc);
    let mut first_names = BTreeMap::new();
    for (path, number) in &paths {
        first_names.entry(*number).or_insert_with(|| path.clone());
    }
    let marks: BTreeSet<_> = layer
        .entries()
        .iter()
        .map(|entry| String::from_utf8(entry.name.clone()).unwrap())
        .map(|name| name.split('/').filter(|part| !matches!(*part, "" | ".")).collect::<Vec<_>>().join("/"))
        .filter(|name| is_mark(name.as_bytes()))
        .collect();
    for mark in &marks {
        let number = paths.remove(mark.as_bytes());
        assert!(number.is_some() && number == toc.lookup(mark), "{mark} is missing");
    }
    assert_eq!(paths.keys().find(|path| is_mark(path)), None, "only the marks that were in the layer");

    for expected in layer.expected() {
        let is_whiteout = expected.kind == layer::Kind::CharDevice && expected.rdev == (0, 0);
        let Some(number) = paths.remove(&expected.path) else {
            assert!(is_whiteout, "{expected:?} is missing");
            continue;
        };
        let inode = &toc.inodes()[number as usize];
        assert_eq!(toc.lookup(&expected.path), Some(number));
        let kind = match inode.kind {
            Kind::Directory => layer::Kind::Directory,
            Kind::Regular => layer::Kind::Regular,
            Kind::Symlink => layer::Kind::Symlink,
            Kind::CharDevice => layer::Kind::CharDevice,
            Kind::BlockDevice => layer::Kind::BlockDevice,
            Kind::Fifo => layer::Kind::Fifo,
        };
        let mut xattrs = expected.xattrs.clone();
        let what = String::from_utf8_lossy(&expected.path);
        if marks.iter().any(|mark| *mark == format!("{what}/.wh..wh..opq").trim_start_matches('/')) {
            xattrs.remove(&b"trusted.overlay.opaque"[..]);
        }
        assert_eq!(kind, expected.kind, "{what}");
        assert_eq!((inode.mode, inode.uid, inode.gid), (expected.mode, expected.uid, expected.gid), "{what}");
        assert_eq!((inode.mtime.secs, inode.mtime.nanos), expected.mtime, "{what}");
        assert_eq!((inode.size, u64::from(inode.nlink)), (expected.size, expected.nlink), "{what}");
        assert_eq!(inode.link_target, expected.link_target.unwrap_or_default(), "{what}");
        assert_eq!((inode.rdev_major, inode.rdev_minor), expected.rdev, "{what}");
        assert_eq!(inode.xattrs, xattrs.into_iter().collect::<Vec<_>>(), "{what}");
        // podman tells none of an empty file.
        if inode.size > 0 || inode.digest.is_some() {
            assert_eq!(inode.digest.map(|digest| digest.hex()), expected.sha256, "{what}");
        }
        if let Some(first) = &expected.same_as {
            assert_eq!(&first_names[&number], first, "{what}");
        }
    }
    assert!(paths.is_empty(), "not in the layer: {paths:?}");
}

/// Decodes every member, all of its chunks or those that `pick` picks, and puts the files together.
fn files(toc: &VerifiedToc, blob: &[u8], pick: impl Fn(u32) -> bool) -> BTreeMap<u32, Vec<u8>> {
    let mut wanted: BTreeMap<u32, Vec<(usize, ChunkSpec)>> = BTreeMap::new();
    for (index, chunk) in toc.chunks().iter().enumerate().filter(|(_, chunk)| pick(chunk.inode)) {
        wanted.entry(chunk.member).or_default().push((index, chunk.spec().unwrap()));
    }
    let mut files: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for (member, mut chunks) in wanted {
        let member = toc.members()[member as usize];
        chunks.sort_by_key(|(_, spec)| spec.inner_offset);
        let specs: Vec<_> = chunks.iter().map(|(_, spec)| *spec).collect();
        let bytes = &blob[member.offset as usize..member.end as usize];
        let decoded = decode_member(toc.format().compression(), bytes, &specs, &Limits::default()).unwrap();
        for ((index, spec), decoded) in chunks.iter().zip(decoded) {
            assert_eq!(decoded.spec(), spec);
            let chunk = &toc.chunks()[*index];
            let file = files.entry(chunk.inode).or_default();
            let end = (chunk.file_offset + chunk.size) as usize;
            file.resize(file.len().max(end), 0);
            file[chunk.file_offset as usize..end].copy_from_slice(decoded.data());
        }
    }
    files
}

pub fn assert_same_contents(toc: &VerifiedToc, blob: &[u8], layer: &Layer) {
    let all = files(toc, blob, |_| true);
    for (path, data) in layer.contents() {
        let number = toc.lookup(&path).unwrap();
        let found = all.get(&number).map_or(&[][..], |file| file);
        assert_eq!(Bytes::copy_from_slice(found), data, "{}", String::from_utf8_lossy(&path));
    }
    let some = files(toc, blob, |inode| inode % 3 == 0);
    assert!(some.iter().all(|(inode, file)| all[inode] == *file));
}

fn encoder() -> impl Strategy<Value = Encoder> {
    let chunk_size = prop_oneof![Just(4 << 20), 50_000_u64..200_000, 7000_u64..20_000];
    let min_chunk_size = prop_oneof![Just(0), 1000_u64..50_000, Just(1 << 30)];
    let marked = prop_oneof![Just(Marked::None), Just(Marked::NoPrefetch), Just(Marked::Prefetch(vec![]))];
    (chunk_size, min_chunk_size, marked).prop_map(|(chunk, min, marked)| {
        Encoder::new().level(1).chunk_size(chunk).min_chunk_size(min).landmark(marked)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_layers(seed: u64, entries in 0_usize..50, encoder in encoder(), speculative in 0_u64..100_000) {
        let layer = random(seed, entries);
        let built = encoder.encode(&layer);
        let toc = verified(&built, speculative);
        check(&toc);
        assert_same_tree(&toc, &layer);
        assert_same_contents(&toc, &built.blob, &layer);
        prop_assert!(!toc.lossy_names());
        prop_assert_eq!(toc.format(), Format::EStargz);
    }
}

fn zstd_encoder() -> impl Strategy<Value = ZstdEncoder> {
    let form = prop_oneof![
        Just(ZstdEncoder::new(Dialect::Podman)),
        Just(ZstdEncoder::new(Dialect::Stargz)),
        Just(ZstdEncoder::podman_before(40)),
        Just(ZstdEncoder::podman_before(56)),
    ];
    let chunk_size = prop_oneof![Just(4 << 20), 50_000_u64..200_000, 7000_u64..20_000];
    (form, chunk_size).prop_map(|(encoder, chunk)| encoder.chunk_size(chunk))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_layers_of_zstd_chunked(
        seed: u64, entries in 0_usize..50, encoder in zstd_encoder(), speculative in 0_u64..100_000,
    ) {
        let layer = random(seed, entries);
        let built = encoder.encode(&layer);
        let toc = verified(&built, speculative);
        check(&toc);
        assert_same_tree(&toc, &layer);
        assert_same_contents(&toc, &built.blob, &layer);
        prop_assert_eq!(toc.format(), Format::ZstdChunked);
        // The manifest alone leads there, too.
        let said = announced(Compression::Zstd, |key| built.annotations.get(key).map(String::as_str)).unwrap();
        prop_assert_eq!(said.digest, VerifiedToc::digest(&toc));
        let position = said.position.unwrap();
        let stored = &built.blob[position.offset as usize..(position.offset + position.stored) as usize];
        let opened = Opener::at(built.size, position, Limits::default()).unwrap().feed(position.offset, stored);
        let Ok(Step::Done(json)) = opened else { panic!("{opened:?}") };
        prop_assert_eq!(json.verify(&said.digest, &Limits::default()).unwrap(), toc);
    }
}

fn small() -> Layer {
    Layer::new()
        .dir("bin")
        .noise("bin/sh", 3000, 1)
        .file("etc/os-release", "NAME=x\n")
        .mode(0o4755)
        .hardlink("bin/bash", "bin/sh")
        .file("empty", "")
        .symlink("lib", "usr/lib")
        .noise("usr/lib/libc.so", 9000, 2)
}

#[test]
fn landmarks_and_formats() {
    let layer = small();
    let landmark = |encoder: Encoder| verified(&encoder.encode(&layer), 1 << 20).landmark();
    assert_eq!(landmark(Encoder::new()), Landmark::NoPrefetch);
    assert_eq!(landmark(Encoder::new().landmark(Marked::None)), Landmark::Absent);

    let built = Encoder::new().prioritized(&["etc/os-release"]).encode(&layer);
    let toc = verified(&built, 1 << 20);
    let Landmark::Prefetch { end } = toc.landmark() else { panic!("{:?}", toc.landmark()) };
    let first = toc.lookup("etc/os-release").unwrap();
    for chunk in toc.chunks() {
        let member = toc.members()[chunk.member as usize];
        assert_eq!(member.end <= end, chunk.inode == first, "{chunk:?}");
    }

    let built = Encoder::new().legacy().chunk_size(4000).encode(&layer);
    let json = open(&built.blob, 60, &Limits::default()).unwrap();
    assert_eq!(json.format(), Format::Stargz);
    let toc = json.parse(&Limits::default()).unwrap();
    check(&toc);
    assert!(toc.chunks().iter().all(|chunk| chunk.digest.is_none()));
    assert!(json.verify(&digest(&built.toc_digest), &Limits::default()).is_err());
}

#[test]
fn every_way_to_split_a_blob_gives_the_same_toc() {
    let built = Encoder::new().encode(&small());
    let expected = open(&built.blob, u64::MAX, &Limits::default()).unwrap();
    for speculative in 0..built.blob.len() as u64 {
        assert_eq!(open(&built.blob, speculative, &Limits::default()).unwrap(), expected, "{speculative}");
    }
}

#[test]
fn no_bit_flip_verifies_to_something_else() {
    let layer = small();
    flips(&Encoder::new().chunk_size(4000).prioritized(&["empty"]).encode(&layer));
    flips(&ZstdEncoder::new(Dialect::Podman).chunk_size(4000).encode(&layer));
    flips(&ZstdEncoder::new(Dialect::Stargz).chunk_size(4000).encode(&layer));
}

fn flips(built: &Built) {
    let truth = verified(built, 1 << 20);
    let all = files(&truth, &built.blob, |_| true);
    let mut harmless = 0;
    // All of the footer and the ends of everything before, and every 13th bit else.
    let bits = built.size * 8;
    for bit in (0..bits).filter(|bit| bit % 13 == 0 || bits - bit < 51 * 8) {
        let flipped = built.flip(bit).blob;
        let limits = Limits::default();
        let opened = open(&flipped, 1 << 20, &limits)
            .and_then(|json| json.verify(&digest(&built.toc_digest), &limits));
        let Ok(toc) = opened else { continue };
        // A footer that leads to the true TOC by another way is a true footer.
        assert_eq!(toc.inodes(), truth.inodes(), "bit {bit}");
        assert_eq!(toc.chunks(), truth.chunks(), "bit {bit}");
        for chunk in toc.chunks() {
            let member = toc.members()[chunk.member as usize];
            let bytes = &flipped[member.offset as usize..member.end as usize];
            if let Ok(decoded) =
                decode_member(toc.format().compression(), bytes, &[chunk.spec().unwrap()], &limits)
            {
                let range = chunk.file_offset as usize..(chunk.file_offset + chunk.size) as usize;
                assert_eq!(decoded[0].data(), &all[&chunk.inode][range], "bit {bit}");
                harmless += 1;
            }
        }
    }
    assert!(harmless > 0);
}
