//! What survives the process, and what goes with its last slot.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
};

use fusefs::{Agreement, AttachError, AttachRequest, Fill, Keeper};
use support::{
    estargz::Encoder,
    guard,
    layer::{Layer, assert_same},
};

use super::bed::{Bed, LIMIT, read, tree, unpacked};

fn layer() -> Layer {
    let mut layer = Layer::new().dir("d").file("d/x", &b"x"[..]);
    for n in 0..8 {
        layer = layer.noise(format!("f{n}"), 150_000, n + 1);
    }
    layer
}

fn restore(bed: &Bed, slot: u64, request: &AttachRequest) -> bool {
    bed.runtime.block_on(bed.plane().restore(slot, request)).is_ok()
}

#[test]
fn local_layers_come_back_without_registry() {
    let Some(mut bed) = Bed::with(|c| c.fill = Fill::On, false) else { return };
    let built = Encoder::new().encode(&layer());
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    assert!(guard::eventually(LIMIT, || bed.plane().layer(1).unwrap().is_complete()));
    bed.stop();
    bed.origin.stop();
    bed.start();
    assert!(restore(&bed, 1, &request));
    assert_same(&unpacked(&layer()), &tree(bed.slot(1)));
}

#[test]
fn what_was_not_local_is_fetched_after_a_restart() {
    let Some(mut bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&layer());
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    read(bed.slot(1).join("f2")).unwrap();
    let local = bed.plane().layer(1).unwrap().store().bytes();
    bed.stop();
    bed.start();
    assert!(restore(&bed, 1, &request));
    // What came along ahead may have arrived after the look.
    assert!(bed.plane().layer(1).unwrap().store().bytes() >= local);
    bed.origin.take_requests();
    read(bed.slot(1).join("f2")).unwrap();
    assert_eq!(bed.ranges(), []);
    assert_same(&unpacked(&layer()), &tree(bed.slot(1)));
}

#[test]
fn a_damaged_index_costs_its_layer_one_opening() {
    let Some(mut bed) = Bed::new() else { return };
    let (one, two) =
        (Encoder::new().encode(&layer()), Encoder::new().encode(&layer().file("two", &b"2"[..])));
    let image = bed.push(&[&one, &two]);
    let requests = [bed.request(&image, &[&one, &two], 0), bed.request(&image, &[&one, &two], 1)];
    for (n, request) in requests.iter().enumerate() {
        bed.attach(n as u64 + 1, request).unwrap();
    }
    let index = bed.plane().layer(1).unwrap().store().dir().join("index");
    bed.stop();
    let mut bytes = fs::read(&index).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&index, bytes).unwrap();
    bed.start();
    assert!(!restore(&bed, 1, &requests[0]), "the damage is seen");
    assert!(restore(&bed, 2, &requests[1]), "and is nobody else's");
    bed.attach(1, &requests[0]).unwrap();
    assert_same(&unpacked(&layer()), &tree(bed.slot(1)));
}

#[test]
fn a_slot_given_up_before_its_layer_arrives_stays_empty() {
    let Some(mut bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&layer());
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    let dir = bed.plane().layer(1).unwrap().store().dir().to_owned();
    bed.stop();
    fs::remove_dir_all(&dir).unwrap();
    bed.start();
    assert!(!restore(&bed, 1, &request), "it is not on disk");
    // Its snapshot is removed while somebody still tries to open it from the registry.
    bed.detach(1);
    assert!(matches!(bed.attach(1, &request), Err(AttachError::Retired(1))));
    assert!(bed.plane().layer(1).is_none());
    bed.attach(2, &request).unwrap();
}

#[test]
fn the_mount_of_a_process_that_died_is_cleared() {
    let Some(mut bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&layer());
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    // A directory held open keeps the old mount busy, so that stopping leaves it behind.
    let held = fs::File::open(bed.slot(1)).unwrap();
    bed.stop();
    bed.start();
    assert!(restore(&bed, 1, &request));
    assert_same(&unpacked(&layer()), &tree(bed.slot(1)));
    drop(held);
}

#[test]
fn the_last_slot_takes_the_directory_with_it_and_collection_the_rest() {
    let Some(bed) = Bed::new() else { return };
    let built = Encoder::new().encode(&layer());
    let image = bed.push(&[&built]);
    let request = bed.request(&image, &[&built], 0);
    bed.attach(1, &request).unwrap();
    bed.attach(2, &request).unwrap();
    let dir = bed.plane().layer(1).unwrap().store().dir().to_owned();
    let layers = dir.parent().unwrap().to_owned();
    bed.detach(1);
    bed.detach(1);
    assert_eq!(read(bed.slot(2).join("d/x")).unwrap(), b"x");
    bed.detach(2);
    assert!(guard::eventually(LIMIT, || fs::read_dir(&layers).unwrap().count() == 0));
    let gone = bed.slot(2);
    assert!(guard::eventually(LIMIT, || fs::metadata(&gone).is_err()));

    fs::create_dir_all(layers.join("0".repeat(64)).join("data")).unwrap();
    fs::create_dir_all(layers.join(".trash-1-1/data")).unwrap();
    let kept = layers.join("a".repeat(64));
    fs::create_dir_all(&kept).unwrap();
    let wanted = HashSet::from([format!("sha256:{}", "a".repeat(64)).parse().unwrap()]);
    bed.plane().collect(&wanted).unwrap();
    let left: Vec<_> = fs::read_dir(&layers).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [kept]);
}

/// A directory's files, as they were at some moment.
type Copy = BTreeMap<PathBuf, Vec<u8>>;

fn copy(dir: &Path) -> Copy {
    let mut files = Copy::new();
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if let Ok(bytes) = fs::read(&path) {
                files.insert(path, bytes);
            }
        }
    }
    files
}

/// What a disk may hold after the power went: of each file that was written since the last sync any block as it was at any
/// moment since, or never was, and any of its lengths, none among them.
fn after_a_power_cut(copies: &[Copy], synced: &Copy, mut random: impl FnMut(usize) -> usize) {
    const BLOCK: usize = 4096;
    for path in copies.iter().flat_map(|copy| copy.keys()).collect::<BTreeSet<_>>() {
        let mut versions: Vec<&[u8]> =
            copies.iter().filter_map(|copy| copy.get(path)).map(Vec::as_slice).collect();
        // The map's header was synced before anything changed: it is not older than that.
        let is_map = path.ends_with("filled");
        match synced.get(path) {
            Some(before) if !is_map => versions.push(before),
            Some(_) => {}
            None if random(4) == 0 => {
                fs::remove_file(path).unwrap_or_default();
                continue;
            }
            None => versions.push(&[]),
        }
        let length = versions[random(versions.len())].len();
        let mut mixed = vec![0; length];
        for (number, block) in mixed.chunks_mut(BLOCK).enumerate() {
            let version = versions[random(versions.len())];
            let from = version.get(number * BLOCK..).unwrap_or_default();
            let kept = from.len().min(block.len());
            block[..kept].copy_from_slice(&from[..kept]);
        }
        if is_map && mixed.len() >= 32 {
            // Another boot.
            mixed[16..32].fill(0x77);
        }
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, mixed).unwrap();
    }
}

#[test]
fn a_power_cut_leaves_every_chunk_right_or_absent() {
    for seed in 0..16_u64 {
        let Some(mut bed) = Bed::new() else { return };
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below.max(1)
        };
        let built = Encoder::new().chunk_size(32 << 10).encode(&layer());
        let image = bed.push(&[&built]);
        let request = bed.request(&image, &[&built], 0);
        bed.attach(1, &request).unwrap();
        let dir = bed.plane().layer(1).unwrap().store().dir().to_owned();
        let mut synced = Copy::new();
        if seed % 2 == 0 {
            // A clean stop first: what is there then is durable.
            read(bed.slot(1).join("f0")).unwrap();
            bed.stop();
            synced = copy(&dir);
            bed.start();
            assert!(restore(&bed, 1, &request));
        }
        let mut copies = Vec::new();
        for _ in 0..1 + random(5) {
            read(bed.slot(1).join(format!("f{}", 1 + random(7)))).unwrap();
            copies.push(copy(&dir));
        }
        bed.stop();
        after_a_power_cut(&copies, &synced, random);
        bed.start();
        if !restore(&bed, 1, &request) {
            // Its index is not what it was: it is opened anew.
            bed.attach(1, &request).unwrap();
        }
        assert_same(&unpacked(&layer()), &tree(bed.slot(1)));
        let layer = bed.plane().layer(1).unwrap();
        assert!(layer.is_complete(), "seed {seed}: what was read is kept: {}", layer.state_json());
    }
}

/// Keeps only what was said.
#[derive(Debug, Default)]
struct Listener(std::sync::Mutex<Option<Agreement>>);

impl Keeper for Listener {
    fn kept(&self) -> std::io::Result<Option<fusefs::Kept>> {
        Ok(None)
    }

    fn keep(&self, _: std::os::fd::BorrowedFd<'_>, agreement: &Agreement) -> std::io::Result<()> {
        *self.0.lock().unwrap() = Some(agreement.clone());
        Ok(())
    }

    fn forget(&self) {}
}

#[test]
fn a_mount_that_nobody_goes_on_with_is_let_go() {
    let Some(bed) = Bed::new() else { return };
    let dir = guard::temp_dir();
    let _mount = guard::MountGuard::new(dir.path().join("mnt"));
    let keeper = std::sync::Arc::new(Listener::default());
    let _entered = bed.runtime.enter();
    let registry = registry::Registry::new(registry::Config::default()).unwrap();
    let plane = fusefs::Plane::start(fusefs::PlaneConfig::new(dir.path()), registry).unwrap();
    plane.serve(keeper.clone()).unwrap();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let (ours, other) = (dir.path().to_str().unwrap(), bed.plane().mountpoint());
    assert!(mounts().contains(ours));
    fusefs::let_go(keeper.0.lock().unwrap().as_ref().unwrap()).unwrap();
    assert!(!mounts().contains(ours) && mounts().contains(other.to_str().unwrap()));
}
