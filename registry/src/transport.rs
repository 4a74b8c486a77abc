//! The process's one HTTP client: TLS, proxies, time limits, and errors without URLs.
//!
//! Redirects are not followed here and no cookies are kept; whoever sends a request decides what it carries.
//! Every await is under the caller's limit.

use crate::Error;
use crate::config::Config;
use crate::counters::Counters;
use crate::retry::{self, Cause};
use bytes::Bytes;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, NoProxy, Proxy, RequestBuilder, Response};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, timeout_at};

/// The client and its counters. Clones share one connection pool.
#[derive(Clone)]
pub(crate) struct Transport {
    client: Client,
    connect_timeout: Duration,
    pub(crate) counters: Arc<Counters>,
}

impl Transport {
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        let bad = |key: &str, why: String| Error::Config { key: key.to_owned(), why };
        let mut headers = HeaderMap::new();
        // Ranges count bytes as stored: a coding applied on the way would change what they mean.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let mut builder = Client::builder()
            .tls_backend_preconfigured(tls()?)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .default_headers(headers)
            .connect_timeout(config.connect_timeout)
            .user_agent(
                HeaderValue::from_str(&config.user_agent)
                    .map_err(|_| bad("user_agent", "has characters a header must not have".into()))?,
            );
        for proxy in proxies().map_err(|e| bad("proxy environment variables", describe(e)))? {
            builder = builder.proxy(proxy);
        }
        let client = builder.build().map_err(|e| bad("http client", describe(e)))?;
        Ok(Self { client, connect_timeout: config.connect_timeout, counters: Arc::default() })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Sends and waits for the head of the answer: at most the connect timeout plus `first_byte`, and not
    /// beyond `deadline`.
    pub(crate) async fn send(
        &self,
        request: RequestBuilder,
        first_byte: Duration,
        deadline: Instant,
    ) -> Result<Response, Cause> {
        self.counters.request();
        let started = Instant::now();
        let limit = deadline.min(started + self.connect_timeout + first_byte);
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

/// The failure of an answer that says to come back later.
pub(crate) fn later(response: &Response) -> Cause {
    let hold = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let hold = hold.and_then(|value| retry::retry_after(value, SystemTime::now()));
    let asked = hold.map(|hold| format!(", Retry-After {} s", hold.as_secs())).unwrap_or_default();
    Cause::Down { why: format!("answered {}{asked}", response.status()), hold }
}

/// A reqwest error and its causes on one line, without the URL, which may be signed.
fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// TLS with the system's certificates. A system without any is no error: plain http hosts still work.
fn tls() -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a CA certificate could not be loaded");
    }
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        tracing::warn!("no CA certificates found: https registries will be refused (set SSL_CERT_FILE)");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Config { key: "tls".into(), why: e.to_string() })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
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
