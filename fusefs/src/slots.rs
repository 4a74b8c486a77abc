//! Slots: what each directory of the mount shows.
//!
//! A slot is named by the number of the snapshot that asked for it, and never reused, so that nothing the kernel
//! remembers of a slot can ever come to mean another layer. Lookups are lock-free; changes copy the table.
//!
//! After a start, slots are *expected* until they are filled from disk again: who asks for one waits, and it comes next.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use arc_swap::ArcSwap;
use parking_lot::{Condvar, Mutex};

use crate::{index::Node, layer::Layer, view::View};

/// The table of slots.
#[derive(Debug, Default)]
pub struct Slots {
    table: ArcSwap<HashMap<u32, Arc<View>>>,
    expected: Mutex<Expected>,
    /// Some slot is no longer expected.
    arrived: Condvar,
}

/// Slots that will be filled from disk in a moment, and which of them somebody waits for.
#[derive(Debug, Default)]
struct Expected {
    slots: HashSet<u32>,
    /// There may be others, not known yet.
    others: bool,
    awaited: Vec<u32>,
}

impl Slots {
    /// What a slot shows.
    pub fn get(&self, slot: u32) -> Option<Arc<View>> {
        self.table.load().get(&slot).cloned()
    }

    /// What a slot shows, once that is known. Waits for the disk at most: never called by whoever fills expected slots.
    pub fn await_slot(&self, slot: u32) -> Option<Arc<View>> {
        self.get(slot).or_else(|| {
            let mut expected = self.expected.lock();
            // It may have arrived while the lock was waited for.
            while self.get(slot).is_none() && (expected.others || expected.slots.contains(&slot)) {
                if !expected.awaited.contains(&slot) {
                    expected.awaited.push(slot);
                }
                self.arrived.wait(&mut expected);
            }
            expected.awaited.retain(|awaited| *awaited != slot);
            self.get(slot)
        })
    }

    /// Waits until no slot is expected any more.
    pub fn await_all(&self) {
        let mut expected = self.expected.lock();
        while expected.others || !expected.slots.is_empty() {
            self.arrived.wait(&mut expected);
        }
    }

    /// Slots that will be filled, or given up with [`Slots::arrived`].
    pub fn expect(&self, slots: impl IntoIterator<Item = u32>) {
        self.expected.lock().slots.extend(slots);
    }

    /// Whether slots that nobody has named yet are expected as well.
    pub fn expect_others(&self, others: bool) {
        self.expected.lock().others = others;
        self.arrived.notify_all();
    }

    /// A slot was filled, or will not be.
    pub fn arrived(&self, slot: u32) {
        let mut expected = self.expected.lock();
        expected.slots.remove(&slot);
        self.arrived.notify_all();
    }

    /// An expected slot that somebody waits for.
    pub fn awaited(&self) -> Option<u32> {
        let expected = self.expected.lock();
        expected.awaited.iter().copied().find(|slot| expected.slots.contains(slot))
    }

    /// Fills a slot.
    pub fn insert(&self, slot: u32, view: &Arc<View>) {
        self.table.rcu(|old| {
            let mut new = HashMap::clone(old);
            new.insert(slot, view.clone());
            new
        });
    }

    /// Empties a slot; what was in it.
    pub fn remove(&self, slot: u32) -> Option<Arc<View>> {
        let old = self.table.rcu(|old| {
            let mut new = HashMap::clone(old);
            new.remove(&slot);
            new
        });
        old.get(&slot).cloned()
    }

    /// The slots that show a layer, ascending.
    pub fn of(&self, layer: &Layer) -> Vec<(u32, Arc<View>)> {
        let mut all = self.all();
        // The very one: another of the same digest may have taken its place.
        all.retain(|(_, view)| std::ptr::eq(&**view.layer(), layer));
        all
    }

    /// All slots in use, ascending.
    pub fn all(&self) -> Vec<(u32, Arc<View>)> {
        let mut all: Vec<_> = self.table.load().iter().map(|(slot, view)| (*slot, view.clone())).collect();
        all.sort_by_key(|(slot, _)| *slot);
        all
    }

    /// Whether any slot shows the layer.
    pub fn shows(&self, layer: &Layer) -> bool {
        let digest = layer.digest();
        self.table.load().values().any(|view| view.layer().digest() == digest)
    }
}

/// The inode number of the mount's root directory, which lists the slots.
pub const ROOT_INO: u64 = 1;

/// The inode number of a node: the slot in the high, the node in the low half. Slots start at 1, so none is
/// [`ROOT_INO`].
pub const fn ino(slot: u32, node: Node) -> u64 {
    (slot as u64) << 32 | node as u64
}

/// The slot and node of an inode number.
pub const fn split(ino: u64) -> (u32, Node) {
    ((ino >> 32) as u32, ino as u32)
}

/// A slot's number from its directory's name: decimal, without leading zero.
pub fn parse(name: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(name).ok()?;
    let slot: u32 = text.parse().ok()?;
    (slot > 0 && slot.to_string() == text).then_some(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_an_expected_slot_waits_until_it_has_arrived_or_is_given_up() {
        let slots = Slots::default();
        assert!(slots.await_slot(1).is_none(), "nobody expects it");
        slots.expect([1, 2, 3]);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| slots.await_slot(2));
            let all = scope.spawn(|| slots.await_all());
            while slots.awaited() != Some(2) {
                std::thread::yield_now();
            }
            slots.arrived(1);
            assert!(!waiter.is_finished());
            slots.arrived(2);
            assert!(waiter.join().unwrap().is_none(), "given up");
            assert_eq!(slots.awaited(), None);
            assert!(!all.is_finished());
            slots.arrived(3);
            all.join().unwrap();
        });
        slots.expect_others(true);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| slots.await_slot(7));
            slots.expect([7]);
            while slots.awaited() != Some(7) {
                std::thread::yield_now();
            }
            slots.expect_others(false);
            assert!(!waiter.is_finished(), "it was named meanwhile");
            slots.arrived(7);
            assert!(waiter.join().unwrap().is_none());
        });
    }

    #[test]
    fn slot_names_have_one_spelling() {
        for (name, slot) in
            [("1", Some(1)), ("4294967295", Some(u32::MAX)), ("0", None), ("01", None), ("+1", None)]
        {
            assert_eq!(parse(name.as_bytes()), slot, "{name}");
        }
        for name in [&b""[..], b"x", b"4294967296", b"\xff", b"1 "] {
            assert_eq!(parse(name), None);
        }
        assert_eq!(split(ino(7, 9)), (7, 9));
        assert_ne!(ino(1, 0), ROOT_INO);
    }
}
