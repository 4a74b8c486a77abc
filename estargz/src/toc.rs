//! The table of contents: its JSON, and the tree it describes.
//!
//! [`TocJson`] is what a blob holds: decompressed, bounded, not trusted. Parsing it normalises the flat list of
//! tar-like entries into a [`Toc`]: a tree in which every inode appears once, with its chunks laid out. Whiteouts
//! (`.wh.*`) are ordinary entries here: what they mean is the file system's business.
//!
//! | module | owns |
//! |---|---|
//! | `unpack` | what is around the JSON |
//! | `json` | the JSON document, entry by entry |
//! | `tree` | names, duplicates, implied parents, hard links, numbering |
//! | `payload` | chunks and members: that they fit each other, their files and the blob |
//! | `time` | modification times |

mod json;
mod payload;
#[cfg(test)]
mod tests;
mod time;
mod tree;
mod unpack;

use std::fmt;
use std::ops::{Deref, Range};

use crate::footer::Footer;
use crate::{ChunkSpec, Digest, Error, Format, Limits};

/// The decompressed JSON of a TOC, and where in the blob it came from. Not trusted.
#[derive(Clone, PartialEq, Eq)]
pub struct TocJson {
    format: Format,
    toc_offset: u64,
    digest: Digest,
    /// Of the JSON as it is compressed, if that has a digest.
    stored_digest: Option<Digest>,
    bytes: Vec<u8>,
}

impl TocJson {
    /// Decompresses the TOC that `footer` points to, which is stored as `stored`.
    pub(crate) fn unpack(footer: &Footer, stored: &[u8], limits: &Limits) -> Result<Self, Error> {
        let at = footer.toc.start;
        let (bytes, stored_digest) = match footer.json {
            None => (unpack::gzip(at, stored, limits)?, None),
            Some(size) => (unpack::zstd(at, stored, size)?, Some(Digest::of(stored))),
        };
        Ok(TocJson { stored_digest, ..Self::new(footer.format, footer.payload_end, bytes) })
    }

    pub(crate) fn new(format: Format, toc_offset: u64, bytes: Vec<u8>) -> Self {
        TocJson { format, toc_offset, digest: Digest::of(&bytes), stored_digest: None, bytes }
    }

    /// Format of the blob, from its footer.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Blob offset at which the TOC member, or the frame around it, starts and the payload members end.
    pub fn toc_offset(&self) -> u64 {
        self.toc_offset
    }

    /// sha256 of the uncompressed JSON: what the image's manifest names in the layer's annotation
    /// `containerd.io/snapshot/stargz/toc.digest`.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// sha256 of the JSON as it is compressed in a zstd:chunked blob: what the image's manifest names in the layer's
    /// annotation `io.github.containers.zstd-chunked.manifest-checksum`. `None` for eStargz.
    pub fn stored_digest(&self) -> Option<Digest> {
        self.stored_digest
    }

    /// The JSON.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Compares the digest with a trusted one, then parses.
    ///
    /// The trusted one may be that of the JSON or that of its compressed form, as the layer's dialect has it: nobody can
    /// make one pass for the other.
    ///
    /// # Errors
    ///
    /// [`Error::TocDigestMismatch`] before anything is parsed; then as for [`parse`](TocJson::parse), and
    /// [`Error::BadEntry`] for a chunk without a digest.
    pub fn verify(self, expected: &Digest, limits: &Limits) -> Result<VerifiedToc, Error> {
        if self.digest != *expected && self.stored_digest != Some(*expected) {
            return Err(Error::TocDigestMismatch { expected: *expected, actual: self.digest });
        }
        let toc = tree::build(&self, Digests::Required, limits)?;
        Ok(VerifiedToc { toc, digest: *expected })
    }

    /// Parses without any trust, for tools that show what is in a blob.
    ///
    /// # Errors
    ///
    /// [`Error::BadJson`], [`Error::BadEntry`], [`Error::Limit`].
    pub fn parse(&self, limits: &Limits) -> Result<Toc, Error> {
        tree::build(self, Digests::Optional, limits)
    }
}

impl fmt::Debug for TocJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TocJson")
            .field("format", &self.format)
            .field("toc_offset", &self.toc_offset)
            .field("digest", &self.digest)
            .field("len", &self.bytes.len())
            .finish()
    }
}

/// Whether every chunk must have a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Digests {
    Required,
    Optional,
}

/// A [`Toc`] whose JSON had the trusted digest and gives a digest for every chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedToc {
    toc: Toc,
    digest: Digest,
}

impl VerifiedToc {
    /// The digest it was verified against.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

impl Deref for VerifiedToc {
    type Target = Toc;

    fn deref(&self) -> &Toc {
        &self.toc
    }
}

/// The tree of a layer and the layout of its payload.
///
/// The landmarks and an entry `stargz.index.json` in the root are not part of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toc {
    format: Format,
    toc_offset: u64,
    inodes: Vec<Inode>,
    chunks: Vec<Chunk>,
    members: Vec<Member>,
    landmark: Landmark,
    lossy_names: bool,
    tar_split: Option<Digest>,
}

impl Toc {
    /// Format of the blob.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Blob offset at which the TOC member, or the frame around it, starts and the payload members end.
    pub fn toc_offset(&self) -> u64 {
        self.toc_offset
    }

    /// All inodes. The first is the root directory; the others follow depth-first, children in the order of
    /// their names' bytes, so that equal TOCs have equal numbering. An inode with several names comes at the
    /// first of them.
    pub fn inodes(&self) -> &[Inode] {
        &self.inodes
    }

    /// All chunks, grouped by inode in the order of [`inodes`](Toc::inodes). Those of one inode ascend by
    /// `file_offset` and cover `0..size` without gap or overlap.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Every payload member that the TOC names, ascending; those of landmarks and of files that a later entry
    /// replaced are included.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// What the layer says about prefetching.
    pub fn landmark(&self) -> Landmark {
        self.landmark
    }

    /// Whether a name, link target or xattr name holds U+FFFD. The usual writer's JSON encoder puts it in the
    /// place of bytes that are not UTF-8, so the true names of such a layer cannot be told from its TOC.
    pub fn lossy_names(&self) -> bool {
        self.lossy_names
    }

    /// sha256 of the tar-split as it is compressed in the blob, where the TOC names it: podman's zstd:chunked since
    /// containers/storage 1.54.
    pub fn tar_split(&self) -> Option<Digest> {
        self.tar_split
    }

    /// Index of the inode at `path`, names separated by `/`, from the root. Symbolic links are not followed;
    /// empty components are skipped, `.` and `..` are names that do not exist.
    pub fn lookup(&self, path: impl AsRef<[u8]>) -> Option<u32> {
        path.as_ref().split(|&byte| byte == b'/').filter(|name| !name.is_empty()).try_fold(
            0,
            |inode, name| {
                let children = &self.inodes[inode as usize].children;
                let at = children.binary_search_by(|(child, _)| child.as_slice().cmp(name)).ok()?;
                Some(children[at].1)
            },
        )
    }
}

/// One file of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// What it is.
    pub kind: Kind,
    /// No entry describes it: a directory that only the names below it mention. Its attributes are stand-ins (0755,
    /// root, the epoch); an unpack gives it those of the directory it covers in the layers below, if there is one.
    pub implied: bool,
    /// Permissions and set-uid, set-gid, sticky bits: `0o7777` at most.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time; the epoch if the TOC gives none.
    pub mtime: Timestamp,
    /// Bytes: a regular file's size, a symbolic link's target length, otherwise 0.
    pub size: u64,
    /// Major device number; 0 unless a device.
    pub rdev_major: u32,
    /// Minor device number; 0 unless a device.
    pub rdev_minor: u32,
    /// Target of a symbolic link, as stored; empty for other kinds.
    pub link_target: Vec<u8>,
    /// Extended attributes, names and values, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Number of names; for a directory 2 plus the number of its subdirectories.
    pub nlink: u32,
    /// Digest of the whole file as the TOC claims it. Reading verifies chunks, not this; it is checked against
    /// the chunk's digest only if there is a single chunk.
    pub digest: Option<Digest>,
    /// Names and inode indices, sorted by the names' bytes; empty unless a directory.
    pub children: Vec<(Vec<u8>, u32)>,
    /// Range of [`Toc::chunks`]; empty unless a regular file of at least one byte.
    pub chunks: Range<u32>,
    /// Owner's name, empty if not known.
    pub user_name: String,
    /// Group's name, empty if not known.
    pub group_name: String,
}

/// Kinds of inodes. A tar cannot hold sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular,
    /// Symbolic link.
    Symlink,
    /// Character device; a whiteout of the overlay kind is one with device number 0:0.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
}

/// A point in time, relative to 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Whole seconds, rounded down.
    pub secs: i64,
    /// Nanoseconds in that second, below 1,000,000,000.
    pub nanos: u32,
}

/// A piece of a regular file that is compressed and verified on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The file: index into [`Toc::inodes`].
    pub inode: u32,
    /// Offset in the file, in bytes.
    pub file_offset: u64,
    /// Size in bytes, at least 1 and at most [`Limits::chunk_bytes`].
    pub size: u64,
    /// Where it is stored: index into [`Toc::members`].
    pub member: u32,
    /// Offset in the decompressed member, in bytes. No two chunks of a member overlap.
    pub inner_offset: u64,
    /// sha256 of the bytes. Never `None` in a [`VerifiedToc`].
    pub digest: Option<Digest>,
    /// Whether the TOC says that all bytes are zero, so that they need not be read (zstd:chunked only).
    pub zeros: bool,
}

impl Chunk {
    /// What [`decode_member`](crate::decode_member) needs to know of this chunk; `None` without a digest.
    pub fn spec(&self) -> Option<ChunkSpec> {
        let Chunk { inner_offset, size, digest, .. } = *self;
        digest.map(|digest| ChunkSpec { inner_offset, size, digest })
    }
}

/// A part of the blob that can be decoded from its start: gzip members or zstd frames, from one that the TOC names to the
/// next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Blob offset of its first byte.
    pub offset: u64,
    /// Blob offset at which it ends at the latest: the next member of the TOC or the TOC itself.
    pub end: u64,
}

/// What the layer's builder wants prefetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landmark {
    /// Nothing was said.
    Absent,
    /// `.no.prefetch.landmark`: nothing.
    NoPrefetch,
    /// `.prefetch.landmark`: the blob's bytes `0..end`, which hold the files that the builder put first.
    Prefetch {
        /// Blob offset of the landmark's own member.
        end: u64,
    },
}
