//! Changes to a tree, and comparison of trees.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, lchown},
    path::Path,
};

/// One change; paths are relative.
#[derive(Clone, Debug)]
pub enum Change {
    /// Writes a file, new or not, and sets its mode.
    File(String, String, u32),
    Dir(&'static str, u32),
    /// Removes a file or a whole directory.
    Remove(&'static str),
    Chown(&'static str, u32),
    Link(&'static str, &'static str),
    Rename(&'static str, &'static str),
}

pub fn file(path: impl Into<String>, contents: impl Into<String>, mode: u32) -> Change {
    Change::File(path.into(), contents.into(), mode)
}

pub fn apply(root: &Path, changes: &[Change]) {
    for change in changes {
        let done = match change {
            Change::File(path, contents, mode) => {
                fs::write(root.join(path), contents).and_then(|()| set_mode(&root.join(path), *mode))
            }
            Change::Dir(path, mode) => {
                fs::create_dir(root.join(path)).and_then(|()| set_mode(&root.join(path), *mode))
            }
            Change::Remove(path) if root.join(path).is_dir() => fs::remove_dir_all(root.join(path)),
            Change::Remove(path) => fs::remove_file(root.join(path)),
            Change::Chown(path, owner) => lchown(root.join(path), Some(*owner), Some(*owner)),
            Change::Link(old, new) => fs::hard_link(root.join(old), root.join(new)),
            Change::Rename(old, new) => fs::rename(root.join(old), root.join(new)),
        };
        done.unwrap_or_else(|error| panic!("{change:?} in {}: {error}", root.display()));
    }
}

fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Everything below the two roots is the same: names, types, modes, owners, contents.
#[track_caller]
pub fn same(expected: &Path, actual: &Path) {
    assert_eq!(read(expected), read(actual));
}

type Entry = (u32, u32, u32, String);

fn read(root: &Path) -> BTreeMap<String, Entry> {
    let mut entries = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            let contents = if found.is_file() { fs::read_to_string(&path).unwrap() } else { String::new() };
            let name = path.strip_prefix(root).unwrap().display().to_string();
            entries.insert(name, (found.mode(), found.uid(), found.gid(), contents));
            if found.is_dir() {
                pending.push(path);
            }
        }
    }
    entries
}
