//! Reading an object: what one host can do for it, and what its answers must look like.
//!
//! At one host an answer is opened - a kept redirect first, else the registry itself - and its body received;
//! a body that breaks off is resumed at its offset at the same host, because a read's bytes come from one
//! host only: whoever finds them wrong must know whom to avoid. Which answers are errors is decided in
//! [`answer`].

use crate::Error;
use crate::answer::{self, SKIP_LIMIT};
use crate::digest::Digest;
use crate::exchange::{Arrival, Ask, Exchange, Job, Visit};
use crate::hosts::HostTag;
use crate::retry::{Cause, Verdict, classify};
use crate::secret::SignedUrl;
use crate::source::Source;
use crate::transport;
use crate::whole::{TakeWhole, Whole};
use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, RANGE};
use reqwest::{Method, Response, StatusCode};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::time::Instant;

/// How much of the object is wanted.
pub(crate) enum Want<'a> {
    /// These bytes, counted as they arrive. Who sends all of them instead may do so to `whole`.
    Range { range: Range<u64>, arrived: Option<&'a AtomicU64>, whole: Option<&'a dyn TakeWhole> },
    /// All of it, in one of the media types of `accept`, with this digest.
    Whole { limit: u64, accept: Option<&'static str>, digest: Option<&'a Digest> },
}

impl Want<'_> {
    fn part(&self) -> Option<&Range<u64>> {
        match self {
            Want::Range { range, .. } => Some(range),
            Want::Whole { .. } => None,
        }
    }
}

/// What a host delivered.
pub(crate) struct Delivery {
    pub(crate) bytes: Bytes,
    pub(crate) host: HostTag,
    pub(crate) media_type: Option<String>,
}

/// A range received in part, and the endpoint all of it came from.
struct Partial {
    owner: usize,
    bytes: BytesMut,
}

impl Exchange {
    /// The wanted bytes from the first host that has them, in rounds until `deadline`; for a range also only until
    /// something else is known of the hosts.
    pub(crate) async fn fetch(
        &self,
        source: &Source,
        want: &Want<'_>,
        deadline: Instant,
        avoid: Option<&HostTag>,
    ) -> Result<Delivery, Error> {
        let mut partial = Partial { owner: usize::MAX, bytes: BytesMut::new() };
        let job = Job { source, part: want.part(), deadline, avoid };
        let mut rounds = match want {
            Want::Range { .. } => self.rounds(job).until_outdated(),
            Want::Whole { .. } => self.rounds(job),
        };
        loop {
            let visit = rounds.next().await?;
            let outcome = self.attempt(visit, want, &mut partial).await;
            if let Some(done) = rounds.settle(visit, outcome) {
                return Ok(done);
            }
        }
    }

    /// All a single host can do for this read.
    async fn attempt(
        &self,
        visit: Visit<'_>,
        want: &Want<'_>,
        partial: &mut Partial,
    ) -> Result<Delivery, Cause> {
        let host = visit.endpoint().tag.clone();
        let (range, arrived, taker) = match want {
            Want::Whole { limit, accept, digest } => {
                let (bytes, media_type) = self.whole(visit, *limit, *accept).await?;
                if let Some(digest) = digest {
                    digest.verify(&bytes).map_err(Cause::Mismatch)?;
                }
                return Ok(Delivery { bytes, host, media_type });
            }
            Want::Range { range, arrived, whole } => (range, *arrived, *whole),
        };
        if partial.owner != visit.index {
            *partial = Partial { owner: visit.index, bytes: BytesMut::new() };
        }
        for resumed in 0.. {
            let before = partial.bytes.len();
            match self.range(visit, range, (arrived, taker), &mut partial.bytes).await {
                Ok(()) => break,
                // Only a host that makes progress is asked again at once.
                Err(cause) if cause.is_final() || partial.bytes.len() == before => return Err(cause),
                Err(cause) if resumed >= self.config.retries || Instant::now() >= visit.job.deadline => {
                    return Err(cause);
                }
                Err(cause) => {
                    self.transport.counters.retry();
                    tracing::debug!(%host, what = visit.what(), have = partial.bytes.len(), %cause, "resuming");
                }
            }
        }
        let bytes = std::mem::take(&mut partial.bytes).freeze();
        Ok(Delivery { bytes, host, media_type: None })
    }

    /// One ranged request for what `have` still lacks of `range`.
    async fn range(
        &self,
        visit: Visit<'_>,
        range: &Range<u64>,
        (arrived, taker): (Option<&AtomicU64>, Option<&dyn TakeWhole>),
        have: &mut BytesMut,
    ) -> Result<(), Cause> {
        let rest = range.start + have.len() as u64..range.end;
        let ask = Ask::new(Method::GET).header(RANGE, format!("bytes={}-{}", rest.start, rest.end - 1));
        let mut response = self.open(visit, &ask).await?;
        let source = visit.job.source;
        let known = source.size();
        let plan = answer::check(response.status(), response.headers(), &rest, known)?;
        let total = plan.total.or(known).filter(|_| plan.range_ignored);
        if let (Some(taker), Some(total)) = (taker, total) {
            let (idle, host) = (self.config.idle_timeout, &visit.endpoint().tag);
            let named = (source.to_string(), source.repository.as_str());
            let whole = Whole::new(response, &self.transport, idle, total, host, named);
            match taker.take_whole(whole) {
                Ok(()) => return Err(Cause::RangeIgnored),
                Err(whole) => response = whole.into_response(),
            }
        }
        if plan.skip > SKIP_LIMIT {
            return Err(Cause::RangeIgnored);
        }
        if let Some(total) = plan.total {
            source.learn_size(total);
        }
        if plan.range_ignored {
            self.hosts.ignored_range(&visit.endpoint().tag, Instant::now());
        }
        have.reserve((rest.end - rest.start) as usize);
        let target = have.len() + plan.take as usize;
        let mut skip = plan.skip;
        while have.len() < target {
            let piece = self.piece(visit, &mut response).await?;
            let Some(piece) = piece else { break };
            arrived.inspect(|arrived| _ = arrived.fetch_add(piece.len() as u64, Ordering::Relaxed));
            let skipped = skip.min(piece.len() as u64) as usize;
            skip -= skipped as u64;
            let piece = &piece[skipped..];
            have.extend_from_slice(&piece[..piece.len().min(target - have.len())]);
        }
        let at = range.start + have.len() as u64;
        if at < range.end {
            return Err(Cause::down(format!("the body ended early, at byte {at} of the blob")));
        }
        Ok(())
    }

    /// The next piece of a body.
    pub(crate) async fn piece(
        &self,
        visit: Visit<'_>,
        response: &mut Response,
    ) -> Result<Option<Bytes>, Cause> {
        let idle = self.config.idle_timeout.min(visit.share());
        self.transport.piece(response, idle, visit.job.deadline).await
    }

    /// The whole object and its media type.
    async fn whole(
        &self,
        visit: Visit<'_>,
        limit: u64,
        accept: Option<&'static str>,
    ) -> Result<(Bytes, Option<String>), Cause> {
        let ask = Ask::new(Method::GET);
        let ask = accept.into_iter().fold(ask, |ask, accept| ask.header(ACCEPT, accept));
        let mut response = self.open(visit, &ask).await?;
        if response.status() != StatusCode::OK {
            return Err(Cause::Nonsense(format!("{} to a request for all of it", response.status())));
        }
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let announced = header(CONTENT_LENGTH).and_then(|length| length.parse().ok()).unwrap_or(0);
        if announced > limit {
            return Err(Cause::TooLarge { size: announced, limit });
        }
        let media_type = header(CONTENT_TYPE).and_then(|value| value.split(';').next());
        let media_type = media_type.map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let mut bytes = BytesMut::with_capacity(announced as usize);
        while let Some(piece) = self.piece(visit, &mut response).await? {
            bytes.extend_from_slice(&piece);
            if bytes.len() as u64 > limit {
                return Err(Cause::TooLarge { size: bytes.len() as u64, limit });
            }
        }
        Ok((bytes.freeze(), media_type))
    }

    /// An answer whose body may be read (200, 206, or 416 for its headers), after authorization and
    /// redirects. A kept redirect that no longer works is walked again once.
    async fn open(&self, visit: Visit<'_>, ask: &Ask) -> Result<Response, Cause> {
        let source = visit.job.source;
        let deadline = Instant::now() + visit.share();
        let kept = match source.kept(visit.index, Instant::now()) {
            Some(kept) => self.revisit(visit, kept, ask, deadline).await?,
            None => None,
        };
        let from_kept = kept.is_some();
        let Arrival { response, url, hops, .. } = match kept {
            Some(arrival) => arrival,
            None => self.admitted(visit, visit.url(source.name()), ask, deadline).await?,
        };
        let status = response.status();
        match classify(status) {
            Verdict::Deliver => {
                if !from_kept || hops > 0 {
                    let until = Instant::now() + self.config.redirect_ttl;
                    source.keep(visit.index, (hops > 0).then_some((url, until)));
                }
                Ok(response)
            }
            Verdict::Refused => {
                let tried = format!("a fresh redirect from {}", visit.endpoint().tag);
                Err(Cause::Denied { host: url.host(), tried })
            }
            Verdict::Missing => Err(Cause::Missing),
            Verdict::Later => Err(transport::later(&response)),
            _ if status == StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            _ => Err(Cause::Nonsense(format!("{url} answered {status}"))),
        }
    }

    /// The answer at the end of a kept redirect; `None` if that is no longer good.
    async fn revisit(
        &self,
        visit: Visit<'_>,
        kept: SignedUrl,
        ask: &Ask,
        deadline: Instant,
    ) -> Result<Option<Arrival>, Cause> {
        let grant = match self.grant(visit, &kept, deadline).await {
            Err(Cause::Denied { .. }) => None,
            grant => grant?,
        };
        let arrival = self.walk(visit, kept, ask, grant.as_ref(), deadline).await?;
        let status = arrival.response.status();
        let ended = status.is_client_error() && classify(status) != Verdict::Later;
        Ok((!ended).then_some(arrival))
    }
}
