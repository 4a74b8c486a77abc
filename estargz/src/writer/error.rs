//! Why a layer could not be converted.

use std::borrow::Cow;
use std::io;

use crate::error::shorten;

/// Why no blob was built.
///
/// [`Read`](Error::Read), [`Write`](Error::Write), [`Spool`](Error::Spool) and [`Threads`](Error::Threads) blame the
/// machine: the same call may succeed later. [`BadOption`](Error::BadOption) and
/// [`Missing`](Error::Missing) blame the caller. All others blame the input: it is broken, or holds what a layer
/// cannot.
///
/// Names are shown as text, with U+FFFD for what is not UTF-8, shortened if very long.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option has a value that no layer can be built with.
    #[error("option {name} is {value}: {why}")]
    BadOption {
        /// The option, as the field of [`Options`](super::Options) is called.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        why: String,
    },

    /// The caller's input failed.
    #[error("cannot read the layer: {0}")]
    Read(#[source] io::Error),

    /// The caller's output failed.
    #[error("cannot write the blob: {0}")]
    Write(#[source] io::Error),

    /// The caller's spool failed, or could not be had.
    #[error("cannot spool the layer to bring its prioritized files to the front: {0}")]
    Spool(#[source] io::Error),

    /// The system refused a thread.
    #[error("cannot start a thread: {0}; convert with fewer threads")]
    Threads(#[source] io::Error),

    /// The compressed input is broken.
    #[error("the layer's {format} stream is broken behind {offset} decompressed bytes: {why}")]
    BadCompression {
        /// What it is compressed with.
        format: &'static str,
        /// Decompressed bytes before the fault.
        offset: u64,
        /// The decoder's message.
        why: String,
    },

    /// The input ends before its tar does.
    #[error("the layer is cut off: its tar ends at byte {offset}, in or behind the entry {entry:?}")]
    Truncated {
        /// Offset in the decompressed tar.
        offset: u64,
        /// The last entry met; empty if there was none.
        entry: String,
    },

    /// There is no tar header where one belongs.
    #[error("no tar header at byte {offset}, behind the entry {entry:?}: {why}")]
    BadTar {
        /// Offset in the decompressed tar.
        offset: u64,
        /// The last entry met; empty if there was none.
        entry: String,
        /// What was found.
        why: Cow<'static, str>,
    },

    /// A header contradicts itself, or says what no layer can hold.
    #[error("tar entry {name:?}: {why}")]
    BadEntry {
        /// Name of the entry.
        name: String,
        /// What is wrong with it.
        why: Cow<'static, str>,
    },

    /// An entry is of a type that layers do not have.
    #[error("tar entry {name:?} has the type {:?}, which layers do not have", char::from(*type_flag))]
    UnknownType {
        /// Name of the entry.
        name: String,
        /// The type flag of its header.
        type_flag: u8,
    },

    /// Something is larger than any reader accepts.
    #[error("{what}: {value} is over the limit of {limit}")]
    Limit {
        /// What was counted, and of which entry.
        what: String,
        /// The value found; counting stops at the limit, so the full value may be higher.
        value: u64,
        /// The limit.
        limit: u64,
    },

    /// Prioritized files are not in the layer, and [`Missing::Fail`](super::Missing::Fail) was asked for.
    #[error("prioritized files that are not in the layer: {}", patterns.join(", "))]
    Missing {
        /// The patterns that match nothing.
        patterns: Vec<String>,
    },
}

impl Error {
    pub(crate) fn entry(name: &[u8], why: impl Into<Cow<'static, str>>) -> Self {
        Error::BadEntry { name: show(name), why: why.into() }
    }

    /// What a stage wrapped with [`io::Error::other`] to get it through a [`Read`](io::Read), or the fault of the
    /// input itself.
    pub(super) fn unwrap(error: io::Error) -> Self {
        error.downcast().unwrap_or_else(Error::Read)
    }
}

/// Bytes from a tar as text for a message.
pub(super) fn show(bytes: &[u8]) -> String {
    // Cut before decoding: a name may be a megabyte long.
    shorten(&String::from_utf8_lossy(&bytes[..bytes.len().min(1000)]))
}
