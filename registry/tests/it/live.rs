//! Hosts that change while the client lives: order, capabilities, paths, headers, and what the next read makes of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::{REPOSITORY, blob_gets, config, content, later, options, reference, serving, statuses};
use registry::{
    Blob, Capability, Config, Error, HostSettings, HostSource, MirrorConfig, OriginHosts, Registry, Root,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::registry::{Action, Auth, MANIFEST, Rule, ScriptedRegistry, TokenAuth};

/// Says for every origin what it was told last.
#[derive(Debug, Default)]
pub struct Told(Mutex<Arc<OriginHosts>>);

impl Told {
    pub fn tell(&self, hosts: Vec<HostSettings>, server: HostSettings) {
        *self.0.lock().unwrap() = Arc::new(OriginHosts { hosts, server });
    }
}

impl HostSource for Told {
    fn hosts(&self, _: &str) -> Arc<OriginHosts> {
        self.0.lock().unwrap().clone()
    }
}

/// `config` with a source of hosts that says `hosts` and `server` first.
pub fn told(hosts: Vec<HostSettings>, server: HostSettings) -> (Arc<Told>, Config) {
    let told = Arc::new(Told::default());
    told.tell(hosts, server);
    (told.clone(), Config { host_source: Some(told), ..config() })
}

fn at(server: &ScriptedRegistry) -> HostSettings {
    HostSettings::at(&server.url(), Root::Standard).unwrap()
}

fn only(server: &ScriptedRegistry, capabilities: &[Capability]) -> HostSettings {
    let mut settings = at(server);
    settings.set_capabilities(capabilities);
    settings
}

async fn read(blob: &Blob) -> String {
    blob.read(0..10, &options()).await.unwrap().host.to_string()
}

/// Servers with the same blob and manifest.
fn alike<const N: usize>(data: &[u8]) -> ([ScriptedRegistry; N], String, String) {
    let servers = std::array::from_fn(|_| ScriptedRegistry::start());
    let (mut blob, mut manifest) = Default::default();
    for server in &servers {
        blob = ScriptedRegistry::put_blob(server, REPOSITORY, data.to_vec());
        manifest = server.put_manifest(REPOSITORY, "v1", MANIFEST, &b"{}"[..]);
    }
    (servers, blob, manifest)
}

#[tokio::test]
async fn hosts_are_asked_in_order_and_for_what_they_can() {
    let ([fixed, resolver, puller, origin], blob, manifest) = alike(&content(10));
    let hosts = vec![only(&resolver, &[Capability::Resolve]), only(&puller, &[Capability::Pull])];
    let (_, mut settings) = told(hosts, HostSettings::default());
    let registry = Registry::new(settings.clone()).unwrap();
    let opened = registry.blob(&reference(&origin), &blob, Some(10)).unwrap();
    assert_eq!(read(&opened).await, puller.host());
    registry.manifest(&reference(&origin), None, later()).await.unwrap();
    assert_eq!(statuses(&resolver.requests()), [200], "the tag");
    registry.manifest(&reference(&origin), Some(&manifest), later()).await.unwrap();
    assert_eq!(statuses(&puller.requests()), [206, 200], "the blob, the digest");
    let query = format!("ns={}", origin.host().replace(':', "%3A"));
    assert!(puller.requests().iter().chain(&resolver.requests()).all(|request| request.query == query));

    puller.stop();
    assert_eq!(read(&opened).await, origin.host());
    assert!(origin.requests().iter().all(|request| request.query.is_empty()), "it is the origin itself");
    puller.restart();
    origin.stop();
    assert_eq!(read(&opened).await, puller.host(), "back");
    assert_eq!(resolver.requests().len(), 1);

    let mirrors = vec![MirrorConfig { host: fixed.host(), ..Default::default() }];
    settings.hosts.entry(origin.host()).or_default().mirrors = mirrors;
    let opened = Registry::new(settings).unwrap().blob(&reference(&origin), &blob, Some(10)).unwrap();
    assert_eq!(read(&opened).await, fixed.host(), "what is set for good is asked first");
}

#[tokio::test]
async fn the_server_stands_for_the_origin_and_takes_what_is_pushed() {
    let ([mirror, server, origin], blob, _) = alike(&content(10));
    let (_, settings) = told(vec![at(&mirror)], at(&server));
    let registry = Registry::new(settings).unwrap();
    let opened = registry.blob(&reference(&origin), &blob, Some(10)).unwrap();
    assert_eq!(read(&opened).await, mirror.host());
    mirror.stop();
    assert_eq!(read(&opened).await, server.host());
    registry.put_manifest(&reference(&origin), MANIFEST, b"{ }".to_vec().into(), later()).await.unwrap();
    assert_eq!(statuses(&server.requests()), [206, 201]);
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn a_path_is_the_root_of_the_api() {
    let (server, origin) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    let digest = server.put_blob(&format!("proxy/{REPOSITORY}"), content(10));
    let url = format!("{}/v2/proxy/", server.url());
    let (_, settings) = told(vec![HostSettings::at(&url, Root::Given).unwrap()], HostSettings::default());
    let registry = Registry::new(settings).unwrap();
    let opened = registry.blob(&reference(&origin), &digest, Some(10)).unwrap();
    assert_eq!(read(&opened).await, server.host());
    assert_eq!(server.requests()[0].path, format!("/v2/proxy/{REPOSITORY}/blobs/{digest}"));
}

#[tokio::test]
async fn a_host_may_have_other_names_for_repositories() {
    let (mirror, origin) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    let data = content(10);
    let digest = mirror.put_blob("hub/team-app", data.clone());
    origin.put_blob(REPOSITORY, data.clone());
    mirror.set_auth(Auth::Token(TokenAuth::default()));
    let mut settings = at(&mirror);
    settings.add_rewrite("^team/(.*)", "hub/team-$1").unwrap();
    let registry = Registry::new(told(vec![settings], HostSettings::default()).1).unwrap();
    let opened = registry.blob(&reference(&origin), &digest, Some(10)).unwrap();
    assert_eq!(read(&opened).await, mirror.host());
    let token = mirror.requests().into_iter().find(|request| request.query.contains("scope=")).unwrap();
    assert!(token.query.contains("repository%3Ahub%2Fteam-app%3Apull"), "{}", token.query);
    mirror.stop();
    assert_eq!(read(&opened).await, origin.host(), "under the name it has there");
}

#[tokio::test]
async fn headers_stay_with_their_host() {
    let ([mirror, storage, origin], blob, _) = alike(&content(10));
    let mut settings = at(&mirror);
    settings.add_header("X-Pass", "one").unwrap();
    settings.add_header("X-Pass", "two").unwrap();
    let (_, settings) = told(vec![settings], HostSettings::default());
    let registry = Registry::new(settings).unwrap();
    let opened = registry.blob(&reference(&origin), &blob, Some(10)).unwrap();
    mirror.fault(Rule::new(Action::Redirect { to: storage.url(), expires_after: None }));
    read(&opened).await;
    read(&opened).await;
    mirror.stop();
    storage.stop();
    assert_eq!(read(&opened).await, origin.host());
    assert!(mirror.requests()[0].headers.contains_key("x-pass"));
    let others = [storage.requests(), origin.requests()].concat();
    assert_eq!(statuses(&others), [206; 3]);
    assert!(others.iter().all(|request| !request.headers.contains_key("x-pass")));
}

#[tokio::test]
async fn headers_open_the_way_to_the_hosts_own_token_server_and_no_other() {
    for own in [true, false] {
        let ([mirror, tokens, origin], blob, _) = alike(&content(10));
        mirror.set_auth(Auth::Token(TokenAuth::default()));
        if !own {
            let challenge = format!(r#"Bearer realm="{}/token",service="{}""#, tokens.url(), mirror.host());
            let refusal = Action::Headers(vec![("WWW-Authenticate".to_owned(), challenge)]);
            mirror.set_auth(Auth::None);
            mirror.fault(Rule::new(refusal));
            mirror.fault(Rule::new(Action::Status(401, vec![])).times(1));
        }
        let mut settings = at(&mirror);
        settings.add_header("X-Pass", "hunter2").unwrap();
        settings.add_header("Authorization", "Basic aHVudGVyMg==").unwrap();
        let (_, settings) = told(vec![settings], HostSettings::default());
        let opened = Registry::new(settings).unwrap().blob(&reference(&origin), &blob, Some(10)).unwrap();
        read(&opened).await;
        let asked = [mirror.requests(), tokens.requests()].concat();
        let asked: Vec<_> = asked.iter().filter(|request| request.path == "/token").collect();
        assert!(!asked.is_empty());
        assert!(asked.iter().all(|request| request.headers.contains_key("x-pass") == own), "{asked:?}");
        assert!(asked.iter().all(|request| own || request.authorization.is_none()), "{asked:?}");
    }
}

#[tokio::test]
async fn a_change_is_used_by_the_next_read_of_an_open_blob() {
    let ([first, second, storage, origin], blob, _) = alike(&content(10));
    let (told, settings) = told(vec![at(&first)], HostSettings::default());
    let registry = Registry::new(settings).unwrap();
    let opened = registry.blob(&reference(&origin), &blob, Some(10)).unwrap();
    first.fault(Rule::new(Action::Redirect { to: storage.url(), expires_after: None }));
    assert_eq!(read(&opened).await, first.host());

    told.tell(vec![at(&second), at(&first)], HostSettings::default());
    assert_eq!(read(&opened.clone()).await, second.host());
    second.stop();
    assert_eq!(read(&opened).await, first.host());
    assert_eq!(first.requests().len(), 1, "where its redirect leads is still known");
    assert_eq!(storage.requests().len(), 2);

    let mut changed = at(&first);
    changed.add_header("X-New", "1").unwrap();
    told.tell(vec![changed], HostSettings::default());
    assert_eq!(read(&opened).await, first.host());
    assert_eq!(first.requests().len(), 2, "what is asked in another way is asked anew");

    told.tell(vec![], only(&origin, &[Capability::Resolve]));
    let error = opened.read(0..10, &options()).await.unwrap_err();
    assert!(matches!(&error, Error::Config { why, .. } if why.contains("pull")), "{error}");
    told.tell(vec![], HostSettings::default());
    assert_eq!(read(&opened).await, origin.host());
}

#[tokio::test]
async fn a_read_that_waits_goes_by_a_change() {
    let ([mirror, origin], blob, _) = alike(&content(10));
    let (told, settings) = told(vec![], HostSettings::default());
    let registry = Registry::new(Config { retries: u32::MAX, ..settings }).unwrap();
    let opened = registry.blob(&reference(&origin), &blob, Some(10)).unwrap();
    origin.stop();
    let reading = tokio::spawn(async move { read(&opened).await });
    while registry.counters().snapshot().retries < 2 {
        tokio::task::yield_now().await;
    }
    told.tell(vec![at(&mirror)], HostSettings::default());
    assert_eq!(reading.await.unwrap(), mirror.host());
}

#[tokio::test]
async fn a_host_refused_once_is_asked_again_when_its_settings_change() {
    let (server, digest) = serving(&content(10));
    let (origin, _) = serving(&content(10));
    let (told, settings) = told(vec![at(&server)], HostSettings::default());
    let registry = Registry::new(settings).unwrap();
    let opened = registry.blob(&reference(&origin), &digest, Some(10)).unwrap();
    let rule = server.fault(Rule::new(Action::Status(403, vec![])));
    assert_eq!(read(&opened).await, origin.host());
    server.clear(rule);
    assert_eq!(read(&opened).await, origin.host(), "it had refused");
    let mut settings = at(&server);
    settings.set_dial_timeout(Duration::from_secs(3));
    told.tell(vec![settings], HostSettings::default());
    assert_eq!(read(&opened).await, server.host());
    assert_eq!(blob_gets(&server).len(), 2);
}
