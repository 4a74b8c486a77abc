//! The directories of snapshots.
//!
//! ```text
//! <root>/snapshots/            0700
//!     new-<id>/                being made; left over only by a crash
//!     <id>/                    0700
//!         fs/                  0755, or a symlink to the layer of a lazy snapshot
//!         work/                0711, overlayfs's scratch, active snapshots only
//!         fs.new               the symlink on its way to becoming `fs`
//! ```
//!
//! Everything here blocks and runs on a blocking thread. A snapshot's directory appears complete, by rename. No
//! function follows the symlink `fs` or walks through it: it leads into the daemon's own FUSE mount.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use crate::{
    Error,
    error::Result,
    filesystem::Usage,
    record::{Kind, Owner},
};

/// In front of the id while a directory is being made.
const NEW: &str = "new-";

#[derive(Debug)]
pub(crate) struct SnapshotDirs {
    path: PathBuf,
}

/// A directory just made, which goes away with this value unless kept.
#[derive(Debug)]
pub(crate) struct NewDir(Option<PathBuf>);

/// Something found under `snapshots/`.
#[derive(Debug)]
pub(crate) struct Found {
    pub path: PathBuf,
    pub id: u64,
    /// Renamed to its final name.
    pub complete: bool,
}

impl SnapshotDirs {
    pub fn open(root: &Path) -> Result<SnapshotDirs> {
        let path = root.join("snapshots");
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|error| Error::internal(format!("creating {}", path.display()), error))?;
        Ok(SnapshotDirs { path })
    }

    /// The directory `<root>/snapshots`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn dir(&self, id: u64) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// Makes the directory of a new snapshot, its root owned as told or as the daemon creates files.
    pub fn create(&self, id: u64, kind: Kind, owner: Option<Owner>) -> Result<NewDir> {
        let temporary = self.path.join(format!("{NEW}{id}"));
        let make = || -> io::Result<NewDir> {
            make_dir(&temporary, 0o700)?;
            let mut new = NewDir(Some(temporary.clone()));
            let root = temporary.join("fs");
            make_dir(&root, 0o755)?;
            if let Some(Owner { uid, gid }) = owner {
                let now = fs::symlink_metadata(&root)?;
                // Comparing first lets a daemon without privileges keep to its own files.
                if (now.uid(), now.gid()) != (uid, gid) {
                    std::os::unix::fs::lchown(&root, Some(uid), Some(gid))?;
                }
            }
            if kind == Kind::Active {
                make_dir(&temporary.join("work"), 0o711)?;
            }
            fs::rename(&temporary, self.dir(id))?;
            new.0 = Some(self.dir(id));
            Ok(new)
        };
        make().map_err(|error| Error::internal(format!("creating {}", self.dir(id).display()), error))
    }

    /// Points a snapshot's `fs` at `target`: the empty directory of a fresh snapshot, or an earlier symlink,
    /// gives way to it. Also mends a directory that a power cut took.
    pub fn link(&self, id: u64, target: &Path) -> Result<()> {
        let dir = self.dir(id);
        let (root, new) = (dir.join("fs"), dir.join("fs.new"));
        let link = || -> io::Result<()> {
            unless(io::ErrorKind::AlreadyExists, make_dir(&dir, 0o700))?;
            unless(io::ErrorKind::NotFound, fs::remove_file(&new))?;
            std::os::unix::fs::symlink(target, &new)?;
            if fs::symlink_metadata(&root).is_ok_and(|found| found.is_dir()) {
                fs::remove_dir(&root)?;
            }
            fs::rename(&new, &root)?;
            unless(io::ErrorKind::NotFound, fs::remove_dir(dir.join("work")))
        };
        link().map_err(|error| {
            Error::internal(format!("linking {} to {}", root.display(), target.display()), error)
        })
    }

    /// Who owns the root directory of an ordinary snapshot.
    pub fn owner(&self, id: u64) -> Result<Owner> {
        let root = self.dir(id).join("fs");
        let found = fs::symlink_metadata(&root);
        let found = found.map_err(|error| Error::internal(format!("reading {}", root.display()), error))?;
        Ok(Owner { uid: found.uid(), gid: found.gid() })
    }

    /// What the `fs` of an ordinary snapshot takes on disk.
    pub fn usage(&self, id: u64) -> Result<Usage> {
        let root = self.dir(id).join("fs");
        disk_usage(&root).map_err(|error| Error::internal(format!("measuring {}", root.display()), error))
    }

    /// All directories of snapshots, complete or not; anything else under `snapshots/` is not ours to touch.
    pub fn list(&self) -> Result<Vec<Found>> {
        let list = || -> io::Result<Vec<Found>> {
            let mut all = vec![];
            for entry in fs::read_dir(&self.path)? {
                let name = entry?.file_name();
                let Some(name) = name.to_str() else { continue };
                let id = name.strip_prefix(NEW).unwrap_or(name).parse();
                all.extend(id.ok().map(|id| Found {
                    path: self.path.join(name),
                    id,
                    complete: !name.starts_with(NEW),
                }));
            }
            Ok(all)
        };
        list().map_err(|error| Error::internal(format!("listing {}", self.path.display()), error))
    }
}

impl NewDir {
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewDir {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        if let Err(error) = fs::remove_dir_all(path) {
            tracing::warn!(path = %path.display(), %error, "could not remove the directory of a failed snapshot");
        }
    }
}

impl Found {
    /// Whether this is the directory of a lazy snapshot.
    pub fn is_lazy(&self) -> bool {
        fs::symlink_metadata(self.path.join("fs")).is_ok_and(|found| found.is_symlink())
    }

    /// Removes the directory, unless something is mounted in it: deleting would reach into what is mounted.
    pub fn remove(&self) -> io::Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        if mounted_below(&fs::read("/proc/thread-self/mountinfo")?, &fs::canonicalize(&self.path)?) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "something is mounted in it"));
        }
        unless(io::ErrorKind::NotFound, fs::remove_dir_all(&self.path))
    }
}

/// Whether a mount point lies in a directory, by the text of `mountinfo`, see proc_pid_mountinfo(5).
fn mounted_below(mountinfo: &[u8], dir: &Path) -> bool {
    mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(4))
        .any(|point| Path::new(OsStr::from_bytes(&unescape(point))).starts_with(dir))
}

/// Turns the three octal digits after a backslash into the byte they stand for.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        match tail.split_first_chunk() {
            Some((&[a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7'], after)) if first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => bytes.push(first),
        }
    }
    bytes
}

/// Success also for the one failure that means there was nothing to do.
fn unless(harmless: io::ErrorKind, result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == harmless { Ok(()) } else { Err(error) })
}

/// Makes a directory with exactly this mode, whatever the umask.
fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Blocks and inodes of a tree, the root and all directories included, a file with several names counted once:
/// what containerd's own snapshotters report. Entries that vanish meanwhile are not counted.
fn disk_usage(root: &Path) -> io::Result<Usage> {
    /// Bytes in a unit of `st_blocks`, see stat(2).
    const BLOCK: u64 = 512;

    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let found = match fs::symlink_metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path != root => continue,
            Err(error) => return Err(error),
        };
        let once = found.is_dir() || found.nlink() == 1;
        if once || linked.insert((found.dev(), found.ino())) {
            usage.size += found.blocks() * BLOCK;
            usage.inodes += 1;
        }
        if found.is_dir() {
            match fs::read_dir(&path) {
                Ok(entries) => {
                    for entry in entries {
                        pending.push(entry?.path());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && path != root => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    fn names(dirs: &SnapshotDirs) -> Vec<String> {
        let mut names: Vec<String> = dirs
            .list()
            .unwrap()
            .iter()
            .map(|found| found.path.file_name().unwrap().display().to_string())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_is_complete_or_absent() {
        let root = tempfile::tempdir().unwrap();
        let dirs = SnapshotDirs::open(root.path()).unwrap();
        let dir = dirs.create(7, Kind::Active, None).unwrap();
        assert_eq!(mode(&dirs.path().join("7/fs")), 0o755);
        assert_eq!(mode(&dirs.path().join("7/work")), 0o711);
        drop(dir);
        assert!(names(&dirs).is_empty());

        dirs.create(8, Kind::View, Some(dirs_owner(&dirs))).unwrap().keep();
        assert!(!dirs.path().join("8/work").exists());
        assert_eq!(names(&dirs), ["8"]);
        // The id is taken by a directory with something in it: nothing of the attempt stays.
        assert!(dirs.create(8, Kind::View, None).is_err());
        assert_eq!(names(&dirs), ["8"]);
        assert_eq!(mode(&dirs.path().join("8/fs")), 0o755);
    }

    fn dirs_owner(dirs: &SnapshotDirs) -> Owner {
        let found = fs::metadata(dirs.path()).unwrap();
        Owner { uid: found.uid(), gid: found.gid() }
    }

    #[test]
    fn a_link_replaces_an_empty_directory_a_link_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let dirs = SnapshotDirs::open(root.path()).unwrap();
        dirs.create(1, Kind::Active, None).unwrap().keep();
        let fs_path = dirs.path().join("1/fs");
        for target in ["../../mnt/1", "../../layers/x/fs"] {
            dirs.link(1, Path::new(target)).unwrap();
            assert_eq!(fs::read_link(&fs_path).unwrap(), Path::new(target));
            assert!(!dirs.path().join("1/work").exists());
        }
        assert!(dirs.list().unwrap()[0].is_lazy());

        dirs.link(2, Path::new("../../mnt/2")).unwrap();
        assert!(dirs.path().join("2/fs").is_symlink());

        dirs.create(3, Kind::Active, None).unwrap().keep();
        fs::write(dirs.path().join("3/fs/file"), "x").unwrap();
        assert!(dirs.link(3, Path::new("../../mnt/3")).is_err());
        assert!(dirs.path().join("3/fs/file").exists());
    }

    #[test]
    fn only_directories_of_snapshots_are_listed() {
        let root = tempfile::tempdir().unwrap();
        let dirs = SnapshotDirs::open(root.path()).unwrap();
        for name in ["1", "new-2", "lost+found", "new-x", "-3"] {
            fs::create_dir(dirs.path().join(name)).unwrap();
        }
        assert_eq!(names(&dirs), ["1", "new-2"]);
        for found in dirs.list().unwrap() {
            assert_eq!(found.complete, found.id == 1);
            found.remove().unwrap();
            found.remove().unwrap();
        }
        assert!(names(&dirs).is_empty());
    }

    #[test]
    fn mounts_are_found_by_their_path() {
        let info = b"22 27 0:21 / /proc rw shared:1 - proc proc rw\n\
                     31 27 0:9 / /r\\040t/snapshots/7/fs/in\\134ner rw - tmpfs t rw\n";
        for (dir, expected) in [
            ("/r t/snapshots/7", true),
            ("/r t/snapshots/7/fs/in\\ner", true),
            ("/r t/snapshots/70", false),
            ("/r t/snapshots/7/fs/inner", false),
            ("/proc", true),
        ] {
            assert_eq!(mounted_below(info, Path::new(dir)), expected, "{dir}");
        }
    }

    #[test]
    fn usage_counts_blocks_and_each_inode_once() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("fs");
        fs::create_dir_all(path.join("dir")).unwrap();
        fs::write(path.join("dir/a"), vec![1; 100_000]).unwrap();
        fs::hard_link(path.join("dir/a"), path.join("b")).unwrap();
        std::os::unix::fs::symlink("/", path.join("c")).unwrap();
        let blocks: u64 = ["", "dir", "b", "c"]
            .iter()
            .map(|name| fs::symlink_metadata(path.join(name)).unwrap().blocks())
            .sum();
        assert_eq!(disk_usage(&path).unwrap(), Usage { size: blocks * 512, inodes: 4 });
        assert!(disk_usage(&root.path().join("none")).is_err());
    }
}
