//! Slots: what each directory of the mount shows.
//!
//! A slot is named by the number of the snapshot that asked for it, and never reused, so that nothing the kernel
//! remembers of a slot can ever come to mean another layer. Lookups are lock-free; changes copy the table.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;

use crate::{index::Node, layer::Layer, view::View};

/// The table of slots.
#[derive(Debug, Default)]
pub struct Slots(ArcSwap<HashMap<u32, Arc<View>>>);

impl Slots {
    /// What a slot shows.
    pub fn get(&self, slot: u32) -> Option<Arc<View>> {
        self.0.load().get(&slot).cloned()
    }

    /// Fills a slot.
    pub fn insert(&self, slot: u32, view: &Arc<View>) {
        self.0.rcu(|old| {
            let mut new = HashMap::clone(old);
            new.insert(slot, view.clone());
            new
        });
    }

    /// Empties a slot; what was in it.
    pub fn remove(&self, slot: u32) -> Option<Arc<View>> {
        let old = self.0.rcu(|old| {
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
        let mut all: Vec<_> = self.0.load().iter().map(|(slot, view)| (*slot, view.clone())).collect();
        all.sort_by_key(|(slot, _)| *slot);
        all
    }

    /// Whether any slot shows the layer.
    pub fn shows(&self, layer: &Layer) -> bool {
        let digest = layer.digest();
        self.0.load().values().any(|view| view.layer().digest() == digest)
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
