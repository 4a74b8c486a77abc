//! A served node and its client, over a unix socket.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::Arc,
    task::{Context, Poll},
};

use containerd_snapshots::{
    api::{
        snapshots::v1::{snapshots_client::SnapshotsClient, *},
        types::Mount,
    },
    tonic::{
        Status,
        codegen::{BoxFuture, Service, http::Uri},
        transport::{Channel, Endpoint},
    },
};
use snapshotter::{Error, service};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::oneshot,
    task::JoinHandle,
};

use crate::node::Node;

pub type Result<T> = std::result::Result<T, Status>;

/// A snapshotter behind a socket.
pub struct Served {
    pub node: Node,
    pub client: Client,
    pub stop: oneshot::Sender<()>,
    pub server: JoinHandle<std::result::Result<(), Error>>,
}

impl Served {
    pub async fn new() -> Served {
        let node = Node::new();
        let socket = node.path("test.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (stop, stopped) = oneshot::channel();
        let snapshotter = Arc::new(node.snapshotter.clone().unwrap());
        let server = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            service::serve(listener, snapshotter, shutdown).await
        });
        let client = Client::connect(socket).await;
        Served { node, client, stop, server }
    }
}

struct Connector(PathBuf);

impl Service<Uri> for Connector {
    type Response = UnixStream;
    type Error = io::Error;
    type Future = BoxFuture<UnixStream, io::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async { UnixStream::connect(path).await })
    }
}

/// The calls as containerd's proxy makes them.
#[derive(Clone)]
pub struct Client(SnapshotsClient<Channel>);

/// The label the suite gives to everything, so that no garbage collector takes it.
pub fn rooted() -> HashMap<String, String> {
    HashMap::from([("containerd.io/gc.root".to_owned(), "2024-01-01T00:00:00Z".to_owned())])
}

impl Client {
    pub async fn connect(socket: PathBuf) -> Client {
        let channel = Endpoint::from_static("http://socket").connect_with_connector(Connector(socket)).await;
        Client(SnapshotsClient::new(channel.unwrap()))
    }

    pub async fn prepare_with(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            snapshotter: "lazurite".into(),
            key: key.into(),
            parent: parent.into(),
            labels,
        };
        Ok(self.0.clone().prepare(request).await?.into_inner().mounts)
    }

    pub async fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>> {
        self.prepare_with(key, parent, rooted()).await
    }

    pub async fn view_with(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>> {
        let request = ViewSnapshotRequest {
            snapshotter: "lazurite".into(),
            key: key.into(),
            parent: parent.into(),
            labels,
        };
        Ok(self.0.clone().view(request).await?.into_inner().mounts)
    }

    pub async fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>> {
        self.view_with(key, parent, rooted()).await
    }

    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let request = MountsRequest { snapshotter: String::new(), key: key.into() };
        Ok(self.0.clone().mounts(request).await?.into_inner().mounts)
    }

    pub async fn commit_with(&self, name: &str, key: &str, labels: HashMap<String, String>) -> Result<()> {
        let request =
            CommitSnapshotRequest { snapshotter: String::new(), name: name.into(), key: key.into(), labels };
        self.0.clone().commit(request).await.map(drop)
    }

    pub async fn commit(&self, name: &str, key: &str) -> Result<()> {
        self.commit_with(name, key, rooted()).await
    }

    pub async fn remove(&self, key: &str) -> Result<()> {
        let request = RemoveSnapshotRequest { snapshotter: String::new(), key: key.into() };
        self.0.clone().remove(request).await.map(drop)
    }

    pub async fn stat(&self, key: &str) -> Result<Info> {
        let request = StatSnapshotRequest { snapshotter: String::new(), key: key.into() };
        Ok(self.0.clone().stat(request).await?.into_inner().info.unwrap())
    }

    /// Without paths there is no mask, as from a client that gives none.
    pub async fn update(&self, info: Info, paths: &[&str]) -> Result<Info> {
        let mut request = UpdateSnapshotRequest { info: Some(info), ..Default::default() };
        if !paths.is_empty() {
            request.update_mask.get_or_insert_with(Default::default).paths =
                paths.iter().map(|path| path.to_string()).collect();
        }
        Ok(self.0.clone().update(request).await?.into_inner().info.unwrap())
    }

    /// The stream's messages as they come.
    pub async fn list(&self, filters: &[&str]) -> Result<Vec<Vec<Info>>> {
        let filters = filters.iter().map(|filter| filter.to_string()).collect();
        let request = ListSnapshotsRequest { snapshotter: String::new(), filters };
        let mut stream = self.0.clone().list(request).await?.into_inner();
        let mut messages = vec![];
        while let Some(message) = stream.message().await? {
            messages.push(message.info);
        }
        Ok(messages)
    }

    pub async fn walk(&self, filters: &[&str]) -> Result<Vec<Info>> {
        Ok(self.list(filters).await?.into_iter().flatten().collect())
    }

    pub async fn usage(&self, key: &str) -> Result<UsageResponse> {
        let request = UsageRequest { snapshotter: String::new(), key: key.into() };
        Ok(self.0.clone().usage(request).await?.into_inner())
    }

    pub async fn cleanup(&self) -> Result<()> {
        self.0.clone().cleanup(CleanupRequest::default()).await.map(drop)
    }
}
