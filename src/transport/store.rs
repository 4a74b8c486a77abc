//! containerd's image store and content store.
//!
//! A name is looked up as it was given, then as docker would complete it; new names are completed. Everything is
//! written under a lease, with the labels by which containerd's garbage collector follows an image.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use containerd_client::services::v1::{ReadContentRequest, WriteAction, WriteContentRequest};
use containerd_client::types;
use futures::{StreamExt, TryStreamExt};
use registry::Reference;
use tonic::{Code, Status};

use super::{
    BlobWriter, Blobs, ByteStream, Destination, Finished, Kept, Location, Raw, Source, sha256, verified,
    within_limit,
};
use crate::cli::ContainerdArgs;
use crate::containerd::content::{self, MESSAGE, Writer};
use crate::containerd::lease::Lease;
use crate::containerd::{Containerd, images, refused, said};
use crate::image::{Descriptor, Document};

/// Tells the digest of a layer's contents (containerd: labels.LabelUncompressed).
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// How long giving the lease back may take before the command ends all the same.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The name as docker completes it, if it has docker's form.
fn completed(name: &str) -> String {
    name.parse::<Reference>().map_or_else(|_| name.to_owned(), |reference| reference.to_string())
}

/// containerd as a source.
#[derive(Debug)]
pub struct Images {
    containerd: Containerd,
    name: String,
}

impl Images {
    /// The image `name`.
    ///
    /// # Errors
    ///
    /// containerd cannot be reached.
    pub async fn open(args: &ContainerdArgs, name: &str) -> anyhow::Result<Self> {
        let containerd = Containerd::connect(&args.address, &args.namespace).await?;
        Ok(Self { containerd, name: name.to_owned() })
    }

    async fn read(&self, descriptor: &Descriptor, range: Range<u64>) -> anyhow::Result<ByteStream> {
        let digest = sha256(&descriptor.digest)?;
        let size = range.end.checked_sub(range.start).context("a range that ends before it starts")?;
        if size == 0 {
            // A size of 0 means everything to containerd.
            return Ok(futures::stream::empty().boxed());
        }
        let request = ReadContentRequest {
            digest: digest.to_string(),
            offset: i64::try_from(range.start)?,
            size: i64::try_from(size)?,
        };
        let failed = move |status: Status| match status.code() {
            Code::NotFound => anyhow::anyhow!(
                "blob {digest} is not in containerd's content store: the image was pulled lazily or for another \
                 platform; read it from its registry instead (docker://)"
            ),
            _ => refused(format!("cannot read content {digest}"))(status),
        };
        let answers = self.containerd.content().read(request).await.map_err(failed)?.into_inner();
        Ok(answers.map_ok(|answer| Bytes::from(answer.data)).map_err(failed).boxed())
    }
}

#[async_trait]
impl Blobs for Images {
    async fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> anyhow::Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        let mut pieces = self.read(descriptor, range).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = pieces.try_next().await? {
            bytes.extend_from_slice(&piece);
            ensure!(bytes.len() as u64 <= length, "containerd sent more of {} than asked", descriptor.digest);
        }
        ensure!(bytes.len() as u64 == length, "containerd sent less of {} than asked", descriptor.digest);
        Ok(bytes.freeze())
    }

    async fn stream(&self, descriptor: &Descriptor) -> anyhow::Result<ByteStream> {
        self.read(descriptor, 0..descriptor.size).await
    }
}

#[async_trait]
impl Source for Images {
    async fn root(&self) -> anyhow::Result<Option<Raw>> {
        let mut target = images::find(&self.containerd, &self.name).await?;
        if target.is_none() {
            target = images::find(&self.containerd, &completed(&self.name)).await?;
        }
        let Some(target) = target else { return Ok(None) };
        let descriptor = Descriptor {
            media_type: target.media_type,
            digest: target.digest,
            size: u64::try_from(target.size).context("containerd gives a negative size")?,
            annotations: HashMap::new(),
            platform: None,
        };
        self.document(&descriptor).await.map(Some)
    }

    async fn small(&self, descriptor: &Descriptor) -> anyhow::Result<Bytes> {
        within_limit(descriptor)?;
        verified(descriptor, self.range(descriptor, 0..descriptor.size).await?)
    }
}

/// containerd as a destination.
#[derive(Debug)]
pub struct Import {
    lease: Lease,
    name: String,
    /// Numbers the blobs being written.
    next: AtomicU32,
}

impl Import {
    /// An image that shall have the name `name`.
    ///
    /// # Errors
    ///
    /// containerd cannot be reached or refuses.
    pub async fn open(args: &ContainerdArgs, name: &str) -> anyhow::Result<Self> {
        ensure!(
            !name.contains('@'),
            "containerd:{name} cannot be a destination: its digest is known only at the end; give a tag"
        );
        let containerd = Containerd::connect(&args.address, &args.namespace).await?;
        let lease = Lease::take(containerd, "convert").await?;
        Ok(Self { lease, name: completed(name), next: AtomicU32::new(0) })
    }
}

#[async_trait]
impl Destination for Import {
    async fn has(&self, descriptor: &Descriptor) -> anyhow::Result<bool> {
        let digest = sha256(&descriptor.digest)?.to_string();
        // Held first, so that it cannot be collected between the answer and the image record.
        self.lease.hold("content", &digest).await?;
        Ok(content::info(self.lease.containerd(), &digest).await?.is_some())
    }

    async fn adopt(&self, _: &Descriptor, _: &Location) -> anyhow::Result<bool> {
        Ok(false)
    }

    async fn create(&self) -> anyhow::Result<Box<dyn BlobWriter>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let ingest = format!("{}-{number}", self.lease.id());
        let containerd = self.lease.containerd().clone();
        let first = message(&ingest, WriteAction::Stat, 0, Bytes::new());
        let writer = Writer::open(&containerd, first).await.map_err(refused("cannot begin a blob"))?;
        Ok(Box::new(Ingest { containerd, ingest, writer, size: 0 }))
    }

    async fn put(&self, document: &Raw) -> anyhow::Result<()> {
        let parsed = Document::parse(&document.media_type, &document.bytes)?;
        let kind = match parsed {
            Document::Index(_) => "index",
            Document::Manifest(_) => "manifest",
        };
        let containerd = self.lease.containerd();
        content::put(containerd, kind, &document.digest, &document.bytes).await?;
        content::label(containerd, &document.digest, |_| parsed.gc_labels()).await
    }

    async fn publish(&self, root: &Raw) -> anyhow::Result<()> {
        self.put(root).await?;
        let target = types::Descriptor {
            media_type: root.media_type.clone(),
            digest: root.digest.clone(),
            size: i64::try_from(root.bytes.len())?,
            annotations: HashMap::new(),
        };
        images::record(self.lease.containerd(), &self.name, target).await
    }

    async fn close(&self) -> anyhow::Result<()> {
        tokio::time::timeout(CLOSE_TIMEOUT, self.lease.release()).await.with_context(|| {
            format!("containerd does not answer; lease {} expires by itself", self.lease.id())
        })?
    }
}

fn message(ingest: &str, action: WriteAction, offset: u64, data: Bytes) -> WriteContentRequest {
    WriteContentRequest {
        action: action.into(),
        r#ref: ingest.to_owned(),
        // No blob comes near this size.
        offset: i64::try_from(offset).unwrap_or(i64::MAX),
        data: data.to_vec(),
        ..Default::default()
    }
}

struct Ingest {
    containerd: Containerd,
    ingest: String,
    writer: Writer,
    size: u64,
}

/// Drops what was received of a blob.
async fn abort(containerd: &Containerd, ingest: &str) {
    if let Err(status) = content::abort(containerd, ingest).await {
        tracing::warn!(ingest, error = said(&status), "cannot drop an unfinished blob");
    }
}

#[async_trait]
impl BlobWriter for Ingest {
    async fn write(&mut self, mut bytes: Bytes) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(MESSAGE));
            let length = piece.len() as u64;
            let message = message(&self.ingest, WriteAction::Write, self.size, piece);
            self.writer.send(message).await.map_err(refused("cannot store a blob"))?;
            self.size += length;
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>, blob: Finished) -> anyhow::Result<Kept> {
        let labels: HashMap<String, String> =
            blob.diff_id.map(|diff_id| (UNCOMPRESSED.to_owned(), diff_id)).into_iter().collect();
        let commit = WriteContentRequest {
            total: i64::try_from(blob.size)?,
            expected: blob.digest.clone(),
            labels: labels.clone(),
            ..message(&self.ingest, WriteAction::Commit, self.size, Bytes::new())
        };
        match self.writer.send(commit).await {
            Ok(()) => Ok(Kept::New),
            Err(status) if status.code() == Code::AlreadyExists => {
                abort(&self.containerd, &self.ingest).await;
                content::label(&self.containerd, &blob.digest, |_| labels).await?;
                Ok(Kept::Present)
            }
            Err(status) => {
                abort(&self.containerd, &self.ingest).await;
                Err(refused(format!("cannot store blob {}", blob.digest))(status))
            }
        }
    }

    async fn cancel(self: Box<Self>) {
        let Self { containerd, ingest, writer, .. } = *self;
        // The blob is locked as long as the stream is open.
        drop(writer);
        abort(&containerd, &ingest).await;
    }
}
