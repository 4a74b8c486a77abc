//! TLS settings of one host, and what rustls makes of them.
//!
//! Owns which certificates are trusted, which are shown, and what happens when nothing is to be verified. Reads no
//! files: PEM is handed in, and refused here if it is none. Keys are unprintable.
//!
//! The system's authorities are always trusted; a host's own come on top. Two things go beyond rustls' rules,
//! because registries with a certificate of their own making are set up like that and containerd takes them: a
//! certificate that is trusted as an authority may be the server's own, and of several client certificates the one
//! the server names the issuer of is shown.

use crate::Error;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest as _, Sha256};
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

/// Whether a server has to prove who it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verification {
    /// It has to.
    #[default]
    Full,
    /// It may be anybody.
    Skipped,
}

/// What one host needs of TLS beyond the usual.
#[derive(Default, PartialEq)]
pub struct TlsSettings {
    authorities: Vec<CertificateDer<'static>>,
    identities: Vec<Identity>,
    verification: Verification,
}

#[derive(PartialEq)]
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl TlsSettings {
    /// Trusts the certificates in `pem` too.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there is none in it, or one that cannot be used.
    pub fn trust(&mut self, pem: &[u8]) -> Result<(), Error> {
        let found = certificates(pem, "ca")?;
        let mut store = RootCertStore::empty();
        for certificate in &found {
            store.add(certificate.clone()).map_err(|error| bad("ca", error.to_string()))?;
        }
        self.authorities.extend(found);
        Ok(())
    }

    /// Shows the certificate in `certificate`, whose key is in `key`, to a server that asks for one. Both are PEM,
    /// and may be the same text.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if either is missing or they do not belong together.
    pub fn identify(&mut self, certificate: &[u8], key: &[u8]) -> Result<(), Error> {
        let chain = certificates(certificate, "client")?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| bad("client", "there is no PEM private key in it".to_owned()))?;
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider())
            .map_err(|error| bad("client", format!("certificate and key cannot be used: {error}")))?;
        self.identities.push(Identity { chain, key });
        Ok(())
    }

    /// Says whether the server has to prove who it is.
    pub fn set_verification(&mut self, verification: Verification) {
        self.verification = verification;
    }

    /// What of it holds for other hosts that this one points to: whom to trust, and neither trusting anybody nor
    /// showing a certificate.
    pub(crate) fn elsewhere(&self) -> Option<Arc<TlsSettings>> {
        let authorities = self.authorities.clone();
        (!authorities.is_empty()).then(|| Arc::new(Self { authorities, ..Self::default() }))
    }
}

impl fmt::Debug for TlsSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSettings")
            .field("authorities", &self.authorities.len())
            .field("identities", &self.identities.len())
            .field("verification", &self.verification)
            .finish()
    }
}

fn bad(key: &str, why: String) -> Error {
    Error::Config { key: key.to_owned(), why }
}

fn certificates(pem: &[u8], key: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| bad(key, format!("not PEM: {error}")))?;
    if found.is_empty() {
        return Err(bad(key, "there is no PEM certificate in it".to_owned()));
    }
    Ok(found)
}

fn provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

/// Whom to trust.
#[derive(Debug, Clone)]
pub(crate) struct Authorities {
    roots: RootCertStore,
    /// SHA-256 of each certificate: what is made of them for verification does not tell whether one is another.
    known: HashSet<[u8; 32]>,
}

impl Authorities {
    fn new(certificates: &[CertificateDer<'static>]) -> Self {
        let mut authorities = Self { roots: RootCertStore::empty(), known: HashSet::new() };
        authorities.extend(certificates);
        authorities
    }

    fn extend(&mut self, certificates: &[CertificateDer<'static>]) {
        self.roots.add_parsable_certificates(certificates.iter().cloned());
        self.known.extend(certificates.iter().map(|certificate| fingerprint(certificate)));
    }
}

fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// The system's authorities. A system without any is no error: plain http hosts still work.
pub(crate) fn system() -> Authorities {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a CA certificate could not be loaded");
    }
    let authorities = Authorities::new(&found.certs);
    if authorities.roots.is_empty() {
        tracing::warn!("no CA certificates found: https registries will be refused (set SSL_CERT_FILE)");
    }
    authorities
}

/// What a client is built with.
pub(crate) fn client_config(system: &Authorities, settings: &TlsSettings) -> Result<ClientConfig, Error> {
    let failed = |error: rustls::Error| bad("tls", error.to_string());
    let provider = Arc::new(provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(failed)?;
    let mut authorities = system.clone();
    authorities.extend(&settings.authorities);
    let Authorities { roots, known } = authorities;
    let trusted = match settings.verification {
        Verification::Skipped => None,
        Verification::Full => Some(Arc::new(roots)),
    };
    let builder = match trusted {
        // Nobody is trusted, which the usual verifier cannot be told.
        Some(roots) if roots.is_empty() => builder.with_root_certificates(roots),
        trusted => {
            let usual = |roots| WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build();
            let usual = trusted.map(usual).transpose().map_err(|error| bad("tls", error.to_string()))?;
            let algorithms = provider.signature_verification_algorithms;
            let trusted = usual.map(|usual| Trusted { usual, known });
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Verifier { algorithms, trusted }))
        }
    };
    let identities = settings.identities.iter();
    let identities = identities
        .map(|Identity { chain, key }| {
            CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider).map(Arc::new)
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let mut config = match identities.is_empty() {
        true => builder.with_no_client_auth(),
        false => builder.with_client_cert_resolver(Arc::new(Identities(identities))),
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Whom a server may be. Whoever it is has to have the key of its certificate.
#[derive(Debug)]
struct Verifier {
    algorithms: WebPkiSupportedAlgorithms,
    /// Without, it may be anybody.
    trusted: Option<Trusted>,
}

/// The usual verification, except that a trusted certificate may be the server's own although it is an authority's,
/// as `openssl req -x509` makes them.
#[derive(Debug)]
struct Trusted {
    usual: Arc<WebPkiServerVerifier>,
    known: HashSet<[u8; 32]>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(Trusted { usual, known }) = &self.trusted else {
            return Ok(ServerCertVerified::assertion());
        };
        match usual.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            // What rustls has no name for; the time was compared before.
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(_)))
                if known.contains(&fingerprint(end_entity)) =>
            {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            outcome => outcome,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The certificates to choose from when a server asks for one.
#[derive(Debug)]
struct Identities(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Identities {
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let mut usable = self.0.iter().filter(|identity| identity.key.choose_scheme(schemes).is_some());
        // A name stands in a certificate as the same DER that the server sends: no need to parse it.
        let names = |certificate: &[u8], name: &[u8]| {
            !name.is_empty() && certificate.windows(name.len()).any(|window| window == name)
        };
        let fits = |identity: &&Arc<CertifiedKey>| {
            identity.cert.iter().any(|certificate| issuers.iter().any(|name| names(certificate, name)))
        };
        usable.clone().find(fits).or_else(|| usable.next()).cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}
