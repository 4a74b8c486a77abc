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
        refs.tidy(seconds()).await;
    }
}

/// What nobody uses any more.
#[derive(Debug, Default, PartialEq, Eq)]
struct Idle {
    /// Layers whose contents can go, by their TOC digests.
    layers: HashSet<String>,
    /// References that can.
    references: Vec<u32>,
}

/// What can go at a time, in seconds since the epoch. A reference goes only while nothing is mounted: who counts wrongly and yet
/// has it mounted keeps it.
fn idle<'a>(records: impl Iterator<Item = &'a RefRecord>, now: u64, is_mounted: bool) -> Idle {
    let since = |record: &RefRecord| Duration::from_secs(now.saturating_sub(record.used));
    let is_free = |record: &RefRecord| record.is_released() || record.layers.is_empty();
    let (free, used): (Vec<_>, Vec<_>) =
        records.partition(|record| is_free(record) && since(record) > UNUSED);
    let layers = |records: &[&RefRecord]| -> HashSet<String> {
        let layers = records.iter().flat_map(|record| &record.layers);
        layers.map(|layer| layer.toc_digest.clone()).collect()
    };
    let gone = free.iter().filter(|record| !is_mounted && since(record) > FORGOTTEN);
    Idle {
        layers: layers(&free).difference(&layers(&used)).cloned().collect(),
        references: gone.map(|record| record.number).collect(),
    }
}

impl Refs {
    /// Gives back the disk of layers that nobody uses, and forgets references that nobody has asked for in a long time. `now` is
    /// in seconds since the epoch.
    pub async fn tidy(self: &Arc<Self>, now: u64) {
        self.blobs.forget_unused();
        let Some(plane) = self.plane.upgrade() else { return };
        let job = plane.clone();
        let is_mounted = tokio::task::spawn_blocking(move || job.is_used()).await.unwrap_or(true);
        let Idle { layers, references } = idle(self.state.lock().records.values(), now, is_mounted);
        for number in references {
            let record = self.state.lock().records.get(&number).cloned();
            if let Some(record) = record {
                self.forget(&plane, record).await;
            }
        }
        let layers: Vec<Digest> = layers.iter().filter_map(|digest| digest.parse().ok()).collect();
        if !layers.is_empty() {
            let evicted = tokio::task::spawn_blocking(move || plane.evict(&layers, UNUSED)).await;
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
            state.unsettle(&record.reference);
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

#[cfg(test)]
mod tests {
    use estargz::Announced;

    use super::{
        super::{image, name},
        *,
    };
    use crate::manifest::{ImageLayers, ManifestLayer};

    /// A reference to an image of one layer, used last at 1000 s.
    fn record(number: u32, toc: char) -> RefRecord {
        let digest = |letter: char| format!("sha256:{}", letter.to_string().repeat(64));
        let layer = ManifestLayer {
            digest: digest('b'),
            size: 1,
            toc: digest(toc).parse().ok().map(|digest| Announced { digest, position: None }),
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            diff_size: None,
            tar_split: None,
        };
        let manifest = ImageLayers { digest: digest('e'), config: None, layers: vec![layer] };
        let mut record = RefRecord::new(number, format!("h/{number}:t"), 1000);
        let mut next = name::FIRST_NUMBER + number * 10;
        image::add(&mut record, &manifest, &[digest('d')], || {
            next += 1;
            next
        });
        record
    }

    #[test]
    fn only_what_was_given_up_goes_and_only_after_its_time() {
        let (mut one, mut two, mut other) = (record(2, 'a'), record(3, 'a'), record(4, 'c'));
        for record in [&mut one, &mut two, &mut other] {
            record.layers[0].by_toc.take();
        }
        let seen = |records: &[&RefRecord], after: Duration, is_mounted| {
            let Idle { layers, mut references } =
                idle(records.iter().copied(), 1001 + after.as_secs(), is_mounted);
            references.sort();
            (layers.len(), references)
        };
        assert_eq!(seen(&[&one, &two, &other], FORGOTTEN, false), (0, vec![]), "all are in use");
        one.layers[0].by_toc.release();
        assert_eq!(seen(&[&one], Duration::ZERO, false), (0, vec![]), "not at once");
        assert_eq!(seen(&[&one], UNUSED, false), (1, vec![]));
        assert_eq!(seen(&[&one, &two], UNUSED, false), (0, vec![]), "the layer has another user");
        two.layers[0].by_toc.release();
        assert_eq!(seen(&[&one, &two, &other], UNUSED, false), (1, vec![]));
        assert_eq!(seen(&[&one, &two, &other], FORGOTTEN, true), (1, vec![]), "something is mounted");
        assert_eq!(seen(&[&one, &two, &other], FORGOTTEN, false), (1, vec![2, 3]));
        // Nobody has said anything: a crash may have lost it.
        assert_eq!(seen(&[&record(5, 'a')], FORGOTTEN, false), (0, vec![]));
        let plain = RefRecord::new(6, "h/plain:t".to_owned(), 1000);
        assert_eq!(seen(&[&plain], FORGOTTEN, false), (0, vec![6]));
    }
}
