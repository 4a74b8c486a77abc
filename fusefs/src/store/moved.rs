//! Data files that were moved to their names in the layer's finished tree.
//!
//! A file moves once, from `data/<node>` to its first name in the unfinished tree, which is then renamed as a whole. Looked
//! for in this order it is always found, also while it moves.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::fs::{CWD, Mode, OFlags};

use crate::index::{Index, Node};

/// The tree while it is made.
pub(crate) const PARTIAL: &str = "fs.new";
/// The finished tree.
pub(crate) const TREE: &str = "fs";

/// Finds moved files. The names are made when a file is first looked for: by a container that began while the layer was
/// lazy.
#[derive(Debug)]
pub(super) struct Moved {
    names: OnceLock<FirstNames>,
    possible: AtomicBool,
}

impl Moved {
    /// Of the layer in `dir`.
    pub(super) fn of(dir: &Path) -> Moved {
        let possible = [PARTIAL, TREE].iter().any(|tree| dir.join(tree).exists());
        Moved { names: OnceLock::new(), possible: AtomicBool::new(possible) }
    }

    /// Whether any file was moved: mostly there is no use in looking.
    pub(super) fn is_possible(&self) -> bool {
        self.possible.load(Ordering::Acquire)
    }

    /// Files are about to be moved. To be said before the first is.
    pub(super) fn expect(&self) {
        self.possible.store(true, Ordering::Release);
    }

    /// Opens a moved file of the layer in `dir`; for writing only while the tree is unfinished: a finished one is in use.
    pub(super) fn open(&self, dir: &Path, index: &Index, node: Node, flags: OFlags) -> io::Result<File> {
        let mut missing = io::Error::from(io::ErrorKind::NotFound);
        let mut path = None;
        let trees: &[&str] = if flags.contains(OFlags::WRONLY) { &[PARTIAL] } else { &[PARTIAL, TREE] };
        for tree in trees {
            let root = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::openat(CWD, dir.join(tree), root, Mode::empty()).and_then(|root| {
                let path = path.get_or_insert_with(|| {
                    self.names.get_or_init(|| FirstNames::of(index)).path(index, node)
                });
                rustix::fs::openat(
                    root,
                    OsStr::from_bytes(path),
                    flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
                    Mode::empty(),
                )
            });
            match opened {
                Ok(file) => return Ok(file.into()),
                Err(error) => missing = error.into(),
            }
        }
        Err(missing)
    }
}

/// For each node the number of its first entry, [`u32::MAX`] for none, and the directory that has it.
#[derive(Debug)]
pub(crate) struct FirstNames(Vec<(u32, Node)>);

impl FirstNames {
    /// Of a layer: eight bytes a node.
    pub(crate) fn of(index: &Index) -> FirstNames {
        let mut names = vec![(u32::MAX, 0); index.nodes() as usize];
        for dir in 0..index.nodes() {
            for (entry, (_, node)) in (index.first_entry(dir)..).zip(index.entries(dir, 0)) {
                let name = &mut names[node as usize];
                if entry < name.0 {
                    *name = (entry, dir);
                }
            }
        }
        FirstNames(names)
    }

    /// The number of a node's first entry.
    pub(crate) fn entry(&self, node: Node) -> u32 {
        self.0[node as usize].0
    }

    /// The first name of a node, from the root.
    pub(crate) fn path(&self, index: &Index, node: Node) -> Vec<u8> {
        let mut parts = Vec::new();
        let mut at = node;
        while at != 0 {
            let (entry, dir) = self.0[at as usize];
            if entry == u32::MAX {
                // A marker has no name in the tree.
                return Vec::new();
            }
            parts.push(index.entry(entry).0);
            at = dir;
        }
        parts.reverse();
        parts.join(&b'/')
    }
}
