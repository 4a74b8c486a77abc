//! One object of a registry: its name, the hosts it may be had from, and what is remembered of it at each.

use crate::auth::Access;
use crate::config::Config;
use crate::digest::Digest;
use crate::hosts::{self, Endpoint, HostTag};
use crate::secret::SignedUrl;
use crate::{Error, Reference};
use parking_lot::Mutex;
use std::fmt;
use std::ops::Range;
use tokio::time::Instant;
use url::Url;

/// What an object is called in a registry.
#[derive(Debug, Clone)]
pub(crate) enum Name {
    Blob(Digest),
    /// By tag or digest.
    Manifest(String),
    /// A blob on its way, whose digest is not known yet.
    Upload,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob(digest) => write!(f, "blob {digest}"),
            Self::Manifest(name) => write!(f, "manifest {name}"),
            Self::Upload => f.write_str("new blob"),
        }
    }
}

/// One object, its hosts, and what is remembered of it at each.
pub(crate) struct Source {
    origin: String,
    pub(crate) repository: String,
    /// What the requests about it need to be allowed.
    pub(crate) access: Access,
    name: Name,
    pub(crate) endpoints: Vec<Endpoint>,
    /// One per endpoint.
    routes: Mutex<Vec<Route>>,
    /// The size in bytes the caller gave.
    given_size: Option<u64>,
    /// The size an answer told. Dropped with the routes: a host that serves wrong bytes may lie here too.
    learnt_size: Mutex<Option<u64>>,
}

/// What is remembered of the object at one host.
#[derive(Default)]
struct Route {
    kept: Option<(SignedUrl, Instant)>,
    declined_until: Option<Instant>,
}

impl Source {
    /// An object to read, from mirrors or the origin.
    pub(crate) fn new(
        reference: &Reference,
        name: Name,
        given_size: Option<u64>,
        config: &Config,
    ) -> Result<Self, Error> {
        let endpoints = hosts::endpoints(reference.host(), config)?;
        Ok(Self::at(endpoints, reference, name, given_size, Access::Pull))
    }

    /// An object to be made or changed, which only the origin does: mirrors hold copies.
    pub(crate) fn origin(
        reference: &Reference,
        name: Name,
        access: Access,
        config: &Config,
    ) -> Result<Self, Error> {
        let origin = hosts::endpoints(reference.host(), config)?.pop();
        Ok(Self::at(origin.into_iter().collect(), reference, name, None, access))
    }

    fn at(
        endpoints: Vec<Endpoint>,
        reference: &Reference,
        name: Name,
        given_size: Option<u64>,
        access: Access,
    ) -> Self {
        let routes = Mutex::new(endpoints.iter().map(|_| Route::default()).collect());
        Self {
            origin: reference.host().to_owned(),
            repository: reference.repository().to_owned(),
            access,
            name,
            endpoints,
            routes,
            given_size,
            learnt_size: Mutex::default(),
        }
    }

    pub(crate) fn name(&self) -> &Name {
        &self.name
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

    /// The URL at a host of an object in this repository. Repository and name were validated: neither leaves
    /// its place.
    pub(crate) fn url(&self, endpoint: &Endpoint, name: &Name) -> SignedUrl {
        let mut url: Url = endpoint.base.clone();
        let (kind, name) = match name {
            Name::Blob(digest) => ("blobs", digest.as_str()),
            Name::Manifest(name) => ("manifests", name.as_str()),
            Name::Upload => ("blobs", "uploads/"),
        };
        url.set_path(&format!("/v2/{}/{kind}/{name}", self.repository));
        if let Some(namespace) = &endpoint.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        SignedUrl::new(url)
    }

    /// Where the last redirect of this host led, if that is fresh.
    pub(crate) fn kept(&self, index: usize, now: Instant) -> Option<SignedUrl> {
        self.routes.lock()[index].kept.as_ref().filter(|(_, until)| *until > now).map(|(url, _)| url.clone())
    }

    /// Remembers where this host's redirect led, or that there was none.
    pub(crate) fn keep(&self, index: usize, route: Option<(SignedUrl, Instant)>) {
        self.routes.lock()[index].kept = route;
    }

    /// Whether this host refused the object lately.
    pub(crate) fn declined(&self, index: usize, now: Instant) -> bool {
        self.routes.lock()[index].declined_until.is_some_and(|until| until > now)
    }

    /// Remembers that this host refused the object.
    pub(crate) fn decline(&self, index: usize, until: Instant) {
        self.routes.lock()[index].declined_until = Some(until);
    }

    /// Remembers the size an answer told, if it is the first.
    pub(crate) fn learn_size(&self, size: u64) {
        self.learnt_size.lock().get_or_insert(size);
    }

    /// Its name in errors and logs, with the bytes of it in question.
    pub(crate) fn what(&self, part: Option<&Range<u64>>) -> String {
        match part {
            Some(range) => format!("{self} bytes {}..{}", range.start, range.end),
            None => self.to_string(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}/{}", self.name, self.origin, self.repository)
    }
}
