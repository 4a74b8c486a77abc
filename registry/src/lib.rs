//! OCI distribution client for reading blobs by range: hosts, auth, redirects, retry.
//!
//! Owns everything between "bytes `a..b` of blob `d`" and the network: reference names, the choice among
//! mirrors and origin, tokens, redirects, time limits and retries. Knows nothing of layers, chunks or
//! archive formats, and does not choose a platform from an index.
//!
//! Mechanism: an `exchange` walks the hosts of one object in the order `hosts::order` gives, asks each
//! for one absolute range, checks what the answer's head claims (`answer`) and either delivers exactly the
//! asked bytes or a typed [`Error`]. What to do after a failure is decided by pure functions in `retry`.
//!
//! Invariants:
//! - A read returns exactly the asked number of bytes or an error, and ends by its deadline.
//! - Credentials and a mirror's own headers go to the host they belong to and to no other.
//! - No secret and no query of a signed URL can be printed: see `secret`.

mod answer;
mod auth;
mod blob;
mod challenge;
mod client;
mod config;
mod counters;
mod credentials;
mod digest;
mod error;
mod exchange;
mod hosts;
mod reference;
mod retry;
mod secret;
mod transport;

pub use blob::{Blob, MAX_READ, ReadOptions, Served};
pub use client::{ManifestBytes, Registry};
pub use config::{Config, DockerConfig, HostConfig, MirrorConfig};
pub use counters::{CounterSnapshot, Counters};
pub use error::Error;
pub use hosts::HostTag;
pub use reference::Reference;
