//! One object of a registry: its name, the hosts it may be had from, and what is remembered of it at each.

use crate::auth::Access;
use crate::config::Config;
use crate::digest::Digest;
use crate::hosts::{self, Endpoint, HostTag};
use crate::origin::{Capability, OriginHosts};
use crate::secret::SignedUrl;
use crate::{Error, Reference};
use parking_lot::Mutex;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

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
    /// What the endpoints were made from, as far as it may change.
    hosts: Option<Arc<OriginHosts>>,
    pub(crate) endpoints: Vec<Endpoint>,
    /// What the repository is called at each.
    repositories: Vec<String>,
    /// One per endpoint.
    routes: Mutex<Vec<Route>>,
    /// The size in bytes the caller gave.
    given_size: Option<u64>,
    /// The size an answer told. Dropped with the routes: a host that serves wrong bytes may lie here too.
    learnt_size: Mutex<Option<u64>>,
}

/// What is remembered of the object at one host.
#[derive(Clone, Default)]
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
        Self::at(reference, name, given_size, Access::Pull, config)
    }

    /// An object to be made or changed, which only the origin does: mirrors hold copies.
    pub(crate) fn origin(
        reference: &Reference,
        name: Name,
        access: Access,
        config: &Config,
    ) -> Result<Self, Error> {
        Self::at(reference, name, None, access, config)
    }

    fn at(
        reference: &Reference,
        name: Name,
        given_size: Option<u64>,
        access: Access,
        config: &Config,
    ) -> Result<Self, Error> {
        let hosts = config.hosts_now(reference.host());
        let endpoints = hosts::endpoints(reference.host(), config, hosts.as_deref(), wanted(&name, &access))?;
        let routes = Mutex::new(endpoints.iter().map(|_| Route::default()).collect());
        let repositories = repositories(&endpoints, reference.repository());
        Ok(Self {
            origin: reference.host().to_owned(),
            repository: reference.repository().to_owned(),
            access,
            name,
            hosts,
            endpoints,
            repositories,
            routes,
            given_size,
            learnt_size: Mutex::default(),
        })
    }

    /// What is known of its hosts now, if that is not what it goes by.
    fn news(&self, config: &Config) -> Option<Arc<OriginHosts>> {
        let known =
            |hosts: &Arc<OriginHosts>| self.hosts.as_ref().is_some_and(|known| Arc::ptr_eq(hosts, known));
        config.hosts_now(&self.origin).filter(|hosts| !known(hosts))
    }

    /// Whether something else is known of its hosts by now.
    pub(crate) fn is_outdated(&self, config: &Config) -> bool {
        self.news(config).is_some()
    }

    /// The hosts that `before` did not know, or was to ask in another way.
    pub(crate) fn new_hosts<'a>(&'a self, before: &'a Source) -> impl Iterator<Item = &'a HostTag> {
        let new = self.endpoints.iter().filter(|endpoint| !before.endpoints.contains(endpoint));
        new.map(|endpoint| &endpoint.tag)
    }

    /// The same object by what is known of its hosts now, if that has changed. What was learnt at hosts that stay
    /// is kept.
    pub(crate) fn renewed(&self, config: &Config) -> Result<Option<Self>, Error> {
        let Some(hosts) = self.news(config) else { return Ok(None) };
        let wanted = wanted(&self.name, &self.access);
        let mut endpoints = hosts::endpoints(&self.origin, config, Some(&hosts), wanted)?;
        let known = self.routes.lock();
        let routes = endpoints.iter_mut().map(|endpoint| {
            let stays = self.endpoints.iter().zip(&*known).find(|(before, _)| *before == endpoint);
            stays.map_or_else(Route::default, |(before, route)| {
                *endpoint = before.clone();
                route.clone()
            })
        });
        let routes = Mutex::new(routes.collect());
        Ok(Some(Self {
            origin: self.origin.clone(),
            repository: self.repository.clone(),
            access: self.access.clone(),
            name: self.name.clone(),
            hosts: Some(hosts),
            repositories: repositories(&endpoints, &self.repository),
            endpoints,
            routes,
            given_size: self.given_size,
            learnt_size: Mutex::new(*self.learnt_size.lock()),
        }))
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
    pub(crate) fn url(&self, index: usize, name: &Name) -> SignedUrl {
        let (kind, name) = match name {
            Name::Blob(digest) => ("blobs", digest.as_str()),
            Name::Manifest(name) => ("manifests", name.as_str()),
            Name::Upload => ("blobs", "uploads/"),
        };
        let repository = self.repository_at(index);
        SignedUrl::new(self.endpoints[index].url(format_args!("{repository}/{kind}/{name}")))
    }

    /// What the repository is called at a host.
    pub(crate) fn repository_at(&self, index: usize) -> &str {
        &self.repositories[index]
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

fn repositories(endpoints: &[Endpoint], repository: &str) -> Vec<String> {
    endpoints.iter().map(|endpoint| endpoint.rewrites.apply(repository)).collect()
}

/// What a host must be capable of to be asked.
fn wanted(name: &Name, access: &Access) -> Capability {
    match (access, name) {
        (Access::Push | Access::Mount { .. }, _) => Capability::Push,
        // A digest has a colon, a tag has none.
        (Access::Pull, Name::Manifest(name)) if !name.contains(':') => Capability::Resolve,
        (Access::Pull, _) => Capability::Pull,
    }
}
