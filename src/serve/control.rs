//! The control socket: what the daemon says of itself, and does when asked by `lazurite cache`, `status` and `drain`.
//!
//! Beside containerd's socket, with `.control` behind its name, so that every daemon has its own. An adapter and nothing
//! else.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use fusefs::{Evicted, Plane, Refs};
use proto::control::control_server::{Control, ControlServer};
use proto::control::{
    self, DrainRequest, DrainResponse, EvictRequest, EvictResponse, Fallback, Layer, ListFallbacksRequest,
    ListFallbacksResponse, ListLayersRequest, ListLayersResponse, ListSlotsRequest, ListSlotsResponse,
    LoginRequest, LoginResponse, Slot, State,
};
use registry::PullLogin;
use snapshotter::{Remote, Snapshotter};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::cri::OnPull;
use super::plane::{self, Absent, Port};

/// The control socket of the daemon whose socket for containerd is `address`.
pub fn address(address: &Path) -> PathBuf {
    let mut name = address.as_os_str().to_owned();
    name.push(".control");
    name.into()
}

/// Whose socket it is.
pub enum Role {
    /// The snapshotter's.
    Snapshotter(Arc<Snapshotter<Port>>),
    /// The additional layer store's, with who is told of logins.
    Store(Arc<Refs>, OnPull),
}

/// Serves until `shutdown` is ready.
pub async fn serve(
    listener: UnixListener,
    plane: Arc<Plane>,
    role: Role,
    absent: Absent,
    shutdown: impl Future<Output = ()>,
) {
    let served = tonic::transport::Server::builder()
        .add_service(ControlServer::new(Service { plane, role, absent }))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await;
    if let Err(error) = served {
        tracing::warn!(%error, "the control socket is closed");
    }
}

struct Service {
    plane: Arc<Plane>,
    role: Role,
    absent: Absent,
}

#[tonic::async_trait]
impl Control for Service {
    async fn list_layers(
        &self,
        _: Request<ListLayersRequest>,
    ) -> Result<Response<ListLayersResponse>, Status> {
        let layers = self.plane.layers().iter().map(layer).collect();
        let most_bytes = self.plane.cache().most.map_or(0, std::num::NonZero::get);
        Ok(Response::new(ListLayersResponse { layers, most_bytes }))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let plane = self.plane.clone();
        let busy = tokio::task::spawn_blocking(move || plane.drain()).await;
        let busy = busy.map_err(|error| Status::internal(error.to_string()))?;
        let busy = busy.map_err(|error| Status::internal(format!("the mount table: {error}")))?;
        let busy = busy.iter().map(|path| path.display().to_string()).collect();
        Ok(Response::new(DrainResponse { busy }))
    }

    async fn list_slots(&self, _: Request<ListSlotsRequest>) -> Result<Response<ListSlotsResponse>, Status> {
        let internal = |error: String| Status::internal(error);
        let (remotes, refs) = match &self.role {
            Role::Snapshotter(snapshotter) => {
                let remotes = snapshotter.remote_snapshots().await;
                (remotes.map_err(|error| internal(error.to_string()))?, None)
            }
            Role::Store(refs, _) => {
                let shown = refs.shown().into_iter();
                let remote = |(slot, request)| Remote { slot, request: plane::describe(&request) };
                (shown.map(remote).collect(), Some(refs))
            }
        };
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let error = |slot| absent.get(&slot).cloned().unwrap_or_default();
        let slots = remotes
            .iter()
            .map(|&Remote { slot, ref request }| {
                let uses = refs.map_or(0, |refs| refs.uses(slot));
                Ok(Slot { slot, layer: serde_json::to_vec(request)?, error: error(slot), uses })
            })
            .collect::<Result<_, serde_json::Error>>()
            .map_err(|error| internal(error.to_string()))?;
        Ok(Response::new(ListSlotsResponse { slots }))
    }

    async fn login(&self, request: Request<LoginRequest>) -> Result<Response<LoginResponse>, Status> {
        let Role::Store(refs, on_pull) = &self.role else {
            return Err(Status::unimplemented("the snapshotter has its logins from elsewhere"));
        };
        let LoginRequest { reference, username, password, identity_token } = request.into_inner();
        let parsed: Result<registry::Reference, _> = reference.parse();
        parsed.map_err(|error| Status::invalid_argument(error.to_string()))?;
        on_pull(&reference, PullLogin { username, password, identity_token, ..PullLogin::default() });
        refs.try_again(&reference);
        Ok(Response::new(LoginResponse {}))
    }

    async fn list_fallbacks(
        &self,
        _: Request<ListFallbacksRequest>,
    ) -> Result<Response<ListFallbacksResponse>, Status> {
        let Role::Snapshotter(snapshotter) = &self.role else {
            return Err(Status::unimplemented("a store leaves nothing to containerd"));
        };
        let counts = snapshotter.fallback_counts();
        let counts = counts.into_iter().map(|(reason, count)| (reason.to_string(), count)).collect();
        let last = snapshotter.fallbacks().into_iter().map(|fallback| Fallback {
            target: fallback.target,
            blob_digest: fallback.layer_digest,
            reason: fallback.error.reason.to_string(),
            message: fallback.error.message,
        });
        Ok(Response::new(ListFallbacksResponse { counts, last: last.collect() }))
    }

    async fn evict(&self, request: Request<EvictRequest>) -> Result<Response<EvictResponse>, Status> {
        let EvictRequest { toc_digests, unused_seconds } = request.into_inner();
        let wanted = toc_digests
            .iter()
            .map(|text| text.parse())
            .collect::<Result<Vec<estargz::Digest>, _>>()
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let plane = self.plane.clone();
        let unused = std::time::Duration::from_secs(unused_seconds);
        let evicted = tokio::task::spawn_blocking(move || plane.evict(&wanted, unused)).await;
        let evicted = evicted.map_err(|error| Status::internal(error.to_string()))?;
        let evicted = evicted.into_iter().map(|Evicted { digest, bytes, refused }| control::Evicted {
            toc_digest: digest.to_string(),
            bytes,
            refused: refused.unwrap_or_default(),
        });
        Ok(Response::new(EvictResponse { evicted: evicted.collect() }))
    }
}

fn layer((layer, slots): &(Arc<fusefs::Layer>, Vec<u64>)) -> Layer {
    let state = match (layer.graduated(), layer.is_complete()) {
        (Some(_), _) => State::Graduated,
        (None, true) => State::Local,
        (None, false) => State::Lazy,
    };
    Layer {
        toc_digest: layer.digest().to_string(),
        blob_digest: layer.blob_digest().to_owned(),
        source: layer.sources().name().to_string(),
        content_bytes: layer.index().content_bytes(),
        local_bytes: layer.store().bytes(),
        state: state.into(),
        used: layer.used(),
        slots: slots.clone(),
        error: layer.last_error().unwrap_or_default(),
    }
}
