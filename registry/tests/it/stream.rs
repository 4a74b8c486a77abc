//! Whole blobs as streams: in order, a little ahead, verified at the end.

use crate::{config, content, mirrored, open, reference, serving};
use futures::{StreamExt, TryStreamExt};
use registry::{BlobStream, Error, Registry, StreamOptions};
use std::time::Duration;
use support::registry::{Action, Rule, ScriptedRegistry};

fn small() -> StreamOptions {
    StreamOptions { range_size: 1000, ahead: 2, range_timeout: Duration::from_secs(60) }
}

/// A stream of a blob of a new server.
fn streaming(data: &[u8]) -> (ScriptedRegistry, BlobStream) {
    let (server, digest) = serving(data);
    let (_, blob) = open(&server, config(), &digest, Some(data.len() as u64));
    let stream = blob.stream(small()).expect("a known size");
    (server, stream)
}

async fn collect(stream: BlobStream) -> Result<Vec<u8>, Error> {
    stream.try_fold(Vec::new(), async |all, piece| Ok([all, piece.to_vec()].concat())).await
}

#[tokio::test]
async fn a_stream_is_the_blob() {
    for length in [0, 1, 999, 1000, 1001, 10_500] {
        let data = content(length);
        let (server, stream) = streaming(&data);
        assert_eq!(collect(stream).await.unwrap(), data, "{length}");
        assert_eq!(server.requests().len(), length.div_ceil(1000), "{length}");
    }
    assert_eq!(StreamOptions::default().range_size, 4 << 20);
}

#[tokio::test]
async fn a_stream_reads_two_ranges_ahead_and_no_more() {
    let (server, mut stream) = streaming(&content(10_000));
    stream.next().await.unwrap().unwrap();
    let limit = Duration::from_secs(20);
    let three = |log: &[support::registry::Logged]| log.len() == 3 && log.iter().all(|one| one.finished);
    tokio::time::timeout(limit, server.until(three)).await.expect("read while nobody asks");
    stream.next().await.unwrap().unwrap();
    tokio::time::timeout(limit, server.until(|log| log.len() == 4)).await.unwrap();
    assert_eq!(format!("{stream:?}").split(", ").last(), Some("read up to byte 4000"));
    let hang = server.fault(Rule::new(Action::Hang));
    stream.next().await.unwrap().unwrap();
    tokio::time::timeout(limit, server.until_hits(hang, 1)).await.unwrap();
    drop(stream);
    let closed = tokio::task::spawn_blocking(move || server.wait_connections(0, limit)).await;
    assert!(closed.unwrap(), "what nobody waits for is not read");
}

#[tokio::test]
async fn a_stream_may_be_read_on_any_thread() {
    let data = content(10_000);
    let (_server, stream) = streaming(&data);
    assert_eq!(tokio::spawn(collect(stream)).await.unwrap().unwrap(), data);
}

#[tokio::test]
async fn a_stream_that_breaks_off_goes_on() {
    let data = content(10_000);
    let (server, stream) = streaming(&data);
    server.fault(Rule::new(Action::Truncate(300)).skip(2).times(2));
    server.fault(Rule::new(Action::Reset).skip(5).times(2));
    server.fault(Rule::new(Action::Status(503, vec![])).skip(7).times(1));
    assert_eq!(collect(stream).await.unwrap(), data);
}

#[tokio::test]
async fn bytes_that_are_not_the_blobs_are_told_at_the_end() {
    let data = content(3500);
    let (server, digest) = serving(&data);
    let mirror = ScriptedRegistry::start();
    mirror.put_blob(crate::REPOSITORY, data.clone());
    mirror.fault(Rule::new(Action::FlipBit(8 * 2500)));
    mirror.fault(Rule::new(Action::Status(404, vec![])).overlapping(3000..3500));
    let registry = Registry::new(mirrored(&server, &[&mirror])).unwrap();
    let blob = registry.blob(&reference(&server), &digest, Some(3500)).unwrap();
    let stream = blob.stream(StreamOptions { ahead: 0, ..small() }).unwrap();
    let mut items: Vec<_> = stream.collect().await;
    let error = items.pop().unwrap().unwrap_err();
    assert_eq!(items.len(), 4);
    assert!(items.iter().all(Result::is_ok));
    let Error::DigestMismatch { what, host, actual } = &error else { panic!("{error}") };
    assert!(what.contains(&digest));
    assert_eq!(*host, mirror.host());
    let mut flipped = data;
    flipped[2500] ^= 1;
    assert_eq!(*actual, support::sha256_digest(&flipped));
}

#[tokio::test]
async fn a_range_that_fails_ends_the_stream() {
    let (server, mut stream) = streaming(&content(10_000));
    server.fault(Rule::new(Action::Status(400, vec![])).overlapping(3000..3001));
    for _ in 0..3 {
        stream.next().await.unwrap().unwrap();
    }
    let error = stream.next().await.unwrap().unwrap_err();
    assert!(matches!(error, Error::BadResponse { .. }), "{error}");
    assert!(stream.next().await.is_none() && stream.next().await.is_none());
}

#[tokio::test]
async fn a_silent_host_ends_the_stream_in_time() {
    let (server, digest) = serving(&content(3000));
    let (_, blob) = open(&server, config(), &digest, Some(3000));
    server.fault(Rule::new(Action::Hang).overlapping(2000..2001));
    let options = StreamOptions { range_timeout: Duration::from_millis(300), ..small() };
    let error = collect(blob.stream(options).unwrap()).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_stream_needs_a_size_and_the_right_one() {
    let (server, digest) = serving(&content(3000));
    let (registry, blob) = open(&server, config(), &digest, None);
    let error = blob.stream(small()).unwrap_err();
    assert!(matches!(error, Error::SizeUnknown { .. }), "{error}");
    for wrong in [2999, 3001] {
        let blob = registry.blob(&reference(&server), &digest, Some(wrong)).unwrap();
        let error = collect(blob.stream(small()).unwrap()).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }), "{wrong}: {error}");
    }
}
