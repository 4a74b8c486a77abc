//! Ranges of one blob.

use crate::exchange::Exchange;
use crate::fetch::Want;
use crate::source::{Name, Source};
use crate::stream::{BlobStream, StreamOptions};
use crate::{Error, HostTag, TakeWhole};
use bytes::Bytes;
use parking_lot::Mutex;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::time::Instant;

/// Longest range of one read, in bytes: a read is collected in memory.
pub const MAX_READ: u64 = 64 << 20;

/// A blob in a registry. Clones share what is learnt of it: its size and where redirects lead.
#[derive(Clone)]
pub struct Blob {
    exchange: Arc<Exchange>,
    /// By what was known of the hosts at the last read.
    source: Arc<Mutex<Arc<Source>>>,
}

/// How to carry out a read.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// The read ends by then, with the bytes or an error.
    pub deadline: Instant,
    /// A host whose bytes failed verification: asked after all others.
    pub avoid: Option<HostTag>,
    /// Grows by the bytes that arrive, as they arrive.
    pub arrived: Option<Arc<AtomicU64>>,
    /// Gets the answer of a host that sends all of the blob.
    pub whole: Option<Arc<dyn TakeWhole>>,
}

impl ReadOptions {
    /// With a deadline and nothing else.
    pub fn until(deadline: Instant) -> ReadOptions {
        ReadOptions { deadline, avoid: None, arrived: None, whole: None }
    }
}

/// The bytes of a read.
#[derive(Clone)]
pub struct Served {
    /// Exactly as many as were asked for. Not verified: ranges have no digest here.
    pub bytes: Bytes,
    /// The host all of them came from.
    pub host: HostTag,
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes from {}", self.bytes.len(), self.host)
    }
}

impl Blob {
    pub(crate) fn new(exchange: Arc<Exchange>, source: Source) -> Self {
        Self { exchange, source: Arc::new(Mutex::new(Arc::new(source))) }
    }

    fn source(&self) -> Arc<Source> {
        self.source.lock().clone()
    }

    /// The source by what is known of the hosts now.
    fn current(&self) -> Result<Arc<Source>, Error> {
        let mut source = self.source.lock();
        if let Some(renewed) = source.renewed(&self.exchange.config)? {
            renewed.new_hosts(&source).for_each(|host| self.exchange.hosts.pardon(host));
            *source = Arc::new(renewed);
        }
        Ok(source.clone())
    }

    /// The blob's size in bytes: as given, or as the first answer to a read told.
    pub fn size(&self) -> Option<u64> {
        self.source().size()
    }

    /// Reads the bytes `range` of the blob.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] for a backwards range or one that reaches past the end, [`Error::TooLarge`]
    /// for more than [`MAX_READ`] bytes, and whatever kept the hosts from delivering. Never short data.
    pub async fn read(&self, range: Range<u64>, options: &ReadOptions) -> Result<Served, Error> {
        let what = || self.what();
        let size = self.size().unwrap_or(u64::MAX);
        if range.start > range.end || range.end > size {
            return Err(Error::OutOfBounds { what: what(), range, size });
        }
        let length = range.end - range.start;
        if length > MAX_READ {
            return Err(Error::TooLarge { what: what(), size: length, limit: MAX_READ });
        }
        if length == 0 {
            return Ok(Served { bytes: Bytes::new(), host: self.first_host() });
        }
        let (arrived, whole) = (options.arrived.as_deref(), options.whole.as_deref());
        let want = Want::Range { range, arrived, whole };
        loop {
            let source = self.current()?;
            let fetched = self.exchange.fetch(&source, &want, options.deadline, options.avoid.as_ref()).await;
            match fetched {
                Ok(delivery) => return Ok(Served { bytes: delivery.bytes, host: delivery.host }),
                // Whoever sees to it that there are other hosts does so for those who wait, too.
                Err(_) if Instant::now() < options.deadline && source.is_outdated(&self.exchange.config) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The whole blob from its first byte on, verified at its end. Its size must be known.
    ///
    /// # Errors
    ///
    /// [`Error::SizeUnknown`].
    pub fn stream(&self, options: StreamOptions) -> Result<BlobStream, Error> {
        let source = self.source();
        match (source.name(), source.size()) {
            (Name::Blob(digest), Some(size)) => {
                Ok(BlobStream::new(self.clone(), digest.clone(), size, options))
            }
            _ => Err(Error::SizeUnknown { what: self.what() }),
        }
    }

    /// The blob's name in errors.
    pub(crate) fn what(&self) -> String {
        self.source().to_string()
    }

    pub(crate) fn first_host(&self) -> HostTag {
        self.source().first_host()
    }

    /// Drops kept redirects and a learnt size: the next read asks the registry where the blob is. For when
    /// bytes failed verification, since a redirect's target may be what is wrong.
    pub fn forget_route(&self) {
        self.source().forget();
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?} bytes)", self.source(), self.size())
    }
}
