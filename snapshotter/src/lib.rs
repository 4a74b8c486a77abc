//! Lazurite's control plane: snapshot records, labels, Prepare decisions, overlay mounts.
//!
//! This crate is what containerd talks to. It owns the records of snapshots (`snapshots.redb`) and the
//! directories under `snapshots/`, and decides for every Prepare whether the layer is attached lazily or left
//! for containerd to unpack. It knows nothing of registries, image formats or FUSE: a layer is attached through
//! the port [`FileSystem`], which the data plane implements elsewhere.
//!
//! | module | owns |
//! |---|---|
//! | [`service`] | the gRPC adapter; the only code that sees containerd's generated types |
//! | `snapshotter` | the calls: order of effects, locks, time limits |
//! | [`labels`], `prepare`, `filters`, [`overlay`] | decisions, as pure functions |
//! | `metastore`, `record` | records and transactions |
//! | `dirs` | directories, ownership, disk usage |
//! | `fallbacks` | why layers were not attached |
//!
//! Invariants:
//!
//! - No transaction spans an await. Remove, Mounts, Usage, Stat and List never wait for the network.
//! - A lazy layer's directory is a symlink into the daemon's own FUSE mount; nothing here follows it. What is
//!   needed of it (root owner, usage) comes from the record or from the port.
//! - A snapshot's id is its slot and is never given twice, not even after a failed transaction.

mod dirs;
mod error;
mod fallbacks;
mod filesystem;
mod filters;
mod keyed;
pub mod labels;
mod metastore;
pub mod overlay;
mod prepare;
mod record;
pub mod service;
mod snapshotter;

pub use error::Error;
pub use fallbacks::Fallback;
pub use filesystem::{AttachError, FileSystem, LayerRequest, LayerRoot, Reason, Usage};
pub use record::{Info, Kind};
pub use snapshotter::{Config, Prepared, Remote, Snapshotter};
