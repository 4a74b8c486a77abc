//! The hosts an object may be had from, and how each of them has been doing lately.
//!
//! [`endpoints`] turns an origin's settings into an ordered list: mirrors that are set for good, hosts that may change
//! ([`OriginHosts`]), the server last. A [`HostBook`] remembers for the whole process which hosts failed (benched: tried after the others until a
//! probe is due), asked to be left alone (held, `Retry-After`) or ignored a range. [`order`] is the pure
//! decision made from that. Nothing here is lasting: every mark runs out.

use crate::Error;
use crate::config::{Config, HostConfig};
use crate::origin::{Capability, HostSettings, OriginHosts, Rewrites, add_header};
use crate::reference::check_host;
use crate::retry;
use crate::tls::TlsSettings;
use crate::transport::Clients;
use parking_lot::Mutex;
use reqwest::header::HeaderMap;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use url::Url;

/// First bench of a failing host. Long against a read, short against a repair.
const BENCH_MIN: Duration = Duration::from_secs(5);
/// A dead host is probed at least this often.
const BENCH_MAX: Duration = Duration::from_secs(120);
/// A `Retry-After` is honoured up to here: a host's mistake must not silence it for a day.
const HOLD_MAX: Duration = Duration::from_secs(300);
/// How long a host that ignored a range is asked after the others. A pull-through cache does so only until it holds the
/// blob, and has others that it holds.
const WHOLE_ONLY_FOR: Duration = Duration::from_secs(60);

/// Names a host that served bytes: `host` or `host:port`, without credentials or query.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HostTag(Arc<str>);

impl HostTag {
    /// The host's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One host to ask, and how.
#[derive(Clone)]
pub(crate) struct Endpoint {
    pub(crate) tag: HostTag,
    /// The API's root.
    pub(crate) base: Url,
    /// Sent to this host only; values are marked sensitive.
    pub(crate) headers: HeaderMap,
    /// The origin's name, for a host that is another (`?ns=`).
    pub(crate) namespace: Option<String>,
    pub(crate) dial_timeout: Duration,
    pub(crate) first_byte_timeout: Duration,
    /// The name credentials are kept under: the host's, or the origin's as references write it.
    pub(crate) login: String,
    pub(crate) tls: Option<Arc<TlsSettings>>,
    /// What it calls repositories.
    pub(crate) rewrites: Rewrites,
    /// Built when first needed.
    pub(crate) clients: Arc<Clients>,
}

impl PartialEq for Endpoint {
    /// Whether the same is asked in the same way: what was learnt with one holds for the other.
    fn eq(&self, other: &Self) -> bool {
        self.tag == other.tag
            && self.base == other.base
            && self.headers == other.headers
            && self.namespace == other.namespace
            && self.dial_timeout == other.dial_timeout
            && self.first_byte_timeout == other.first_byte_timeout
            && self.login == other.login
            && self.tls == other.tls
            && self.rewrites == other.rewrites
    }
}

impl Endpoint {
    /// The time from sending a request to the head of the answer.
    pub(crate) fn patience(&self) -> Duration {
        self.dial_timeout + self.first_byte_timeout
    }

    /// The URL of something under the API's root.
    pub(crate) fn url(&self, rest: fmt::Arguments<'_>) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}/{rest}", self.base.path().trim_end_matches('/')));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }
}

/// The hosts to ask `origin`'s objects for: mirrors in order, then what `now` says, the server last. Hosts that may not
/// be asked for what is `wanted` are left out.
pub(crate) fn endpoints(
    origin: &str,
    config: &Config,
    now: Option<&OriginHosts>,
    wanted: Capability,
) -> Result<Vec<Endpoint>, Error> {
    let default = (HostConfig::default(), OriginHosts::default());
    let fixed = config.hosts.get(origin).unwrap_or(&default.0);
    let now = now.unwrap_or(&default.1);
    let mut endpoints = Vec::with_capacity(fixed.mirrors.len() + now.hosts.len() + 1);
    // Only what may be written to is asked to change.
    if wanted != Capability::Push {
        for mirror in &fixed.mirrors {
            let key = format!("hosts.{origin:?}.mirrors {:?}", mirror.host);
            let mut headers = HeaderMap::new();
            for (name, value) in &mirror.headers {
                let bad = |why| Error::Config { key: key.clone(), why: format!("header {name:?}: {why}") };
                add_header(&mut headers, name, value).map_err(bad)?;
            }
            let scheme = Scheme::of(&mirror.host, mirror.insecure);
            let (tag, base) = named(&mirror.host, scheme, &key)?;
            endpoints.push(Endpoint {
                headers,
                first_byte_timeout: mirror.request_timeout.unwrap_or(config.first_byte_timeout),
                ..endpoint(origin, tag, base, config)
            });
        }
        for host in now.hosts.iter().filter(|host| host.can(wanted)) {
            // Every one of them has a URL; the origin itself is the server's place.
            if let Some(base) = &host.base {
                endpoints.push(set(endpoint(origin, tag_of(base), base.clone(), config), host));
            }
        }
    }
    if now.server.can(wanted) {
        let (tag, base) = match &now.server.base {
            Some(base) => {
                let mut base = base.clone();
                if fixed.insecure && is_itself(origin, &base) {
                    // From one of the two to the other it always may be changed.
                    let _ = base.set_scheme("http");
                }
                (tag_of(&base), base)
            }
            None => {
                let host = address(origin);
                let scheme = match &now.server.tls {
                    // Whoever gives a certificate for it means https, on loopback too.
                    Some(_) if !fixed.insecure => Scheme::Https,
                    _ => Scheme::of(host, fixed.insecure),
                };
                named(host, scheme, &format!("hosts.{origin:?}"))?
            }
        };
        endpoints.push(set(endpoint(origin, tag, base, config), &now.server));
    }
    if endpoints.is_empty() {
        let why = format!("none of its hosts has the capability {:?}", wanted.as_str());
        return Err(Error::Config { key: format!("hosts of {origin}"), why });
    }
    Ok(endpoints)
}

/// References say docker.io; the registry of that name answers elsewhere.
fn address(origin: &str) -> &str {
    if origin == "docker.io" { "registry-1.docker.io" } else { origin }
}

#[derive(Debug, Clone, Copy)]
enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn of(host: &str, insecure: bool) -> Self {
        if insecure || is_loopback(host) { Self::Http } else { Self::Https }
    }
}

fn named(host: &str, scheme: Scheme, key: &str) -> Result<(HostTag, Url), Error> {
    let bad = |why: &str| Error::Config { key: key.to_owned(), why: why.to_owned() };
    check_host(host).map_err(|why| bad(&format!("{why} (write host or host:port alone)")))?;
    let scheme = match scheme {
        Scheme::Http => "http",
        Scheme::Https => "https",
    };
    let base = Url::parse(&format!("{scheme}://{host}/v2")).map_err(|e| bad(&format!("not a host: {e}")))?;
    Ok((HostTag(host.into()), base))
}

fn tag_of(base: &Url) -> HostTag {
    let host = base.host_str().unwrap_or("?");
    HostTag(base.port().map_or_else(|| host.into(), |port| format!("{host}:{port}").into()))
}

/// A host asked for the objects of `origin`, with the usual settings. A host that is not the origin is told for whom it
/// is asked and has a login of its own.
fn endpoint(origin: &str, tag: HostTag, base: Url, config: &Config) -> Endpoint {
    let itself = is_itself(origin, &base);
    Endpoint {
        headers: HeaderMap::new(),
        namespace: (!itself).then(|| origin.to_owned()),
        dial_timeout: config.connect_timeout,
        first_byte_timeout: config.first_byte_timeout,
        login: if itself { origin.to_owned() } else { tag.to_string() },
        tls: None,
        rewrites: Rewrites::default(),
        clients: Arc::default(),
        tag,
        base,
    }
}

/// Whether the host at `base` is the one that references to `origin` mean.
fn is_itself(origin: &str, base: &Url) -> bool {
    [origin, address(origin)].iter().any(|name| {
        Url::parse(&format!("{}://{name}", base.scheme())).is_ok_and(|url| {
            url.host() == base.host() && url.port_or_known_default() == base.port_or_known_default()
        })
    })
}

fn set(endpoint: Endpoint, settings: &HostSettings) -> Endpoint {
    Endpoint {
        headers: settings.headers.clone(),
        dial_timeout: settings.dial_timeout.unwrap_or(endpoint.dial_timeout),
        tls: settings.tls.clone(),
        rewrites: settings.rewrites.clone(),
        ..endpoint
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// What counts against asking a host first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Its bytes for this read failed verification.
    pub(crate) avoided: bool,
    /// It failed lately and its next probe is not due.
    pub(crate) benched: bool,
    /// It refused this very object lately (missing, denied, nonsense).
    pub(crate) declined: bool,
    /// It answered a range with a whole blob lately.
    pub(crate) whole_only: bool,
}

/// The order to ask in: the configured one, except that hosts with marks go behind those without. The
/// gravest mark counts first; an answer that is surely no (declined) is cheaper than one that may never
/// come (benched).
pub(crate) fn order(standings: &[Standing]) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..standings.len()).collect();
    indices.sort_by_key(|&i| {
        let Standing { avoided, benched, declined, whole_only } = standings[i];
        (avoided, benched, declined, whole_only)
    });
    indices
}

/// The state of one host, shared by all its objects.
#[derive(Debug, Clone, Copy, Default)]
struct Health {
    failures: u32,
    benched_until: Option<Instant>,
    held_until: Option<Instant>,
    whole_only_until: Option<Instant>,
}

/// How all hosts of the process have been doing.
#[derive(Debug, Default)]
pub(crate) struct HostBook(Mutex<HashMap<HostTag, Health>>);

impl HostBook {
    /// What counts against `host` at `now`, the object aside.
    pub(crate) fn standing(&self, host: &HostTag, now: Instant) -> Standing {
        let health = self.0.lock().get(host).copied().unwrap_or_default();
        let lasts = |until: Option<Instant>| until.is_some_and(|until| until > now);
        Standing {
            benched: lasts(health.benched_until),
            whole_only: lasts(health.whole_only_until),
            ..Standing::default()
        }
    }

    /// How much longer the host wants no requests.
    pub(crate) fn hold(&self, host: &HostTag, now: Instant) -> Option<Duration> {
        let until = self.0.lock().get(host)?.held_until?;
        until.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// Before asking: a host whose probe is due is benched again at once, so that one read probes it and
    /// the others do not wait for the outcome.
    pub(crate) fn asking(&self, host: &HostTag, now: Instant) {
        let mut book = self.0.lock();
        if let Some(health) = book.get_mut(host).filter(|health| health.failures > 0) {
            bench(health, now);
        }
    }

    /// Forgets failures of a host that is asked in another way from now on; what it wants itself is remembered.
    pub(crate) fn pardon(&self, host: &HostTag) {
        if let Some(health) = self.0.lock().get_mut(host) {
            (health.failures, health.benched_until) = (0, None);
        }
    }

    pub(crate) fn succeeded(&self, host: &HostTag) {
        if let Some(health) = self.0.lock().get_mut(host) {
            *health = Health { whole_only_until: health.whole_only_until, ..Health::default() };
        }
    }

    /// Benches the host; true if it was well before.
    pub(crate) fn failed(&self, host: &HostTag, hold: Option<Duration>, now: Instant) -> bool {
        let mut book = self.0.lock();
        let health = book.entry(host.clone()).or_default();
        health.failures = health.failures.saturating_add(1);
        health.held_until = hold.map(|hold| now + hold.min(HOLD_MAX));
        bench(health, now);
        health.failures == 1
    }

    pub(crate) fn ignored_range(&self, host: &HostTag, now: Instant) {
        self.0.lock().entry(host.clone()).or_default().whole_only_until = Some(now + WHOLE_ONLY_FOR);
    }
}

fn bench(health: &mut Health, now: Instant) {
    let wait = retry::backoff(health.failures.saturating_sub(1), BENCH_MIN, BENCH_MAX, rand::random());
    health.benched_until = Some(now + wait);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MirrorConfig;
    use crate::origin::Root;

    #[test]
    fn marks_move_hosts_back_and_ties_keep_the_configured_order() {
        let well = Standing::default();
        let avoided = Standing { avoided: true, ..well };
        let benched = Standing { benched: true, ..well };
        let declined = Standing { declined: true, ..well };
        let whole = Standing { whole_only: true, ..well };
        for (standings, expected) in [
            (vec![well, well, well], vec![0, 1, 2]),
            (vec![benched, well, well], vec![1, 2, 0]),
            (vec![avoided, benched, declined, whole, well], vec![4, 3, 2, 1, 0]),
            (vec![benched, benched], vec![0, 1]),
            (vec![avoided], vec![0]),
            (vec![], vec![]),
        ] {
            assert_eq!(order(&standings), expected, "{standings:?}");
        }
    }

    fn names(endpoints: &[Endpoint]) -> Vec<(&str, Option<&str>, &str)> {
        endpoints.iter().map(|e| (e.base.as_str(), e.namespace.as_deref(), e.login.as_str())).collect()
    }

    fn pulled(origin: &str, config: &Config, now: Option<&OriginHosts>) -> Result<Vec<Endpoint>, Error> {
        endpoints(origin, config, now, Capability::Pull)
    }

    #[test]
    fn mirrors_then_origin() {
        let mirror =
            |host: &str, insecure| MirrorConfig { host: host.into(), insecure, ..Default::default() };
        let mut config = Config::default();
        config.hosts.insert(
            "docker.io".into(),
            HostConfig {
                insecure: false,
                mirrors: vec![mirror("m.example", true), mirror("127.0.0.1:5", false)],
            },
        );
        config.hosts.insert("plain.example:80".into(), HostConfig { insecure: true, mirrors: vec![] });
        assert_eq!(
            names(&pulled("docker.io", &config, None).unwrap()),
            [
                ("http://m.example/v2", Some("docker.io"), "m.example"),
                ("http://127.0.0.1:5/v2", Some("docker.io"), "127.0.0.1:5"),
                ("https://registry-1.docker.io/v2", None, "docker.io"),
            ]
        );
        for (origin, base) in [
            ("plain.example:80", "http://plain.example/v2"),
            ("r.example:5000", "https://r.example:5000/v2"),
            ("localhost", "http://localhost/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.9.9.9:1", "http://127.9.9.9:1/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("[fd00::1]", "https://[fd00::1]/v2"),
            ("localhost.example", "https://localhost.example/v2"),
        ] {
            assert_eq!(pulled(origin, &config, None).unwrap()[0].base.as_str(), base, "{origin}");
        }
    }

    #[test]
    fn what_is_set_for_good_then_what_holds_now_then_the_server() {
        let at = |url: &str| HostSettings::at(url, Root::Standard).unwrap();
        let mut config = Config::default();
        let mirror = MirrorConfig { host: "m.example".into(), ..Default::default() };
        config.hosts.insert("docker.io".into(), HostConfig { insecure: false, mirrors: vec![mirror] });
        let mut resolves = at("https://resolves.example");
        resolves.set_capabilities(&[Capability::Resolve]);
        let hosts = vec![at("http://b.example/proxy"), resolves, at("https://registry-1.docker.io")];
        let mut now = OriginHosts { hosts, server: HostSettings::default() };
        let expected = [
            ("https://m.example/v2", Some("docker.io"), "m.example"),
            ("http://b.example/proxy/v2", Some("docker.io"), "b.example"),
            ("https://registry-1.docker.io/v2", None, "docker.io"),
            ("https://registry-1.docker.io/v2", None, "docker.io"),
        ];
        assert_eq!(names(&pulled("docker.io", &config, Some(&now)).unwrap()), expected);
        let resolving = endpoints("docker.io", &config, Some(&now), Capability::Resolve).unwrap();
        assert_eq!(resolving[2].base.as_str(), "https://resolves.example/v2");
        now.server = at("https://cache.example:443");
        assert_eq!(
            names(&pulled("docker.io", &config, Some(&now)).unwrap()[3..]),
            [("https://cache.example/v2", Some("docker.io"), "cache.example")]
        );
        let pushing = endpoints("docker.io", &config, Some(&now), Capability::Push).unwrap();
        assert_eq!(pushing.len(), 1, "mirrors hold copies");
        now.server.set_capabilities(&[Capability::Pull]);
        let error = endpoints("docker.io", &config, Some(&now), Capability::Push).err().unwrap();
        assert!(error.to_string().contains("push"), "{error}");
    }

    #[test]
    fn a_loopback_origin_with_a_certificate_of_its_own_is_https() {
        let mut now = OriginHosts::default();
        now.server.set_tls(TlsSettings::default());
        let base =
            |config: &Config| pulled("localhost:5000", config, Some(&now)).unwrap()[0].base.to_string();
        let mut config = Config::default();
        assert_eq!(base(&config), "https://localhost:5000/v2");
        config.hosts.insert("localhost:5000".into(), HostConfig { insecure: true, mirrors: vec![] });
        assert_eq!(base(&config), "http://localhost:5000/v2");
        now.server = HostSettings::at("https://localhost:5000", Root::Standard).unwrap();
        assert_eq!(
            pulled("localhost:5000", &config, Some(&now)).unwrap()[0].base.as_str(),
            "http://localhost:5000/v2"
        );
    }

    #[test]
    fn unusable_settings_are_named() {
        for (host, header) in [
            ("https://m.example", None),
            ("m.example/path", None),
            ("", None),
            ("m.example", Some(("bad name", "x"))),
            ("m.example", Some(("x-ok", "bad\nvalue hunter2"))),
        ] {
            let headers = header.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
            let mirror = MirrorConfig { host: host.into(), headers, ..Default::default() };
            let mut config = Config::default();
            config.hosts.insert("r.example".into(), HostConfig { insecure: false, mirrors: vec![mirror] });
            let error = pulled("r.example", &config, None).err().unwrap();
            assert!(matches!(&error, Error::Config { key, .. } if key.contains("r.example")), "{error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_failing_host_is_benched_and_probed_by_one() {
        let book = HostBook::default();
        let host = HostTag("h".into());
        let start = Instant::now();
        assert_eq!(book.standing(&host, start), Standing::default());
        assert!(book.failed(&host, None, start));
        assert!(!book.failed(&host, None, start));
        assert!(book.standing(&host, start).benched);
        let due = start + 2 * BENCH_MIN;
        assert!(!book.standing(&host, due).benched);
        book.asking(&host, due);
        assert!(book.standing(&host, due).benched, "the next read need not probe too");
        book.succeeded(&host);
        assert_eq!(book.standing(&host, due), Standing::default());
    }

    #[test]
    fn a_hold_is_bounded_and_ends() {
        let book = HostBook::default();
        let host = HostTag("h".into());
        let now = Instant::now();
        assert_eq!(book.hold(&host, now), None);
        book.failed(&host, Some(Duration::from_secs(7)), now);
        assert_eq!(book.hold(&host, now), Some(Duration::from_secs(7)));
        assert_eq!(book.hold(&host, now + Duration::from_secs(7)), None);
        book.failed(&host, Some(Duration::from_secs(86_400)), now);
        assert_eq!(book.hold(&host, now), Some(HOLD_MAX));
        book.ignored_range(&host, now);
        book.succeeded(&host);
        assert_eq!(book.hold(&host, now), None);
        assert!(book.standing(&host, now).whole_only, "success at a start of a blob does not prove ranges");
    }
}
