//! Exactly the asked bytes, by one absolute range per request, whatever the body does.

use crate::{blob_gets, config, content, later, open, options, reference, serving, statuses};
use registry::{Error, MAX_READ, ReadOptions, Registry};
use std::time::Duration;
use support::registry::{Action, Rule};
use tokio::time::Instant;

#[tokio::test]
async fn a_read_is_one_ranged_get() {
    let data = content(100_000);
    let (server, digest) = serving(&data);
    let (registry, blob) = open(&server, config(), &digest, None);
    assert_eq!(blob.size(), None);
    let served = blob.read(500..70_000, &options()).await.unwrap();
    assert_eq!(served.bytes, data[500..70_000]);
    assert_eq!(served.host.to_string(), server.host());
    assert_eq!(blob.size(), Some(100_000), "learnt from Content-Range");
    let log = server.requests();
    assert_eq!(log.len(), 1);
    assert_eq!((log[0].method.as_str(), log[0].single()), ("GET", Some(500..70_000)));
    assert_eq!(log[0].headers["accept-encoding"], "identity");
    assert!(log[0].headers["user-agent"].starts_with("lazurite/"));
    assert!(log[0].authorization.is_none() && log[0].query.is_empty());
    let counters = registry.counters().snapshot();
    assert_eq!((counters.requests, counters.bytes_received, counters.retries), (1, 69_500, 0));
}

#[tokio::test]
async fn reads_share_connections() {
    let data = content(10_000);
    let (server, digest) = serving(&data);
    let (_, blob) = open(&server, config(), &digest, Some(10_000));
    for at in (0..10_000).step_by(1000) {
        assert_eq!(
            blob.read(at..at + 1000, &options()).await.unwrap().bytes[..],
            data[at as usize..][..1000]
        );
    }
    assert_eq!(server.accepted_connections(), 1);
}

#[tokio::test]
async fn ranges_outside_are_refused_without_a_request() {
    let (server, digest) = serving(&content(100));
    let (registry, blob) = open(&server, config(), &digest, Some(100));
    #[expect(clippy::reversed_empty_ranges, reason = "what a caller must not pass")]
    for range in [0..101, 100..101, 5..4, u64::MAX - 1..u64::MAX] {
        let error = blob.read(range.clone(), &options()).await.unwrap_err();
        assert!(matches!(error, Error::OutOfBounds { size: 100, .. }), "{range:?}: {error}");
    }
    let vast = registry.blob(&reference(&server), &digest, Some(u64::MAX)).unwrap();
    let error = vast.read(0..MAX_READ + 1, &options()).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { limit: MAX_READ, .. }), "{error}");
    assert!(blob.read(7..7, &options()).await.unwrap().bytes.is_empty());
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_range_past_an_unknown_end_tells_the_size() {
    let (server, digest) = serving(&content(100));
    let (_, blob) = open(&server, config(), &digest, None);
    let error = blob.read(50..200, &options()).await.unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { size: 100, .. }), "{error}");
    let error = blob.read(150..200, &options()).await.unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { size: 100, .. }), "{error}");
}

#[tokio::test]
async fn a_learnt_size_is_forgotten_with_the_route() {
    let (server, digest) = serving(&content(100));
    let (registry, blob) = open(&server, config(), &digest, None);
    let lie = ("Content-Range".to_owned(), "bytes 0-9/50".to_owned());
    server.fault(Rule::new(Action::Headers(vec![lie])).times(1));
    blob.read(0..10, &options()).await.unwrap();
    assert_eq!(blob.size(), Some(50));
    assert!(blob.read(0..10, &options()).await.is_err());
    blob.forget_route();
    blob.read(0..10, &options()).await.unwrap();
    assert_eq!(blob.size(), Some(100));
    let given = registry.blob(&reference(&server), &digest, Some(100)).unwrap();
    given.forget_route();
    assert_eq!(given.size(), Some(100), "what the caller knows stays");
}

#[tokio::test]
async fn the_longest_durations_do_no_harm() {
    let (server, digest) = serving(&content(10));
    let max = Duration::MAX;
    let settings = registry::Config {
        connect_timeout: max,
        first_byte_timeout: max,
        idle_timeout: max,
        backoff_min: max,
        backoff_max: max,
        redirect_ttl: max,
        ..config()
    };
    let (_, blob) = open(&server, settings, &digest, None);
    server.fault(Rule::new(Action::Redirect { to: server.url(), expires_after: None }).times(1));
    blob.read(0..10, &options()).await.unwrap();
}

#[tokio::test]
async fn digests_that_are_paths_are_refused() {
    let (server, _) = serving(b"");
    let registry = Registry::new(config()).unwrap();
    for digest in ["../../../etc/passwd", "sha256:../../secrets", "sha256:", "", "sha256:e3b0?x=1", "latest"]
    {
        let error = registry.blob(&reference(&server), digest, None).unwrap_err();
        assert!(matches!(error, Error::BadDigest { .. }), "{digest}: {error}");
        let error = registry.manifest(&reference(&server), Some(digest), later()).await.unwrap_err();
        assert!(matches!(error, Error::BadDigest { .. }), "{digest}: {error}");
        let error = registry.blob_bytes(&reference(&server), digest, 1, later()).await.unwrap_err();
        assert!(matches!(error, Error::BadDigest { .. }), "{digest}: {error}");
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_truncated_body_is_resumed_at_its_offset() {
    let data = content(200_000);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Truncate(70_000)).times(1));
    server.fault(Rule::new(Action::Truncate(1)).times(1));
    let (registry, blob) = open(&server, config(), &digest, Some(200_000));
    let served = blob.read(10_000..190_000, &options()).await.unwrap();
    assert_eq!(served.bytes, data[10_000..190_000]);
    let ranges: Vec<_> = server.requests().iter().map(|request| request.single().unwrap()).collect();
    assert_eq!(ranges, [10_000..190_000, 80_000..190_000, 80_001..190_000]);
    assert_eq!(registry.counters().snapshot().retries, 2);
}

#[tokio::test]
async fn a_shorter_range_than_asked_is_continued() {
    let data = content(5000);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Shorten(2000)));
    let (_, blob) = open(&server, config(), &digest, Some(5000));
    assert_eq!(blob.read(0..5000, &options()).await.unwrap().bytes, data);
    let ranges: Vec<_> = server.requests().iter().map(|request| request.single().unwrap()).collect();
    assert_eq!(ranges, [0..5000, 2000..5000, 4000..5000]);
}

#[tokio::test]
async fn endless_truncation_is_given_up() {
    let (server, digest) = serving(&content(5000));
    server.fault(Rule::new(Action::Truncate(0)));
    let (_, blob) = open(&server, config(), &digest, Some(5000));
    let error = blob.read(0..5000, &options()).await.unwrap_err();
    assert_eq!(error.reason(), "unavailable", "{error}");
    assert_eq!(server.requests().len(), 4, "one round and three more");
}

#[tokio::test]
async fn one_byte_at_a_time_is_given_up() {
    let (server, digest) = serving(&content(5000));
    server.fault(Rule::new(Action::Truncate(1)));
    let (_, blob) = open(&server, config(), &digest, Some(5000));
    let error = blob.read(0..5000, &options()).await.unwrap_err();
    assert_eq!(error.reason(), "unavailable", "{error}");
    assert_eq!(server.requests().len(), 16, "four rounds of one request and three resumptions");
}

#[tokio::test]
async fn a_reset_connection_is_retried() {
    let data = content(1000);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Reset).times(2));
    let (_, blob) = open(&server, config(), &digest, Some(1000));
    assert_eq!(blob.read(0..1000, &options()).await.unwrap().bytes, data);
}

#[tokio::test]
async fn a_whole_blob_is_skipped_into_when_that_is_cheap() {
    let data = content(300_000);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Full200));
    let (_, blob) = open(&server, config(), &digest, None);
    for range in [0..10, 0..300_000, 299_990..300_000, 100_000..200_000] {
        let served = blob.read(range.clone(), &options()).await.unwrap();
        assert_eq!(served.bytes[..], data[range.start as usize..range.end as usize], "{range:?}");
    }
    assert_eq!(blob.size(), Some(300_000), "learnt from Content-Length");
    assert_eq!(statuses(&server.requests()), [200; 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_whole_blob_is_cut_short_when_the_range_is_deep_inside() {
    let data = content(24 << 20);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Full200));
    let (_, blob) = open(&server, config(), &digest, Some(24 << 20));
    let error = blob.read(20 << 20..21 << 20, &options()).await.unwrap_err();
    assert!(matches!(error, Error::RangeIgnored { .. }), "{error}");
    assert!(server.wait_connections(0, Duration::from_secs(20)), "the download is abandoned");
    assert!(server.requests()[0].bytes_sent < 20 << 20);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn answers_that_contradict_the_request_are_refused() {
    let data = content(1000);
    for (name, value) in [
        ("Content-Range", "bytes 0-9/1000"),
        ("Content-Range", "bytes 101-110/1000"),
        ("Content-Range", "bytes 100-110/1000"),
        ("Content-Range", "bytes 100-109/999"),
        ("Content-Range", "bytes */1000"),
        ("Content-Range", "nonsense"),
    ] {
        let (server, digest) = serving(&data);
        server.fault(Rule::new(Action::Headers(vec![(name.into(), value.into())])));
        let (_, blob) = open(&server, config(), &digest, Some(1000));
        let error = blob.read(100..110, &options()).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }), "{value}: {error}");
        assert!(error.to_string().contains(&server.host()) && error.to_string().contains(&digest), "{error}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_wrong_size_is_refused() {
    let (server, digest) = serving(&content(1000));
    for (size, range) in [(999, 0..10), (2000, 0..10), (2000, 1500..1600)] {
        let (_, blob) = open(&server, config(), &digest, Some(size));
        let error = blob.read(range, &options()).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }), "{size}: {error}");
    }
}

#[tokio::test]
async fn a_missing_blob_is_not_found() {
    let (server, digest) = serving(&content(10));
    server.remove_blob(crate::REPOSITORY, &digest);
    let (_, blob) = open(&server, config(), &digest, Some(10));
    let error = blob.read(0..10, &options()).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert_eq!(statuses(&blob_gets(&server)), [404]);
}

#[tokio::test]
async fn a_silent_host_times_out_at_the_deadline() {
    let (server, digest) = serving(&content(10));
    server.fault(Rule::new(Action::Hang));
    let (_, blob) = open(&server, config(), &digest, Some(10));
    let deadline = Instant::now() + Duration::from_millis(300);
    let error = blob.read(0..10, &ReadOptions::until(deadline)).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(Instant::now() >= deadline);
    let past = ReadOptions::until(deadline);
    let error = blob.read(0..10, &past).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(server.requests().len() <= 1, "nothing is asked after the deadline");
}

#[tokio::test]
async fn a_body_that_stands_still_is_resumed() {
    let data = content(1000);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Stall { after: 300 }).nth(1));
    let settings = registry::Config { idle_timeout: Duration::from_secs(1), ..config() };
    let (_, blob) = open(&server, settings, &digest, Some(1000));
    assert_eq!(blob.read(0..1000, &options()).await.unwrap().bytes, data);
    assert_eq!(server.requests()[1].single(), Some(300..1000));
}

#[tokio::test]
async fn parallel_reads_do_not_mix() {
    let data = content(1 << 20);
    let (server, digest) = serving(&data);
    server.fault(Rule::new(Action::Truncate(5000)).skip(3).times(5));
    server.fault(Rule::new(Action::Reset).skip(11).times(3));
    let settings = registry::Config { retries: 20, ..config() };
    let (_, blob) = open(&server, settings, &digest, Some(1 << 20));
    let reads = (0..64u64).map(|n| {
        let (blob, data) = (&blob, &data);
        async move {
            let (start, end) = (n * 16_000, n * 16_000 + 16_384);
            let served = blob.read(start..end, &options()).await.unwrap();
            assert_eq!(served.bytes[..], data[start as usize..end as usize]);
        }
    });
    futures::future::join_all(reads).await;
}
