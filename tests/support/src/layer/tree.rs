//! The tree a layer stands for, the tree a directory holds, and how they differ.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{Body, Entry, Layer};

/// File type of an [`Expect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular,
    /// Symbolic link.
    Symlink,
    /// Character device; 0:0 is a whiteout.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Socket: no tar has one, a directory might.
    Socket,
}

/// What is known of one path, whether told by a fixture or read from a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expect {
    /// Path from the root without leading slash; empty for the root.
    pub path: Vec<u8>,
    /// File type.
    pub kind: Kind,
    /// Permission bits, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds. Not compared for whiteouts, whose time no format defines.
    pub mtime: (i64, u32),
    /// Length of a file's contents or a link's target, 0 for all other types: file systems differ there.
    pub size: u64,
    /// Number of names; for directories two more than they have subdirectories.
    pub nlink: u64,
    /// Target of a symbolic link.
    pub link_target: Option<Vec<u8>>,
    /// Device number: major, minor. 0:0 for what is no device.
    pub rdev: (u32, u32),
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Lower hex digest of a regular file's contents.
    pub sha256: Option<String>,
    /// For what has several names, the first of them by byte order.
    pub same_as: Option<Vec<u8>>,
}

impl Expect {
    fn is_whiteout(&self) -> bool {
        self.kind == Kind::CharDevice && self.rdev == (0, 0)
    }
}

/// A tar name as a path from the root: `.`, `..` and repeated slashes resolved as in `path.Clean("/" + name)`.
pub(crate) fn clean(name: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts.join(b"/".as_slice())
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |slash| &path[..slash])
}

fn file_name(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(path, |slash| &path[slash + 1..])
}

fn show(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok("") => "/".to_owned(),
        Ok(text) => text.to_owned(),
        Err(_) => path.escape_ascii().to_string(),
    }
}

/// The finished tree by path, links not yet resolved, plus whiteouts and opaque directories.
struct Tree {
    nodes: BTreeMap<Vec<u8>, Entry>,
    whiteouts: BTreeMap<Vec<u8>, Entry>,
    opaque: BTreeSet<Vec<u8>>,
}

impl Tree {
    fn of(layer: &Layer) -> Tree {
        let mut tree = Tree { nodes: BTreeMap::new(), whiteouts: BTreeMap::new(), opaque: BTreeSet::new() };
        tree.nodes.insert(Vec::new(), implicit(b""));
        for entry in layer.entries() {
            let path = clean(&entry.name);
            let dir = parent(&path).to_vec();
            if let b"stargz.index.json" | b".prefetch.landmark" | b".no.prefetch.landmark" = path.as_slice() {
                continue;
            }
            match file_name(&path) {
                b".wh..wh..opq" => {
                    tree.make_dirs(&dir);
                    tree.opaque.insert(dir);
                }
                name if name.starts_with(b".wh.") => {
                    tree.make_dirs(&dir);
                    let gone = clean(&[dir.as_slice(), b"/", &name[4..]].concat());
                    tree.whiteouts.insert(gone, entry.clone());
                }
                _ => tree.insert(path, entry.clone()),
            }
        }
        let nodes = &tree.nodes;
        tree.whiteouts.retain(|path, _| !nodes.contains_key(path) && nodes.contains_key(parent(path)));
        tree.opaque.retain(|path| nodes.contains_key(path));
        tree
    }

    fn make_dirs(&mut self, path: &[u8]) {
        if let Some(found) = self.nodes.get(path) {
            assert!(found.body == Body::Directory, "fixture: {} is not a directory", show(path));
            return;
        }
        self.make_dirs(parent(path));
        self.nodes.insert(path.to_vec(), implicit(path));
    }

    fn insert(&mut self, path: Vec<u8>, entry: Entry) {
        if path.is_empty() {
            assert!(entry.body == Body::Directory, "fixture: the root is not a directory");
        } else {
            self.make_dirs(parent(&path));
        }
        if entry.body != Body::Directory {
            let inside = [path.as_slice(), b"/"].concat();
            self.nodes.retain(|other, _| !other.starts_with(&inside));
        }
        self.nodes.insert(path, entry);
    }

    /// Follows hard links to the path that holds the data.
    fn resolve<'a>(&'a self, path: &[u8]) -> (Vec<u8>, &'a Entry) {
        let mut at = path.to_vec();
        for _ in 0..=self.nodes.len() {
            let entry = self.nodes.get(&at);
            let entry =
                entry.unwrap_or_else(|| panic!("fixture: {} links to {}: missing", show(path), show(&at)));
            match &entry.body {
                Body::Hardlink(target) => at = clean(target),
                Body::Directory if at != path => panic!("fixture: {} links to a directory", show(path)),
                _ => return (at, entry),
            }
        }
        panic!("fixture: {} links in a circle", show(path))
    }
}

fn implicit(path: &[u8]) -> Entry {
    let mut entry = Entry::new(path, Body::Directory);
    entry.mtime = (0, 0);
    entry
}

pub(super) fn expected(layer: &Layer) -> Vec<Expect> {
    let tree = Tree::of(layer);
    let mut names: HashMap<Vec<u8>, Vec<Vec<u8>>> = HashMap::new();
    let mut subdirs: HashMap<Vec<u8>, u64> = HashMap::new();
    for (path, entry) in &tree.nodes {
        if entry.body == Body::Directory && !path.is_empty() {
            *subdirs.entry(parent(path).to_vec()).or_default() += 1;
        }
        names.entry(tree.resolve(path).0).or_default().push(path.clone());
    }

    let mut out: Vec<Expect> = Vec::new();
    for path in tree.nodes.keys() {
        let (data_path, entry) = tree.resolve(path);
        let mut expect = describe(path, entry);
        let shared = &names[&data_path];
        expect.nlink = shared.len() as u64;
        if shared.len() > 1 {
            expect.same_as = Some(shared[0].clone()); // BTreeMap order: the first by bytes
        }
        if expect.kind == Kind::Directory {
            expect.nlink = 2 + subdirs.get(path).copied().unwrap_or(0);
        }
        if tree.opaque.contains(path) {
            expect.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
        }
        out.push(expect);
    }
    for (path, entry) in &tree.whiteouts {
        let device = Entry { body: Body::Char(0, 0), mode: 0, xattrs: BTreeMap::new(), ..entry.clone() };
        out.push(describe(path, &device));
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    out
}

fn describe(path: &[u8], entry: &Entry) -> Expect {
    let mut expect = Expect {
        path: path.to_vec(),
        kind: Kind::Directory,
        mode: entry.mode & 0o7777,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        size: 0,
        nlink: 1,
        link_target: None,
        rdev: (0, 0),
        xattrs: entry.xattrs.clone(),
        sha256: None,
        same_as: None,
    };
    match &entry.body {
        Body::Directory => {}
        Body::Regular(data) => {
            expect.kind = Kind::Regular;
            expect.size = data.len() as u64;
            expect.sha256 = Some(crate::sha256_hex(data));
        }
        Body::Symlink(target) => {
            expect.kind = Kind::Symlink;
            expect.size = target.len() as u64;
            expect.link_target = Some(target.clone());
        }
        Body::Char(major, minor) => (expect.kind, expect.rdev) = (Kind::CharDevice, (*major, *minor)),
        Body::Block(major, minor) => (expect.kind, expect.rdev) = (Kind::BlockDevice, (*major, *minor)),
        Body::Fifo => expect.kind = Kind::Fifo,
        Body::Hardlink(_) => unreachable!("links were resolved"),
    }
    expect
}

pub(super) fn contents(layer: &Layer) -> BTreeMap<Vec<u8>, Bytes> {
    let tree = Tree::of(layer);
    let regular = tree.nodes.keys().filter_map(|path| match &tree.resolve(path).1.body {
        Body::Regular(data) => Some((path.clone(), data.clone())),
        _ => None,
    });
    regular.collect()
}

pub(super) fn plain(layer: &Layer) -> Layer {
    let tree = Tree::of(layer);
    // BTreeMap order puts parents before children; GNU tar sets directory times last by itself.
    let (links, others): (Vec<_>, Vec<_>) =
        tree.nodes.iter().partition(|(_, entry)| matches!(entry.body, Body::Hardlink(_)));
    let entries = others
        .into_iter()
        .map(|(path, entry)| {
            let slash: &[u8] = if entry.body == Body::Directory { b"/" } else { b"" };
            let start: &[u8] = if path.is_empty() { b"." } else { b"" };
            Entry { name: [start, path, slash].concat(), ..entry.clone() }
        })
        .chain(links.into_iter().map(|(path, _)| {
            let (target, entry) = tree.resolve(path);
            Entry { name: path.clone(), body: Body::Hardlink(target), ..entry.clone() }
        }))
        .collect();
    Layer { entries, long_names: layer.long_names }
}

/// Reads a directory tree as it is, sorted by path, the root (empty path) first. Follows no link, crosses mounts,
/// reads every file whole. Leaves out `security.selinux`, which belongs to the host. Paths may not be longer than
/// the system's limit of 4096 bytes.
///
/// # Errors
/// The first error of any call, with the path in its message.
pub fn walk(root: &Path) -> io::Result<Vec<Expect>> {
    let mut out = Vec::new();
    let mut first_names: HashMap<(u64, u64), Vec<usize>> = HashMap::new();
    let mut open = vec![Vec::new()];
    while let Some(path) = open.pop() {
        let full =
            if path.is_empty() { root.to_owned() } else { root.join(std::ffi::OsStr::from_bytes(&path)) };
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", full.display()));
        let (found, inode) = read_one(&full, &path).map_err(named)?;
        if found.kind == Kind::Directory {
            for child in std::fs::read_dir(&full).map_err(named)? {
                let name = child.map_err(named)?.file_name().into_vec();
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                open.push([path.as_slice(), slash, name.as_slice()].concat());
            }
        } else if found.nlink > 1 {
            first_names.entry(inode).or_default().push(out.len());
        }
        out.push(found);
    }
    for shared in first_names.into_values() {
        let first = shared.iter().map(|index| out[*index].path.clone()).min();
        for index in shared {
            out[index].same_as.clone_from(&first);
        }
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}

fn read_one(full: &Path, path: &[u8]) -> io::Result<(Expect, (u64, u64))> {
    let stat = std::fs::symlink_metadata(full)?;
    let file_type = stat.file_type();
    let kind = match () {
        () if file_type.is_dir() => Kind::Directory,
        () if file_type.is_symlink() => Kind::Symlink,
        () if file_type.is_char_device() => Kind::CharDevice,
        () if file_type.is_block_device() => Kind::BlockDevice,
        () if file_type.is_fifo() => Kind::Fifo,
        () if file_type.is_socket() => Kind::Socket,
        () => Kind::Regular,
    };
    let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
    let found = Expect {
        path: path.to_vec(),
        kind,
        mode: stat.mode() & 0o7777,
        uid: stat.uid(),
        gid: stat.gid(),
        mtime: (stat.mtime(), stat.mtime_nsec() as u32),
        size: if let Kind::Regular | Kind::Symlink = kind { stat.size() } else { 0 },
        nlink: stat.nlink(),
        link_target: match kind {
            Kind::Symlink => Some(std::fs::read_link(full)?.into_os_string().into_vec()),
            _ => None,
        },
        rdev: match device {
            true => (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev())),
            false => (0, 0),
        },
        xattrs: xattrs(full)?,
        sha256: if kind == Kind::Regular { Some(hash(full)?) } else { None },
        same_as: None,
    };
    Ok((found, (stat.dev(), stat.ino())))
}

fn xattrs(full: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    // The kernel's own limits of a list and of a value are 64 KiB each.
    let mut list = vec![0; 65_536];
    let length = match rustix::fs::llistxattr(full, list.as_mut_slice()) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut out = BTreeMap::new();
    for key in list[..length].split(|byte| *byte == 0) {
        if key.is_empty() || key == b"security.selinux" {
            continue;
        }
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(full, key, value.as_mut_slice())?;
        value.truncate(length);
        out.insert(key.to_vec(), value);
    }
    Ok(out)
}

fn hash(full: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut std::fs::File::open(full)?, &mut hasher)?;
    Ok(crate::hex(&hasher.finalize()))
}

/// One line per difference, empty when there is none: `<path>: <field>: expected X, found Y`. Both lists are
/// sorted by path.
pub fn diff(expected: &[Expect], actual: &[Expect]) -> String {
    let mut out = String::new();
    let found: BTreeMap<&[u8], &Expect> = actual.iter().map(|found| (found.path.as_slice(), found)).collect();
    let wanted: BTreeSet<&[u8]> = expected.iter().map(|expect| expect.path.as_slice()).collect();
    for expect in expected {
        match found.get(expect.path.as_slice()) {
            None => {
                let _ = writeln!(out, "{}: missing {:?}", show(&expect.path), expect.kind);
            }
            Some(found) => compare(expect, found, &mut out),
        }
    }
    for found in actual.iter().filter(|found| !wanted.contains(found.path.as_slice())) {
        let _ = writeln!(out, "{}: not expected {:?}", show(&found.path), found.kind);
    }
    out
}

fn compare(expect: &Expect, found: &Expect, out: &mut String) {
    let mut field = |name: &str, expected: String, found: String| {
        if expected != found {
            let _ = writeln!(out, "{}: {name}: expected {expected}, found {found}", show(&expect.path));
        }
    };
    let octal = |mode: u32| format!("{mode:04o}");
    let bytes = |value: &Option<Vec<u8>>| value.as_ref().map_or("none".to_owned(), |bytes| show(bytes));
    let time = |expect: &Expect| format!("{}.{:09}", expect.mtime.0, expect.mtime.1);
    let attributes = |expect: &Expect| {
        let one = |(key, value): (&Vec<u8>, &Vec<u8>)| format!("{}={}", show(key), value.escape_ascii());
        expect.xattrs.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    field("type", format!("{:?}", expect.kind), format!("{:?}", found.kind));
    field("mode", octal(expect.mode), octal(found.mode));
    field("uid", expect.uid.to_string(), found.uid.to_string());
    field("gid", expect.gid.to_string(), found.gid.to_string());
    if !expect.is_whiteout() {
        field("mtime", time(expect), time(found));
    }
    field("size", expect.size.to_string(), found.size.to_string());
    field("nlink", expect.nlink.to_string(), found.nlink.to_string());
    field("link target", bytes(&expect.link_target), bytes(&found.link_target));
    field("rdev", format!("{:?}", expect.rdev), format!("{:?}", found.rdev));
    field("xattrs", attributes(expect), attributes(found));
    field("sha256", format!("{:?}", expect.sha256), format!("{:?}", found.sha256));
    field("same file as", bytes(&expect.same_as), bytes(&found.same_as));
}

/// Panics with the [`diff`] of the two trees when there is one; shows at most its first 60 lines.
#[track_caller]
pub fn assert_same(expected: &[Expect], actual: &[Expect]) {
    let text = diff(expected, actual);
    let count = text.lines().count();
    let shown: Vec<&str> = text.lines().take(60).collect();
    assert!(count == 0, "the trees differ in {count} places:\n{}", shown.join("\n"));
}
