//! Turns a verified TOC into the tables of an index, whiteouts included.

use std::collections::HashMap;

use estargz::{Compression, Kind, Timestamp, Toc};

use super::{
    ChunkRecord, Data, EntryRecord, ImpliedRecord, IndexError, MemberRecord, NodeRecord, XattrRecord,
    kind_code, prefetch_end,
};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const AUFS: &[u8] = b".wh..wh.";

/// Attributes an unpack never takes from a layer: among them are those by which overlayfs is told where to look, and
/// a layer must not say that.
const PRIVILEGED: &[u8] = b"trusted.";

/// Whether an extended attribute is none of a layer's business.
pub(crate) fn is_privileged(name: &[u8]) -> bool {
    name.starts_with(PRIVILEGED)
}

/// Times outside of what 64 bits of nanoseconds since the epoch can say become the epoch, as in an unpack.
pub(crate) fn bound(time: Timestamp) -> Timestamp {
    const MAX: i64 = i64::MAX / 1_000_000_000;
    if (0..MAX).contains(&time.secs) { time } else { Timestamp { secs: 0, nanos: 0 } }
}

/// What a name in a layer's tar means to overlayfs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Name<'a> {
    /// Itself.
    Plain,
    /// That this name of the layers below is gone.
    Whiteout(&'a [u8]),
    /// That everything the layers below have in this directory is gone.
    Opaque,
    /// Nothing.
    Ignored,
}

/// The OCI image specification's layer rules, in the order containerd's unpacker applies them.
pub(crate) fn classify(name: &[u8]) -> Name<'_> {
    if name == OPAQUE {
        Name::Opaque
    } else if name.starts_with(AUFS) {
        Name::Ignored
    } else {
        match name.strip_prefix(WHITEOUT) {
            None => Name::Plain,
            // Of these no name can be hidden.
            Some(b"" | b"." | b"..") => Name::Ignored,
            Some(hidden) => Name::Whiteout(hidden),
        }
    }
}

/// Appends byte strings, keeping offsets within the index's 32 bits.
#[derive(Default)]
struct Strings(Vec<u8>);

impl Strings {
    fn push(&mut self, bytes: &[u8]) -> Result<(u32, u32), IndexError> {
        let at = u32::try_from(self.0.len()).map_err(|_| IndexError::TooLarge("more than 4 GiB of names"))?;
        let len =
            u32::try_from(bytes.len()).map_err(|_| IndexError::TooLarge("a string of more than 4 GiB"))?;
        self.0.extend_from_slice(bytes);
        Ok((at, len))
    }
}

pub(super) fn build(toc: &Toc, toc_digest: [u8; 32]) -> Result<Data, IndexError> {
    let mut strings = Strings::default();
    let mut xattrs = Vec::new();
    let mut nodes = Vec::with_capacity(toc.inodes().len());
    for inode in toc.inodes() {
        let first_xattr = number(xattrs.len())?;
        for (name, value) in inode.xattrs.iter().filter(|(name, _)| !is_privileged(name)) {
            let (name, name_len) = strings.push(name)?;
            let (value, value_len) = strings.push(value)?;
            xattrs.push(XattrRecord { name, name_len, value, value_len });
        }
        let mtime = bound(inode.mtime);
        let (first, count) = match inode.kind {
            Kind::Regular => (inode.chunks.start, inode.chunks.end - inode.chunks.start),
            Kind::Symlink => strings.push(&inode.link_target)?,
            _ => (0, 0),
        };
        nodes.push(NodeRecord {
            kind: kind_code(inode.kind),
            opaque: false,
            mode: (inode.mode & 0o7777) as u16,
            uid: inode.uid,
            gid: inode.gid,
            nlink: inode.nlink,
            rdev: u64::from(inode.rdev_major) << 32 | u64::from(inode.rdev_minor),
            size: if inode.kind == Kind::Directory { 0 } else { inode.size },
            mtime: mtime.secs,
            mtime_nanos: mtime.nanos,
            parent: 0,
            first,
            count,
            first_xattr,
            xattrs: number(xattrs.len())? - first_xattr,
        });
    }

    let mut entries = Vec::new();
    for (dir, inode) in toc.inodes().iter().enumerate().filter(|(_, i)| i.kind == Kind::Directory) {
        let mut names: Vec<(&[u8], u32)> = Vec::with_capacity(inode.children.len());
        for (name, child) in &inode.children {
            match classify(name) {
                Name::Plain => names.push((name, *child)),
                Name::Opaque => nodes[dir].opaque = true,
                Name::Ignored => {}
                // A layer that both removes and brings a name brings it.
                Name::Whiteout(hidden)
                    if inode.children.binary_search_by(|(n, _)| n.as_slice().cmp(hidden)).is_ok() => {}
                Name::Whiteout(hidden) => {
                    names.push((hidden, number(nodes.len())?));
                    let marker = &toc.inodes()[*child as usize];
                    nodes.push(whiteout(marker.uid, marker.gid));
                }
            }
            if classify(name) != Name::Plain {
                // The marker's own inode may have other, ordinary names: it no longer has this one.
                let marker = &mut nodes[*child as usize];
                marker.nlink = marker.nlink.saturating_sub(1);
            }
        }
        names.sort_unstable();
        nodes[dir].first = number(entries.len())?;
        nodes[dir].count = number(names.len())?;
        for (name, node) in names {
            if toc.inodes().get(node as usize).is_some_and(|i| i.kind == Kind::Directory) {
                nodes[node as usize].parent = number(dir)?;
            }
            let (name, name_len) = strings.push(name)?;
            entries.push(EntryRecord { name, name_len, node });
        }
    }

    // Directories and links in front of the first file are in a member of their own, which the TOC does not name.
    let first = toc.members().first().map_or(toc.toc_offset(), |member| member.offset);
    let headers = u32::from(first > 0);
    let chunks = toc
        .chunks()
        .iter()
        .map(|c| {
            // A `VerifiedToc` has a digest for every chunk.
            let digest = c.digest.ok_or(IndexError::TooLarge("a chunk without digest"))?;
            Ok(ChunkRecord {
                file_offset: c.file_offset,
                size: c.size,
                inner_offset: c.inner_offset,
                node: c.inode,
                member: c.member + headers,
                digest: *digest.as_bytes(),
                zeros: c.zeros,
            })
        })
        .collect::<Result<Vec<_>, IndexError>>()?;
    let (mut members, member_chunks) = members(toc)?;
    if headers > 0 {
        members.insert(0, MemberRecord { offset: 0, end: first, first: 0, count: 0 });
    }
    let mut implied = Vec::new();
    for (node, path) in implied_directories(toc)? {
        let (path, path_len) = strings.push(&path)?;
        implied.push(ImpliedRecord { node, path, path_len });
    }
    Ok(Data {
        toc_digest,
        zstd: toc.format().compression() == Compression::Zstd,
        toc_offset: toc.toc_offset(),
        prefetch_end: prefetch_end(toc),
        nodes,
        entries,
        chunks,
        members,
        member_chunks,
        xattrs,
        implied,
        strings: strings.0,
    })
}

/// What containerd's unpacker makes of a whiteout marker: `mknod(S_IFCHR, 0:0)` owned as the marker was.
fn whiteout(uid: u32, gid: u32) -> NodeRecord {
    NodeRecord {
        kind: kind_code(Kind::CharDevice),
        opaque: false,
        mode: 0,
        uid,
        gid,
        nlink: 1,
        rdev: 0,
        size: 0,
        mtime: 0,
        mtime_nanos: 0,
        parent: 0,
        first: 0,
        count: 0,
        first_xattr: 0,
        xattrs: 0,
    }
}

/// Paths grow with the square of the depth; a layer of a million directories of ordinary depth stays below this.
const MAX_PATHS: usize = 64 << 20;

/// Directories that no entry describes, with their paths. Inodes are numbered depth first, so that a directory's path is
/// known before its children are met.
fn implied_directories(toc: &Toc) -> Result<Vec<(u32, Vec<u8>)>, IndexError> {
    let mut found = Vec::new();
    if !toc.inodes().iter().any(|i| i.implied) {
        return Ok(found);
    }
    let mut total = 0;
    let mut paths: HashMap<u32, Vec<u8>> = HashMap::from([(0, Vec::new())]);
    for (dir, inode) in (0..).zip(toc.inodes()) {
        // Removed once it has been used: only directories on the way down are kept.
        let Some(path) = paths.remove(&dir) else { continue };
        for (name, child) in &inode.children {
            if toc.inodes()[*child as usize].kind == Kind::Directory {
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                total += path.len() + name.len() + 1;
                if total > MAX_PATHS {
                    return Err(IndexError::TooLarge("more than 64 MiB of paths of directories"));
                }
                paths.insert(*child, [path.as_slice(), slash, name].concat());
            }
        }
        if inode.implied {
            found.push((dir, path));
        }
    }
    Ok(found)
}

/// Groups chunks by the member that holds them.
fn members(toc: &Toc) -> Result<(Vec<MemberRecord>, Vec<u32>), IndexError> {
    let mut order: Vec<u32> = (0..number(toc.chunks().len())?).collect();
    order.sort_by_key(|&c| (toc.chunks()[c as usize].member, toc.chunks()[c as usize].inner_offset, c));
    let mut members: Vec<MemberRecord> = toc
        .members()
        .iter()
        .map(|m| MemberRecord { offset: m.offset, end: m.end, first: 0, count: 0 })
        .collect();
    for (at, &chunk) in order.iter().enumerate() {
        let member = &mut members[toc.chunks()[chunk as usize].member as usize];
        if member.count == 0 {
            member.first = number(at)?;
        }
        member.count += 1;
    }
    Ok((members, order))
}

fn number(n: usize) -> Result<u32, IndexError> {
    u32::try_from(n).map_err(|_| IndexError::TooLarge("more than 2^32 of something"))
}

#[cfg(test)]
mod tests {
    use estargz::Timestamp;

    use super::{Name, bound, classify};

    #[test]
    fn times_an_unpack_cannot_set_are_the_epoch() {
        let bounded = |secs, nanos| {
            let time = bound(Timestamp { secs, nanos });
            (time.secs, time.nanos)
        };
        assert_eq!(bounded(0, 0), (0, 0));
        assert_eq!(bounded(1_700_000_000, 5), (1_700_000_000, 5));
        assert_eq!(bounded(-1, 5), (0, 0));
        assert_eq!(bounded(i64::MAX, 0), (0, 0));
    }

    #[test]
    fn names_of_a_layer_are_classified_as_the_image_specification_says() {
        for (name, expected) in [
            (&b"etc"[..], Name::Plain),
            (b".wh.etc", Name::Whiteout(b"etc")),
            (b".wh..hidden", Name::Whiteout(b".hidden")),
            (b".wh..wh..opq", Name::Opaque),
            (b".wh..wh.plnk", Name::Ignored),
            (b".wh.", Name::Ignored),
            (b".wh..", Name::Ignored),
            (b".wh...", Name::Ignored),
            (b".wh....", Name::Whiteout(b"...")),
            (b"x.wh.y", Name::Plain),
            (b".w", Name::Plain),
        ] {
            assert_eq!(classify(name), expected, "{}", String::from_utf8_lossy(name));
        }
    }
}
