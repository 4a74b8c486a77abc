//! What things cost: requests to the registry, messages from the kernel.

use std::{fs, num::NonZero, path::PathBuf, sync::atomic::Ordering};

use fusefs::{CacheConfig, Fill, fetch::FetchConfig};
use support::{
    estargz::Encoder,
    guard,
    layer::{Layer, assert_same},
};

use super::bed::{Bed, LIMIT, read, tree, unpacked};

/// Larger than the tail that is read when it is opened.
fn large(seed: u64) -> Layer {
    let mut layer = Layer::new();
    for n in 0..40 {
        layer = layer.noise(format!("dir/file{n:02}"), 100_000, seed * 100 + n);
    }
    layer
}

#[test]
fn a_cold_image_costs_its_manifest_and_one_range_a_layer() {
    let Some(bed) = Bed::new() else { return };
    let builts: Vec<_> = (1..=5).map(|seed| Encoder::new().encode(&large(seed))).collect();
    let builts: Vec<_> = builts.iter().collect();
    let image = bed.push(&builts);
    bed.origin.take_requests();
    for n in 0..5 {
        bed.attach(n as u64 + 1, &bed.request(&image, &builts, n)).unwrap();
    }
    let log = bed.origin.take_requests();
    let manifests = log.iter().filter(|r| r.path.contains("/manifests/")).count();
    let mut blobs: Vec<&str> = log.iter().filter(|r| r.is_blob_get()).map(|r| r.path.as_str()).collect();
    blobs.sort_unstable();
    blobs.dedup();
    assert_eq!((manifests, blobs.len(), log.len()), (1, 5, 6), "{log:#?}");
}

#[test]
fn a_second_image_with_the_same_layer_costs_nothing() {
    let Some(bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&large(1));
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    bed.origin.take_requests();
    bed.attach(2, &request).unwrap();
    assert_eq!(bed.origin.take_requests().len(), 0);
}

#[test]
fn a_blob_of_unknown_size_tells_it_with_its_first_range() {
    let Some(bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&large(1));
    let image = bed.push(&[&built]);
    let mut request = bed.request(&image, &[&built], 0);
    request.manifest_digest = Some(format!("sha256:{}", "0".repeat(64)));
    bed.origin.take_requests();
    bed.attach(1, &request).unwrap();
    assert_eq!(bed.ranges()[0], 0..1);
}

#[test]
fn warm_names_attributes_listings_and_contents_stay_in_the_kernel() {
    let Some(bed) = Bed::new() else { return };
    let layer = large(1).symlink("link", "dir").file("dir/empty", &b""[..]);
    let root = bed.attach_one(&Encoder::new().encode(&layer));
    let look = |root: PathBuf| {
        guard::deadline(LIMIT, move || {
            let mut bytes = 0;
            for entry in fs::read_dir(root.join("dir")).unwrap() {
                let path = entry.unwrap().path();
                fs::metadata(&path).unwrap();
                bytes += fs::read(&path).unwrap().len();
            }
            fs::read_link(root.join("link")).unwrap();
            assert!(fs::metadata(root.join("dir/missing")).is_err());
            bytes
        })
        .unwrap()
    };
    assert_eq!(look(root.clone()), 4_000_000);
    let ops = bed.plane().fuse_counters().ops();
    assert!(bed.messages() > 0);
    for _ in 0..3 {
        look(root.clone());
    }
    assert_eq!(bed.plane().fuse_counters().ops(), ops, "no message, of {:?}", fusefs::fuse::OPS);
}

#[test]
fn reads_fetch_their_own_bytes_and_what_lies_close_behind() {
    let shape = FetchConfig::default().shape;
    let Some(bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&large(1));
    let root = bed.attach_one(&built);
    bed.ranges();
    read(root.join("dir/file00")).unwrap();
    let ranges = bed.ranges();
    assert_eq!(ranges.len(), 1, "{ranges:?}");
    let asked = ranges[0].end - ranges[0].start;
    assert!(asked > 100_000 && asked <= 110_000 + shape.ahead, "{asked}");
    // The next file came along.
    read(root.join("dir/file01")).unwrap();
    assert_eq!(bed.ranges(), []);
    let fetched = bed.plane().layer(1).unwrap().store().bytes();
    assert!(fetched < 1_500_000, "only part of the layer is local: {fetched}");
}

#[test]
fn readers_of_one_file_share_its_download() {
    let Some(bed) = Bed::with(|c| c.fetch.shape.ahead = 0, false) else { return };
    let layer = Layer::new().noise("big", 6_000_000, 1).noise("pad", 2_000_000, 2);
    let root = bed.attach_one(&Encoder::new().chunk_size(2_000_000).encode(&layer));
    bed.ranges();
    let rule =
        bed.origin.fault(support::registry::Rule::new(support::registry::Action::Hang).path("/blobs/"));
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let path = root.join("big");
            std::thread::spawn(move || fs::read(path).unwrap())
        })
        .collect();
    assert!(bed.origin.wait_hits(rule, 1, LIMIT));
    bed.origin.clear(rule);
    let expected = layer.contents()[&b"big"[..]].clone();
    for reader in readers {
        assert_eq!(guard::deadline(LIMIT, move || reader.join().unwrap()).unwrap(), expected);
    }
    let ranges = bed.ranges();
    let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    assert!(total < 6_100_000, "each byte came once: {ranges:?}");
}

#[test]
fn prefetch_brings_what_the_builder_marked_and_fill_the_rest_in_few_requests() {
    let Some(bed) = Bed::with(|c| (c.prefetch, c.fetch.background_request) = (true, 1 << 20), false) else {
        return;
    };
    let built = Encoder::new().prioritized(&["dir/file30", "dir/file31"]).encode(&large(1));
    let root = bed.attach_one(&built);
    let layer = bed.plane().layer(1).unwrap();
    let end = layer.index().prefetch_end().unwrap();
    assert!(end > 200_000);
    assert!(guard::eventually(LIMIT, || layer.store().bytes() >= 200_000 && bed.origin.requests().len() > 2));
    bed.ranges();
    read(root.join("dir/file30")).unwrap();
    read(root.join("dir/file31")).unwrap();
    assert_eq!(bed.ranges(), [], "both were there");

    let Some(bed) = Bed::with(|c| (c.fill, c.fetch.background_request) = (Fill::On, 1 << 20), false) else {
        return;
    };
    let root = bed.attach_one(&Encoder::new().encode(&large(2)));
    let layer = bed.plane().layer(1).unwrap();
    assert!(guard::eventually(LIMIT, || layer.is_complete()));
    let ranges = bed.ranges();
    // Of 1 MiB, but as long as it takes a container for starting they are as short as what comes in a round trip.
    assert!(ranges.len() <= 24, "4 MB in requests of 256 KiB to 1 MiB: {ranges:?}");
    bed.origin.stop();
    assert_eq!(tree(root).len(), 42, "and needs no registry");
}

#[test]
fn an_image_can_say_that_only_what_is_read_is_fetched() {
    let Some(bed) = Bed::with(|c| c.fill = Fill::On, false) else { return };
    let built =
        Encoder::new().encode(&Layer::new().noise("a", 3 << 20, 1).noise("b", 3 << 20, 2).file("z", "z"));
    let image = bed.push(&[&built]);
    let mut request = bed.request(&image, &[&built], 0);
    request.fill = Some(Fill::Off);
    bed.attach(1, &request).unwrap();
    assert_eq!(read(bed.slot(1).join("a")).unwrap().len(), 3 << 20);
    assert_eq!(bed.plane().fetch_counters().background_requests.load(Ordering::Relaxed), 0);
    assert!(!bed.plane().layer(1).unwrap().is_complete());
}

#[test]
fn a_file_that_is_read_on_comes_in_longer_and_longer_requests() {
    let Some(bed) = Bed::new() else { return };
    // Forty chunks that compress to nothing less.
    let built = Encoder::new().chunk_size(256 << 10).encode(&Layer::new().noise("model", 10 << 20, 1));
    let image = bed.push(&[&built]);
    bed.attach(1, &bed.request(&image, &[&built], 0)).unwrap();
    bed.ranges();
    assert_eq!(read(bed.slot(1).join("model")).unwrap().len(), 10 << 20);
    let lengths: Vec<u64> = bed.ranges().iter().map(|range| range.end - range.start).collect();
    // The kernel reads ahead by itself, so that the exact lengths are not ours to tell.
    assert!(lengths.len() <= 10, "{lengths:?}");
    assert!(*lengths.iter().max().unwrap() > lengths[0] * 3 / 2, "{lengths:?}");
}

/// Nine layers' worth of files in a cache for two.
#[test]
fn a_cache_with_a_limit_keeps_to_it_and_every_read_is_right() {
    let limit = 2_500_000;
    let Some(bed) = Bed::with(
        |c| {
            c.fill = Fill::On;
            c.fetch.cache = CacheConfig { most: NonZero::new(limit), low_water: 80 };
        },
        false,
    ) else {
        return;
    };
    let layers: Vec<Layer> = (0..4).map(|n| large(n + 1)).collect();
    let builts: Vec<_> = layers.iter().map(|layer| Encoder::new().chunk_size(70_000).encode(layer)).collect();
    let refs: Vec<_> = builts.iter().collect();
    let image = bed.push(&refs);
    for n in 0..4 {
        bed.attach(n as u64 + 1, &bed.request(&image, &refs, n)).unwrap();
    }
    let kept = || -> u64 { (1..=4).map(|slot| bed.plane().layer(slot).unwrap().store().bytes()).sum() };
    for round in 0..2 {
        for (slot, layer) in (1..).zip(&layers) {
            assert_same(&unpacked(layer), &tree(bed.slot(slot)));
            assert!(kept() <= limit, "round {round}: {} bytes", kept());
        }
        // The kernel would answer the second round.
        bed.forget_pages();
    }
    assert!(kept() > limit / 2, "{} bytes: it is used", kept());
    assert!((1..=4).all(|slot| bed.plane().layer(slot).unwrap().graduated().is_none()));
}
