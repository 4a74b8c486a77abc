//! What survives the process, and what goes with its last slot.

use std::{collections::HashSet, fs};

use fusefs::{AttachError, AttachRequest, Fill};
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
    assert_eq!(bed.plane().layer(1).unwrap().store().bytes(), local);
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
