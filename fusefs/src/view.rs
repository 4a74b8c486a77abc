//! A layer as one chain of snapshots shows it.
//!
//! A tar need not describe every directory it puts files in. What an unpack makes of such an *implied* directory depends
//! on the layers below: it takes mode and owner from the directory it covers. So the layer is shared, and the little
//! that differs from chain to chain is kept with the slot.
//!
//! Owns: that difference. May not: follow anything out of a directory it looks in.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use estargz::Kind;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

use crate::{
    fs,
    index::{Attr, Node},
    layer::Layer,
};

/// What a slot shows.
#[derive(Debug)]
pub struct View {
    layer: Arc<Layer>,
    adopted: Adopted,
    place: Occurrence,
}

/// Mode and owner of the directories that a layer does not describe, as a chain gives them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted(BTreeMap<Node, Owner>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    mode: u16,
    uid: u32,
    gid: u32,
}

impl Adopted {
    /// A node's attributes with what is adopted.
    pub fn over(&self, node: Node, attr: Attr) -> Attr {
        match self.0.get(&node) {
            Some(&Owner { mode, uid, gid }) => Attr { mode, uid, gid, ..attr },
            None => attr,
        }
    }
}

/// Whether the layer occurs in the chain below itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occurrence {
    /// It does not.
    First,
    /// It does: overlayfs refuses one directory as two lowers, so that this one keeps its slot.
    Repeated,
}

/// What lies below a layer in its chain.
#[derive(Debug)]
pub enum Lower {
    /// A lazy layer.
    View(Arc<View>),
    /// An unpacked one.
    Dir(PathBuf),
}

impl View {
    /// The layer above `below`, the nearest first. Blocking.
    pub fn new(layer: Arc<Layer>, below: &[Lower]) -> View {
        let implied = layer.index().implied();
        let adopted = implied.filter_map(|(node, path)| Some((node, covered(below, path)?))).map(
            |(node, mut owner)| {
                if node == 0 {
                    // The root's mode is the snapshotter's, not the layer's below.
                    owner.mode = 0o755;
                }
                (node, owner)
            },
        );
        let repeated = below.iter().any(|lower| match lower {
            Lower::View(view) => view.layer.digest() == layer.digest(),
            Lower::Dir(_) => false,
        });
        let place = if repeated { Occurrence::Repeated } else { Occurrence::First };
        View { adopted: Adopted(adopted.collect()), layer: layer.clone(), place }
    }

    /// What its chain gives the directories that the layer does not describe.
    pub fn adopted(&self) -> &Adopted {
        &self.adopted
    }

    /// The directory that can take this slot's place, if the layer is one that is right in this chain.
    pub fn graduated(&self) -> Option<&Path> {
        let graduated = self.layer.graduated()?;
        let fits = self.place == Occurrence::First && graduated.adopted == self.adopted;
        fits.then_some(&graduated.tree)
    }

    /// The layer.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// What `stat` says; `None` for a number that names no node.
    pub fn attr(&self, node: Node) -> Option<Attr> {
        Some(self.adopted.over(node, fs::attr(&self.layer, node)?))
    }

    /// What is at a path of this view alone.
    fn find(&self, path: &[u8]) -> Option<Attr> {
        let mut names = path.split(|&b| b == b'/').filter(|name| !name.is_empty());
        let node = names.try_fold(0, |dir, name| self.layer.index().lookup(dir, name))?;
        self.attr(node)
    }
}

/// The directory at a path in the nearest layer that has anything there.
fn covered(below: &[Lower], path: &[u8]) -> Option<Owner> {
    for lower in below {
        match lower {
            Lower::View(view) => {
                if let Some(Attr { kind, mode, uid, gid, .. }) = view.find(path) {
                    return (kind == Kind::Directory).then_some(Owner { mode, uid, gid });
                }
            }
            Lower::Dir(dir) => match look(dir, path) {
                Ok(Some(owner)) => return owner,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(dir = %dir.display(), %error, "cannot see what an implied directory covers");
                    return None;
                }
            },
        }
    }
    None
}

/// What is at a path below a directory, without following a link: `Some(None)` if it is no directory.
fn look(dir: &PathBuf, path: &[u8]) -> io::Result<Option<Option<Owner>>> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || -> rustix::io::Result<File> {
        let root = rustix::fs::openat(CWD, dir, flags | OFlags::DIRECTORY, Mode::empty())?;
        if path.is_empty() {
            return Ok(root.into());
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?.into())
    };
    let file = match open() {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        // A link or file on the way, or a lazy layer that is not attached: nothing is known.
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => return Ok(Some(None)),
        Err(error) => return Err(error.into()),
    };
    let stat = rustix::fs::statat(&file, c"", AtFlags::EMPTY_PATH)?;
    let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let owner = Owner { mode: (stat.st_mode & 0o7777) as u16, uid: stat.st_uid, gid: stat.st_gid };
    Ok(Some(is_dir.then_some(owner)))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn an_unpacked_layer_is_looked_at_without_leaving_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        fs::create_dir_all(root.join("tmp/deep")).unwrap();
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(root.join("file"), "").unwrap();
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        assert_eq!(look(&root, b"tmp").unwrap().unwrap().unwrap().mode, 0o1777);
        assert!(look(&root, b"tmp/deep").unwrap().unwrap().is_some());
        assert_eq!(look(&root, b"missing/x").unwrap(), None);
        for (path, why) in
            [("file", "a file"), ("file/x", "below a file"), ("link", "a link"), ("link/ssl", "through it")]
        {
            assert_eq!(look(&root, path.as_bytes()).unwrap(), Some(None), "{why}");
        }
        assert!(look(&root, b"").unwrap().unwrap().is_some());
    }
}
