//! How long a layer's tar is, from the tar-split in its blob: older podman must know to save it in Docker's format.

use std::sync::Arc;

use estargz::TarSplit;
use registry::ReadOptions;
use tokio::time::Instant;

use crate::layer::Layer;

#[derive(Debug, thiserror::Error)]
enum SplitError {
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error(transparent)]
    Format(#[from] estargz::Error),
    #[error(transparent)]
    Panicked(#[from] tokio::task::JoinError),
}

/// Bytes of a layer's tar, for one request; `None`, and a word of it in the log, if they cannot be told in time.
pub(super) async fn tar_length(layer: Arc<Layer>, split: TarSplit, deadline: Instant) -> Option<u64> {
    let digest = layer.digest();
    let error = match tokio::time::timeout_at(deadline, read(layer, split, deadline)).await {
        Ok(Ok(length)) => return Some(length),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "it takes too long".to_owned(),
    };
    tracing::warn!(layer = %digest, error, "no tar-split: podman up to 5.0 cannot save the layer in Docker's format");
    None
}

async fn read(layer: Arc<Layer>, split: TarSplit, deadline: Instant) -> Result<u64, SplitError> {
    let limits = *layer.engine().limits();
    let range = split.range(layer.blob_size(), &limits)?;
    let served = layer.sources().read(range, &ReadOptions::until(deadline)).await;
    let (served, _) = served.map_err(|(error, _)| error)?;
    let named = layer.tar_split();
    let summing = move || split.tar_length(&served.bytes, named, &limits);
    Ok(tokio::task::spawn_blocking(summing).await??)
}
