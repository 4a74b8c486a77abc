//! OCI distribution client for reading blobs by range and pushing: hosts, auth, redirects, retry.
//!
//! Owns everything between "bytes `a..b` of blob `d`" or "make this a blob" and the network: reference names, the choice among
//! mirrors and origin, tokens, redirects, time limits and retries. Knows nothing of layers, chunks or
//! archive formats, and does not choose a platform from an index.
//!
//! Mechanism: an `exchange` walks the hosts of one object in the order `hosts::order` gives, in rounds; what to
//! do after a failure is decided by pure functions in `retry`. Reading (`fetch`) asks each for one absolute
//! range, checks what the answer's head claims (`answer`) and either delivers exactly the asked bytes or a typed
//! [`Error`]. What is known of an origin's hosts may change while the process runs ([`HostSource`]); the next read goes by
//! it. Logins are searched for in a chain of sources when a host asks who we are (`keychain`). Pushing (`push`, `upload`) goes by the same rounds to the origin alone.
//!
//! Invariants:
//! - A read returns exactly the asked number of bytes or an error, and ends by its deadline.
//! - A blob sent is the registry's only after it has confirmed the digest; nothing is ever sent to a mirror.
//! - Credentials, a host's own headers and its client certificate go to the host they belong to and to no other, and
//!   a host that need not prove who it is says nothing for those it points to.
//! - No secret and no query of a signed URL can be printed: see `secret`.

mod answer;
mod auth;
mod blob;
mod challenge;
mod client;
mod config;
mod counters;
mod digest;
mod error;
mod exchange;
mod fetch;
mod hosts;
mod keychain;
mod origin;
mod push;
mod reference;
mod retry;
mod secret;
mod source;
mod stream;
mod tls;
mod transport;
mod upload;
mod whole;

pub use blob::{Blob, MAX_READ, ReadOptions, Served};
pub use client::{Login, LoginAnswer, LoginKind, ManifestBytes, Registry};
pub use config::{
    Config, ContainersAuth, DockerConfig, HostConfig, KubeletPlugins, KubernetesSecrets, MirrorConfig,
};
pub use counters::{CounterSnapshot, Counters};
pub use error::Error;
pub use hosts::HostTag;
pub use keychain::pulls::{PullCredentials, PullLogin};
pub use origin::{Capability, HostSettings, HostSource, OriginHosts, Root};
pub use reference::Reference;
pub use stream::{BlobStream, StreamOptions};
pub use tls::{TlsSettings, Verification};
pub use upload::{Upload, UploadOptions};
pub use whole::{TakeWhole, Whole};
