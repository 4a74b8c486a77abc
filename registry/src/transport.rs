//! The process's HTTP clients, one for each way TLS is spoken: TLS, proxies, time limits, and errors without URLs.
//!
//! Redirects are not followed here and no cookies are kept; whoever sends a request decides what it carries.
//! Every await is under the caller's limit.

use crate::Error;
use crate::config::Config;
use crate::counters::Counters;
use crate::hosts::Endpoint;
use crate::retry::{self, Cause};
use crate::secret::SignedUrl;
use crate::tls::{self, Authorities, TlsSettings};
use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, NoProxy, Proxy, RequestBuilder, Response};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, timeout_at};
use url::{Host, Url};

/// Clients beside the usual one that are kept for hosts to come. Each holds connections; a node has a few registries.
const MAX_CLIENTS: usize = 16;

/// The clients and their counters. Clones share connection pools.
#[derive(Clone)]
pub(crate) struct Transport {
    pool: Arc<Pool>,
    pub(crate) counters: Arc<Counters>,
}

/// The clients of one endpoint.
#[derive(Default)]
pub(crate) struct Clients {
    own: OnceLock<Client>,
    /// For where it points to.
    elsewhere: OnceLock<Client>,
}

struct Pool {
    maker: Maker,
    /// For hosts without settings of their own. Made when first needed: whoever starts has readers that wait, and the system's
    /// authorities are read for it.
    usual: OnceLock<Client>,
    others: Mutex<Vec<(Way, Client)>>,
}

/// What makes clients different.
#[derive(PartialEq)]
struct Way {
    tls: Option<Arc<TlsSettings>>,
    dial_timeout: Duration,
    reach: Reach,
}

/// Where a client connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Anywhere,
    /// Not to this machine nor its link, whatever names say.
    Elsewhere,
}

struct Maker {
    allow_local: bool,
    system: LazyLock<Authorities>,
    headers: HeaderMap,
    user_agent: HeaderValue,
    connect_timeout: Duration,
}

impl Maker {
    fn make(&self, way: &Way) -> Result<Client, Error> {
        let bad = |key: &str, why: String| Error::Config { key: key.to_owned(), why };
        let plain = TlsSettings::default();
        let tls = tls::client_config(&self.system, way.tls.as_deref().unwrap_or(&plain))?;
        let mut builder = Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .default_headers(self.headers.clone())
            .connect_timeout(way.dial_timeout)
            .user_agent(self.user_agent.clone());
        let proxies = proxies().map_err(bad_proxies)?;
        // Behind a proxy it is the proxy that resolves names, and its own may well be of this machine.
        if way.reach == Reach::Elsewhere && proxies.is_empty() {
            builder = builder.dns_resolver(Arc::new(NotLocal));
        }
        for proxy in proxies {
            builder = builder.proxy(proxy);
        }
        builder.build().map_err(|e| bad("http client", describe(e)))
    }
}

impl Transport {
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        let mut headers = HeaderMap::new();
        // Ranges count bytes as stored: a coding applied on the way would change what they mean.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let user_agent = HeaderValue::from_str(&config.user_agent).map_err(|_| Error::Config {
            key: "user_agent".to_owned(),
            why: "has characters a header must not have".to_owned(),
        })?;
        let connect_timeout = config.connect_timeout;
        let allow_local = config.allow_local_redirects;
        // What is wrong with these is said at once.
        proxies().map_err(bad_proxies)?;
        let maker =
            Maker { allow_local, system: LazyLock::new(tls::system), headers, user_agent, connect_timeout };
        let pool = Pool { maker, usual: OnceLock::new(), others: Mutex::default() };
        Ok(Self { pool: Arc::new(pool), counters: Arc::default() })
    }

    /// The client for a request to `url` on behalf of `endpoint`: with all the host's settings for the host itself, and
    /// trusting whom it trusts elsewhere. A host elsewhere does not point to this machine.
    pub(crate) fn client(&self, endpoint: &Endpoint, url: &SignedUrl) -> Result<Client, Cause> {
        let own = url.same_host(&endpoint.base);
        let reach = match own || self.pool.maker.allow_local || is_local(&endpoint.base) {
            true => Reach::Anywhere,
            false => Reach::Elsewhere,
        };
        if reach == Reach::Elsewhere && is_local(url.expose()) {
            return Err(Cause::Nonsense(format!(
                "{} points to {url}, an address of this machine or its link (resolver.allow_local_redirects allows that)",
                endpoint.tag
            )));
        }
        let slot = if own { &endpoint.clients.own } else { &endpoint.clients.elsewhere };
        if let Some(client) = slot.get() {
            return Ok(client.clone());
        }
        let way = match (own, &endpoint.tls) {
            (true, tls) => Way { tls: tls.clone(), dial_timeout: endpoint.dial_timeout, reach },
            (false, tls) => Way {
                tls: tls.as_ref().and_then(|tls| tls.elsewhere()),
                dial_timeout: self.pool.maker.connect_timeout,
                reach,
            },
        };
        let client = self.way(way).map_err(|error| Cause::Nonsense(error.to_string()))?;
        Ok(slot.get_or_init(|| client).clone())
    }

    /// The client for a server that is no registry, and says itself whom to trust.
    pub(crate) fn trusted(&self, tls: Arc<TlsSettings>) -> Result<Client, Error> {
        let dial_timeout = self.pool.maker.connect_timeout;
        self.way(Way { tls: Some(tls), dial_timeout, reach: Reach::Anywhere })
    }

    fn way(&self, way: Way) -> Result<Client, Error> {
        let usual = way.dial_timeout == self.pool.maker.connect_timeout && way.reach == Reach::Anywhere;
        if way.tls.is_none() && usual {
            if let Some(client) = self.pool.usual.get() {
                return Ok(client.clone());
            }
            let client = self.pool.maker.make(&way)?;
            return Ok(self.pool.usual.get_or_init(|| client).clone());
        }
        let mut others = self.pool.others.lock();
        if let Some((_, client)) = others.iter().find(|(known, _)| *known == way) {
            return Ok(client.clone());
        }
        let client = self.pool.maker.make(&way)?;
        if others.len() == MAX_CLIENTS {
            // Whoever uses the oldest keeps it.
            others.remove(0);
        }
        others.push((way, client.clone()));
        Ok(client)
    }

    /// Sends and waits for the head of the answer: at most `patience`, connecting included, and not beyond
    /// `deadline`.
    pub(crate) async fn send(
        &self,
        request: RequestBuilder,
        patience: Duration,
        deadline: Instant,
    ) -> Result<Response, Cause> {
        self.counters.request();
        let started = Instant::now();
        let limit = deadline.min(started + patience);
        match timeout_at(limit, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if error.is_timeout() => Err(Cause::Silent(describe(error))),
            Ok(Err(error)) => Err(Cause::down(describe(error))),
            Err(_) => Err(Cause::Silent(format!("no answer within {:.1?}", started.elapsed()))),
        }
    }

    /// The next piece of a body, `None` at its end.
    pub(crate) async fn piece(
        &self,
        response: &mut Response,
        idle: Duration,
        deadline: Instant,
    ) -> Result<Option<Bytes>, Cause> {
        let started = Instant::now();
        match timeout_at(deadline.min(started + idle), response.chunk()).await {
            Ok(Ok(piece)) => {
                self.counters.received(piece.as_ref().map_or(0, Bytes::len));
                Ok(piece)
            }
            Ok(Err(error)) => Err(Cause::down(describe(error))),
            Err(_) => Err(Cause::Silent(format!("the body stood still for {:.1?}", started.elapsed()))),
        }
    }
}

fn bad_proxies(error: reqwest::Error) -> Error {
    Error::Config { key: "proxy environment variables".to_owned(), why: describe(error) }
}

/// Whether a URL names this machine or its link, where a node's own services are: kubelet, the metadata service.
fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => is_local_address(address.into()),
        Some(Host::Ipv6(address)) => is_local_address(address.into()),
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            name == "localhost" || name.ends_with(".localhost")
        }
        None => false,
    }
}

fn is_local_address(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let on_link = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    on_link || address.is_loopback() || address.is_unspecified()
}

/// Resolves names as usual, but not to this machine or its link.
#[derive(Debug)]
struct NotLocal;

impl Resolve for NotLocal {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let elsewhere: Vec<SocketAddr> = found.filter(|found| !is_local_address(found.ip())).collect();
            if elsewhere.is_empty() {
                return Err(format!("{} is this machine or on its link", name.as_str()).into());
            }
            Ok(Box::new(elsewhere.into_iter()) as Addrs)
        })
    }
}

/// The failure of an answer that says to come back later.
pub(crate) fn later(response: &Response) -> Cause {
    let hold = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let hold = hold.and_then(|value| retry::retry_after(value, SystemTime::now()));
    let asked = hold.map(|hold| format!(", Retry-After {} s", hold.as_secs())).unwrap_or_default();
    Cause::Down { why: format!("answered {}{asked}", response.status()), hold }
}

/// A reqwest error and its causes on one line, without the URL, which may be signed.
pub(crate) fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    // The second is said of a certificate that signed itself.
    if ["UnknownIssuer", "CaUsedAsEndEntity"].iter().any(|said| text.contains(said)) {
        text += " (neither the system nor the settings of this host know the authority that signed it)";
    }
    text
}

/// The proxies of the environment, except for loopback hosts: a registry or mirror on this node is never
/// meant to be reached from a proxy elsewhere.
fn proxies() -> reqwest::Result<Vec<Proxy>> {
    let variable = |names: [&str; 2]| {
        names.into_iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    };
    let exempt = variable(["NO_PROXY", "no_proxy"]).unwrap_or_default();
    let exempt = NoProxy::from_string(&format!("{exempt},localhost,127.0.0.0/8,::1"));
    let mut proxies = Vec::new();
    if let Some(url) = variable(["HTTPS_PROXY", "https_proxy"]) {
        proxies.push(Proxy::https(url)?);
    }
    if let Some(url) = variable(["HTTP_PROXY", "http_proxy"]) {
        proxies.push(Proxy::http(url)?);
    }
    if let Some(url) = variable(["ALL_PROXY", "all_proxy"]) {
        proxies.push(Proxy::all(url)?);
    }
    Ok(proxies.into_iter().map(|proxy| proxy.no_proxy(exempt.clone())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_and_its_link_are_known_in_every_spelling() {
        for (url, local) in [
            ("http://127.0.0.1/", true),
            ("http://127.1.2.3:80/", true),
            ("http://2130706433/", true),
            ("http://0x7f.1/", true),
            ("http://0.0.0.0/", true),
            ("http://169.254.169.254/latest/meta-data", true),
            ("http://[::1]/", true),
            ("http://[::ffff:169.254.169.254]/", true),
            ("http://[fe80::1]/", true),
            ("http://localhost/", true),
            ("http://LOCALHOST./", true),
            ("http://a.localhost/", true),
            ("http://10.0.0.1/", false),
            ("http://192.168.1.1/", false),
            ("http://[fd00::1]/", false),
            ("http://registry.example/", false),
            ("http://localhost.example/", false),
        ] {
            assert_eq!(is_local(&Url::parse(url).unwrap()), local, "{url}");
        }
    }

    #[tokio::test]
    async fn names_lead_elsewhere_only() {
        let resolve = |name: &str| NotLocal.resolve(name.parse().unwrap());
        let error = resolve("localhost").await.map(drop).unwrap_err().to_string();
        assert!(error.contains("this machine"), "{error}");
        assert_eq!(
            resolve("192.0.2.1").await.unwrap().map(|found| found.ip().to_string()).collect::<Vec<_>>(),
            ["192.0.2.1"]
        );
    }

    #[test]
    fn hosts_elsewhere_do_not_point_here() {
        let client = |config: &Config, origin: &str, url: &str| {
            let endpoints =
                crate::hosts::endpoints(origin, config, None, crate::origin::Capability::Pull).unwrap();
            let transport = Transport::new(config).unwrap();
            transport.client(&endpoints[0], &SignedUrl::new(Url::parse(url).unwrap())).map(drop)
        };
        let usual = Config::default();
        let metadata = "http://169.254.169.254/token?secret=hunter2";
        let error = client(&usual, "registry.example", metadata).unwrap_err().to_string();
        assert!(error.contains("registry.example points to") && !error.contains("hunter2"), "{error}");
        client(&usual, "registry.example", "https://storage.example/x").unwrap();
        client(&usual, "registry.example", "https://10.0.0.1/x").unwrap();
        client(&usual, "127.0.0.1:5000", "http://127.0.0.1:9000/x").unwrap();
        client(&usual, "localhost:5000", "http://127.0.0.1:9000/x").unwrap();
        let allowed = Config { allow_local_redirects: true, ..Config::default() };
        client(&allowed, "registry.example", metadata).unwrap();
    }

    #[test]
    fn alike_hosts_share_a_client_and_few_are_kept() {
        let transport = Transport::new(&Config::default()).unwrap();
        let way =
            |seconds| Way { tls: None, dial_timeout: Duration::from_secs(seconds), reach: Reach::Anywhere };
        transport.way(way(10)).unwrap();
        assert!(transport.pool.others.lock().is_empty(), "that is the usual one");
        for _ in 0..2 {
            let tls = Some(Arc::new(TlsSettings::default()));
            transport.way(Way { tls, ..way(10) }).unwrap();
            assert_eq!(transport.pool.others.lock().len(), 1, "by what they say, not by who says it");
        }
        for seconds in 100..130 {
            transport.way(way(seconds)).unwrap();
        }
        assert_eq!(transport.pool.others.lock().len(), MAX_CLIENTS);
    }
}
