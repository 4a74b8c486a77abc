//! Answers of sources that are kept for a while, and turns at asking for them.
//!
//! A source that runs a program or asks a service is not asked for every request. What was refused is asked for anew, but
//! not again and again: what came after a refusal stays for [`PAUSE`].

use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

/// The shortest life of an answer, also of one that is not to be kept: a read consists of many requests.
pub(super) const PAUSE: Duration = Duration::from_secs(2);
/// More than any node has images, times sources.
const MAX_ENTRIES: usize = 2048;

/// Answers by what was asked.
#[derive(Debug)]
pub(super) struct Kept<K, V> {
    entries: Mutex<HashMap<K, Entry<V>>>,
    turns: Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    until: Instant,
    /// It came after a refusal: another one does not end it before.
    firm_until: Instant,
    refused: bool,
}

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self { entries: Mutex::default(), turns: Mutex::default() }
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Kept<K, V> {
    /// The answer that is still good.
    pub(super) fn get(&self, key: &K) -> Option<V> {
        let now = Instant::now();
        let entries = self.entries.lock();
        entries.get(key).filter(|entry| !entry.refused && entry.until > now).map(|entry| entry.value.clone())
    }

    /// Keeps an answer for `life`, at least for [`PAUSE`].
    pub(super) fn put(&self, key: K, value: V, life: Duration) {
        let now = Instant::now();
        let mut entries = self.entries.lock();
        if entries.len() >= MAX_ENTRIES {
            entries.retain(|_, entry| entry.until > now);
        }
        if entries.len() >= MAX_ENTRIES {
            entries.clear();
        }
        let again = entries.get(&key).is_some_and(|entry| entry.refused);
        let firm_until = if again { now + PAUSE } else { now };
        entries.insert(key, Entry { value, until: now + life.max(PAUSE), firm_until, refused: false });
    }

    /// Ends the answers that were `concerned` by a refusal.
    pub(super) fn refuse(&self, concerned: impl Fn(&V) -> bool) {
        let now = Instant::now();
        let mut entries = self.entries.lock();
        for entry in entries.values_mut().filter(|entry| entry.firm_until <= now) {
            entry.refused |= concerned(&entry.value);
        }
    }

    /// Waits until nobody else is asking the same. Whoever has the turn looks first whether there is an answer now.
    pub(super) async fn turn(&self, key: &K) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock();
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            turns.entry(key.clone()).or_default().clone()
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn answers_end_by_time_and_by_refusal() {
        let kept = Kept::default();
        kept.put("a", 1, Duration::ZERO);
        kept.put("b", 2, Duration::from_secs(60));
        assert_eq!((kept.get(&"a"), kept.get(&"b"), kept.get(&"c")), (Some(1), Some(2), None));
        tokio::time::advance(PAUSE).await;
        assert_eq!((kept.get(&"a"), kept.get(&"b")), (None, Some(2)));
        kept.refuse(|value| *value == 1);
        assert_eq!(kept.get(&"b"), Some(2));
        kept.refuse(|value| *value == 2);
        assert_eq!(kept.get(&"b"), None);
        kept.put("b", 2, Duration::from_secs(60));
        kept.refuse(|value| *value == 2);
        assert_eq!(kept.get(&"b"), Some(2), "it is as new as can be");
        tokio::time::advance(PAUSE).await;
        kept.refuse(|value| *value == 2);
        assert_eq!(kept.get(&"b"), None);
    }

    #[tokio::test]
    async fn only_one_asks_the_same() {
        let kept = Kept::<_, u32>::default();
        let turn = kept.turn(&"a").await;
        let _other = kept.turn(&"b").await;
        let mut second = Box::pin(kept.turn(&"a"));
        assert!(futures::poll!(&mut second).is_pending());
        drop(turn);
        second.await;
    }

    #[test]
    fn they_are_bounded() {
        let kept = Kept::default();
        for n in 0..3 * MAX_ENTRIES {
            kept.put(n, n, Duration::from_secs(60));
        }
        assert!(kept.entries.lock().len() <= MAX_ENTRIES);
        assert_eq!(kept.get(&(3 * MAX_ENTRIES - 1)), Some(3 * MAX_ENTRIES - 1));
    }
}
