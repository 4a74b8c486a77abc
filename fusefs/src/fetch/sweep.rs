//! All of a blob from a host that sends it where a range was asked for, taken as fill instead of being thrown away.
//!
//! Owns: at most one such body for a layer, what is decoded from it as it passes, and the news of how far it came. A
//! mirror that fetches blobs itself sends them whole until it has them, and when no other host is left it is the only
//! way to the bytes: then readers wait until what they miss has passed.
//!
//! Nothing is claimed for it. What another task fetches at the same time is decoded twice and stored over itself, which
//! is harmless because both are verified.

use std::{
    ops::Range,
    sync::{Arc, Weak, atomic::Ordering},
};

use bytes::{Bytes, BytesMut};
use registry::{TakeWhole, Whole};
use tokio::sync::watch;

use super::{Class, decode_one, fetch_range, missing, priority, reserve, widest_member};
use crate::layer::Layer;

/// How far the body on its way has come, in bytes of the blob; `None` if there is none.
#[derive(Debug)]
pub(super) struct Sweep(watch::Sender<Option<u64>>);

impl Default for Sweep {
    fn default() -> Sweep {
        Sweep(watch::Sender::new(None))
    }
}

impl Sweep {
    /// Ends when a body that was to bring the bytes of `range` has passed them, or is over: what could be made of it is
    /// stored.
    pub(super) async fn passed(&self, range: &Range<u64>) {
        let mut at = self.0.subscribe();
        let mut coming = false;
        loop {
            match *at.borrow_and_update() {
                Some(at) if coming && at >= range.end => return,
                Some(at) => coming = at <= range.start || coming,
                None if coming => return,
                None => {}
            }
            // The sender lives as long as we do.
            let _ = at.changed().await;
        }
    }

    /// Ends when no body is on its way.
    pub(super) async fn over(&self) {
        let _ = self.0.subscribe().wait_for(Option::is_none).await;
    }
}

/// Takes bodies for a layer.
#[derive(Debug)]
pub(super) struct Taker(pub(super) Weak<Layer>);

impl TakeWhole for Taker {
    fn take_whole(&self, whole: Whole) -> Result<(), Whole> {
        let Some(layer) = self.0.upgrade() else { return Err(whole) };
        let sweep = &layer.flights().sweep.0;
        let wanted = !layer.is_complete() && layer.engine().cache.has_room(1);
        if !wanted || !sweep.send_if_modified(|at| at.is_none() && at.replace(0).is_none()) {
            return Err(whole);
        }
        tracing::info!(layer = %layer.digest(), host = %whole.host(), "taking all of the blob as it comes");
        let layer = self.0.clone();
        tokio::spawn(async move {
            let _over = Over(layer.clone());
            match take(&layer, whole).await {
                Ok(true) => tracing::info!("all of the blob has come"),
                Ok(false) => {}
                Err(error) => tracing::warn!(error, "the blob did not come whole"),
            }
        });
        Ok(())
    }
}

/// Says so when a body is over, however it ended.
struct Over(Weak<Layer>);

impl Drop for Over {
    fn drop(&mut self) {
        if let Some(layer) = self.0.upgrade() {
            layer.flights().sweep.0.send_replace(None);
        }
    }
}

/// Decodes what passes; whether all of it did. Holds the layer only meanwhile, so that one that nobody shows ends it.
async fn take(layer: &Weak<Layer>, mut whole: Whole) -> Result<bool, String> {
    let (mut window, mut start, mut next) = (BytesMut::new(), 0, 0);
    let parts = |layer: Arc<Layer>| (layer.engine().clone(), widest_member(layer.index()));
    let Some((engine, widest)) = layer.upgrade().map(parts) else { return Ok(false) };
    let step = engine.config.background_request;
    let _memory = reserve(&engine.memory, &engine.config, step + widest).await;
    loop {
        let piece = whole.piece().await.map_err(|error| error.to_string())?;
        let Some(layer) = layer.upgrade() else { return Ok(false) };
        let (ended, piece) = (piece.is_none(), piece.unwrap_or_default());
        engine.pace.arrived().fetch_add(piece.len() as u64, Ordering::Relaxed);
        engine.counters.compressed_bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        window.extend_from_slice(&piece);
        let first = (next < layer.index().members()).then(|| fetch_range(&layer, next).end - start);
        if (window.len() as u64) < step.max(first.unwrap_or(0)) && !ended {
            continue;
        }
        // A limit that is set is for what nobody waits for.
        if layer.flights().sweep.0.receiver_count() == 0 {
            engine.pace.admit(window.len() as u64).await;
        }
        let end = start + window.len() as u64;
        let until = (next..layer.index().members())
            .find(|&member| fetch_range(&layer, member).end > end)
            .unwrap_or(layer.index().members());
        let bytes = window.split().freeze();
        let decoded = decode_passing(&layer, next..until, bytes.clone(), start).await;
        decoded.map_err(|error| format!("{}: {error}", whole.host()))?;
        // What is behind the last whole member is needed again.
        let from = match until < layer.index().members() {
            true => layer.index().member_range(until).start.clamp(start, end),
            false => end,
        };
        window.extend_from_slice(&bytes[(from - start) as usize..]);
        (start, next) = (from, until);
        layer.flights().sweep.0.send_replace(Some(if ended { u64::MAX } else { from }));
        if ended {
            return Ok(true);
        }
    }
}

/// Decodes those of the members that something is missing of, out of bytes that begin at `start` of the blob.
async fn decode_passing(
    layer: &Arc<Layer>,
    members: Range<u32>,
    bytes: Bytes,
    start: u64,
) -> Result<(), String> {
    let core = layer.engine().background_cpu.clone().acquire_owned().await;
    let layer = layer.clone();
    let work = move || {
        let _core = core;
        let _low = priority::lower();
        for member in members {
            if missing(&layer, member).is_empty() && !layer.wants_headers(member) {
                continue;
            }
            let at = usize::try_from(layer.index().member_range(member).start - start).unwrap_or(usize::MAX);
            let brought = decode_one(&layer, member, bytes.get(at..).unwrap_or_default(), Class::Fill);
            if brought.map_err(|error| error.to_string())?.unstored {
                return Err("the disk is full".to_owned());
            }
        }
        layer.touch();
        Ok(())
    };
    // A panic in there leaves the chunks absent, and they are fetched.
    tokio::task::spawn_blocking(work).await.unwrap_or(Ok(()))
}
