//! Layer fixtures: what a test wants in a layer, said once, and everything that follows from it.
//!
//! A [`Layer`] is an ordered list of tar entries. It knows its tar bytes ([`Layer::tar`]), the tree an unpack
//! of them gives ([`Layer::expected`]) and nothing of any layer format; [`crate::estargz`] encodes it. Trees that
//! were mounted or unpacked are read back with [`walk`] and compared with [`diff`] or [`assert_same`].
//!
//! Nothing here uses the crates under test: two independent readings of the same rules have to agree.
//!
//! Paths are bytes and are written into the tar as given (`./etc/passwd` stays so); a directory gets the trailing
//! slash that tar writers give it. Attribute methods (`mode`, `owner`, `xattr`, ...) change the entry added last.

mod generate;
mod tar;
mod tree;

use std::collections::BTreeMap;
use std::io::Write;

use bytes::Bytes;

pub use generate::{Xorshift, random};
pub use tree::{Expect, Kind, assert_same, diff, walk};

pub(crate) use tar::{end_of_archive, header_blocks, padding};
pub(crate) use tree::clean;

/// The modification time entries get unless told otherwise: 2020-09-13T12:26:40Z, not zero because zero is special
/// in a TOC.
pub const DEFAULT_MTIME: i64 = 1_600_000_000;

/// An ordered list of tar entries, built by chaining.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    entries: Vec<Entry>,
    long_names: LongNames,
}

/// How names and link targets of more than 100 bytes are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongNames {
    /// GNU `L` and `K` entries; carries any bytes.
    #[default]
    Gnu,
    /// PAX `path` and `linkpath` records. Readers refuse names that are not UTF-8 there.
    Pax,
}

/// One tar entry. Every field goes into the tar as it is.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name in the tar, directories with their trailing slash.
    pub name: Vec<u8>,
    /// Type and what belongs to it.
    pub body: Body,
    /// The mode field of the header.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Owner's name, empty for none.
    pub user: String,
    /// Group's name, empty for none.
    pub group: String,
    /// Modification time: seconds since the epoch (may be negative) and nanoseconds after them.
    pub mtime: (i64, u32),
    /// Extended attributes, written as PAX `SCHILY.xattr.*` records. Keys may not hold `=`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The type of an [`Entry`] and the data only that type has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A directory.
    Directory,
    /// A regular file and its contents.
    Regular(Bytes),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// Another name of the entry at this path of the same layer.
    Hardlink(Vec<u8>),
    /// A character device: major, minor.
    Char(u32, u32),
    /// A block device: major, minor.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

impl Entry {
    /// An entry owned by root with [`DEFAULT_MTIME`] and the mode usual for its type.
    pub fn new(name: impl AsRef<[u8]>, body: Body) -> Entry {
        let mode = match body {
            Body::Directory => 0o755,
            Body::Symlink(_) => 0o777,
            _ => 0o644,
        };
        Entry {
            name: name.as_ref().to_vec(),
            body,
            mode,
            uid: 0,
            gid: 0,
            user: String::new(),
            group: String::new(),
            mtime: (DEFAULT_MTIME, 0),
            xattrs: BTreeMap::new(),
        }
    }

    /// The bytes that follow the header: a regular file's contents, nothing for all other types.
    pub fn payload(&self) -> Bytes {
        match &self.body {
            Body::Regular(data) => data.clone(),
            _ => Bytes::new(),
        }
    }
}

impl Layer {
    /// A layer without entries.
    pub fn new() -> Layer {
        Layer::default()
    }

    /// Adds a finished entry.
    pub fn entry(mut self, entry: Entry) -> Layer {
        self.entries.push(entry);
        self
    }

    /// A directory, mode 0755.
    pub fn dir(self, path: impl AsRef<[u8]>) -> Layer {
        let mut name = path.as_ref().to_vec();
        if !name.ends_with(b"/") {
            name.push(b'/');
        }
        self.entry(Entry::new(name, Body::Directory))
    }

    /// A regular file, mode 0644.
    pub fn file(self, path: impl AsRef<[u8]>, data: impl Into<Bytes>) -> Layer {
        self.entry(Entry::new(path, Body::Regular(data.into())))
    }

    /// An executable script or program, mode 0755.
    pub fn program(self, path: impl AsRef<[u8]>, data: impl Into<Bytes>) -> Layer {
        self.file(path, data).mode(0o755)
    }

    /// A regular file of `size` bytes, all zero but for the given pieces (offset, bytes).
    pub fn sparse(self, path: impl AsRef<[u8]>, size: usize, pieces: &[(usize, &[u8])]) -> Layer {
        let mut data = vec![0; size];
        for (offset, bytes) in pieces {
            data[*offset..*offset + bytes.len()].copy_from_slice(bytes);
        }
        self.file(path, data)
    }

    /// A regular file of `size` incompressible bytes that depend only on `seed`.
    pub fn noise(self, path: impl AsRef<[u8]>, size: usize, seed: u64) -> Layer {
        self.file(path, Xorshift::new(seed).bytes(size))
    }

    /// A symbolic link.
    pub fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Layer {
        self.entry(Entry::new(path, Body::Symlink(target.as_ref().to_vec())))
    }

    /// A hard link to the entry `target` of this layer, which may come later. When it came earlier, the header
    /// repeats its attributes, as tar writers do.
    pub fn hardlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Layer {
        let wanted = clean(target.as_ref());
        let mut link = Entry::new(path, Body::Hardlink(target.as_ref().to_vec()));
        if let Some(found) = self.entries.iter().rev().find(|entry| clean(&entry.name) == wanted) {
            link = Entry { name: link.name, body: link.body, ..found.clone() };
        }
        self.entry(link)
    }

    /// A character device, mode 0644.
    pub fn char_device(self, path: impl AsRef<[u8]>, major: u32, minor: u32) -> Layer {
        self.entry(Entry::new(path, Body::Char(major, minor)))
    }

    /// A block device, mode 0644.
    pub fn block_device(self, path: impl AsRef<[u8]>, major: u32, minor: u32) -> Layer {
        self.entry(Entry::new(path, Body::Block(major, minor)))
    }

    /// A named pipe, mode 0644.
    pub fn fifo(self, path: impl AsRef<[u8]>) -> Layer {
        self.entry(Entry::new(path, Body::Fifo))
    }

    /// Says that `path` of the layers below is gone: an empty file `.wh.<name>` beside it.
    pub fn whiteout(self, path: impl AsRef<[u8]>) -> Layer {
        let path = path.as_ref();
        let name_at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let mut name = path[..name_at].to_vec();
        name.extend_from_slice(b".wh.");
        name.extend_from_slice(&path[name_at..]);
        self.file(name, Bytes::new()).mode(0)
    }

    /// Says that nothing of the layers below shows in `dir`: an empty file `.wh..wh..opq` in it. Does not add the
    /// directory itself.
    pub fn opaque(self, dir: impl AsRef<[u8]>) -> Layer {
        let mut name = dir.as_ref().to_vec();
        if !name.is_empty() && !name.ends_with(b"/") {
            name.push(b'/');
        }
        name.extend_from_slice(b".wh..wh..opq");
        self.file(name, Bytes::new()).mode(0)
    }

    /// Sets the mode field of the last entry.
    pub fn mode(self, mode: u32) -> Layer {
        self.change(|entry| entry.mode = mode)
    }

    /// Sets owner and group of the last entry.
    pub fn owner(self, uid: u32, gid: u32) -> Layer {
        self.change(|entry| (entry.uid, entry.gid) = (uid, gid))
    }

    /// Sets the names of owner and group of the last entry.
    pub fn names(self, user: &str, group: &str) -> Layer {
        self.change(|entry| (entry.user, entry.group) = (user.to_owned(), group.to_owned()))
    }

    /// Sets the modification time of the last entry, in seconds since the epoch.
    pub fn mtime(self, secs: i64) -> Layer {
        self.mtime_nanos(secs, 0)
    }

    /// Sets the modification time of the last entry with nanoseconds (below 10⁹) after `secs`. A TOC cannot say
    /// them.
    pub fn mtime_nanos(self, secs: i64, nanos: u32) -> Layer {
        self.change(|entry| entry.mtime = (secs, nanos))
    }

    /// Adds an extended attribute to the last entry.
    pub fn xattr(self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Layer {
        self.change(|entry| {
            entry.xattrs.insert(key.as_ref().to_vec(), value.as_ref().to_vec());
        })
    }

    /// Replaces the last entry's name by exactly these bytes.
    pub fn raw_name(self, name: impl AsRef<[u8]>) -> Layer {
        self.change(|entry| entry.name = name.as_ref().to_vec())
    }

    /// Chooses how names of more than 100 bytes are written.
    pub fn long_names(mut self, long_names: LongNames) -> Layer {
        self.long_names = long_names;
        self
    }

    fn change(mut self, change: impl FnOnce(&mut Entry)) -> Layer {
        change(self.entries.last_mut().expect("an attribute needs an entry before it"));
        self
    }

    /// The entries in tar order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entries, to reorder or edit.
    pub fn entries_mut(&mut self) -> &mut Vec<Entry> {
        &mut self.entries
    }

    /// The same layer as any tar program can unpack it to the tree [`Layer::expected`] tells: without whiteouts and
    /// opaque marks, every hard link behind its target and naming it directly, nothing listed twice.
    pub fn for_plain_tar(&self) -> Layer {
        tree::plain(self)
    }

    /// The tar: every entry and the two zero blocks that end it.
    pub fn tar(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for entry in &self.entries {
            let payload = entry.payload();
            out.extend_from_slice(&header_blocks(entry, self.long_names));
            out.extend_from_slice(&payload);
            out.extend_from_slice(padding(payload.len()));
        }
        out.extend_from_slice(end_of_archive());
        out
    }

    /// The tar as one gzip member: an ordinary layer that is not lazy.
    pub fn tar_gzip(&self) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&self.tar()).expect("writing to memory");
        gzip.finish().expect("writing to memory")
    }

    /// Header bytes of one entry of this layer.
    pub(crate) fn header(&self, entry: &Entry) -> Vec<u8> {
        header_blocks(entry, self.long_names)
    }

    /// The tree an unpack for overlayfs gives, sorted by path, the root (empty path) first.
    ///
    /// Later duplicates override, a file over a directory removes what was in it. Hard links are resolved in the
    /// finished tree, so a link whose target is listed twice shows the later one. Missing parents are root's, 0755,
    /// at time 0, as a TOC reader makes them. A whiteout is a character device 0:0 of mode 0 unless the layer has that
    /// name too; an opaque mark is the attribute `trusted.overlay.opaque` = `y`. The lazy formats' own files in the
    /// root (landmarks, TOC) are not listed.
    ///
    /// # Panics
    /// If the layer has no such tree: a link to nothing, to a directory or in a circle, or a file in a file.
    pub fn expected(&self) -> Vec<Expect> {
        tree::expected(self)
    }

    /// Contents of all regular files of the finished tree by path, each hard link with its own entry.
    pub fn contents(&self) -> BTreeMap<Vec<u8>, Bytes> {
        tree::contents(self)
    }
}

/// A path of at least `bytes` bytes made of components of 50 bytes or fewer, the same for the same length.
pub fn long_path(bytes: usize) -> String {
    let mut path = String::from("deep");
    for level in 0.. {
        if path.len() >= bytes {
            break;
        }
        path.push_str(&format!(
            "/{level:0>width$}",
            width = 49.min(bytes.saturating_sub(path.len() + 1)).max(1)
        ));
    }
    path
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// One of everything a real file system accepts.
    fn sampler() -> Layer {
        Layer::new()
            .dir("./")
            .mode(0o711)
            .dir("etc")
            .mode(0o1777)
            .xattr("user.dir", b"\0\x01binary\n=\xff")
            .file("etc/passwd", "root:x:0:0\n")
            .owner(1000, 2000)
            .names("user", "group")
            .mode(0o4755)
            .xattr("user.a", "1")
            .xattr("trusted.b", "")
            .hardlink("etc/link", "etc/passwd")
            .file("etc/empty", "")
            .mode(0)
            .sparse("zeros", 70_000, &[(65_536, b"x")])
            .noise("noise", 5000, 7)
            .symlink("etc/sym", "../zeros")
            .symlink("long-target", format!("/{}", long_path(250)))
            .file(long_path(300), "far")
            .owner(3_000_000, 4_000_000)
            .mtime(0)
            .file(b"caf\xe9".as_slice(), "latin")
            .mtime(-5)
            .file("fraction", "f")
            .mtime_nanos(-2, 250_000_000)
            .file("naïve ☃ name", "utf-8")
            .char_device("null", 1, 3)
            .block_device("loop", 7, 0x1234)
            .fifo("pipe")
            .dir("implicit/sub")
            .hardlink("second", "etc/link")
    }

    #[test]
    fn gnu_tar_unpacks_what_expected_tells() {
        // owners, devices and trusted attributes
        if !crate::guard::require_root() {
            return;
        }
        for (style, layer) in [
            ("gnu", sampler()),
            ("pax", sampler().long_names(LongNames::Pax)),
            ("random 1", random(1, 120).for_plain_tar()),
            ("random 2", random(2, 120).for_plain_tar()),
        ] {
            let temp = tempfile::tempdir().unwrap();
            let archive = temp.path().join("layer.tar");
            let root = temp.path().join("root");
            std::fs::create_dir(&root).unwrap();
            std::fs::write(&archive, layer.tar()).unwrap();
            // fixtures return to a directory they left
            let output = Command::new("tar")
                .args([
                    "--delay-directory-restore",
                    "--xattrs",
                    "--xattrs-include=*",
                    "--numeric-owner",
                    "-xpf",
                ])
                .arg(&archive)
                .arg("-C")
                .arg(&root)
                .output()
                .unwrap();
            assert!(output.status.success(), "{style}: {}", String::from_utf8_lossy(&output.stderr));
            let explicit: Vec<Vec<u8>> = layer.entries().iter().map(|entry| clean(&entry.name)).collect();
            let mut actual = walk(&root).unwrap();
            for found in &mut actual {
                // tar gives parents that are not listed the time of unpacking
                if found.kind == Kind::Directory && !explicit.contains(&found.path) {
                    found.mtime = (0, 0);
                }
            }
            assert_same(&layer.expected(), &actual);
        }
    }

    #[test]
    fn an_independent_tar_reader_agrees() {
        let layer = random(3, 200);
        let bytes = layer.tar();
        let mut archive = ::tar::Archive::new(bytes.as_slice());
        let mut count = 0;
        for (found, entry) in archive.entries().unwrap().zip(layer.entries()) {
            let mut found = found.unwrap();
            assert_eq!(found.path_bytes().as_ref(), entry.name);
            assert_eq!(found.size(), entry.payload().len() as u64);
            assert_eq!(found.header().mode().unwrap(), entry.mode);
            let mut data = Vec::new();
            std::io::Read::read_to_end(&mut found, &mut data).unwrap();
            assert_eq!(data, entry.payload());
            count += 1;
        }
        assert_eq!(count, layer.entries().len());
    }

    #[test]
    fn duplicates_override_and_whiteouts_are_devices() {
        let layer = Layer::new()
            .dir("d")
            .file("d/gone", "x")
            .file("d", "now a file")
            .whiteout("lost")
            .whiteout("kept")
            .file("kept", "y")
            .opaque("o")
            .file("stargz.index.json", "{}")
            .file("l", "1");
        let tree = layer.expected();
        let paths: Vec<&[u8]> = tree.iter().map(|found| found.path.as_slice()).collect();
        assert_eq!(paths, [b"".as_slice(), b"d", b"kept", b"l", b"lost", b"o"]);
        assert_eq!(tree[1].size, 10);
        assert_eq!(tree[2].kind, Kind::Regular);
        assert_eq!((tree[4].kind, tree[4].rdev), (Kind::CharDevice, (0, 0)));
        assert_eq!(tree[5].xattrs[b"trusted.overlay.opaque".as_slice()], b"y");
        assert_eq!(tree[0].nlink, 3);
    }

    #[test]
    fn links_before_their_target_and_chains_share_one_file() {
        let layer = Layer::new().hardlink("a", "b").hardlink("b", "c").file("c", "data").mode(0o600);
        let tree = layer.expected();
        for found in &tree[1..] {
            assert_eq!((found.nlink, found.mode, found.size), (3, 0o600, 4));
            assert_eq!(found.same_as.as_deref(), Some(b"a".as_slice()));
        }
        assert_eq!(layer.contents()[b"a".as_slice()], "data");
    }

    #[test]
    fn random_layers_repeat_and_hold_everything() {
        assert_eq!(random(9, 50).tar(), random(9, 50).tar());
        assert_ne!(random(9, 50).tar(), random(10, 50).tar());
        let layer = random(5, 400);
        let has = |test: &dyn Fn(&Entry) -> bool| layer.entries().iter().any(test);
        assert!(has(&|entry| matches!(entry.body, Body::Hardlink(_))));
        assert!(has(&|entry| matches!(entry.body, Body::Fifo)));
        assert!(has(&|entry| matches!(entry.body, Body::Block(..))));
        assert!(has(&|entry| entry.mode & 0o4000 != 0));
        assert!(has(&|entry| !entry.xattrs.is_empty()));
        assert!(has(&|entry| entry.payload().len() > 100_000));
        assert!(has(&|entry| entry.name.ends_with(b".wh..wh..opq")));
        assert!(layer.expected().iter().any(|found| found.rdev == (0, 0) && found.kind == Kind::CharDevice));
        for seed in 0..40 {
            random(seed, 60).expected();
        }
    }

    #[test]
    fn a_difference_names_path_and_field() {
        let left = Layer::new().file("a", "1").file("b", "2").expected();
        let right = Layer::new().file("a", "3").mode(0o600).file("c", "2").expected();
        let text = diff(&left, &right);
        assert!(text.contains("a: mode: expected 0644, found 0600"), "{text}");
        assert!(text.contains("a: sha256"), "{text}");
        assert!(text.contains("b: missing"), "{text}");
        assert!(text.contains("c: not expected"), "{text}");
        assert_eq!(diff(&left, &left), "");
    }

    #[test]
    fn long_paths_have_the_length_asked_for() {
        for length in [10, 100, 101, 256, 300, 1000] {
            let path = long_path(length);
            assert!(path.len() >= length && path.len() <= length + 1, "{length}: {}", path.len());
        }
    }
}
