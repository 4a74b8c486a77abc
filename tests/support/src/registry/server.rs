//! The HTTP side: connections, routes, bodies that go wrong. What changes the content is `push`'s.
//!
//! One thread with a runtime of its own serves all connections of a server, so that it works under any test. A
//! [`Wire`] wraps each socket: it counts it as open, can make its end a reset, and tells when hyper has handed
//! everything to the kernel. That last is what makes a truncated body exact: hyper drops what it still holds when
//! a body fails, so the body fails only after a flush.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, HeaderValue,
    LOCATION, RANGE, WWW_AUTHENTICATE,
};
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use parking_lot::{Condvar, Mutex};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot, watch};

use super::auth::{self, Auth, Refusal};
use super::fault::{Action, ActiveRule, Asked, RuleId, Turn, next_turn};
use super::log::{Authorization, Logged, RangeAsked};
use super::push::{self, Change};
use crate::sha256_digest;

/// Bytes of the largest piece of a body.
const FRAME: u64 = 128 * 1024;

/// What one server holds and has seen.
#[derive(Debug, Default)]
pub(super) struct State {
    /// (repository, digest) -> content
    pub(super) blobs: HashMap<(String, String), Bytes>,
    /// (repository, tag or digest) -> media type, content
    pub(super) manifests: HashMap<(String, String), (String, Bytes)>,
    /// Uploads by identifier.
    pub(super) uploads: HashMap<String, push::Session>,
    pub(super) last_upload: u64,
    pub(super) rules: Vec<ActiveRule>,
    pub(super) last_rule: u64,
    pub(super) auth: Auth,
    /// Requests by number of arrival.
    pub(super) log: Vec<(u64, Logged)>,
    requests: u64,
    pub(super) open: u64,
    pub(super) accepted: u64,
}

/// The state and who waits for it to change.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) address: SocketAddr,
    state: Mutex<State>,
    blocking: Condvar,
    waiting: Notify,
}

impl Shared {
    pub(super) fn new(address: SocketAddr) -> Shared {
        Shared { address, state: Mutex::default(), blocking: Condvar::new(), waiting: Notify::new() }
    }

    pub(super) fn host(&self) -> String {
        self.address.to_string()
    }

    /// Looks at the state.
    pub(super) fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.lock())
    }

    /// Changes the state and wakes whoever waits for a change.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.blocking.notify_all();
        self.waiting.notify_waiters();
        result
    }

    /// Blocks until `ready` or for `limit`; true if ready.
    pub(super) fn block_until(&self, limit: Duration, mut ready: impl FnMut(&State) -> bool) -> bool {
        let mut state = self.state.lock();
        !self.blocking.wait_while_for(&mut state, |state| !ready(state), limit).timed_out()
    }

    /// Waits until `ready`.
    pub(super) async fn until(&self, mut ready: impl FnMut(&State) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.waiting.notified());
            changed.as_mut().enable(); // before looking, so that no change is lost in between
            if self.look(&mut ready) {
                return;
            }
            changed.await;
        }
    }

    fn record(&self, number: u64, record: impl FnOnce(&mut Logged)) {
        self.change(|state| {
            if let Some((_, logged)) = state.log.iter_mut().rev().find(|(known, _)| *known == number) {
                record(logged);
            }
        });
    }

    async fn cleared(&self, rule: RuleId) {
        self.until(|state| state.rules.iter().all(|active| active.id != rule)).await;
    }
}

/// Serves until `stop` fires or its sender is gone; closes all connections before it returns.
pub(super) fn run(listener: std::net::TcpListener, shared: Arc<Shared>, stop: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener in this runtime");
        let accept = async {
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, shared.clone()));
                }
            }
        };
        tokio::select! {
            _ = stop => {}
            () = accept => {}
        }
    });
    // dropping the runtime drops the tasks and with them the sockets
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let link = Arc::new(Link::default());
    shared.change(|state| {
        state.open += 1;
        state.accepted += 1;
    });
    let wire = Wire { stream: TokioIo::new(stream), link: link.clone(), shared: shared.clone() };
    let service = hyper::service::service_fn(move |request| answer(shared.clone(), link.clone(), request));
    // an error here is a client that left, or a fault that was asked for
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(wire, service).await;
}

/// What bodies and the socket of one connection tell each other.
#[derive(Debug)]
struct Link {
    reset: AtomicBool,
    flushed: watch::Sender<()>,
}

impl Default for Link {
    fn default() -> Link {
        Link { reset: AtomicBool::new(false), flushed: watch::Sender::new(()) }
    }
}

struct Wire {
    stream: TokioIo<TcpStream>,
    link: Arc<Link>,
    shared: Arc<Shared>,
}

impl Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl Write for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.link.flushed.send_replace(());
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.link.reset.load(Ordering::Relaxed) {
            // lingering for no time makes close(2) send RST
            let _ = rustix::net::sockopt::set_socket_linger(self.stream.inner(), Some(Duration::ZERO));
        }
        self.shared.change(|state| state.open -= 1);
    }
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Where a request leads.
#[derive(Debug)]
pub(super) enum Route {
    Ping,
    Token,
    Uploads { repository: String },
    Upload { repository: String, id: String },
    Blob { repository: String, digest: String },
    Manifest { repository: String, reference: String },
    Tags { repository: String },
    Nowhere,
}

impl Route {
    fn of(path: &str) -> Route {
        let Some(rest) = path.strip_prefix("/v2") else {
            return if path == "/token" { Route::Token } else { Route::Nowhere };
        };
        let Some(rest) = rest.strip_prefix('/').filter(|rest| !rest.is_empty()) else { return Route::Ping };
        if let Some((repository, id)) = rest.rsplit_once("/blobs/uploads/") {
            let (repository, id) = (repository.to_owned(), id.to_owned());
            return if id.is_empty() {
                Route::Uploads { repository }
            } else {
                Route::Upload { repository, id }
            };
        }
        if let Some((repository, digest)) = rest.rsplit_once("/blobs/") {
            return Route::Blob { repository: repository.to_owned(), digest: digest.to_owned() };
        }
        if let Some((repository, reference)) = rest.rsplit_once("/manifests/") {
            return Route::Manifest { repository: repository.to_owned(), reference: reference.to_owned() };
        }
        match rest.strip_suffix("/tags/list") {
            Some(repository) => Route::Tags { repository: repository.to_owned() },
            None => Route::Nowhere,
        }
    }

    pub(super) fn repository(&self) -> Option<&str> {
        match self {
            Route::Uploads { repository }
            | Route::Upload { repository, .. }
            | Route::Blob { repository, .. }
            | Route::Manifest { repository, .. }
            | Route::Tags { repository } => Some(repository),
            _ => None,
        }
    }
}

/// An answer before faults.
#[derive(Debug)]
pub(super) struct Content {
    status: u16,
    media_type: String,
    data: Bytes,
    /// `Docker-Content-Digest`.
    pub(super) digest: Option<String>,
    /// Ranges of it can be asked for.
    ranges: bool,
}

impl Content {
    pub(super) fn empty(status: u16) -> Content {
        Content { status, media_type: String::new(), data: Bytes::new(), digest: None, ranges: false }
    }

    fn json(status: u16, text: String) -> Content {
        let media_type = "application/json".to_owned();
        Content { status, media_type, data: text.into(), digest: None, ranges: false }
    }

    pub(super) fn error(status: u16, code: &str) -> Content {
        let errors = serde_json::json!({ "errors": [{ "code": code, "message": code.to_lowercase() }] });
        Content::json(status, errors.to_string())
    }
}

/// How a body is sent.
#[derive(Debug, Default)]
struct Sending {
    /// Bytes after which something happens.
    cut: Option<(u64, Cut)>,
    /// Bytes a second.
    rate: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Cut {
    Close,
    Stall(RuleId),
}

async fn answer(
    shared: Arc<Shared>,
    link: Arc<Link>,
    request: Request<Incoming>,
) -> Result<Response<Body>, io::Error> {
    let (parts, mut body) = request.into_parts();
    let text = |name: HeaderName| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let authorization = text(AUTHORIZATION);
    let range = text(RANGE).map(RangeAsked::parse);
    let path = parts.uri.path();
    let query = parts.uri.query().unwrap_or("");
    let number = shared.change(|state| {
        let headers = parts.headers.iter().filter(|(name, _)| **name != AUTHORIZATION);
        let logged = Logged {
            method: parts.method.as_str().to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            range: range.clone(),
            status: 0,
            bytes_received: 0,
            bytes_sent: 0,
            finished: false,
            authorization: authorization.map(Authorization::of),
            headers: headers
                .map(|(name, value)| {
                    (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into())
                })
                .collect(),
        };
        state.requests += 1;
        state.log.push((state.requests, logged));
        state.requests
    });
    let sender = Sender { shared: shared.clone(), link, number, head: parts.method == "HEAD" };

    let route = Route::of(path);
    let method = parts.method.as_str();
    let form = decode_form(query);
    let is_change = push::is_change(method, &route);
    let signature = query.split('&').find_map(|pair| pair.strip_prefix("sig="));
    let admitted = match signature {
        _ if matches!(route, Route::Token) => {
            let mut form = form.clone();
            let sent = push::receive(&mut body, 64 * 1024).await.data;
            form.extend(decode_form(&String::from_utf8_lossy(&sent)));
            let token = auth::issue(&form, authorization);
            Ok(token.map_or_else(|| Content::error(401, "UNAUTHORIZED"), |token| Content::json(200, token)))
        }
        Some(signature) if auth::use_signature(signature) => Ok(find(&shared, &route)),
        Some(_) => Err(Refusal { status: 403, challenge: None }),
        None => {
            let settings = shared.look(|state| state.auth.clone());
            auth::check(&shared.host(), &settings, &push::needs(method, &route, &form), authorization)
                .map(|()| find(&shared, &route))
        }
    };
    let mut content = match admitted {
        Ok(content) => content,
        Err(refusal) => {
            // or the client might be told of a closed connection before it reads the answer
            sender.take(&mut body, u64::MAX).await;
            let challenge = refusal.challenge.map(|challenge| (WWW_AUTHENTICATE.to_string(), challenge));
            let denied = Content::error(refusal.status, "UNAUTHORIZED");
            return sender.send(denied, None, challenge.as_slice(), Sending::default());
        }
    };

    let whole = 0..content.data.len() as u64;
    let resolved = range.as_ref().filter(|_| content.ranges).and_then(|range| range.resolve(whole.end));
    let brought = text(CONTENT_RANGE).map(push::content_range);
    let asked = Asked {
        method,
        path,
        range: match &brought {
            Some(Ok(brought)) if is_change => Some(brought.clone()),
            _ => content.ranges.then(|| resolved.and_then(Result::ok).unwrap_or(whole.clone())),
        },
        signed: signature.is_some(),
    };
    let mut after = None;
    let mut headers = Vec::new();
    let (rule, action) = loop {
        match shared.change(|state| next_turn(&mut state.rules, after, &asked)) {
            Turn::Pass => break (None, None),
            Turn::Act(rule, action) => break (Some(rule), Some(action)),
            Turn::Hang(rule) => {
                shared.cleared(rule).await;
                after = Some(rule);
            }
            Turn::Delay(rule, time) => {
                tokio::time::sleep(time).await;
                after = Some(rule);
            }
            Turn::Headers(rule, set) => {
                headers.extend(set);
                after = Some(rule);
            }
        }
    };

    if is_change && !matches!(action, Some(Action::Reset)) {
        let limit = if let Some(Action::AcceptThenReset(limit)) = action { limit } else { u64::MAX };
        let received = sender.take(&mut body, limit).await;
        if !matches!(action, Some(Action::Status(..) | Action::Redirect { .. })) {
            let media_type = text(CONTENT_TYPE).unwrap_or("");
            let change = Change { method, route: &route, query: &form, media_type, range: brought };
            let (answer, mut own) = shared.change(|state| change.apply(state, received));
            content = answer;
            own.append(&mut headers);
            headers = own;
        }
    }

    let mut range = range.filter(|_| content.ranges);
    let mut sending = Sending::default();
    match action {
        None => {}
        Some(Action::Status(status, set)) => {
            headers.extend(set);
            return sender.send(Content::empty(status), None, &headers, sending);
        }
        Some(Action::Reset | Action::AcceptThenReset(_)) => {
            sender.link.reset.store(true, Ordering::Relaxed);
            return Err(io::Error::other("reset by rule"));
        }
        Some(Action::Redirect { to, expires_after }) => {
            let signature = auth::sign(&shared.host(), expires_after);
            let location =
                format!("{to}{path}?{query}{}sig={signature}", if query.is_empty() { "" } else { "&" });
            headers.push((LOCATION.to_string(), location));
            return sender.send(Content::json(307, String::new()), None, &headers, sending);
        }
        Some(Action::Full200) => range = None,
        Some(Action::Shorten(length)) => {
            if let Some(Ok(resolved)) = range.as_ref().and_then(|range| range.resolve(whole.end)) {
                range = Some(RangeAsked::Single(resolved.start..resolved.end.min(resolved.start + length)));
            }
        }
        Some(Action::FlipBit(bit)) => {
            let mut data = content.data.to_vec();
            if let Some(byte) = data.get_mut((bit / 8) as usize) {
                *byte ^= 1 << (bit % 8);
            }
            content.data = data.into();
        }
        Some(Action::Substitute(data)) => content.data = data,
        Some(Action::Truncate(length)) => sending.cut = Some((length, Cut::Close)),
        Some(Action::Stall { after }) => {
            sending.cut = rule.map(|rule| (after, Cut::Stall(rule)));
        }
        Some(Action::Throttle(rate)) => sending.rate = Some(rate.max(1)),
        Some(Action::Hang | Action::Delay(_) | Action::Headers(_)) => unreachable!("handled in turn"),
    }
    let resolved = range.and_then(|range| range.resolve(content.data.len() as u64));
    sender.send(content, resolved, &headers, sending)
}

fn find(shared: &Shared, route: &Route) -> Content {
    shared.look(|state| match route {
        Route::Ping => Content::json(200, "{}".to_owned()),
        Route::Blob { repository, digest } => match state.blobs.get(&(repository.clone(), digest.clone())) {
            None => Content::error(404, "BLOB_UNKNOWN"),
            Some(data) => Content {
                status: 200,
                media_type: "application/octet-stream".to_owned(),
                data: data.clone(),
                digest: Some(digest.clone()),
                ranges: true,
            },
        },
        Route::Manifest { repository, reference } => {
            match state.manifests.get(&(repository.clone(), reference.clone())) {
                None => Content::error(404, "MANIFEST_UNKNOWN"),
                Some((media_type, data)) => Content {
                    status: 200,
                    media_type: media_type.clone(),
                    data: data.clone(),
                    digest: Some(sha256_digest(data)),
                    ranges: false,
                },
            }
        }
        Route::Tags { repository } => {
            let known = state.manifests.keys().filter(|(name, tag)| name == repository && !tag.contains(':'));
            let mut tags: Vec<&str> = known.map(|(_, tag)| tag.as_str()).collect();
            tags.sort_unstable();
            Content::json(200, serde_json::json!({ "name": repository, "tags": tags }).to_string())
        }
        Route::Token | Route::Uploads { .. } | Route::Upload { .. } | Route::Nowhere => {
            Content::error(404, "UNSUPPORTED")
        }
    })
}

/// `a=b&c=d` with percent and plus decoded.
fn decode_form(text: &str) -> Vec<(String, String)> {
    let decode = |part: &str| {
        let bytes = part.replace('+', " ").into_bytes();
        let mut out = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let hex = bytes.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
            let hex = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
            out.push(hex.unwrap_or(bytes[at]));
            at += if hex.is_some() { 3 } else { 1 };
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

/// Sends the answer to one request and keeps its log entry.
struct Sender {
    shared: Arc<Shared>,
    link: Arc<Link>,
    number: u64,
    head: bool,
}

impl Sender {
    /// Takes at most `limit` bytes of the request's body.
    async fn take(&self, body: &mut Incoming, limit: u64) -> push::Received {
        let received = push::receive(body, limit).await;
        let length = received.data.len() as u64;
        self.shared.record(self.number, |logged| logged.bytes_received = length);
        received
    }

    /// `range` is that of the content to answer with: `None` for all of it with the content's own status.
    fn send(
        self,
        content: Content,
        range: Option<Result<Range<u64>, ()>>,
        headers: &[(String, String)],
        sending: Sending,
    ) -> Result<Response<Body>, io::Error> {
        let size = content.data.len() as u64;
        let (status, data, content_range) = match range {
            None => (content.status, content.data, None),
            Some(Err(())) => (416, Bytes::new(), Some(format!("bytes */{size}"))),
            Some(Ok(range)) => {
                let told = format!("bytes {}-{}/{size}", range.start, range.end - 1);
                (206, content.data.slice(range.start as usize..range.end as usize), Some(told))
            }
        };
        let mut response = Response::builder().status(status);
        if status != 204 {
            response = response.header(CONTENT_LENGTH, data.len());
        }
        if !content.media_type.is_empty() {
            response = response.header(CONTENT_TYPE, content.media_type);
        }
        if let Some(content_range) = content_range {
            response = response.header(CONTENT_RANGE, content_range);
        }
        if content.ranges {
            response = response.header(ACCEPT_RANGES, "bytes");
        }
        if let Some(digest) = content.digest {
            response = response.header("docker-content-digest", digest);
        }
        let head = self.head;
        self.shared.record(self.number, |logged| {
            logged.status = status;
            logged.finished = head || data.is_empty();
        });
        let body = if head || data.is_empty() {
            Empty::new().map_err(|never| match never {}).boxed_unsync()
        } else {
            BodyExt::boxed_unsync(StreamBody::new(self.stream(data, sending)))
        };
        let mut response = response.body(body).map_err(io::Error::other)?;
        for (name, value) in headers {
            let name = HeaderName::try_from(name).map_err(io::Error::other)?;
            let value = HeaderValue::try_from(value).map_err(io::Error::other)?;
            response.headers_mut().insert(name, value);
        }
        Ok(response)
    }

    fn stream(
        self,
        data: Bytes,
        sending: Sending,
    ) -> impl futures::Stream<Item = io::Result<Frame<Bytes>>> + Send + 'static {
        futures::stream::unfold(
            (self, data, sending, 0),
            |(sender, mut data, mut sending, sent)| async move {
                if data.is_empty() {
                    return None;
                }
                if let Some((at, cut)) = sending.cut
                    && sent >= at
                {
                    match cut {
                        Cut::Close => {
                            let mut flushed = sender.link.flushed.subscribe();
                            let _ = flushed.changed().await;
                            let error = io::Error::other("truncated by rule");
                            return Some((Err(error), (sender, Bytes::new(), sending, sent)));
                        }
                        Cut::Stall(rule) => {
                            sender.shared.cleared(rule).await;
                            sending.cut = None;
                        }
                    }
                }
                let mut length = FRAME.min(data.len() as u64);
                if let Some(rate) = sending.rate {
                    length = length.min((rate / 20).max(1));
                    tokio::time::sleep(Duration::from_secs_f64(length as f64 / rate as f64)).await;
                }
                if let Some((at, _)) = sending.cut {
                    length = length.min(at - sent);
                }
                let piece = data.split_to(length as usize);
                sender.shared.record(sender.number, |logged| {
                    logged.bytes_sent += length;
                    logged.finished = data.is_empty();
                });
                Some((Ok(Frame::data(piece)), (sender, data, sending, sent + length)))
            },
        )
    }
}
