//! A registry.
//!
//! Blobs that are short enough are held until their end: then their digest is known, and what the registry has is not
//! sent again. Longer ones go out as they come, in chunks.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, ensure};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use registry::{ReadOptions, Reference, Registry, StreamOptions, Upload, UploadOptions};
use tokio::time::Instant;

use super::{
    BlobWriter, Blobs, ByteStream, DOCUMENT_LIMIT, Destination, Finished, Kept, Location, Means, Raw, Source,
    verified, within_limit,
};
use crate::image::Descriptor;

/// Longest blob that is held, in bytes. A run that is repeated after an interruption sends no blob up to this size
/// again; as many of them as there are jobs are in memory.
const HELD: usize = 16 << 20;

/// A registry as a source.
#[derive(Debug)]
pub struct RegistrySource {
    registry: Registry,
    reference: Reference,
    deadline: Duration,
}

impl RegistrySource {
    /// The image `reference`. No I/O.
    pub fn new(means: Means<'_>, reference: &Reference) -> Self {
        Self { registry: means.registry.clone(), reference: reference.clone(), deadline: means.deadline }
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<registry::Blob, registry::Error> {
        self.registry.blob(&self.reference, &descriptor.digest, Some(descriptor.size))
    }

    async fn manifest(&self, digest: Option<&str>) -> Result<Raw, registry::Error> {
        let deadline = Instant::now() + self.deadline;
        let answer = self.registry.manifest(&self.reference, digest, deadline).await?;
        Ok(Raw { media_type: answer.media_type, digest: answer.digest, bytes: answer.bytes })
    }
}

#[async_trait]
impl Blobs for RegistrySource {
    async fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> anyhow::Result<Bytes> {
        let options = ReadOptions::until(Instant::now() + self.deadline);
        Ok(self.blob(descriptor)?.read(range, &options).await?.bytes)
    }

    async fn stream(&self, descriptor: &Descriptor) -> anyhow::Result<ByteStream> {
        let options = StreamOptions { range_timeout: self.deadline, ..StreamOptions::default() };
        Ok(self.blob(descriptor)?.stream(options)?.map_err(anyhow::Error::from).boxed())
    }
}

#[async_trait]
impl Source for RegistrySource {
    async fn root(&self) -> anyhow::Result<Option<Raw>> {
        match self.manifest(None).await {
            Ok(raw) => Ok(Some(raw)),
            Err(registry::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn document(&self, descriptor: &Descriptor) -> anyhow::Result<Raw> {
        let raw = self.manifest(Some(&descriptor.digest)).await?;
        // What the digest covers says what the bytes are; the answer's header does not.
        Ok(Raw { media_type: descriptor.media_type.clone(), ..raw })
    }

    async fn small(&self, descriptor: &Descriptor) -> anyhow::Result<Bytes> {
        within_limit(descriptor)?;
        let deadline = Instant::now() + self.deadline;
        let bytes = self.registry.blob_bytes(&self.reference, &descriptor.digest, DOCUMENT_LIMIT, deadline);
        verified(descriptor, bytes.await?)
    }
}

/// A registry as a destination.
#[derive(Debug)]
pub struct Push {
    to: Target,
}

/// Where blobs go.
#[derive(Debug, Clone)]
struct Target {
    registry: Registry,
    reference: Reference,
    deadline: Duration,
}

impl Target {
    async fn has(&self, digest: &str) -> anyhow::Result<bool> {
        let deadline = Instant::now() + self.deadline;
        Ok(self.registry.has_blob(&self.reference, digest, deadline).await?.is_some())
    }
}

impl Push {
    /// An image that shall be `reference`. No I/O.
    ///
    /// # Errors
    ///
    /// The reference names bytes that exist already, not a tag.
    pub fn new(means: Means<'_>, reference: &Reference) -> anyhow::Result<Self> {
        ensure!(
            reference.digest().is_none(),
            "{reference} cannot be a destination: its digest is known only at the end; give a tag"
        );
        let (registry, reference) = (means.registry.clone(), reference.clone());
        Ok(Self { to: Target { registry, reference, deadline: means.deadline } })
    }

    async fn put_manifest(&self, reference: &Reference, document: &Raw) -> anyhow::Result<()> {
        let Target { registry, deadline, .. } = &self.to;
        let deadline = Instant::now() + *deadline;
        registry.put_manifest(reference, &document.media_type, document.bytes.clone(), deadline).await?;
        Ok(())
    }
}

#[async_trait]
impl Destination for Push {
    async fn has(&self, descriptor: &Descriptor) -> anyhow::Result<bool> {
        self.to.has(&descriptor.digest).await
    }

    async fn adopt(&self, descriptor: &Descriptor, from: &Location) -> anyhow::Result<bool> {
        let Target { registry, reference, deadline } = &self.to;
        match from {
            Location::Registry(source)
                if source.host() == reference.host() && source.repository() != reference.repository() =>
            {
                let deadline = Instant::now() + *deadline;
                let digest = &descriptor.digest;
                Ok(registry.mount_blob(reference, digest, source.repository(), deadline).await?)
            }
            _ => Ok(false),
        }
    }

    async fn create(&self) -> anyhow::Result<Box<dyn BlobWriter>> {
        Ok(Box::new(Outgoing { to: self.to.clone(), state: State::Held(BytesMut::new()) }))
    }

    async fn put(&self, document: &Raw) -> anyhow::Result<()> {
        let (host, repository) = (self.to.reference.host(), self.to.reference.repository());
        let by_digest: Reference = format!("{host}/{repository}@{}", document.digest).parse()?;
        self.put_manifest(&by_digest, document).await
    }

    async fn publish(&self, root: &Raw) -> anyhow::Result<()> {
        self.put_manifest(&self.to.reference, root).await
    }
}

/// A blob on its way to a registry.
struct Outgoing {
    to: Target,
    state: State,
}

enum State {
    /// All of it so far.
    Held(BytesMut),
    /// It has turned out to be long.
    Sent(Box<Upload>),
}

impl Outgoing {
    async fn send(&mut self, bytes: Bytes) -> anyhow::Result<()> {
        match &mut self.state {
            State::Sent(upload) => Ok(upload.write(bytes).await?),
            State::Held(_) => anyhow::bail!("the upload was not begun"),
        }
    }
}

#[async_trait]
impl BlobWriter for Outgoing {
    async fn write(&mut self, bytes: Bytes) -> anyhow::Result<()> {
        if let State::Held(held) = &mut self.state {
            if held.len() + bytes.len() <= HELD {
                held.extend_from_slice(&bytes);
                return Ok(());
            }
            let held = held.split().freeze();
            let Target { registry, reference, .. } = &self.to;
            let upload = registry.upload(reference, UploadOptions::default()).await?;
            // Kept where cancelling finds it before anything else is awaited.
            self.state = State::Sent(Box::new(upload));
            self.send(held).await?;
        }
        self.send(bytes).await
    }

    async fn finish(self: Box<Self>, blob: Finished) -> anyhow::Result<Kept> {
        let Self { to, state } = *self;
        let shown = || format!("cannot push blob {}", blob.digest);
        match state {
            State::Held(_) if to.has(&blob.digest).await? => Ok(Kept::Present),
            State::Held(held) => {
                let options = UploadOptions::default();
                let pushed = to.registry.put_blob(&to.reference, &blob.digest, held.freeze(), options).await;
                pushed.with_context(shown)?;
                Ok(Kept::New)
            }
            State::Sent(upload) => {
                upload.finish(&blob.digest).await.with_context(shown)?;
                Ok(Kept::New)
            }
        }
    }

    async fn cancel(self: Box<Self>) {
        if let State::Sent(upload) = self.state
            && let Err(error) = upload.cancel().await
        {
            tracing::warn!(%error, "an unfinished upload is left to the registry to clear away");
        }
    }
}
