//! From the flat list of a TOC to a tree.
//!
//! Entries are placed by their cleaned names, implied parents included; a later entry for a name replaces the
//! attributes of an earlier one but keeps what lies below. When all are placed, landmarks are taken out, hard
//! links are followed to their files, and the tree is numbered depth-first. Nothing here recurses: neither the
//! depth of a path nor a chain of links costs stack.
//!
//! Rules that reject what a tar extraction would not create either, or what would be ambiguous: `..` in a name,
//! NUL in a name, a non-directory with something below it, a hard link to a directory, to nothing, or around in
//! a circle.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::IntoIter;
use std::mem;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::json::{self, Entry};
use super::payload::{Payload, unsigned};
use super::{Chunk, Digests, Inode, Kind, Landmark, Timestamp, Toc, TocJson, time};
use crate::error::shorten;
use crate::{Error, Limits};

const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
const TOC_NAME: &str = "stargz.index.json";

/// Index of the root in every list of nodes or inodes.
const ROOT: u32 = 0;

/// Parses and normalises `json`.
pub(super) fn build(json: &TocJson, digests: Digests, limits: &Limits) -> Result<Toc, Error> {
    let mut tree = Tree::new(Payload::new(json.format, json.toc_offset, digests, limits), limits);
    let tar_split = json::read(&json.bytes, |entry| tree.push(entry))?;
    let members = tree.payload.finish()?;
    let landmark = tree.take_landmarks()?;
    let lossy_names = tree.lossy_names;
    let (inodes, chunks) = tree.number()?;
    let TocJson { format, toc_offset, .. } = *json;
    Ok(Toc { format, toc_offset, inodes, chunks, members, landmark, lossy_names, tar_split })
}

struct Tree<'a, 'l> {
    limits: &'l Limits,
    payload: Payload<'a, 'l>,
    nodes: Vec<Node<'a>>,
    entries: u32,
    /// Where the previous entry's directory is, and how that was written: most entries have the same one.
    last_parent: (String, Place),
    user_names: BTreeMap<u32, Cow<'a, str>>,
    group_names: BTreeMap<u32, Cow<'a, str>>,
    lossy_names: bool,
}

/// A node and the number of components that lead to it.
#[derive(Clone, Copy)]
struct Place {
    node: u32,
    depth: u32,
}

/// What is known of one name.
struct Node<'a> {
    parent: u32,
    what: What<'a>,
    children: BTreeMap<Cow<'a, str>, u32>,
}

enum What<'a> {
    /// A directory that only entries below it have mentioned.
    Implied,
    /// An inode without children, link count and chunks yet; these come from `file` of the payload.
    Inode { inode: Inode, file: Option<u32> },
    /// Another name for the file at this path.
    HardLink(Cow<'a, str>),
}

impl Node<'_> {
    fn new(parent: u32) -> Self {
        Node { parent, what: What::Implied, children: BTreeMap::new() }
    }

    fn is_directory(&self) -> bool {
        match &self.what {
            What::Implied => true,
            What::Inode { inode, .. } => inode.kind == Kind::Directory,
            What::HardLink(_) => false,
        }
    }
}

impl<'a, 'l> Tree<'a, 'l> {
    fn new(payload: Payload<'a, 'l>, limits: &'l Limits) -> Self {
        Tree {
            limits,
            payload,
            nodes: vec![Node::new(ROOT)],
            entries: 0,
            last_parent: (String::new(), Place { node: ROOT, depth: 0 }),
            user_names: BTreeMap::new(),
            group_names: BTreeMap::new(),
            lossy_names: false,
        }
    }

    fn push(&mut self, entry: Entry<'a>) -> Result<(), Error> {
        self.entries = self.entries.saturating_add(1);
        if self.entries > self.limits.entries {
            return Err(Error::limit("TOC entries", self.entries.into(), self.limits.entries.into()));
        }
        if entry.kind == "chunk" {
            return self.payload.chunk(&entry);
        }
        let is_lossy = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
        self.lossy_names |= is_lossy(&entry.name)
            || is_lossy(&entry.link_name)
            || entry.xattrs.0.iter().any(|(name, _)| is_lossy(name));

        let node = match &entry.name {
            Cow::Borrowed(name) => self.place(name, &Cow::Borrowed),
            Cow::Owned(name) => self.place(name, &|component: &str| Cow::Owned(component.to_owned())),
        }?;
        let what = self.understand(entry)?;
        self.nodes[node as usize].what = what;
        Ok(())
    }

    /// Gives meaning to an entry that is not a chunk.
    fn understand(&mut self, mut entry: Entry<'a>) -> Result<What<'a>, Error> {
        for (field, value) in [
            ("size", entry.size),
            ("mode", entry.mode),
            ("offset", entry.offset),
            ("innerOffset", entry.inner_offset),
            ("chunkOffset", entry.chunk_offset),
            ("chunkSize", entry.chunk_size),
        ] {
            unsigned(&entry, field, value)?;
        }
        let uid = id(&entry, "uid", entry.uid)?;
        let gid = id(&entry, "gid", entry.gid)?;
        // Writers give the name of an id only where it changes, whatever the entry's type.
        // Their length is limited because one text is copied to many inodes.
        for name in [&entry.user_name, &entry.group_name] {
            within(name.len(), self.limits.name_bytes, "bytes of a user or group name of", &entry.name)?;
        }
        let user_name = remembered(&mut self.user_names, uid, mem::take(&mut entry.user_name));
        let group_name = remembered(&mut self.group_names, gid, mem::take(&mut entry.group_name));

        let bad = |why: String| Err(Error::entry(&entry.name, why));
        let kind = match &*entry.kind {
            "dir" => Kind::Directory,
            "reg" => Kind::Regular,
            "symlink" => Kind::Symlink,
            "char" => Kind::CharDevice,
            "block" => Kind::BlockDevice,
            "fifo" => Kind::Fifo,
            "hardlink" => return Ok(What::HardLink(mem::take(&mut entry.link_name))),
            "" => return bad("it has no type".to_owned()),
            other => return bad(format!("type {:?} is not known", shorten(other))),
        };
        let mtime = match &*entry.modtime {
            "" => Timestamp::default(),
            text => match time::parse(text) {
                Some(time) => time,
                None => return bad(format!("modtime {:?} is not an RFC 3339 time", shorten(text))),
            },
        };
        let mut inode = Inode {
            implied: false,
            kind,
            // The mode of a tar header may hold the file type too, depending on who wrote it.
            mode: (unsigned(&entry, "mode", entry.mode)? & 0o7777) as u32,
            uid,
            gid,
            mtime,
            xattrs: xattrs(&entry, self.limits)?,
            user_name,
            group_name,
            ..IMPLIED
        };
        let mut file = None;
        match kind {
            Kind::Regular => {
                let (number, size, digest) = self.payload.file(&entry)?;
                (inode.size, inode.digest, file) = (size, digest, Some(number));
            }
            Kind::Symlink => {
                let target = &entry.link_name;
                if target.is_empty() || target.contains('\0') {
                    return bad("its target is empty or holds NUL".to_owned());
                }
                within(
                    target.len(),
                    self.limits.link_target_bytes,
                    "bytes of the link target of",
                    &entry.name,
                )?;
                inode.size = target.len() as u64;
                inode.link_target = target.as_bytes().to_vec();
            }
            Kind::CharDevice | Kind::BlockDevice => {
                inode.rdev_major = id(&entry, "devMajor", entry.dev_major)?;
                inode.rdev_minor = id(&entry, "devMinor", entry.dev_minor)?;
            }
            Kind::Directory | Kind::Fifo => {}
        }
        Ok(What::Inode { inode, file })
    }

    /// The node for a name, made if need be. `own` turns a component of `name` into a key.
    fn place<'n>(&mut self, name: &'n str, own: &dyn Fn(&'n str) -> Cow<'a, str>) -> Result<u32, Error> {
        let end = name.trim_end_matches('/').rfind('/').map_or(0, |slash| slash + 1);
        let (parent, last) = name.split_at(end);
        if parent != self.last_parent.0 {
            let place = self.descend(Place { node: ROOT, depth: 0 }, parent, name, own)?;
            self.last_parent.0.clear();
            self.last_parent.0.push_str(parent);
            self.last_parent.1 = place;
        }
        self.descend(self.last_parent.1, last, name, own).map(|place| place.node)
    }

    /// Goes from `place` down `path`, a part of `name`.
    fn descend<'n>(
        &mut self,
        mut place: Place,
        path: &'n str,
        name: &str,
        own: &dyn Fn(&'n str) -> Cow<'a, str>,
    ) -> Result<Place, Error> {
        for component in components(path) {
            let component = component.map_err(|why| Error::entry(name, why))?;
            place.depth += 1;
            within(place.depth as usize, self.limits.path_depth.into(), "components of", name)?;
            place.node = match self.nodes[place.node as usize].children.get(component) {
                Some(&child) => child,
                None => {
                    within(component.len(), self.limits.name_bytes, "bytes of a component of", name)?;
                    within(self.nodes.len(), self.limits.entries.into(), "names in the tree, at", name)?;
                    let child = self.nodes.len() as u32;
                    self.nodes.push(Node::new(place.node));
                    self.nodes[place.node as usize].children.insert(own(component), child);
                    child
                }
            };
        }
        Ok(place)
    }

    /// The node at a path, if every component is valid and exists.
    fn find(&self, path: &str) -> Option<u32> {
        components(path).try_fold(ROOT, |node, component| {
            self.nodes[node as usize].children.get(component.ok()?).copied()
        })
    }

    /// The full name of a node, for messages.
    fn name(&self, mut node: u32) -> String {
        let mut components = Vec::new();
        while node != ROOT {
            let parent = self.nodes[node as usize].parent;
            let children = &self.nodes[parent as usize].children;
            components.extend(children.iter().find(|(_, child)| **child == node).map(|(name, _)| &**name));
            node = parent;
        }
        components.reverse();
        components.join("/")
    }

    /// Removes what builders add to the root of a layer.
    fn take_landmarks(&mut self) -> Result<Landmark, Error> {
        if let Some(node) = self.find(TOC_NAME)
            && !self.nodes[node as usize].is_directory()
        {
            self.nodes[ROOT as usize].children.remove(TOC_NAME);
        }
        let mut landmark = Landmark::Absent;
        // The second one wins, as it does in the format's first implementation.
        for name in [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK] {
            let Some(node) = self.nodes[ROOT as usize].children.remove(name) else {
                continue;
            };
            let What::Inode { file: Some(file), .. } = self.nodes[node as usize].what else {
                return Err(Error::entry(name, "a landmark must be a regular file"));
            };
            if name == NO_PREFETCH_LANDMARK {
                landmark = Landmark::NoPrefetch;
            } else if let Some(end) = self.payload.member_offset(file) {
                landmark = Landmark::Prefetch { end };
            }
        }
        Ok(landmark)
    }

    /// For every node the node whose inode it names: itself, or the file behind a hard link.
    fn follow_links(&self) -> Result<Vec<u32>, Error> {
        let bad = |node: u32, why: String| Err(Error::entry(&self.name(node), why));
        let mut targets: Vec<u32> = (0..self.nodes.len() as u32).collect();
        let mut links = Vec::new();
        for node in 0..self.nodes.len() as u32 {
            if let What::HardLink(path) = &self.nodes[node as usize].what {
                match self.find(path) {
                    Some(target) => targets[node as usize] = target,
                    None => {
                        let why = format!("hard link to {:?}, which does not exist", shorten(path));
                        return bad(node, why);
                    }
                }
                links.push(node);
            }
        }
        let mut files = targets.clone();
        for &link in &links {
            let (mut node, mut depth) = (link, 0);
            while let What::HardLink(_) = self.nodes[node as usize].what {
                node = targets[node as usize];
                depth += 1;
                if depth > links.len() {
                    return bad(link, "hard links lead around in a circle".to_owned());
                }
            }
            if depth > self.limits.link_depth as usize {
                let what = format!("hard links to go through from {:?}", self.name(link));
                return Err(Error::limit(what, depth as u64, self.limits.link_depth.into()));
            }
            if self.nodes[node as usize].is_directory() {
                return bad(link, format!("hard link to the directory {:?}", self.name(node)));
            }
            files[link as usize] = node;
        }
        Ok(files)
    }

    /// Numbers the inodes depth-first and lays out their chunks.
    fn number(mut self) -> Result<(Vec<Inode>, Vec<Chunk>), Error> {
        let misplaced = |node: &Node<'_>| !node.is_directory() && !node.children.is_empty();
        if let Some(node) = self.nodes.iter().position(misplaced) {
            let why = "it is not a directory, but other entries lie below it";
            return Err(Error::entry(&self.name(node as u32), why));
        }
        if !self.nodes[ROOT as usize].is_directory() {
            return Err(Error::entry("/", "the root is not a directory"));
        }
        let files = self.follow_links()?;

        let mut inodes: Vec<Inode> = Vec::with_capacity(self.nodes.len());
        let mut chunks = Vec::new();
        let mut numbers = vec![None; self.nodes.len()];
        // Directories on the way down, each with the children it has not come to yet.
        let mut path: Vec<(usize, IntoIter<Cow<'a, str>, u32>)> = Vec::new();
        inodes.push(self.take_inode(ROOT, ROOT, &mut chunks));
        path.push((0, mem::take(&mut self.nodes[ROOT as usize].children).into_iter()));
        while let Some((directory, children)) = path.last_mut() {
            let directory = *directory;
            let Some((name, node)) = children.next() else {
                path.pop();
                continue;
            };
            let node = files[node as usize];
            let number = match numbers[node as usize] {
                Some(number) => {
                    inodes[number as usize].nlink += 1;
                    number
                }
                None => {
                    let number = inodes.len() as u32;
                    inodes.push(self.take_inode(node, number, &mut chunks));
                    numbers[node as usize] = Some(number);
                    number
                }
            };
            inodes[directory].children.push((name.into_owned().into_bytes(), number));
            if inodes[number as usize].kind == Kind::Directory {
                inodes[directory].nlink += 1;
                path.push((number as usize, mem::take(&mut self.nodes[node as usize].children).into_iter()));
            }
        }
        Ok((inodes, chunks))
    }

    /// Moves out the inode of a node that is no hard link, under its number and with its first name.
    fn take_inode(&mut self, node: u32, number: u32, chunks: &mut Vec<Chunk>) -> Inode {
        let what = mem::replace(&mut self.nodes[node as usize].what, What::Implied);
        let What::Inode { mut inode, file } = what else {
            return IMPLIED;
        };
        if let Some(file) = file {
            let start = chunks.len() as u32; // one for an entry at most: limits.entries is an u32
            chunks.extend(self.payload.chunks(file, number));
            inode.chunks = start..chunks.len() as u32;
        }
        inode.nlink = if inode.kind == Kind::Directory { 2 } else { 1 };
        inode
    }
}

/// A directory that no entry describes.
const IMPLIED: Inode = Inode {
    kind: Kind::Directory,
    implied: true,
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: Timestamp { secs: 0, nanos: 0 },
    size: 0,
    rdev_major: 0,
    rdev_minor: 0,
    link_target: Vec::new(),
    xattrs: Vec::new(),
    nlink: 2,
    digest: None,
    children: Vec::new(),
    chunks: 0..0,
    user_name: String::new(),
    group_name: String::new(),
};

/// The components of a name or of a hard link's target, both relative to the root however they are written.
fn components(path: &str) -> impl Iterator<Item = Result<&str, &'static str>> {
    path.split('/').filter(|component| !matches!(*component, "" | ".")).map(|component| match component {
        ".." => Err("its name has a component `..`"),
        _ if component.contains('\0') => Err("its name holds NUL"),
        _ => Ok(component),
    })
}

/// Whether two names lead to the same place.
pub(super) fn same_path(one: &str, other: &str) -> bool {
    one == other || components(one).eq(components(other))
}

/// The name given here or else the last one given for `id`.
fn remembered<'a>(names: &mut BTreeMap<u32, Cow<'a, str>>, id: u32, name: Cow<'a, str>) -> String {
    if !name.is_empty() {
        names.insert(id, name);
    }
    names.get(&id).map(|name| name.to_string()).unwrap_or_default()
}

fn within(value: usize, limit: u64, what: &str, name: &str) -> Result<(), Error> {
    if value as u64 <= limit {
        return Ok(());
    }
    Err(Error::limit(format!("{what} {:?}", shorten(name)), value as u64, limit))
}

/// A 32-bit number: user, group or device.
fn id(entry: &Entry<'_>, field: &str, value: i64) -> Result<u32, Error> {
    let bad = |_| Error::entry(&entry.name, format!("{field} is {value}"));
    u32::try_from(value).map_err(bad)
}

/// Names and decoded values, sorted by name.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

fn xattrs(entry: &Entry<'_>, limits: &Limits) -> Result<Xattrs, Error> {
    let mut xattrs = Vec::with_capacity(entry.xattrs.0.len());
    let mut total = 0;
    for (name, value) in &entry.xattrs.0 {
        if name.is_empty() || name.contains('\0') {
            return Err(Error::entry(&entry.name, "the name of an xattr is empty or holds NUL"));
        }
        within(name.len(), limits.name_bytes, "bytes of the name of an xattr of", &entry.name)?;
        let value = STANDARD.decode(&**value).map_err(|error| {
            Error::entry(&entry.name, format!("the value of xattr {name:?} is not base64: {error}"))
        })?;
        total += name.len() + value.len();
        within(total, limits.xattr_bytes, "bytes of xattrs of", &entry.name)?;
        xattrs.push((name.as_bytes().to_vec(), value));
    }
    xattrs.sort();
    if let Some([(name, _), _]) = xattrs.array_windows().find(|[(one, _), (other, _)]| one == other) {
        let why = format!("xattr {:?} is given twice", String::from_utf8_lossy(name));
        return Err(Error::entry(&entry.name, why));
    }
    Ok(xattrs)
}
