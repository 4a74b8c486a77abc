//! What can go wrong, by what the caller can do about it.
//!
//! The variants are the answers containerd distinguishes; [`crate::service`] maps them one to one onto gRPC
//! codes. The text reaches the user through containerd unchanged, so it names the snapshot and the reason.

/// An answer other than success to one of the calls of [`crate::Snapshotter`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The snapshot, or the parent named, does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The key or name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The snapshot is not in a state that allows the call: it has children, or is of another kind.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request can never succeed as it stands.
    #[error("{0}")]
    InvalidArgument(String),
    /// The call did not finish in time; asking again may help.
    #[error("{0}")]
    Unavailable(String),
    /// The disk or the database failed.
    #[error("{what}: {source}")]
    Internal {
        /// What was being done, naming the path or snapshot.
        what: String,
        /// The failure underneath.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    pub(crate) fn internal(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error::Internal { what: what.into(), source: source.into() }
    }

    pub(crate) fn no_such_snapshot(key: &str) -> Self {
        Error::NotFound(format!("snapshot {key:?} does not exist"))
    }
}

/// The result of nearly everything in this crate.
pub(crate) type Result<T> = std::result::Result<T, Error>;
