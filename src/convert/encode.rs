//! The encoder, as a conversion uses it: blocking, one layer at a time.

use std::io::Write;
use std::num::NonZero;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use estargz::writer::{self, Level, Missing, Options, Pattern};
use estargz::{Digest, Toc};

use super::earlier::Shape;
use super::pipe::{Inlet, Outlet};
use super::priority::First;

/// The compression level unless told otherwise.
pub const DEFAULT_LEVEL: u8 = 6;

/// How layers are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What decides their bytes.
    pub shape: Shape,
    /// Threads that compress.
    pub threads: NonZero<usize>,
    /// Where a layer is spooled whose files are brought into another order.
    pub tmpdir: PathBuf,
}

impl Settings {
    /// Checks what can be checked before any layer is read.
    ///
    /// # Errors
    ///
    /// The level or the chunk size is out of range, or layers cannot be spooled where they shall be.
    pub fn check(&self) -> anyhow::Result<()> {
        self.options(&[])?.check()?;
        ensure!(
            self.tmpdir.is_dir(),
            "{} is not a directory; --tmpdir says where layers are spooled",
            self.tmpdir.display()
        );
        Ok(())
    }

    fn options(&self, first: &[First]) -> Result<Options, writer::Error> {
        let Shape { target, chunk_size, min_chunk_size, level } = self.shape;
        Ok(Options {
            target,
            chunk_size,
            min_chunk_size,
            level: Level::new(level)?,
            prioritized: patterns(first)?,
            missing_prioritized: Missing::Ignore,
            threads: self.threads,
        })
    }
}

/// A layer that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Digest of the blob.
    pub digest: String,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Digest of the decompressed blob.
    pub diff_id: String,
    /// Digest of the table of contents, as the image names it.
    pub toc_digest: Digest,
    /// What makes the layer lazy; nothing if it must not be.
    pub annotations: Vec<(String, String)>,
    /// Paths and globs that match nothing.
    pub missing: Vec<String>,
    /// Entries with names that a table of contents cannot tell.
    pub lossy_names: u64,
    /// Entries because of which podman would refuse the layer, so that it is not annotated.
    pub unlike: u64,
}

/// Makes a lazy layer of any layer. Blocking.
///
/// # Errors
///
/// The input is no layer, or a side cannot be read or written.
pub fn encode(
    input: &mut Inlet,
    mut output: Outlet,
    settings: &Settings,
    first: &[First],
) -> anyhow::Result<Encoded> {
    let options = settings.options(first)?;
    // Without a name, so that nothing can be left behind.
    let spool = || tempfile::tempfile_in(&settings.tmpdir);
    let summary = writer::convert(input, &mut output, &options, spool, &())?;
    output.flush().context("cannot write the blob")?;
    Ok(Encoded {
        digest: summary.blob_digest.to_string(),
        size: summary.blob_size,
        diff_id: summary.diff_id.to_string(),
        toc_digest: summary.toc_digest,
        annotations: summary.annotations(),
        lossy_names: summary.lossy_names,
        unlike: summary.unlike,
        missing: summary.prioritized_missing.iter().map(ToString::to_string).collect(),
    })
}

fn patterns(first: &[First]) -> Result<Vec<Pattern>, writer::Error> {
    first
        .iter()
        .map(|first| match first {
            First::Path(path) => Ok(Pattern::path(path)),
            First::Glob(glob) => Pattern::glob(glob),
        })
        .collect()
}

/// Whether a layer with this table of contents has a file that shall come first.
///
/// # Errors
///
/// A glob is not one.
pub fn would_reorder(toc: &Toc, first: &[First]) -> anyhow::Result<bool> {
    let patterns = patterns(first)?;
    if patterns.is_empty() {
        return Ok(false);
    }
    let mut directories = vec![(Vec::new(), 0)];
    while let Some((path, inode)) = directories.pop() {
        for (name, child) in &toc.inodes()[inode as usize].children {
            let path = if path.is_empty() { name.clone() } else { [path.as_slice(), name].join(&b'/') };
            if patterns.iter().any(|pattern| pattern.matches(&path)) {
                return Ok(true);
            }
            directories.push((path, *child));
        }
    }
    Ok(false)
}
