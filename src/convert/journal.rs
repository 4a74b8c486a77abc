//! What a run has stored before its name could be set: a later run to the same place then need not make it again.
//!
//! One small file for each destination in the user's cache directory: a line of JSON for each layer that was converted
//! and stored whole, removed once the image has its name. It is a hint: whether the destination still has a blob is asked
//! every time, what cannot be read is as good as absent, and without a cache directory there is no journal.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use estargz::Digest;

use super::earlier::Earlier;
use super::rewrite::{CONVERTED_FROM, Change};
use crate::transport::Location;

/// Lines of the largest images have a few hundred bytes each.
const LIMIT: u64 = 4 << 20;

/// The journal of runs to one destination.
#[derive(Debug)]
pub struct Journal(Option<PathBuf>);

impl Journal {
    /// The journal for `destination`. No I/O.
    pub fn of(destination: &Location) -> Self {
        Self::below(cache_dir().as_deref(), destination)
    }

    fn below(cache: Option<&Path>, destination: &Location) -> Self {
        let name = Digest::of(destination.to_string().as_bytes()).hex();
        Self(cache.map(|cache| cache.join("lazurite/convert").join(name)))
    }

    /// The layers that earlier runs have stored.
    pub fn read(&self) -> Earlier {
        let mut text = String::new();
        if let Some(path) = &self.0 {
            let read = File::open(path).and_then(|file| file.take(LIMIT).read_to_string(&mut text));
            if let Err(error) = read
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::debug!(path = %path.display(), %error, "the journal cannot be read");
            }
        }
        let changes = text.lines().filter_map(|line| serde_json::from_str::<Change>(line).ok());
        changes.filter_map(|change| Some((change.annotations.get(CONVERTED_FROM)?.clone(), change))).collect()
    }

    /// Adds a layer that is stored whole.
    pub fn note(&self, change: &Change) {
        let Some(path) = &self.0 else { return };
        let noted = || -> io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
            let mut file = OpenOptions::new().append(true).create(true).open(path)?;
            // In one piece: another run to the same place may add to it.
            file.write_all(format!("{}\n", serde_json::to_string(change)?).as_bytes())
        };
        if let Err(error) = noted() {
            tracing::debug!(path = %path.display(), %error, "the journal cannot be written");
        }
    }

    /// The image has its name, which tells all there is to tell.
    pub fn remove(&self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// As the XDG base directory specification has it.
fn cache_dir() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_was_noted_is_read_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let journal = |place: &str| Journal::below(Some(dir.path()), &place.parse().unwrap());
        let change = |n: u32| Change {
            digest: format!("sha256:{n:064x}"),
            size: 7,
            diff_id: Some(format!("sha256:{:064x}", n + 1)),
            zstd: false,
            annotations: BTreeMap::from([(CONVERTED_FROM.to_owned(), format!("recipe {n}"))]),
        };
        let first = journal("oci:a");
        assert!(first.read().is_empty());
        first.note(&change(1));
        first.note(&change(2));
        // A process that was killed has left half a line.
        let path = first.0.as_ref().unwrap();
        OpenOptions::new().append(true).open(path).unwrap().write_all(b"{\"digest\":").unwrap();
        let read = journal("oci:a").read();
        assert_eq!((read.len(), &read["recipe 2"]), (2, &change(2)));
        assert!(journal("oci:b").read().is_empty());
        first.remove();
        assert!(journal("oci:a").read().is_empty());

        let none = Journal::below(None, &"oci:a".parse().unwrap());
        none.note(&change(1));
        assert!(none.read().is_empty());
    }
}
