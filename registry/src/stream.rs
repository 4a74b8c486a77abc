//! A whole blob as a stream of ranges, read ahead and verified at its end.
//!
//! Each range is one read with its own deadline, retries and choice of host, so a stream that breaks off goes
//! on where it was by construction. A few ranges beyond the one asked for are on their way at any time, as
//! tasks, because a reader that computes for a while must not keep them waiting.
//!
//! Invariant: ranges come in order, and the stream ends without an error only if all bytes together have the
//! blob's digest.

use crate::config::LONGEST;
use crate::digest::{Digest, Hasher};
use crate::{Blob, Error, HostTag, MAX_READ, ReadOptions, Served};
use bytes::Bytes;
use futures::Stream;
use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How to stream a blob. Its memory is that of `ahead + 1` ranges.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// Bytes of one read, 1 to [`MAX_READ`].
    pub range_size: u64,
    /// Ranges read before they are asked for.
    pub ahead: usize,
    /// The time one range may take, all attempts included; the stream as a whole has no limit.
    pub range_timeout: Duration,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { range_size: 4 << 20, ahead: 2, range_timeout: Duration::from_secs(120) }
    }
}

/// The bytes of a blob in order, in pieces of any length. The last item is the error if there was one.
///
/// What was yielded is verified only when the stream has ended: whoever acts on it before must be able to
/// take that back. To be polled inside a tokio runtime.
pub struct BlobStream {
    blob: Blob,
    options: StreamOptions,
    size: u64,
    /// Where the next range begins that nobody reads yet.
    next: u64,
    reads: VecDeque<Read>,
    /// What the bytes yielded so far must become; `None` when the stream has ended.
    check: Option<(Digest, Hasher)>,
    /// The hosts bytes came from.
    hosts: Vec<HostTag>,
}

/// A range on its way; not read to its end when nobody wants it any more.
struct Read(JoinHandle<Result<Served, Error>>);

impl Drop for Read {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl BlobStream {
    pub(crate) fn new(blob: Blob, digest: Digest, size: u64, options: StreamOptions) -> Self {
        let check = Some((digest.clone(), digest.hasher()));
        Self { blob, options, size, next: 0, reads: VecDeque::new(), check, hosts: Vec::new() }
    }

    fn read_ahead(&mut self) {
        while self.next < self.size && self.reads.len() <= self.options.ahead {
            let end = (self.next + self.options.range_size.clamp(1, MAX_READ)).min(self.size);
            let (blob, range) = (self.blob.clone(), self.next..end);
            let deadline = Instant::now() + self.options.range_timeout.min(LONGEST);
            self.reads.push_back(Read(tokio::spawn(async move {
                blob.read(range, &ReadOptions::until(deadline)).await
            })));
            self.next = end;
        }
    }

    /// The next range's outcome, `None` when all have been yielded.
    fn poll_range(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Served, Error>>> {
        self.read_ahead();
        let Some(read) = self.reads.front_mut() else { return Poll::Ready(None) };
        let outcome = ready!(Pin::new(&mut read.0).poll(cx));
        self.reads.pop_front();
        Poll::Ready(Some(outcome.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::Unavailable {
                what: self.blob.what(),
                host: self.blob.first_host().to_string(),
                why: "the reader is being shut down".to_owned(),
            }),
        })))
    }

    fn verify(&self, expected: &Digest, hasher: Hasher) -> Option<Error> {
        let actual = hasher.finish();
        let hosts: Vec<&str> = self.hosts.iter().map(HostTag::as_str).collect();
        (actual != *expected).then(|| Error::DigestMismatch {
            what: self.blob.what(),
            host: hosts.join(", "),
            actual: actual.to_string(),
        })
    }
}

impl Stream for BlobStream {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.check.is_none() {
            return Poll::Ready(None);
        }
        let outcome = ready!(self.poll_range(cx));
        let Some((expected, mut hasher)) = self.check.take() else { return Poll::Ready(None) };
        Poll::Ready(match outcome {
            Some(Ok(Served { bytes, host })) => {
                hasher.update(&bytes);
                self.check = Some((expected, hasher));
                if !self.hosts.contains(&host) {
                    self.hosts.push(host);
                }
                Some(Ok(bytes))
            }
            Some(Err(error)) => {
                self.reads.clear();
                Some(Err(error))
            }
            None => self.verify(&expected, hasher).map(Err),
        })
    }
}

impl fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream of {:?}, read up to byte {}", self.blob, self.next)
    }
}
