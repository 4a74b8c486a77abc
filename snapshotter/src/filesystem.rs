//! The port between the control plane and the data plane.
//!
//! The control plane owns the trait and calls it; the data plane's side is glued on in the binary. A *slot* is
//! one attachment of a layer, numbered by the snapshot's id; slots are never reused, so a late `detach` can
//! never hit another layer.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

/// What the control plane asks of the data plane.
#[async_trait]
pub trait FileSystem: Send + Sync + 'static {
    /// Makes the layer readable under `slot`. May use the network; the caller bounds it in time by dropping the
    /// future, and always follows a failure with [`FileSystem::detach`].
    async fn attach(&self, slot: u64, request: &LayerRequest) -> Result<LayerRoot, AttachError>;

    /// The digest of a layer's table of contents by the manifest that the request names, if that has one. Everything but
    /// the request's TOC digest is known. Asked for every layer that carries no digest itself, so also for those of
    /// ordinary images: it should cost little, and failing to know is `None`. Bounded in time as `attach`.
    async fn find_toc(&self, request: &LayerRequest) -> Option<String> {
        let _ = request;
        None
    }

    /// Gives the slot up. Idempotent, also for a slot never attached. Must not wait for a busy mount.
    async fn detach(&self, slot: u64);

    /// Where the layer is now, as [`LayerRoot::path`]; `None` if nothing is attached. Asked after the snapshot was
    /// committed, because the layer may have graduated since it was attached.
    fn place(&self, slot: u64) -> Option<PathBuf>;

    /// Bytes and inodes the layer behind the slot takes on this disk. Must not walk the mounted tree.
    async fn usage(&self, slot: u64) -> Usage;
}

/// One layer to attach, as told by the labels of a Prepare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRequest {
    /// The chain id the layer stands for: the value of `containerd.io/snapshot.ref`.
    pub target: String,
    /// The image reference as pulled, for example `docker.io/library/alpine:3.20`.
    pub reference: String,
    /// Digest of the layer's blob in the registry, `sha256:<64 hex>`.
    pub layer_digest: String,
    /// Digest of the layer's table of contents as the image names it, the one every byte is verified against: of its JSON,
    /// or for podman's zstd:chunked of the compressed JSON.
    pub toc_digest: String,
    /// Digest of the manifest of this platform, where the client told it.
    pub manifest_digest: Option<String>,
    /// Blob digests of this layer and those above it in the image, this layer first, each once.
    pub neighbours: Vec<String>,
    /// Bytes from the start of the blob worth fetching first, where the client told it.
    pub prefetch_bytes: Option<u64>,
    /// Whether all of the layer is fetched behind the container, where the client told it.
    #[serde(default)]
    pub background_fetch: Option<bool>,
    /// Ids of the snapshots below, the parent's first: of a lazy one its slot. The record has them as ancestors, hence
    /// not stored a second time.
    #[serde(skip)]
    pub below: Vec<u64>,
    /// All labels of the Prepare. Kept with the snapshot's labels, hence not stored a second time.
    #[serde(skip)]
    pub labels: BTreeMap<String, String>,
}

/// Where an attached layer is found, and who owns its root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRoot {
    /// Target of the symlink `snapshots/<id>/fs`, relative to `snapshots/<id>/`: for example `../../mnt/7`.
    pub path: PathBuf,
    /// Owner of the layer's root directory; an upper directory above it starts out with the same.
    pub uid: u32,
    /// Group of the layer's root directory.
    pub gid: u32,
}

/// Why a layer could not be attached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct AttachError {
    /// The code under which the event is logged, counted and shown.
    pub reason: Reason,
    /// What happened, naming the layer, host or limit, and what to do.
    pub message: String,
}

impl AttachError {
    /// An attach error with its reason and text.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        AttachError { reason, message: message.into() }
    }
}

/// Why a layer is an ordinary snapshot although containerd offered to have it attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The layer carries no TOC digest: the image was not built for lazy pulling, or lost its annotations.
    NoTocDigest,
    /// The client did not say which image and blob the layer is from.
    NoReference,
    /// A label is not what it should be.
    BadLabels,
    /// The blob is not eStargz, though its annotation says so.
    NotEstargz,
    /// The table of contents does not parse or breaks a limit.
    TocInvalid,
    /// The table of contents lost the bytes of a name.
    LossyNames,
    /// The registry refused the credentials, or wanted some.
    AuthDenied,
    /// The registry does not have the blob.
    NotFound,
    /// The layer could not be attached in time.
    Timeout,
    /// No host answered.
    Unavailable,
    /// The bytes served are not the bytes asked for.
    VerifyFailed,
    /// The disk is full.
    NoSpace,
    /// The daemon is letting go of its layers.
    Draining,
    /// Something on this side broke.
    Internal,
}

impl Reason {
    /// The reason as the code used in logs, metrics and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::NoTocDigest => "no_toc_digest",
            Reason::NoReference => "no_reference",
            Reason::BadLabels => "bad_labels",
            Reason::NotEstargz => "not_estargz",
            Reason::TocInvalid => "toc_invalid",
            Reason::LossyNames => "lossy_names",
            Reason::AuthDenied => "auth_denied",
            Reason::NotFound => "not_found",
            Reason::Timeout => "timeout",
            Reason::Unavailable => "unavailable",
            Reason::VerifyFailed => "verify_failed",
            Reason::NoSpace => "no_space",
            Reason::Draining => "draining",
            Reason::Internal => "internal",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Disk space taken by one snapshot, its parents not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of disk blocks.
    pub size: u64,
    /// Inodes, each counted once.
    pub inodes: u64,
}
