//! A mounted layer looks like the unpacked one.

use std::{
    fs, io,
    os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
};

use fusefs::{AttachRequest, Below, Fill};
use support::{
    estargz::{Encoder, Landmark},
    guard,
    layer::{Layer, assert_same, long_path, random},
    registry::LayerBlob,
    zstd::{Dialect, ZstdEncoder},
};

use super::bed::{Bed, LIMIT, REPOSITORY, read, tree, unpacked};

/// One of everything a tar can hold.
pub fn torture() -> Layer {
    Layer::new()
        .dir("etc")
        .mode(0o755)
        .file("etc/passwd", &b"root:x:0:0::/root:/bin/sh\n"[..])
        .file("etc/shadow", &b"root:*:1::::::\n"[..])
        .mode(0o640)
        .owner(0, 42)
        .dir("tmp")
        .mode(0o1777)
        .file("empty", &b""[..])
        .program("usr/bin/su", &b"#!/bin/sh\n"[..])
        .mode(0o4755)
        .program("usr/bin/wall", &b"#!/bin/sh\n"[..])
        .mode(0o2755)
        .owner(0, 5)
        .program("usr/bin/ping", &b"#!/bin/sh\n"[..])
        .xattr("security.capability", [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        .file("usr/share/doc", &b"text"[..])
        .xattr("user.comment", "written by hand")
        .hardlink("usr/share/doc.2", "usr/share/doc")
        .hardlink("doc.3", "usr/share/doc.2")
        .symlink("usr/lib64", "lib/x86_64")
        .symlink("dangling", "/nowhere/at/all")
        .char_device("dev/null", 1, 3)
        .mode(0o666)
        .char_device("dev/ttyX", 204, 70_000)
        .block_device("dev/loop0", 7, 0)
        .fifo("run/pipe")
        .noise("big.bin", 9_500_000, 7)
        .sparse("holes", 300_000, &[(100_000, b"island")])
        .file(long_path(300), &b"deep"[..])
        .file("snow\u{2603}man", &b"utf-8"[..])
        .file("name with blanks\tand\nbreaks", &b"odd"[..])
        .whiteout("gone")
        .whiteout("usr/share/removed")
        .dir("opaque")
        .opaque("opaque")
        .file("opaque/new", &b"n"[..])
        .file("old", &b"of the epoch"[..])
        .mtime(0)
}

#[test]
fn every_attribute_of_every_type_is_what_an_unpack_gives() {
    let Some(bed) = Bed::new() else { return };
    let layer = torture();
    // A chunk size that the big file crosses, and small files that share members.
    for (slot, encoder) in [
        (1, Encoder::new()),
        (2, Encoder::new().chunk_size(64 << 10)),
        (3, Encoder::new().min_chunk_size(1 << 20)),
        (4, Encoder::new().prioritized(&["usr/bin/ping", "doc.3"])),
        (5, Encoder::new().landmark(Landmark::None)),
    ] {
        let built = encoder.encode(&layer);
        let image = bed.push(&[&built]);
        bed.attach(slot, &bed.request(&image, &[&built], 0)).unwrap();
        assert_same(&unpacked(&layer), &tree(bed.slot(slot)));
    }
}

#[test]
fn zstd_chunked_of_every_dialect_is_what_an_unpack_gives() {
    let Some(bed) = Bed::new() else { return };
    let layer = torture();
    for (slot, encoder) in [
        (1, ZstdEncoder::new(Dialect::Podman)),
        (2, ZstdEncoder::new(Dialect::Stargz)),
        (3, ZstdEncoder::podman_before(56).chunk_size(1 << 20)),
        (4, ZstdEncoder::podman_before(40).chunk_size(4 << 20)),
    ] {
        let built = encoder.encode(&layer);
        let image = bed.push(&[&built]);
        let request = bed.request(&image, &[&built], 0);
        bed.attach(slot, &request).unwrap();
        assert_same(&unpacked(&layer), &tree(bed.slot(slot)));
        assert_eq!(found(&bed, &request), Some(built.toc_digest.parse().unwrap()), "{encoder:?}");
    }
}

/// The TOC digest by the image's manifest.
fn found(bed: &Bed, request: &AttachRequest) -> Option<estargz::Digest> {
    let AttachRequest { reference, blob_digest, manifest_digest, .. } = request;
    let manifest = manifest_digest.as_deref().unwrap();
    bed.runtime.block_on(bed.plane().find_toc(reference, blob_digest, manifest))
}

#[test]
fn an_ordinary_image_costs_one_manifest_and_a_registry_that_fails_is_left_alone() {
    let Some(mut bed) = Bed::new() else { return };
    let layers = [torture(), Layer::new().file("f", "f")].map(|layer| LayerBlob::plain(&layer));
    let image = bed.origin.put_image(REPOSITORY, "latest", &layers, &serde_json::Value::Null);
    let request = |n: usize| AttachRequest {
        reference: format!("{}/{REPOSITORY}:latest", bed.origin.host()).parse().unwrap(),
        blob_digest: image.layers[n].clone(),
        blob_size: None,
        toc_digest: estargz::Digest::of(b""),
        manifest_digest: Some(image.manifest.clone()),
        neighbours: Vec::new(),
        prefetch_bytes: None,
        fill: None,
        below: Vec::new(),
    };
    let requests = [request(0), request(1), request(0)];
    for request in &requests {
        assert_eq!(found(&bed, request), None);
    }
    assert_eq!(bed.origin.take_requests().len(), 1);

    let gone = AttachRequest { manifest_digest: Some(format!("sha256:{}", "ab".repeat(32))), ..request(0) };
    assert_eq!(found(&bed, &gone), None);
    assert!(!bed.origin.take_requests().is_empty());
    assert_eq!((found(&bed, &gone), found(&bed, &gone)), (None, None));
    assert_eq!(bed.origin.take_requests().len(), 0);

    bed.stop();
    bed.change(|config| config.find_tocs = false);
    bed.start();
    assert_eq!(found(&bed, &requests[0]), None);
    assert_eq!(bed.origin.take_requests().len(), 0);
}

#[test]
fn zeros_are_read_without_asking_for_them() {
    let Some(bed) = Bed::new() else { return };
    let layer = Layer::new().noise("before", 700_000, 1).sparse("holes", 3 << 20, &[(1 << 20, b"island")]);
    let built = ZstdEncoder::new(Dialect::Podman).encode(&layer);
    // The tail that is read for the TOC brings the last chunks; the file's first is not among them.
    let root = bed.attach_one(&built);
    bed.origin.take_requests();
    let part = |at: u64, len: usize| {
        let path = root.join("holes");
        guard::deadline(LIMIT, move || {
            let mut buffer = vec![1; len];
            fs::File::open(path).unwrap().read_exact_at(&mut buffer, at).unwrap();
            buffer
        })
        .unwrap()
    };
    assert_eq!(part(0, 4096), vec![0; 4096]);
    assert_eq!(bed.ranges(), []);
    assert_eq!(read(root.join("holes")).unwrap(), layer.contents()[&b"holes"[..]]);

    // One that is said to be zeros and is not is fetched, and is what its digest says.
    let lying = ZstdEncoder::new(Dialect::Podman).edit_toc(|toc| {
        for row in toc["entries"].as_array_mut().unwrap() {
            row["chunkType"] = "zeros".into();
        }
    });
    let image = bed.push(&[&lying.encode(&layer)]);
    let built = lying.encode(&layer);
    bed.attach(2, &bed.request(&image, &[&built], 0)).unwrap();
    for (path, content) in layer.contents() {
        let path = String::from_utf8(path).unwrap();
        assert_eq!(read(bed.slot(2).join(path)).unwrap(), content);
    }
}

#[test]
fn a_layer_cannot_instruct_overlayfs() {
    let Some(bed) = Bed::new() else { return };
    let layer = Layer::new()
        .dir("d")
        .xattr("trusted.overlay.opaque", "y")
        .xattr("trusted.overlay.redirect", "/etc")
        .xattr("user.kept", "1")
        .file("d/old", &b"o"[..])
        .mtime(-5);
    let root = bed.attach_one(&Encoder::new().encode(&layer));
    let found = tree(root);
    assert_eq!(found[1].xattrs.keys().map(Vec::as_slice).collect::<Vec<_>>(), [b"user.kept"]);
    assert_eq!(found[2].mtime, (0, 0));
}

#[test]
fn a_directory_the_tar_does_not_describe_looks_like_the_one_it_covers() {
    let Some(bed) = Bed::new() else { return };
    let lower =
        Layer::new().dir("tmp").mode(0o1777).dir("srv/data").mode(0o750).owner(7, 8).file("was", &b"f"[..]);
    let upper = Layer::new()
        .file("tmp/x", &b"x"[..])
        .file("srv/data/y", &b"y"[..])
        .file("was/z", &b"z"[..])
        .file("new/n", &b"n"[..]);
    let (lower, upper) = (Encoder::new().encode(&lower), Encoder::new().encode(&upper));
    let builts = [&lower, &upper];
    let image = bed.push(&builts);
    bed.attach(1, &bed.request(&image, &builts, 0)).unwrap();
    let unpacked = bed.dir.path().join("unpacked");
    fs::create_dir_all(unpacked.join("tmp")).unwrap();
    fs::set_permissions(unpacked.join("tmp"), fs::Permissions::from_mode(0o2700)).unwrap();
    let over = |slots: &[u64]| {
        let mut request = bed.request(&image, &builts, 1);
        request.below = slots.iter().map(|&slot| Below { slot, dir: unpacked.clone() }).collect();
        request
    };
    // Over the lazy layer, over an unpacked one above it, and over nothing.
    for (slot, below, tmp, data) in [
        (2, &[1][..], (0o1777, 0, 0), (0o750, 7, 8)),
        (3, &[99, 1], (0o2700, 0, 0), (0o750, 7, 8)),
        (4, &[], (0o755, 0, 0), (0o755, 0, 0)),
    ] {
        bed.attach(slot, &over(below)).unwrap();
        let found = tree(bed.slot(slot));
        let of = |path: &str| {
            found.iter().find(|e| e.path == path.as_bytes()).map(|e| (e.mode, e.uid, e.gid)).unwrap()
        };
        assert_eq!((of("tmp"), of("srv/data")), (tmp, data), "slot {slot}");
        assert_eq!((of("was"), of("new")), ((0o755, 0, 0), (0o755, 0, 0)), "slot {slot}");
    }
}

#[test]
fn random_layers_equal_their_tars() {
    let Some(bed) = Bed::new() else { return };
    for seed in 1..=12 {
        let layer = random(seed, 60);
        let built = Encoder::new()
            .chunk_size(50_000)
            .min_chunk_size(if seed % 2 == 0 { 0 } else { 100_000 })
            .encode(&layer);
        let image = bed.push(&[&built]);
        bed.attach(seed, &bed.request(&image, &[&built], 0)).unwrap();
        assert_same(&unpacked(&layer), &tree(bed.slot(seed)));
    }
}

#[test]
fn a_layer_looks_the_same_when_it_is_local() {
    let Some(bed) = Bed::with(|c| c.fill = Fill::On, false) else { return };
    let layer = torture();
    let root = bed.attach_one(&Encoder::new().chunk_size(100_000).encode(&layer));
    let attached = bed.plane().layer(1).unwrap();
    assert!(guard::eventually(LIMIT, || attached.is_complete()), "the fill ends");
    let misses = bed.plane().fuse_counters().read_misses.load(std::sync::atomic::Ordering::Relaxed);
    assert_same(&unpacked(&layer), &tree(root));
    let after = bed.plane().fuse_counters().read_misses.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(after, misses, "nothing was missing");
    let usage = bed.plane().usage(1).unwrap();
    assert_eq!(usage.bytes, attached.index().content_bytes(), "hard links count once");
}

#[test]
fn parts_of_a_file_are_exact_at_every_edge() {
    let Some(bed) = Bed::new() else { return };
    let layer = Layer::new().noise("f", 1_000_000, 3).file("small", &b"0123456789"[..]);
    let root = bed.attach_one(&Encoder::new().chunk_size(65_536).encode(&layer));
    let expected = layer.contents()[&b"f"[..]].clone();
    let results = guard::deadline(LIMIT, move || {
        let file = fs::File::open(root.join("f")).unwrap();
        let mut checked = 0;
        for offset in [0, 1, 4095, 65_535, 65_536, 131_071, 500_000, 999_999, 1_000_000, 2_000_000] {
            for len in [0, 1, 100, 4096, 65_536, 200_000] {
                let mut buf = vec![0; len];
                let mut got = 0;
                while got < len {
                    match file.read_at(&mut buf[got..], (offset + got) as u64).unwrap() {
                        0 => break,
                        n => got += n,
                    }
                }
                let want = &expected[offset.min(expected.len())..(offset + len).min(expected.len())];
                assert_eq!(&buf[..got], want, "{len} bytes at {offset}");
                checked += 1;
            }
        }
        checked
    });
    assert_eq!(results.unwrap(), 60);
}

#[test]
fn stat_and_seek_tell_what_a_plain_file_tells() {
    use rustix::fs::SeekFrom;
    let Some(bed) = Bed::new() else { return };
    let layer = Layer::new().noise("f", 10_000, 3).file("empty", &b""[..]);
    let root = bed.attach_one(&Encoder::new().encode(&layer));
    guard::deadline(LIMIT, move || {
        let file = fs::File::open(root.join("f")).unwrap();
        let stat = file.metadata().unwrap();
        assert_eq!((stat.blksize(), stat.blocks()), (4096, 24), "three blocks of 4096 in units of 512");
        let seek =
            |to| rustix::fs::seek(&file, to).map_err(io::Error::from).map_err(|e| e.raw_os_error().unwrap());
        assert_eq!(seek(SeekFrom::Data(5000)), Ok(5000));
        assert_eq!(seek(SeekFrom::Hole(5000)), Ok(10_000));
        assert_eq!(seek(SeekFrom::Data(10_000)), Err(libc::ENXIO));
        assert_eq!(seek(SeekFrom::Hole(10_000)), Err(libc::ENXIO));
        let empty = fs::File::open(root.join("empty")).unwrap();
        assert!(rustix::fs::seek(&empty, SeekFrom::Data(0)).is_err());
        assert!(fs::write(root.join("new"), "x").is_err(), "the mount is read-only");
        assert!(fs::read_dir(root.join("f")).is_err());
        assert_eq!(fs::read_link(root.join("f")).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    })
    .unwrap();
}

#[test]
fn landmarks_toc_and_state_directory_are_not_listed_but_the_state_can_be_read() {
    let Some(bed) = Bed::new() else { return };
    let layer = Layer::new().noise("a", 5000, 1).noise("b", 5000, 2);
    let built = Encoder::new().prioritized(&["a"]).encode(&layer);
    let root = bed.attach_one(&built);
    let names: Vec<_> = tree(root.clone()).into_iter().map(|e| String::from_utf8(e.path).unwrap()).collect();
    assert_eq!(names, ["", "a", "b"]);
    for hidden in [".prefetch.landmark", "stargz.index.json", ".wh.a"] {
        assert_eq!(read(root.join(hidden)).unwrap_err().kind(), io::ErrorKind::NotFound, "{hidden}");
    }
    let state = root.join(".stargz-snapshotter").join(format!("{}.json", built.digest));
    let parse = |bytes: Vec<u8>| serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
    let before = parse(read(state.clone()).unwrap());
    assert_eq!(before["digest"], built.digest.as_str());
    assert_eq!(before["size"], 10_000);
    // All of this small blob came with its tail.
    assert!(guard::eventually(LIMIT, || bed.plane().layer(1).unwrap().is_complete()));
    read(root.join("a")).unwrap();
    assert!(
        guard::eventually(LIMIT, || parse(read(state.clone()).unwrap())["fetchedPercent"] == 100.0),
        "the state is read anew, not from the page cache"
    );
}

#[test]
fn two_slots_show_one_layer_and_an_overlay_takes_both() {
    let Some(bed) = Bed::new() else { return };
    let lower = Layer::new()
        .dir("d")
        .file("d/a", &b"lower"[..])
        .file("d/b", &b"b"[..])
        .dir("o")
        .file("o/x", &b"x"[..]);
    let upper =
        Layer::new().file("d/a", &b"upper"[..]).whiteout("d/b").dir("o").opaque("o").file("o/y", &b"y"[..]);
    let (lower, upper) = (Encoder::new().encode(&lower), Encoder::new().encode(&upper));
    let image = bed.push(&[&lower, &lower, &upper]);
    let builts = [&lower, &lower, &upper];
    for n in 0..3 {
        bed.attach(n as u64 + 1, &bed.request(&image, &builts, n)).unwrap();
    }
    let target = bed.dir.path().join("merged");
    let _mounted = guard::MountGuard::new(&target);
    fs::create_dir(&target).unwrap();
    let options =
        format!("lowerdir={}:{}:{}", bed.slot(3).display(), bed.slot(2).display(), bed.slot(1).display());
    let merged = target.clone();
    guard::deadline(LIMIT, move || {
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount(
            "overlay",
            &merged,
            "overlay",
            rustix::mount::MountFlags::RDONLY,
            Some(options.as_c_str()),
        )
        .unwrap();
    })
    .unwrap();
    let names: Vec<_> =
        tree(target.clone()).into_iter().map(|e| String::from_utf8(e.path).unwrap()).collect();
    assert_eq!(names, ["", "d", "d/a", "o", "o/y"]);
    assert_eq!(read(target.join("d/a")).unwrap(), b"upper");
}
