//! The entry to the crate: one [`Registry`] per process.

use crate::digest::Digest;
use crate::exchange::Exchange;
use crate::fetch::Want;
use crate::keychain::{Answer, Credential, Place};
use crate::source::{Name, Source};
use crate::{Blob, Config, Counters, Error, HostTag, PullCredentials, Reference};
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;
use tokio::time::Instant;

/// Largest manifest or index, as the OCI distribution specification asks registries to support.
pub(crate) const MANIFEST_LIMIT: u64 = 4 << 20;

/// OCI and docker, manifests and indexes.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";

/// A client for all registries. Clones share connections, tokens and what is known of hosts.
#[derive(Clone)]
pub struct Registry {
    pub(crate) exchange: Arc<Exchange>,
}

/// A manifest or index as the registry stores it.
#[derive(Debug, Clone)]
pub struct ManifestBytes {
    /// The document. Verified if a digest was given, else only hashed.
    pub bytes: Bytes,
    /// The media type of the answer, without parameters.
    pub media_type: String,
    /// The digest of `bytes`.
    pub digest: String,
}

/// What was found in a search for a host's login. Nothing in it is secret.
#[derive(Debug, Clone)]
pub struct Login {
    /// The host it would be shown to.
    pub host: HostTag,
    /// Of which kind it is.
    pub kind: LoginKind,
    /// Where it was looked for, and what was found there, up to the source that had it.
    pub tried: String,
    /// What every source says, in the order they are asked.
    pub answers: Vec<LoginAnswer>,
}

/// What one source says of a login. Nothing in it is secret.
#[derive(Debug, Clone)]
pub struct LoginAnswer {
    /// The source's name.
    pub source: String,
    /// The kind of the login it would have tried first.
    pub kind: LoginKind,
    /// What it found, or why nothing.
    pub said: String,
}

/// How a host would be told who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginKind {
    /// Not at all.
    Anonymous,
    /// By a user name and a password.
    Password,
    /// By an identity token.
    Token,
    /// By a token that the host itself takes.
    AccessToken,
}

impl From<Option<&Credential>> for LoginKind {
    fn from(credential: Option<&Credential>) -> Self {
        match credential {
            None => Self::Anonymous,
            Some(Credential::Password { .. }) => Self::Password,
            Some(Credential::IdentityToken(_)) => Self::Token,
            Some(Credential::AccessToken(_)) => Self::AccessToken,
        }
    }
}

impl Registry {
    /// Builds the client; no I/O but the reading of CA certificates.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a setting that cannot be used.
    pub fn new(config: Config) -> Result<Self, Error> {
        Ok(Self { exchange: Arc::new(Exchange::new(config)?) })
    }

    /// A handle on a blob of the reference's repository. No I/O.
    ///
    /// # Errors
    ///
    /// [`Error::BadDigest`] if `digest` is none.
    pub fn blob(&self, reference: &Reference, digest: &str, size: Option<u64>) -> Result<Blob, Error> {
        let source = self.source(reference, Name::Blob(Digest::parse(digest)?), size)?;
        Ok(Blob::new(self.exchange.clone(), source))
    }

    /// A manifest or index by `digest`, else by the reference's digest, else by its tag.
    ///
    /// # Errors
    ///
    /// Those of the hosts; [`Error::DigestMismatch`] if no host has the bytes the digest names.
    pub async fn manifest(
        &self,
        reference: &Reference,
        digest: Option<&str>,
        deadline: Instant,
    ) -> Result<ManifestBytes, Error> {
        let digest = digest.or(reference.digest()).map(Digest::parse).transpose()?;
        // A reference without a digest always has a tag.
        let name = digest.as_ref().map(Digest::as_str).or(reference.tag()).unwrap_or("latest").to_owned();
        let source = self.source(reference, Name::Manifest(name), None)?;
        let want =
            Want::Whole { limit: MANIFEST_LIMIT, accept: Some(MANIFEST_TYPES), digest: digest.as_ref() };
        let delivery = self.exchange.fetch(&source, &want, deadline, None).await?;
        let media_type = delivery.media_type.ok_or_else(|| Error::BadResponse {
            what: source.to_string(),
            host: delivery.host.to_string(),
            why: "no Content-Type".to_owned(),
        })?;
        let digest = digest.unwrap_or_else(|| Digest::sha256(&delivery.bytes)).to_string();
        Ok(ManifestBytes { bytes: delivery.bytes, media_type, digest })
    }

    /// A small blob as a whole, at most `limit` bytes, verified.
    ///
    /// # Errors
    ///
    /// Those of the hosts; [`Error::DigestMismatch`], [`Error::TooLarge`].
    pub async fn blob_bytes(
        &self,
        reference: &Reference,
        digest: &str,
        limit: u64,
        deadline: Instant,
    ) -> Result<Bytes, Error> {
        let digest = Digest::parse(digest)?;
        let source = self.source(reference, Name::Blob(digest.clone()), None)?;
        let want = Want::Whole { limit, accept: None, digest: Some(&digest) };
        Ok(self.exchange.fetch(&source, &want, deadline, None).await?.bytes)
    }

    /// The logins for the hosts that a reference's manifest is asked of, in their order. Asks sources of logins, no registry.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for settings that cannot be used.
    pub async fn logins(&self, reference: &Reference) -> Result<Vec<Login>, Error> {
        let name = Name::Manifest(reference.tag().unwrap_or("latest").to_owned());
        let source = self.source(reference, name, None)?;
        let mut logins = Vec::with_capacity(source.endpoints.len());
        for (index, endpoint) in source.endpoints.iter().enumerate() {
            let place = Place { host: &endpoint.login, repository: source.repository_at(index) };
            let answers = self.exchange.auth.keychain.ask_all(place).await.into_iter();
            let answers = answers.map(|Answer { source, credentials, said, .. }| LoginAnswer {
                source,
                kind: credentials.first().into(),
                said,
            });
            let found = self.exchange.auth.keychain.find(place).await;
            logins.push(Login {
                host: endpoint.tag.clone(),
                kind: found.credential.as_ref().into(),
                tried: found.tried,
                answers: answers.collect(),
            });
        }
        Ok(logins)
    }

    /// Where logins of image pulls are to be put, if they are to be used at all ([`Config::pull_credentials`]).
    pub fn pull_credentials(&self) -> Option<PullCredentials> {
        self.exchange.config.pull_credentials.clone()
    }

    /// Counts since the start.
    pub fn counters(&self) -> &Counters {
        &self.exchange.transport.counters
    }

    fn source(&self, reference: &Reference, name: Name, size: Option<u64>) -> Result<Source, Error> {
        Source::new(reference, name, size, &self.exchange.config)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("config", &self.exchange.config)
            .field("counters", &self.counters().snapshot())
            .finish()
    }
}
