//! The tar headers between the chunks of a member.
//!
//! A table of contents repeats what the tar's headers say; nothing but their comparison shows whether it does so truly.
//! Headers are read as an unpacker reads them (see the writer's tar reader). They are not verified by any digest.

use crate::Timestamp;
use crate::writer::Error;
use crate::writer::tar::{BLOCK, Kind, Reader};

/// An entry of a layer's tar, its extensions taken into account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// As in the tar: perhaps with `./` in front or `/` behind.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a symbolic or hard link; empty for all others.
    pub link: Vec<u8>,
    /// Permissions and set-uid, set-gid, sticky bits: `0o7777` at most.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Bytes of content; 0 unless a regular file.
    pub size: u64,
    /// Major and minor number; 0 unless a device.
    pub device: (u32, u32),
    /// Extended attributes, names and values, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where its content is.
    pub content: Content,
}

/// Where the content of an entry is that was met in a run of headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It has none.
    None,
    /// In the run: it is no chunk of the table of contents.
    Inside,
    /// It begins where the run ends.
    Behind,
}

/// Reads a run of headers: a part of a tar that begins with a header and ends with one, or with the tar.
///
/// # Errors
///
/// It is not a run of whole headers that an unpacker understands.
pub(crate) fn read(run: &[u8]) -> Result<Vec<TarEntry>, Error> {
    let (end, block) = (run.len() as u64, BLOCK as u64);
    let mut reader = Reader::new(run);
    let mut entries = Vec::new();
    let mut content_end = 0;
    while content_end < end {
        // Nothing behind the end of the archive is an entry to anyone.
        let Some(entry) = reader.next()? else { break };
        let at = reader.position();
        if reader.stored() != entry.size {
            return Err(Error::entry(&entry.name, "it has holes, which no eStargz layer has"));
        }
        content_end = at.saturating_add(entry.size.checked_next_multiple_of(block).unwrap_or(u64::MAX));
        let content = match entry.size {
            0 => Content::None,
            _ if at == end => Content::Behind,
            _ if content_end <= end => Content::Inside,
            _ => return Err(Error::entry(&entry.name, "its content is cut off")),
        };
        let mut xattrs = entry.xattrs;
        xattrs.reverse();
        // Stable: of one name the last comes first, and stays.
        xattrs.sort_by(|(one, _), (other, _)| one.cmp(other));
        xattrs.dedup_by(|(later, _), (first, _)| later == first);
        entries.push(TarEntry {
            name: entry.name,
            kind: entry.kind,
            link: entry.link,
            mode: (entry.mode & 0o7777) as u16,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            size: entry.size,
            device: entry.device,
            xattrs,
            content,
        });
        if content == Content::Behind {
            break;
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, kind: u8, size: u64, link: &str) -> Vec<u8> {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        for (at, value) in [(100, 0o104755), (108, 7), (116, 8), (329, 1), (337, 3)] {
            put(at, format!("{value:07o}").as_bytes());
        }
        put(124, format!("{size:011o}").as_bytes());
        put(136, format!("{:011o}", 1_700_000_000).as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.to_vec()
    }

    #[test]
    fn runs_end_with_a_header_a_content_or_the_archive() {
        let content = [b"x".as_slice(), &[0; BLOCK - 1]].concat();
        let landmark = [header(".prefetch.landmark", b'0', 1, ""), content].concat();
        let run = [
            header("./bin/", b'5', 0, ""),
            header("bin/sh", b'2', 0, "busybox"),
            landmark.clone(),
            header("dev/null", b'3', 0, ""),
            header("bin/busybox", b'0', 5000, ""),
        ];
        let entries = read(&run.concat()).unwrap();
        let told: Vec<_> = entries.iter().map(|e| (e.name.as_slice(), e.kind, e.size, e.content)).collect();
        assert_eq!(
            told,
            [
                (&b"./bin/"[..], Kind::Directory, 0, Content::None),
                (b"bin/sh", Kind::Symlink, 0, Content::None),
                (b".prefetch.landmark", Kind::Regular, 1, Content::Inside),
                (b"dev/null", Kind::CharDevice, 0, Content::None),
                (b"bin/busybox", Kind::Regular, 5000, Content::Behind),
            ]
        );
        assert_eq!((entries[1].link.as_slice(), entries[3].device), (&b"busybox"[..], (1, 3)));
        let first = &entries[0];
        assert_eq!((first.mode, first.uid, first.gid, first.mtime.secs), (0o4755, 7, 8, 1_700_000_000));

        let ended = [header("a", b'0', 0, ""), vec![0; 2 * BLOCK], b"whatever".to_vec()].concat();
        assert_eq!(read(&ended).unwrap().len(), 1);
        assert_eq!(read(b"").unwrap(), []);
        assert_eq!(read(&landmark).unwrap()[0].content, Content::Inside);
    }

    #[test]
    fn what_an_unpacker_would_not_read_is_an_error() {
        let whole = header("a", b'0', 0, "");
        let two = [header("a", b'0', 600, ""), vec![1; BLOCK]].concat();
        for run in [&whole[..100], &[1; BLOCK], &two, &[&whole[..], &[7; 10]].concat()] {
            assert!(read(run).is_err());
        }
    }
}
