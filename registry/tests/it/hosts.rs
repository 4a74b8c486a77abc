//! Mirrors and origin: who is asked, in what order, and what is remembered of failures.

use crate::{config, reference};
use crate::{content, mirrored, open, options, serving, statuses};
use registry::{Config, Error, ReadOptions, Registry, TakeWhole, Whole};
use std::sync::Arc;
use std::time::Duration;
use support::registry::{Action, Auth, Rule, ScriptedRegistry};
use tokio::time::Instant;

/// Mirror and origin with the same blob.
fn pair(data: &[u8]) -> (ScriptedRegistry, ScriptedRegistry, String) {
    let ((mirror, _), (origin, digest)) = (serving(data), serving(data));
    (mirror, origin, digest)
}

#[tokio::test]
async fn the_mirror_is_asked_first_and_told_for_whom() {
    let data = content(10);
    let (mirror, origin, digest) = pair(&data);
    let mut settings = mirrored(&origin, &[&mirror]);
    let host = settings.hosts.get_mut(&origin.host()).unwrap();
    host.mirrors[0].headers = vec![("X-Team".into(), "blue".into())];
    let (_, blob) = open(&origin, settings, &digest, Some(10));
    let served = blob.read(0..10, &options()).await.unwrap();
    assert_eq!((served.bytes.to_vec(), served.host.to_string()), (data, mirror.host()));
    let asked = mirror.requests();
    assert_eq!(asked[0].query, format!("ns={}", origin.host().replace(':', "%3A")));
    assert_eq!(asked[0].headers["x-team"], "blue");
    assert!(origin.requests().is_empty());
    let avoid = Some(served.host);
    let other = blob.read(0..10, &ReadOptions { avoid, ..options() }).await.unwrap();
    assert_eq!(other.host.to_string(), origin.host(), "a host of bad bytes is asked last");
    let asked = origin.requests();
    assert!(asked[0].query.is_empty() && !asked[0].headers.contains_key("x-team"));
}

#[tokio::test]
async fn the_only_host_is_asked_although_it_is_to_be_avoided() {
    let (server, digest) = serving(&content(10));
    let (_, blob) = open(&server, config(), &digest, Some(10));
    let avoid = Some(blob.read(0..10, &options()).await.unwrap().host);
    blob.read(0..10, &ReadOptions { avoid, ..options() }).await.unwrap();
}

#[tokio::test]
async fn a_failing_mirror_costs_one_read_one_request() {
    for action in [
        Action::Status(503, vec![]),
        Action::Status(404, vec![]),
        Action::Status(400, vec![]),
        Action::Status(429, vec![("Retry-After".into(), "3600".into())]),
        Action::Truncate(0),
        Action::Reset,
        Action::Headers(vec![("Content-Range".into(), "bytes 0-9/11".into())]),
    ] {
        let data = content(10);
        let (mirror, origin, digest) = pair(&data);
        mirror.fault(Rule::new(action.clone()));
        let (_, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(10));
        for _ in 0..5 {
            let served = blob.read(0..10, &options()).await.unwrap();
            assert_eq!(
                (served.bytes.to_vec(), served.host.to_string()),
                (data.clone(), origin.host()),
                "{action:?}"
            );
        }
        assert_eq!(mirror.requests().len(), 1, "{action:?}");
        assert_eq!(statuses(&origin.requests()), [206; 5], "{action:?}");
    }
}

#[tokio::test]
async fn a_failure_of_one_blob_says_nothing_of_another() {
    let (mirror, origin, digest) = pair(&content(10));
    let (held, missing) = (mirror.put_blob(crate::REPOSITORY, content(20)), digest);
    origin.put_blob(crate::REPOSITORY, content(20));
    mirror.remove_blob(crate::REPOSITORY, &missing);
    let registry = Registry::new(mirrored(&origin, &[&mirror])).unwrap();
    let host = |digest: &str| {
        let blob = registry.blob(&reference(&origin), digest, None).unwrap();
        async move { blob.read(0..10, &options()).await.unwrap().host.to_string() }
    };
    assert_eq!(host(&missing).await, origin.host());
    assert_eq!(host(&held).await, mirror.host());
}

#[tokio::test]
async fn a_dead_mirror_is_passed_over() {
    let (mirror, origin, digest) = pair(&content(10));
    mirror.stop();
    let (registry, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(10));
    for _ in 0..3 {
        assert_eq!(blob.read(0..10, &options()).await.unwrap().host.to_string(), origin.host());
    }
    assert_eq!(registry.counters().snapshot().requests, 4, "one attempt at the mirror");
}

#[tokio::test]
async fn a_silent_mirror_leaves_time_for_the_origin() {
    let data = content(10);
    let (mirror, origin, digest) = pair(&data);
    mirror.fault(Rule::new(Action::Hang));
    let (_, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(10));
    // Half of the time is the mirror's, whose own limit of 30 s would take it all.
    let deadline = Instant::now() + Duration::from_secs(6);
    let served = blob.read(0..10, &ReadOptions::until(deadline)).await.unwrap();
    assert_eq!((served.bytes.to_vec(), served.host.to_string()), (data, origin.host()));
}

#[tokio::test]
async fn a_mirror_may_have_a_time_limit_of_its_own() {
    let (mirror, origin, digest) = pair(&content(10));
    mirror.fault(Rule::new(Action::Hang));
    let mut settings = mirrored(&origin, &[&mirror]);
    settings.connect_timeout = Duration::from_millis(100);
    let host = settings.hosts.get_mut(&origin.host()).unwrap();
    host.mirrors[0].request_timeout = Some(Duration::from_millis(100));
    let (_, blob) = open(&origin, settings, &digest, Some(10));
    let served = blob.read(0..10, &options()).await.unwrap();
    assert_eq!(served.host.to_string(), origin.host());
}

#[tokio::test]
async fn bytes_of_a_mirror_that_stops_are_not_mixed_with_the_origins() {
    let data = content(10_000);
    let (mirror, origin, digest) = pair(&data);
    mirror.put_blob_as(crate::REPOSITORY, &digest, vec![0; 10_000]);
    mirror.fault(Rule::new(Action::Truncate(5000)).times(1));
    mirror.fault(Rule::new(Action::Truncate(0)));
    let (_, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(10_000));
    let served = blob.read(0..10_000, &options()).await.unwrap();
    assert_eq!((served.bytes.to_vec(), served.host.to_string()), (data, origin.host()));
    assert_eq!(origin.requests()[0].single(), Some(0..10_000));
}

#[tokio::test]
async fn a_host_that_ignores_ranges_is_asked_after_the_others() {
    let data = content(9 << 20);
    let (mirror, origin, digest) = pair(&data);
    mirror.fault(Rule::new(Action::Full200));
    let (_, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(9 << 20));
    let deep = (9 << 20) - 100;
    let served = blob.read(deep..deep + 100, &options()).await.unwrap();
    assert_eq!((&served.bytes[..], served.host.to_string()), (&data[deep as usize..], origin.host()));
    assert_eq!(blob.read(0..100, &options()).await.unwrap().host.to_string(), origin.host());
    assert_eq!(mirror.requests().len(), 1);
    origin.stop();
    let served = blob.read(5..100, &options()).await.unwrap();
    assert_eq!((&served.bytes[..], served.host.to_string()), (&data[5..100], mirror.host()));
}

/// Takes the first body it is offered.
#[derive(Debug, Default)]
struct Taken(parking_lot::Mutex<Option<Whole>>);

impl TakeWhole for Taken {
    fn take_whole(&self, whole: Whole) -> Result<(), Whole> {
        let mut taken = self.0.lock();
        match *taken {
            Some(_) => Err(whole),
            None => {
                *taken = Some(whole);
                Ok(())
            }
        }
    }
}

#[tokio::test]
async fn a_blob_that_comes_whole_is_had_by_who_wants_it_and_the_read_by_the_next_host() {
    let data = content(3 << 20);
    let (mirror, origin, digest) = pair(&data);
    mirror.fault(Rule::new(Action::Full200));
    let (_, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(3 << 20));
    let taken = Arc::new(Taken::default());
    let options = || ReadOptions { whole: Some(taken.clone()), ..options() };
    let served = blob.read(1000..2000, &options()).await.unwrap();
    assert_eq!((&served.bytes[..], served.host.to_string()), (&data[1000..2000], origin.host()));
    let mut whole = taken.0.lock().take().unwrap();
    assert_eq!(whole.host().to_string(), mirror.host());
    let mut bytes = Vec::new();
    while let Some(piece) = whole.piece().await.unwrap() {
        bytes.extend_from_slice(&piece);
    }
    assert_eq!(bytes, data);
    // One that breaks off is no blob. It is longer than what is under way by itself.
    let (mirror, origin, digest) = pair(&content(24 << 20));
    mirror.fault(Rule::new(Action::Full200).times(1));
    let (_, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(24 << 20));
    blob.read(1000..2000, &options()).await.unwrap();
    let mut whole = taken.0.lock().take().unwrap();
    mirror.stop();
    let error = loop {
        match whole.piece().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if it were whole"),
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains(&mirror.host()), "{error}");
    // Who has no use for it gives it back, and what was asked for is taken from it.
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Full200));
    let (_, blob) = open(&server, config(), &digest, Some(3 << 20));
    assert!(matches!(blob.read(0..10, &options()).await, Err(Error::RangeIgnored { .. })), "the only host");
    assert_eq!(blob.read(1000..2000, &options()).await.unwrap().bytes, data[1000..2000]);
}

#[tokio::test]
async fn retry_after_is_obeyed() {
    let data = content(10);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Status(429, vec![("Retry-After".into(), "0".into())])).times(2));
    let (registry, blob) = open(&server, config(), &digest, Some(10));
    assert_eq!(blob.read(0..10, &options()).await.unwrap().bytes, data);
    assert_eq!(statuses(&server.requests()), [429, 429, 206]);
    assert_eq!(registry.counters().snapshot().retries, 2);

    server.fault(Rule::new(Action::Status(429, vec![("Retry-After".into(), "250".into())])));
    server.take_requests();
    for _ in 0..3 {
        let error = blob.read(0..10, &options()).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    }
    assert_eq!(server.requests().len(), 1, "a host that asked for quiet beyond the deadline is left alone");
}

#[tokio::test]
async fn a_registry_that_comes_back_within_the_deadline_is_waited_for() {
    let data = content(10);
    let (server, digest) = serving(&data);
    server.stop();
    let settings = Config { retries: u32::MAX, ..config() };
    let (registry, blob) = open(&server, settings, &digest, Some(10));
    let reading = tokio::spawn(async move { blob.read(0..10, &options()).await });
    while registry.counters().snapshot().retries < 2 {
        tokio::task::yield_now().await;
    }
    server.restart();
    assert_eq!(reading.await.unwrap().unwrap().bytes, data);
}

#[tokio::test]
async fn the_origins_error_is_the_one_reported() {
    let (mirror, origin, digest) = pair(&content(10));
    mirror.remove_blob(crate::REPOSITORY, &digest);
    origin.fault(Rule::new(Action::Status(403, vec![])));
    let (_, blob) = open(&origin, mirrored(&origin, &[&mirror]), &digest, Some(10));
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert!(matches!(&error, Error::AuthDenied { host, .. } if *host == origin.host()), "{error}");
}

/// A way to `target` from a port of the IPv6 loopback address.
async fn over_ipv6(target: String) -> std::io::Result<u16> {
    let listener = tokio::net::TcpListener::bind("[::1]:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let Ok(mut server) = tokio::net::TcpStream::connect(&target).await else { return };
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
        }
    });
    Ok(port)
}

#[tokio::test]
async fn a_registry_on_the_ipv6_loopback_address_is_reached_without_tls_and_with_its_login() {
    if !support::guard::require_ipv6() {
        return;
    }
    let data = content(10);
    let (server, digest) = serving(&data);
    server.set_auth(Auth::Basic { user: "ann".into(), password: "pass".into() });
    let host = format!("[::1]:{}", over_ipv6(server.host()).await.unwrap());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    std::fs::write(&path, format!(r#"{{"auths":{{"{host}":{{"username":"ann","password":"pass"}}}}}}"#))
        .unwrap();
    let plugin = crate::logins::Plugin::new("Registry");
    plugin.knows(&host, "ann", "pass");
    for settings in [
        Config { docker_config: registry::DockerConfig::File(path), ..config() },
        Config { kubelet_plugins: plugin.settings(), ..config() },
    ] {
        let registry = Registry::new(settings).unwrap();
        let reference = format!("{host}/{}:v1", crate::REPOSITORY).parse().unwrap();
        let blob = registry.blob(&reference, &digest, Some(10)).unwrap();
        let served = blob.read(0..10, &options()).await.unwrap();
        assert_eq!((served.bytes.to_vec(), served.host.to_string()), (data.clone(), host.clone()));
    }
}
