//! What the bytes of a layer say: pure functions.

use std::collections::HashSet;

use estargz::{Compression, Digest, Error, Kind, Landmark, Limits, Toc, TocJson};
use serde::Serialize;

/// Bytes around each member: gzip's header and trailer (RFC 1952), or zstd's magic, headers of frame and block (RFC 8878).
fn around(format: estargz::Format) -> u64 {
    match format.compression() {
        Compression::Gzip => 18,
        Compression::Zstd => 12,
    }
}

/// What the manifest says of a layer's TOC digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// Nothing.
    Not,
    /// This.
    As(String),
    /// There is no manifest.
    Unknown,
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Format {
    /// eStargz.
    #[serde(rename = "eStargz")]
    Estargz,
    /// Its predecessor, without digests.
    #[serde(rename = "stargz")]
    Stargz,
    /// zstd with a table of contents.
    #[serde(rename = "zstd:chunked")]
    ZstdChunked,
    /// A tar in zstd.
    #[serde(rename = "zstd")]
    Zstd,
    /// A tar in gzip.
    #[serde(rename = "gzip")]
    Gzip,
    /// A tar.
    #[serde(rename = "tar")]
    Tar,
    /// Something else.
    #[serde(rename = "other")]
    Other,
}

impl Format {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Estargz => "eStargz",
            Self::Stargz => "stargz",
            Self::ZstdChunked => "zstd:chunked",
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
            Self::Tar => "tar",
            Self::Other => "other",
        }
    }
}

/// The format of a blob that begins with `head` (512 bytes), ends with `tail` (8 bytes) and has this table of contents.
///
/// Magic numbers: RFC 1952, RFC 8878, POSIX ustar; the ends of zstd:chunked's footers in both dialects are those of
/// containers/storage and stargz-snapshotter.
pub fn format(head: &[u8], tail: &[u8], toc: Option<&TocJson>) -> Format {
    match toc.map(TocJson::format) {
        Some(estargz::Format::EStargz) => return Format::Estargz,
        Some(estargz::Format::ZstdChunked) => return Format::ZstdChunked,
        Some(_) => return Format::Stargz,
        None => {}
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || head.starts_with(&[0x50, 0x2a, 0x4d, 0x18]) {
        return if matches!(tail, b"GNUlInUx" | b"GnUlInUx") { Format::ZstdChunked } else { Format::Zstd };
    }
    if head.starts_with(&[0x1f, 0x8b]) {
        Format::Gzip
    } else if head.get(257..262) == Some(b"ustar") {
        Format::Tar
    } else {
        Format::Other
    }
}

/// Whether Lazurite mounts a layer lazily.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lazy {
    /// It does.
    pub lazy: bool,
    /// The code of the reason if not, as in the daemon's log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// What that means, or what has to be true besides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Lazy {
    /// It is not mounted lazily.
    pub fn not(reason: &'static str, message: impl Into<String>) -> Self {
        Self { lazy: false, reason: Some(reason), message: Some(message.into()) }
    }

    /// What is wrong with a layer that is meant to be lazy; `None` for one that need not be, or cannot for its names.
    pub fn broken(&self, named: &Named) -> Option<String> {
        let meant = match named {
            Named::As(_) => self.reason != Some("lossy_names"),
            Named::Unknown => self.reason == Some("toc_invalid"),
            Named::Not => false,
        };
        let reason = self.reason.filter(|_| meant && !self.lazy)?;
        Some(format!("{reason}: {}", self.message.as_deref().unwrap_or("not lazy")))
    }
}

/// The daemon's decision on a layer of which this is known.
pub fn lazy(named: &Named, toc: Result<&TocJson, Error>, limits: &Limits) -> Lazy {
    let json = match (toc, named) {
        (Ok(json), _) => json,
        (Err(Error::NotEstargz { .. }), Named::Not) => {
            return Lazy::not("no_toc_digest", "it is an ordinary layer; convert the image");
        }
        (Err(error), Named::Not) => return Lazy::not("no_toc_digest", error.to_string()),
        (Err(error @ Error::NotEstargz { .. }), _) => return Lazy::not("not_estargz", error.to_string()),
        (Err(error), _) => return Lazy::not("toc_invalid", error.to_string()),
    };
    let (expected, message) = match named {
        Named::As(text) => match text.parse::<Digest>() {
            Ok(digest) => (digest, None),
            Err(error) => return Lazy::not("bad_labels", error.to_string()),
        },
        Named::Not => {
            let why = "the manifest does not name the TOC digest; convert the image, which keeps the layer";
            return Lazy::not("no_toc_digest", why);
        }
        Named::Unknown => (json.digest(), Some("if the manifest names the TOC digest".to_owned())),
    };
    match json.clone().verify(&expected, limits) {
        Ok(toc) if toc.lossy_names() => {
            Lazy::not("lossy_names", "it has names that are not UTF-8, which a TOC cannot tell")
        }
        Ok(_) => Lazy { lazy: true, reason: None, message },
        Err(error @ Error::TocDigestMismatch { .. }) => Lazy::not("verify_failed", error.to_string()),
        Err(error) => Lazy::not("toc_invalid", error.to_string()),
    }
}

/// What a table of contents holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Contents {
    /// Digest of the table's JSON.
    pub toc_digest: String,
    /// Digest of the JSON as it is compressed, by which podman names the table of zstd:chunked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toc_stored_digest: Option<String>,
    /// Bytes of the JSON.
    pub toc_json_bytes: u64,
    /// Names in the tree, without the root.
    pub entries: u64,
    /// Regular files.
    pub files: u64,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// Pieces that are verified on their own.
    pub chunks: u64,
    /// Pieces that are decompressed on their own.
    pub members: u64,
    /// What the layer says about prefetching.
    pub landmark: &'static str,
    /// Bytes of the blob that are to be prefetched.
    pub prefetch_bytes: u64,
    /// Paths of the files in them.
    pub prioritized: Vec<String>,
    /// Bytes of the blob that an ordinary layer would not have: the table, the footer, a frame for each member. What
    /// compressing files apart costs besides is not in it.
    pub overhead_bytes: u64,
}

/// Sums up a table of contents of a blob of `size` bytes.
pub fn contents(size: u64, json: &TocJson, toc: &Toc) -> Contents {
    let count = |items: usize| items as u64;
    let (landmark, prefetch_bytes) = match toc.landmark() {
        Landmark::Absent => ("absent", 0),
        Landmark::NoPrefetch => ("no prefetch", 0),
        Landmark::Prefetch { end } => ("prefetch", end),
    };
    let regular = || toc.inodes().iter().filter(|inode| inode.kind == Kind::Regular);
    let early: HashSet<u32> = toc
        .chunks()
        .iter()
        .filter(|chunk| toc.members()[chunk.member as usize].offset < prefetch_bytes)
        .map(|chunk| chunk.inode)
        .collect();
    let mut prioritized: Vec<(u64, String)> = names(toc)
        .into_iter()
        .filter(|(_, inode)| early.contains(inode))
        .map(|(path, inode)| {
            let first = toc.inodes()[inode as usize].chunks.start as usize;
            (toc.members()[toc.chunks()[first].member as usize].offset, path)
        })
        .collect();
    prioritized.sort();
    Contents {
        toc_digest: json.digest().to_string(),
        toc_stored_digest: json.stored_digest().map(|digest| digest.to_string()),
        toc_json_bytes: count(json.bytes().len()),
        entries: toc.inodes().iter().map(|inode| count(inode.children.len())).sum(),
        files: count(regular().count()),
        file_bytes: regular().map(|inode| inode.size).sum(),
        chunks: count(toc.chunks().len()),
        members: count(toc.members().len()),
        landmark,
        prefetch_bytes,
        prioritized: prioritized.into_iter().map(|(_, path)| path).collect(),
        overhead_bytes: size.saturating_sub(toc.toc_offset())
            + around(toc.format()) * count(toc.members().len()),
    }
}

/// Every name with its inode, each directory before what is in it.
pub fn names(toc: &Toc) -> Vec<(String, u32)> {
    let mut all = Vec::new();
    let mut directories = vec![(String::new(), 0)];
    while let Some((parent, inode)) = directories.pop() {
        for (name, child) in &toc.inodes()[inode as usize].children {
            let name = String::from_utf8_lossy(name);
            let path = if parent.is_empty() { name.into_owned() } else { format!("{parent}/{name}") };
            if toc.inodes()[*child as usize].kind == Kind::Directory {
                directories.push((path.clone(), *child));
            }
            all.push((path, *child));
        }
    }
    all.sort();
    all
}

/// One name of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct File {
    /// From the layer's root.
    pub path: String,
    /// What it is.
    pub kind: &'static str,
    /// Permissions, in octal.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Target of a symbolic link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Where its contents are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<Piece>,
}

/// A chunk of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// Offset of its member in the blob.
    pub offset: u64,
    /// Offset in the decompressed member.
    pub inner_offset: u64,
    /// Bytes, decompressed.
    pub size: u64,
    /// Its digest, if the table tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// Every name of a layer, sorted.
pub fn files(toc: &Toc) -> Vec<File> {
    let file = |(path, inode): (String, u32)| {
        let inode = &toc.inodes()[inode as usize];
        let chunks = &toc.chunks()[inode.chunks.start as usize..inode.chunks.end as usize];
        let kind = match inode.kind {
            Kind::Directory => "directory",
            Kind::Regular => "file",
            Kind::Symlink => "symlink",
            Kind::CharDevice => "character device",
            Kind::BlockDevice => "block device",
            Kind::Fifo => "fifo",
        };
        File {
            path,
            kind,
            mode: format!("{:04o}", inode.mode),
            uid: inode.uid,
            gid: inode.gid,
            size: inode.size,
            target: (inode.kind == Kind::Symlink)
                .then(|| String::from_utf8_lossy(&inode.link_target).into_owned()),
            chunks: chunks
                .iter()
                .map(|chunk| Piece {
                    offset: toc.members()[chunk.member as usize].offset,
                    inner_offset: chunk.inner_offset,
                    size: chunk.size,
                    digest: chunk.digest.map(|digest| digest.to_string()),
                })
                .collect(),
        }
    };
    names(toc).into_iter().map(file).collect()
}

#[cfg(test)]
mod tests;
