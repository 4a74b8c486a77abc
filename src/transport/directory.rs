//! Writing the OCI image layout into a directory.
//!
//! Everything is written beside its place and renamed, so that a full disk or a kill never shows half a file; unnamed
//! rests are removed on drop. `index.json` is changed under a lock, so that two commands can add images at once.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempPath};
use tokio::io::AsyncWriteExt;
use tokio::task::spawn_blocking;

use super::layout::{INDEX, REF_NAME, blob_path};
use super::{BlobWriter, Destination, Finished, Kept, Location, Raw};
use crate::image::Descriptor;

/// The file that says what the directory is.
pub const MARK: &str = "oci-layout";
/// Its contents.
pub const MARK_CONTENTS: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// A directory that takes an image.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    name: Option<String>,
}

impl Directory {
    /// The layout in `path`, made if it is not there.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn open(path: &Path, name: Option<String>) -> anyhow::Result<Self> {
        let shown = || format!("cannot make an image layout in {}", path.display());
        fs::create_dir_all(path.join("blobs/sha256")).with_context(shown)?;
        if !path.join(MARK).exists() {
            let mut file = beside(path).with_context(shown)?;
            file.write_all(MARK_CONTENTS).with_context(shown)?;
            file.persist(path.join(MARK)).with_context(shown)?;
        }
        Ok(Self { path: path.to_owned(), name })
    }
}

/// A file in `dir` that vanishes unless it is given a name. Readable for all as far as the umask allows, as what
/// other tools put into a layout.
fn beside(dir: &Path) -> std::io::Result<NamedTempFile> {
    let permissions = fs::Permissions::from_mode(0o666);
    tempfile::Builder::new().prefix(".lazurite-").permissions(permissions).tempfile_in(dir)
}

#[async_trait]
impl Destination for Directory {
    async fn has(&self, descriptor: &Descriptor) -> anyhow::Result<bool> {
        let path = self.path.join(blob_path(&descriptor.digest)?);
        // A size that differs comes from a writer that does not rename; the blob is then written anew.
        Ok(fs::metadata(path).is_ok_and(|found| found.len() == descriptor.size))
    }

    async fn adopt(&self, _: &Descriptor, _: &Location) -> anyhow::Result<bool> {
        Ok(false)
    }

    async fn create(&self) -> anyhow::Result<Box<dyn BlobWriter>> {
        let blobs = self.path.join("blobs/sha256");
        let file = beside(&blobs).with_context(|| format!("cannot write into {}", blobs.display()))?;
        let (file, temporary) = file.into_parts();
        Ok(Box::new(Blob { file: file.into(), temporary, layout: self.path.clone() }))
    }

    async fn put(&self, document: &Raw) -> anyhow::Result<()> {
        super::put_blob(self, document.bytes.clone()).await
    }

    async fn publish(&self, root: &Raw) -> anyhow::Result<()> {
        self.put(root).await?;
        let (path, name, root) = (self.path.clone(), self.name.clone(), root.clone());
        let changed = spawn_blocking(move || change_index(&path, name.as_deref(), &root)).await?;
        changed.with_context(|| format!("cannot add the image to {}", self.path.join(INDEX).display()))
    }
}

/// Blocking.
fn change_index(layout: &Path, name: Option<&str>, root: &Raw) -> anyhow::Result<()> {
    let lock = File::open(layout.join(MARK))?;
    flock(lock.as_fd(), FlockOperation::LockExclusive)?;
    let index = match fs::read(layout.join(INDEX)) {
        Ok(bytes) => {
            let index: serde_json::Map<String, Value> =
                serde_json::from_slice(&bytes).context("what is there is not valid")?;
            index.into()
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => empty_index(),
        Err(error) => return Err(error.into()),
    };
    let mut file = beside(layout)?;
    file.write_all(&serde_json::to_vec(&with_image(index, name, root))?)?;
    file.as_file().sync_all()?;
    file.persist(layout.join(INDEX))?;
    Ok(())
}

/// An `index.json` without images.
pub fn empty_index() -> Value {
    json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [] })
}

/// `index` with `root` under `name`, in place of what had the name before.
pub fn with_image(mut index: Value, name: Option<&str>, root: &Raw) -> Value {
    let mut entry = json!({ "mediaType": root.media_type, "digest": root.digest, "size": root.bytes.len() });
    if let Some(name) = name {
        entry["annotations"] = json!({ REF_NAME: name });
    }
    let mut entries = index["manifests"].as_array().cloned().unwrap_or_default();
    entries.retain(|entry| entry["annotations"][REF_NAME].as_str() != name);
    entries.push(entry);
    index["manifests"] = entries.into();
    index
}

struct Blob {
    file: tokio::fs::File,
    temporary: TempPath,
    layout: PathBuf,
}

#[async_trait]
impl BlobWriter for Blob {
    async fn write(&mut self, bytes: Bytes) -> anyhow::Result<()> {
        let written = self.file.write_all(&bytes).await;
        written.with_context(|| format!("cannot write into {}", self.layout.display()))
    }

    async fn finish(mut self: Box<Self>, blob: Finished) -> anyhow::Result<Kept> {
        let Self { mut file, temporary, layout } = *self;
        let path = layout.join(blob_path(&blob.digest)?);
        let written = async {
            file.flush().await?;
            if fs::metadata(&path).is_ok_and(|found| found.len() == blob.size) {
                return std::io::Result::Ok(Kept::Present);
            }
            file.sync_all().await?;
            temporary.persist(&path).map_err(std::io::Error::from)?;
            Ok(Kept::New)
        };
        written.await.with_context(|| format!("cannot write {}", path.display()))
    }

    async fn cancel(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;

    use super::*;
    use crate::transport::layout::Layout;
    use crate::transport::{Blobs, Source};

    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn images_are_added_and_replaced_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (Raw::new(MANIFEST, "{\"a\":1}"), Raw::new(MANIFEST, "{\"b\":2}"));
        for (name, root) in [("v1", &first), ("v2", &first), ("v1", &second)] {
            let layout = Directory::open(dir.path(), Some(name.to_owned())).unwrap();
            layout.publish(root).await.unwrap();
        }
        let root =
            async |name: &str| Layout::directory(dir.path(), Some(name.to_owned())).root().await.unwrap();
        assert_eq!(root("v1").await, Some(second));
        assert_eq!(root("v2").await, Some(first));
        assert_eq!(root("v3").await, None);
        assert_eq!(names(dir.path()), ["blobs", "index.json", "oci-layout"]);
    }

    #[tokio::test]
    async fn an_unfinished_blob_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Directory::open(dir.path(), None).unwrap();
        for how in ["dropped", "cancelled"] {
            let mut writer = layout.create().await.unwrap();
            writer.write(Bytes::from_static(b"half")).await.unwrap();
            if how == "cancelled" {
                writer.cancel().await;
            }
        }
        assert_eq!(names(&dir.path().join("blobs/sha256")), Vec::<String>::new());
        assert!(Layout::directory(dir.path(), None).root().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn blobs_are_kept_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Directory::open(dir.path(), None).unwrap();
        let bytes = Bytes::from(vec![7; 3 << 20]);
        let digest = estargz::Digest::of(&bytes).to_string();
        let descriptor = Descriptor {
            media_type: "b".to_owned(),
            digest: digest.clone(),
            size: bytes.len() as u64,
            annotations: Default::default(),
            platform: None,
        };
        for expected in [Kept::New, Kept::Present] {
            assert_eq!(layout.has(&descriptor).await.unwrap(), expected == Kept::Present);
            let mut writer = layout.create().await.unwrap();
            writer.write(bytes.clone()).await.unwrap();
            let finished = Finished { digest: digest.clone(), size: descriptor.size, diff_id: None };
            assert_eq!(writer.finish(finished).await.unwrap(), expected);
        }
        let source = Layout::directory(dir.path(), None);
        let pieces: Vec<Bytes> = source.stream(&descriptor).await.unwrap().try_collect().await.unwrap();
        assert_eq!(pieces.concat(), bytes);
        assert_eq!(source.range(&descriptor, 5..9).await.unwrap(), bytes.slice(5..9));
        assert!(source.range(&descriptor, 5..descriptor.size + 1).await.is_err());
        let longer = Descriptor { size: 1, ..descriptor };
        assert!(source.stream(&longer).await.is_err(), "the size is that of the descriptor");
    }
}
