//! Bytes of a file: from the store at once where they are there, otherwise after fetching them.
//!
//! Owns: the split of a read into chunks and its assembly. May not: choose hosts or errnos. Returns exactly the bytes
//! asked for, cut at the end of the file, or an error; never short data.

use std::{io, ops::Range, sync::Arc};

use tokio::time::Instant;

use crate::{
    fetch::{self, Chunks, FetchError},
    index::Node,
    layer::Layer,
};

/// A read that joined somebody else's download and saw it fail starts over this often: the other's deadline or luck
/// was not its own.
const ATTEMPTS: u32 = 3;

/// A read that found what it wanted just being pushed out looks again after this long.
const EVICTED: std::time::Duration = std::time::Duration::from_millis(1);

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
    if bytes.is_empty() {
        buf.clear();
        return true;
    }
    // What is in it is overwritten: only growth costs anything.
    buf.resize((bytes.end - bytes.start) as usize, 0);
    layer.note_use();
    match layer.store().read(layer.index(), node, bytes.start, buf) {
        Ok(here) => here,
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
    // What came stays until it is handed on: a small cache may have pushed it out again by then.
    let mut held = fetch::zeros(layer, node, bytes.clone()).await;
    loop {
        let mut members: Vec<u32> = layer
            .index()
            .chunks_in(node, bytes.clone())
            .filter(|&c| !layer.store().has(c) && !held.contains_key(&c))
            .map(|c| layer.index().chunk(c).member)
            .collect();
        members.sort_unstable();
        members.dedup();
        match fetch::on_demand(layer, &members, deadline).await {
            Ok(brought) => held.extend(brought),
            Err(error) if attempt >= ATTEMPTS || Instant::now() >= deadline || error.is_verdict() => {
                return Err(error.into());
            }
            Err(_) => {
                attempt += 1;
                continue;
            }
        }
        let in_memory = layer.index().chunks_in(node, bytes.clone()).all(|c| held.contains_key(&c));
        let assembled = match in_memory {
            true => assemble(layer, node, bytes.clone(), &held),
            false => {
                let (task, range, chunks) = (layer.clone(), bytes.clone(), held.clone());
                let job = move || assemble(&task, node, range, &chunks);
                tokio::task::spawn_blocking(job).await.map_err(io::Error::other).and_then(|r| r)
            }
        };
        match assembled {
            Ok(Some(bytes)) => return Ok(bytes),
            // Pushed out before it was read.
            Ok(None) if Instant::now() < deadline => tokio::time::sleep(EVICTED).await,
            Ok(None) => return Err(Arc::new(FetchError::Deadline).into()),
            Err(error) if attempt >= ATTEMPTS => return Err(error.into()),
            Err(error) => {
                distrust(layer, node, bytes.clone(), &error);
                attempt += 1;
            }
        }
    }
}

/// Puts a range together from what is held in memory and from the store; `None` if a part is in neither.
fn assemble(layer: &Layer, node: Node, bytes: Range<u64>, held: &Chunks) -> io::Result<Option<Vec<u8>>> {
    let mut out = vec![0; (bytes.end - bytes.start) as usize];
    if held.is_empty() {
        return Ok(layer.store().read(layer.index(), node, bytes.start, &mut out)?.then_some(out));
    }
    for id in layer.index().chunks_in(node, bytes.clone()) {
        let chunk = layer.index().chunk(id).file_range();
        let part = chunk.start.max(bytes.start)..chunk.end.min(bytes.end);
        let target = &mut out[(part.start - bytes.start) as usize..(part.end - bytes.start) as usize];
        match held.get(&id) {
            Some(content) => {
                target.copy_from_slice(
                    &content[(part.start - chunk.start) as usize..(part.end - chunk.start) as usize],
                );
            }
            None if layer.store().read(layer.index(), node, part.start, target)? => {}
            None => return Ok(None),
        }
    }
    Ok(Some(out))
}

/// The data file was damaged from outside: forget what it was said to hold, so that it is fetched anew.
fn distrust(layer: &Layer, node: Node, bytes: Range<u64>, error: &io::Error) {
    // Anything else (no descriptors, no memory, a disk that fails) says nothing of what the file holds.
    let damaged = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof);
    if !damaged {
        tracing::warn!(layer = %layer.digest(), node, %error, "data file cannot be read");
        return;
    }
    tracing::warn!(
        layer = %layer.digest(), node, start = bytes.start, end = bytes.end, %error,
        "data file cannot be read, fetching its bytes again"
    );
    layer.store().distrust(layer.index(), node);
}
