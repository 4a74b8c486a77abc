//! The gRPC service `containerd.services.snapshots.v1.Snapshots`.
//!
//! An adapter and nothing else: requests in, [`Snapshotter`] calls, replies and status codes out. The only code
//! that knows the crate `containerd-snapshots` and its old tonic (see `docs/design/0002-tonic-versions.md`), and
//! the only place where success in attaching a layer becomes the status `ALREADY_EXISTS`, which is how containerd
//! is told to skip it.
//!
//! Fields ignored, and why: `snapshotter` is the name containerd knows us by. Commit's `parent` (since 2.2) is
//! sent only to snapshotters that claim the capability `rebase`, which would leave Prepare without the parent that
//! a lazy snapshot is committed over; it must not be configured.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    io,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use containerd_snapshots::{
    api::types,
    tonic::{Status, transport::Server},
};
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use tokio::net::{UnixListener, UnixStream};

use crate::{Error, FileSystem, Info, Kind, Prepared, Snapshotter, overlay::Mount};

/// How long calls in flight may take to finish once a shutdown is asked for.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);
/// Pause after a failed accept: the usual failure, no file descriptors left, persists for a while.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the snapshotter on a listening socket until `shutdown` is ready and the calls in flight are answered.
///
/// # Errors
/// When the server itself fails; a failing connection or call does not end it.
pub async fn serve<F: FileSystem>(
    listener: UnixListener,
    snapshotter: Arc<Snapshotter<F>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = Server::builder()
        .add_service(containerd_snapshots::server(Arc::new(Adapter(snapshotter))))
        .serve_with_incoming_shutdown(connections(listener), async move {
            shutdown.await;
            // The receiver outlives the server.
            let _ = stopping.send(());
        });
    let overdue = async {
        match stopped.await {
            Ok(()) => tokio::time::sleep(SHUTDOWN_LIMIT).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        result = server => result.map_err(|error| Error::internal("serving containerd", error)),
        () = overdue => {
            tracing::warn!("calls are still in flight {SHUTDOWN_LIMIT:?} after the shutdown, leaving them");
            Ok(())
        }
    }
}

/// Connections as they come; a failed accept is no reason to stop listening.
fn connections(listener: UnixListener) -> impl Stream<Item = io::Result<UnixStream>> {
    stream::unfold(listener, async |listener| {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => return Some((Ok(connection), listener)),
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection from containerd");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

#[derive(Debug)]
struct Adapter<F>(Arc<Snapshotter<F>>);

#[async_trait]
impl<F: FileSystem> containerd_snapshots::Snapshotter for Adapter<F> {
    type Error = Error;
    type InfoStream = BoxStream<'static, Result<containerd_snapshots::Info, Error>>;

    async fn stat(&self, key: String) -> Result<containerd_snapshots::Info, Error> {
        self.0.stat(&key).await.map(Into::into)
    }

    async fn update(
        &self,
        info: containerd_snapshots::Info,
        fieldpaths: Option<Vec<String>>,
    ) -> Result<containerd_snapshots::Info, Error> {
        self.0.update(&info.name, ordered(info.labels), fieldpaths.unwrap_or_default()).await.map(Into::into)
    }

    async fn usage(&self, key: String) -> Result<containerd_snapshots::Usage, Error> {
        let usage = self.0.usage(&key).await?;
        Ok(containerd_snapshots::Usage {
            inodes: usage.inodes.try_into().unwrap_or(i64::MAX),
            size: usage.size.try_into().unwrap_or(i64::MAX),
        })
    }

    async fn mounts(&self, key: String) -> Result<Vec<types::Mount>, Error> {
        self.0.mounts(&key).await.map(mounts)
    }

    async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<types::Mount>, Error> {
        match self.0.prepare(&key, &parent, ordered(labels)).await? {
            Prepared::Mounts(all) => Ok(mounts(all)),
            Prepared::Remote { name } => {
                Err(Error::AlreadyExists(format!("target snapshot {name:?} exists")))
            }
        }
    }

    async fn view(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<types::Mount>, Error> {
        self.0.view(&key, &parent, ordered(labels)).await.map(mounts)
    }

    async fn commit(&self, name: String, key: String, labels: HashMap<String, String>) -> Result<(), Error> {
        self.0.commit(&name, &key, ordered(labels)).await
    }

    async fn remove(&self, key: String) -> Result<(), Error> {
        self.0.remove(&key).await
    }

    async fn clear(&self) -> Result<(), Error> {
        self.0.cleanup().await
    }

    async fn list(&self, _snapshotter: String, filters: Vec<String>) -> Result<Self::InfoStream, Error> {
        let infos = self.0.list(&filters).await?;
        Ok(stream::iter(infos).map(|info| Ok(info.into())).boxed())
    }
}

fn ordered(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}

fn mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    mounts
        .into_iter()
        .map(|mount| types::Mount {
            r#type: mount.fs_type.to_owned(),
            source: mount.source,
            target: String::new(),
            options: mount.options,
        })
        .collect()
}

impl From<Info> for containerd_snapshots::Info {
    fn from(info: Info) -> Self {
        containerd_snapshots::Info {
            kind: match info.kind {
                Kind::View => containerd_snapshots::Kind::View,
                Kind::Active => containerd_snapshots::Kind::Active,
                Kind::Committed => containerd_snapshots::Kind::Committed,
            },
            name: info.name,
            parent: info.parent,
            labels: info.labels.into_iter().collect(),
            created_at: info.created,
            updated_at: info.updated,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let text = error.to_string();
        match error {
            Error::NotFound(_) => Status::not_found(text),
            Error::AlreadyExists(_) => Status::already_exists(text),
            Error::FailedPrecondition(_) => Status::failed_precondition(text),
            Error::InvalidArgument(_) => Status::invalid_argument(text),
            Error::Unavailable(_) => Status::unavailable(text),
            Error::Internal { .. } => Status::internal(text),
        }
    }
}
