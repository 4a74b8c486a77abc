//! The connection to containerd: one channel, and clients whose every call names the namespace and the lease.
//!
//! Owns how containerd is reached and how its refusals are worded. Knows nothing of images or snapshots.

pub mod content;
pub mod images;
pub mod lease;

use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::version_client::VersionClient;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// containerd's socket unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";

/// How long connecting to a unix socket may take. It is immediate unless the listener's queue is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection with the namespace, and the lease if one is taken, that its calls carry.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    scope: Scope,
}

/// A channel whose calls carry a [`Scope`].
pub type Scoped = InterceptedService<Channel, Scope>;

/// The metadata containerd reads the namespace and the lease of a call from.
#[derive(Debug, Clone)]
pub struct Scope {
    namespace: AsciiMetadataValue,
    lease: Option<AsciiMetadataValue>,
}

impl Interceptor for Scope {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            metadata.insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

impl Containerd {
    /// Connects to the socket at `address`; calls are made in `namespace`.
    ///
    /// # Errors
    ///
    /// Nobody listens there, or the namespace cannot be sent.
    pub async fn connect(address: &Path, namespace: &str) -> anyhow::Result<Self> {
        let namespace = namespace.parse().with_context(|| format!("{namespace:?} cannot be a namespace"))?;
        let channel = connect(address).await.with_context(|| {
            format!("cannot reach containerd at {} (is it running there?)", address.display())
        })?;
        Ok(Self { channel, scope: Scope { namespace, lease: None } })
    }

    /// The same connection with calls that keep what they make under the lease `id`.
    ///
    /// # Errors
    ///
    /// The id cannot be sent.
    pub fn leased(&self, id: &str) -> anyhow::Result<Self> {
        let lease = Some(id.parse().with_context(|| format!("{id:?} cannot be a lease"))?);
        Ok(Self { channel: self.channel.clone(), scope: Scope { lease, ..self.scope.clone() } })
    }

    /// The content store.
    pub fn content(&self) -> ContentClient<Scoped> {
        ContentClient::with_interceptor(self.channel.clone(), self.scope.clone())
    }

    /// Applying layers to mounts.
    pub fn diff(&self) -> DiffClient<Scoped> {
        DiffClient::with_interceptor(self.channel.clone(), self.scope.clone())
    }

    /// Image records.
    pub fn images(&self) -> ImagesClient<Scoped> {
        ImagesClient::with_interceptor(self.channel.clone(), self.scope.clone())
    }

    /// Loaded plugins.
    pub fn introspection(&self) -> IntrospectionClient<Scoped> {
        IntrospectionClient::with_interceptor(self.channel.clone(), self.scope.clone())
    }

    /// Leases.
    pub fn leases(&self) -> LeasesClient<Scoped> {
        LeasesClient::with_interceptor(self.channel.clone(), self.scope.clone())
    }

    /// Snapshots, of whichever snapshotter a request names.
    pub fn snapshots(&self) -> SnapshotsClient<Scoped> {
        SnapshotsClient::with_interceptor(self.channel.clone(), self.scope.clone())
    }

    /// Which containerd this is.
    pub fn version(&self) -> VersionClient<Scoped> {
        VersionClient::with_interceptor(self.channel.clone(), self.scope.clone())
    }
}

/// A channel to the unix socket at `address`.
///
/// # Errors
///
/// Nobody listens there.
pub async fn connect(address: &Path) -> anyhow::Result<Channel> {
    // Asked first, because the channel's own error hides the system's reason.
    tokio::net::UnixStream::connect(address).await?;
    Ok(tokio::time::timeout(CONNECT_TIMEOUT, containerd_client::connect(address)).await??)
}

/// Words a refused call: what was tried, and what containerd said.
pub fn refused(tried: impl Display) -> impl FnOnce(Status) -> anyhow::Error {
    move |status| anyhow::anyhow!("{tried}: {}", said(&status))
}

/// What a status says, without the code where the message repeats it.
pub fn said(status: &Status) -> String {
    match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    }
}
