//! The kubelet's connections for images, passed on to containerd, and the logins that pass by.
//!
//! A kubelet sends the login of a private image with each call of PullImage, and containerd tells a snapshotter nothing of
//! it. So the kubelet is pointed at a socket of ours. Every connection to it is joined to one of its own to containerd, and
//! bytes go through as they are, both ways: whatever the kubelet calls, with all deadlines, metadata, errors, streams
//! and cancellations, also what is not known here. Nothing takes part in HTTP/2 but [`observe`], which reads along. That also
//! lets in older kubelets, which send a socket's path as their `:authority`, which servers in Rust refuse.
//!
//! Only when containerd cannot be reached is there an answer from here: UNAVAILABLE, with the reason.
//!
//! May not keep a login, nor write one anywhere: it goes to who was named, before containerd gets the request.

mod observe;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::Status;

use observe::Observer;
use registry::{PullCredentials, PullLogin};

/// Is told of the image of each call of PullImage that has a login, and of the login.
pub type OnPull = Arc<dyn Fn(&str, PullLogin) + Send + Sync>;

/// Keeps logins for the repositories they came with.
pub fn remember(pulls: PullCredentials) -> OnPull {
    Arc::new(move |image, login| {
        if let Err(error) = pulls.remember(image, login) {
            tracing::warn!(image, %error, "the login of a pull cannot be used");
        }
    })
}

/// How long connecting to containerd may take. It is immediate unless the listener's queue is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection made while containerd was away is kept for as long at most: the next one may find it.
const AWAY: Duration = Duration::from_secs(1);
/// What is passed on at a time.
const PIECE: usize = 64 << 10;

/// Passes connections on to containerd's socket until `shutdown` is ready; then those there are end.
pub async fn serve(
    listener: UnixListener,
    containerd: PathBuf,
    on_pull: OnPull,
    shutdown: impl Future<Output = ()>,
) {
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let client = tokio::select! {
            () = &mut shutdown => return,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => client,
                Err(error) => {
                    tracing::warn!(%error, "no connection from the kubelet can be taken");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let (containerd, on_pull) = (containerd.clone(), on_pull.clone());
        connections.spawn(async move {
            match connect(&containerd).await {
                Ok(server) => join(client, server, on_pull).await,
                Err(error) => refuse(client, &containerd, &error).await,
            }
        });
    }
}

async fn connect(containerd: &Path) -> std::io::Result<UnixStream> {
    tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(containerd)).await?
}

/// Passes bytes both ways until either side is gone: HTTP/2 knows no connection with one direction.
async fn join(client: UnixStream, server: UnixStream, on_pull: OnPull) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let told = |image: &str, login| {
        tracing::debug!(image, "a login for a pull");
        on_pull(image, login);
    };
    let requests = async {
        let mut observer = Some(Observer::new());
        let mut piece = vec![0; PIECE];
        while let Ok(length @ 1..) = from_client.read(&mut piece).await {
            let bytes = &piece[..length];
            if let Some(Err(error)) = observer.as_mut().map(|observer| observer.read(bytes, &told)) {
                tracing::warn!(%error, "the kubelet's logins on this connection go unseen; it is passed on as before");
                observer = None;
            }
            if to_server.write_all(bytes).await.is_err() {
                // What containerd said last is still on its way to the client.
                std::future::pending::<()>().await;
            }
        }
    };
    let answers = tokio::io::copy(&mut from_server, &mut to_client);
    tokio::select! {
        () = requests => {}
        _ = answers => {}
    }
}

/// Answers the first calls with UNAVAILABLE and ends the connection, so that the client makes a new one.
async fn refuse(client: UnixStream, containerd: &Path, error: &std::io::Error) {
    let message = format!("lazurite cannot reach containerd at {}: {error}", containerd.display());
    let asked = Notify::new();
    let answer = hyper::service::service_fn(|_| {
        asked.notify_one();
        let status = Status::unavailable(&message);
        async { Ok::<_, Infallible>(status.into_http::<http_body_util::Empty<bytes::Bytes>>()) }
    });
    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(client), answer));
    tokio::select! {
        _ = &mut connection => return,
        () = asked.notified() => {}
        () = tokio::time::sleep(AWAY) => {}
    }
    connection.as_mut().graceful_shutdown();
    // An error is the client's affair; one that stays silent is not waited for.
    let _ = tokio::time::timeout(AWAY, connection).await;
}

#[cfg(test)]
mod tests;
