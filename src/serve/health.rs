//! `GET /healthz`, for whoever watches the node: whether the mount answers.
//!
//! Says 200 as long as a look through the mount is answered, or there is none to look through, and 503 with the reason
//! otherwise. The look is the watchdog's; many askers share one.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use fusefs::Plane;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::watchdog;

/// How long a look may take: a probe of Kubernetes waits for a second unless told otherwise.
const LIMIT: Duration = Duration::from_millis(900);
/// What was seen is true for so long.
const FRESH: Duration = Duration::from_millis(500);
/// Who has connected must ask within this.
const PATIENCE: Duration = Duration::from_secs(10);

/// The last look.
struct Look {
    at: Instant,
    /// What is wrong, if anything is.
    found: Result<(), String>,
}

/// Answers on the address until the process ends.
///
/// # Errors
///
/// The address cannot be listened on.
pub async fn serve(address: &str, plane: Arc<Plane>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address} (health.address)"))?;
    let last: Arc<Mutex<Option<Look>>> = Arc::default();
    tokio::spawn(async move {
        loop {
            let Ok((connection, _)) = listener.accept().await else {
                // No descriptors: they come back.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let (plane, last) = (plane.clone(), last.clone());
            let answer = move |request| {
                let (plane, last) = (plane.clone(), last.clone());
                async move { Ok::<_, Infallible>(answer(&request, &plane, &last).await) }
            };
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
            let served = http.serve_connection(TokioIo::new(connection), hyper::service::service_fn(answer));
            // An error is the asker's affair.
            tokio::spawn(async move { drop(served.await) });
        }
    });
    Ok(())
}

async fn answer(request: &Request<Incoming>, plane: &Plane, last: &Mutex<Option<Look>>) -> Response<Body> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => match look(plane, last).await {
            Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        (_, "/healthz") => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "only /healthz\n".to_owned()),
    };
    let mut response = Response::new(Body::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}

type Body = http_body_util::Full<Bytes>;

/// Looks, or says what was seen a moment ago.
async fn look(plane: &Plane, last: &Mutex<Option<Look>>) -> Result<(), String> {
    let mut last = last.lock().await;
    if let Some(look) = last.as_ref().filter(|look| look.at.elapsed() < FRESH) {
        return look.found.clone();
    }
    let found =
        watchdog::look(plane, LIMIT).await.map_err(|error| format!("the mount does not answer: {error:#}"));
    *last = Some(Look { at: Instant::now(), found: found.clone() });
    found
}
