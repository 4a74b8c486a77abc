//! Writing the OCI image layout as a tar file.
//!
//! Blobs are written straight into the file: a header with room for the name and the size first, the bytes, then the
//! header again with what is known by then. One blob is written at a time; others wait, which also holds back their
//! conversion. The file appears under its name when the image is published, and not before.

use std::collections::HashSet;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use tar::{EntryType, Header};
use tempfile::NamedTempFile;
use tokio::sync::OwnedMutexGuard;
use tokio::task::spawn_blocking;

use super::directory::{MARK, MARK_CONTENTS, empty_index, with_image};
use super::layout::{INDEX, blob_path};
use super::{BlobWriter, Destination, Finished, Kept, Location, Raw};
use crate::image::Descriptor;

/// What everything in a tar is a multiple of, in bytes.
const BLOCK: u64 = 512;

/// A tar file that takes an image.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    name: Option<String>,
    /// `None` once it has its name.
    file: Arc<tokio::sync::Mutex<Option<NamedTempFile>>>,
    written: Arc<Mutex<HashSet<String>>>,
}

impl Archive {
    /// Begins the file that shall be `path`.
    ///
    /// # Errors
    ///
    /// No file can be made beside `path`, or `path` is something else than a file.
    pub fn create(path: &Path, name: Option<String>) -> anyhow::Result<Self> {
        let shown = || format!("cannot write {}", path.display());
        let other = fs::metadata(path).is_ok_and(|found| !found.is_file());
        ensure!(!other, "{} is not a file; an archive cannot take its place", path.display());
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let permissions = fs::Permissions::from_mode(0o666);
        let mut file = tempfile::Builder::new()
            .prefix(".lazurite-")
            .permissions(permissions)
            .tempfile_in(dir)
            .with_context(shown)?;
        begin(&mut file).with_context(shown)?;
        let file = Arc::new(tokio::sync::Mutex::new(Some(file)));
        Ok(Self { path: path.to_owned(), name, file, written: Arc::default() })
    }

    fn shown(&self) -> String {
        format!("cannot write {}", self.path.display())
    }
}

/// What every layout has, in front of the blobs.
fn begin(file: &mut impl Write) -> std::io::Result<()> {
    for dir in ["blobs/", "blobs/sha256/"] {
        file.write_all(header(dir, 0, EntryType::Directory)?.as_bytes())?;
    }
    append(file, MARK, MARK_CONTENTS)
}

/// The header of an entry. Nothing in it depends on when or by whom it is written.
fn header(path: &str, size: u64, kind: EntryType) -> std::io::Result<Header> {
    let mut header = Header::new_ustar();
    header.set_path(path)?;
    header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_entry_type(kind);
    header.set_cksum();
    Ok(header)
}

/// Zeros up to the next block.
fn padding(size: u64) -> Vec<u8> {
    // Below BLOCK.
    vec![0; (size.next_multiple_of(BLOCK) - size) as usize]
}

fn append(file: &mut impl Write, path: &str, contents: &[u8]) -> std::io::Result<()> {
    let size = contents.len() as u64;
    file.write_all(header(path, size, EntryType::Regular)?.as_bytes())?;
    file.write_all(contents)?;
    file.write_all(&padding(size))
}

#[async_trait]
impl Destination for Archive {
    async fn has(&self, descriptor: &Descriptor) -> anyhow::Result<bool> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(written.contains(&descriptor.digest))
    }

    async fn adopt(&self, _: &Descriptor, _: &Location) -> anyhow::Result<bool> {
        Ok(false)
    }

    async fn create(&self) -> anyhow::Result<Box<dyn BlobWriter>> {
        let mut guard = self.file.clone().lock_owned().await;
        let file = guard.as_mut().context("the archive is finished")?;
        let start = file.stream_position().with_context(|| self.shown())?;
        file.seek(SeekFrom::Start(start + BLOCK)).with_context(|| self.shown())?;
        let written = self.written.clone();
        Ok(Box::new(Blob { file: Some(guard), start, written, shown: self.shown() }))
    }

    async fn put(&self, document: &Raw) -> anyhow::Result<()> {
        super::put_blob(self, document.bytes.clone()).await
    }

    async fn publish(&self, root: &Raw) -> anyhow::Result<()> {
        self.put(root).await?;
        let index = serde_json::to_vec(&with_image(empty_index(), self.name.as_deref(), root))?;
        let mut file = self.file.lock().await.take().context("the archive is finished")?;
        let path = self.path.clone();
        let finished = spawn_blocking(move || -> std::io::Result<()> {
            append(&mut file, INDEX, &index)?;
            file.write_all(&[0; 2 * BLOCK as usize])?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        });
        finished.await?.with_context(|| self.shown())
    }
}

struct Blob {
    /// Taken when the blob ends; still there on drop, the blob is cut off.
    file: Option<OwnedMutexGuard<Option<NamedTempFile>>>,
    /// Where its header belongs.
    start: u64,
    written: Arc<Mutex<HashSet<String>>>,
    shown: String,
}

impl Blob {
    /// Runs `action` on the file, away from the async threads.
    async fn with(
        &mut self,
        action: impl FnOnce(&mut NamedTempFile) -> std::io::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let mut guard = self.file.take().context("the blob has ended")?;
        let (guard, result) = spawn_blocking(move || {
            let result = guard.as_mut().map_or_else(|| Err(std::io::Error::other("finished")), action);
            (guard, result)
        })
        .await?;
        self.file = Some(guard);
        result.with_context(|| self.shown.clone())
    }

    fn cut(&mut self) {
        if let Some(file) = self.file.take().as_mut().and_then(|guard| guard.as_mut()) {
            // What cannot be cut off vanishes with the file, which is not going to be published.
            let cut = file.as_file().set_len(self.start).and(file.seek(SeekFrom::Start(self.start)));
            if let Err(error) = cut {
                tracing::debug!(%error, "cannot cut off an unfinished blob");
            }
        }
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        self.cut();
    }
}

#[async_trait]
impl BlobWriter for Blob {
    async fn write(&mut self, bytes: Bytes) -> anyhow::Result<()> {
        self.with(move |file| file.write_all(&bytes)).await
    }

    async fn finish(mut self: Box<Self>, blob: Finished) -> anyhow::Result<Kept> {
        let path = blob_path(&blob.digest)?;
        if self.written.lock().unwrap_or_else(PoisonError::into_inner).contains(&blob.digest) {
            return Ok(Kept::Present);
        }
        let (start, size) = (self.start, blob.size);
        self.with(move |file| {
            file.write_all(&padding(size))?;
            file.seek(SeekFrom::Start(start))?;
            file.write_all(header(&path, size, EntryType::Regular)?.as_bytes())?;
            file.seek(SeekFrom::End(0)).map(drop)
        })
        .await?;
        self.file = None;
        self.written.lock().unwrap_or_else(PoisonError::into_inner).insert(blob.digest);
        Ok(Kept::New)
    }

    async fn cancel(mut self: Box<Self>) {
        self.cut();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::layout::Layout;
    use crate::transport::{Source, put_blob};

    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

    #[tokio::test]
    async fn what_is_written_is_read_back_and_the_rest_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.tar");
        let archive = Archive::create(&path, Some("v1".to_owned())).unwrap();
        for size in [0, 1, 511, 512, 513, 100_000] {
            let mut given_up = archive.create().await.unwrap();
            given_up.write(Bytes::from(vec![1; 70_000])).await.unwrap();
            drop(given_up);
            let blob = Bytes::from(vec![b'x'; size]);
            put_blob(&archive, blob.clone()).await.unwrap();
            put_blob(&archive, blob).await.unwrap();
        }
        assert!(!path.exists(), "it appears when it is published");
        let root = Raw::new(MANIFEST, "{}");
        archive.publish(&root).await.unwrap();

        let source = Layout::archive(&path, Some("v1".to_owned())).await.unwrap();
        assert_eq!(source.root().await.unwrap(), Some(root));
        for size in [0u64, 1, 511, 512, 513, 100_000] {
            let bytes = vec![b'x'; size as usize];
            let descriptor = Descriptor {
                media_type: "b".to_owned(),
                digest: estargz::Digest::of(&bytes).to_string(),
                size,
                annotations: Default::default(),
                platform: None,
            };
            assert_eq!(source.small(&descriptor).await.unwrap(), bytes);
        }
        let entries = tar::Archive::new(fs::File::open(&path).unwrap()).entries().unwrap().count();
        assert_eq!(entries, 2 + 1 + 6 + 1 + 1, "directories, mark, blobs, manifest, index");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_archive_that_is_not_published_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(Archive::create(&dir.path().join("image.tar"), None).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Archive::create(dir.path(), None).is_err(), "a directory is in the way");
    }
}
