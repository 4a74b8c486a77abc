//! What goes on behind the containers: opening layers ahead, prefetching, filling, graduating, forgetting.
//!
//! Owns the order of these, and the pauses while a registry or a disk fails. Holds nothing of a plane or a layer between two
//! steps, so that what nobody needs any more ends.

use std::{
    path::Path,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use estargz::Digest;
use tokio::time::Instant;

use super::{Fill, Graduation, Open, Plane};
use crate::{
    fetch::{self, BlobDigest, Class, Step},
    graduate,
    layer::{Audits, Layer},
    resolve::LayerSpec,
};

/// An opened layer that no slot came to show is forgotten after this long: its pull was given up.
const UNUSED: Duration = Duration::from_secs(300);
/// The pause before a look at what readers were fetching.
const UNDER_WAY: Duration = Duration::from_millis(50);
/// The first pause before another attempt to fill a layer whose registry fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between attempts to fill a layer whose registry fails.
const MAX_FILL_PAUSE: Duration = Duration::from_secs(60);

/// Opens a layer that will be attached soon. Failing is left to the attach, which tells why.
pub(super) async fn open_ahead(plane: Arc<Plane>, spec: LayerSpec, deadline: Instant) {
    let _permit = plane.opens.acquire().await.expect("the semaphore is never closed");
    let lock = plane.lock(spec.toc_digest);
    let _locked = lock.lock().await;
    if let Err(error) = plane.open(&spec, deadline).await {
        tracing::debug!(layer = %spec.toc_digest, %error, "opening ahead failed");
    }
}

/// Forgets opened layers that nobody attached.
pub(super) async fn forget_unused(plane: Weak<Plane>) {
    let mut tick = tokio::time::interval(UNUSED / 5);
    loop {
        tick.tick().await;
        let Some(plane) = plane.upgrade() else { return };
        let old: Vec<Digest> = {
            let open = plane.open.lock();
            let unused =
                open.iter().filter(|(_, o)| o.since.elapsed() > UNUSED && !plane.slots.shows(&o.layer));
            unused.map(|(digest, _)| *digest).collect()
        };
        for digest in old {
            plane.forget(digest).await;
        }
    }
}

/// Prefetches, then fills. Holds nothing between its steps, so that a layer nobody shows ends it.
pub(super) async fn work_behind(plane: Weak<Plane>, layer: Weak<Layer>, prefetch: u64, fill: Fill) {
    let Some((first_after, members)) = layer.upgrade().map(|l| {
        let index = l.index();
        let inside =
            (0..index.members()).take_while(|&m| index.member_range(m).end <= prefetch).count() as u32;
        (inside, index.members())
    }) else {
        return;
    };
    walk(&plane, &layer, first_after, Class::Prefetch).await;
    if fill == Fill::On
        && walk(&plane, &layer, members, Class::Fill).await == Walked::All
        && is_the_blob(&plane, &layer).await
    {
        graduate_behind(&plane, &layer).await;
    }
}

/// Whether the blob is the one that the manifest names, if that is to be known. Asks until the registry tells, or nobody needs
/// the layer any more.
async fn is_the_blob(plane: &Weak<Plane>, layer: &Weak<Layer>) -> bool {
    let (mut digest, mut pause) = (BlobDigest::default(), FIRST_PAUSE);
    loop {
        let (Some(plane), Some(layer)) = (plane.upgrade(), layer.upgrade()) else { return false };
        if plane.stopping.load(Ordering::Acquire) {
            return false;
        }
        if plane.config.fetch.audits != Audits::WithBlob || layer.graduated().is_some() {
            return true;
        }
        match digest.step(&layer).await {
            Ok(None) => pause = FIRST_PAUSE,
            Ok(Some(found)) => {
                let same = found.to_string() == layer.blob_digest();
                if !same {
                    layer.note_blob_mismatch(found);
                }
                return same;
            }
            Err(error) => {
                let reason = error.reason();
                tracing::warn!(layer = %layer.digest(), reason, %error, ?pause, "hashing the blob");
                drop((plane, layer));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_FILL_PAUSE);
            }
        }
    }
}

/// Makes a complete layer a directory, if its tar is what its TOC says.
async fn graduate_behind(plane: &Weak<Plane>, layer: &Weak<Layer>) {
    let (Some(plane), Some(layer)) = (plane.upgrade(), layer.upgrade()) else { return };
    if plane.config.fetch.audits == Audits::Off || layer.graduated().is_some() {
        return;
    }
    let _one = plane.graduating.acquire().await.expect("the semaphore is never closed");
    let is_open = |open: &Open| Arc::ptr_eq(&open.layer, &layer);
    if !plane.open.lock().get(&layer.digest()).is_some_and(is_open) {
        return;
    }
    let (job, opaque) = (layer.clone(), plane.config.opaque);
    // As the first chain shows it; others mostly agree.
    let Some((_, view)) = plane.slots.of(&layer).into_iter().next() else { return };
    if plane.stopping.load(Ordering::Acquire) {
        return;
    }
    let made = tokio::task::spawn_blocking(move || {
        let _low = fetch::priority::lower();
        let ready = job.audited() == Ok(true) && job.engine().cache().pin(&job);
        ready.then(|| graduate::graduate(&job, view.adopted(), opaque)).transpose()
    });
    match made.await {
        Ok(Ok(Some(graduated))) => layer.note_graduated(graduated),
        failed => {
            layer.pin(false);
            if let Ok(Err(error)) = failed {
                layer.note_not_graduated(&error);
            }
            return;
        }
    }
    let slots = plane.slots.of(&layer);
    let fit = slots.iter().filter_map(|(slot, view)| view.graduated().map(|tree| (u64::from(*slot), tree)));
    let (slots, trees): (Vec<u64>, Vec<&Path>) = fit.unzip();
    tracing::info!(layer = %layer.digest(), ?slots, "layer is a plain directory");
    if let Some(tree) = trees.first() {
        // An error says that nobody listens.
        let _ = plane.graduated.send(Graduation { slots, tree: (*tree).to_owned() }).await;
    }
}

/// How far a walk came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Walked {
    /// Nothing was left.
    All,
    /// The layer, or the plane, is going away.
    Ended,
}

/// Fetches all missing members below `until`, again and again until none is missing, with longer and longer pauses
/// while the registry fails.
async fn walk(plane: &Weak<Plane>, layer: &Weak<Layer>, until: u32, class: Class) -> Walked {
    let (mut pause, mut full) = (FIRST_PAUSE, false);
    loop {
        let Some(lanes) = plane.upgrade().map(|plane| plane.config.fetch.lanes.max(1)) else {
            return Walked::Ended;
        };
        if let Some(layer) = layer.upgrade() {
            layer.position().rewind();
        }
        // One is enough to see whether there is room again.
        let lanes = if full { 1 } else { lanes };
        let lanes = (0..lanes).map(|_| lane(plane, layer, until, class, &pause));
        let ends = futures::future::join_all(lanes).await;
        let (Some(_), Some(layer)) = (plane.upgrade(), layer.upgrade()) else { return Walked::Ended };
        if ends.contains(&Lane::Ended) {
            return Walked::Ended;
        }
        // What others were fetching may have failed them.
        let whole = class != Class::Fill || layer.is_complete() && !layer.wants_any_headers();
        if whole && ends.iter().all(|end| *end == Lane::Done) {
            if class == Class::Fill {
                tracing::info!(layer = %layer.digest(), "layer is local");
            }
            return Walked::All;
        }
        drop(layer);
        if ends.iter().all(|end| *end == Lane::Done) {
            // The rest is under way for readers.
            tokio::time::sleep(UNDER_WAY).await;
            continue;
        }
        full = ends.contains(&Lane::NoSpace);
        if full {
            pause = MAX_FILL_PAUSE;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_FILL_PAUSE);
    }
}

/// How a lane ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    /// Nothing was left to fetch.
    Done,
    /// The registry failed.
    Failed,
    /// The disk is full.
    NoSpace,
    /// The layer, or the plane, is going away.
    Ended,
}

/// One request after the other, until none is left or one fails. Holds nothing between them.
async fn lane(plane: &Weak<Plane>, layer: &Weak<Layer>, until: u32, class: Class, pause: &Duration) -> Lane {
    loop {
        let (Some(plane), Some(layer)) = (plane.upgrade(), layer.upgrade()) else { return Lane::Ended };
        if plane.stopping.load(Ordering::Acquire) {
            return Lane::Ended;
        }
        match fetch::background(&layer, layer.position(), until, class).await {
            Step::Done => return Lane::Done,
            Step::NoSpace => return Lane::NoSpace,
            Step::Advanced(error) => {
                layer.touch();
                let Some(error) = error else { continue };
                tracing::warn!(
                    layer = %layer.digest(), ?class, reason = error.reason(), %error, ?pause, "fetching behind"
                );
                return Lane::Failed;
            }
        }
    }
}
