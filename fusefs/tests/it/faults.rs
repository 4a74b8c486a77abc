//! Registries that fail: wrong bytes reach nobody, a hang blocks only who needs the bytes, nothing is remembered.

use std::{fs, sync::atomic::Ordering, time::Duration};

use fusefs::Fill;
use support::{
    estargz::{Built, Encoder},
    guard,
    layer::Layer,
    registry::{Action, Rule},
};

use super::bed::{Bed, LIMIT, REPOSITORY, read, tree};

/// Files that are not in the tail read at opening.
fn layer() -> Layer {
    let mut layer = Layer::new();
    for n in 0..12 {
        layer = layer.noise(format!("file{n:02}"), 100_000, n + 1);
    }
    layer.file("small", &b"small"[..])
}

/// Where in the blob a file's first chunk starts.
fn offset_of(built: &Built, name: &str) -> u64 {
    let toc = built.toc();
    let entries = toc["entries"].as_array().unwrap();
    entries.iter().find(|e| e["name"] == name).unwrap()["offset"].as_u64().unwrap()
}

fn content(name: &str) -> Vec<u8> {
    layer().contents()[name.as_bytes()].to_vec()
}

#[test]
fn wrong_bytes_are_asked_for_again_of_another_host() {
    for wrong in ["flip", "truncate", "full", "other", "missing", "reset"] {
        let Some(bed) = Bed::mirrored() else { return };
        let built = Encoder::new().encode(&layer());
        let root = bed.attach_one(&built);
        let at = offset_of(&built, "file01");
        let action = match wrong {
            "flip" => Action::FlipBit(at * 8 + 5000),
            "truncate" => Action::Truncate(1000),
            "full" => Action::Full200,
            "other" => Action::Substitute(vec![7; built.blob.len()].into()),
            "missing" => Action::Status(404, Vec::new()),
            _ => Action::Reset,
        };
        let mirror = bed.mirror.as_ref().unwrap();
        let rule = mirror.fault(Rule::new(action).path("/blobs/"));
        assert_eq!(read(root.join("file01")).unwrap(), content("file01"), "{wrong}");
        assert!(mirror.hits(rule) > 0, "{wrong}: the mirror was asked first");
    }
}

#[test]
fn bytes_that_are_wrong_everywhere_are_an_error_until_they_are_right() {
    for action in
        [Action::FlipBit(0), Action::Substitute(vec![0; 2_000_000].into()), Action::Status(404, Vec::new())]
    {
        let Some(bed) = Bed::with(|c| c.read_deadline = Duration::from_secs(2), false) else { return };
        let built = Encoder::new().encode(&layer());
        let root = bed.attach_one(&built);
        let action = match action {
            Action::FlipBit(_) => Action::FlipBit(offset_of(&built, "file03") * 8 + 4000),
            other => other,
        };
        bed.origin.fault(Rule::new(action).path("/blobs/"));
        let error = read(root.join("file03")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        bed.origin.clear_all();
        assert_eq!(read(root.join("file03")).unwrap(), content("file03"), "the failure is not remembered");
    }
}

#[test]
fn a_forged_toc_is_not_mounted_and_a_second_host_makes_it_good() {
    let Some(bed) = Bed::mirrored() else { return };
    let built = Encoder::new().encode(&layer());
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    let (mirror, tail) = (bed.mirror.as_ref().unwrap(), built.blob.len() as u64 - 200);
    mirror.fault(Rule::new(Action::FlipBit(tail * 8)).path("/blobs/"));
    bed.attach(1, &request).unwrap();
    assert_eq!(tree(bed.slot(1)).len(), 14);

    let Some(bed) = Bed::new() else { return };
    let image = bed.push(&[&built]);
    let mut request = bed.request(&image, &[&built], 0);
    request.toc_digest = format!("sha256:{}", "1".repeat(64)).parse().unwrap();
    let error = bed.attach(1, &request).unwrap_err();
    assert_eq!(error.reason(), "verify_failed", "{error}");
    assert!(fs::read_dir(bed.plane().mountpoint()).unwrap().next().is_none(), "no slot");
    assert!(bed.plane().layer(1).is_none());
}

#[test]
fn a_registry_that_hangs_blocks_only_who_needs_its_bytes() {
    let Some(bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&layer());
    let root = bed.attach_one(&built);
    read(root.join("file00")).unwrap();
    let rule = bed.origin.fault(Rule::new(Action::Hang).path("/blobs/"));
    let waiting: Vec<_> = (4..8)
        .map(|n| {
            let path = root.join(format!("file{n:02}"));
            std::thread::spawn(move || fs::read(path))
        })
        .collect();
    assert!(bed.origin.wait_hits(rule, 1, LIMIT));
    // Everything else answers meanwhile: names never looked up, listings, what is local, another layer.
    assert_eq!(read(root.join("file00")).unwrap(), content("file00"));
    let listing = root.clone();
    let names = guard::deadline(LIMIT, move || {
        fs::read_dir(&listing).unwrap().filter(|e| e.as_ref().unwrap().metadata().is_ok()).count()
    });
    assert_eq!(names.unwrap(), 13);
    let image = bed.push(&[&built]);
    bed.attach(2, &bed.request(&image, &[&built], 0)).unwrap();
    bed.detach(2);
    assert!(waiting.iter().all(|w| !w.is_finished()), "they wait, they do not fail");
    bed.origin.clear(rule);
    for (n, reader) in waiting.into_iter().enumerate() {
        let got = guard::deadline(LIMIT, move || reader.join().unwrap()).unwrap().unwrap();
        assert_eq!(got, content(&format!("file{:02}", n + 4)));
    }
}

#[test]
fn many_readers_of_a_hanging_registry_do_not_hold_up_another_registry() {
    let Some(bed) = Bed::with(|c| (c.fetch.on_demand, c.fill) = (2, Fill::On), false) else {
        return;
    };
    let built = Encoder::new().encode(&layer());
    let other = Encoder::new().encode(&layer().file("other", &b"o"[..]));
    let image = bed.push(&[&built, &other]);
    let hang = |digest: &str| bed.origin.fault(Rule::new(Action::Hang).path(digest).overlapping(0..900_000));
    hang(&built.digest);
    bed.attach(1, &bed.request(&image, &[&built, &other], 0)).unwrap();
    let waiting: Vec<_> = (0..6)
        .map(|n| {
            let path = bed.slot(1).join(format!("file{n:02}"));
            std::thread::spawn(move || fs::read(path))
        })
        .collect();
    assert!(guard::eventually(LIMIT, || bed.plane().fuse_counters().read_misses.load(Ordering::Relaxed) >= 6));
    bed.attach(2, &bed.request(&image, &[&built, &other], 1)).unwrap();
    assert_eq!(read(bed.slot(2).join("file00")).unwrap(), content("file00"));
    let filled = bed.plane().layer(2).unwrap();
    assert!(guard::eventually(LIMIT, || filled.is_complete()), "and the other is filled, too");
    assert!(waiting.iter().all(|w| !w.is_finished()));
    bed.origin.clear_all();
    for reader in waiting {
        guard::deadline(LIMIT, move || reader.join().unwrap()).unwrap().unwrap();
    }
}

#[test]
fn a_data_file_that_is_lost_or_cut_is_fetched_again() {
    let Some(bed) = Bed::new() else { return };
    let root = bed.attach_one(&Encoder::new().encode(&layer()));
    let layer = bed.plane().layer(1).unwrap();
    let data = layer.store().dir().join("data");
    for damage in ["lose", "cut"] {
        for n in 0..12 {
            read(root.join(format!("file{n:02}"))).unwrap();
        }
        for file in fs::read_dir(&data).unwrap() {
            let path = file.unwrap().path();
            match damage {
                "lose" => fs::remove_file(&path).unwrap(),
                _ => fs::File::options().write(true).open(&path).unwrap().set_len(10).unwrap(),
            }
        }
        // The kernel's copies hide the damage until they are dropped.
        let dropped = root.join("file05");
        guard::deadline(LIMIT, move || {
            let file = fs::File::open(dropped).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        })
        .unwrap();
        assert_eq!(read(root.join("file05")).unwrap(), content("file05"), "{damage}");
    }
}

#[test]
fn a_lost_file_of_many_chunks_never_shows_a_hole() {
    let Some(bed) = Bed::with(|c| (c.fetch.shape.ahead, c.fetch.shape.gap) = (0, 0), false) else { return };
    let whole = Layer::new().noise("big", 1_000_000, 9).noise("tail", 400_000, 8);
    let root = bed.attach_one(&Encoder::new().chunk_size(100_000).encode(&whole));
    let expected = whole.contents()[&b"big"[..]].clone();
    assert_eq!(read(root.join("big")).unwrap(), expected);
    let layer = bed.plane().layer(1).unwrap();
    let node = layer.index().lookup(0, b"big").unwrap();
    let last = layer.index().file_chunks(node).end - 1;
    let data = layer.store().dir().join("data").join(node.to_string());
    // The file is lost, and its last chunk is what is needed first.
    fs::remove_file(&data).unwrap();
    let offset = layer.index().chunk(last).file_offset;
    let path = root.join("big");
    let tail = guard::deadline(LIMIT, move || {
        let file = fs::File::open(path).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut tail = vec![0; 1000];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut tail, offset).unwrap();
        tail
    });
    assert_eq!(tail.unwrap(), expected[offset as usize..offset as usize + 1000]);
    assert_eq!(read(root.join("big")).unwrap(), expected);
}

#[test]
fn when_no_host_is_left_reads_fail_and_work_again_when_one_is_back() {
    let Some(bed) = Bed::mirrored() else { return };
    let root = bed.attach_one(&Encoder::new().encode(&layer()));
    let mirror = bed.mirror.as_ref().unwrap();
    read(root.join("file09")).unwrap();
    for back in [mirror, &bed.origin] {
        mirror.stop();
        bed.origin.stop();
        let error = read(root.join("file04")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        back.restart();
        let name = if std::ptr::eq(back, mirror) { "file06" } else { "file01" };
        assert_eq!(read(root.join(name)).unwrap(), content(name));
    }
}

#[test]
fn a_blob_that_comes_whole_is_taken_as_it_comes() {
    // The only host knows no ranges any more; a mirror does not, and the origin is gone.
    for mirrored in [false, true] {
        let Some(bed) = Bed::with(|c| c.fetch.background_request = 150_000, mirrored) else { return };
        let built = Encoder::new().chunk_size(64 << 10).encode(&layer());
        let root = bed.attach_one(&built);
        let sender = bed.mirror.as_ref().unwrap_or(&bed.origin);
        sender.fault(Rule::new(Action::Full200).path("/blobs/"));
        if mirrored {
            bed.origin.stop();
        }
        sender.take_requests();
        let readers: Vec<_> = [7, 2, 11, 0]
            .map(|n| format!("file{n:02}"))
            .map(|name| (content(&name), root.join(name)))
            .map(|(expected, path)| std::thread::spawn(move || assert!(fs::read(path).unwrap() == expected)))
            .into();
        for reader in readers {
            guard::deadline(LIMIT, move || reader.join().unwrap()).unwrap();
        }
        let layer = bed.plane().layer(1).unwrap();
        assert!(guard::eventually(LIMIT, || layer.is_complete()), "what passed was kept");
        let whole = built.blob.len() as u64;
        let sent: u64 = sender.take_requests().iter().map(|request| request.bytes_sent).sum();
        assert!(sent < 5 * whole, "{sent} of {whole}: one body and the starts of others");
        for n in 0..12 {
            let name = format!("file{n:02}");
            assert_eq!(read(root.join(&name)).unwrap(), content(&name));
        }
        assert_eq!(sender.take_requests().len(), 0, "all is there");
    }
}

#[test]
fn wrong_bytes_in_a_blob_that_comes_whole_reach_nobody() {
    let Some(bed) = Bed::mirrored() else { return };
    let built = Encoder::new().encode(&layer());
    let root = bed.attach_one(&built);
    let mirror = bed.mirror.as_ref().unwrap();
    let mut wrong = built.blob.to_vec();
    wrong[offset_of(&built, "file06") as usize + 5000] ^= 1;
    mirror.put_blob_as(REPOSITORY, &built.digest, wrong);
    let rule = mirror.fault(Rule::new(Action::Full200).path("/blobs/"));
    for n in [9, 6, 0] {
        let name = format!("file{n:02}");
        assert_eq!(read(root.join(&name)).unwrap(), content(&name), "from the origin");
    }
    assert!(mirror.hits(rule) > 0);
}

#[test]
fn random_faults_under_parallel_readers_never_show_a_wrong_byte() {
    let Some(bed) = Bed::mirrored() else { return };
    let built = Encoder::new().chunk_size(30_000).encode(&layer());
    let root = bed.attach_one(&built);
    let mirror = bed.mirror.as_ref().unwrap();
    for nth in 0..40 {
        let action = match nth % 5 {
            0 => Action::Truncate(500),
            1 => Action::FlipBit(nth * 90_000),
            2 => Action::Full200,
            3 => Action::Status(503, vec![("Retry-After".into(), "0".into())]),
            _ => Action::Reset,
        };
        mirror.fault(Rule::new(action).path("/blobs/").nth(nth + 1));
    }
    let readers: Vec<_> = (0..8usize)
        .map(|reader| {
            let root = root.clone();
            std::thread::spawn(move || {
                for step in 0..12 {
                    let name = format!("file{:02}", (reader * 5 + step * 7) % 12);
                    assert_eq!(fs::read(root.join(&name)).unwrap(), content(&name), "{name}");
                }
            })
        })
        .collect();
    for reader in readers {
        guard::deadline(LIMIT, move || reader.join().unwrap()).unwrap();
    }
}
