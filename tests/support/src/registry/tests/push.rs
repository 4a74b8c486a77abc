//! Uploads, mounts, manifests and the rules that meet them.

use super::*;

fn send(
    host: &str,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Answer> {
    let mut stream = open(host);
    let length = body.len().to_string();
    let mut headers = headers.to_vec();
    headers.push(("Content-Length", &length));
    ask(&mut stream, method, target, &headers);
    stream.get_mut().write_all(body)?;
    read(&mut stream, method)
}

fn put(host: &str, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    send(host, method, target, headers, body).unwrap()
}

/// A server and the location of a new upload.
fn with_upload() -> (ScriptedRegistry, String, String) {
    let server = ScriptedRegistry::start();
    let host = server.host();
    let begun = put(&host, "POST", "/v2/a/b/blobs/uploads/", &[], b"");
    assert_eq!((begun.status, begun.header("range")), (202, "0-0"));
    let location = begun.header("location").to_owned();
    assert!(location.starts_with(&format!("/v2/a/b/blobs/uploads/{}", begun.header("docker-upload-uuid"))));
    assert_eq!(server.uploads_open(), 1);
    (server, host, location)
}

#[test]
fn a_blob_in_chunks() {
    let (server, host, location) = with_upload();
    let digest = sha256_digest(b"abcdef");
    let first = put(&host, "PATCH", &location, &[("Content-Range", "0-2")], b"abc");
    assert_eq!((first.status, first.header("range")), (202, "0-2"));
    for range in ["0-2", "4-6", "3-6", "x"] {
        let wrong = put(&host, "PATCH", &location, &[("Content-Range", range)], b"def");
        assert_eq!((wrong.status, wrong.header("range")), (416, "0-2"), "{range}");
    }
    let status = get(&host, &location, &[]);
    assert_eq!((status.status, status.header("range"), status.header("location")), (204, "0-2", &*location));
    assert_eq!(put(&host, "PATCH", &location, &[], b"def").status, 202);
    let stored = put(&host, "PUT", &format!("{location}&digest={digest}"), &[], b"");
    assert_eq!((stored.status, stored.header("docker-content-digest")), (201, &*digest));
    assert_eq!(stored.header("location"), format!("/v2/a/b/blobs/{digest}"));
    assert_eq!(server.uploads_open(), 0);
    assert_eq!(server.blob("a/b", &digest).unwrap(), &b"abcdef"[..]);
    let head = server.requests().into_iter().find(|logged| logged.method == "PATCH").unwrap();
    assert_eq!((head.bytes_received, head.status), (3, 202));
    assert_eq!(put(&host, "PATCH", &location, &[], b"x").status, 404);
    assert_eq!(put(&host, "DELETE", &format!("/v2/a/b/blobs/{digest}"), &[], b"").status, 202);
    assert_eq!(server.blob("a/b", &digest), None);
}

#[test]
fn a_blob_in_one_piece_and_others_that_come_to_nothing() {
    let (server, host, location) = with_upload();
    let (digest, other) = (sha256_digest(b"abc"), sha256_digest(b"x"));
    let path = location.split('?').next().unwrap();
    assert_eq!(put(&host, "PUT", &format!("{path}?digest={digest}"), &[], b"abc").status, 404, "no secret");
    assert_eq!(put(&host, "PUT", &format!("{location}&digest={digest}"), &[], b"abc").status, 201);
    let other_repository = server.open_upload("c").replace("/v2/c/", "/v2/d/");
    assert_eq!(put(&host, "PATCH", &other_repository, &[], b"abc").status, 404);
    server.drop_uploads();
    let wrong = put(&host, "PUT", &format!("{}&digest={other}", server.open_upload("a")), &[], b"abc");
    assert_eq!(wrong.status, 400);
    assert!(String::from_utf8_lossy(&wrong.body).contains("DIGEST_INVALID"));
    assert_eq!(server.uploads_open(), 0);
    assert_eq!(put(&host, "DELETE", &server.open_upload("a"), &[], b"").status, 204);
    assert_eq!(server.uploads_open(), 0);
}

#[test]
fn mounts() {
    let server = ScriptedRegistry::start();
    let digest = server.put_blob("a", "abc");
    let mount = |from: &str| {
        put(&server.host(), "POST", &format!("/v2/b/blobs/uploads/?mount={digest}&from={from}"), &[], b"")
    };
    assert_eq!((mount("c").status, server.uploads_open()), (202, 1));
    let mounted = mount("a");
    assert_eq!((mounted.status, mounted.header("docker-content-digest")), (201, &*digest));
    assert_eq!(get(&server.host(), &format!("/v2/b/blobs/{digest}"), &[]).body, b"abc");
}

#[test]
fn manifests_need_what_they_name() {
    let server = ScriptedRegistry::start();
    let host = server.host();
    let layer = server.put_blob("a", "layer");
    let manifest = json!({ "config": { "digest": sha256_digest(b"{}") }, "layers": [{ "digest": layer }] });
    let (manifest, media_type) = (manifest.to_string(), [("Content-Type", MANIFEST)]);
    let push = |name: &str, bytes: &str| {
        put(&host, "PUT", &format!("/v2/a/manifests/{name}"), &media_type, bytes.as_bytes())
    };
    let refused = push("v1", &manifest);
    assert_eq!(refused.status, 400);
    assert!(String::from_utf8_lossy(&refused.body).contains("MANIFEST_BLOB_UNKNOWN"));
    server.put_blob("a", "{}");
    let taken = push("v1", &manifest);
    let digest = sha256_digest(manifest.as_bytes());
    assert_eq!((taken.status, taken.header("docker-content-digest")), (201, &*digest));
    assert_eq!(server.manifest("a", &digest), Some((MANIFEST.to_owned(), manifest.clone().into())));
    assert_eq!(get(&host, "/v2/a/manifests/v1", &[]).header("content-type"), MANIFEST);
    assert_eq!(push(&sha256_digest(b"x"), &manifest).status, 400);
    let index = json!({ "manifests": [{ "digest": digest }] }).to_string();
    assert_eq!(push(&sha256_digest(index.as_bytes()), &index).status, 201);
    assert_eq!(push("v2", &index.replace("sha256:", "sha256:0")).status, 400);
    assert_eq!(put(&host, "DELETE", "/v2/a/manifests/v1", &[], b"").status, 202);
    assert_eq!(server.manifest("a", "v1"), None);
    assert_eq!(put(&host, "POST", "/v2/a/manifests/v1", &[], b"").status, 405);
}

#[test]
fn faults_meet_uploads() {
    let (server, host, location) = with_upload();
    let data = vec![7; 300_000];
    server.fault(Rule::new(Action::AcceptThenReset(100_000)).method("PATCH").times(1));
    let range = |range: &'static str| [("Content-Range", range)];
    assert!(send(&host, "PATCH", &location, &range("0-299999"), &data).is_err());
    assert!(server.wait_connections(0, LIMIT));
    assert_eq!(get(&host, &location, &[]).header("range"), "0-99999");
    server.fault(Rule::new(Action::Reset).method("PATCH").overlapping(100_000..100_001).times(1));
    assert!(send(&host, "PATCH", &location, &range("100000-299999"), &data[100_000..]).is_err());
    assert_eq!(get(&host, &location, &[]).header("range"), "0-99999");
    let status = Action::Status(503, vec![("Retry-After".to_owned(), "1".to_owned())]);
    server.fault(Rule::new(status).method("PATCH").times(1));
    let later = put(&host, "PATCH", &location, &range("100000-299999"), &data[100_000..]);
    assert_eq!((later.status, later.header("retry-after")), (503, "1"));
    let set = vec![("Location".to_owned(), "http://elsewhere/".to_owned())];
    server.fault(Rule::new(Action::Headers(set)).method("PATCH").times(1));
    let moved = put(&host, "PATCH", &location, &range("100000-299999"), &data[100_000..]);
    assert_eq!((moved.status, moved.header("location")), (202, "http://elsewhere/"));
    let digest = sha256_digest(&data);
    server.fault(Rule::new(Action::AcceptThenReset(u64::MAX)).method("PUT").times(1));
    assert!(send(&host, "PUT", &format!("{location}&digest={digest}"), &[], b"").is_err());
    assert_eq!(server.blob("a/b", &digest).unwrap(), data);
    let taken: Vec<u64> = server.requests().iter().map(|logged| logged.bytes_received).collect();
    assert_eq!(taken, [0, 100_000, 0, 0, 0, 200_000, 200_000, 0]);
}

#[test]
fn tokens_for_pushing() {
    let server = ScriptedRegistry::start();
    server.set_auth(Auth::Token(TokenAuth {
        withheld: vec![("c".to_owned(), "push".to_owned())],
        ..TokenAuth::default()
    }));
    let host = server.host();
    let post = |target: &str, headers: &[(&str, &str)]| put(&host, "POST", target, headers, b"");
    let target = |repository: &str| format!("/v2/{repository}/blobs/uploads/");
    let scope = |answer: &Answer| {
        let challenge = answer.header("www-authenticate").to_owned();
        challenge.split("scope=\"").nth(1).unwrap().split('"').next().unwrap().to_owned()
    };
    assert_eq!(scope(&post(&target("a"), &[])), "repository:a:pull,push");
    let mount = format!("{}?mount=x&from=b", target("a"));
    assert_eq!(scope(&post(&mount, &[])), "repository:a:pull,push repository:b:pull");
    let bearer = |scope: &str| {
        let answer = get(&host, &format!("/token?service={host}&scope={scope}"), &[]);
        let answer: Value = serde_json::from_slice(&answer.body).unwrap();
        format!("Bearer {}", answer["token"].as_str().unwrap())
    };
    let status = |target: &str, scope: &str| post(target, &[("Authorization", &bearer(scope))]).status;
    assert_eq!(status(&target("a"), "repository:a:pull"), 401);
    assert_eq!(status(&target("a"), "repository:a:pull,push"), 202);
    assert_eq!(status(&target("a"), "repository:a:*"), 202);
    assert_eq!(status(&mount, "repository:a:pull,push"), 401);
    assert_eq!(status(&mount, "repository:a:pull,push&scope=repository:b:pull"), 202);
    assert_eq!(status(&target("c"), "repository:c:pull,push"), 401, "withheld");
}
