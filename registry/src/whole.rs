//! All of a blob, from a host that sends it where a range was asked for: a mirror that fetches the blob itself, or a server
//! that knows no ranges.
//!
//! Owns the rest of such an answer. What becomes of it is its taker's business; a read whose answer was taken goes on at
//! the next host.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;
use tokio::time::Instant;

use crate::retry::Cause;
use crate::transport::Transport;
use crate::{Error, HostTag};

/// Has a use for all of a blob.
pub trait TakeWhole: fmt::Debug + Send + Sync {
    /// Takes it, or gives it back if there is no use for it now.
    ///
    /// # Errors
    ///
    /// What was offered.
    fn take_whole(&self, whole: Whole) -> Result<(), Whole>;
}

/// A blob on its way, from its first byte on. Not verified: whoever takes it knows how.
pub struct Whole(Box<Inner>);

struct Inner {
    response: Response,
    transport: Transport,
    idle: Duration,
    size: u64,
    arrived: u64,
    host: HostTag,
    what: String,
    repository: String,
}

impl Whole {
    pub(crate) fn new(
        response: Response,
        transport: &Transport,
        idle: Duration,
        size: u64,
        host: &HostTag,
        (what, repository): (String, &str),
    ) -> Whole {
        let (transport, host, repository) = (transport.clone(), host.clone(), repository.to_owned());
        Whole(Box::new(Inner { response, transport, idle, size, arrived: 0, host, what, repository }))
    }

    pub(crate) fn into_response(self) -> Response {
        self.0.response
    }

    /// Who sends it.
    pub fn host(&self) -> &HostTag {
        &self.0.host
    }

    /// The next bytes, `None` after the last.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if none came for a while, [`Error::Unavailable`] if the answer broke off or is not as long as
    /// the blob.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, Error> {
        let Inner { response, transport, idle, size, arrived, .. } = &mut *self.0;
        let outcome = match transport.piece(response, *idle, Instant::now() + *idle).await {
            Ok(None) if arrived < size => {
                Err(Cause::down(format!("the body ended early, at byte {arrived} of the blob")))
            }
            Ok(Some(piece)) if *size - *arrived < piece.len() as u64 => {
                Err(Cause::down(format!("the body goes on after the blob's {size} bytes")))
            }
            outcome => outcome,
        };
        let Inner { host, what, repository, .. } = &*self.0;
        let piece = outcome.map_err(|cause| cause.into_error(what.clone(), repository, host.as_str()))?;
        self.0.arrived += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Ok(piece)
    }
}

impl fmt::Debug for Whole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {}, {} of {} bytes", self.0.what, self.0.host, self.0.arrived, self.0.size)
    }
}
