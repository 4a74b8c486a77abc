//! The index of a layer: its whole tree in one file that is mapped, never parsed.
//!
//! Owns: the on-disk form of a layer's metadata, its construction from a [`VerifiedToc`], and lookups in it.
//! May not: touch the network, know FUSE, or hold anything that changes while the layer is mounted.
//!
//! ```text
//! 0        8       12      16              24            64
//! +--------+-------+-------+---------------+-------------+----------------------------+
//! |LZRINDEX|version| crc32 | payload bytes |  reserved   | rkyv archive of `Data`     |
//! +--------+-------+-------+---------------+-------------+----------------------------+
//!            u32 LE  u32 LE     u64 LE         zero        aligned to 16 (map + 64)
//! ```
//!
//! Node numbers are the inode numbers of the TOC's tree (0 is the root), followed by one node for each whiteout in
//! tree order. The same TOC therefore always gives the same bytes, and inode numbers never change between runs:
//! the kernel may keep them for as long as it likes.
//!
//! Members are those that the TOC names, and one in front where the blob begins with headers alone. In zstd:chunked, where
//! headers may have frames of their own, a member is everything from a chunk's frame to the next chunk's.
//!
//! Here, and only here, OCI whiteouts become what overlayfs understands: `.wh.NAME` is a character device 0:0 called
//! NAME, `.wh..wh..opq` marks its directory opaque, other `.wh..wh.*` names (aufs bookkeeping) are dropped.
//!
//! Invariants: a file that opens has passed its checksum, the archive's own validation and [`Data::check`], so every
//! number in it points inside its table.

use std::{
    fs::File,
    io::{self, Write as _},
    ops::Range,
    path::Path,
};

use estargz::{ChunkSpec, Compression, Digest, Kind, Landmark, Toc, VerifiedToc};
use memmap2::Mmap;

mod build;

pub(crate) use build::{Name, bound, classify, is_privileged};

const MAGIC: &[u8; 8] = b"LZRINDEX";
/// Raised whenever the archive's layout changes; an index of another version is rebuilt from the registry.
const VERSION: u32 = 3;
const HEADER: usize = 64;

/// Why an index file cannot be used. The layer's index is then rebuilt from its TOC.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The file could not be read or written.
    #[error("layer index {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not an index of this version, or is damaged.
    #[error("layer index {path} cannot be used: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// The TOC describes more than an index can hold.
    #[error("layer is too large for an index: {0}")]
    TooLarge(&'static str),
}

/// One inode.
#[derive(rkyv::Archive, rkyv::Serialize, Debug)]
struct NodeRecord {
    kind: u8,
    opaque: bool,
    mode: u16,
    uid: u32,
    gid: u32,
    nlink: u32,
    /// Major in the high, minor in the low half.
    rdev: u64,
    size: u64,
    mtime: i64,
    mtime_nanos: u32,
    /// Directories: the directory above; other nodes: unused.
    parent: u32,
    /// Directories: first entry; regular files: first chunk; symbolic links: offset of the target in `strings`.
    first: u32,
    /// How many of them; for a link the target's length in bytes.
    count: u32,
    first_xattr: u32,
    xattrs: u32,
}

#[derive(rkyv::Archive, rkyv::Serialize, Debug)]
struct EntryRecord {
    name: u32,
    name_len: u32,
    node: u32,
}

#[derive(rkyv::Archive, rkyv::Serialize, Debug)]
struct XattrRecord {
    name: u32,
    name_len: u32,
    value: u32,
    value_len: u32,
}

#[derive(rkyv::Archive, rkyv::Serialize, Debug)]
struct ChunkRecord {
    file_offset: u64,
    size: u64,
    inner_offset: u64,
    node: u32,
    member: u32,
    digest: [u8; 32],
    zeros: bool,
}

#[derive(rkyv::Archive, rkyv::Serialize, Debug)]
struct MemberRecord {
    offset: u64,
    end: u64,
    /// Range in `member_chunks`.
    first: u32,
    count: u32,
}

/// A directory whose own attributes the layer does not tell.
#[derive(rkyv::Archive, rkyv::Serialize, Debug)]
struct ImpliedRecord {
    node: u32,
    /// Its path from the root, without leading slash; empty for the root.
    path: u32,
    path_len: u32,
}

/// The archive's root.
#[derive(rkyv::Archive, rkyv::Serialize, Debug, Default)]
struct Data {
    toc_digest: [u8; 32],
    /// Whether members are zstd frames; otherwise they are gzip members.
    zstd: bool,
    toc_offset: u64,
    /// Bytes `[0, prefetch_end)` of the blob are worth fetching at once; `None` where the layer has no landmark.
    prefetch_end: Option<u64>,
    nodes: Vec<NodeRecord>,
    /// Grouped by directory, sorted by name bytes in each group.
    entries: Vec<EntryRecord>,
    chunks: Vec<ChunkRecord>,
    /// Ascending by blob offset.
    members: Vec<MemberRecord>,
    /// Chunk numbers grouped by member, ascending by inner offset in each group.
    member_chunks: Vec<u32>,
    xattrs: Vec<XattrRecord>,
    /// Parents before their children.
    implied: Vec<ImpliedRecord>,
    strings: Vec<u8>,
}

/// A number of a node in one layer's index; 0 is the root directory.
pub type Node = u32;

/// What `stat` says of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Its type.
    pub kind: Kind,
    /// Permission, set-id and sticky bits (07777).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Hard links.
    pub nlink: u32,
    /// Device number of a device node, (major, minor).
    pub rdev: (u32, u32),
    /// Bytes; of a symbolic link the length of its target.
    pub size: u64,
    /// Modification time: seconds since the epoch and nanoseconds.
    pub mtime: (i64, u32),
}

/// One chunk of a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef {
    /// Its number in the layer.
    pub id: u32,
    /// The file it belongs to.
    pub node: Node,
    /// The member that holds it.
    pub member: u32,
    /// Where it starts in its file.
    pub file_offset: u64,
    /// Where it starts in its member's decoded bytes, and what it must hash to.
    pub spec: ChunkSpec,
    /// Whether its bytes are all zero, by the TOC's word.
    pub zeros: bool,
}

impl ChunkRef {
    /// The bytes of its file that it covers.
    pub fn file_range(&self) -> Range<u64> {
        self.file_offset..self.file_offset + self.spec.size
    }
}

/// A mapped index.
#[derive(Debug)]
pub struct Index {
    map: Mmap,
}

impl Index {
    /// Writes the index of `toc` to `path` (temporary name, rename) and opens it. It is not synced: a power cut that damages
    /// it is seen by its checksum, and costs an opening.
    pub fn create(path: &Path, toc: &VerifiedToc) -> Result<Index, IndexError> {
        let io = |source| IndexError::Io { path: path.display().to_string(), source };
        let bytes = Self::encode(toc)?;
        let tmp = path.with_extension("tmp");
        let mut file =
            File::options().read(true).write(true).create(true).truncate(true).open(&tmp).map_err(io)?;
        file.write_all(&bytes).map_err(io)?;
        std::fs::rename(&tmp, path).map_err(io)?;
        // Not checked like what was found: it is what was encoded a moment ago.
        Ok(Index { map: Self::map(&file).map_err(io)? })
    }

    /// The bytes of the index file: a pure function of the TOC.
    pub fn encode(toc: &VerifiedToc) -> Result<Vec<u8>, IndexError> {
        let data = build::build(toc, *toc.digest().as_bytes())?;
        let payload = rkyv::to_bytes::<rkyv::rancor::BoxedError>(&data)
            .map_err(|_| IndexError::TooLarge("archive offsets overflow"))?;
        let mut out = Vec::with_capacity(HEADER + payload.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
        out.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        out.resize(HEADER, 0);
        out.extend_from_slice(&payload);
        Ok(out)
    }

    /// Maps an index file and checks all of it. No network, no parsing: about a millisecond for 50,000 files.
    pub fn open(path: &Path) -> Result<Index, IndexError> {
        let io = |source| IndexError::Io { path: path.display().to_string(), source };
        let damaged = |why: String| IndexError::Damaged { path: path.display().to_string(), why };
        let map = File::open(path).and_then(|file| Self::map(&file)).map_err(io)?;
        let header = map.get(..HEADER).ok_or_else(|| damaged("shorter than its header".into()))?;
        if &header[..8] != MAGIC {
            return Err(damaged("not an index file".into()));
        }
        let u32_at =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if u32_at(8) != VERSION {
            return Err(damaged(format!("version {} where this program writes {VERSION}", u32_at(8))));
        }
        let len = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
        let payload = &map[HEADER..];
        if payload.len() as u64 != len {
            return Err(damaged(format!("{} bytes where its header says {len}", payload.len())));
        }
        if crc32fast::hash(payload) != u32_at(12) {
            return Err(damaged("checksum mismatch".into()));
        }
        let data = rkyv::access::<ArchivedData, rkyv::rancor::BoxedError>(payload)
            .map_err(|e| damaged(format!("invalid archive: {e}")))?;
        data.check().map_err(|why| damaged(why.into()))?;
        Ok(Index { map })
    }

    fn map(file: &File) -> io::Result<Mmap> {
        // SAFETY: index files are written once under a temporary name and never modified afterwards; they live in a
        // directory only root can write. Nothing else keeps them from being truncated under the map.
        unsafe { Mmap::map(file) }
    }

    fn data(&self) -> &ArchivedData {
        // SAFETY: these bytes were encoded by `create` or validated by `open`, the only constructors, and the map is
        // private to `self` and of a file that is never modified.
        unsafe { rkyv::access_unchecked::<ArchivedData>(&self.map[HEADER..]) }
    }

    /// The digest of the TOC this index was made from, as the image names it: of its JSON, or of that compressed.
    pub fn toc_digest(&self) -> Digest {
        Digest::from_bytes(self.data().toc_digest)
    }

    /// What the blob's members are compressed with.
    pub fn compression(&self) -> Compression {
        if self.data().zstd { Compression::Zstd } else { Compression::Gzip }
    }

    /// Where the payload members of the blob end and its TOC starts.
    pub fn toc_offset(&self) -> u64 {
        self.data().toc_offset.to_native()
    }

    /// Bytes `[0, n)` of the blob that its builder marked as needed first: `None` without any landmark,
    /// `Some(0)` for `.no.prefetch.landmark`.
    pub fn prefetch_end(&self) -> Option<u64> {
        self.data().prefetch_end.as_ref().map(|e| e.to_native())
    }

    /// How many nodes there are; valid numbers are below it.
    pub fn nodes(&self) -> u32 {
        self.data().nodes.len() as u32
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> u32 {
        self.data().chunks.len() as u32
    }

    /// How many members there are.
    pub fn members(&self) -> u32 {
        self.data().members.len() as u32
    }

    /// Sum of the sizes of all regular files, hard links counted once.
    pub fn content_bytes(&self) -> u64 {
        self.data().chunks.iter().map(|c| c.size.to_native()).sum()
    }

    fn node(&self, node: Node) -> Option<&ArchivedNodeRecord> {
        self.data().nodes.get(node as usize)
    }

    /// Attributes, or `None` for a number that names no node.
    pub fn attr(&self, node: Node) -> Option<Attr> {
        let n = self.node(node)?;
        let rdev = n.rdev.to_native();
        Some(Attr {
            kind: kind_of(n.kind),
            mode: n.mode.to_native(),
            uid: n.uid.to_native(),
            gid: n.gid.to_native(),
            nlink: n.nlink.to_native(),
            rdev: ((rdev >> 32) as u32, rdev as u32),
            size: n.size.to_native(),
            mtime: (n.mtime.to_native(), n.mtime_nanos.to_native()),
        })
    }

    /// Whether a directory hides what lower layers have at its path.
    pub fn is_opaque(&self, node: Node) -> bool {
        self.node(node).is_some_and(|n| n.opaque)
    }

    /// The directory above a directory (the root's is itself).
    pub fn parent(&self, dir: Node) -> Option<Node> {
        self.node(dir).map(|n| n.parent.to_native())
    }

    fn dirents(&self, dir: Node) -> &[ArchivedEntryRecord] {
        match self.node(dir) {
            Some(n) if kind_of(n.kind) == Kind::Directory => {
                let first = n.first.to_native() as usize;
                &self.data().entries[first..first + n.count.to_native() as usize]
            }
            _ => &[],
        }
    }

    fn string(&self, at: u32, len: u32) -> &[u8] {
        &self.data().strings[at as usize..at as usize + len as usize]
    }

    /// Directories that no entry of the layer describes, with their paths from the root; parents come first.
    pub fn implied(&self) -> impl Iterator<Item = (Node, &[u8])> {
        let implied = self.data().implied.iter();
        implied.map(|i| (i.node.to_native(), self.string(i.path.to_native(), i.path_len.to_native())))
    }

    /// Whether no entry of the layer describes this directory.
    pub fn is_implied(&self, dir: Node) -> bool {
        // They are found in the order of their numbers.
        self.data().implied.binary_search_by_key(&dir, |i| i.node.to_native()).is_ok()
    }

    /// Finds a name in a directory.
    pub fn lookup(&self, dir: Node, name: &[u8]) -> Option<Node> {
        self.lookup_entry(dir, name).map(|(_, node)| node)
    }

    /// Finds a name in a directory: the number of its entry in the layer, and its node.
    pub fn lookup_entry(&self, dir: Node, name: &[u8]) -> Option<(u32, Node)> {
        let entries = self.dirents(dir);
        let at = entries
            .binary_search_by(|e| self.string(e.name.to_native(), e.name_len.to_native()).cmp(name))
            .ok()?;
        Some((self.first_entry(dir) + at as u32, entries[at].node.to_native()))
    }

    /// The number of a directory's first entry. Entries are numbered through all directories in the order of their
    /// nodes.
    pub fn first_entry(&self, dir: Node) -> u32 {
        self.node(dir).map_or(0, |n| n.first.to_native())
    }

    /// How many directory entries there are; valid numbers are below it.
    pub fn all_entries(&self) -> u32 {
        self.data().entries.len() as u32
    }

    /// Name and node of an entry.
    ///
    /// # Panics
    /// If `entry` is not below [`Index::all_entries`].
    pub fn entry(&self, entry: u32) -> (&[u8], Node) {
        let e = &self.data().entries[entry as usize];
        (self.string(e.name.to_native(), e.name_len.to_native()), e.node.to_native())
    }

    /// The entries of a directory from the `skip`-th on, in name order, without `.` and `..`.
    pub fn entries(&self, dir: Node, skip: usize) -> impl Iterator<Item = (&[u8], Node)> {
        let entries = self.dirents(dir);
        entries[skip.min(entries.len())..]
            .iter()
            .map(|e| (self.string(e.name.to_native(), e.name_len.to_native()), e.node.to_native()))
    }

    /// The target of a symbolic link.
    pub fn link_target(&self, node: Node) -> Option<&[u8]> {
        let n = self.node(node)?;
        (kind_of(n.kind) == Kind::Symlink).then(|| self.string(n.first.to_native(), n.count.to_native()))
    }

    /// The extended attributes of a node, sorted by name.
    pub fn xattrs(&self, node: Node) -> impl Iterator<Item = (&[u8], &[u8])> {
        let range = self.node(node).map_or(0..0, |n| {
            let first = n.first_xattr.to_native() as usize;
            first..first + n.xattrs.to_native() as usize
        });
        self.data().xattrs[range].iter().map(|x| {
            (
                self.string(x.name.to_native(), x.name_len.to_native()),
                self.string(x.value.to_native(), x.value_len.to_native()),
            )
        })
    }

    /// The numbers of a regular file's chunks, ascending by offset and covering it without gap.
    pub fn file_chunks(&self, node: Node) -> Range<u32> {
        match self.node(node) {
            Some(n) if kind_of(n.kind) == Kind::Regular => {
                n.first.to_native()..n.first.to_native() + n.count.to_native()
            }
            _ => 0..0,
        }
    }

    /// The chunks of a regular file that overlap a byte range of it.
    pub fn chunks_in(&self, node: Node, bytes: Range<u64>) -> Range<u32> {
        let all = self.file_chunks(node);
        let table = &self.data().chunks[all.start as usize..all.end as usize];
        let from = table.partition_point(|c| c.file_offset.to_native() + c.size.to_native() <= bytes.start);
        let to = table.partition_point(|c| c.file_offset.to_native() < bytes.end);
        all.start + from as u32..all.start + to.max(from) as u32
    }

    /// A chunk by its number.
    ///
    /// # Panics
    /// If `id` is not below [`Index::chunks`].
    pub fn chunk(&self, id: u32) -> ChunkRef {
        let c = &self.data().chunks[id as usize];
        ChunkRef {
            id,
            node: c.node.to_native(),
            member: c.member.to_native(),
            file_offset: c.file_offset.to_native(),
            spec: ChunkSpec {
                inner_offset: c.inner_offset.to_native(),
                size: c.size.to_native(),
                digest: Digest::from_bytes(c.digest),
            },
            zeros: c.zeros,
        }
    }

    /// The bytes of the blob that hold a member; its compressed end may lie before `end`.
    ///
    /// # Panics
    /// If `member` is not below [`Index::members`].
    pub fn member_range(&self, member: u32) -> Range<u64> {
        let m = &self.data().members[member as usize];
        m.offset.to_native()..m.end.to_native()
    }

    /// The chunks a member holds, ascending by inner offset.
    ///
    /// # Panics
    /// If `member` is not below [`Index::members`].
    pub fn member_chunks(&self, member: u32) -> impl ExactSizeIterator<Item = u32> + '_ {
        let m = &self.data().members[member as usize];
        let first = m.first.to_native() as usize;
        self.data().member_chunks[first..first + m.count.to_native() as usize].iter().map(|c| c.to_native())
    }
}

impl ArchivedData {
    /// Every number points inside its table. The checksum makes this redundant against decay; it stands between a
    /// mistake in the builder and a panic in a read.
    fn check(&self) -> Result<(), &'static str> {
        let within = |first: u32, count: u32, len: usize| u64::from(first) + u64::from(count) <= len as u64;
        let (nodes, strings) = (self.nodes.len(), self.strings.len());
        if nodes == 0 || kind_of(self.nodes[0].kind) != Kind::Directory {
            return Err("no root directory");
        }
        for n in self.nodes.iter() {
            let table = match kind_of(n.kind) {
                Kind::Directory => self.entries.len(),
                Kind::Regular => self.chunks.len(),
                Kind::Symlink => strings,
                _ => usize::MAX,
            };
            if !within(n.first.to_native(), n.count.to_native(), table)
                || !within(n.first_xattr.to_native(), n.xattrs.to_native(), self.xattrs.len())
                || n.parent.to_native() as usize >= nodes
            {
                return Err("a node points outside its tables");
            }
        }
        let bad_entry = |e: &ArchivedEntryRecord| {
            e.node.to_native() as usize >= nodes
                || !within(e.name.to_native(), e.name_len.to_native(), strings)
        };
        let bad_xattr = |x: &ArchivedXattrRecord| {
            !within(x.name.to_native(), x.name_len.to_native(), strings)
                || !within(x.value.to_native(), x.value_len.to_native(), strings)
        };
        let bad_chunk = |c: &ArchivedChunkRecord| {
            c.node.to_native() as usize >= nodes || c.member.to_native() as usize >= self.members.len()
        };
        let bad_member = |m: &ArchivedMemberRecord| {
            m.end.to_native() < m.offset.to_native()
                || !within(m.first.to_native(), m.count.to_native(), self.member_chunks.len())
        };
        if self.entries.iter().any(bad_entry) {
            return Err("a directory entry points outside its tables");
        }
        if self.xattrs.iter().any(bad_xattr) {
            return Err("an extended attribute points outside its tables");
        }
        let bad_implied = |i: &ArchivedImpliedRecord| {
            i.node.to_native() as usize >= nodes
                || !within(i.path.to_native(), i.path_len.to_native(), strings)
        };
        if self.implied.iter().any(bad_implied) {
            return Err("an implied directory points outside its tables");
        }
        if self.chunks.iter().any(bad_chunk) || self.members.iter().any(bad_member) {
            return Err("a chunk or member points outside its tables");
        }
        if self.member_chunks.iter().any(|c| c.to_native() as usize >= self.chunks.len()) {
            return Err("a member names a chunk that does not exist");
        }
        Ok(())
    }
}

fn kind_code(kind: Kind) -> u8 {
    match kind {
        Kind::Directory => 0,
        Kind::Regular => 1,
        Kind::Symlink => 2,
        Kind::CharDevice => 3,
        Kind::BlockDevice => 4,
        Kind::Fifo => 5,
    }
}

fn kind_of(code: u8) -> Kind {
    match code {
        0 => Kind::Directory,
        1 => Kind::Regular,
        2 => Kind::Symlink,
        3 => Kind::CharDevice,
        4 => Kind::BlockDevice,
        _ => Kind::Fifo,
    }
}

fn prefetch_end(toc: &Toc) -> Option<u64> {
    match toc.landmark() {
        Landmark::Absent => None,
        Landmark::NoPrefetch => Some(0),
        Landmark::Prefetch { end } => Some(end),
    }
}
