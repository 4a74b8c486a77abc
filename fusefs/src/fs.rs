//! POSIX semantics of one layer, without FUSE: names, attributes, extended attributes, and the state directory.
//!
//! May not: await, touch the network, or know inode numbers, slots or replies. Everything here is answered from the
//! mapped index; the content of regular files is the reader's.
//!
//! Beside the layer's own tree there is the state directory of stargz-snapshotter: `.stargz-snapshotter` at the root,
//! found by name but not listed, with one file `<blob digest>.json` that says how much of the layer is local.

use std::borrow::Cow;

use estargz::Kind;

use crate::{
    index::{Attr, Node},
    layer::Layer,
};

/// The state directory's node number; no index has that many nodes.
pub const STATE_DIR: Node = u32::MAX - 1;
/// The state file's.
pub const STATE_FILE: Node = u32::MAX - 2;
const STATE_NAME: &[u8] = b".stargz-snapshotter";
/// The state file is padded to this many bytes, so that its size never changes under a reader.
const STATE_BYTES: u64 = 1024;

/// Which extended attribute tells overlayfs that a directory hides those below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OpaqueXattr {
    /// `trusted.overlay.opaque`: overlay mounts made by root of the initial user namespace.
    #[default]
    Trusted,
    /// `user.overlay.opaque`: overlay mounts with `userxattr`.
    User,
    /// Both.
    Both,
}

const TRUSTED_OPAQUE: &[u8] = b"trusted.overlay.opaque";
const USER_OPAQUE: &[u8] = b"user.overlay.opaque";

impl OpaqueXattr {
    fn names(self) -> &'static [&'static [u8]] {
        match self {
            OpaqueXattr::Trusted => &[TRUSTED_OPAQUE],
            OpaqueXattr::User => &[USER_OPAQUE],
            OpaqueXattr::Both => &[TRUSTED_OPAQUE, USER_OPAQUE],
        }
    }
}

/// Finds a name in a directory.
pub fn lookup(layer: &Layer, dir: Node, name: &[u8]) -> Option<Node> {
    match dir {
        STATE_DIR => (name == state_file_name(layer).as_bytes()).then_some(STATE_FILE),
        0 if name == STATE_NAME => Some(STATE_DIR),
        _ => layer.index().lookup(dir, name),
    }
}

/// What `stat` says; `None` for a number that names no node.
pub fn attr(layer: &Layer, node: Node) -> Option<Attr> {
    let state = |kind, mode, nlink, size| {
        let changed = layer.changed();
        let mtime = ((changed / 1_000_000_000) as i64, (changed % 1_000_000_000) as u32);
        Attr { kind, mode, uid: 0, gid: 0, nlink, rdev: (0, 0), size, mtime }
    };
    match node {
        STATE_DIR => Some(state(Kind::Directory, 0o500, 2, 0)),
        STATE_FILE => Some(state(Kind::Regular, 0o400, 1, STATE_BYTES)),
        _ => layer.index().attr(node),
    }
}

/// The directory above a directory, itself for the root.
pub fn parent(layer: &Layer, dir: Node) -> Node {
    if dir == STATE_DIR { 0 } else { layer.index().parent(dir).unwrap_or(0) }
}

/// The entries of a directory from the `skip`-th on, without `.` and `..`.
pub fn entries(
    layer: &Layer,
    dir: Node,
    skip: usize,
) -> Box<dyn Iterator<Item = (Cow<'_, [u8]>, Node)> + '_> {
    if dir == STATE_DIR {
        let file = (skip == 0).then(|| (Cow::Owned(state_file_name(layer).into_bytes()), STATE_FILE));
        return Box::new(file.into_iter());
    }
    Box::new(layer.index().entries(dir, skip).map(|(name, node)| (Cow::Borrowed(name), node)))
}

/// An extended attribute's value.
pub fn xattr<'a>(layer: &'a Layer, node: Node, name: &[u8], opaque: OpaqueXattr) -> Option<&'a [u8]> {
    if opaque.names().contains(&name) {
        return layer.index().is_opaque(node).then_some(b"y");
    }
    own_xattrs(layer, node, opaque).find(|(n, _)| *n == name).map(|(_, value)| value)
}

/// The layer's own attributes, without those that would instruct an overlay made with `userxattr`.
fn own_xattrs(layer: &Layer, node: Node, opaque: OpaqueXattr) -> impl Iterator<Item = (&[u8], &[u8])> {
    let instructs = move |name: &[u8]| opaque != OpaqueXattr::Trusted && name.starts_with(b"user.overlay.");
    layer.index().xattrs(node).filter(move |(name, _)| !instructs(name))
}

/// The names of a node's extended attributes, each ended by NUL, as `listxattr` wants them.
pub fn xattr_names(layer: &Layer, node: Node, opaque: OpaqueXattr) -> Vec<u8> {
    let mut out = Vec::new();
    let own = own_xattrs(layer, node, opaque).map(|(name, _)| name);
    let markers = opaque.names().iter().copied().filter(|_| layer.index().is_opaque(node));
    for name in own.chain(markers) {
        out.extend_from_slice(name);
        out.push(0);
    }
    out
}

/// The state file's bytes: JSON, spaces, newline.
pub fn state_content(layer: &Layer) -> Vec<u8> {
    let mut text = layer.state_json().into_bytes();
    // The only part without bound is the last error; cutting inside it would break the JSON, so it is cut at its source.
    text.resize(STATE_BYTES as usize - 1, b' ');
    text.push(b'\n');
    text
}

fn state_file_name(layer: &Layer) -> String {
    format!("{}.json", layer.blob_digest())
}
