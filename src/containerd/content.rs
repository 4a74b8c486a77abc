//! Writing to containerd's content store.
//!
//! Owns the write protocol: small documents in one message, larger blobs as a stream of messages of which each is
//! answered before the next is sent. The content store checks every blob against its digest when it is committed, so
//! nothing wrong can get in. What is written is kept by the lease the connection carries.

use std::collections::HashMap;
use std::time::Duration;

use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, UpdateRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use futures::channel::mpsc;
use futures::{SinkExt, stream};
use prost_types::FieldMask;
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use super::{Containerd, refused};

/// Bytes of one message to containerd, which takes at most 16 MiB.
pub const MESSAGE: usize = 1 << 20;

/// How long another client may hold a blob we need before we give up on it. It is checked every [`LOCK_PAUSE`].
pub const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// See [`LOCK_PATIENCE`].
pub const LOCK_PAUSE: Duration = Duration::from_millis(250);

/// Stores a document that is in memory, unless it is there.
///
/// # Errors
///
/// containerd refuses it, for instance because it does not match its digest.
pub async fn put(containerd: &Containerd, kind: &str, digest: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let commit = WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: format!("{kind}-{digest}"),
        total: i64::try_from(bytes.len())?,
        expected: digest.to_owned(),
        data: bytes.to_vec(),
        ..Default::default()
    };
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match write_one(containerd, commit.clone()).await {
            Ok(()) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
            Err(status) if locked(&status) && Instant::now() < deadline => {
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            Err(status) => return Err(refused(format!("cannot store {kind} {digest}"))(status)),
        }
    }
}

async fn write_one(containerd: &Containerd, request: WriteContentRequest) -> Result<(), Status> {
    let mut answers = containerd.content().write(stream::iter([request])).await?.into_inner();
    while answers.message().await?.is_some() {}
    Ok(())
}

/// What the store knows of a blob; `None` if it is not there.
///
/// # Errors
///
/// containerd refuses.
pub async fn info(containerd: &Containerd, digest: &str) -> anyhow::Result<Option<Info>> {
    match containerd.content().info(InfoRequest { digest: digest.to_owned() }).await {
        Ok(answer) => Ok(answer.into_inner().info),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(refused(format!("cannot look up content {digest}"))(status)),
    }
}

/// Sets the labels that `wanted` makes of those present on a blob that is in the store; others stay.
///
/// # Errors
///
/// The blob is not there.
pub async fn label(
    containerd: &Containerd,
    digest: &str,
    wanted: impl FnOnce(&HashMap<String, String>) -> HashMap<String, String>,
) -> anyhow::Result<()> {
    let tried = || format!("cannot label content {digest}");
    let mut content = containerd.content();
    let info = content.info(InfoRequest { digest: digest.to_owned() }).await.map_err(refused(tried()))?;
    let present = info.into_inner().info.unwrap_or_default().labels;
    let mut labels = wanted(&present);
    labels.retain(|key, value| present.get(key) != Some(value));
    if labels.is_empty() {
        return Ok(());
    }
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let request = UpdateRequest {
        info: Some(Info { digest: digest.to_owned(), labels, ..Default::default() }),
        update_mask: Some(FieldMask { paths }),
    };
    content.update(request).await.map(drop).map_err(refused(tried()))
}

/// Drops what was received of the ingest `name`; that there is none is fine.
///
/// # Errors
///
/// containerd refuses.
pub async fn abort(containerd: &Containerd, name: &str) -> Result<(), Status> {
    match containerd.content().abort(AbortRequest { r#ref: name.to_owned() }).await {
        Err(status) if status.code() != Code::NotFound => Err(status),
        _ => Ok(()),
    }
}

/// Somebody else is writing the same blob.
pub fn locked(status: &Status) -> bool {
    status.code() == Code::Unavailable
}

/// A blob being written. Every message is answered before the next is sent, so that memory stays bounded by what the
/// caller has in flight.
#[derive(Debug)]
pub struct Writer {
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    opened: WriteContentResponse,
}

impl Writer {
    /// Opens a blob with the first message.
    ///
    /// # Errors
    ///
    /// containerd refuses; `AlreadyExists` if the message names the digest of a blob that is there.
    pub async fn open(containerd: &Containerd, first: WriteContentRequest) -> Result<Self, Status> {
        let (mut requests, outgoing) = mpsc::channel(1);
        // containerd answers nothing, not even headers, before it has the first message.
        requests.try_send(first).map_err(|_| Status::internal("the request stream is closed"))?;
        let mut answers = containerd.content().write(outgoing).await?.into_inner();
        let opened = answer(&mut answers).await?;
        Ok(Self { requests, answers, opened })
    }

    /// The answer to the first message, which says how much of the blob is there.
    pub fn opened(&self) -> &WriteContentResponse {
        &self.opened
    }

    /// Sends a message and waits for its answer.
    ///
    /// # Errors
    ///
    /// containerd refuses.
    pub async fn send(&mut self, message: WriteContentRequest) -> Result<(), Status> {
        // If the stream is gone, its end says why.
        let _ = self.requests.send(message).await;
        answer(&mut self.answers).await.map(drop)
    }
}

async fn answer(answers: &mut Streaming<WriteContentResponse>) -> Result<WriteContentResponse, Status> {
    answers.message().await?.ok_or_else(|| Status::aborted("containerd ended the transfer early"))
}
