//! Bytes of a file: from the store at once where they are there, otherwise after fetching them.
//!
//! Owns: the split of a read into chunks and its assembly. May not: choose hosts or errnos. Returns exactly the bytes
//! asked for, cut at the end of the file, or an error; never short data.

use std::{io, ops::Range, sync::Arc};

use tokio::time::Instant;

use crate::{
    fetch::{self, FetchError, Unstored},
    index::Node,
    layer::Layer,
};

/// A read that joined somebody else's download and saw it fail starts over this often: the other's deadline or luck
/// was not its own.
const ATTEMPTS: u32 = 3;

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The bytes could not be fetched.
    #[error(transparent)]
    Fetch(#[from] Arc<FetchError>),
    /// They were fetched, but the store cannot be read back.
    #[error("reading back from the store: {0}")]
    Store(#[from] io::Error),
}

impl ReadError {
    /// The reason code under which it is logged and counted.
    pub fn reason(&self) -> &'static str {
        match self {
            ReadError::Fetch(error) => error.reason(),
            ReadError::Store(_) => "store",
        }
    }
}

/// The part of a request that lies in a file of `size` bytes.
pub fn clip(size: u64, offset: u64, len: u32) -> Range<u64> {
    let start = offset.min(size);
    start..offset.saturating_add(u64::from(len)).min(size).max(start)
}

/// Reads from the store alone into `buf` (cleared first). `false` if a byte of it is not there: [`read`] then.
/// No await and no lock: this runs on a FUSE thread.
pub fn read_local(layer: &Layer, node: Node, bytes: Range<u64>, buf: &mut Vec<u8>) -> bool {
    buf.clear();
    if bytes.is_empty() {
        return true;
    }
    if !layer.index().chunks_in(node, bytes.clone()).all(|c| layer.store().has(c)) {
        return false;
    }
    buf.resize((bytes.end - bytes.start) as usize, 0);
    match layer.store().read(layer.index(), node, bytes.start, buf) {
        Ok(()) => true,
        Err(error) => {
            distrust(layer, node, bytes, &error);
            false
        }
    }
}

/// Reads a range that lies in the file, fetching what is missing before `deadline`.
pub async fn read(
    layer: &Arc<Layer>,
    node: Node,
    bytes: Range<u64>,
    deadline: Instant,
) -> Result<Vec<u8>, ReadError> {
    let mut attempt = 1;
    loop {
        let mut members: Vec<u32> = layer
            .index()
            .chunks_in(node, bytes.clone())
            .filter(|&c| !layer.store().has(c))
            .map(|c| layer.index().chunk(c).member)
            .collect();
        members.sort_unstable();
        members.dedup();
        let unstored = match fetch::on_demand(layer, node, &bytes, &members, deadline).await {
            Ok(unstored) => unstored,
            Err(error) if attempt >= ATTEMPTS || Instant::now() >= deadline || error.is_verdict() => {
                return Err(error.into());
            }
            Err(_) => {
                attempt += 1;
                continue;
            }
        };
        let (task, range) = (layer.clone(), bytes.clone());
        let assembled = tokio::task::spawn_blocking(move || assemble(&task, node, range, &unstored)).await;
        match assembled.map_err(io::Error::other).and_then(|r| r) {
            Ok(bytes) => return Ok(bytes),
            Err(error) if attempt >= ATTEMPTS => return Err(error.into()),
            Err(error) => {
                distrust(layer, node, bytes.clone(), &error);
                attempt += 1;
            }
        }
    }
}

/// Puts a range together from the store and from what could not be stored.
fn assemble(layer: &Layer, node: Node, bytes: Range<u64>, unstored: &Unstored) -> io::Result<Vec<u8>> {
    let mut out = vec![0; (bytes.end - bytes.start) as usize];
    if unstored.is_empty() {
        layer.store().read(layer.index(), node, bytes.start, &mut out)?;
        return Ok(out);
    }
    for id in layer.index().chunks_in(node, bytes.clone()) {
        let chunk = layer.index().chunk(id).file_range();
        let part = chunk.start.max(bytes.start)..chunk.end.min(bytes.end);
        let target = &mut out[(part.start - bytes.start) as usize..(part.end - bytes.start) as usize];
        match unstored.get(&id) {
            Some(content) => {
                target.copy_from_slice(
                    &content[(part.start - chunk.start) as usize..(part.end - chunk.start) as usize],
                );
            }
            None => layer.store().read(layer.index(), node, part.start, target)?,
        }
    }
    Ok(out)
}

/// The data file was damaged from outside: forget what it was said to hold, so that it is fetched anew.
fn distrust(layer: &Layer, node: Node, bytes: Range<u64>, error: &io::Error) {
    tracing::warn!(
        layer = %layer.digest(), node, start = bytes.start, end = bytes.end, %error,
        "data file cannot be read, fetching its bytes again"
    );
    layer.store().distrust(layer.index(), node);
}
