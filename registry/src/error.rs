//! The crate's error: variants by what the caller can do, messages that name object, range and host.

use std::ops::Range;

/// Why an object or a range of it could not be had or made.
///
/// `what` names the object and, for a read, the range; `host` is a host name without credentials or query.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused us after credentials were fetched anew: log in, or grant the account access.
    #[error("auth failed at host {host} for repository {repository} (tried: {tried})")]
    AuthDenied {
        /// The host that refused.
        host: String,
        /// The repository asked for.
        repository: String,
        /// Where credentials were looked for, and what was found.
        tried: String,
    },
    /// The host says that there is no such object.
    #[error("{what} not found at host {host}")]
    NotFound {
        /// The object.
        what: String,
        /// The host that said so.
        host: String,
    },
    /// The deadline or a host's own time limit passed.
    #[error("{what}: timed out at host {host}: {why}")]
    Timeout {
        /// The object and range.
        what: String,
        /// The host asked last.
        host: String,
        /// What was being waited for.
        why: String,
    },
    /// No host could serve or take it now; trying again later may help.
    #[error("{what}: host {host} is unavailable: {why}")]
    Unavailable {
        /// The object and range.
        what: String,
        /// The host asked last.
        host: String,
        /// What went wrong.
        why: String,
    },
    /// The host's answer contradicts the request or the known size.
    #[error("{what}: bad response from host {host}: {why}")]
    BadResponse {
        /// The object and range.
        what: String,
        /// The host that answered.
        host: String,
        /// The contradiction.
        why: String,
    },
    /// Every host that answered sends whole blobs only, and this range starts too deep inside to skip to.
    #[error("{what}: host {host} ignores ranges and sends whole blobs")]
    RangeIgnored {
        /// The object and range.
        what: String,
        /// The host that answered with the whole blob.
        host: String,
    },
    /// The bytes are not those the digest names.
    #[error("{what}: host {host} sent bytes with digest {actual}")]
    DigestMismatch {
        /// The object, with the expected digest.
        what: String,
        /// The host that sent them.
        host: String,
        /// The digest of what was sent.
        actual: String,
    },
    /// The object, or the asked range, is larger than the limit.
    #[error("{what}: {size} bytes are more than the limit of {limit}")]
    TooLarge {
        /// The object and range.
        what: String,
        /// Bytes announced, asked for, or received when the limit was passed.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A blob of unknown size was to be streamed: its descriptor tells.
    #[error("{what}: its size must be known to read all of it")]
    SizeUnknown {
        /// The blob.
        what: String,
    },
    /// The registry has lost what was sent of a blob, and it is not held here any more: upload it again from
    /// its first byte.
    #[error("{what}: host {host} has lost the upload: {why}")]
    UploadLost {
        /// The blob, and the bytes that could not follow.
        what: String,
        /// The host.
        host: String,
        /// How that came out.
        why: String,
    },
    /// The asked range is backwards or reaches past the end of the blob.
    #[error("{what}: range {}..{} is not inside its {size} bytes", range.start, range.end)]
    OutOfBounds {
        /// The blob.
        what: String,
        /// The range asked for.
        range: Range<u64>,
        /// The blob's size in bytes.
        size: u64,
    },
    /// An image reference that does not follow the grammar.
    #[error("bad image reference {reference:?}: {why}")]
    BadReference {
        /// The reference as given, without a user part.
        reference: String,
        /// What to change.
        why: &'static str,
    },
    /// A digest that does not follow the grammar.
    #[error("bad digest {digest:?}: {why}")]
    BadDigest {
        /// The digest as given.
        digest: String,
        /// What to change.
        why: &'static str,
    },
    /// A login that came with a pull and that nothing can be made of.
    #[error("the login of a pull of {repository} {why}")]
    BadLogin {
        /// Host and repository.
        repository: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A setting that cannot be used.
    #[error("bad setting {key}: {why}")]
    Config {
        /// The setting's name.
        key: String,
        /// What to change.
        why: String,
    },
}

impl Error {
    /// The short code of this failure: the same in logs, metrics and status output.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::AuthDenied { .. } => "auth_denied",
            Self::NotFound { .. } => "not_found",
            Self::Timeout { .. } => "timeout",
            Self::Unavailable { .. } => "unavailable",
            Self::BadResponse { .. } => "bad_response",
            Self::RangeIgnored { .. } => "range_ignored",
            Self::DigestMismatch { .. } => "verify_failed",
            Self::TooLarge { .. } => "too_large",
            Self::SizeUnknown { .. } => "size_unknown",
            Self::UploadLost { .. } => "upload_lost",
            Self::OutOfBounds { .. } => "out_of_bounds",
            Self::BadReference { .. } => "bad_reference",
            Self::BadDigest { .. } => "bad_digest",
            Self::BadLogin { .. } => "bad_login",
            Self::Config { .. } => "bad_config",
        }
    }
}
