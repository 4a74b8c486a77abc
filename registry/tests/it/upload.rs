//! Blobs on their way: chunks, drops in every place, and nothing left behind.

use crate::{REPOSITORY, config, content, later, reference, statuses, token_requests};
use registry::{Config, Error, Registry, Upload, UploadOptions};
use std::time::Duration;
use support::registry::{Action, Auth, Expired, Logged, Rule, ScriptedRegistry, TokenAuth};
use support::sha256_digest;

/// Chunks of 1000 bytes.
fn small() -> UploadOptions {
    UploadOptions { chunk_size: 1000, chunk_timeout: Duration::from_secs(60) }
}

async fn begin(server: &ScriptedRegistry, config: Config) -> Result<Upload, Error> {
    Registry::new(config).expect("usable settings").upload(&reference(server), small()).await
}

/// Uploads `data` in uneven writes.
async fn upload(server: &ScriptedRegistry, data: &[u8]) -> Result<(), Error> {
    let mut upload = begin(server, config()).await?;
    for piece in data.chunks(333) {
        upload.write(piece.to_vec().into()).await?;
    }
    upload.finish(&sha256_digest(data)).await
}

fn stored(server: &ScriptedRegistry, data: &[u8]) -> bool {
    server.blob(REPOSITORY, &sha256_digest(data)).is_some_and(|blob| blob == data)
}

fn requests(server: &ScriptedRegistry, method: &str) -> Vec<Logged> {
    server.requests().into_iter().filter(|request| request.method == method).collect()
}

fn methods(server: &ScriptedRegistry) -> Vec<String> {
    server.requests().into_iter().map(|request| request.method).collect()
}

fn content_ranges(server: &ScriptedRegistry) -> Vec<String> {
    requests(server, "PATCH").iter().map(|request| request.headers["content-range"].clone()).collect()
}

#[tokio::test]
async fn a_blob_goes_in_chunks_of_the_asked_size() {
    let server = ScriptedRegistry::start();
    let data = content(2500);
    upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(methods(&server), ["POST", "PATCH", "PATCH", "PATCH", "PUT"]);
    assert_eq!(content_ranges(&server), ["0-999", "1000-1999", "2000-2499"]);
    for (patch, length) in requests(&server, "PATCH").iter().zip(["1000", "1000", "500"]) {
        assert_eq!(patch.headers["content-length"], length);
        assert_eq!(patch.headers["content-type"], "application/octet-stream");
        assert!(patch.query.starts_with("secret="));
    }
    let put = &requests(&server, "PUT")[0];
    assert!(put.query.starts_with("secret=") && put.query.contains("&digest=sha256%3A"), "{}", put.query);
    assert_eq!((put.bytes_received, put.headers["content-length"].as_str()), (0, "0"));
    assert_eq!(server.accepted_connections(), 1);
    assert_eq!(server.uploads_open(), 0);
}

#[tokio::test]
async fn blobs_around_a_chunk() {
    for (length, expected) in [
        (0, &["POST", "PUT"][..]),
        (1, &["POST", "PUT"]),
        (999, &["POST", "PUT"]),
        (1000, &["POST", "PATCH", "PUT"]),
        (1001, &["POST", "PATCH", "PATCH", "PUT"]),
    ] {
        let server = ScriptedRegistry::start();
        let data = content(length);
        upload(&server, &data).await.unwrap();
        assert!(stored(&server, &data), "{length}");
        assert_eq!(methods(&server), expected, "{length}");
    }
}

#[tokio::test]
async fn one_write_may_be_many_chunks() {
    let server = ScriptedRegistry::start();
    let data = content(3500);
    let mut upload = begin(&server, config()).await.unwrap();
    upload.write(data.clone().into()).await.unwrap();
    assert_eq!(upload.confirmed(), 3000);
    assert_eq!(
        format!("{upload:?}"),
        format!("upload to {}/{REPOSITORY} (3000 bytes confirmed)", server.host())
    );
    upload.finish(&sha256_digest(&data)).await.unwrap();
    assert!(stored(&server, &data));
}

#[tokio::test]
async fn a_small_blob_that_is_there_goes_at_once() {
    let server = ScriptedRegistry::start();
    let registry = Registry::new(config()).unwrap();
    let data = content(700);
    let digest = sha256_digest(&data);
    registry.put_blob(&reference(&server), &digest, data.clone().into(), small()).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(methods(&server), ["POST", "PUT"]);
    assert_eq!(registry.has_blob(&reference(&server), &digest, later()).await.unwrap(), Some(700));
    let other = sha256_digest(b"other");
    let error = registry.put_blob(&reference(&server), &other, data.into(), small()).await.unwrap_err();
    assert!(matches!(error, Error::BadResponse { .. }), "{error}");
    for part in ["DIGEST_INVALID", &other, REPOSITORY, &server.host()] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert_eq!(server.uploads_open(), 0);
}

#[tokio::test]
async fn a_chunk_that_breaks_off_goes_on_where_it_was() {
    for taken in [0, 1, 2, 400, 999, 1000, u64::MAX] {
        for chunk in 0..3 {
            let server = ScriptedRegistry::start();
            let data = content(2500);
            let at = chunk * 1000;
            let fault = Rule::new(Action::AcceptThenReset(taken)).method("PATCH").overlapping(at..at + 1);
            server.fault(fault.times(1));
            upload(&server, &data).await.unwrap_or_else(|e| panic!("{taken} of chunk {chunk}: {e}"));
            assert!(stored(&server, &data), "{taken} of chunk {chunk}");
            assert_eq!(server.uploads_open(), 0, "{taken} of chunk {chunk}");
            // One byte of the first chunk is said as `0-0`, like none: that chunk is sent anew.
            let again = taken == 1 && chunk == 0;
            assert_eq!(requests(&server, "POST").len(), if again { 2 } else { 1 }, "{taken} of {chunk}");
            let length = if chunk == 2 { 500 } else { 1000 };
            if taken < length && !again {
                let expected = format!("{}-{}", at + taken, at + length - 1);
                assert!(content_ranges(&server).contains(&expected), "{taken} of chunk {chunk}");
            }
            let sent: u64 = requests(&server, "PATCH").iter().map(|request| request.bytes_received).sum();
            if !again {
                assert_eq!(sent, 2500, "no byte twice: {taken} of chunk {chunk}");
            }
        }
    }
}

#[tokio::test]
async fn many_drops_in_one_chunk_are_as_good_as_one() {
    let server = ScriptedRegistry::start();
    let data = content(1000);
    server.fault(Rule::new(Action::AcceptThenReset(300)).method("PATCH").times(3));
    upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(content_ranges(&server), ["0-999", "300-999", "600-999", "900-999"]);
}

#[tokio::test]
async fn an_answer_that_is_lost_is_asked_for() {
    for (method, expected) in [
        ("POST", &["POST", "POST", "PATCH", "PATCH", "PUT"][..]),
        ("PATCH", &["POST", "PATCH", "GET", "PATCH", "PUT"]),
        ("PUT", &["POST", "PATCH", "PATCH", "PUT", "HEAD", "DELETE"]),
    ] {
        let server = ScriptedRegistry::start();
        let data = content(1500);
        server.fault(Rule::new(Action::AcceptThenReset(u64::MAX)).method(method).times(1));
        upload(&server, &data).await.unwrap_or_else(|e| panic!("{method}: {e}"));
        assert!(stored(&server, &data), "{method}");
        assert_eq!(methods(&server), expected, "{method}");
    }
}

#[tokio::test]
async fn a_blob_in_one_request_is_sent_again_from_its_start() {
    for action in [Action::Reset, Action::AcceptThenReset(400), Action::AcceptThenReset(u64::MAX)] {
        let server = ScriptedRegistry::start();
        let data = content(700);
        server.fault(Rule::new(action.clone()).method("PUT").times(1));
        upload(&server, &data).await.unwrap_or_else(|e| panic!("{action:?}: {e}"));
        assert!(stored(&server, &data), "{action:?}");
        assert_eq!(server.uploads_open(), 0, "{action:?}");
    }
}

#[tokio::test]
async fn an_end_that_does_not_arrive_is_sent_again() {
    let server = ScriptedRegistry::start();
    let data = content(1500);
    server.fault(Rule::new(Action::Reset).method("PUT").times(1));
    upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(methods(&server), ["POST", "PATCH", "PATCH", "PUT", "HEAD", "PUT"]);
}

#[tokio::test]
async fn a_forgotten_upload_begins_anew_while_all_is_held() {
    let server = ScriptedRegistry::start();
    let data = content(1500);
    let mut upload = begin(&server, config()).await.unwrap();
    server.drop_uploads();
    upload.write(data.clone().into()).await.unwrap();
    upload.finish(&sha256_digest(&data)).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(requests(&server, "POST").len(), 2);

    // As the reference implementation does after a chunk that broke off.
    let server = ScriptedRegistry::start();
    server.fault(Rule::new(Action::AcceptThenReset(500)).method("PATCH").times(1));
    server.fault(Rule::new(Action::Status(404, vec![])).method("GET").times(1));
    self::upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(server.uploads_open(), 0, "what the forgotten upload held is deleted too");

    let server = ScriptedRegistry::start();
    let mut small = begin(&server, config()).await.unwrap();
    small.write(content(700).into()).await.unwrap();
    server.drop_uploads();
    small.finish(&sha256_digest(&content(700))).await.unwrap();
    assert!(stored(&server, &content(700)));
}

#[tokio::test]
async fn a_forgotten_upload_is_an_error_when_its_bytes_are_gone() {
    for lost_at in ["chunk", "question", "end"] {
        let server = ScriptedRegistry::start();
        let mut upload = begin(&server, config()).await.unwrap();
        upload.write(content(1000).into()).await.unwrap();
        match lost_at {
            "question" => {
                server.fault(Rule::new(Action::AcceptThenReset(500)).method("PATCH").times(1));
                server.fault(Rule::new(Action::Status(404, vec![])).method("GET").times(1));
            }
            _ => server.drop_uploads(),
        }
        let error = match lost_at {
            "end" => upload.finish(&sha256_digest(&content(1000))).await.unwrap_err(),
            _ => upload.write(content(1000).into()).await.unwrap_err(),
        };
        assert!(matches!(error, Error::UploadLost { .. }), "{lost_at}: {error}");
        assert_eq!(error.reason(), "upload_lost");
        assert!(
            error.to_string().contains(REPOSITORY) && error.to_string().contains(&server.host()),
            "{error}"
        );
        assert_eq!(requests(&server, "POST").len(), 1, "{lost_at}");
        assert_eq!(server.uploads_open(), 0, "{lost_at}");
    }
}

#[tokio::test]
async fn a_registry_that_contradicts_itself_is_given_up() {
    let offset = |range: &str| Action::Headers(vec![("Range".to_owned(), range.to_owned())]);
    for range in ["0-98", "0-5000", "nonsense"] {
        let server = ScriptedRegistry::start();
        let mut upload = begin(&server, config()).await.unwrap();
        upload.write(content(1000).into()).await.unwrap();
        server.fault(Rule::new(Action::AcceptThenReset(500)).method("PATCH").times(1));
        server.fault(Rule::new(offset(range)).method("GET"));
        let error = upload.write(content(1000).into()).await.unwrap_err();
        assert!(matches!(error, Error::UploadLost { .. }), "{range}: {error}");
        upload.cancel().await.unwrap();
        assert_eq!(server.uploads_open(), 0);
    }
    let server = ScriptedRegistry::start();
    let mut upload = begin(&server, config()).await.unwrap();
    upload.write(content(1000).into()).await.unwrap();
    server.fault(Rule::new(Action::Status(416, vec![])).method("PATCH"));
    let error = upload.write(content(1000).into()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert_eq!(requests(&server, "PATCH").len(), 5, "one, then four rounds");
}

#[tokio::test]
async fn a_chunk_said_to_be_taken_in_part_is_looked_after() {
    let server = ScriptedRegistry::start();
    let data = content(2500);
    let short = vec![("Range".to_owned(), "0-1499".to_owned())];
    server.fault(Rule::new(Action::Headers(short)).method("PATCH").overlapping(1000..1001).times(1));
    upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(methods(&server), ["POST", "PATCH", "PATCH", "GET", "PATCH", "PUT"]);
}

#[tokio::test]
async fn an_offset_that_stays_behind_is_no_news() {
    let server = ScriptedRegistry::start();
    let data = content(3500);
    server.fault(Rule::new(Action::Headers(vec![("Range".into(), "0-999".into())])).method("PATCH"));
    upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(methods(&server), ["POST", "PATCH", "PATCH", "PATCH", "PATCH", "PUT"]);
}

#[tokio::test]
async fn a_registry_that_takes_less_at_once_gets_less() {
    for (status, at) in [(413, 0), (416, 0), (413, 1 << 20)] {
        let server = ScriptedRegistry::start();
        let data = content(5 << 19);
        let too_large = Rule::new(Action::Status(status, vec![])).method("PATCH").overlapping(at..at + 1);
        server.fault(too_large.times(2));
        let options = UploadOptions { chunk_size: 1 << 20, ..small() };
        let registry = Registry::new(config()).unwrap();
        let digest = sha256_digest(&data);
        registry.put_blob(&reference(&server), &digest, data.clone().into(), options).await.unwrap();
        assert!(stored(&server, &data), "{status}");
        assert_eq!(server.uploads_open(), 0, "{status}");
        let sent: Vec<u64> =
            requests(&server, "PATCH").iter().map(|request| request.bytes_received).collect();
        let (whole, quarter) = (1 << 20, 1 << 18);
        let tries = [whole, whole / 2];
        let before = if at > 0 { vec![whole] } else { vec![] };
        let after = if at > 0 { 6 } else { 10 };
        assert_eq!(sent, [&before[..], &tries, &vec![quarter; after]].concat(), "{status} at {at}");
    }
}

#[tokio::test]
async fn a_wrong_offset_is_asked_for_and_corrected() {
    let server = ScriptedRegistry::start();
    let data = content(2500);
    server.fault(Rule::new(Action::Status(416, vec![])).method("PATCH").overlapping(1000..1001).times(1));
    upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
    assert_eq!(methods(&server), ["POST", "PATCH", "PATCH", "GET", "PATCH", "PATCH", "PUT"]);
}

#[tokio::test]
async fn a_token_that_ends_in_the_middle_is_replaced() {
    let data = content(5500);
    for (expired, refusal) in [(Expired::Challenge, 401), (Expired::Forbidden, 403)] {
        let server = ScriptedRegistry::start();
        server.set_auth(Auth::Token(TokenAuth { max_uses: Some(3), expired, ..TokenAuth::default() }));
        upload(&server, &data).await.unwrap();
        assert!(stored(&server, &data));
        let sent: Vec<Logged> = server.requests().into_iter().filter(|r| r.path != "/token").collect();
        let ok = 202;
        assert_eq!(statuses(&sent), [401, ok, ok, ok, refusal, ok, ok, ok, refusal, ok, 201]);
        assert_eq!(token_requests(&server), 3);
        assert_eq!(content_ranges(&server).len(), 8, "six chunks, two of them sent twice");
    }
}

#[tokio::test]
async fn a_lasting_refusal_in_the_middle_is_an_error() {
    let server = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth::default()));
    let mut upload = begin(&server, config()).await.unwrap();
    upload.write(content(1000).into()).await.unwrap();
    let withheld = vec![(REPOSITORY.to_owned(), "push".to_owned())];
    server.revoke_tokens();
    server.set_auth(Auth::Token(TokenAuth { withheld, ..TokenAuth::default() }));
    let error = upload.write(content(1000).into()).await.unwrap_err();
    assert!(matches!(error, Error::AuthDenied { .. }), "{error}");
    assert_eq!(requests(&server, "PATCH").len(), 3, "refused once, refreshed, refused again");
    assert!(upload.cancel().await.is_err());
}

#[tokio::test]
async fn busy_registries_are_waited_for() {
    let server = ScriptedRegistry::start();
    let data = content(2500);
    for (status, method) in [(429, "POST"), (503, "PATCH"), (500, "PUT")] {
        let headers = vec![("Retry-After".to_owned(), "0".to_owned())];
        server.fault(Rule::new(Action::Status(status, headers)).method(method).times(2));
    }
    upload(&server, &data).await.unwrap();
    assert!(stored(&server, &data));
}

#[tokio::test]
async fn a_wait_longer_than_the_time_is_not_begun() {
    let server = ScriptedRegistry::start();
    let mut upload = begin(&server, config()).await.unwrap();
    let headers = vec![("Retry-After".to_owned(), "100".to_owned())];
    server.fault(Rule::new(Action::Status(429, headers)).method("PATCH"));
    let error = upload.write(content(1000).into()).await.unwrap_err();
    assert!(error.to_string().contains("Retry-After 100 s"), "{error}");
    assert_eq!(requests(&server, "PATCH").len(), 1);
}

#[tokio::test]
async fn endless_failure_is_given_up() {
    let server = ScriptedRegistry::start();
    let mut upload = begin(&server, config()).await.unwrap();
    server.fault(Rule::new(Action::Status(500, vec![])).method("PATCH"));
    let error = upload.write(content(1000).into()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert_eq!(requests(&server, "PATCH").len(), 4, "one round and three more");
    assert!(error.to_string().contains("bytes 0..1000"), "{error}");
    upload.cancel().await.unwrap();
    assert_eq!(server.uploads_open(), 0);
}

#[tokio::test]
async fn a_silent_registry_has_half_the_time_then_another_try() {
    let server = ScriptedRegistry::start();
    let options = UploadOptions { chunk_timeout: Duration::from_secs(2), ..small() };
    let registry = Registry::new(config()).unwrap();
    let mut upload = registry.upload(&reference(&server), options).await.unwrap();
    let hang = server.fault(Rule::new(Action::Hang).method("PATCH").times(1));
    upload.write(content(1000).into()).await.unwrap();
    assert_eq!(server.hits(hang), 1);
    assert_eq!(methods(&server), ["POST", "PATCH", "GET", "PATCH"]);
    server.fault(Rule::new(Action::Hang));
    let error = upload.write(content(1000).into()).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn cancelling_forgets_what_was_sent() {
    let server = ScriptedRegistry::start();
    let mut upload = begin(&server, config()).await.unwrap();
    upload.write(content(2500).into()).await.unwrap();
    assert_eq!(server.uploads_open(), 1);
    server.fault(Rule::new(Action::Status(503, vec![])).method("DELETE").times(1));
    upload.cancel().await.unwrap();
    assert_eq!(server.uploads_open(), 0);
    let upload = begin(&server, config()).await.unwrap();
    server.drop_uploads();
    upload.cancel().await.unwrap();
}

#[tokio::test]
async fn a_wrong_digest_leaves_nothing() {
    for length in [500, 1500] {
        let server = ScriptedRegistry::start();
        let mut upload = begin(&server, config()).await.unwrap();
        upload.write(content(length).into()).await.unwrap();
        let error = upload.finish(&sha256_digest(b"other")).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }), "{error}");
        assert_eq!(server.uploads_open(), 0);
        let upload = begin(&server, config()).await.unwrap();
        let error = upload.finish("sha256:../x").await.unwrap_err();
        assert!(matches!(error, Error::BadDigest { .. }), "{error}");
        assert_eq!(server.uploads_open(), 0);
    }
}

#[tokio::test]
async fn an_upload_elsewhere_gets_no_credentials() {
    let (server, storage) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    server.set_auth(Auth::Token(TokenAuth::default()));
    let location = format!("{}{}", storage.url(), storage.open_upload("internal/x"));
    server.fault(Rule::new(Action::Headers(vec![("Location".into(), location)])).method("POST"));
    let data = content(2500);
    upload(&server, &data).await.unwrap();
    assert_eq!(storage.blob("internal/x", &sha256_digest(&data)).unwrap(), data);
    assert_eq!(methods(&storage), ["PATCH", "PATCH", "PATCH", "PUT"]);
    for request in storage.requests() {
        assert!(request.authorization.is_none() && !request.headers.contains_key("referer"), "{request:?}");
    }
    storage.set_auth(Auth::Basic { user: "ann".into(), password: "pass".into() });
    let error = upload(&server, &data).await.unwrap_err();
    assert!(matches!(&error, Error::AuthDenied { host, .. } if *host == storage.host()), "{error}");
}

#[tokio::test]
async fn redirects_are_followed_without_credentials() {
    let (server, storage) = (ScriptedRegistry::start(), ScriptedRegistry::start());
    server.set_auth(Auth::Token(TokenAuth::default()));
    let to = storage.url();
    server.fault(Rule::new(Action::Redirect { to, expires_after: None }).method("POST"));
    let data = content(700);
    upload(&server, &data).await.unwrap();
    assert!(stored(&storage, &data), "a relative location belongs to the host that gave it");
    assert!(storage.requests().iter().all(|request| request.authorization.is_none()));
    server.clear_all();
    let headers = vec![("Location".to_owned(), storage.url())];
    server.fault(Rule::new(Action::Status(302, headers)).method("POST"));
    let error = upload(&server, &data).await.unwrap_err();
    assert!(matches!(error, Error::BadResponse { .. }), "not turned into a GET: {error}");
}

#[tokio::test]
async fn locations_that_cannot_be_used_are_named() {
    for location in ["ftp://127.0.0.1/x", "http://"] {
        let server = ScriptedRegistry::start();
        server.fault(Rule::new(Action::Headers(vec![("Location".into(), location.into())])));
        let error = begin(&server, config()).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }), "{location}: {error}");
    }
    let server = ScriptedRegistry::start();
    server.fault(Rule::new(Action::Status(202, vec![])));
    assert!(matches!(begin(&server, config()).await.unwrap_err(), Error::BadResponse { .. }));
}

#[tokio::test]
async fn a_registry_that_wants_longer_chunks_gets_them() {
    let server = ScriptedRegistry::start();
    let least = vec![("OCI-Chunk-Min-Length".to_owned(), "2000".to_owned())];
    server.fault(Rule::new(Action::Headers(least)).method("POST"));
    let data = content(4500);
    upload(&server, &data).await.unwrap();
    assert_eq!(content_ranges(&server), ["0-1999", "2000-3999", "4000-4499"]);
}

#[tokio::test]
async fn uploads_may_run_on_any_thread_and_side_by_side() {
    let server = ScriptedRegistry::start();
    let registry = Registry::new(config()).unwrap();
    let tasks: Vec<_> = (1..9)
        .map(|n| {
            let (registry, reference, data) = (registry.clone(), reference(&server), content(n * 700));
            tokio::spawn(async move {
                let mut upload = registry.upload(&reference, small()).await?;
                upload.write(data.clone().into()).await?;
                upload.finish(&sha256_digest(&data)).await
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert!((1..9).all(|n| stored(&server, &content(n * 700))));
    assert_eq!(server.uploads_open(), 0);
}
