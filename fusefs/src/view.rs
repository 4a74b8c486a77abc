//! A layer as one chain of snapshots shows it.
//!
//! A tar need not describe every directory it puts files in. What an unpack makes of such an *implied* directory depends
//! on the layers below: it takes mode and owner from the directory it covers. So the layer is shared, and the little
//! that differs from chain to chain is kept with the slot.
//!
//! Owns: that difference. May not: follow anything out of a directory it looks in.

use std::{collections::HashMap, fs::File, io, path::PathBuf, sync::Arc};

use estargz::Kind;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};

use crate::{
    fs,
    index::{Attr, Node},
    layer::Layer,
};

/// What a slot shows.
#[derive(Debug)]
pub struct View {
    layer: Arc<Layer>,
    adopted: HashMap<Node, Owner>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    mode: u16,
    uid: u32,
    gid: u32,
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
        View { adopted: adopted.collect(), layer: layer.clone() }
    }

    /// The layer.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// What `stat` says; `None` for a number that names no node.
    pub fn attr(&self, node: Node) -> Option<Attr> {
        let attr = fs::attr(&self.layer, node)?;
        Some(match self.adopted.get(&node) {
            Some(&Owner { mode, uid, gid }) => Attr { mode, uid, gid, ..attr },
            None => attr,
        })
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
