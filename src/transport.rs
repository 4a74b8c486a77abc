//! Where images are read from and written to.
//!
//! Owns the names of places (`docker://`, `oci:`, `oci-archive:`, `containerd:`) and two ports: a [`Source`] yields
//! documents and blobs, a [`Destination`] takes them. Knows nothing of what is in a layer.
//!
//! | module | place |
//! |---|---|
//! | [`distribution`] | a registry |
//! | [`layout`] | a directory or a tar file in the OCI image layout: reading |
//! | [`directory`], [`archive`] | the two: writing |
//! | [`store`] | containerd's image and content store |
//!
//! Invariants:
//! - A document or small blob that a source returns has the digest it was asked for. Ranges and streams are not
//!   verified: their readers do that.
//! - A destination shows a blob only whole, under the digest of its bytes, and a name only after
//!   [`Destination::publish`]. What is not finished is removed by [`BlobWriter::cancel`] or when it is dropped.

mod archive;
mod directory;
mod distribution;
mod layout;
mod store;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use estargz::Digest;
use futures::stream::BoxStream;
use registry::{Reference, Registry};

use crate::cli::ContainerdArgs;
use crate::image::Descriptor;

/// Manifests, indexes and configs are read into memory; real ones are a few kilobytes. The limit is the one the
/// distribution specification gives for manifests.
const DOCUMENT_LIMIT: u64 = 4 << 20;

/// A place an image is at, or shall be at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `docker://HOST/REPOSITORY[:TAG][@DIGEST]`
    Registry(Reference),
    /// `oci:DIRECTORY[:NAME]`
    Directory(PathBuf, Option<String>),
    /// `oci-archive:FILE[:NAME]`
    Archive(PathBuf, Option<String>),
    /// `containerd:NAME`
    Containerd(String),
}

impl FromStr for Location {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (transport, rest) = text.split_once(':').unwrap_or((text, ""));
        let path = |rest: &str| {
            // A path with a colon cannot be said; other tools for image layouts have the same rule.
            let (path, name) = match rest.split_once(':') {
                Some((path, name)) => (path, Some(name.to_owned())),
                None => (rest, None),
            };
            ensure!(!path.is_empty() && name.as_deref() != Some(""), "{text:?} lacks a path or a name");
            anyhow::Ok((PathBuf::from(path), name))
        };
        Ok(match transport {
            "docker" => {
                let reference = rest.strip_prefix("//").with_context(|| {
                    format!("{text:?}: write docker://HOST/REPOSITORY:TAG, with two slashes")
                })?;
                Self::Registry(reference.parse()?)
            }
            "oci" => path(rest).map(|(path, name)| Self::Directory(path, name))?,
            "oci-archive" => path(rest).map(|(path, name)| Self::Archive(path, name))?,
            "containerd" => {
                ensure!(!rest.is_empty(), "{text:?} lacks the image's name");
                Self::Containerd(rest.to_owned())
            }
            _ => bail!(
                "{text:?} does not say where the image is; begin with docker://, oci:, oci-archive: or containerd:"
            ),
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |f: &mut fmt::Formatter<'_>, name: &Option<String>| match name {
            Some(name) => write!(f, ":{name}"),
            None => Ok(()),
        };
        match self {
            Self::Registry(reference) => write!(f, "docker://{reference}"),
            Self::Directory(path, name) => {
                write!(f, "oci:{}", path.display())?;
                named(f, name)
            }
            Self::Archive(path, name) => {
                write!(f, "oci-archive:{}", path.display())?;
                named(f, name)
            }
            Self::Containerd(name) => write!(f, "containerd:{name}"),
        }
    }
}

/// What places are reached with.
#[derive(Debug, Clone, Copy)]
pub struct Means<'a> {
    /// The client for registries.
    pub registry: &'a Registry,
    /// Which containerd.
    pub containerd: &'a ContainerdArgs,
    /// How long one request to a registry may take.
    pub deadline: Duration,
}

impl Location {
    /// Opens the place for reading.
    ///
    /// # Errors
    ///
    /// There is no such place. Whether it holds the image is [`Source::root`]'s answer.
    pub async fn source(&self, means: Means<'_>) -> anyhow::Result<Box<dyn Source>> {
        Ok(match self {
            Self::Registry(reference) => Box::new(distribution::RegistrySource::new(means, reference)),
            Self::Directory(path, name) => Box::new(layout::Layout::directory(path, name.clone())),
            Self::Archive(path, name) => Box::new(layout::Layout::archive(path, name.clone()).await?),
            Self::Containerd(name) => Box::new(store::Images::open(means.containerd, name).await?),
        })
    }

    /// Opens the place for writing, making it if that is possible.
    ///
    /// # Errors
    ///
    /// Nothing can be written there.
    pub async fn destination(&self, means: Means<'_>) -> anyhow::Result<Box<dyn Destination>> {
        Ok(match self {
            Self::Registry(reference) => Box::new(distribution::Push::new(means, reference)?),
            Self::Directory(path, name) => Box::new(directory::Directory::open(path, name.clone())?),
            Self::Archive(path, name) => Box::new(archive::Archive::create(path, name.clone())?),
            Self::Containerd(name) => Box::new(store::Import::open(means.containerd, name).await?),
        })
    }

    /// The registry's host, if it is one.
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Registry(reference) => Some(reference.host()),
            _ => None,
        }
    }
}

/// A manifest or index as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    /// What it is.
    pub media_type: String,
    /// The digest of `bytes`.
    pub digest: String,
    /// The document.
    pub bytes: Bytes,
}

impl Raw {
    /// A document made here.
    pub fn new(media_type: &str, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { media_type: media_type.to_owned(), digest: Digest::of(&bytes).to_string(), bytes }
    }
}

/// The bytes of a blob, in order. They are not verified.
pub type ByteStream = BoxStream<'static, anyhow::Result<Bytes>>;

/// Where blobs can be read.
#[async_trait]
pub trait Blobs: Send + Sync {
    /// Exactly the bytes `range` of a blob, not verified.
    ///
    /// # Errors
    ///
    /// It is not there, or shorter.
    async fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> anyhow::Result<Bytes>;

    /// The bytes of a blob from first to last, not verified.
    ///
    /// # Errors
    ///
    /// It is not there. The stream itself may fail later.
    async fn stream(&self, descriptor: &Descriptor) -> anyhow::Result<ByteStream>;
}

/// A place an image is read from.
#[async_trait]
pub trait Source: Blobs {
    /// The document the image's name stands for; `None` if there is no such image.
    ///
    /// # Errors
    ///
    /// The place cannot be asked.
    async fn root(&self) -> anyhow::Result<Option<Raw>>;

    /// A manifest or index by its descriptor, verified.
    ///
    /// # Errors
    ///
    /// It is not there, damaged, or too large for a document.
    async fn document(&self, descriptor: &Descriptor) -> anyhow::Result<Raw> {
        let (media_type, digest) = (descriptor.media_type.clone(), descriptor.digest.clone());
        Ok(Raw { media_type, digest, bytes: self.small(descriptor).await? })
    }

    /// A small blob as a whole, verified: an image's config.
    ///
    /// # Errors
    ///
    /// As [`document`](Source::document).
    async fn small(&self, descriptor: &Descriptor) -> anyhow::Result<Bytes>;
}

/// A place an image is written to. Blobs come first, then the documents that name them, the name last.
#[async_trait]
pub trait Destination: Send + Sync {
    /// Whether the blob is there, so that it need not be written.
    ///
    /// # Errors
    ///
    /// The place cannot be asked.
    async fn has(&self, descriptor: &Descriptor) -> anyhow::Result<bool>;

    /// Takes a blob over from another place without moving its bytes; false if that is not possible.
    ///
    /// # Errors
    ///
    /// The place cannot be asked.
    async fn adopt(&self, descriptor: &Descriptor, from: &Location) -> anyhow::Result<bool>;

    /// Begins a blob whose digest is not known yet.
    ///
    /// # Errors
    ///
    /// Nothing can be written.
    async fn create(&self) -> anyhow::Result<Box<dyn BlobWriter>>;

    /// Stores a manifest or index under its digest.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    async fn put(&self, document: &Raw) -> anyhow::Result<()>;

    /// Stores the image's document and makes the image's name stand for it: the last step.
    ///
    /// # Errors
    ///
    /// It cannot be written; the name then stands for what it stood for before.
    async fn publish(&self, root: &Raw) -> anyhow::Result<()>;

    /// Gives back what is held, after success and after failure.
    ///
    /// # Errors
    ///
    /// It cannot be given back.
    async fn close(&self) -> anyhow::Result<()> {
        Ok(())
    }
}

/// What is known of a blob once its last byte has been written.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The digest of its bytes.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// For a layer: the digest of its contents.
    pub diff_id: Option<String>,
}

/// Whether a blob's bytes had to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It is new.
    New,
    /// It was there already.
    Present,
}

/// A blob on its way into a destination. Dropping it leaves nothing behind where that needs no request.
#[async_trait]
pub trait BlobWriter: Send {
    /// Appends.
    ///
    /// # Errors
    ///
    /// It cannot be written; the blob is lost.
    async fn write(&mut self, bytes: Bytes) -> anyhow::Result<()>;

    /// Makes the blob appear under its digest.
    ///
    /// # Errors
    ///
    /// It cannot be; nothing of it stays.
    async fn finish(self: Box<Self>, blob: Finished) -> anyhow::Result<Kept>;

    /// Removes what was written. What cannot be removed is logged.
    async fn cancel(self: Box<Self>);
}

/// Writes a blob that is in memory.
///
/// # Errors
///
/// It cannot be written.
pub async fn put_blob(destination: &dyn Destination, bytes: Bytes) -> anyhow::Result<()> {
    let digest = Digest::of(&bytes).to_string();
    let blob = Finished { digest, size: bytes.len() as u64, diff_id: None };
    let mut writer = destination.create().await?;
    match writer.write(bytes).await {
        Ok(()) => writer.finish(blob).await.map(drop),
        Err(error) => {
            writer.cancel().await;
            Err(error)
        }
    }
}

/// Checks a digest before it becomes part of a path. Only sha256 can be verified here.
fn sha256(digest: &str) -> anyhow::Result<Digest> {
    Ok(digest.parse()?)
}

/// A document that was read whole: verified, within the limit.
fn verified(descriptor: &Descriptor, bytes: Bytes) -> anyhow::Result<Bytes> {
    let (expected, actual) = (sha256(&descriptor.digest)?, Digest::of(&bytes));
    ensure!(actual == expected, "blob {expected} is damaged: its bytes have digest {actual}");
    Ok(bytes)
}

/// Refuses a blob that is too large for a document before it is read.
fn within_limit(descriptor: &Descriptor) -> anyhow::Result<()> {
    let Descriptor { digest, size, .. } = descriptor;
    ensure!(
        *size <= DOCUMENT_LIMIT,
        "document {digest} of {size} bytes is over the limit of {DOCUMENT_LIMIT}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_shown() {
        let path = |path: &str| PathBuf::from(path);
        let cases = [
            ("docker://r.example/a:1", Location::Registry("r.example/a:1".parse().unwrap())),
            ("oci:/a/b", Location::Directory(path("/a/b"), None)),
            ("oci:a:v1", Location::Directory(path("a"), Some("v1".to_owned()))),
            (
                "oci:a:r.example:5000/x:1",
                Location::Directory(path("a"), Some("r.example:5000/x:1".to_owned())),
            ),
            ("oci-archive:a.tar", Location::Archive(path("a.tar"), None)),
            ("oci-archive:a.tar:v1", Location::Archive(path("a.tar"), Some("v1".to_owned()))),
            ("containerd:r.example/a:1", Location::Containerd("r.example/a:1".to_owned())),
        ];
        for (text, location) in cases {
            assert_eq!(text.parse::<Location>().unwrap(), location);
            assert_eq!(location.to_string(), text);
        }
        let hub: Location = "docker://alpine".parse().unwrap();
        assert_eq!(hub.to_string(), "docker://docker.io/library/alpine:latest");
        assert_eq!(hub.host(), Some("docker.io"));
    }

    #[test]
    fn other_texts_are_no_places() {
        for text in [
            "",
            "alpine",
            "r.example/a:1",
            "docker:r.example/a",
            "docker://",
            "docker://A",
            "oci:",
            "oci::v1",
            "oci:a:",
            "oci-archive:",
            "containerd:",
            "dir:/a",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
