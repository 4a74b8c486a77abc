//! Asking hosts: one host after the other, in rounds, each with authorization and redirects as needed.
//!
//! [`Rounds`] go over the hosts again and again, by the rules in [`retry`], until an attempt at one of them
//! succeeds; [`Exchange::admitted`] is one request of such an attempt, with authorization as needed and
//! the redirects it leads to. Reading (`fetch`) and pushing (`push`, `upload`) are both built from these two.

use crate::Error;
use crate::auth::{self, Auth, Grant, MAX_TURNS, Site};
use crate::config::Config;
use crate::hosts::{self, Endpoint, HostBook, HostTag, Standing};
use crate::origin::Capability;
use crate::retry::{self, Cause, Next, Policy, Round, Verdict, classify};
use crate::secret::SignedUrl;
use crate::source::{Name, Source};
use crate::transport::Transport;
use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode};
use std::ops::Range;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Redirects followed for one request.
const MAX_HOPS: usize = 3;
/// How long a host that refused an object is asked for it after the others.
const DECLINED_FOR: Duration = Duration::from_secs(60);

/// What the rounds are about.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Source,
    /// The bytes of the object in question, if not all: for naming it.
    pub(crate) part: Option<&'a Range<u64>>,
    pub(crate) deadline: Instant,
    /// A host to be asked after all others.
    pub(crate) avoid: Option<&'a HostTag>,
}

/// One host's turn in a round.
#[derive(Clone, Copy)]
pub(crate) struct Visit<'a> {
    pub(crate) job: Job<'a>,
    pub(crate) index: usize,
    /// Hosts still to be asked in this round, whose share of the time is theirs.
    others: usize,
}

impl<'a> Visit<'a> {
    /// The URL of an object in the job's repository at this host.
    pub(crate) fn url(&self, name: &Name) -> SignedUrl {
        self.job.source.url(self.index, name)
    }

    pub(crate) fn endpoint(&self) -> &'a Endpoint {
        &self.job.source.endpoints[self.index]
    }

    fn site(&self) -> Site<'a> {
        let source = self.job.source;
        Site {
            endpoint: self.endpoint(),
            repository: source.repository_at(self.index),
            access: &source.access,
        }
    }

    /// The time this host may keep us waiting from now on.
    pub(crate) fn share(&self) -> Duration {
        retry::share(self.job.deadline.saturating_duration_since(Instant::now()), self.others)
    }

    pub(crate) fn what(&self) -> String {
        self.job.source.what(self.job.part)
    }
}

/// A request, apart from where it goes and what proves who sends it.
pub(crate) struct Ask {
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    /// Kept by the caller too, so that the request can be sent again: clones share the bytes.
    pub(crate) body: Option<Bytes>,
}

impl Ask {
    pub(crate) fn new(method: Method) -> Self {
        Self { method, headers: HeaderMap::new(), body: None }
    }

    /// With a header, whose value is of visible characters only.
    pub(crate) fn header(mut self, name: HeaderName, value: impl AsRef<str>) -> Self {
        if let Ok(value) = HeaderValue::from_str(value.as_ref()) {
            self.headers.insert(name, value);
        }
        self
    }

    /// With a body, which may be empty.
    pub(crate) fn body(self, bytes: Bytes) -> Self {
        Self { body: Some(bytes.clone()), ..self.header(CONTENT_LENGTH, bytes.len().to_string()) }
    }

    fn reads(&self) -> bool {
        self.method == Method::GET || self.method == Method::HEAD
    }

    /// Whether a redirect with this status may be followed: those for reading only would turn another request
    /// into a GET (RFC 9110, section 15.4).
    fn follows(&self, status: StatusCode) -> bool {
        classify(status) == Verdict::Redirect && (self.reads() || matches!(status.as_u16(), 307 | 308))
    }
}

/// An answer after redirects.
pub(crate) struct Arrival {
    pub(crate) response: Response,
    pub(crate) url: SignedUrl,
    pub(crate) hops: usize,
    /// It came from the asked host itself, not from another it pointed to.
    pub(crate) own: bool,
}

impl Arrival {
    /// The URL in `Location`, which may be relative.
    pub(crate) fn location(&self) -> Result<SignedUrl, Cause> {
        let location = self.response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let next = location.and_then(|location| self.url.expose().join(location).ok());
        let next = next.filter(|next| matches!(next.scheme(), "http" | "https"));
        next.map(SignedUrl::new).ok_or_else(|| {
            let status = self.response.status();
            Cause::Nonsense(format!("{} answered {status} without a usable Location", self.url))
        })
    }
}

/// Everything needed to talk to hosts; one for the process.
pub(crate) struct Exchange {
    pub(crate) config: Config,
    pub(crate) transport: Transport,
    pub(crate) auth: Auth,
    pub(crate) hosts: HostBook,
}

impl Exchange {
    pub(crate) fn new(config: Config) -> Result<Self, Error> {
        let config = config.bounded();
        for origin in config.hosts.keys() {
            hosts::endpoints(origin, &config, None, Capability::Pull)?;
        }
        let transport = Transport::new(&config)?;
        let auth = Auth::new(transport.clone(), &config);
        Ok(Self { config, transport, auth, hosts: HostBook::default() })
    }

    /// Begins the rounds over the hosts of a job.
    pub(crate) fn rounds<'a>(&'a self, job: Job<'a>) -> Rounds<'a> {
        let failures: Vec<Option<Cause>> = job.source.endpoints.iter().map(|_| None).collect();
        let queue = self.queue(&job, &failures);
        Rounds { exchange: self, job, number: 0, queue, failures, again: false, ends_outdated: false }
    }

    /// The endpoints to ask in this round, the last one first.
    fn queue(&self, job: &Job<'_>, failures: &[Option<Cause>]) -> Vec<usize> {
        let (now, source) = (Instant::now(), job.source);
        let standing = |(index, endpoint): (usize, &Endpoint)| Standing {
            avoided: job.avoid == Some(&endpoint.tag),
            declined: source.declined(index, now),
            ..self.hosts.standing(&endpoint.tag, now)
        };
        let standings: Vec<Standing> = source.endpoints.iter().enumerate().map(standing).collect();
        let mut order = hosts::order(&standings);
        order.retain(|&index| !failures[index].as_ref().is_some_and(Cause::is_final));
        order.reverse();
        order
    }

    fn after_round(&self, job: &Job<'_>, failures: &[Option<Cause>], number: u32) -> Next {
        let now = Instant::now();
        let open: Vec<&Endpoint> = (job.source.endpoints.iter().zip(failures))
            .filter(|(_, failure)| !failure.as_ref().is_some_and(Cause::is_final))
            .map(|(endpoint, _)| endpoint)
            .collect();
        if open.is_empty() {
            return Next::GiveUp;
        }
        let holds: Vec<Option<Duration>> = open.iter().map(|e| self.hosts.hold(&e.tag, now)).collect();
        let hold = if holds.iter().all(Option::is_some) { holds.into_iter().flatten().min() } else { None };
        let remaining = job.deadline.saturating_duration_since(now);
        let policy = Policy {
            retries: self.config.retries,
            backoff_min: self.config.backoff_min,
            backoff_max: self.config.backoff_max,
        };
        retry::decide(Round { number, hold, remaining }, &policy, rand::random())
    }

    /// Remembers a failure and logs it; the error itself is returned only if no other attempt helps.
    fn note(&self, visit: Visit<'_>, cause: &Cause) {
        let (host, now) = (&visit.endpoint().tag, Instant::now());
        // Whatever went wrong, it may be where the redirect leads.
        visit.job.source.keep(visit.index, None);
        let newly = match cause {
            Cause::Silent(_) => self.hosts.failed(host, None, now),
            Cause::Down { hold, .. } => self.hosts.failed(host, *hold, now),
            _ => {
                visit.job.source.decline(visit.index, now + DECLINED_FOR);
                false
            }
        };
        if *cause == Cause::RangeIgnored {
            self.hosts.ignored_range(host, now);
        }
        if newly {
            tracing::warn!(%host, what = visit.what(), %cause, "registry host is failing");
        } else {
            tracing::debug!(%host, what = visit.what(), %cause, "attempt failed");
        }
    }

    /// The answer to one request, which may be any but a refusal by the host itself: that is answered once
    /// with authorization fetched anew, then with every other login there is, and then an error.
    pub(crate) async fn admitted(
        &self,
        visit: Visit<'_>,
        start: SignedUrl,
        ask: &Ask,
        deadline: Instant,
    ) -> Result<Arrival, Cause> {
        let site = visit.site();
        let mut renewals = 0;
        loop {
            let grant = match self.grant(visit, &start, deadline).await {
                // By what was remembered of the host; it may ask for something else by now, or nothing.
                Err(Cause::Denied { .. }) if renewals == 0 => None,
                grant => grant?,
            };
            let arrival = self.walk(visit, start.clone(), ask, grant.as_ref(), deadline).await?;
            if !arrival.own || classify(arrival.response.status()) != Verdict::Refused {
                return Ok(arrival);
            }
            let shown = grant.is_some();
            self.auth.refused(site, grant, &arrival.response, deadline).await?;
            if renewals > 0 {
                let other = shown && renewals < MAX_TURNS && self.auth.has_other(site, deadline).await?;
                if !other {
                    return Err(self.auth.denied(site, deadline).await);
                }
            }
            renewals += 1;
        }
    }

    /// What to send to `url`. A URL of another host needs no token: the registry's token server may be down.
    pub(crate) async fn grant(
        &self,
        visit: Visit<'_>,
        url: &SignedUrl,
        deadline: Instant,
    ) -> Result<Option<Grant>, Cause> {
        match url.same_origin(&visit.endpoint().base) {
            true => self.auth.grant(visit.site(), deadline).await,
            false => Ok(None),
        }
    }

    /// One request and the redirects it leads to. The host's own headers and the grant accompany it only
    /// while it stays at the host, and what is sent to an https host is not sent on in the clear.
    pub(crate) async fn walk(
        &self,
        visit: Visit<'_>,
        start: SignedUrl,
        ask: &Ask,
        grant: Option<&Grant>,
        deadline: Instant,
    ) -> Result<Arrival, Cause> {
        let endpoint = visit.endpoint();
        let mut url = start;
        for hops in 0..=MAX_HOPS {
            let own = url.same_origin(&endpoint.base);
            if !ask.reads() && url.reveals(&endpoint.base) {
                return Err(Cause::Nonsense(format!("uploads are to go to {url}, which is not https")));
            }
            let client = self.transport.client(endpoint, &url)?;
            let mut request = client.request(ask.method.clone(), url.expose().clone());
            if own {
                request = request.headers(auth::own_headers(endpoint, grant));
            }
            request = request.headers(ask.headers.clone());
            if let Some(body) = &ask.body {
                request = request.body(body.clone());
            }
            // These are answered when all bytes have arrived and are stored: that takes what it takes, but must
            // leave time to try again.
            let now = Instant::now();
            let half = retry::share(deadline.saturating_duration_since(now), 1);
            let (patience, limit) = match ask.method {
                Method::PUT | Method::PATCH => (half, now + half),
                _ => (endpoint.patience(), deadline),
            };
            let response = self.transport.send(request, patience, limit).await?;
            let status = response.status();
            tracing::debug!(
                method = %ask.method,
                host = %url.host(),
                what = visit.what(),
                status = status.as_u16(),
                "request"
            );
            let arrival = Arrival { response, url, hops, own };
            if !ask.follows(status) {
                return Ok(arrival);
            }
            self.transport.counters.redirect();
            url = arrival.location()?;
        }
        Err(Cause::Nonsense(format!("more than {MAX_HOPS} redirects, the last to {url}")))
    }
}

/// A job in progress. Whoever has it done takes one visit after the other and settles each:
///
/// ```text
/// let mut rounds = exchange.rounds(job);
/// loop {
///     let visit = rounds.next().await?;
///     let outcome = attempt(visit).await;
///     if let Some(done) = rounds.settle(visit, outcome) {
///         return Ok(done);
///     }
/// }
/// ```
pub(crate) struct Rounds<'a> {
    exchange: &'a Exchange,
    job: Job<'a>,
    /// 0 for the first.
    number: u32,
    /// The endpoints still to be asked in this round, the next one last.
    queue: Vec<usize>,
    /// The last failure of each endpoint.
    failures: Vec<Option<Cause>>,
    /// There was a visit before.
    again: bool,
    /// Whoever has it done begins anew when the hosts have changed.
    ends_outdated: bool,
}

impl<'a> Rounds<'a> {
    /// Gives up after a wait if something else is known of the hosts by then.
    pub(crate) fn until_outdated(self) -> Self {
        Self { ends_outdated: true, ..self }
    }

    /// The next host's turn, after a wait if all have had theirs. An error when it is no use going on.
    pub(crate) async fn next(&mut self) -> Result<Visit<'a>, Error> {
        let (exchange, job) = (self.exchange, self.job);
        loop {
            while let Some(index) = self.queue.pop() {
                let endpoint = &job.source.endpoints[index];
                let now = Instant::now();
                if let Some(hold) = exchange.hosts.hold(&endpoint.tag, now) {
                    let why = || format!("asked to be left alone for another {} s", hold.as_secs());
                    self.failures[index].get_or_insert_with(|| Cause::Down { why: why(), hold: Some(hold) });
                    continue;
                }
                if now >= job.deadline {
                    break;
                }
                if std::mem::replace(&mut self.again, true) {
                    exchange.transport.counters.retry();
                }
                exchange.hosts.asking(&endpoint.tag, now);
                return Ok(Visit { job, index, others: self.queue.len() });
            }
            match exchange.after_round(&job, &self.failures, self.number) {
                Next::Wait(wait) => {
                    sleep(wait).await;
                    if self.ends_outdated && job.source.is_outdated(&exchange.config) {
                        return Err(self.report());
                    }
                }
                Next::GiveUp => return Err(self.report()),
            }
            self.number += 1;
            self.queue = exchange.queue(&job, &self.failures);
        }
    }

    /// Takes note of how a visit went: what it was made for if it went well.
    pub(crate) fn settle<T>(&mut self, visit: Visit<'_>, outcome: Result<T, Cause>) -> Option<T> {
        match outcome {
            Ok(done) => {
                self.exchange.hosts.succeeded(&visit.endpoint().tag);
                Some(done)
            }
            Err(cause) => {
                self.exchange.note(visit, &cause);
                self.failures[visit.index] = Some(cause);
                None
            }
        }
    }

    /// The error of a job nobody could do: the origin's if it was asked, since mirrors hold only copies.
    fn report(&mut self) -> Error {
        let Job { source, part, deadline, .. } = self.job;
        let failed = self.failures.drain(..).zip(&source.endpoints).rev();
        let mut failed = failed.filter_map(|(cause, endpoint)| Some((cause?, endpoint.tag.as_str())));
        let unasked = || {
            (
                Cause::Silent("the deadline had passed before it was asked".into()),
                source.endpoints[0].tag.as_str(),
            )
        };
        let (cause, host) = failed.next().unwrap_or_else(unasked);
        let cause = match cause {
            Cause::Down { why, .. } if Instant::now() >= deadline => {
                Cause::Silent(format!("the deadline passed; before that: {why}"))
            }
            other => other,
        };
        cause.into_error(source.what(part), &source.repository, host)
    }
}
