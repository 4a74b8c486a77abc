//! docker-registry as it is run: TLS of a private authority, clients that have to show a certificate, and a token service,
//! whose tokens are signed as it demands (the distribution project's "Token Authentication Implementation").

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::live::told;
use crate::tls::{Pair, authority, front_of, self_signed, signed};
use crate::{content, later, options};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::AUTHORIZATION;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use registry::{DockerConfig, Error, HostSettings, Registry, Root, TlsSettings, UploadOptions};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use support::guard;
use support::sha256_digest;
use support::system::DockerRegistry;
use tokio::net::TcpListener;

const ISSUER: &str = "test issuer";
const SERVICE: &str = "test registry";
const LOGIN: &str = "me:hunter2";

/// Gives tokens for what is asked to who knows [`LOGIN`].
struct TokenService {
    key: EcdsaKeyPair,
    /// The certificate that the registry trusts, in the form a token's header has it.
    certificate: String,
    given: AtomicUsize,
}

impl TokenService {
    fn new(pair: &Pair) -> TokenService {
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
        let random = SystemRandom::new();
        let key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_der(), &random).unwrap();
        let certificate = CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap();
        TokenService { key, certificate: STANDARD.encode(&certificate), given: AtomicUsize::new(0) }
    }

    fn token(&self, scopes: &[String]) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let access: Vec<Value> = scopes
            .iter()
            .map(|scope| {
                let mut parts = scope.splitn(3, ':');
                let (kind, name, actions) = (parts.next(), parts.next(), parts.next().unwrap());
                json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() })
            })
            .collect();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [self.certificate] });
        let claims = json!({
            "iss": ISSUER, "sub": "me", "aud": SERVICE, "exp": now + 300, "nbf": now - 10, "iat": now, "jti": "1",
            "access": access,
        });
        let encode = |part: Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let text = format!("{}.{}", encode(header), encode(claims));
        let signature = self.key.sign(&SystemRandom::new(), text.as_bytes()).unwrap();
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let login = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        if login != Some(&format!("Basic {}", STANDARD.encode(LOGIN))) {
            return Response::builder().status(401).body(Full::default()).unwrap();
        }
        self.given.fetch_add(1, Ordering::Relaxed);
        let query = request.uri().query().unwrap_or_default();
        let pairs = url::form_urlencoded::parse(query.as_bytes());
        let scopes: Vec<String> =
            pairs.filter(|(key, _)| key == "scope").map(|(_, scope)| scope.into_owned()).collect();
        let token = json!({ "token": self.token(&scopes), "expires_in": 300 }).to_string();
        Response::new(Full::from(token))
    }

    /// Its address, without TLS.
    async fn serve(self: Arc<Self>) -> String {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = self.clone();
                let answer = service_fn(move |request| {
                    let answer = service.answer(&request);
                    async { Ok::<_, std::convert::Infallible>(answer) }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), answer));
            }
        });
        address
    }
}

fn write(path: &Path, text: &str) -> String {
    std::fs::write(path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn docker_registry_with_a_private_authority_client_certificates_and_a_token_service() {
    if !guard::require_programs(&["docker-registry"]) {
        return;
    }
    let dir = guard::temp_dir();
    let (ours, users) = (authority("ours"), authority("users"));
    let (server, tokens) = (signed(&ours, &["localhost"]), self_signed(&["tokens"]));
    let service = Arc::new(TokenService::new(&tokens));
    let realm = front_of(service.clone().serve().await, &signed(&ours, &["localhost"]), None).await;
    let file = |name: &str, text: &str| write(&dir.path().join(name), text);
    let http = format!(
        "tls: {{certificate: {:?}, key: {:?}, clientcas: [{:?}]}}",
        file("server.crt", &server.certificate),
        file("server.key", &server.key),
        file("users.crt", &users.pem()),
    );
    let auth = format!(
        "auth: {{token: {{realm: \"https://localhost:{realm}/token\", service: {SERVICE:?}, issuer: {ISSUER:?}, \
         rootcertbundle: {:?}}}}}\n",
        file("tokens.crt", &tokens.certificate),
    );
    let running = DockerRegistry::configured(&dir.path().join("registry"), &auth, &http);
    let (_, port) = running.address().rsplit_once(':').unwrap();

    let config = dir.path().join("config.json");
    let log_in = |login: &str| {
        let auths = json!({ "auths": { format!("localhost:{port}"): { "auth": STANDARD.encode(login) } } });
        write(&config, &auths.to_string());
    };
    let client = |identity: Option<Pair>| {
        let mut tls = TlsSettings::default();
        tls.trust(ours.pem().as_bytes()).unwrap();
        if let Some(Pair { certificate, key }) = identity {
            tls.identify(certificate.as_bytes(), key.as_bytes()).unwrap();
        }
        let mut host = HostSettings::at(&format!("https://localhost:{port}"), Root::Standard).unwrap();
        host.set_tls(tls);
        let (_, settings) = told(vec![], host);
        let docker_config = DockerConfig::File(config.clone());
        Registry::new(registry::Config { docker_config, ..settings }).unwrap()
    };
    let reference = "r.example/team/app:v1".parse().unwrap();
    let data = content(100_000);
    let digest = sha256_digest(&data);

    log_in(LOGIN);
    let me = client(Some(signed(&users, &["me"])));
    me.put_blob(&reference, &digest, data.clone().into(), UploadOptions::default()).await.unwrap();
    let blob = me.blob(&reference, &digest, Some(data.len() as u64)).unwrap();
    for start in [5_u64, 50_000, 99_000] {
        let served = blob.read(start..start + 1000, &options()).await.unwrap();
        assert_eq!(served.bytes, data[start as usize..start as usize + 1000]);
    }
    assert_eq!(service.given.load(Ordering::Relaxed), 2, "one token for pushing, one for all that is pulled");

    let error = client(None).has_blob(&reference, &digest, later()).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable { .. }), "without a certificate: {error}");

    log_in("me:wrong");
    let error =
        client(Some(signed(&users, &["me"]))).has_blob(&reference, &digest, later()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, Error::AuthDenied { .. }), "{text}");
    for part in [&format!("localhost:{port}"), "team/app", "config.json", "the token server"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("wrong") && !text.contains("hunter2"), "{text}");
    assert!(running.accesses().iter().any(|access| access.status == 206), "{:?}", running.accesses());
}
