//! Uploads, mounts and what else changes a server's content.
//!
//! An upload is a session of one server with an identifier in its path and a secret in the query of its location; a
//! request without the secret is answered as if there were no such session. Chunks carry `Content-Range: a-b`, and one
//! that does not begin where the session ends is answered 416. A manifest is taken only if all it names is there.
//!
//! Source: OCI distribution specification 1.1, "Push".

use std::ops::Range;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::Value;

use super::server::{Content, Route, State};
use crate::{sha256_digest, sha256_hex};

/// Bytes of a blob on their way.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) repository: String,
    secret: String,
    pub(super) data: Vec<u8>,
}

/// What a changing request says apart from its body.
#[derive(Debug)]
pub(super) struct Change<'a> {
    pub(super) method: &'a str,
    pub(super) route: &'a Route,
    /// Decoded pairs of the query.
    pub(super) query: &'a [(String, String)],
    pub(super) media_type: &'a str,
    /// `Content-Range`, end exclusive; `Err` for one that cannot be read.
    pub(super) range: Option<Result<Range<u64>, ()>>,
}

/// A body as far as it was taken.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) data: Bytes,
    /// It came to its end.
    pub(super) whole: bool,
}

/// Takes at most `limit` bytes of a body.
pub(super) async fn receive(body: &mut Incoming, limit: u64) -> Received {
    let mut data = Vec::new();
    while (data.len() as u64) < limit {
        match body.frame().await {
            None => return Received { data: data.into(), whole: true },
            Some(Err(_)) => break,
            Some(Ok(frame)) => data.extend_from_slice(&frame.into_data().unwrap_or_default()),
        }
    }
    data.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    Received { data: data.into(), whole: false }
}

/// `a-b` with the end exclusive, as chunks say where they belong.
pub(super) fn content_range(header: &str) -> Result<Range<u64>, ()> {
    let (first, last) = header.split_once('-').ok_or(())?;
    let (first, last): (u64, u64) = (first.parse().map_err(|_| ())?, last.parse().map_err(|_| ())?);
    if first <= last { Ok(first..last + 1) } else { Err(()) }
}

/// Whether a request is answered here.
pub(super) fn is_change(method: &str, route: &Route) -> bool {
    match route {
        Route::Token => false,
        Route::Uploads { .. } | Route::Upload { .. } => true,
        _ => !matches!(method, "GET" | "HEAD"),
    }
}

/// What a request must be allowed to do, as repositories and actions.
pub(super) fn needs(method: &str, route: &Route, query: &[(String, String)]) -> Vec<(String, &'static str)> {
    let Some(repository) = route.repository() else { return Vec::new() };
    let mut needs = vec![(repository.to_owned(), "pull")];
    if is_change(method, route) {
        needs.push((repository.to_owned(), "push"));
        let from = query.iter().find(|(key, _)| key == "from");
        needs.extend(from.map(|(_, from)| (from.clone(), "pull")));
    }
    needs
}

impl Change<'_> {
    fn field(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Carries the change out, as far as the body came, and answers with headers of its own.
    pub(super) fn apply(&self, state: &mut State, body: Received) -> (Content, Vec<(String, String)>) {
        match (self.method, self.route) {
            ("POST", Route::Uploads { repository }) => self.begin(state, repository),
            ("GET" | "HEAD" | "PATCH" | "PUT" | "DELETE", Route::Upload { repository, id }) => {
                let secret = self.field("secret");
                let known = state.uploads.get(id);
                if known
                    .is_none_or(|one| one.repository != *repository || Some(one.secret.as_str()) != secret)
                {
                    return plain(404, "BLOB_UPLOAD_UNKNOWN");
                }
                self.go_on(state, repository, id, body)
            }
            ("PUT", Route::Manifest { repository, reference }) if body.whole => {
                self.put_manifest(state, repository, reference, body.data)
            }
            ("DELETE", Route::Manifest { repository, reference }) => {
                match state.manifests.remove(&(repository.clone(), reference.clone())) {
                    Some(_) => (Content::empty(202), Vec::new()),
                    None => plain(404, "MANIFEST_UNKNOWN"),
                }
            }
            ("DELETE", Route::Blob { repository, digest }) => {
                match state.blobs.remove(&(repository.clone(), digest.clone())) {
                    Some(_) => (Content::empty(202), Vec::new()),
                    None => plain(404, "BLOB_UNKNOWN"),
                }
            }
            _ => plain(405, "UNSUPPORTED"),
        }
    }

    fn begin(&self, state: &mut State, repository: &str) -> (Content, Vec<(String, String)>) {
        if let (Some(digest), Some(from)) = (self.field("mount"), self.field("from"))
            && let Some(data) = state.blobs.get(&(from.to_owned(), digest.to_owned())).cloned()
        {
            state.blobs.insert((repository.to_owned(), digest.to_owned()), data);
            return made(format!("/v2/{repository}/blobs/{digest}"), digest);
        }
        let id = open(state, repository);
        session(state, &id, 202)
    }

    fn go_on(
        &self,
        state: &mut State,
        repository: &str,
        id: &str,
        body: Received,
    ) -> (Content, Vec<(String, String)>) {
        let Some(upload) = state.uploads.get_mut(id) else { return plain(404, "BLOB_UPLOAD_UNKNOWN") };
        if matches!(self.method, "PATCH" | "PUT") {
            let at = upload.data.len() as u64;
            let end = at + body.data.len() as u64;
            let fits = match &self.range {
                None => true,
                Some(Ok(range)) => range.start == at && (range.end == end || !body.whole && range.end > end),
                Some(Err(())) => false,
            };
            if !fits {
                let (_, headers) = session(state, id, 416);
                return (Content::error(416, "BLOB_UPLOAD_INVALID"), headers);
            }
            upload.data.extend_from_slice(&body.data);
        }
        match self.method {
            "PATCH" => session(state, id, 202),
            "PUT" if body.whole => {
                let data = state.uploads.remove(id).map(|upload| upload.data).unwrap_or_default();
                match self.field("digest") {
                    Some(digest) if digest == sha256_digest(&data) => {
                        state.blobs.insert((repository.to_owned(), digest.to_owned()), data.into());
                        made(format!("/v2/{repository}/blobs/{digest}"), digest)
                    }
                    _ => plain(400, "DIGEST_INVALID"),
                }
            }
            "DELETE" => {
                state.uploads.remove(id);
                (Content::empty(204), Vec::new())
            }
            _ => session(state, id, 204),
        }
    }

    fn put_manifest(
        &self,
        state: &mut State,
        repository: &str,
        reference: &str,
        data: Bytes,
    ) -> (Content, Vec<(String, String)>) {
        let digest = sha256_digest(&data);
        if reference.contains(':') && reference != digest {
            return plain(400, "DIGEST_INVALID");
        }
        let Ok(document) = serde_json::from_slice::<Value>(&data) else {
            return plain(400, "MANIFEST_INVALID");
        };
        let named = |key: &str| {
            let one_or_more = document.get(key).cloned().unwrap_or_default();
            let all = match one_or_more {
                Value::Array(all) => all,
                one => vec![one],
            };
            let digests = all.into_iter().filter_map(|one| Some(one.get("digest")?.as_str()?.to_owned()));
            digests.map(|digest| (repository.to_owned(), digest)).collect::<Vec<_>>()
        };
        let there =
            ["config", "layers"].into_iter().flat_map(named).all(|key| state.blobs.contains_key(&key))
                && named("manifests").iter().all(|key| state.manifests.contains_key(key));
        if !there {
            return plain(400, "MANIFEST_BLOB_UNKNOWN");
        }
        for name in [reference, digest.as_str()] {
            let key = (repository.to_owned(), name.to_owned());
            state.manifests.insert(key, (self.media_type.to_owned(), data.clone()));
        }
        made(format!("/v2/{repository}/manifests/{digest}"), &digest)
    }
}

/// Begins a session; returns its identifier.
pub(super) fn open(state: &mut State, repository: &str) -> String {
    state.last_upload += 1;
    let id = format!("upload-{}", state.last_upload);
    let secret = sha256_hex(format!("{repository} {id} {}", std::process::id()).as_bytes())[..32].to_owned();
    let session = Session { repository: repository.to_owned(), secret, data: Vec::new() };
    state.uploads.insert(id.clone(), session);
    id
}

/// Path and query of a session.
pub(super) fn location(state: &State, id: &str) -> String {
    let Session { repository, secret, .. } = &state.uploads[id];
    format!("/v2/{repository}/blobs/uploads/{id}?secret={secret}")
}

fn session(state: &State, id: &str, status: u16) -> (Content, Vec<(String, String)>) {
    let last = state.uploads[id].data.len().saturating_sub(1);
    let headers = [
        ("location", location(state, id)),
        ("range", format!("0-{last}")),
        ("docker-upload-uuid", id.to_owned()),
    ];
    (Content::empty(status), headers.map(|(name, value)| (name.to_owned(), value)).into())
}

fn made(location: String, digest: &str) -> (Content, Vec<(String, String)>) {
    let mut content = Content::empty(201);
    content.digest = Some(digest.to_owned());
    (content, vec![("location".to_owned(), location)])
}

fn plain(status: u16, code: &str) -> (Content, Vec<(String, String)>) {
    (Content::error(status, code), Vec::new())
}
