//! A file that is parsed again when it has changed.

use parking_lot::Mutex;
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

    pub(super) async fn exists(&self) -> bool {
        tokio::fs::try_exists(&self.path).await.unwrap_or(true)
    }

    /// Reads it at the next look, changed or not.
    pub(super) fn forget(&self) {
        *self.parsed.lock() = None;
    }

    /// What is in it now. It is looked at first, so that a change in between is seen later.
    ///
    /// # Errors
    ///
    /// In words to follow the file's name, what `parse` says among them.
    pub(super) async fn read(&self, parse: impl Fn(&[u8]) -> Result<T, String>) -> Result<Arc<T>, String> {
        let metadata = tokio::fs::metadata(&self.path).await.map_err(unreadable)?;
        let version = (metadata.modified().map_err(unreadable)?, metadata.len());
        if let Some(parsed) = self.parsed.lock().as_ref().filter(|parsed| parsed.version == version) {
            return Ok(parsed.value.clone());
        }
        let value = Arc::new(parse(&contents(&self.path).await?)?);
        *self.parsed.lock() = Some(Parsed { version, value: value.clone() });
        Ok(value)
    }
}

/// All of a file.
///
/// # Errors
///
/// In words to follow the file's name: it cannot be read, or is larger than 4 MiB.
pub(super) async fn contents(path: &Path) -> Result<Vec<u8>, String> {
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    let mut text = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut text).await.map_err(unreadable)?;
    if text.len() as u64 > MAX_SIZE {
        return Err("is larger than 4 MiB".to_owned());
    }
    Ok(text)
}

fn unreadable(error: std::io::Error) -> String {
    format!("cannot be read ({error})")
}
