//! Whether a layer's table of contents tells the truth about its tar.
//!
//! A lazy layer shows what its TOC says, an eager unpack what the tar's headers say. Nothing makes the two agree, and a
//! layer becomes a plain directory only if they do. So headers are compared with the index as members are decoded, each
//! member by itself and in any order: where headers lie in a member follows from the chunks around them.
//!
//! ```text
//! member   | chunk of file A | padding, header, header, header of B | chunk of B | padding, header ... |
//!                            '--------------- run -----------------'
//! ```
//!
//! Owns the comparison (pure) and the marks of what was met. A layer has passed if every member was looked at and every
//! entry of the index was met. A tar that names something twice does not pass, nor one that hides files from the TOC:
//! that is a reason to stay lazy, never to refuse a read.

use std::ops::Range;

use estargz::{Content, DecodedMember, Kind, TarEntry, TarKind};

use crate::index::{self, Attr, Index, Name, Node};

/// Files that builders put into the root of a layer for their readers; no tree shows them.
const LANDMARKS: [&[u8]; 2] = [b".prefetch.landmark", b".no.prefetch.landmark"];
/// What the content of a landmark takes in a tar: one block, of which a byte is used.
const LANDMARK_BLOCK: u64 = BLOCK;
/// What everything in a tar is a multiple of, in bytes.
const BLOCK: u64 = 512;

/// A difference between the TOC and the tar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{entry:?}: {why}")]
pub struct Mismatch {
    /// The entry of the tar; empty where there is none.
    pub entry: String,
    /// What is different.
    pub why: String,
}

impl Mismatch {
    pub(crate) fn new(entry: &[u8], why: impl Into<String>) -> Mismatch {
        let entry = entry[..entry.len().min(200)].escape_ascii().to_string();
        Mismatch { entry, why: why.into() }
    }
}

/// Numbers of what an audit marks: members, then entries, then opaque directories by their nodes, then the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    members: u32,
    entries: u32,
    nodes: u32,
}

impl Marks {
    /// For a layer.
    pub fn of(index: &Index) -> Marks {
        Marks { members: index.members(), entries: index.all_entries(), nodes: index.nodes() }
    }

    /// How many marks there are.
    pub fn count(self) -> u64 {
        u64::from(self.members) + u64::from(self.entries) + u64::from(self.nodes) + 1
    }

    /// The member was looked at, and nothing in it contradicts the TOC.
    pub fn member(self, member: u32) -> u64 {
        member.into()
    }

    fn entry(self, entry: u32) -> u64 {
        u64::from(self.members) + u64::from(entry)
    }

    fn opaque(self, dir: Node) -> u64 {
        u64::from(self.members) + u64::from(self.entries) + u64::from(dir)
    }

    fn root(self) -> u64 {
        self.count() - 1
    }
}

/// The marks that a layer needs to pass, but for those of its members.
pub fn required(index: &Index) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let marks = Marks::of(index);
    let described = !index.is_implied(0);
    let entries = (0..index.all_entries()).filter_map(move |entry| {
        let (name, node) = index.entry(entry);
        (!index.is_implied(node)).then(|| (marks.entry(entry), name.to_vec()))
    });
    let opaque = (0..index.nodes())
        .filter(|&node| index.is_opaque(node))
        .map(move |node| (marks.opaque(node), b"an opaque directory's marker".to_vec()));
    entries.chain(opaque).chain(described.then(|| (marks.root(), b"/".to_vec())))
}

/// Compares the headers in a member with the index, and calls `mark` for all that was met, last for the member itself.
///
/// # Errors
///
/// The first difference.
pub fn member(
    index: &Index,
    member: u32,
    decoded: &DecodedMember,
    mut mark: impl FnMut(u64),
) -> Result<(), Mismatch> {
    let marks = Marks::of(index);
    // What precedes the first chunk: nothing, or the content of a landmark, or in the first member the tar's begin.
    let mut at = if member == 0 { 0 } else { LANDMARK_BLOCK };
    let mut before = Before::Finished;
    for (n, chunk) in index.member_chunks(member).map(|chunk| index.chunk(chunk)).enumerate() {
        let start = chunk.spec.inner_offset;
        if n > 0 || start > 0 {
            let next = Next::Chunk { node: chunk.node, offset: chunk.file_offset };
            run(index, decoded, at..start, before, next, marks, &mut mark)?;
        } else if member == 0 {
            return Err(Mismatch::new(b"", "the layer begins without a header"));
        }
        let size = index.attr(chunk.node).map_or(0, |attr| attr.size);
        let end = chunk.file_range().end;
        (before, at) = match end < size {
            true => (Before::Unfinished { node: chunk.node, end }, start + chunk.spec.size),
            false => (Before::Finished, (start + chunk.spec.size).saturating_add(padding(size))),
        };
    }
    let rest = at.min(decoded.len())..decoded.len();
    run(index, decoded, rest, before, next_member(index, member), marks, &mut mark)?;
    mark(marks.member(member));
    Ok(())
}

/// What fills the last block of a file.
fn padding(size: u64) -> u64 {
    (BLOCK - size % BLOCK) % BLOCK
}

/// What comes before a run of headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// Whole files.
    Finished,
    /// A file of which there is more.
    Unfinished { node: Node, end: u64 },
}

/// What must follow a run of headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// A part of this file.
    Chunk { node: Node, offset: u64 },
    /// What the TOC does not name: a landmark's content.
    Hidden,
    /// The table of contents itself.
    Toc,
}

fn next_member(index: &Index, member: u32) -> Next {
    if member + 1 == index.members() {
        return Next::Toc;
    }
    match index.member_chunks(member + 1).next().map(|chunk| index.chunk(chunk)) {
        Some(chunk) if chunk.spec.inner_offset == 0 => {
            Next::Chunk { node: chunk.node, offset: chunk.file_offset }
        }
        _ => Next::Hidden,
    }
}

/// One run of headers, and that what follows it belongs to its last entry.
fn run(
    index: &Index,
    decoded: &DecodedMember,
    range: Range<u64>,
    before: Before,
    next: Next,
    marks: Marks,
    mark: &mut impl FnMut(u64),
) -> Result<(), Mismatch> {
    if let Before::Unfinished { node, end } = before {
        // No headers lie between the pieces of a file.
        return match range.is_empty() && next == (Next::Chunk { node, offset: end }) {
            true => Ok(()),
            false => Err(Mismatch::new(b"", "the pieces of a file do not follow one another")),
        };
    }
    let entries = decoded
        .headers(range)
        .map_err(|error| Mismatch::new(b"", format!("a header cannot be read: {error}")))?;
    let mut behind = None;
    for entry in &entries {
        let node = one(index, entry, marks, mark)?;
        if entry.content == Content::Behind {
            behind = Some((entry, node));
        }
    }
    let fits = match (next, behind) {
        (Next::Toc, None) => true,
        (Next::Hidden, Some((entry, None))) => entry.size <= LANDMARK_BLOCK,
        (Next::Chunk { node, offset: 0 }, Some((_, Some(found)))) => node == found,
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let name = entries.last().map_or(&b""[..], |entry| &entry.name);
    Err(Mismatch::new(name, "its content is not what the TOC puts there"))
}

/// Compares one entry; its node, unless it is a landmark or a marker.
fn one(
    index: &Index,
    entry: &TarEntry,
    marks: Marks,
    mark: &mut impl FnMut(u64),
) -> Result<Option<Node>, Mismatch> {
    let differs = |what: &str| Mismatch::new(&entry.name, format!("{what} differs from the TOC's"));
    let path: Vec<&[u8]> = components(&entry.name);
    let Some((name, dirs)) = path.split_last() else {
        attributes(index, 0, entry, &differs)?;
        mark(marks.root());
        return Ok(Some(0));
    };
    if dirs.is_empty() && LANDMARKS.contains(name) && entry.kind == TarKind::Regular {
        return match entry.size <= LANDMARK_BLOCK {
            true => Ok(None),
            false => Err(Mismatch::new(&entry.name, "a landmark of more than a block")),
        };
    }
    if entry.content == Content::Inside {
        return Err(Mismatch::new(&entry.name, "the TOC does not know its content"));
    }
    let dir = dirs.iter().try_fold(0, |dir, name| index.lookup(dir, name));
    let missing = || Mismatch::new(&entry.name, "the TOC does not have it");
    let dir = dir.ok_or_else(missing)?;
    match index::classify(name) {
        Name::Plain => {}
        Name::Ignored => return Ok(None),
        Name::Opaque if index.is_opaque(dir) => {
            mark(marks.opaque(dir));
            return Ok(None);
        }
        Name::Opaque => return Err(missing()),
        Name::Whiteout(hidden) => {
            let (number, node) = index.lookup_entry(dir, hidden).ok_or_else(missing)?;
            let attr = index.attr(node).ok_or_else(missing)?;
            // Otherwise the layer brings the name itself.
            if attr.kind == Kind::CharDevice && attr.rdev == (0, 0) {
                if (attr.uid, attr.gid) != (entry.uid, entry.gid) {
                    return Err(differs("owner"));
                }
                mark(marks.entry(number));
            }
            return Ok(None);
        }
    }
    let (number, node) = index.lookup_entry(dir, name).ok_or_else(missing)?;
    attributes(index, node, entry, &differs)?;
    mark(marks.entry(number));
    Ok(Some(node))
}

fn attributes(
    index: &Index,
    node: Node,
    entry: &TarEntry,
    differs: &dyn Fn(&str) -> Mismatch,
) -> Result<(), Mismatch> {
    let attr: Attr = index.attr(node).ok_or_else(|| differs("name"))?;
    let kind = match entry.kind {
        TarKind::Directory => Kind::Directory,
        TarKind::Regular => Kind::Regular,
        TarKind::Symlink => Kind::Symlink,
        TarKind::CharDevice => Kind::CharDevice,
        TarKind::BlockDevice => Kind::BlockDevice,
        TarKind::Fifo => Kind::Fifo,
        TarKind::HardLink => {
            let target = components(&entry.link);
            let target = target.iter().try_fold(0, |dir, name| index.lookup(dir, name));
            if target != Some(node) || attr.kind == Kind::Directory {
                return Err(differs("link target"));
            }
            attr.kind
        }
    };
    if kind != attr.kind || index.is_implied(node) {
        return Err(differs("type"));
    }
    // An unpack sets these also for what is only another name.
    if entry.mode != attr.mode {
        return Err(differs("mode"));
    }
    if (entry.uid, entry.gid) != (attr.uid, attr.gid) {
        return Err(differs("owner"));
    }
    let mtime = index::bound(entry.mtime);
    // Most builders' tables have whole seconds; some round them up.
    let rounded = mtime.secs.saturating_add(i64::from(mtime.nanos >= 500_000_000));
    let same = match attr.mtime {
        (secs, 0) => secs == mtime.secs || secs == rounded,
        (secs, nanos) => (secs, nanos) == (mtime.secs, mtime.nanos),
    };
    if !same {
        return Err(differs("modification time"));
    }
    if entry.kind == TarKind::HardLink {
        return Ok(());
    }
    match kind {
        Kind::Regular if entry.size != attr.size => return Err(differs("size")),
        Kind::Symlink if index.link_target(node) != Some(&entry.link) => return Err(differs("link target")),
        Kind::CharDevice | Kind::BlockDevice if entry.device != attr.rdev => {
            return Err(differs("device number"));
        }
        _ => {}
    }
    let own = entry.xattrs.iter().filter(|(name, _)| !index::is_privileged(name));
    match own.map(|(name, value)| (&name[..], &value[..])).eq(index.xattrs(node)) {
        true => Ok(()),
        false => Err(differs("an extended attribute")),
    }
}

/// The components of a name or of a hard link's target, both relative to the root however they are written.
fn components(path: &[u8]) -> Vec<&[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect()
}
