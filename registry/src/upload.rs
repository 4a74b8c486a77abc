//! One blob on its way to a registry.
//!
//! The bytes given to an [`Upload`] are gathered into chunks; a chunk is held until the registry has confirmed
//! it. When an answer fails to come - the connection broke, a time limit passed - nobody knows how much of the
//! chunk has arrived: the upload is in doubt, and before anything else is sent the registry is asked where it
//! stands, and told the rest from there. A registry that cannot say has lost the upload; as long as all bytes
//! are still held (the first chunk, or a blob shorter than one), a new upload is begun silently.
//!
//! Invariants: at most one chunk is held; no byte is sent for an offset the
//! registry has not confirmed; a session that ends in an error or by [`Upload::cancel`] is deleted, as far as
//! the registry can be reached.
//!
//! Protocol: OCI distribution specification 1.1, "Pushing blobs". Its reference implementation up to version 2
//! forgets an upload whose chunk broke off half-way, which is what makes the new beginning worth its lines.

use crate::auth::Access;
use crate::config::LONGEST;
use crate::digest::Digest;
use crate::exchange::{Arrival, Ask, Exchange, Job, Visit};
use crate::push::stored_as;
use crate::retry::Cause;
use crate::secret::SignedUrl;
use crate::source::{Name, Source};
use crate::{Error, Reference};
use bytes::{Bytes, BytesMut};
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LOCATION, RANGE};
use reqwest::{Method, StatusCode};
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Longest chunk in bytes: it is held in memory.
const MAX_CHUNK: u64 = 64 << 20;
/// A registry is not offered less than this in one request.
const LEAST_PIECE: u64 = 64 << 10;
/// Cancelling is a courtesy: registries clear away what is left open, and whoever cancels wants to end.
const CANCEL_WITHIN: Duration = Duration::from_secs(10);

/// How to carry out an upload.
#[derive(Debug, Clone)]
pub struct UploadOptions {
    /// Bytes of one request, 1 to 64 MiB; a registry that asks for more in one gets it, one that takes less gets
    /// less. Registries that keep chunks as objects want 5 MiB at least.
    pub chunk_size: u64,
    /// The time a chunk may take, and so may each other step of the upload, all attempts included; an upload
    /// as a whole has no limit. One attempt takes at most half of what is left, so that another can follow.
    pub chunk_timeout: Duration,
}

impl Default for UploadOptions {
    fn default() -> Self {
        // An attempt of 150 s carries 8 MiB at 0.5 Mbit/s.
        Self { chunk_size: 8 << 20, chunk_timeout: Duration::from_secs(300) }
    }
}

/// The upload of one blob. Dropping it leaves it open at the registry: [`Upload::finish`] or
/// [`Upload::cancel`] it. After an error, or when the future of a call was dropped, only cancelling is left.
pub struct Upload {
    exchange: Arc<Exchange>,
    reference: Reference,
    chunk_size: usize,
    chunk_timeout: Duration,
    /// Bytes the registry takes in one request, as far as we know.
    largest: u64,
    /// Where the registry wants the next request. It changes with every answer and may hold secrets.
    session: Option<SignedUrl>,
    /// Bytes of the blob the registry has.
    confirmed: u64,
    /// A request was sent and not answered: `confirmed` may be too low.
    doubt: bool,
    /// Bytes of the blob that follow.
    held: BytesMut,
}

impl Upload {
    pub(crate) async fn open(
        exchange: Arc<Exchange>,
        reference: Reference,
        options: UploadOptions,
    ) -> Result<Self, Error> {
        let chunk_size = options.chunk_size.clamp(1, MAX_CHUNK);
        let mut upload = Self {
            exchange: exchange.clone(),
            reference,
            chunk_size: chunk_size as usize,
            largest: chunk_size,
            chunk_timeout: options.chunk_timeout.min(LONGEST),
            session: None,
            confirmed: 0,
            doubt: false,
            held: BytesMut::new(),
        };
        let source = upload.source(Name::Upload)?;
        let job = upload.job(&source, None);
        let mut rounds = exchange.rounds(job);
        loop {
            let visit = rounds.next().await?;
            let outcome = upload.session(visit).await;
            if rounds.settle(visit, outcome).is_some() {
                return Ok(upload);
            }
        }
    }

    /// Bytes of the blob the registry has confirmed so far.
    pub fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// Takes the next bytes of the blob, of any length, and sends them as soon as they fill a chunk; then it
    /// returns when the registry has confirmed them. Whoever makes the blob meanwhile does so on another task.
    ///
    /// # Errors
    ///
    /// Those of the origin; [`Error::UploadLost`] if it has forgotten what was sent before.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<(), Error> {
        while !bytes.is_empty() {
            let room = self.chunk_size - self.held.len();
            self.held.extend_from_slice(&bytes.split_to(room.min(bytes.len())));
            if self.held.len() == self.chunk_size {
                self.send().await?;
            }
        }
        Ok(())
    }

    /// Sends what is held and makes all that was written the blob with this digest. A blob shorter than a
    /// chunk goes in this one request.
    ///
    /// # Errors
    ///
    /// As [`Upload::write`]; [`Error::BadResponse`] if the registry finds another digest. The upload is
    /// cancelled then.
    pub async fn finish(mut self, digest: &str) -> Result<(), Error> {
        let outcome = self.complete(digest).await;
        if outcome.is_err() {
            let _ = self.cancel().await;
        }
        outcome
    }

    /// Has the registry forget what was sent. Takes no longer than ten seconds.
    ///
    /// # Errors
    ///
    /// Those of the origin: the upload then stays open until the registry clears it away.
    pub async fn cancel(mut self) -> Result<(), Error> {
        let Some(location) = self.session.take() else { return Ok(()) };
        let source = self.source(Name::Upload)?;
        let deadline = Instant::now() + CANCEL_WITHIN;
        let job = Job { source: &source, part: None, deadline, avoid: None };
        let mut rounds = self.exchange.rounds(job);
        loop {
            let visit = rounds.next().await?;
            let outcome = self.exchange.discard(visit, location.clone()).await;
            if let Some(done) = rounds.settle(visit, outcome) {
                return Ok(done);
            }
        }
    }

    fn source(&self, name: Name) -> Result<Source, Error> {
        Source::origin(&self.reference, name, Access::Push, &self.exchange.config)
    }

    fn job<'a>(&self, source: &'a Source, part: Option<&'a Range<u64>>) -> Job<'a> {
        Job { source, part, deadline: Instant::now() + self.chunk_timeout, avoid: None }
    }

    /// Sends what is held as one chunk.
    async fn send(&mut self) -> Result<(), Error> {
        let chunk = self.held.split().freeze();
        let span = self.confirmed..self.confirmed + chunk.len() as u64;
        let source = self.source(Name::Upload)?;
        let job = self.job(&source, Some(&span));
        let exchange = self.exchange.clone();
        let mut rounds = exchange.rounds(job);
        loop {
            let visit = rounds.next().await?;
            let outcome = self.deliver(visit, &span, &chunk).await;
            if let Some(done) = rounds.settle(visit, outcome) {
                return Ok(done);
            }
        }
    }

    async fn complete(&mut self, digest: &str) -> Result<(), Error> {
        let digest = Digest::parse(digest)?;
        if self.confirmed > 0 && !self.held.is_empty() {
            self.send().await?;
        }
        let rest = self.held.split().freeze();
        let source = self.source(Name::Blob(digest.clone()))?;
        let job = self.job(&source, None);
        let exchange = self.exchange.clone();
        let mut rounds = exchange.rounds(job);
        loop {
            let visit = rounds.next().await?;
            let outcome = self.commit(visit, &digest, &rest).await;
            if let Some(done) = rounds.settle(visit, outcome) {
                return Ok(done);
            }
        }
    }

    /// One attempt at a chunk, which is the blob's bytes `span`: in one request, or in several if the registry
    /// has turned out not to take as much in one.
    async fn deliver(&mut self, visit: Visit<'_>, span: &Range<u64>, chunk: &Bytes) -> Result<(), Cause> {
        if self.doubt {
            self.ask(visit, span).await?;
        }
        while self.confirmed < span.end {
            let location = self.session(visit).await?;
            let (start, end) = (self.confirmed, span.end.min(self.confirmed + self.largest));
            let piece = chunk.slice((start - span.start) as usize..(end - span.start) as usize);
            let ask = blob_bytes(Method::PATCH, piece).header(CONTENT_RANGE, format!("{start}-{}", end - 1));
            self.doubt = true;
            let arrival = self.exchange.change(visit, location, &ask).await?;
            let status = arrival.response.status();
            if !status.is_success() {
                return Err(self.refused(visit, span, arrival).await);
            }
            self.follow(&arrival)?;
            // Only an offset inside the piece is news. Amazon's registry repeats that of the first chunk.
            match bytes_held(arrival.response.headers()).map(|held| *held.start()) {
                Some(at) if start < at && at < end => {
                    return Err(Cause::down(format!("took the bytes {start}..{end} up to {at}")));
                }
                _ => (self.confirmed, self.doubt) = (end, false),
            }
        }
        Ok(())
    }

    /// What to make of a chunk that was not taken.
    async fn refused(&mut self, visit: Visit<'_>, span: &Range<u64>, arrival: Arrival) -> Cause {
        let status = arrival.response.status();
        match status {
            // We begin where the registry has said it stands, so it may be the length: GitHub's registry says
            // this to more than 4 MiB.
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::RANGE_NOT_SATISFIABLE => {
                self.largest = (self.largest / 2).max(LEAST_PIECE).min(self.largest);
            }
            StatusCode::NOT_FOUND => {}
            _ => return self.exchange.unexpected(visit, arrival).await,
        }
        let why = format!("answered {status} to bytes from {} on", self.confirmed);
        match status {
            StatusCode::NOT_FOUND => self.lost(visit, span.start, why).await,
            // It is asked where it stands, unless beginning anew is as good.
            _ if span.start > 0 => Cause::down(why),
            _ => self.lost(visit, span.start, why).await,
        }
    }

    /// Asks how much of the chunk `span` has arrived.
    async fn ask(&mut self, visit: Visit<'_>, span: &Range<u64>) -> Result<(), Cause> {
        if let Some(location) = self.session.clone() {
            let arrival = self.exchange.change(visit, location, &Ask::new(Method::GET)).await?;
            let status = arrival.response.status();
            let held = bytes_held(arrival.response.headers()).filter(|_| status.is_success());
            match held.map(|held| *held.start()) {
                Some(at) if span.start <= at && at <= span.end => self.confirmed = at,
                Some(at) => {
                    let why = format!("it has {at} bytes, and not between {} and {}", span.start, span.end);
                    return Err(self.lost(visit, span.start, why).await);
                }
                None => {
                    let why = format!("asked for its offset it answered {status}");
                    return Err(self.lost(visit, span.start, why).await);
                }
            }
            self.follow(&arrival)?;
        }
        self.doubt = false;
        Ok(())
    }

    /// One attempt to make a blob of what the registry has and `rest`.
    async fn commit(&mut self, visit: Visit<'_>, digest: &Digest, rest: &Bytes) -> Result<(), Cause> {
        if self.doubt {
            let stored = self.exchange.head(visit).await?.is_some();
            // The session may be untouched, or hold a part of `rest`.
            if (stored || !rest.is_empty())
                && let Some(location) = self.session.take()
            {
                let _ = self.exchange.discard(visit, location).await;
            }
            if stored {
                return Ok(());
            }
            self.doubt = false;
        }
        let mut url = self.session(visit).await?.expose().clone();
        url.query_pairs_mut().append_pair("digest", digest.as_str());
        self.doubt = true;
        let ask = blob_bytes(Method::PUT, rest.clone());
        let arrival = self.exchange.change(visit, SignedUrl::new(url), &ask).await?;
        match arrival.response.status() {
            status if status.is_success() => {
                self.session = None;
                stored_as(&arrival, digest)
            }
            status @ (StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE) => {
                Err(self.lost(visit, self.confirmed, format!("answered {status} to its end")).await)
            }
            _ => Err(self.exchange.unexpected(visit, arrival).await),
        }
    }

    /// Where the next request goes; a new upload is begun if there is none.
    async fn session(&mut self, visit: Visit<'_>) -> Result<SignedUrl, Cause> {
        if let Some(location) = &self.session {
            return Ok(location.clone());
        }
        let ask = Ask::new(Method::POST).body(Bytes::new());
        let arrival = self.exchange.change(visit, visit.url(&Name::Upload), &ask).await?;
        if arrival.response.status() != StatusCode::ACCEPTED {
            return Err(self.exchange.unexpected(visit, arrival).await);
        }
        let least = arrival.response.headers().get("oci-chunk-min-length");
        let least = least.and_then(|least| least.to_str().ok()).and_then(|least| least.parse::<u64>().ok());
        let least = least.unwrap_or(0).min(MAX_CHUNK);
        self.chunk_size = self.chunk_size.max(least as usize);
        self.largest = self.largest.max(least);
        let location = arrival.location()?;
        self.session = Some(location.clone());
        Ok(location)
    }

    /// Takes note of where an answer wants the next request.
    fn follow(&mut self, arrival: &Arrival) -> Result<(), Cause> {
        if arrival.response.headers().contains_key(LOCATION) {
            self.session = Some(arrival.location()?);
        }
        Ok(())
    }

    /// The session is of no use any more. If all bytes of the blob from the first on are still held (`start`
    /// is 0), the next round begins a new one.
    async fn lost(&mut self, visit: Visit<'_>, start: u64, why: String) -> Cause {
        if let Some(location) = self.session.take() {
            let _ = self.exchange.discard(visit, location).await;
        }
        if start > 0 {
            return Cause::Lost(why);
        }
        (self.confirmed, self.doubt) = (0, false);
        Cause::down(why)
    }
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, repository) = (self.reference.host(), self.reference.repository());
        write!(f, "upload to {host}/{repository} ({} bytes confirmed)", self.confirmed)
    }
}

fn blob_bytes(method: Method, bytes: Bytes) -> Ask {
    Ask::new(method).header(CONTENT_TYPE, "application/octet-stream").body(bytes)
}

/// How many bytes a registry says it has: `Range: 0-99` is 100 bytes. `0-0` may mean one byte or, from the
/// reference implementation, none.
fn bytes_held(headers: &HeaderMap) -> Option<RangeInclusive<u64>> {
    let value = headers.get(RANGE)?.to_str().ok()?.trim();
    let last = value.strip_prefix("bytes=").unwrap_or(value).strip_prefix("0-")?;
    match last.parse().ok()? {
        0 => Some(0..=1),
        last => u64::checked_add(last, 1).map(|held| held..=held),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets() {
        for (value, expected) in [
            ("0-99", Some(100..=100)),
            ("bytes=0-99", Some(100..=100)),
            ("0-0", Some(0..=1)),
            ("1-99", None),
            ("0-", None),
            ("0--1", None),
            ("99", None),
            ("0-18446744073709551615", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, value.parse().unwrap());
            assert_eq!(bytes_held(&headers), expected, "{value}");
        }
        assert_eq!(bytes_held(&HeaderMap::new()), None);
    }
}
