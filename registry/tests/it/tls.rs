//! TLS by host: authorities of its own, none at all, and certificates the client has to show.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::live::told;
use crate::{REPOSITORY, content, options};
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use registry::{Blob, Error, HostSettings, Registry, Root, TlsSettings, Verification};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::registry::{Action, Rule, ScriptedRegistry};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

pub type Authority = CertifiedIssuer<'static, KeyPair>;

/// A certificate and its key, PEM.
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

pub fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

pub fn signed(by: &Authority, names: &[&str]) -> Pair {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, by).unwrap();
    Pair { certificate: certificate.pem(), key: key.serialize_pem() }
}

/// As `openssl req -x509` makes them: its own authority.
pub fn self_signed(names: &[&str]) -> Pair {
    self_signed_until(names, 2100)
}

fn self_signed_until(names: &[&str], year: i32) -> Pair {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    Pair { certificate: certificate.pem(), key: key.serialize_pem() }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Takes TLS connections, and asks clients for a certificate of `clients` if there is such an authority.
fn acceptor(pair: &Pair, clients: Option<&Authority>, protocols: &[&[u8]]) -> TlsAcceptor {
    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add(authority.der().clone()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
            builder.with_client_cert_verifier(verifier.build().unwrap())
        }
    };
    let chain = vec![CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// A TLS port before `server`.
async fn front(server: &ScriptedRegistry, pair: &Pair, clients: Option<&Authority>) -> u16 {
    front_of(server.host(), pair, clients).await
}

/// A TLS port before whatever is `behind`.
pub async fn front_of(behind: String, pair: &Pair, clients: Option<&Authority>) -> u16 {
    let acceptor = acceptor(pair, clients, &[]);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, behind) = (acceptor.clone(), behind.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let Ok(mut behind) = TcpStream::connect(behind).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut behind).await;
            });
        }
    });
    port
}

fn plain() -> (ScriptedRegistry, String) {
    let server = ScriptedRegistry::start();
    let digest = server.put_blob(REPOSITORY, content(10));
    (server, digest)
}

fn trusting(pem: &str) -> TlsSettings {
    let mut tls = TlsSettings::default();
    tls.trust(pem.as_bytes()).unwrap();
    tls
}

/// The blob at the https host with these settings, through a client that knows of nothing else.
fn open(host: &str, port: u16, digest: &str, tls: Option<TlsSettings>) -> Blob {
    open_sized(host, port, digest, 10, tls)
}

fn open_sized(host: &str, port: u16, digest: &str, size: u64, tls: Option<TlsSettings>) -> Blob {
    let mut settings = HostSettings::at(&format!("https://{host}:{port}"), Root::Standard).unwrap();
    tls.into_iter().for_each(|tls| settings.set_tls(tls));
    let registry = Registry::new(told(vec![], settings).1).unwrap();
    registry.blob(&format!("r.example/{REPOSITORY}:v1").parse().unwrap(), digest, Some(size)).unwrap()
}

async fn reads(blob: &Blob) {
    assert_eq!(blob.read(0..10, &options()).await.unwrap().bytes, content(10));
}

async fn fails(blob: &Blob, why: &str) {
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable { .. }) && error.to_string().contains(why), "{error}");
}

#[tokio::test]
async fn an_authority_of_its_own_is_trusted_for_its_host_only() {
    let (server, digest) = plain();
    let authority = authority("ours");
    let port = front(&server, &signed(&authority, &["127.0.0.1"]), None).await;
    let blob = open("127.0.0.1", port, &digest, None);
    fails(&blob, "neither the system nor the settings of this host know the authority").await;
    reads(&open("127.0.0.1", port, &digest, Some(trusting(&authority.pem())))).await;
    let other = open("localhost", port, &digest, Some(trusting(&authority.pem())));
    fails(&other, "not valid for name").await;
}

#[tokio::test]
async fn a_mirror_is_asked_as_soon_as_its_authority_is_known() {
    let ((server, digest), (origin, _)) = (plain(), plain());
    let authority = authority("ours");
    let port = front(&server, &signed(&authority, &["127.0.0.1"]), None).await;
    let mirror = HostSettings::at(&format!("https://127.0.0.1:{port}"), Root::Standard).unwrap();
    let (told, settings) = told(vec![mirror.clone()], HostSettings::default());
    let registry = Registry::new(settings).unwrap();
    let reference = format!("{}/{REPOSITORY}:v1", origin.host()).parse().unwrap();
    let blob = registry.blob(&reference, &digest, Some(10)).unwrap();
    reads(&blob).await;
    assert_eq!((server.requests().len(), origin.requests().len()), (0, 1));
    let mut trusted = mirror;
    trusted.set_tls(trusting(&authority.pem()));
    told.tell(vec![trusted], HostSettings::default());
    reads(&blob).await;
    assert_eq!((server.requests().len(), origin.requests().len()), (1, 1));
}

#[tokio::test]
async fn a_loopback_origin_with_an_authority_is_spoken_to_in_tls() {
    let (server, digest) = plain();
    let authority = authority("ours");
    let port = front(&server, &signed(&authority, &["127.0.0.1"]), None).await;
    let mut settings = HostSettings::default();
    settings.set_tls(trusting(&authority.pem()));
    let registry = Registry::new(told(vec![], settings).1).unwrap();
    let reference = format!("127.0.0.1:{port}/{REPOSITORY}:v1").parse().unwrap();
    reads(&registry.blob(&reference, &digest, Some(10)).unwrap()).await;
}

#[tokio::test]
async fn a_listed_certificate_may_be_the_servers_own() {
    let (server, digest) = plain();
    let pair = self_signed(&["127.0.0.1"]);
    let port = front(&server, &pair, None).await;
    reads(&open("127.0.0.1", port, &digest, Some(trusting(&pair.certificate)))).await;
    fails(&open("localhost", port, &digest, Some(trusting(&pair.certificate))), "not valid for name").await;
    let another = self_signed(&["127.0.0.1"]);
    let ended = self_signed_until(&["127.0.0.1"], 2020);
    let ended_port = front(&server, &ended, None).await;
    fails(&open("127.0.0.1", ended_port, &digest, Some(trusting(&ended.certificate))), "xpired").await;
    let why = "neither the system nor the settings of this host know";
    fails(&open("127.0.0.1", port, &digest, Some(trusting(&another.certificate))), why).await;
    fails(&open("127.0.0.1", port, &digest, None), why).await;
}

#[tokio::test]
async fn nothing_is_verified_where_that_is_said_and_elsewhere_all_is() {
    let skipped = || {
        let mut tls = TlsSettings::default();
        tls.set_verification(Verification::Skipped);
        tls
    };
    let (server, digest) = plain();
    let authority = authority("ours");
    let port = front(&server, &self_signed(&["other.example"]), None).await;
    reads(&open("127.0.0.1", port, &digest, Some(skipped()))).await;

    let (storage, _) = plain();
    let storage_port = front(&storage, &signed(&authority, &["localhost"]), None).await;
    let to = format!("https://localhost:{storage_port}");
    server.fault(Rule::new(Action::Redirect { to, expires_after: None }));
    fails(&open("127.0.0.1", port, &digest, Some(skipped())), "UnknownIssuer").await;
    assert!(storage.requests().is_empty());
    let mut tls = skipped();
    tls.trust(authority.pem().as_bytes()).unwrap();
    reads(&open("127.0.0.1", port, &digest, Some(tls))).await;
}

#[tokio::test]
async fn the_certificate_a_server_asks_for_is_shown() {
    let (server, digest) = plain();
    let (ours, users, others) = (authority("ours"), authority("users"), authority("others"));
    let port = front(&server, &signed(&ours, &["127.0.0.1"]), Some(&users)).await;
    fails(&open("127.0.0.1", port, &digest, Some(trusting(&ours.pem()))), "CertificateRequired").await;
    let mut tls = trusting(&ours.pem());
    let wrong = signed(&others, &["me"]);
    tls.identify(wrong.certificate.as_bytes(), wrong.key.as_bytes()).unwrap();
    let right = signed(&users, &["me"]);
    let both = format!("{}{}", right.certificate, right.key);
    tls.identify(both.as_bytes(), both.as_bytes()).unwrap();
    reads(&open("127.0.0.1", port, &digest, Some(tls))).await;
}

#[test]
fn what_is_no_certificate_or_key_is_refused_without_being_repeated() {
    let (one, other) = (self_signed(&["a"]), self_signed(&["b"]));
    let mut tls = TlsSettings::default();
    let damaged = "-----BEGIN CERTIFICATE-----\nhunter2==\n-----END CERTIFICATE-----\n";
    for pem in ["", "hunter2", &one.key, damaged] {
        let error = tls.trust(pem.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("ca") && !error.contains("hunter2"), "{error}");
    }
    for (certificate, key) in [(&one.certificate, &other.key), (&one.certificate, &one.certificate)] {
        tls.identify(certificate.as_bytes(), key.as_bytes()).unwrap_err();
    }
    assert_eq!(tls, TlsSettings::default());
    tls.identify(one.certificate.as_bytes(), one.key.as_bytes()).unwrap();
    assert!(format!("{tls:?}").contains("identities: 1"), "{tls:?}");
}

/// Answers ranges of `data` over HTTP/2 and tells each connection with its `farewell`th request to go away; what it sends on
/// that connection it sends to the end.
async fn leaving(pair: &Pair, data: Bytes, farewell: usize) -> (u16, Arc<AtomicUsize>) {
    let acceptor = acceptor(pair, None, &[b"h2"]);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let (port, connections) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let accepted = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, data, accepted) = (acceptor.clone(), data.clone(), accepted.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                accepted.fetch_add(1, Ordering::Relaxed);
                let (asked, leave) = (AtomicUsize::new(0), Arc::new(Notify::new()));
                let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
                    if asked.fetch_add(1, Ordering::Relaxed) + 1 == farewell {
                        leave.notify_one();
                    }
                    let range = request.headers()["range"].to_str().unwrap()["bytes=".len()..].to_owned();
                    let (first, last) = range.split_once('-').unwrap();
                    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
                    let body = Full::new(data.slice(first..=last));
                    let answer = hyper::Response::builder()
                        .status(206)
                        .header("content-range", format!("bytes {first}-{last}/{}", data.len()));
                    async move { answer.body(body) }
                });
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let connection = builder.serve_connection(TokioIo::new(stream), service);
                tokio::pin!(connection);
                tokio::select! {
                    _ = &mut connection => return,
                    () = leave.notified() => connection.as_mut().graceful_shutdown(),
                }
                let _ = connection.await;
            });
        }
    });
    (port, connections)
}

#[tokio::test]
async fn requests_on_a_connection_that_says_goodbye_are_made_on_the_next() {
    let pair = self_signed(&["localhost"]);
    let data = Bytes::from(content(400_000));
    let (port, connections) = leaving(&pair, data.clone(), 5).await;
    let digest = support::sha256_digest(&data);
    let blob = open_sized("localhost", port, &digest, data.len() as u64, Some(trusting(&pair.certificate)));
    let reads = (0..100).map(|n| {
        let (blob, data) = (blob.clone(), data.clone());
        async move {
            let range = n * 4000..(n + 1) * 4000;
            let served = blob.read(range.clone(), &options()).await.unwrap();
            assert_eq!(served.bytes, data[range.start as usize..range.end as usize]);
        }
    });
    futures::stream::iter(reads).buffer_unordered(8).collect::<Vec<()>>().await;
    let connections = connections.load(Ordering::Relaxed);
    assert!((5..=100).contains(&connections), "{connections} connections for 100 requests");
}
