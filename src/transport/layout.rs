//! Reading the OCI image layout, from a directory or from a tar file of one.
//!
//! A tar file is not unpacked: its headers are read once, and blobs are then read where they lie. Source of the
//! layout: OCI image specification, image-layout.md.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use serde::Deserialize;
use tokio::task::spawn_blocking;

use super::{Blobs, ByteStream, DOCUMENT_LIMIT, Raw, Source, sha256, verified, within_limit};
use crate::image::Descriptor;

/// The file that lists the images.
pub const INDEX: &str = "index.json";

/// The annotation of an image's name in `index.json`.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// containerd writes the full name here and only the tag in [`REF_NAME`].
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Bytes read at once when a blob is streamed.
const PIECE: u64 = 1 << 20;

/// An image layout.
#[derive(Debug)]
pub struct Layout {
    place: Place,
    /// As the user wrote it, for messages.
    path: PathBuf,
    name: Option<String>,
}

#[derive(Debug)]
enum Place {
    Directory,
    Archive { file: Arc<File>, entries: HashMap<String, Range<u64>> },
}

/// A file of the layout: a part of a real one.
#[derive(Debug, Clone)]
struct Part {
    file: Arc<File>,
    range: Range<u64>,
}

impl Part {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The bytes `range`, which must be inside. Blocking.
    fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        let size = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let mut bytes = vec![0; size];
        self.file.read_exact_at(&mut bytes, self.range.start + range.start)?;
        Ok(bytes.into())
    }
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

/// Where a blob lies in a layout.
///
/// # Errors
///
/// The digest is none, or of an algorithm that cannot be verified here.
pub fn blob_path(digest: &str) -> anyhow::Result<String> {
    Ok(format!("blobs/sha256/{}", sha256(digest)?.hex()))
}

impl Layout {
    /// The layout in the directory `path`, with the image `name` or its only one.
    pub fn directory(path: &Path, name: Option<String>) -> Self {
        Self { place: Place::Directory, path: path.to_owned(), name }
    }

    /// The layout in the tar file `path`.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is not a plain tar.
    pub async fn archive(path: &Path, name: Option<String>) -> anyhow::Result<Self> {
        let file = path.to_owned();
        let place = spawn_blocking(move || list(&file))
            .await?
            .with_context(|| format!("cannot read {} as a tar file", path.display()))?;
        Ok(Self { place, path: path.to_owned(), name })
    }

    /// A file of the layout; `None` if there is none.
    async fn find(&self, name: &str) -> anyhow::Result<Option<Part>> {
        match &self.place {
            Place::Archive { file, entries } => {
                Ok(entries.get(name).map(|range| Part { file: file.clone(), range: range.clone() }))
            }
            Place::Directory => {
                let path = self.path.join(name);
                let shown = path.display().to_string();
                let opened = spawn_blocking(move || {
                    let file = File::open(path)?;
                    let size = file.metadata()?.len();
                    Ok(Part { file: Arc::new(file), range: 0..size })
                });
                match opened.await? {
                    Ok(part) => Ok(Some(part)),
                    Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error).with_context(|| format!("cannot read {shown}")),
                }
            }
        }
    }

    async fn blob(&self, descriptor: &Descriptor) -> anyhow::Result<Part> {
        let part = self.find(&blob_path(&descriptor.digest)?).await?;
        let part =
            part.with_context(|| format!("{} has no blob {}", self.path.display(), descriptor.digest))?;
        ensure!(
            part.size() == descriptor.size,
            "blob {} has {} bytes in {}, but the image says {}",
            descriptor.digest,
            part.size(),
            self.path.display(),
            descriptor.size
        );
        Ok(part)
    }
}

/// Notes where the files of a tar lie. Blocking.
fn list(path: &Path) -> anyhow::Result<Place> {
    let file = File::open(path)?;
    let mut entries = HashMap::new();
    for entry in tar::Archive::new(&file).entries_with_seek()? {
        let entry = entry?;
        if entry.header().entry_type().is_file() {
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let start = entry.raw_file_position();
            entries.insert(name.trim_start_matches("./").to_owned(), start..start + entry.size());
        }
    }
    Ok(Place::Archive { file: Arc::new(file), entries })
}

#[async_trait]
impl Blobs for Layout {
    async fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> anyhow::Result<Bytes> {
        let part = self.blob(descriptor).await?;
        ensure!(
            range.start <= range.end && range.end <= part.size(),
            "{range:?} is outside {}",
            descriptor.digest
        );
        let read = spawn_blocking(move || part.read(range)).await?;
        read.with_context(|| format!("cannot read blob {}", descriptor.digest))
    }

    async fn stream(&self, descriptor: &Descriptor) -> anyhow::Result<ByteStream> {
        let part = self.blob(descriptor).await?;
        let digest = descriptor.digest.clone();
        let pieces = stream::try_unfold(0, move |at| {
            let (part, digest) = (part.clone(), digest.clone());
            async move {
                let end = part.size().min(at + PIECE);
                if at == end {
                    return Ok(None);
                }
                let read = spawn_blocking(move || part.read(at..end)).await?;
                let bytes = read.with_context(|| format!("cannot read blob {digest}"))?;
                Ok(Some((bytes, end)))
            }
        });
        Ok(pieces.boxed())
    }
}

#[async_trait]
impl Source for Layout {
    async fn root(&self) -> anyhow::Result<Option<Raw>> {
        let Some(part) = self.find(INDEX).await? else { return Ok(None) };
        ensure!(part.size() <= DOCUMENT_LIMIT, "{} of {} is too large", INDEX, self.path.display());
        let bytes = spawn_blocking(move || part.read(0..part.size())).await??;
        let index: Index = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} of {} is not valid", INDEX, self.path.display()))?;
        match choose(&index.manifests, self.name.as_deref())
            .with_context(|| format!("in {}", self.path.display()))?
        {
            Some(entry) => self.document(entry).await.map(Some),
            None => Ok(None),
        }
    }

    async fn small(&self, descriptor: &Descriptor) -> anyhow::Result<Bytes> {
        within_limit(descriptor)?;
        verified(descriptor, self.range(descriptor, 0..descriptor.size).await?)
    }
}

/// The image `wanted`, or the only one; `None` if there is no such image.
fn choose<'a>(entries: &'a [Descriptor], wanted: Option<&str>) -> anyhow::Result<Option<&'a Descriptor>> {
    match (wanted, entries) {
        (Some(wanted), _) => {
            let is = |entry: &Descriptor, key| entry.annotations.get(key).is_some_and(|name| name == wanted);
            Ok(entries.iter().find(|entry| is(entry, REF_NAME) || is(entry, CONTAINERD_NAME)))
        }
        (None, []) => Ok(None),
        (None, [only]) => Ok(Some(only)),
        (None, _) => {
            let known: Vec<&str> =
                entries.iter().filter_map(|entry| Some(entry.annotations.get(REF_NAME)?.as_str())).collect();
            bail!("there are {} images; say which after a colon: {}", entries.len(), known.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_chosen_by_name() {
        let entry = |n: usize, names: &[(&str, &str)]| Descriptor {
            media_type: "m".to_owned(),
            digest: format!("sha256:{n:064x}"),
            size: 1,
            annotations: names.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            platform: None,
        };
        let all = [
            entry(0, &[(REF_NAME, "v1")]),
            entry(1, &[(REF_NAME, "v2"), (CONTAINERD_NAME, "r.example/a:v2")]),
            entry(2, &[]),
        ];
        let found = |entries: &[Descriptor], wanted: Option<&str>| {
            choose(entries, wanted).unwrap().map(|entry| entry.digest.clone())
        };
        assert_eq!(found(&all, Some("v1")), Some(all[0].digest.clone()));
        assert_eq!(found(&all, Some("r.example/a:v2")), Some(all[1].digest.clone()));
        assert_eq!(found(&all, Some("v3")), None);
        assert_eq!(found(&all[2..], None), Some(all[2].digest.clone()));
        assert_eq!(found(&[], None), None);
        let error = choose(&all, None).unwrap_err().to_string();
        assert_eq!(error, "there are 3 images; say which after a colon: v1, v2");
    }

    #[test]
    fn digests_that_would_leave_the_layout_are_refused() {
        assert!(blob_path("sha256:../../../etc/passwd").is_err());
        assert!(blob_path("sha512:00").is_err());
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(blob_path(&digest).unwrap(), format!("blobs/sha256/{}", "0".repeat(64)));
    }
}
