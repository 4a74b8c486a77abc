//! What goes once nobody uses it: contents of layers, then references.

use std::{
    collections::HashSet,
    sync::{Arc, Weak},
    time::Duration,
};

use estargz::Digest;

use super::{Refs, name, record::RefRecord, seconds};
use crate::plane::Plane;

/// How often it is seen what nobody uses any more.
const TIDY: Duration = Duration::from_secs(60);
/// A reference that nobody has used for this long gives back its disk: podman counts a layer's use once it has it.
const UNUSED: Duration = Duration::from_secs(15 * 60);
/// And one that nobody uses or has asked for in this time is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// Looks again and again, as long as there are references to look at.
pub(super) async fn tidy_often(refs: Weak<Refs>) {
    let mut tick = tokio::time::interval(TIDY);
    loop {
        tick.tick().await;
        let Some(refs) = refs.upgrade() else { return };
        refs.tidy().await;
    }
}

impl Refs {
    /// Gives back the disk of layers that nobody uses, and forgets references that nobody has asked for in a long time.
    async fn tidy(self: &Arc<Self>) {
        self.blobs.forget_unused();
        let Some(plane) = self.plane.upgrade() else { return };
        let job = plane.clone();
        // Who counts wrongly and yet has it mounted keeps it.
        let is_mounted = tokio::task::spawn_blocking(move || job.is_used()).await.unwrap_or(true);
        let now = seconds();
        let (unused, forgotten) = {
            let state = self.state.lock();
            let idle = |record: &RefRecord, limit: Duration| {
                let is_free = record.is_released() || record.layers.is_empty();
                is_free && now.saturating_sub(record.used) > limit.as_secs()
            };
            let layers = |record: &RefRecord| -> HashSet<String> {
                record.layers.iter().map(|layer| layer.toc_digest.clone()).collect()
            };
            let (unused, used): (Vec<&RefRecord>, Vec<&RefRecord>) =
                state.records.values().partition(|record| idle(record, UNUSED));
            let used: HashSet<String> = used.into_iter().flat_map(&layers).collect();
            let forgotten: Vec<RefRecord> = unused
                .iter()
                .filter(|record| !is_mounted && idle(record, FORGOTTEN))
                .copied()
                .cloned()
                .collect();
            let unused: HashSet<String> = unused.into_iter().flat_map(layers).collect();
            (
                unused.difference(&used).filter_map(|digest| digest.parse().ok()).collect::<Vec<Digest>>(),
                forgotten,
            )
        };
        for record in forgotten {
            self.forget(&plane, record).await;
        }
        if !unused.is_empty() {
            let evicted = tokio::task::spawn_blocking(move || plane.evict(&unused, UNUSED)).await;
            let went = evicted.unwrap_or_default().into_iter().filter(|evicted| evicted.refused.is_none());
            self.state.lock().given_up.extend(went.map(|evicted| evicted.digest.to_string()));
        }
    }

    async fn forget(self: &Arc<Self>, plane: &Arc<Plane>, record: RefRecord) {
        tracing::info!(
            reference = record.reference,
            "nobody has used the reference in a long time: it is forgotten"
        );
        {
            let mut state = self.state.lock();
            state.names.remove(&record.reference);
            state.records.remove(&record.number);
            state.changed.remove(&record.number);
            state.ready.retain(|slot| !record.slots().any(|own| own == *slot));
            state.slots.retain(|_, number| *number != record.number);
        }
        plane.forget_name(name::encode(&record.reference));
        record.slots().for_each(|slot| plane.detach(u64::from(slot)));
        let refs = self.clone();
        let removed = tokio::task::spawn_blocking(move || {
            let _writing = refs.writing.lock();
            refs.files.remove(record.number)
        })
        .await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(number = record.number, %error, "a forgotten reference comes back with the next start");
        }
    }
}
