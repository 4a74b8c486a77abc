//! A file with one layer, as something that blobs are read from.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::task::spawn_blocking;

use crate::image::Descriptor;
use crate::transport::{Blobs, ByteStream};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// An open file; descriptors are taken to mean it whatever their digest.
#[derive(Debug)]
pub struct LayerFile(Arc<File>);

/// Opens a file, with a descriptor that has its size, and its name in place of a digest.
///
/// # Errors
///
/// It cannot be read, or is none.
pub async fn open(path: &Path) -> anyhow::Result<(LayerFile, Descriptor)> {
    let shown = path.display().to_string();
    let path = path.to_owned();
    let (file, metadata) = spawn_blocking(move || {
        let file = File::open(&path)?;
        let metadata = file.metadata()?;
        std::io::Result::Ok((file, metadata))
    })
    .await?
    .with_context(|| format!("cannot read {shown}"))?;
    ensure!(metadata.is_file(), "{shown} is not a file; for an image layout say oci:{shown}");
    let descriptor = Descriptor {
        media_type: String::new(),
        digest: shown,
        size: metadata.len(),
        annotations: Default::default(),
        platform: None,
    };
    Ok((LayerFile(Arc::new(file)), descriptor))
}

#[async_trait]
impl Blobs for LayerFile {
    async fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> anyhow::Result<Bytes> {
        let file = self.0.clone();
        let read = spawn_blocking(move || {
            let length = usize::try_from(range.end - range.start).map_err(std::io::Error::other)?;
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, range.start)?;
            std::io::Result::Ok(Bytes::from(bytes))
        });
        read.await?.with_context(|| format!("cannot read {}", descriptor.digest))
    }

    async fn stream(&self, descriptor: &Descriptor) -> anyhow::Result<ByteStream> {
        let (this, descriptor) = (Self(self.0.clone()), descriptor.clone());
        let pieces = stream::try_unfold((this, 0), move |(this, at)| {
            let descriptor = descriptor.clone();
            async move {
                let end = descriptor.size.min(at + PIECE);
                if at == end {
                    return Ok(None);
                }
                let bytes = this.range(&descriptor, at..end).await?;
                Ok(Some((bytes, (this, end))))
            }
        });
        Ok(pieces.boxed())
    }
}
