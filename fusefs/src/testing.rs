//! Layers for the unit tests of this crate.

use bytes::Bytes;
use estargz::{Limits, Opener, Step, VerifiedToc};
use support::{
    estargz::{Built, Encoder},
    layer::Layer,
};

use crate::index::{ChunkRef, Index};

/// Opens a built blob as a daemon would.
pub(crate) fn verified_toc(built: &Built) -> VerifiedToc {
    let size = built.blob.len() as u64;
    let mut opener = Opener::new(size, Limits::default()).unwrap();
    match opener.feed(0, &built.blob).unwrap() {
        Step::Done(json) => json.verify(&built.toc_digest.parse().unwrap(), &Limits::default()).unwrap(),
        Step::Need(range) => panic!("the whole blob was not enough, {range:?} wanted"),
    }
}

/// Content of a file in [`two_files`], a function of its chunk so that tests can make it again.
fn content(size: u64, seed: u8) -> Bytes {
    (0..size).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// Two regular files of one chunk each.
pub(crate) fn index_of_two_files() -> (tempfile::TempDir, Index) {
    let layer = Layer::new().dir("etc").file("etc/a", content(1000, 1)).file("etc/b", content(70_000, 2));
    let built = Encoder::new().encode(&layer);
    let dir = tempfile::tempdir().unwrap();
    let index = Index::create(&dir.path().join("index"), &verified_toc(&built)).unwrap();
    (dir, index)
}

/// What a chunk of [`index_of_two_files`] holds.
pub(crate) fn chunk_content(index: &Index, id: u32) -> Bytes {
    let ChunkRef { spec, .. } = index.chunk(id);
    (0..=2).map(|seed| content(spec.size, seed)).find(|c| spec.verify(c.clone()).is_ok()).unwrap()
}
