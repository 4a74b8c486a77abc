//! Prepare.
//!
//! ```text
//! labels, perhaps the image's manifest
//!        -> decide -> Exists:    done, nothing created
//!                     Ordinary:  tx: active record, directory -> mounts
//!                     Lazy:      tx A: active record, directory
//!                                attach, bounded in time
//!                                  failed: detach; tx: note why -> mounts
//!                                link: fs becomes a symlink to the layer
//!                                tx B: active -> committed under the target's name -> done
//!                                  failed: remove the active record, detach
//! ```

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::FutureExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Inner, Prepared};
use crate::{
    Error,
    error::Result,
    fallbacks::Fallback,
    filesystem::{AttachError, FileSystem, LayerRequest, LayerRoot, Reason, Usage},
    labels::{self, Offer},
    metastore::rules::{self, Commit, Creation},
    prepare::{self, Decision, Place},
    record::{Kind, Owner, Record},
};

/// How long a detach, which must not block, is waited for before the work goes on without it.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

impl<F: FileSystem> Inner<F> {
    pub(super) async fn prepare(
        self: Arc<Self>,
        key: String,
        parent: String,
        labels: BTreeMap<String, String>,
    ) -> Result<Prepared> {
        let _key = self.keys.lock(&key).await;
        let deadline = Instant::now() + self.config.attach_timeout;
        let offered = labels::parse(&labels);
        let active = Creation { kind: Kind::Active, key, parent, labels, fallback: None };
        let request = match offered {
            None => return self.ordinary(active, None).await,
            Some(Err(error)) => return self.ordinary(active, Some(error)).await,
            Some(Ok(Offer::Named(request))) => request,
            Some(Ok(Offer::Unnamed(request))) => match self.name(request, deadline).await {
                Ok(request) => request,
                Err(error) => return self.ordinary(active, Some(error)).await,
            },
        };
        let Ok(_target) = timeout_at(deadline, self.targets.lock(&request.target)).await else {
            let error = AttachError::new(
                Reason::Timeout,
                format!(
                    "another Prepare of {} did not finish within {:?}",
                    request.target, self.config.attach_timeout
                ),
            );
            return self.ordinary(active, Some(error)).await;
        };
        match self.decide(request, &active).await? {
            Decision::Exists(name) => Ok(Prepared::Remote { name }),
            Decision::Ordinary(error) => self.ordinary(active, error).await,
            Decision::Lazy { name, request } => self.lazy(active, name, *request, deadline).await,
        }
    }

    async fn decide(self: &Arc<Self>, request: LayerRequest, active: &Creation) -> Result<Decision> {
        let (key, parent) = (active.key.clone(), active.parent.clone());
        self.blocking(move |inner| {
            inner.store.read(|tx| {
                let parent_id = tx.get(&parent)?.map_or(0, |record| record.id);
                let mut places = vec![];
                // The key is about to be taken by the active snapshot.
                for name in prepare::names(&request.target, parent_id).into_iter().filter(|name| *name != key)
                {
                    places.push(Place { holder: tx.get(&name)?, name });
                }
                Ok(prepare::decide(request, &parent, places))
            })
        })
        .await
    }

    async fn ordinary(
        self: &Arc<Self>,
        mut active: Creation,
        error: Option<AttachError>,
    ) -> Result<Prepared> {
        active.fallback = error.as_ref().map(labels::reason_value);
        let record = self.create(active).await?;
        if let Some(error) = error {
            self.report(&record, error);
        }
        Ok(Prepared::Mounts(self.mounts(&record)))
    }

    async fn lazy(
        self: &Arc<Self>,
        active: Creation,
        name: String,
        mut request: LayerRequest,
        deadline: Instant,
    ) -> Result<Prepared> {
        let record = self.create_for_now(active).await?;
        request.below.clone_from(&record.ancestors);
        match self.attach(record.id, &request, deadline).await {
            Ok(root) => self.commit_lazy(record, name, request, root).await,
            Err(error) => {
                self.detach(record.id).await;
                let reason = labels::reason_value(&error);
                self.report(&record, error);
                let mounts = self.mounts(&record);
                self.blocking(move |inner| {
                    inner.store.write(|tx| rules::note_fallback(tx, &record.name, record.id, reason))
                })
                .await?;
                Ok(Prepared::Mounts(mounts))
            }
        }
    }

    async fn commit_lazy(
        self: &Arc<Self>,
        active: Record,
        name: String,
        request: LayerRequest,
        root: LayerRoot,
    ) -> Result<Prepared> {
        let mut labels = active.labels;
        labels.insert(labels::REMOTE.to_owned(), labels::REMOTE_VALUE.to_owned());
        let target = request.target.clone();
        let (key, id) = (active.name, active.id);
        let commit = Commit {
            key: key.clone(),
            id,
            name: name.clone(),
            labels,
            usage: Usage::default(),
            owner: Owner { uid: root.uid, gid: root.gid },
            remote: Some(request),
        };
        match self.publish(commit, root.path.clone()).await {
            Ok(()) => {
                self.fallbacks.forget(&target);
                self.follow(id, &root.path).await;
                Ok(Prepared::Remote { name })
            }
            Err(error) => {
                self.abandon(key, id).await;
                match error {
                    // Someone committed the name by other means; containerd looks at what is there, and asks
                    // again if that is not it.
                    Error::AlreadyExists(_) => Ok(Prepared::Remote { name }),
                    error => Err(error),
                }
            }
        }
    }

    async fn publish(self: &Arc<Self>, commit: Commit, root: PathBuf) -> Result<()> {
        self.blocking(move |inner| {
            inner.dirs.link(commit.id, &root)?;
            inner.store.write(|tx| rules::commit(tx, commit))
        })
        .await
    }

    /// Points a snapshot at where its layer went between attaching and committing: until then nobody could.
    async fn follow(self: &Arc<Self>, id: u64, linked: &Path) {
        let Some(place) = self.filesystem.place(id).filter(|place| place != linked) else { return };
        match self.link(id, place).await {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => tracing::warn!(id, %error, "the snapshot stays where its layer was"),
        }
    }

    /// Undoes a lazy snapshot that could not be committed.
    async fn abandon(self: &Arc<Self>, key: String, id: u64) {
        let snapshot = key.clone();
        let removed =
            self.blocking(move |inner| inner.store.write(|tx| rules::remove_exactly(tx, &key, id))).await;
        if let Err(error) = removed {
            tracing::warn!(snapshot, %error, "could not remove what a failed Prepare left; remove it by name");
        }
        self.detach(id).await;
        self.sweep_soon();
    }

    /// Learns the TOC digest of a layer that does not say it.
    async fn name(
        &self,
        request: LayerRequest,
        deadline: Instant,
    ) -> std::result::Result<LayerRequest, AttachError> {
        let asking = async { Ok(self.filesystem.find_toc(&request).await) };
        let toc_digest = self.bounded(&request, asking, deadline).await?;
        Offer::named(request, toc_digest)
    }

    async fn attach(
        &self,
        slot: u64,
        request: &LayerRequest,
        deadline: Instant,
    ) -> std::result::Result<LayerRoot, AttachError> {
        self.bounded(request, self.filesystem.attach(slot, request), deadline).await
    }

    /// Waits for the data plane, which may hang or panic.
    async fn bounded<T>(
        &self,
        request: &LayerRequest,
        attempt: impl Future<Output = std::result::Result<T, AttachError>>,
        deadline: Instant,
    ) -> std::result::Result<T, AttachError> {
        match timeout_at(deadline, AssertUnwindSafe(attempt).catch_unwind()).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(AttachError::new(
                Reason::Internal,
                format!("attaching layer {} panicked; the panic is in the log", request.layer_digest),
            )),
            Err(_) => Err(AttachError::new(
                Reason::Timeout,
                format!(
                    "layer {} was not attached within {:?}",
                    request.layer_digest, self.config.attach_timeout
                ),
            )),
        }
    }

    /// Gives a slot up. A data plane that hangs or panics is not let stand in the way.
    pub(super) async fn detach(&self, slot: u64) {
        let attempt = AssertUnwindSafe(self.filesystem.detach(slot)).catch_unwind();
        match timeout(DETACH_LIMIT, attempt).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => tracing::warn!(slot, "detaching the layer panicked"),
            Err(_) => tracing::warn!(slot, "detaching the layer takes longer than {DETACH_LIMIT:?}"),
        }
    }

    /// The one place where a fallback is logged and counted.
    fn report(&self, record: &Record, error: AttachError) {
        let key = record.name.as_str();
        let target = record.labels.get(labels::TARGET).cloned().unwrap_or_default();
        let layer = labels::claimed_layer(&record.labels).unwrap_or_default().to_owned();
        let (reason, message) = (error.reason.as_str(), error.message.as_str());
        match error.reason {
            // Ordinary images are no fault of anyone's.
            Reason::NoTocDigest => {
                tracing::info!(key, target, layer, reason, message, "layer is not attached")
            }
            _ => tracing::warn!(key, target, layer, reason, message, "layer is not attached"),
        }
        self.fallbacks.note(Fallback { target, layer_digest: layer, error });
    }
}
