//! One object and the hosts it may be had from: the walk that ends in its bytes or an error.
//!
//! [`Exchange::fetch`] asks the hosts in rounds. At one host ([`Exchange::attempt`]) an answer is opened -
//! a kept redirect first, else the registry itself, with authorization as needed - and its body received;
//! a body that breaks off is resumed at its offset at the same host, because a read's bytes come from one
//! host only: whoever finds them wrong must know whom to avoid. Which answers are errors is decided in
//! [`answer`] and [`retry`].

use crate::answer;
use crate::auth::{self, Auth, Grant, Site};
use crate::config::Config;
use crate::digest::Digest;
use crate::hosts::{self, Endpoint, HostBook, HostTag, Standing};
use crate::retry::{self, Cause, Next, Policy, Round, Verdict, classify};
use crate::secret::SignedUrl;
use crate::transport::{self, Transport};
use crate::{Error, Reference};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Response, StatusCode};
use std::fmt;
use std::ops::Range;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use url::Url;

/// Redirects followed for one request.
const MAX_HOPS: usize = 3;
/// How long a host that refused an object is asked for it after the others.
const DECLINED_FOR: Duration = Duration::from_secs(60);

/// What an object is called in a registry.
#[derive(Debug, Clone)]
pub(crate) enum Name {
    Blob(Digest),
    /// By tag or digest.
    Manifest(String),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob(digest) => write!(f, "blob {digest}"),
            Self::Manifest(name) => write!(f, "manifest {name}"),
        }
    }
}

/// One object, its hosts, and what is remembered of it at each.
pub(crate) struct Source {
    origin: String,
    repository: String,
    name: Name,
    endpoints: Vec<Endpoint>,
    /// One per endpoint.
    routes: Mutex<Vec<Route>>,
    /// The size in bytes the caller gave.
    given_size: Option<u64>,
    /// The size an answer told. Dropped with the routes: a host that serves wrong bytes may lie here too.
    learnt_size: Mutex<Option<u64>>,
}

#[derive(Default)]
struct Route {
    kept: Option<(SignedUrl, Instant)>,
    declined_until: Option<Instant>,
}

impl Source {
    pub(crate) fn new(
        reference: &Reference,
        name: Name,
        given_size: Option<u64>,
        config: &Config,
    ) -> Result<Self, Error> {
        let endpoints = hosts::endpoints(reference.host(), config)?;
        let routes = Mutex::new(endpoints.iter().map(|_| Route::default()).collect());
        Ok(Self {
            origin: reference.host().to_owned(),
            repository: reference.repository().to_owned(),
            name,
            endpoints,
            routes,
            given_size,
            learnt_size: Mutex::default(),
        })
    }

    /// The host asked first when nothing speaks against it.
    pub(crate) fn first_host(&self) -> HostTag {
        self.endpoints[0].tag.clone()
    }

    /// The object's size in bytes, once known.
    pub(crate) fn size(&self) -> Option<u64> {
        self.given_size.or_else(|| *self.learnt_size.lock())
    }

    /// Drops what answers told: where redirects lead, and the size.
    pub(crate) fn forget(&self) {
        self.routes.lock().iter_mut().for_each(|route| route.kept = None);
        *self.learnt_size.lock() = None;
    }

    /// The object's own URL at a host. Repository and name were validated: neither leaves its place.
    fn url(&self, endpoint: &Endpoint) -> SignedUrl {
        let mut url: Url = endpoint.base.clone();
        let (kind, name) = match &self.name {
            Name::Blob(digest) => ("blobs", digest.as_str()),
            Name::Manifest(name) => ("manifests", name.as_str()),
        };
        url.set_path(&format!("/v2/{}/{kind}/{name}", self.repository));
        if let Some(namespace) = &endpoint.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        SignedUrl::new(url)
    }

    fn kept(&self, index: usize, now: Instant) -> Option<SignedUrl> {
        self.routes.lock()[index].kept.as_ref().filter(|(_, until)| *until > now).map(|(url, _)| url.clone())
    }

    fn what(&self, want: &Want<'_>) -> String {
        match want {
            Want::Range(range) => format!("{self} bytes {}..{}", range.start, range.end),
            Want::Whole { .. } => self.to_string(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}/{}", self.name, self.origin, self.repository)
    }
}

/// How much of the object is wanted.
pub(crate) enum Want<'a> {
    /// These bytes.
    Range(Range<u64>),
    /// All of it, in one of the media types of `accept`, with this digest.
    Whole { limit: u64, accept: Option<&'static str>, digest: Option<&'a Digest> },
}

/// What a host delivered.
pub(crate) struct Delivery {
    pub(crate) bytes: Bytes,
    pub(crate) host: HostTag,
    pub(crate) media_type: Option<String>,
}

/// One host's turn in a round.
#[derive(Clone, Copy)]
struct Visit<'a> {
    source: &'a Source,
    index: usize,
    want: &'a Want<'a>,
    deadline: Instant,
    /// Hosts still to be asked in this round, whose share of the time is theirs.
    others: usize,
}

impl<'a> Visit<'a> {
    fn endpoint(&self) -> &'a Endpoint {
        &self.source.endpoints[self.index]
    }

    fn site(&self) -> Site<'a> {
        Site { endpoint: self.endpoint(), repository: &self.source.repository }
    }

    /// The time this host may keep us waiting from now on.
    fn share(&self) -> Duration {
        retry::share(self.deadline.saturating_duration_since(Instant::now()), self.others)
    }

    fn what(&self) -> String {
        self.source.what(self.want)
    }
}

/// A range received in part, and the endpoint all of it came from.
struct Partial {
    owner: usize,
    bytes: BytesMut,
}

/// An answer after redirects.
struct Arrival {
    response: Response,
    url: SignedUrl,
    hops: usize,
    /// It came from the asked host itself, not from another it pointed to.
    own: bool,
}

/// Everything needed to talk to hosts; one for the process.
pub(crate) struct Exchange {
    pub(crate) config: Config,
    pub(crate) transport: Transport,
    auth: Auth,
    hosts: HostBook,
}

impl Exchange {
    pub(crate) fn new(config: Config) -> Result<Self, Error> {
        let config = config.bounded();
        for origin in config.hosts.keys() {
            hosts::endpoints(origin, &config)?;
        }
        let transport = Transport::new(&config)?;
        let auth = Auth::new(transport.clone(), &config.docker_config);
        Ok(Self { config, transport, auth, hosts: HostBook::default() })
    }

    /// The wanted bytes from the first host that has them, in rounds until `deadline`.
    pub(crate) async fn fetch(
        &self,
        source: &Source,
        want: &Want<'_>,
        deadline: Instant,
        avoid: Option<&HostTag>,
    ) -> Result<Delivery, Error> {
        let policy = Policy {
            retries: self.config.retries,
            backoff_min: self.config.backoff_min,
            backoff_max: self.config.backoff_max,
        };
        let mut failures: Vec<Option<Cause>> = source.endpoints.iter().map(|_| None).collect();
        let mut partial = Partial { owner: usize::MAX, bytes: BytesMut::new() };
        let mut again = false;
        for number in 0.. {
            let mut queue = self.queue(source, avoid, &failures);
            queue.reverse();
            while let Some(index) = queue.pop() {
                let endpoint = &source.endpoints[index];
                let now = Instant::now();
                if let Some(hold) = self.hosts.hold(&endpoint.tag, now) {
                    let why = || format!("asked to be left alone for another {} s", hold.as_secs());
                    failures[index].get_or_insert_with(|| Cause::Down { why: why(), hold: Some(hold) });
                    continue;
                }
                if now >= deadline {
                    break;
                }
                if std::mem::replace(&mut again, true) {
                    self.transport.counters.retry();
                }
                self.hosts.asking(&endpoint.tag, now);
                let visit = Visit { source, index, want, deadline, others: queue.len() };
                match self.attempt(visit, &mut partial).await {
                    Ok(delivery) => {
                        self.hosts.succeeded(&endpoint.tag);
                        return Ok(delivery);
                    }
                    Err(cause) => {
                        self.note(visit, &cause);
                        failures[index] = Some(cause);
                    }
                }
            }
            match self.after_round(source, &failures, number, deadline, &policy) {
                Next::Wait(wait) => sleep(wait).await,
                Next::GiveUp => break,
            }
        }
        Err(report(source, want, failures, Instant::now() >= deadline))
    }

    /// The endpoints to ask in this round, in order.
    fn queue(&self, source: &Source, avoid: Option<&HostTag>, failures: &[Option<Cause>]) -> Vec<usize> {
        let now = Instant::now();
        let routes = source.routes.lock();
        let standing = |(endpoint, route): (&Endpoint, &Route)| Standing {
            avoided: avoid == Some(&endpoint.tag),
            declined: route.declined_until.is_some_and(|until| until > now),
            ..self.hosts.standing(&endpoint.tag, now)
        };
        let standings: Vec<Standing> = source.endpoints.iter().zip(routes.iter()).map(standing).collect();
        let mut order = hosts::order(&standings);
        order.retain(|&index| !failures[index].as_ref().is_some_and(Cause::is_final));
        order
    }

    fn after_round(
        &self,
        source: &Source,
        failures: &[Option<Cause>],
        number: u32,
        deadline: Instant,
        policy: &Policy,
    ) -> Next {
        let now = Instant::now();
        let open: Vec<&Endpoint> = (source.endpoints.iter().zip(failures))
            .filter(|(_, failure)| !failure.as_ref().is_some_and(Cause::is_final))
            .map(|(endpoint, _)| endpoint)
            .collect();
        if open.is_empty() {
            return Next::GiveUp;
        }
        let holds: Vec<Option<Duration>> = open.iter().map(|e| self.hosts.hold(&e.tag, now)).collect();
        let hold = if holds.iter().all(Option::is_some) { holds.into_iter().flatten().min() } else { None };
        let remaining = deadline.saturating_duration_since(now);
        retry::decide(Round { number, hold, remaining }, policy, rand::random())
    }

    /// Remembers a failure and logs it; the error itself is returned only if no other attempt helps.
    fn note(&self, visit: Visit<'_>, cause: &Cause) {
        let (host, now) = (&visit.endpoint().tag, Instant::now());
        // Whatever went wrong, it may be where the redirect leads.
        visit.source.routes.lock()[visit.index].kept = None;
        let newly = match cause {
            Cause::Silent(_) => self.hosts.failed(host, None, now),
            Cause::Down { hold, .. } => self.hosts.failed(host, *hold, now),
            _ => {
                visit.source.routes.lock()[visit.index].declined_until = Some(now + DECLINED_FOR);
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

    /// All a single host can do for this read.
    async fn attempt(&self, visit: Visit<'_>, partial: &mut Partial) -> Result<Delivery, Cause> {
        let host = visit.endpoint().tag.clone();
        let range = match visit.want {
            Want::Whole { limit, digest, .. } => {
                let (bytes, media_type) = self.whole(visit, *limit).await?;
                if let Some(digest) = digest {
                    digest.verify(&bytes).map_err(Cause::Mismatch)?;
                }
                return Ok(Delivery { bytes, host, media_type });
            }
            Want::Range(range) => range,
        };
        if partial.owner != visit.index {
            *partial = Partial { owner: visit.index, bytes: BytesMut::new() };
        }
        for resumed in 0.. {
            let before = partial.bytes.len();
            match self.range(visit, range, &mut partial.bytes).await {
                Ok(()) => break,
                // Only a host that makes progress is asked again at once.
                Err(cause) if cause.is_final() || partial.bytes.len() == before => return Err(cause),
                Err(cause) if resumed >= self.config.retries || Instant::now() >= visit.deadline => {
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
    async fn range(&self, visit: Visit<'_>, range: &Range<u64>, have: &mut BytesMut) -> Result<(), Cause> {
        let rest = range.start + have.len() as u64..range.end;
        let mut response = self.open(Visit { want: &Want::Range(rest.clone()), ..visit }).await?;
        let known = visit.source.size();
        let plan = answer::check(response.status(), response.headers(), &rest, known)?;
        if let Some(total) = plan.total {
            visit.source.learnt_size.lock().get_or_insert(total);
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
    async fn piece(&self, visit: Visit<'_>, response: &mut Response) -> Result<Option<Bytes>, Cause> {
        let idle = self.config.idle_timeout.min(visit.share());
        self.transport.piece(response, idle, visit.deadline).await
    }

    /// The whole object and its media type.
    async fn whole(&self, visit: Visit<'_>, limit: u64) -> Result<(Bytes, Option<String>), Cause> {
        let mut response = self.open(visit).await?;
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
    /// redirects. A kept redirect that no longer works is walked again once; a refusal by the host itself
    /// is answered once with authorization fetched anew.
    async fn open(&self, visit: Visit<'_>) -> Result<Response, Cause> {
        let Visit { source, index, .. } = visit;
        let (endpoint, site) = (visit.endpoint(), visit.site());
        let deadline = Instant::now() + visit.share();
        let mut kept = source.kept(index, Instant::now());
        let mut renewed = false;
        loop {
            let from_kept = kept.is_some();
            let start = kept.take().unwrap_or_else(|| source.url(endpoint));
            // A kept URL of another host needs no token: the registry's token server may be down.
            let grant = match start.same_origin(&endpoint.base) {
                true => match self.auth.grant(site, deadline).await {
                    // By what was remembered of the host; it may ask for something else by now, or nothing.
                    Err(Cause::Denied { .. }) if !renewed => None,
                    grant => grant?,
                },
                false => None,
            };
            let arrival = self.walk(visit, start, grant.as_ref(), deadline).await?;
            let Arrival { response, url, hops, own } = arrival;
            let status = response.status();
            if classify(status) == Verdict::Deliver {
                if !from_kept || hops > 0 {
                    let until = Instant::now() + self.config.redirect_ttl;
                    source.routes.lock()[index].kept = (hops > 0).then_some((url, until));
                }
                return Ok(response);
            }
            if from_kept && status.is_client_error() && classify(status) != Verdict::Later {
                continue;
            }
            return match classify(status) {
                Verdict::Refused if own => {
                    self.auth.refused(site, grant, &response, deadline).await?;
                    if renewed {
                        return Err(self.auth.denied(site, deadline).await);
                    }
                    renewed = true;
                    continue;
                }
                Verdict::Refused => {
                    let tried = format!("a fresh redirect from {}", endpoint.tag);
                    Err(Cause::Denied { host: url.host(), tried })
                }
                Verdict::Missing => Err(Cause::Missing),
                Verdict::Later => Err(transport::later(&response)),
                _ if status == StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
                _ => Err(Cause::Nonsense(format!("{url} answered {status}"))),
            };
        }
    }

    /// One request and the redirects it leads to. The host's own headers and the grant accompany it only
    /// while it stays at the host.
    async fn walk(
        &self,
        visit: Visit<'_>,
        start: SignedUrl,
        grant: Option<&Grant>,
        deadline: Instant,
    ) -> Result<Arrival, Cause> {
        let endpoint = visit.endpoint();
        let mut url = start;
        for hops in 0..=MAX_HOPS {
            let own = url.same_origin(&endpoint.base);
            let mut request = self.transport.client().get(url.expose().clone());
            if own {
                request = request.headers(auth::own_headers(endpoint, grant));
            }
            match visit.want {
                Want::Range(range) => {
                    request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end - 1));
                }
                Want::Whole { accept: Some(accept), .. } => request = request.header(ACCEPT, *accept),
                Want::Whole { .. } => {}
            }
            let response = self.transport.send(request, endpoint.first_byte_timeout, deadline).await?;
            let status = response.status();
            tracing::debug!(host = %url.host(), what = visit.what(), status = status.as_u16(), "request");
            if classify(status) != Verdict::Redirect {
                return Ok(Arrival { response, url, hops, own });
            }
            self.transport.counters.redirect();
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.expose().join(location).ok());
            let next = next.filter(|next| matches!(next.scheme(), "http" | "https"));
            let next = next.ok_or_else(|| {
                Cause::Nonsense(format!("{url} answered {status} without a usable Location"))
            })?;
            url = SignedUrl::new(next);
        }
        Err(Cause::Nonsense(format!("more than {MAX_HOPS} redirects, the last to {url}")))
    }
}

/// The error of a read nobody could serve: the origin's if it was asked, since mirrors hold only copies.
fn report(source: &Source, want: &Want<'_>, failures: Vec<Option<Cause>>, late: bool) -> Error {
    let failed = failures.into_iter().zip(&source.endpoints).rev();
    let mut failed = failed.filter_map(|(cause, endpoint)| Some((cause?, endpoint.tag.as_str())));
    let unasked = || {
        (
            Cause::Silent("the deadline had passed before it was asked".into()),
            source.endpoints[0].tag.as_str(),
        )
    };
    let (cause, host) = failed.next().unwrap_or_else(unasked);
    let cause = match cause {
        Cause::Down { why, .. } if late => Cause::Silent(format!("the deadline passed; before that: {why}")),
        other => other,
    };
    cause.into_error(source.what(want), &source.repository, host)
}
