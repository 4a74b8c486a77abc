//! The file `blob`: a layer's blob as the registry has it, by ranges.
//!
//! Nothing of it is verified here: it has one digest for all of its bytes, and whoever reads a blob to its end compares that, or
//! the digest of the tar in it. Containers never see these bytes.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use registry::{Blob, ReadOptions, Reference, Registry};
use tokio::{sync::OnceCell, time::Instant};

/// Bytes of one request. The kernel reads ahead one MiB at most, and asks for its parts side by side.
const PIECE: u64 = 4 << 20;
/// Pieces kept: a few readers, with one piece ahead of each.
const KEPT: usize = 16;

/// Repository and digest.
type Name = (String, String);
/// A blob's piece, by its number.
type Key = (Name, u64);

/// Pieces of blobs that are being read.
#[derive(Debug)]
pub struct Blobs {
    registry: Registry,
    pieces: Mutex<Pieces>,
}

#[derive(Debug, Default)]
struct Pieces {
    cells: HashMap<Key, Arc<OnceCell<Bytes>>>,
    order: VecDeque<Key>,
    /// Where redirects lead is learnt once.
    blobs: HashMap<Name, Blob>,
    /// Something was read since the last look.
    used: bool,
}

impl Blobs {
    /// Of this registry client.
    pub fn new(registry: Registry) -> Blobs {
        Blobs { registry, pieces: Mutex::default() }
    }

    /// Bytes of a blob that is `size` bytes long; the piece after them is fetched ahead.
    pub async fn read(
        self: &Arc<Self>,
        reference: &Reference,
        digest: &str,
        size: u64,
        range: Range<u64>,
        deadline: Instant,
    ) -> Result<Bytes, registry::Error> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let name = (format!("{}/{}", reference.host(), reference.repository()), digest.to_owned());
        let blob = self.blob(&name, reference, digest, size)?;
        let mut parts = Vec::new();
        for piece in range.start / PIECE..=(range.end - 1) / PIECE {
            let start = piece * PIECE;
            let bytes = self.piece(&name, &blob, piece, size, deadline).await?;
            let within = |at: u64| (at.clamp(start, start + bytes.len() as u64) - start) as usize;
            parts.push(bytes.slice(within(range.start)..within(range.end)));
        }
        let ahead = range.end.div_ceil(PIECE);
        if ahead * PIECE < size {
            let this = self.clone();
            // Failing is left to whoever reads it.
            tokio::spawn(async move { drop(this.piece(&name, &blob, ahead, size, deadline).await) });
        }
        if let [one] = &parts[..] {
            return Ok(one.clone());
        }
        let mut all = BytesMut::new();
        parts.iter().for_each(|part| all.extend_from_slice(part));
        Ok(all.freeze())
    }

    /// Lets go of everything, if nothing was read since the last call.
    pub fn forget_unused(&self) {
        let mut pieces = self.pieces.lock();
        if !std::mem::take(&mut pieces.used) {
            *pieces = Pieces::default();
        }
    }

    async fn piece(
        &self,
        name: &Name,
        blob: &Blob,
        piece: u64,
        size: u64,
        deadline: Instant,
    ) -> Result<Bytes, registry::Error> {
        let cell = self.cell((name.clone(), piece));
        let range = piece * PIECE..size.min((piece + 1) * PIECE);
        let read = || async { Ok(blob.read(range, &ReadOptions::until(deadline)).await?.bytes) };
        cell.get_or_try_init(read).await.cloned()
    }

    fn blob(
        &self,
        name: &Name,
        reference: &Reference,
        digest: &str,
        size: u64,
    ) -> Result<Blob, registry::Error> {
        let mut pieces = self.pieces.lock();
        if let Some(blob) = pieces.blobs.get(name) {
            return Ok(blob.clone());
        }
        if pieces.blobs.len() >= KEPT {
            pieces.blobs.clear();
        }
        let blob = self.registry.blob(reference, digest, Some(size))?;
        pieces.blobs.insert(name.clone(), blob.clone());
        Ok(blob)
    }

    fn cell(&self, key: Key) -> Arc<OnceCell<Bytes>> {
        let mut pieces = self.pieces.lock();
        pieces.used = true;
        if let Some(cell) = pieces.cells.get(&key).cloned() {
            return cell;
        }
        if pieces.order.len() >= KEPT
            && let Some(oldest) = pieces.order.pop_front()
        {
            pieces.cells.remove(&oldest);
        }
        let cell = Arc::new(OnceCell::new());
        pieces.order.push_back(key.clone());
        pieces.cells.insert(key, cell.clone());
        cell
    }
}
