//! Pull secrets of Kubernetes, from an apiserver that speaks TLS as a real one does.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::tls::{Authority, authority, front_of, signed};
use crate::{config, content, open, options, reference, serving};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use registry::{Config, KubernetesSecrets, LoginAnswer, Registry};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use support::guard;
use support::registry::{Auth, ScriptedRegistry};
use tokio::net::TcpListener;

const TOKEN: &str = "hunter2-apiserver";

/// What the apiserver holds, and what it was asked.
#[derive(Default)]
struct State {
    /// Items by namespace and type.
    secrets: HashMap<(String, String), Vec<Value>>,
    asked: Vec<String>,
    /// Answers everything with this.
    status: Option<u16>,
    takes_anybody: bool,
}

struct Apiserver {
    state: Arc<Mutex<State>>,
    ours: Authority,
    users: Authority,
    port: u16,
    directory: tempfile::TempDir,
}

impl Apiserver {
    /// One that asks clients for a certificate if it is `strict`, and for a token otherwise.
    async fn start(strict: bool) -> Self {
        let state = Arc::new(Mutex::new(State { takes_anybody: strict, ..State::default() }));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let behind = listener.local_addr().unwrap().to_string();
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = shared.clone();
                let service = service_fn(move |request| {
                    let answer = answer(&mut shared.lock().unwrap(), &request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        });
        let (ours, users) = (authority("cluster"), authority("users"));
        let pair = signed(&ours, &["127.0.0.1"]);
        let port = front_of(behind, &pair, strict.then_some(&users)).await;
        Self { state, ours, users, port, directory: guard::temp_dir() }
    }

    /// Puts a secret in a namespace.
    fn put(&self, namespace: &str, kind: &str, host: &str, password: &str) {
        use base64::Engine as _;
        let entries = json!({ host: { "username": "ann", "password": password } });
        let (key, contents) = match kind {
            "kubernetes.io/dockercfg" => (".dockercfg", entries),
            _ => (".dockerconfigjson", json!({ "auths": entries })),
        };
        let data = base64::engine::general_purpose::STANDARD.encode(contents.to_string());
        let item = json!({ "metadata": {"name": "pull"}, "type": kind, "data": {key: data} });
        self.state.lock().unwrap().secrets.insert((namespace.to_owned(), kind.to_owned()), vec![item]);
    }

    /// A kubeconfig with this user.
    fn kubeconfig(&self, user: Value) -> PathBuf {
        use base64::Engine as _;
        let authority = base64::engine::general_purpose::STANDARD.encode(self.ours.pem());
        let file = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port), "certificate-authority-data": authority,
            }}],
            "users": [{"name": "u", "user": user}],
        });
        let path = self.directory.path().join("kubeconfig");
        std::fs::write(&path, file.to_string()).unwrap();
        path
    }

    fn settings(&self, user: Value, namespaces: &[&str]) -> Config {
        let namespaces = namespaces.iter().map(|name| (*name).to_owned()).collect();
        let kubeconfig = Some(self.kubeconfig(user));
        Config { pull_secrets: Some(KubernetesSecrets { kubeconfig, namespaces }), ..config() }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().asked)
    }
}

fn answer(state: &mut State, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let query = request.uri().query().unwrap_or_default();
    state.asked.push(format!("{} {}?{query}", request.method(), request.uri().path()));
    let token = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    let allowed = state.takes_anybody || token == Some(&format!("Bearer {TOKEN}"));
    let status = state.status.unwrap_or(if allowed { 200 } else { 401 });
    let namespace = request.uri().path().strip_prefix("/api/v1/namespaces/");
    let namespace = namespace.and_then(|rest| rest.strip_suffix("/secrets")).unwrap_or("?").to_owned();
    let kind = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=type%3D")).unwrap_or("?");
    let items = state.secrets.get(&(namespace, kind.replace("%2F", "/"))).cloned().unwrap_or_default();
    let body = json!({ "kind": "SecretList", "items": items, "message": "hunter2-message" }).to_string();
    Response::builder().status(status).body(Full::new(body.into())).unwrap()
}

/// A registry with one blob that wants this password.
fn locked(password: &str) -> (ScriptedRegistry, String) {
    let (server, digest) = serving(&content(10));
    server.set_auth(Auth::Basic { user: "ann".into(), password: password.into() });
    (server, digest)
}

/// Settings with a kubeconfig for one namespace.
fn apiserver_at(kubeconfig: PathBuf) -> Config {
    let namespaces = vec!["apps".to_owned()];
    Config { pull_secrets: Some(KubernetesSecrets { kubeconfig: Some(kubeconfig), namespaces }), ..config() }
}

/// What the source says of the registry.
async fn said(settings: Config, server: &ScriptedRegistry) -> LoginAnswer {
    let registry = Registry::new(settings).unwrap();
    let mut login = registry.logins(&reference(server)).await.unwrap().remove(0);
    assert_eq!(login.answers.len(), 1);
    login.answers.remove(0)
}

#[tokio::test]
async fn secrets_of_the_namespaces_named_are_used_and_read_anew_after_a_refusal() {
    for kind in ["kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg"] {
        let (server, digest) = locked("first");
        let apiserver = Apiserver::start(false).await;
        apiserver.put("apps", kind, &server.host(), "first");
        apiserver.put("others", kind, &server.host(), "hunter2-others");
        let settings = apiserver.settings(json!({ "token": TOKEN }), &["empty", "apps"]);
        let (_, blob) = open(&server, settings, &digest, Some(10));
        for _ in 0..2 {
            blob.read(0..10, &options()).await.unwrap();
        }
        let mut asked = apiserver.asked();
        asked.sort();
        let list = |namespace: &str, kind: &str| {
            format!(
                "GET /api/v1/namespaces/{namespace}/secrets?fieldSelector=type%3Dkubernetes.io%2F{kind}&limit=500"
            )
        };
        let expected = [
            list("apps", "dockercfg"),
            list("apps", "dockerconfigjson"),
            list("empty", "dockercfg"),
            list("empty", "dockerconfigjson"),
        ];
        assert_eq!(asked, expected, "once for both reads, and no other namespace");
        server.set_password("second");
        apiserver.put("apps", kind, &server.host(), "second");
        server.take_requests();
        blob.read(0..10, &options()).await.unwrap();
        let statuses: Vec<u16> = server.requests().iter().map(|request| request.status).collect();
        assert_eq!(statuses, [401, 206]);
        assert_eq!(apiserver.asked().len(), 2, "only the namespace that had what was refused");
    }
}

#[tokio::test]
async fn a_client_certificate_and_a_token_file_open_the_apiserver() {
    use base64::Engine as _;
    let encode = |pem: &str| base64::engine::general_purpose::STANDARD.encode(pem);
    let (server, digest) = locked("pass");
    let apiserver = Apiserver::start(true).await;
    apiserver.put("apps", "kubernetes.io/dockerconfigjson", &server.host(), "pass");
    let pair = signed(&apiserver.users, &["node"]);
    let user = json!({
        "client-certificate-data": encode(&pair.certificate), "client-key-data": encode(&pair.key),
    });
    let (_, blob) = open(&server, apiserver.settings(user, &["apps"]), &digest, None);
    blob.read(0..10, &options()).await.unwrap();
    let answer = said(apiserver.settings(json!({}), &["apps"]), &server).await;
    assert!(
        answer.said.contains("unreachable (") && answer.said.contains("CertificateRequired"),
        "{answer:?}"
    );

    let apiserver = Apiserver::start(false).await;
    apiserver.put("apps", "kubernetes.io/dockerconfigjson", &server.host(), "pass");
    std::fs::write(apiserver.directory.path().join("token"), format!("{TOKEN}\n")).unwrap();
    let settings = apiserver.settings(json!({ "tokenFile": "token" }), &["apps"]);
    let (_, blob) = open(&server, settings, &digest, None);
    blob.read(0..10, &options()).await.unwrap();
}

#[tokio::test]
async fn what_the_apiserver_does_not_give_is_said_and_the_registry_asked_all_the_same() {
    let (server, _) = locked("pass");
    let (open_server, digest) = serving(&content(10));
    let apiserver = Apiserver::start(false).await;
    let settings = |user: Value| apiserver.settings(user, &["apps"]);
    for (user, status, expected) in [
        (json!({ "token": TOKEN }), None, "namespace apps has none for"),
        (json!({ "token": "hunter2-wrong" }), None, "answered 401 Unauthorized: the user of"),
        (json!({ "token": TOKEN }), Some(403), "may not list secrets"),
        (json!({ "token": TOKEN }), Some(503), "answered 503"),
        (json!({ "exec": {"command": "hunter2"} }), None, "logs in by a program (exec)"),
        (json!({ "token": "hunter2\n2" }), None, "characters a header must not have"),
    ] {
        apiserver.state.lock().unwrap().status = status;
        let answer = said(settings(user), &server).await;
        assert_eq!(answer.source, "pull secrets");
        assert!(answer.said.contains(expected) && !answer.said.contains("hunter2"), "{}", answer.said);
    }
    // Nobody is there: a refusal says so, and what is public is read.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let path = apiserver.kubeconfig(json!({ "token": TOKEN }));
    let text =
        std::fs::read_to_string(&path).unwrap().replace(&apiserver.port.to_string(), &nobody.to_string());
    std::fs::write(&path, text).unwrap();
    let gone = apiserver_at(path);
    let (_, blob) = open(&server, gone.clone(), &digest, Some(10));
    let error = blob.read(0..10, &options()).await.unwrap_err().to_string();
    assert!(error.contains("pull secrets: namespace apps: the apiserver is unreachable ("), "{error}");
    let (_, blob) = open(&open_server, gone, &digest, Some(10));
    blob.read(0..10, &options()).await.unwrap();
    // Somebody is there and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let path = apiserver.kubeconfig(json!({ "token": TOKEN }));
    let port = silent.local_addr().unwrap().port().to_string();
    let text = std::fs::read_to_string(&path).unwrap().replace(&apiserver.port.to_string(), &port);
    std::fs::write(&path, text).unwrap();
    let answer = said(apiserver_at(path), &server).await;
    assert!(answer.said.contains("unreachable (no answer within 3s)"), "{}", answer.said);
}
