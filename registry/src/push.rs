//! Changing a repository: what it has already, mounts, manifests, and the one way every change asks.
//!
//! Only the origin is asked, by the rounds of `exchange`, for a token that may push. Nothing here streams:
//! blobs on their way are `upload`'s.
//!
//! Protocol: OCI distribution specification 1.1, "Push".

use crate::auth::Access;
use crate::client::{MANIFEST_LIMIT, Registry};
use crate::digest::Digest;
use crate::exchange::{Arrival, Ask, Exchange, Job, Visit};
use crate::reference::check_repository;
use crate::retry::{Cause, Verdict, classify};
use crate::secret::SignedUrl;
use crate::source::{Name, Source};
use crate::transport;
use crate::upload::{Upload, UploadOptions};
use crate::{Error, Reference};
use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::time::Instant;

/// Bytes read of an answer that says what was wrong.
const COMPLAINT_LIMIT: usize = 64 << 10;

impl Registry {
    /// The size in bytes of a blob of the reference's repository, or `None` if it has no such blob. A
    /// registry that has it and does not say how large it is counts as not having it: pushing a blob again
    /// is always right.
    ///
    /// # Errors
    ///
    /// Those of the origin; [`Error::BadDigest`].
    pub async fn has_blob(
        &self,
        reference: &Reference,
        digest: &str,
        deadline: Instant,
    ) -> Result<Option<u64>, Error> {
        let source = self.change(reference, Name::Blob(Digest::parse(digest)?), Access::Push)?;
        let job = Job { source: &source, part: None, deadline, avoid: None };
        let mut rounds = self.exchange.rounds(job);
        loop {
            let visit = rounds.next().await?;
            let outcome = self.exchange.head(visit).await;
            if let Some(done) = rounds.settle(visit, outcome) {
                return Ok(done);
            }
        }
    }

    /// Makes a blob of `from_repository` at the same host a blob of the reference's repository too. False if
    /// the registry does not, for whatever reason - it has no such blob, may not show it to us, cannot
    /// mount: the blob is to be uploaded then, and that will tell if pushing is refused as well.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] and [`Error::Unavailable`]; [`Error::BadDigest`]; [`Error::BadReference`] for
    /// something that is no repository.
    pub async fn mount_blob(
        &self,
        reference: &Reference,
        digest: &str,
        from_repository: &str,
        deadline: Instant,
    ) -> Result<bool, Error> {
        let digest = Digest::parse(digest)?;
        let from = from_repository.to_owned();
        check_repository(&from).map_err(|why| Error::BadReference { reference: from.clone(), why })?;
        let source = self.change(reference, Name::Blob(digest.clone()), Access::Mount { from })?;
        let job = Job { source: &source, part: None, deadline, avoid: None };
        let mut rounds = self.exchange.rounds(job);
        loop {
            let visit = rounds.next().await?;
            let outcome = match self.exchange.mount(visit, &digest, from_repository).await {
                Err(cause) if cause.is_final() => {
                    tracing::debug!(%source, from = from_repository, %cause, "not mounted");
                    Ok(false)
                }
                outcome => outcome,
            };
            if let Some(mounted) = rounds.settle(visit, outcome) {
                return Ok(mounted);
            }
        }
    }

    /// Begins the upload of a blob whose digest need not be known before its end.
    ///
    /// # Errors
    ///
    /// Those of the origin: a refusal comes here, before the blob is made.
    pub async fn upload(&self, reference: &Reference, options: UploadOptions) -> Result<Upload, Error> {
        Upload::open(self.exchange.clone(), reference.clone(), options).await
    }

    /// Uploads a small blob that is there as a whole: in one request if it is shorter than a chunk.
    ///
    /// # Errors
    ///
    /// As [`Registry::upload`], [`Upload::write`] and [`Upload::finish`].
    pub async fn put_blob(
        &self,
        reference: &Reference,
        digest: &str,
        bytes: Bytes,
        options: UploadOptions,
    ) -> Result<(), Error> {
        let mut upload = self.upload(reference, options).await?;
        match upload.write(bytes).await {
            Ok(()) => upload.finish(digest).await,
            Err(error) => {
                // What failed is the write; an upload that stays open is the registry's to clear away.
                let _ = upload.cancel().await;
                Err(error)
            }
        }
    }

    /// Puts a manifest or index under the reference's tag, or under its digest if it has no tag; returns its
    /// digest. All it names must be in the repository already.
    ///
    /// # Errors
    ///
    /// Those of the origin; [`Error::TooLarge`]; [`Error::BadDigest`] if the reference has a digest and the
    /// bytes another one; [`Error::BadResponse`] if the registry says that it has stored something else;
    /// [`Error::Config`] for a media type that cannot be sent.
    pub async fn put_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
        deadline: Instant,
    ) -> Result<String, Error> {
        let digest = match reference.digest() {
            Some(digest) => Digest::parse(digest)?,
            None => Digest::sha256(&bytes),
        };
        digest.verify(&bytes).map_err(|_| Error::BadDigest {
            digest: digest.to_string(),
            why: "the manifest to be put under it has another digest",
        })?;
        let name = Name::Manifest(reference.tag().unwrap_or(digest.as_str()).to_owned());
        let source = self.change(reference, name, Access::Push)?;
        let size = bytes.len() as u64;
        if size > MANIFEST_LIMIT {
            return Err(Error::TooLarge { what: source.to_string(), size, limit: MANIFEST_LIMIT });
        }
        if HeaderValue::from_str(media_type).is_err() {
            let why = format!("{media_type:?} has characters a header must not have");
            return Err(Error::Config { key: "media type".to_owned(), why });
        }
        let ask = Ask::new(Method::PUT).header(CONTENT_TYPE, media_type).body(bytes);
        let job = Job { source: &source, part: None, deadline, avoid: None };
        let mut rounds = self.exchange.rounds(job);
        loop {
            let visit = rounds.next().await?;
            let outcome = self.exchange.put(visit, &ask, &digest).await;
            if rounds.settle(visit, outcome).is_some() {
                return Ok(digest.to_string());
            }
        }
    }

    fn change(&self, reference: &Reference, name: Name, access: Access) -> Result<Source, Error> {
        Source::origin(reference, name, access, &self.exchange.config)
    }
}

impl Exchange {
    /// The answer to one request of a change, unless it says to come back later or to log in.
    pub(crate) async fn change(&self, visit: Visit<'_>, url: SignedUrl, ask: &Ask) -> Result<Arrival, Cause> {
        let arrival = self.admitted(visit, url, ask, visit.job.deadline).await?;
        match classify(arrival.response.status()) {
            Verdict::Later => Err(transport::later(&arrival.response)),
            Verdict::Refused => {
                let tried = format!("no credentials, since {} sent us there", visit.endpoint().tag);
                Err(Cause::Denied { host: arrival.url.host(), tried })
            }
            _ => Ok(arrival),
        }
    }

    /// The size of the job's blob if the host has it and tells.
    pub(crate) async fn head(&self, visit: Visit<'_>) -> Result<Option<u64>, Cause> {
        let (url, ask) = (visit.url(visit.job.source.name()), Ask::new(Method::HEAD));
        let arrival = self.admitted(visit, url, &ask, visit.job.deadline).await?;
        match classify(arrival.response.status()) {
            Verdict::Deliver => {
                let size = arrival.response.headers().get(CONTENT_LENGTH);
                Ok(size.and_then(|size| size.to_str().ok()).and_then(|size| size.parse().ok()))
            }
            // A refusal is that of a redirect's target, which may have been signed for GET only.
            Verdict::Missing | Verdict::Refused => Ok(None),
            Verdict::Later => Err(transport::later(&arrival.response)),
            _ => Err(self.unexpected(visit, arrival).await),
        }
    }

    async fn mount(&self, visit: Visit<'_>, digest: &Digest, from: &str) -> Result<bool, Cause> {
        let mut url = visit.url(&Name::Upload).expose().clone();
        url.query_pairs_mut().append_pair("mount", digest.as_str()).append_pair("from", from);
        let ask = Ask::new(Method::POST).body(Bytes::new());
        let arrival = self.change(visit, SignedUrl::new(url), &ask).await?;
        match arrival.response.status() {
            StatusCode::CREATED => Ok(true),
            // An upload was begun instead, which nobody is going to end.
            StatusCode::ACCEPTED => {
                let _ = self.discard(visit, arrival.location()?).await;
                Ok(false)
            }
            _ => Err(self.unexpected(visit, arrival).await),
        }
    }

    /// Ends an upload that is not wanted any more. What the registry does not know any more has ended. A
    /// failure may be ignored: registries clear away what is left open.
    pub(crate) async fn discard(&self, visit: Visit<'_>, location: SignedUrl) -> Result<(), Cause> {
        let arrival = self.change(visit, location, &Ask::new(Method::DELETE)).await?;
        match arrival.response.status() {
            status if status.is_success() || classify(status) == Verdict::Missing => Ok(()),
            _ => Err(self.unexpected(visit, arrival).await),
        }
    }

    async fn put(&self, visit: Visit<'_>, ask: &Ask, digest: &Digest) -> Result<(), Cause> {
        let arrival = self.change(visit, visit.url(visit.job.source.name()), ask).await?;
        match arrival.response.status().is_success() {
            true => stored_as(&arrival, digest),
            false => Err(self.unexpected(visit, arrival).await),
        }
    }

    /// The failure of an answer with an unexpected status, with the codes the registry gives for it.
    pub(crate) async fn unexpected(&self, visit: Visit<'_>, arrival: Arrival) -> Cause {
        let Arrival { mut response, url, .. } = arrival;
        let mut body = Vec::new();
        while let Ok(Some(piece)) = self.piece(visit, &mut response).await {
            body.extend_from_slice(&piece);
            if body.len() > COMPLAINT_LIMIT {
                break;
            }
        }
        Cause::Nonsense(format!("{url} answered {}{}", response.status(), codes(&body)))
    }
}

/// Checks that what was stored has this digest, if the answer says so much.
pub(crate) fn stored_as(arrival: &Arrival, digest: &Digest) -> Result<(), Cause> {
    match arrival.response.headers().get("docker-content-digest") {
        Some(stored) if stored != digest.as_str() => {
            let stored: String = String::from_utf8_lossy(stored.as_bytes()).chars().take(160).collect();
            Err(Cause::Nonsense(format!("it was stored as {stored:?}, not as {digest}")))
        }
        _ => Ok(()),
    }
}

/// The error codes of an answer's body, ready to follow a status. Only what has the form of a code is shown:
/// messages may repeat what was sent. Format: OCI distribution specification, "Error codes".
fn codes(body: &[u8]) -> String {
    let answer: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let errors = answer.get("errors").and_then(|errors| errors.as_array());
    let codes = errors.into_iter().flatten().filter_map(|error| error.get("code")?.as_str());
    let coded = |code: &&str| code.len() <= 40 && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    let codes: Vec<&str> = codes.filter(coded).take(4).collect();
    if codes.is_empty() { String::new() } else { format!(" ({})", codes.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_codes_are_repeated() {
        for (body, expected) in [
            (r#"{"errors":[{"code":"DENIED","message":"hunter2"}]}"#, " (DENIED)"),
            (r#"{"errors":[{"code":"A_B"},{"code":"hunter2"},{"code":5},{},{"code":"C"}]}"#, " (A_B, C)"),
            (r#"{"errors":[]}"#, ""),
            (r#"{"errors":"DENIED"}"#, ""),
            ("[]", ""),
            ("<html>", ""),
            ("", ""),
        ] {
            assert_eq!(codes(body.as_bytes()), expected, "{body}");
        }
    }
}
