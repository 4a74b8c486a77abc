//! A complete layer becomes a plain directory: what an eager unpack would have made of it.
//!
//! ```text
//! layers/<TOC digest>/fs.new      the tree while it is made: directories, links and devices are made, data files moved in
//! layers/<TOC digest>/graduated   the record: what the tree took from the layers below (JSON)
//! layers/<TOC digest>/fs          the finished tree: fs.new, renamed once it and the record are durable
//! ```
//!
//! Owns: these three. May not: know slots or snapshots, or touch the mount.
//!
//! Each step may be the last before a crash, and can be done again over what it has left: a data file is either still
//! under its number or at its first name. The record is believed only where `fs` is, and `fs` exists only after
//! everything in it was synced.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use estargz::Kind;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    linkat, mkdirat, mknodat, openat, renameat, statat, symlinkat, unlinkat, utimensat,
};
use serde::{Deserialize, Serialize};

use crate::{
    fs as semantics,
    fs::OpaqueXattr,
    index::{Attr, Index, Node},
    layer::Layer,
    resolve::write_durably,
    store::{FirstNames, PARTIAL, TREE},
    view::Adopted,
};

const RECORD: &str = "graduated";
const VERSION: u32 = 1;

/// Why a layer could not become a directory. It goes on being lazy.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", path.display())]
pub struct GraduateError {
    /// What was being made.
    pub path: PathBuf,
    /// What the system said.
    pub error: io::Error,
}

/// A layer that is a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graduated {
    /// The directory.
    pub tree: PathBuf,
    /// What it took from the layers below: it is right only in chains where that is the same.
    pub adopted: Adopted,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    adopted: Adopted,
}

/// Whether the layer in `dir` is a directory already.
pub fn read(dir: &Path) -> Option<Graduated> {
    let tree = dir.join(TREE);
    if !tree.is_dir() {
        return None;
    }
    let record: Record = serde_json::from_slice(&fs::read(dir.join(RECORD)).ok()?).ok()?;
    (record.version == VERSION).then_some(Graduated { tree, adopted: record.adopted })
}

/// Makes a complete layer a directory, as a chain shows it that `adopted` this. Blocking.
///
/// # Errors
///
/// What has been made stays, and is used by the next attempt. Every file can still be read.
pub fn graduate(layer: &Layer, adopted: &Adopted, opaque: OpaqueXattr) -> Result<Graduated, GraduateError> {
    let dir = layer.store().dir();
    let held = layer.store().hold();
    if held.is_none() {
        return Err(GraduateError {
            path: dir.to_owned(),
            error: io::Error::other("the layer was given up"),
        });
    }
    let (partial, tree) = (dir.join(PARTIAL), dir.join(TREE));
    let at = |path: &Path| {
        let path = path.to_owned();
        move |error: io::Error| GraduateError { path, error }
    };
    layer.store().expect_moves();
    match fs::create_dir(&partial) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(&partial)(error)),
        _ => {}
    }
    let root = open_dir(CWD, &partial).map_err(at(&partial))?;
    let (index, names) = (layer.index(), FirstNames::of(layer.index()));
    let data = open_dir(CWD, layer.store().data()).map_err(at(layer.store().data()))?;
    Builder { layer, index, adopted, opaque, names, data, root }.build(&partial)?;

    let record = Record { version: VERSION, adopted: adopted.clone() };
    let text = serde_json::to_vec(&record).map_err(|error| at(&dir.join(RECORD))(error.into()))?;
    write_durably(&dir.join(RECORD), &text).map_err(at(&dir.join(RECORD)))?;
    let sync = || -> io::Result<()> {
        rustix::fs::syncfs(File::open(&partial)?)?;
        fs::rename(&partial, &tree)?;
        File::open(dir)?.sync_all()
    };
    sync().map_err(at(&tree))?;
    Ok(Graduated { tree, adopted: adopted.clone() })
}

fn open_dir(at: impl std::os::fd::AsFd, path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, path, flags, Mode::empty())?)
}

struct Builder<'a> {
    layer: &'a Layer,
    index: &'a Index,
    adopted: &'a Adopted,
    opaque: OpaqueXattr,
    names: FirstNames,
    data: OwnedFd,
    root: OwnedFd,
}

impl Builder<'_> {
    fn build(&self, shown: &Path) -> Result<(), GraduateError> {
        use std::os::unix::ffi::OsStrExt as _;
        let failed =
            |path: &[u8], error| GraduateError { path: shown.join(std::ffi::OsStr::from_bytes(path)), error };
        // Parents have lower numbers than their children.
        let mut dirs: Vec<(Node, Vec<u8>)> = Vec::new();
        for dir in (0..self.index.nodes()).filter(|&node| self.is_dir(node)) {
            let path = self.names.path(self.index, dir);
            self.directory(dir, &path)
                .map_err(|(name, error)| failed(&[&path[..], &name].join(&b'/'), error))?;
            dirs.push((dir, path));
        }
        // Last, because what is made in a directory changes its time.
        for (dir, path) in dirs.iter().rev() {
            let name: &[u8] = if path.is_empty() { b"." } else { path };
            self.times(&self.root, name, *dir).map_err(|error| failed(path, error))?;
        }
        Ok(())
    }

    fn is_dir(&self, node: Node) -> bool {
        self.index.attr(node).is_some_and(|attr| attr.kind == Kind::Directory)
    }

    /// Makes everything in a directory, and what is said of itself. An error comes with the name that it is about.
    fn directory(&self, dir: Node, path: &[u8]) -> Result<(), (Vec<u8>, io::Error)> {
        let own = |error: io::Error| (Vec::new(), error);
        let here = open_dir(&self.root, if path.is_empty() { b"." } else { path }).map_err(own)?;
        self.attributes(&here, b".", dir).map_err(own)?;
        let first = self.index.first_entry(dir);
        for (entry, (name, node)) in (first..).zip(self.index.entries(dir, 0)) {
            self.entry(&here, entry, name, node).map_err(|error| (name.to_vec(), error))?;
        }
        Ok(())
    }

    fn entry(&self, dir: &OwnedFd, entry: u32, name: &[u8], node: Node) -> io::Result<()> {
        let attr = self.attr(node)?;
        let first = self.names.entry(node);
        if attr.kind == Kind::Directory {
            return match mkdirat(dir, name, Mode::RWXU) {
                Err(rustix::io::Errno::EXIST) => Ok(()),
                made => Ok(made?),
            };
        }
        if entry != first {
            let path = self.names.path(self.index, node);
            return made_anew(dir, name, || linkat(&self.root, &path[..], dir, name, AtFlags::empty()));
        }
        let device = |kind| {
            let device = rustix::fs::makedev(attr.rdev.0, attr.rdev.1);
            made_anew(dir, name, || mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, device))
        };
        match attr.kind {
            Kind::Regular => self.file(dir, name, node, attr.size)?,
            Kind::Symlink => {
                let target = self.index.link_target(node).unwrap_or_default();
                made_anew(dir, name, || symlinkat(target, dir, name))?;
            }
            Kind::CharDevice => device(FileType::CharacterDevice)?,
            Kind::BlockDevice => device(FileType::BlockDevice)?,
            Kind::Fifo => device(FileType::Fifo)?,
            Kind::Directory => {}
        }
        self.attributes(dir, name, node)?;
        self.times(dir, name, node)
    }

    /// Moves a data file to its name.
    fn file(&self, dir: &OwnedFd, name: &[u8], node: Node, size: u64) -> io::Result<()> {
        match renameat(&self.data, node.to_string(), dir, name) {
            Err(rustix::io::Errno::NOENT) => {}
            moved => moved?,
        }
        if size == 0 {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?;
        }
        // Moved now, or by an earlier attempt.
        let found = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
        match is_file && u64::try_from(found.st_size).is_ok_and(|found| found == size) {
            true => Ok(()),
            false => Err(io::Error::other("the file's content is gone")),
        }
    }

    fn attr(&self, node: Node) -> io::Result<Attr> {
        let attr = semantics::attr(self.layer, node);
        let attr = attr.ok_or_else(|| io::Error::other("the index does not have the node"))?;
        Ok(self.adopted.over(node, attr))
    }

    /// Owner, mode and extended attributes, in the order in which one does not undo another.
    fn attributes(&self, dir: &OwnedFd, name: &[u8], node: Node) -> io::Result<()> {
        use std::os::fd::AsRawFd as _;
        let attr = self.attr(node)?;
        // A data file is root's; what is made in a directory with the set-group bit may not be.
        let is_roots = attr.kind == Kind::Regular && attr.size > 0;
        if !is_roots || (attr.uid, attr.gid) != (0, 0) {
            let (owner, group) = (Uid::from_raw(attr.uid), Gid::from_raw(attr.gid));
            chownat(dir, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if attr.kind != Kind::Symlink {
            chmodat(dir, name, Mode::from_raw_mode(attr.mode.into()), AtFlags::empty())?;
        }
        let names = semantics::xattr_names(self.layer, node, self.opaque);
        for xattr in names.split(|&byte| byte == 0).filter(|xattr| !xattr.is_empty()) {
            let value = semantics::xattr(self.layer, node, xattr, self.opaque).unwrap_or_default();
            let path = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
            match rustix::fs::lsetxattr(path, xattr, value, XattrFlags::empty()) {
                // containerd's unpack goes on without it, too.
                Err(rustix::io::Errno::OPNOTSUPP) => {
                    tracing::debug!(layer = %self.layer.digest(), node, "the file system lacks an extended attribute");
                }
                set => set?,
            }
        }
        Ok(())
    }

    fn times(&self, dir: &OwnedFd, name: &[u8], node: Node) -> io::Result<()> {
        let (secs, nanos) = self.attr(node)?.mtime;
        let time = Timespec { tv_sec: secs, tv_nsec: nanos.into() };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// Makes a name; one that an earlier attempt has made goes first.
fn made_anew(dir: &OwnedFd, name: &[u8], make: impl Fn() -> rustix::io::Result<()>) -> io::Result<()> {
    match make() {
        Err(rustix::io::Errno::EXIST) => {
            unlinkat(dir, name, AtFlags::empty())?;
            Ok(make()?)
        }
        made => Ok(made?),
    }
}
