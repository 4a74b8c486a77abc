//! How much all layers together keep on disk, and what goes when that is too much.
//!
//! Owns the limit and the choice of what is evicted: chunks of lazy layers, those of the layer first that was not read for
//! the longest time. A layer that has become a directory is never touched: containers use it without us. What nobody shows
//! any more is not here, it was deleted.
//!
//! Room is made for readers only. The background keeps to the room there is, or layers would push each other out for ever;
//! it waits until layers go or the limit is raised. A layer that is becoming a directory is pinned first.
//!
//! Invariant: evicting never changes what a read returns (see `Store::evict`), only whether it is here.

use std::{
    io,
    num::NonZero,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use crate::{fetch::Class, layer::Layer};

/// The limits of the cache, in bytes of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheConfig {
    /// What all layers may keep together; without it the disk is the limit.
    pub most: Option<NonZero<u64>>,
    /// Down to what is evicted once there is too much, in percent of `most`.
    pub low_water: u8,
}

impl Default for CacheConfig {
    fn default() -> Self {
        CacheConfig { most: None, low_water: 90 }
    }
}

/// The layers whose content counts.
#[derive(Debug)]
pub struct Cache {
    config: CacheConfig,
    layers: Mutex<Vec<Weak<Layer>>>,
    /// Held while room is made, so that two do not make it twice.
    evicting: Mutex<()>,
}

/// A layer as the choice sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    /// Bytes that could go.
    bytes: u64,
    /// When it was read last, in any unit.
    used: u64,
}

/// How much to evict of which candidate, so that `need` bytes become free: the least recently used first. `None` if all of
/// them are not enough.
fn choose(candidates: &[Candidate], need: u64) -> Option<Vec<(usize, u64)>> {
    let mut order: Vec<usize> = (0..candidates.len()).filter(|&n| candidates[n].bytes > 0).collect();
    order.sort_by_key(|&n| (candidates[n].used, n));
    let (mut chosen, mut left) = (Vec::new(), need);
    for n in order {
        if left == 0 {
            break;
        }
        let bytes = candidates[n].bytes.min(left);
        chosen.push((n, bytes));
        left -= bytes;
    }
    (left == 0).then_some(chosen)
}

impl Cache {
    /// Without layers yet.
    pub fn new(config: CacheConfig) -> Cache {
        Cache { config, layers: Mutex::default(), evicting: Mutex::default() }
    }

    /// Its limits.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Counts a layer from now on, as long as it is open.
    pub fn add(&self, layer: &Arc<Layer>) {
        let mut layers = self.layers.lock();
        layers.retain(|layer| layer.strong_count() > 0);
        layers.push(Arc::downgrade(layer));
    }

    fn open(&self) -> Vec<Arc<Layer>> {
        self.layers.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Bytes of content that all open layers keep.
    pub fn bytes(&self) -> u64 {
        self.open().iter().map(|layer| layer.store().bytes()).sum()
    }

    /// Whether the background may bring as many bytes more.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.config.most.is_none_or(|most| self.bytes().saturating_add(bytes) <= most.get())
    }

    /// Makes room for `bytes` more, which a reader or the background brings. Blocking.
    ///
    /// # Errors
    ///
    /// `StorageFull`: there is none to be made.
    pub fn admit(&self, bytes: u64, class: Class) -> io::Result<()> {
        let Some(most) = self.config.most else { return Ok(()) };
        let fits = |used: u64| used.saturating_add(bytes) <= most.get();
        if fits(self.bytes()) {
            return Ok(());
        }
        let full =
            || io::Error::new(io::ErrorKind::StorageFull, format!("the cache is limited to {most} bytes"));
        if class != Class::OnDemand {
            return Err(full());
        }
        let _alone = self.evicting.lock();
        let layers = self.open();
        let used: u64 = layers.iter().map(|layer| layer.store().bytes()).sum();
        if fits(used) {
            return Ok(());
        }
        let low = most.get() / 100 * u64::from(self.config.low_water.min(100));
        let needed = used.saturating_add(bytes).saturating_sub(most.get());
        let wanted = used.saturating_add(bytes).saturating_sub(low).max(needed);
        let candidates: Vec<Candidate> = layers
            .iter()
            .map(|layer| Candidate {
                bytes: if layer.is_pinned() { 0 } else { layer.store().bytes() },
                used: layer.used(),
            })
            .collect();
        let chosen = choose(&candidates, wanted).or_else(|| choose(&candidates, needed)).ok_or_else(full)?;
        let mut freed = 0;
        for (n, bytes) in chosen {
            freed += evict(&layers[n], bytes)?;
        }
        if freed >= needed { Ok(()) } else { Err(full()) }
    }

    /// Lets nothing of a layer go from now on; whether all of it is here then.
    pub fn pin(&self, layer: &Layer) -> bool {
        // After what is being evicted.
        let _alone = self.evicting.lock();
        layer.pin(true);
        layer.is_complete()
    }

    /// Gives back the disk of up to `bytes` of a layer's content. Blocking.
    ///
    /// # Errors
    ///
    /// The file system cannot punch holes.
    pub fn evict(&self, layer: &Layer, bytes: u64) -> io::Result<u64> {
        let _alone = self.evicting.lock();
        if layer.is_pinned() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is becoming a directory"));
        }
        evict(layer, bytes)
    }
}

/// Under the lock of evicting.
fn evict(layer: &Layer, bytes: u64) -> io::Result<u64> {
    let evicted = layer.store().evict(layer.index(), bytes)?;
    layer.touch();
    tracing::debug!(layer = %layer.digest(), evicted, "evicted");
    Ok(evicted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_the_longest_time_goes_first_and_no_more_than_needed() {
        let all = [(100, 7), (50, 3), (0, 1), (30, 5)].map(|(bytes, used)| Candidate { bytes, used });
        assert_eq!(choose(&all, 0), Some(vec![]));
        assert_eq!(choose(&all, 20), Some(vec![(1, 20)]));
        assert_eq!(choose(&all, 60), Some(vec![(1, 50), (3, 10)]));
        assert_eq!(choose(&all, 180), Some(vec![(1, 50), (3, 30), (0, 100)]));
        assert_eq!(choose(&all, 181), None);
    }
}
