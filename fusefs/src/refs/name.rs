//! Names in the mount and the numbers of what they name: pure functions.
//!
//! ```text
//! /                                 slot 0, node 1: the root
//! /<base64 of a reference>          slot 0, node r: r is the reference's number, 2 and up
//! /<base64>/<digest>                slot s, node LAYER: s is that of the layer under this name
//!                   /diff           slot s, node 0: the layer's own root, as in every slot
//!                   /info           slot s, node INFO
//!                   /blob           slot s, node BLOB
//! ```
//!
//! References and slots have their numbers from one counter that never goes back, and keep them on disk: an inode number
//! means the same before and after a restart, and nothing of what the kernel remembers is kept in memory here.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::{
    index::Node,
    slots::{self, ROOT_INO},
};

/// The node of a layer's directory: beside the state file's, where no index has nodes.
const LAYER: Node = u32::MAX - 3;
/// That of the description in it.
const INFO: Node = u32::MAX - 4;
/// That of the blob in it.
const BLOB: Node = u32::MAX - 5;

/// The first number that a reference or slot can have: [`ROOT_INO`] is taken.
pub const FIRST_NUMBER: u32 = 2;

/// What is above the layers' own trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The mount's root: references.
    Root,
    /// A reference's directory: digests.
    Reference(u32),
    /// The directory of the layer in a slot.
    Layer(u32),
    /// What is said of it.
    Info(u32),
    /// Its blob.
    Blob(u32),
}

impl Place {
    /// What an inode number stands for; `None`: something in a layer's own tree.
    pub fn of(ino: u64) -> Option<Place> {
        match slots::split(ino) {
            (0, _) if ino == ROOT_INO => Some(Place::Root),
            (0, number) => Some(Place::Reference(number)),
            (slot, LAYER) => Some(Place::Layer(slot)),
            (slot, INFO) => Some(Place::Info(slot)),
            (slot, BLOB) => Some(Place::Blob(slot)),
            _ => None,
        }
    }

    /// Its inode number.
    pub fn ino(self) -> u64 {
        match self {
            Place::Root => ROOT_INO,
            Place::Reference(number) => u64::from(number),
            Place::Layer(slot) => slots::ino(slot, LAYER),
            Place::Info(slot) => slots::ino(slot, INFO),
            Place::Blob(slot) => slots::ino(slot, BLOB),
        }
    }
}

/// The reference that a directory is named after: Go's `base64.StdEncoding`, with padding and nothing else.
pub fn decode(name: &[u8]) -> Option<String> {
    // A file name is that long at most; what decodes is always UTF-8 in a reference.
    let text = String::from_utf8(STANDARD.decode(name).ok()?).ok()?;
    (!text.is_empty()).then_some(text)
}

/// The directory of a reference.
pub fn encode(reference: &str) -> String {
    STANDARD.encode(reference)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_name_one_place_each() {
        let places = [
            Place::Root,
            Place::Reference(FIRST_NUMBER),
            Place::Reference(u32::MAX),
            Place::Layer(2),
            Place::Info(2),
            Place::Blob(2),
            Place::Layer(u32::MAX),
        ];
        for place in places {
            assert_eq!(Place::of(place.ino()), Some(place));
        }
        let numbers: std::collections::BTreeSet<u64> = places.iter().map(|place| place.ino()).collect();
        assert_eq!(numbers.len(), places.len());
        for node in [0, 1, 77, crate::fs::STATE_DIR, crate::fs::STATE_FILE] {
            assert_eq!(Place::of(slots::ino(2, node)), None, "{node} is the layer's");
        }
    }

    #[test]
    fn references_are_named_as_go_does() {
        for reference in
            ["docker.io/library/alpine:3.20", "localhost:5055/t/three@sha256:00", "h/a", "h/ab", "h/abc"]
        {
            assert_eq!(decode(encode(reference).as_bytes()).as_deref(), Some(reference));
        }
        assert_eq!(encode("docker.io/library/alpine:3.20"), "ZG9ja2VyLmlvL2xpYnJhcnkvYWxwaW5lOjMuMjA=");
        for other in
            [&b""[..], b"aC9hYg", b"aC9hYg=", b"aC9hYh==", b"aC9hYg==\n", b"aC9hYg-_", b"/w==", b"x", b"\xff"]
        {
            assert_eq!(decode(other), None, "{other:?}");
        }
    }
}
