//! A file that is parsed again when it has changed.

use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::io::AsyncReadExt as _;

/// Larger files are none of those that are read here.
const MAX_SIZE: u64 = 4 << 20;

/// The file and what was made of it last.
#[derive(Debug)]
pub(super) struct Watched<T> {
    path: PathBuf,
    parsed: Mutex<Option<Parsed<T>>>,
}

#[derive(Debug)]
struct Parsed<T> {
    version: (SystemTime, u64),
    value: Arc<T>,
}

impl<T> Watched<T> {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, parsed: Mutex::default() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it at the next look, changed or not.
    pub(super) fn forget(&self) {
        *self.parsed.lock() = None;
    }

    /// What is in it now. It is looked at first, so that a change in between is seen later.
    ///
    /// # Errors
    ///
    /// What `parse` says is among them.
    pub(super) async fn read(&self, parse: impl Fn(&[u8]) -> Result<T, String>) -> Result<Arc<T>, Unread> {
        let metadata = tokio::fs::metadata(&self.path).await?;
        let version = (metadata.modified()?, metadata.len());
        if let Some(parsed) = self.parsed.lock().as_ref().filter(|parsed| parsed.version == version) {
            return Ok(parsed.value.clone());
        }
        let parsed = parse(&contents(&self.path).await?);
        let value = Arc::new(parsed.map_err(|why| Unread { why, missing: false })?);
        *self.parsed.lock() = Some(Parsed { version, value: value.clone() });
        Ok(value)
    }
}

/// Why a file is of no use.
#[derive(Debug)]
pub(super) struct Unread {
    /// In words to follow its name.
    pub(super) why: String,
    /// There is none.
    pub(super) missing: bool,
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        let missing = error.kind() == io::ErrorKind::NotFound;
        Self { why: format!("cannot be read ({error})"), missing }
    }
}

/// All of a file.
///
/// # Errors
///
/// It cannot be read, or is larger than 4 MiB.
pub(super) async fn contents(path: &Path) -> Result<Vec<u8>, Unread> {
    let file = tokio::fs::File::open(path).await?;
    let mut text = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut text).await?;
    if text.len() as u64 > MAX_SIZE {
        return Err(Unread { why: "is larger than 4 MiB".to_owned(), missing: false });
    }
    Ok(text)
}
