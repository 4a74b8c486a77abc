//! Authorization: learning what a host wants, and one token cache for the process.
//!
//! A host's challenge is remembered per repository and access, so later requests are authorized at once. Tokens are
//! keyed by host, realm, service, scope and identity, fetched by one task while the others wait for it
//! (single-flight), and used until shortly before they expire. A refusal (401 or 403) drops the token and what
//! the [`Keychain`] keeps of the login; the next [`Auth::grant`] fetches both anew. Who was refused with a token that was
//! new, or by the token server, is passed over for another login, if there is one.
//!
//! Invariants: challenges are taken only from the host that was asked, never from a redirect's target;
//! credentials go to that host, or to the realm it names, and not over plain http if the host speaks https.
//!
//! Protocol: the distribution project's token authentication specification and its OAuth2 variant for
//! identity tokens.

use crate::challenge::{self, Challenge};
use crate::config::{Config, LONGEST};
use crate::hosts::{Endpoint, HostTag};
use crate::keychain::{Credential, Found, Identity, Keychain, Place};
use crate::retry::{Cause, Verdict, classify};
use crate::secret::{Secret, SignedUrl};
use crate::transport::{self, Transport};
use parking_lot::Mutex;
use reqwest::Response;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use url::{Url, form_urlencoded};

/// Life of a token whose answer names none (token specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used in its last seconds, nor in the last quarter of a shorter life.
const MARGIN: Duration = Duration::from_secs(30);
/// Logins shown one after the other for one request.
pub(crate) const MAX_TURNS: usize = 8;
const TOKEN_ANSWER_LIMIT: usize = 1 << 20;

/// What is to be done in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    Push,
    /// Pushing, and pulling from this repository of the same host.
    Mount {
        from: String,
    },
}

impl Access {
    /// The scope of a token for `repository`, given that of the host's challenge.
    ///
    /// For reading the host knows best. For changes we do, since some hosts ask for less in their challenges
    /// than they want then; only what the challenge says of other things is kept.
    fn scope(&self, repository: &str, challenged: Option<String>) -> String {
        let pull = |repository: &str| format!("repository:{repository}:pull");
        let mut scopes = match self {
            Self::Pull => return challenged.unwrap_or_else(|| pull(repository)),
            Self::Push => vec![format!("{},push", pull(repository))],
            Self::Mount { from } if from == repository => vec![format!("{},push", pull(repository))],
            Self::Mount { from } => vec![format!("{},push", pull(repository)), pull(from)],
        };
        let challenged = challenged.unwrap_or_default();
        let others = challenged.split(' ').filter(|scope| !scope.is_empty());
        scopes.extend(others.filter(|scope| !scope.starts_with("repository:")).map(str::to_owned));
        scopes.join(" ")
    }
}

/// What is asked of whom.
#[derive(Clone, Copy)]
pub(crate) struct Site<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) repository: &'a str,
    pub(crate) access: &'a Access,
}

impl Site<'_> {
    /// By the API's root, not the host: a host may serve several registries under paths of their own.
    fn key(&self) -> (Url, String, Access) {
        (self.endpoint.base.clone(), self.repository.to_owned(), self.access.clone())
    }

    fn place(&self) -> Place<'_> {
        Place { host: &self.endpoint.login, repository: self.repository }
    }

    fn denied(&self, tried: String) -> Cause {
        Cause::Denied { host: self.endpoint.tag.to_string(), tried }
    }
}

/// An `Authorization` header and where it came from.
pub(crate) struct Grant {
    header: HeaderValue,
    identity: Identity,
    /// A refusal before this can have no other reason than the identity: no token that is older than the request, or
    /// that has ended on the way, was shown.
    proves_until: Instant,
    token: Option<(Arc<Slot>, Secret)>,
}

impl Grant {
    pub(crate) fn header(&self) -> HeaderValue {
        self.header.clone()
    }
}

#[derive(PartialEq, Eq, Hash)]
struct TokenKey {
    host: HostTag,
    realm: String,
    service: Option<String>,
    scope: String,
    identity: Identity,
}

/// One token and the lock its fetching is done under.
#[derive(Default)]
struct Slot {
    /// Grows with each failed fetch, so that those who waited for it share its outcome.
    failures: AtomicU64,
    state: tokio::sync::Mutex<SlotState>,
}

#[derive(Default)]
struct SlotState {
    token: Option<Token>,
    failure: Option<Cause>,
}

impl SlotState {
    fn live(&self, now: Instant) -> Option<&Token> {
        self.token.as_ref().filter(|token| token.usable_until > now)
    }
}

struct Token {
    value: Secret,
    usable_until: Instant,
}

/// All authorization state of the process.
pub(crate) struct Auth {
    transport: Transport,
    pub(crate) keychain: Keychain,
    challenges: Mutex<HashMap<(Url, String, Access), Challenge>>,
    slots: Mutex<HashMap<TokenKey, Arc<Slot>>>,
}

impl Auth {
    pub(crate) fn new(transport: Transport, config: &Config) -> Self {
        Self {
            keychain: Keychain::new(config, &transport),
            transport,
            challenges: Mutex::default(),
            slots: Mutex::default(),
        }
    }

    /// What to send with a request to `site`: nothing until the host has asked for something.
    pub(crate) async fn grant(&self, site: Site<'_>, deadline: Instant) -> Result<Option<Grant>, Cause> {
        let Some(challenge) = self.challenges.lock().get(&site.key()).cloned() else { return Ok(None) };
        let mut found = self.find(site, deadline).await?;
        let mut turns = 1;
        loop {
            let why = match self.show(site, &challenge, &found, deadline).await {
                Err(Cause::Denied { tried, .. }) => tried,
                outcome => return outcome,
            };
            // Nothing was sent to the host yet: the next login may be the one.
            let again = found.refused;
            self.keychain.refuse(site.place(), found.identity(), true);
            found = self.find(site, deadline).await?;
            if again || found.refused || turns == MAX_TURNS {
                self.keychain.pardon(site.place());
                // The host may ask for something else by now: let it say so again.
                self.challenges.lock().remove(&site.key());
                return Err(site.denied(format!("{}; {why}", found.tried)));
            }
            turns += 1;
        }
    }

    /// The header for one login. A refusal says only why, not what else was tried.
    async fn show(
        &self,
        site: Site<'_>,
        challenge: &Challenge,
        found: &Found,
        deadline: Instant,
    ) -> Result<Option<Grant>, Cause> {
        let identity = found.identity();
        let proves_until = Instant::now() + LONGEST;
        let at_once = |header| Ok(Some(Grant { header, identity, proves_until, token: None }));
        match (challenge, &found.credential) {
            (_, Some(Credential::AccessToken(token))) => at_once(bearer(token)?),
            (Challenge::Basic, Some(Credential::Password { user, password })) => {
                at_once(basic(user, password))
            }
            (Challenge::Basic, Some(Credential::IdentityToken(_))) => {
                Err(site.denied("an identity token was found, but the host wants a password".into()))
            }
            // What was refused before may be public by now.
            (Challenge::Basic, None) => Ok(None),
            (Challenge::Bearer { realm, service, scope }, _) => {
                let scope = site.access.scope(site.repository, scope.clone());
                let key = TokenKey {
                    host: site.endpoint.tag.clone(),
                    realm: realm.clone(),
                    service: service.clone(),
                    scope,
                    identity,
                };
                self.token(site, key, found, deadline).await.map(Some)
            }
        }
    }

    /// Takes note of a refusal of `grant` by the host itself: its challenge, and that the token and the
    /// credentials read so far are not to be used again. An error when there is nothing new to try.
    pub(crate) async fn refused(
        &self,
        site: Site<'_>,
        grant: Option<Grant>,
        response: &Response,
        deadline: Instant,
    ) -> Result<(), Cause> {
        let fields = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = challenge::choose(fields.iter().filter_map(|value| value.to_str().ok()));
        let known = match challenge {
            Some(challenge) => {
                self.challenges.lock().insert(site.key(), challenge);
                true
            }
            None => self.challenges.lock().contains_key(&site.key()),
        };
        if !known {
            let status = response.status();
            return Err(
                site.denied(format!("anonymous access; the host answered {status} without a challenge"))
            );
        }
        if let Some(grant) = grant {
            self.transport.counters.auth_refresh();
            self.keychain.refuse(site.place(), grant.identity, Instant::now() < grant.proves_until);
            if let Some((slot, refused)) = grant.token {
                let mut state = timeout_at(deadline, slot.state.lock()).await.map_err(|_| waited())?;
                // Another reader may have replaced it meanwhile.
                if state.token.as_ref().is_some_and(|token| token.value == refused) {
                    state.token = None;
                }
            }
        }
        Ok(())
    }

    /// The final refusal, saying what was tried. The next request begins with the first login again.
    pub(crate) async fn denied(&self, site: Site<'_>, deadline: Instant) -> Cause {
        let found = self.find(site, deadline).await;
        self.keychain.pardon(site.place());
        match found {
            Ok(found) => site.denied(found.tried),
            Err(cause) => cause,
        }
    }

    /// Whether there is a login that the host has not refused.
    pub(crate) async fn has_other(&self, site: Site<'_>, deadline: Instant) -> Result<bool, Cause> {
        Ok(!self.find(site, deadline).await?.refused)
    }

    async fn find(&self, site: Site<'_>, deadline: Instant) -> Result<Found, Cause> {
        let found = self.keychain.find(site.place());
        timeout_at(deadline, found).await.map_err(|_| Cause::Silent("asking for a login".into()))
    }

    async fn token(
        &self,
        site: Site<'_>,
        key: TokenKey,
        found: &Found,
        deadline: Instant,
    ) -> Result<Grant, Cause> {
        let (realm, service, scope) = (key.realm.clone(), key.service.clone(), key.scope.clone());
        let identity = key.identity;
        let slot = {
            let mut slots = self.slots.lock();
            if !slots.contains_key(&key) {
                let now = Instant::now();
                let dead = |slot: &Slot| slot.state.try_lock().is_ok_and(|state| state.live(now).is_none());
                slots.retain(|_, slot| Arc::strong_count(slot) > 1 || !dead(slot));
            }
            slots.entry(key).or_default().clone()
        };
        let failures = slot.failures.load(Ordering::Acquire);
        let mut state = timeout_at(deadline, slot.state.lock()).await.map_err(|_| waited())?;
        let now = Instant::now();
        let fetched = state.live(now).is_none();
        if fetched {
            if let Some(failure) = &state.failure
                && slot.failures.load(Ordering::Acquire) != failures
            {
                return Err(failure.clone());
            }
            match self.fetch(site, &realm, service.as_deref(), &scope, found, deadline).await {
                Ok(token) => *state = SlotState { token: Some(token), failure: None },
                Err(cause) => {
                    // A deadline of ours says nothing to those whose deadline is later.
                    if Instant::now() < deadline {
                        state.failure = Some(cause.clone());
                        slot.failures.fetch_add(1, Ordering::Release);
                    }
                    return Err(cause);
                }
            }
        }
        let token = state.token.as_ref().ok_or_else(waited)?;
        let (value, proves_until) = (token.value.clone(), if fetched { token.usable_until } else { now });
        drop(state);
        Ok(Grant { header: bearer(&value)?, identity, proves_until, token: Some((slot, value)) })
    }

    async fn fetch(
        &self,
        site: Site<'_>,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        found: &Found,
        deadline: Instant,
    ) -> Result<Token, Cause> {
        let base = &site.endpoint.base;
        let url = base.join(realm).map_err(|_| Cause::Nonsense("the token realm is not a URL".into()))?;
        let mut url = SignedUrl::new(url);
        if !matches!(url.expose().scheme(), "http" | "https") || url.reveals(base) {
            return Err(Cause::Nonsense(format!("the token realm {url} is not https")));
        }
        // The host's own headers open the way to its token server too, if it is one itself.
        let mut headers = match url.same_origin(base) {
            true => site.endpoint.headers.clone(),
            false => HeaderMap::new(),
        };
        let client = self.transport.client(site.endpoint, &url)?;
        let request = match &found.credential {
            Some(Credential::IdentityToken(token)) => {
                let mut form = form_urlencoded::Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token.expose());
                form.append_pair("client_id", "lazurite").append_pair("scope", scope);
                form.extend_pairs(service.map(|service| ("service", service)));
                let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
                headers.insert(CONTENT_TYPE, form_type);
                client.post(url.expose().clone()).body(form.finish())
            }
            credential => {
                url = with_query(&url, service, scope, credential.as_ref());
                if let Some(Credential::Password { user, password }) = credential {
                    headers.insert(AUTHORIZATION, basic(user, password));
                }
                client.get(url.expose().clone())
            }
        };
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        let (first_byte, patience) = (site.endpoint.first_byte_timeout, site.endpoint.patience());
        let sent = Instant::now();
        let mut response = self.transport.send(request.headers(headers), patience, deadline).await?;
        let status = response.status();
        tracing::debug!(host = %site.endpoint.tag, realm = %url, scope, status = status.as_u16(), "token request");
        match classify(status) {
            Verdict::Deliver => {}
            Verdict::Later => return Err(transport::later(&response)),
            Verdict::Refused => {
                return Err(site.denied(format!("the token server {url} answered {status}")));
            }
            _ => return Err(Cause::Nonsense(format!("the token server {url} answered {status}"))),
        }
        let mut body = Vec::new();
        while let Some(piece) = self.transport.piece(&mut response, first_byte, deadline).await? {
            body.extend_from_slice(&piece);
            if body.len() > TOKEN_ANSWER_LIMIT {
                return Err(Cause::Nonsense(format!("the token server {url} sent more than 1 MiB")));
            }
        }
        let (value, life) = parse_token(&body)
            .ok_or_else(|| Cause::Nonsense(format!("the token server {url} sent no token")))?;
        Ok(Token { value, usable_until: sent + life.saturating_sub(MARGIN.min(life / 4)) })
    }
}

fn waited() -> Cause {
    Cause::Silent("waiting for a token".into())
}

fn sensitive(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn bearer(token: &Secret) -> Result<HeaderValue, Cause> {
    sensitive(format!("Bearer {}", token.expose()))
        .ok_or_else(|| Cause::Nonsense("the token has characters a header must not have".into()))
}

fn basic(user: &str, password: &Secret) -> HeaderValue {
    use base64::Engine as _;
    let pair = format!("{user}:{}", password.expose());
    let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
    // Base64 has only characters a header may have.
    sensitive(format!("Basic {encoded}")).unwrap_or(HeaderValue::from_static("Basic"))
}

fn with_query(
    realm: &SignedUrl,
    service: Option<&str>,
    scope: &str,
    credential: Option<&Credential>,
) -> SignedUrl {
    let mut url: Url = realm.expose().clone();
    {
        let mut query = url.query_pairs_mut();
        query.extend_pairs(service.map(|service| ("service", service)));
        // A scope is a list divided by spaces; as separate parameters every server understands it.
        query.extend_pairs(scope.split(' ').filter(|scope| !scope.is_empty()).map(|scope| ("scope", scope)));
        if let Some(Credential::Password { user, .. }) = credential {
            query.append_pair("account", user);
        }
    }
    SignedUrl::new(url)
}

/// The token and its life out of a token server's answer.
fn parse_token(body: &[u8]) -> Option<(Secret, Duration)> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    let text = |name: &str| answer.get(name).and_then(|v| v.as_str()).filter(|text| !text.is_empty());
    let value = text("token").or_else(|| text("access_token"))?;
    let life = answer.get("expires_in").and_then(serde_json::Value::as_u64);
    // A year bounds the arithmetic on instants.
    let life =
        life.filter(|&life| life > 0).map_or(DEFAULT_LIFE, |life| Duration::from_secs(life.min(31_536_000)));
    Some((Secret::new(value), life))
}

/// The headers a request to the host itself carries: the endpoint's own and the grant's.
pub(crate) fn own_headers(endpoint: &Endpoint, grant: Option<&Grant>) -> HeaderMap {
    let mut headers = endpoint.headers.clone();
    if let Some(grant) = grant {
        headers.insert(AUTHORIZATION, grant.header());
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_answers() {
        let life = |seconds| Duration::from_secs(seconds);
        for (body, expected) in [
            (r#"{"token":"a"}"#, Some(("a", DEFAULT_LIFE))),
            (r#"{"access_token":"b","expires_in":300}"#, Some(("b", life(300)))),
            (r#"{"token":"a","access_token":"b","expires_in":0}"#, Some(("a", DEFAULT_LIFE))),
            (r#"{"token":"","access_token":"b","expires_in":"9"}"#, Some(("b", DEFAULT_LIFE))),
            (r#"{"token":"a","expires_in":18446744073709551615}"#, Some(("a", life(31_536_000)))),
            (r#"{"token":5}"#, None),
            ("[]", None),
            ("", None),
        ] {
            let parsed = parse_token(body.as_bytes());
            let parsed = parsed.as_ref().map(|(value, life)| (value.expose(), *life));
            assert_eq!(parsed, expected, "{body}");
        }
    }

    #[test]
    fn scopes() {
        let mount = |from: &str| Access::Mount { from: from.to_owned() };
        for (access, challenged, expected) in [
            (Access::Pull, None, "repository:a/b:pull"),
            (Access::Pull, Some("repository:a/b:pull,delete x"), "repository:a/b:pull,delete x"),
            (Access::Push, None, "repository:a/b:pull,push"),
            (Access::Push, Some("repository:a/b:pull"), "repository:a/b:pull,push"),
            (Access::Push, Some("aws  repository:a/b:push,pull"), "repository:a/b:pull,push aws"),
            (mount("c"), Some("repository:a/b:pull,push"), "repository:a/b:pull,push repository:c:pull"),
            (mount("a/b"), None, "repository:a/b:pull,push"),
        ] {
            assert_eq!(access.scope("a/b", challenged.map(str::to_owned)), expected, "{access:?}");
        }
    }

    #[test]
    fn token_queries() {
        let realm = SignedUrl::new(Url::parse("https://a.example/token?tenant=1").unwrap());
        let user = Credential::Password { user: "me@x".into(), password: Secret::new("hunter2") };
        let url =
            with_query(&realm, Some("reg.example"), "repository:a/b:pull repository:c:pull", Some(&user));
        assert_eq!(
            url.expose().query(),
            Some(
                "tenant=1&service=reg.example&scope=repository%3Aa%2Fb%3Apull&scope=repository%3Ac%3Apull\
                 &account=me%40x"
            )
        );
        assert_eq!(url.to_string(), "https://a.example/token");
    }

    #[test]
    fn headers_with_credentials_are_marked() {
        let header = basic("user", &Secret::new("pass"));
        assert_eq!(header.to_str().unwrap(), "Basic dXNlcjpwYXNz");
        assert!(header.is_sensitive() && !format!("{header:?}").contains("dXNl"));
    }
}
