//! Chunks that need no download: the TOC says that they are zeros.
//!
//! They are in the blob all the same, and whoever fetches whole members finds them there. They are verified like any other
//! chunk: one that the TOC lies about is fetched, and fails or not by its true bytes.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;

use super::{Chunks, Class};
use crate::{
    index::{ChunkRef, Node},
    layer::Layer,
};

/// Makes the missing chunks of zeros in a range of a file, and stores them if there is room.
pub async fn zeros(layer: &Arc<Layer>, node: Node, bytes: Range<u64>) -> Chunks {
    let index = layer.index();
    let wanted: Vec<ChunkRef> = index
        .chunks_in(node, bytes)
        .map(|id| index.chunk(id))
        .filter(|chunk| chunk.zeros && !layer.store().has(chunk.id))
        .collect();
    if wanted.is_empty() {
        return Chunks::new();
    }
    let layer = layer.clone();
    let core = layer.engine().cpu.clone().acquire_owned().await.expect("the semaphore is never closed");
    let work = move || {
        let _core = core;
        wanted.iter().filter_map(|chunk| make(&layer, chunk)).collect()
    };
    // After a panic in there they are fetched.
    tokio::task::spawn_blocking(work).await.unwrap_or_default()
}

fn make(layer: &Layer, chunk: &ChunkRef) -> Option<(u32, Bytes)> {
    let size = usize::try_from(chunk.spec.size).ok()?;
    let verified = chunk.spec.verify(vec![0; size].into()).ok()?;
    super::keep(layer, chunk.id, &verified, Class::OnDemand);
    Some((chunk.id, verified.into_data()))
}
