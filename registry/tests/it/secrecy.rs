//! Planted secrets turn up in no debug output, no error and no log line, at any level.

use crate::logins::{Plugin, brought};
use crate::{REPOSITORY, config, content, later, mirrored, options, reference};
use registry::{DockerConfig, KubernetesSecrets, PullCredentials, ReadOptions, Registry, UploadOptions};
use support::log::Log;
use support::registry::{Action, Auth, Rule, ScriptedRegistry, TokenAuth};

#[tokio::test]
async fn nothing_secret_is_printed() {
    const PASSWORD: &str = "hunter2-password";
    const HEADER: &str = "hunter2-header";
    const QUERY: &str = "hunter2-query";
    // One for each source of logins, each of them refused.
    const PULL: &str = "hunter2-pull";
    const PLUGIN: &str = "hunter2-plugin";
    const APISERVER: &str = "hunter2-apiserver";
    // Base64 of what begins with `ann:hunter2`.
    const ENCODED: &str = "YW5uOmh1bnRlcjI";
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::TRACE);
    // With a single subscriber, a log statement first reached by the thread of another test would be taken as
    // of no interest to anybody; a second one makes every subscriber be asked.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let _installed =
        tracing::subscriber::set_default(subscriber.with_writer(move || writer.clone()).finish());

    let (origin, storage) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    let digest = origin.put_blob(REPOSITORY, content(1000));
    storage.put_blob(REPOSITORY, content(1000));
    let manifest = origin.put_manifest(REPOSITORY, "v1", support::registry::MANIFEST, &b"{}"[..]);
    let credentials = Some(("ann".to_owned(), PASSWORD.to_owned()));
    origin.set_auth(Auth::Token(TokenAuth { credentials, ..TokenAuth::default() }));

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let host = origin.host();
    std::fs::write(
        &path,
        format!(r#"{{"auths":{{"{host}":{{"username":"ann","password":"{PASSWORD}"}}}}}}"#),
    )
    .unwrap();
    let mut settings = mirrored(&origin, &[&origin]);
    settings.docker_config = DockerConfig::File(path);
    settings.hosts.get_mut(&host).unwrap().mirrors[0].headers = vec![("X-Pass".into(), HEADER.into())];

    let pulls = PullCredentials::default();
    pulls.remember(&reference(&origin).to_string(), brought("ann", PULL)).unwrap();
    let plugin = Plugin::new("Image");
    plugin.knows(&host, "ann", PLUGIN);
    settings.pull_credentials = Some(pulls.clone());
    settings.kubelet_plugins = plugin.settings();
    let kubeconfig = directory.path().join("kubeconfig");
    // The apiserver is the registry, which does not know the token.
    let cluster = format!(
        r#"{{"current-context":"c","contexts":[{{"name":"c","context":{{"cluster":"k","user":"u"}}}}],
            "clusters":[{{"name":"k","cluster":{{"server":"{}"}}}}],
            "users":[{{"name":"u","user":{{"token":"{APISERVER}"}}}}]}}"#,
        origin.url()
    );
    std::fs::write(&kubeconfig, cluster).unwrap();
    let namespaces = vec!["apps".to_owned()];
    settings.pull_secrets = Some(KubernetesSecrets { kubeconfig: Some(kubeconfig), namespaces });

    let mut printed = format!("{settings:?} {:?} {pulls:?} {:?}", config(), brought("ann", PULL));
    let registry = Registry::new(settings).unwrap();
    let blob = registry.blob(&reference(&origin), &digest, Some(1000)).unwrap();

    // Well: authorized, then redirected to a signed URL.
    origin.fault(
        Rule::new(Action::Redirect { to: storage.url(), expires_after: None }).path("/blobs/").times(1),
    );
    let served = blob.read(0..1000, &options()).await.unwrap();
    printed += &format!("{served:?} {:?}", ReadOptions { avoid: Some(served.host.clone()), ..options() });
    printed +=
        &format!("{:?}", registry.manifest(&reference(&origin), Some(&manifest), later()).await.unwrap());
    let signature = storage.requests()[0].query.clone();
    let (_, signature) = signature.split_once("sig=").unwrap();

    // Badly: targets that refuse, fail and are not there, with secrets in their URLs.
    let dead = ScriptedRegistry::start();
    dead.stop();
    for (target, action) in [
        (storage.host(), Action::Status(401, vec![])),
        (storage.host(), Action::Status(418, vec![])),
        (storage.host(), Action::Status(503, vec![])),
        (storage.host(), Action::Truncate(3)),
        (dead.host(), Action::Reset),
    ] {
        origin.clear_all();
        storage.clear_all();
        storage.fault(Rule::new(action));
        let location =
            format!("http://me:{QUERY}@{target}/v2/{REPOSITORY}/blobs/{digest}?sig={QUERY}#{QUERY}");
        origin.fault(Rule::new(Action::Status(307, vec![("Location".into(), location)])).path("/blobs/"));
        blob.forget_route();
        let error = blob.read(0..1000, &options()).await.unwrap_err();
        printed += &format!("{error} {error:?} {blob:?}\n");
    }
    // An upload whose locations are signed, well and badly.
    origin.clear_all();
    let small = UploadOptions { chunk_size: 100, ..UploadOptions::default() };
    let target = reference(&origin);
    let mut upload = registry.upload(&target, small.clone()).await.unwrap();
    upload.write(content(150).into()).await.unwrap();
    printed += &format!("{upload:?} {small:?}");
    let session = origin.requests().into_iter().rfind(|request| request.method == "PATCH").unwrap().query;
    let session = session.strip_prefix("secret=").unwrap();
    upload.finish(&support::sha256_digest(&content(150))).await.unwrap();
    for (target_host, action) in [
        (storage.host(), Action::Status(401, vec![])),
        (storage.host(), Action::Status(418, vec![])),
        (dead.host(), Action::Reset),
    ] {
        storage.clear_all();
        storage.fault(Rule::new(action));
        let location = format!("http://me:{QUERY}@{target_host}/x?sig={QUERY}#{QUERY}");
        let rule = Rule::new(Action::Headers(vec![("Location".into(), location)])).method("POST").times(1);
        origin.fault(rule);
        let error = registry
            .put_blob(&target, &digest, content(1000).into(), small.clone())
            .await
            .map_or_else(|error| format!("{error} {error:?}"), |()| "begun anew".to_owned());
        printed += &error;
    }
    origin.clear_all();
    origin.set_password("changed");
    origin.revoke_tokens();
    blob.forget_route();
    let error = blob.read(0..1000, &options()).await.unwrap_err();
    assert_eq!(error.reason(), "auth_denied", "{error}");
    for source in ["CRI pulls", "kubelet plugins", "docker config", "pull secrets"] {
        assert!(error.to_string().contains(source), "{error}");
    }
    printed += &format!("{error} {error:?} {registry:?} {:?}", reference(&origin));
    printed += &format!("{:?}", registry.logins(&reference(&origin)).await.unwrap());

    let logged = log.take();
    assert!(logged.contains("registry::exchange") && logged.contains("token request"), "logs were taken");
    for secret in [PASSWORD, HEADER, QUERY, PULL, PLUGIN, APISERVER, signature, session, ENCODED] {
        assert!(!printed.contains(secret), "{secret} printed: {printed}");
        let line = logged.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "{secret} logged");
    }
}
