//! The server under a client that is nothing but a socket.

mod push;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use base64::Engine as _;
use serde_json::json;

use super::*;
use crate::estargz::Encoder;
use crate::layer::Layer;

const LIMIT: Duration = Duration::from_secs(20);

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// The body came to its end.
    whole: bool,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value)
    }
}

fn open(host: &str) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(host).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    BufReader::new(stream)
}

fn ask(stream: &mut BufReader<TcpStream>, method: &str, target: &str, headers: &[(&str, &str)]) {
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: test\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.get_mut().write_all(format!("{text}\r\n").as_bytes()).unwrap();
}

fn read(stream: &mut BufReader<TcpStream>, method: &str) -> std::io::Result<Answer> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
    let pairs = lines[1..].iter().map(|line| line.split_once(": ").unwrap());
    let headers = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let mut answer = Answer { status, headers, body: Vec::new(), whole: true };
    let length: u64 = answer.header("content-length").parse().unwrap_or(0); // 204 has none
    if method != "HEAD" {
        stream.take(length).read_to_end(&mut answer.body)?;
        answer.whole = answer.body.len() as u64 == length;
    }
    Ok(answer)
}

fn get(host: &str, target: &str, headers: &[(&str, &str)]) -> Answer {
    let mut stream = open(host);
    ask(&mut stream, "GET", target, headers);
    read(&mut stream, "GET").unwrap()
}

/// A server with one blob of 1000 bytes, and the path of it.
fn with_blob() -> (ScriptedRegistry, Vec<u8>, String) {
    let server = ScriptedRegistry::start();
    let data: Vec<u8> = (0..1000u32).map(|number| number as u8).collect();
    let digest = server.put_blob("a/b", data.clone());
    (server, data, format!("/v2/a/b/blobs/{digest}"))
}

#[test]
fn blobs_by_range() {
    let (server, data, path) = with_blob();
    let mut stream = open(&server.host());
    for (range, status, expected, told) in [
        (None, 200, 0..1000, ""),
        (Some("bytes=10-19"), 206, 10..20, "bytes 10-19/1000"),
        (Some("bytes=990-"), 206, 990..1000, "bytes 990-999/1000"),
        (Some("bytes=-5"), 206, 995..1000, "bytes 995-999/1000"),
        (Some("bytes=999-5000"), 206, 999..1000, "bytes 999-999/1000"),
        (Some("bytes=1000-1001"), 416, 0..0, "bytes */1000"),
        (Some("bytes=0-1,5-6"), 200, 0..1000, ""),
        (Some("lines=1"), 200, 0..1000, ""),
    ] {
        let headers: Vec<_> = range.map(|range| ("Range", range)).into_iter().collect();
        ask(&mut stream, "GET", &path, &headers);
        let answer = read(&mut stream, "GET").unwrap();
        assert_eq!(answer.status, status, "{range:?}");
        assert_eq!(answer.body, data[expected], "{range:?}");
        assert_eq!(answer.header("content-range"), told, "{range:?}");
    }
    ask(&mut stream, "HEAD", &path, &[]);
    let head = read(&mut stream, "HEAD").unwrap();
    assert_eq!((head.status, head.header("content-length")), (200, "1000"));
    let log = server.take_requests();
    assert_eq!(log[1].single(), Some(10..20));
    assert_eq!((log[1].status, log[1].bytes_sent, log[1].finished), (206, 10, true));
    assert_eq!(log[2].range, Some(RangeAsked::From(990)));
    assert_eq!(log[3].range, Some(RangeAsked::Suffix(5)));
    assert_eq!(log[6].range, Some(RangeAsked::Multi("bytes=0-1,5-6".to_owned())));
    assert_eq!(log[7].range, Some(RangeAsked::Invalid("lines=1".to_owned())));
    assert_eq!(log[8].method, "HEAD");
    assert!(server.requests().is_empty());
    assert_eq!((server.open_connections(), server.accepted_connections()), (1, 1));
    drop(stream);
    assert!(server.wait_connections(0, LIMIT));
    assert_eq!(get(&server.host(), "/v2/other/blobs/sha256:00", &[]).status, 404);
    assert_eq!(get(&server.host(), "/v2/", &[]).status, 200);
}

#[test]
fn images_are_whole() {
    let server = ScriptedRegistry::start();
    let layer = Layer::new().file("a", "1");
    let lazy = LayerBlob::lazy(&Encoder::new().encode(&layer));
    let image =
        server.put_image("x", "v1", &[LayerBlob::plain(&layer), lazy], &json!({"config": {"Cmd": ["sh"]}}));
    let index = server.put_index(
        "x",
        "latest",
        &[(&image, Platform::host()), (&image, Platform::new("linux", "s390x"))],
    );
    let host = server.host();
    let by_tag = get(&host, "/v2/x/manifests/v1", &[]);
    assert_eq!(by_tag.header("content-type"), MANIFEST);
    assert_eq!(by_tag.header("docker-content-digest"), image.manifest);
    assert_eq!(sha256_digest(&by_tag.body), image.manifest);
    assert_eq!(by_tag.body.len() as u64, image.manifest_size);
    assert_eq!(get(&host, &format!("/v2/x/manifests/{}", image.manifest), &[]).body, by_tag.body);
    let manifest: Value = serde_json::from_slice(&by_tag.body).unwrap();
    assert_eq!(manifest["layers"][1]["digest"], image.layers[1]);
    assert!(manifest["layers"][1]["annotations"]["containerd.io/snapshot/stargz/toc.digest"].is_string());
    let config = get(&host, &format!("/v2/x/blobs/{}", image.config), &[]);
    let config: Value = serde_json::from_slice(&config.body).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"][0], sha256_digest(&layer.tar()));
    assert_eq!(config["config"]["Cmd"][0], "sh");
    let fetched = get(&host, "/v2/x/manifests/latest", &[]);
    assert_eq!((fetched.header("content-type"), sha256_digest(&fetched.body)), (INDEX, index));
    assert_eq!(get(&host, "/v2/x/tags/list", &[]).body, br#"{"name":"x","tags":["latest","v1"]}"#);
    assert_eq!(get(&host, "/v2/x/manifests/v2", &[]).status, 404);
}

#[test]
fn answers_that_are_wrong() {
    let (server, data, path) = with_blob();
    let host = server.host();
    let range = [("Range", "bytes=100-199")];
    let wrong = |action| {
        server.clear_all();
        server.fault(Rule::new(action));
        get(&host, &path, &range)
    };
    let answer = wrong(Action::Full200);
    assert_eq!((answer.status, answer.body), (200, data.clone()));
    let answer = wrong(Action::Shorten(3));
    assert_eq!((answer.status, answer.header("content-range")), (206, "bytes 100-102/1000"));
    assert_eq!(answer.body, data[100..103]);
    let answer = wrong(Action::FlipBit(8 * 150 + 7));
    assert_eq!(answer.body[50], data[150] ^ 0x80);
    assert_eq!(answer.body[..50], data[100..150]);
    let answer = wrong(Action::Substitute(vec![9; 2000].into()));
    assert_eq!((answer.body, answer.headers.len()), (vec![9; 100], 6));
    let answer = wrong(Action::Status(503, vec![("Retry-After".to_owned(), "7".to_owned())]));
    assert_eq!((answer.status, answer.header("retry-after"), answer.body.len()), (503, "7", 0));
    let answer = wrong(Action::Headers(vec![("content-range".to_owned(), "bytes 0-99/1000".to_owned())]));
    assert_eq!((answer.status, answer.header("content-range")), (206, "bytes 0-99/1000"));
    let answer = wrong(Action::Throttle(100_000));
    assert_eq!(answer.body, data[100..200]);
    let answer = wrong(Action::Delay(Duration::from_millis(1)));
    assert_eq!(answer.body, data[100..200]);
}

#[test]
fn truncated_bodies_end_at_the_byte() {
    let server = ScriptedRegistry::start();
    let big = vec![5; 3 << 20];
    let path = format!("/v2/a/blobs/{}", server.put_blob("a", big.clone()));
    for length in [0, 1, 70_000, 2_000_000] {
        server.clear_all();
        server.fault(Rule::new(Action::Truncate(length)));
        let answer = get(&server.host(), &path, &[]);
        assert_eq!((answer.status, answer.whole), (200, false));
        assert_eq!(answer.body.len() as u64, length);
        let log = server.take_requests();
        assert_eq!((log[0].bytes_sent, log[0].finished), (length, false));
    }
    server.clear_all();
    assert_eq!(get(&server.host(), &path, &[]).body, big);
}

#[test]
fn resets_and_hangs() {
    let (server, data, path) = with_blob();
    let host = server.host();
    let reset = server.fault(Rule::new(Action::Reset).times(1));
    let mut stream = open(&host);
    ask(&mut stream, "GET", &path, &[]);
    let error = read(&mut stream, "GET").err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(server.hits(reset), 1);
    assert_eq!(server.take_requests()[0].status, 0);

    let hang = server.fault(Rule::new(Action::Hang));
    let mut stream = open(&host);
    ask(&mut stream, "GET", &path, &[]);
    assert!(server.wait_hits(hang, 1, LIMIT));
    assert_eq!(server.requests()[0].status, 0);
    let mut gone = open(&host);
    ask(&mut gone, "GET", &path, &[]);
    assert!(server.wait_hits(hang, 2, LIMIT));
    drop(gone);
    assert!(server.wait_connections(1, LIMIT), "a client that left frees its connection");
    server.clear(hang);
    assert_eq!(read(&mut stream, "GET").unwrap().body, data);

    let stall = server.fault(Rule::new(Action::Stall { after: 10 }));
    ask(&mut stream, "GET", &path, &[]);
    assert!(server.wait(LIMIT, |log| log.last().is_some_and(|logged| logged.bytes_sent == 10)));
    server.clear(stall);
    assert_eq!(read(&mut stream, "GET").unwrap().body, data);
}

#[test]
fn rules_choose_their_requests() {
    let (server, _, path) = with_blob();
    let host = server.host();
    let status = |code| Action::Status(code, Vec::new());
    server.fault(Rule::new(status(501)).overlapping(500..510));
    server.fault(Rule::new(status(502)).method("HEAD"));
    server.fault(Rule::new(status(503)).path("/manifests/"));
    server.fault(Rule::new(Action::Delay(Duration::ZERO)));
    server.fault(Rule::new(status(504)).path("/blobs/").nth(2));
    server.fault(Rule::new(status(505)).path("/blobs/").skip(2).times(2));
    let code = |range: &str| get(&host, &path, &[("Range", range)]).status;
    assert_eq!(code("bytes=0-500"), 501);
    assert_eq!(code("bytes=510-600"), 206);
    assert_eq!(code("bytes=0-499"), 504);
    assert_eq!(get(&host, &path, &[]).status, 501, "no range is all of it");
    assert_eq!(get(&host, "/v2/a/b/manifests/x", &[]).status, 503);
    // the last rule saw the first of these requests; the second was taken before it
    assert_eq!(["0", "1", "2", "3"].map(|first| code(&format!("bytes={first}-9"))), [206, 505, 505, 206]);
}

#[test]
fn redirects_carry_a_signature_that_ends() {
    let (server, data, path) = with_blob();
    let target = ScriptedRegistry::start();
    target.put_blob("a/b", data.clone());
    target.set_auth(Auth::Basic { user: "u".to_owned(), password: "p".to_owned() });
    server.fault(Rule::new(Action::Redirect { to: target.url(), expires_after: Some(2) }));
    let answer = get(&server.host(), &format!("{path}?ns=x"), &[]);
    assert_eq!(answer.status, 307);
    let location = answer.header("location").strip_prefix(&target.url()).unwrap().to_owned();
    assert!(location.starts_with(&format!("{path}?ns=x&sig=")));
    let codes = [(); 3].map(|()| get(&target.host(), &location, &[]).status);
    assert_eq!(codes, [200, 200, 403]);
    assert_eq!(get(&target.host(), &path, &[]).status, 401);
    assert_eq!(target.requests().len(), 4);

    server.clear_all();
    server.fault(Rule::new(Action::Redirect { to: String::new(), expires_after: None }));
    let location = get(&server.host(), &path, &[]).header("location").to_owned();
    assert_eq!(get(&server.host(), &location, &[]).body, data);
    server.expire_redirects();
    assert_eq!(get(&server.host(), &location, &[]).status, 403);
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

#[test]
fn basic_authentication() {
    let (server, _, path) = with_blob();
    server.set_auth(Auth::Basic { user: "u".to_owned(), password: "p".to_owned() });
    let code = |header: &str| get(&server.host(), &path, &[("Authorization", header)]).status;
    let refused = get(&server.host(), &path, &[]);
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, "Basic realm=\"scripted\""));
    assert_eq!((code(&basic("u", "p")), code(&basic("u", "x"))), (200, 401));
    server.set_password("x");
    assert_eq!((code(&basic("u", "p")), code(&basic("u", "x"))), (401, 200));
    let log = server.requests();
    assert_eq!(log[0].authorization, None);
    assert_eq!(log[1].authorization.as_ref().unwrap().scheme, "Basic");
    assert_eq!(log[1].authorization, log[3].authorization);
    assert_ne!(log[1].authorization, log[2].authorization);
    assert!(!log[1].headers.contains_key("authorization"));
}

#[test]
fn token_authentication() {
    let (server, _, path) = with_blob();
    let tokens = ScriptedRegistry::start();
    let settings = TokenAuth {
        realm: Some(tokens.url()),
        credentials: Some(("u".to_owned(), "p".to_owned())),
        ttl: Some(Duration::from_secs(300)),
        max_uses: Some(2),
        field: TokenField::Token,
        ..TokenAuth::default()
    };
    server.set_auth(Auth::Token(settings.clone()));
    let host = server.host();
    let challenge = get(&host, &path, &[]);
    let scope = "repository:a/b:pull";
    let expected = format!("Bearer realm=\"{}/token\",service=\"{host}\",scope=\"{scope}\"", tokens.url());
    assert_eq!((challenge.status, challenge.header("www-authenticate")), (401, expected.as_str()));

    let fetch = |scope: &str, password: &str| {
        let target =
            format!("/token?service={}&scope={}", host.replace(':', "%3A"), scope.replace(':', "%3A"));
        get(&tokens.host(), &target, &[("Authorization", &basic("u", password))])
    };
    assert_eq!(fetch(scope, "wrong").status, 401);
    let bearer = |scope: &str| {
        let answer: Value = serde_json::from_slice(&fetch(scope, "p").body).unwrap();
        assert_eq!(answer["expires_in"], 300);
        assert!(answer.get("access_token").is_none());
        format!("Bearer {}", answer["token"].as_str().unwrap())
    };
    let read = |bearer: &str| get(&host, &path, &[("Authorization", bearer)]);
    let token = bearer(scope);
    assert_eq!([(); 3].map(|()| read(&token).status), [200, 200, 401], "used up");
    assert!(read(&token).header("www-authenticate").ends_with("error=\"invalid_token\""));
    let other = read(&bearer("repository:other:pull"));
    assert!(other.header("www-authenticate").ends_with("error=\"insufficient_scope\""));
    let token = bearer("repository:a/b:pull,push");
    server.revoke_tokens();
    server.set_auth(Auth::Token(TokenAuth { expired: Expired::Forbidden, ..settings }));
    let forbidden = read(&token);
    assert_eq!((forbidden.status, forbidden.header("www-authenticate")), (403, ""));
    assert_eq!(get(&host, &path, &[]).status, 401);

    // OAuth 2: the password as a refresh token in a form
    let form =
        format!("grant_type=refresh_token&refresh_token=p&service={host}&scope=repository%3Aa%2Fb%3Apull");
    let mut stream = open(&tokens.host());
    let text = format!("POST /token HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n{form}", form.len());
    stream.get_mut().write_all(text.as_bytes()).unwrap();
    let answer: Value =
        serde_json::from_slice(&super::tests::read(&mut stream, "POST").unwrap().body).unwrap();
    assert_eq!(read(&format!("Bearer {}", answer["token"].as_str().unwrap())).status, 200);
}

#[test]
fn a_stopped_server_comes_back_where_it_was() {
    let (server, data, path) = with_blob();
    let host = server.host();
    let mut stream = open(&host);
    ask(&mut stream, "GET", &path, &[]);
    read(&mut stream, "GET").unwrap();
    server.stop();
    server.stop();
    assert!(TcpStream::connect(&host).is_err());
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "its connections are closed");
    assert_eq!(server.open_connections(), 0);
    server.restart();
    assert_eq!(get(&host, &path, &[]).body, data);
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn async_tests_can_wait() {
    let (server, data, path) = with_blob();
    let hang = server.fault(Rule::new(Action::Hang));
    let host = server.host();
    let client = tokio::task::spawn_blocking(move || get(&host, &path, &[]).body);
    tokio::time::timeout(LIMIT, server.until_hits(hang, 1)).await.unwrap();
    server.clear(hang);
    tokio::time::timeout(LIMIT, server.until(|log| log.iter().any(|logged| logged.finished))).await.unwrap();
    assert_eq!(client.await.unwrap(), data);
}
