//! Who may read and write: basic and token authentication, and signatures of redirects.
//!
//! Tokens and signatures live in one table of the process, because a registry, its token server and its content
//! servers are different servers that trust each other. The token endpoint is `/token` on every server; which rules
//! apply is told by the `service` it is asked for, the host of the registry that sent the client there.
//!
//! Source: "Token Authentication Specification" and "Docker Registry v2 authentication" of the distribution project,
//! RFC 7617 for basic.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use base64::Engine as _;
use parking_lot::Mutex;

/// How a server wants to be asked.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// By anyone.
    #[default]
    None,
    /// With user and password in every request.
    Basic {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// With a bearer token for the repository.
    Token(TokenAuth),
}

/// Settings of token authentication; `TokenAuth::default()` gives lasting tokens to anyone.
#[derive(Clone, Debug, Default)]
pub struct TokenAuth {
    /// Base of the token server, as `http://127.0.0.1:1234`; this server itself if `None`.
    pub realm: Option<String>,
    /// User and password the token endpoint asks for; the password also passes as a refresh token.
    pub credentials: Option<(String, String)>,
    /// Life of a token, told in `expires_in` and kept to by the clock; not told and endless if `None`.
    pub ttl: Option<Duration>,
    /// Requests a token is good for; the client is not told.
    pub max_uses: Option<u64>,
    /// Answer to a token that was good once.
    pub expired: Expired,
    /// Which field the token is in.
    pub field: TokenField,
    /// What no token allows, as repository and action: `("team/app", "push")`.
    pub withheld: Vec<(String, String)>,
}

/// How a server answers a token that is no longer good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expired {
    /// 401 with a challenge, as the specification says.
    #[default]
    Challenge,
    /// 403 without a challenge, as some registries do.
    Forbidden,
}

/// The field of the token endpoint's answer that holds the token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenField {
    /// Both.
    #[default]
    Both,
    /// Only `token`.
    Token,
    /// Only `access_token`, as OAuth 2 servers answer.
    AccessToken,
}

#[derive(Debug)]
struct Token {
    service: String,
    /// Repositories and actions.
    allowed: Vec<(String, String)>,
    until: Option<Instant>,
    uses_left: Option<u64>,
}

#[derive(Debug, Default)]
struct World {
    services: HashMap<String, TokenAuth>,
    tokens: HashMap<String, Token>,
    /// Signature -> issuing host, uses left.
    signatures: HashMap<String, (String, Option<u64>)>,
    count: u64,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);

impl World {
    fn secret(&mut self, kind: &str) -> String {
        self.count += 1;
        crate::sha256_hex(format!("{kind} {} {}", self.count, std::process::id()).as_bytes())[..32].to_owned()
    }
}

/// Makes the settings of `host` known to the token endpoints.
pub(super) fn announce(host: &str, auth: &Auth) {
    let mut world = WORLD.lock();
    match auth {
        Auth::Token(settings) => world.services.insert(host.to_owned(), settings.clone()),
        _ => world.services.remove(host),
    };
}

/// Ends all tokens for `host`.
pub(super) fn revoke(host: &str) {
    WORLD.lock().tokens.retain(|_, token| token.service != host);
}

/// A new signature by `host`.
pub(super) fn sign(host: &str, uses: Option<u64>) -> String {
    let mut world = WORLD.lock();
    let signature = world.secret("signature");
    world.signatures.insert(signature.clone(), (host.to_owned(), uses));
    signature
}

/// Whether a signature is good, using it once.
pub(super) fn use_signature(signature: &str) -> bool {
    match WORLD.lock().signatures.get_mut(signature) {
        None => false,
        Some((_, uses)) => use_once(uses),
    }
}

/// Ends all signatures by `host`.
pub(super) fn expire_signatures(host: &str) {
    WORLD.lock().signatures.retain(|_, (issuer, _)| issuer != host);
}

fn use_once(uses: &mut Option<u64>) -> bool {
    match uses {
        None => true,
        Some(0) => false,
        Some(left) => {
            *left -= 1;
            true
        }
    }
}

/// A request was refused: the status and the challenge that goes with it.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) challenge: Option<String>,
}

/// Checks the `Authorization` header of a request to `host` that `needs` these actions in repositories.
pub(super) fn check(
    host: &str,
    auth: &Auth,
    needs: &[(String, &str)],
    header: Option<&str>,
) -> Result<(), Refusal> {
    match auth {
        Auth::None => Ok(()),
        Auth::Basic { user, password } => match header.and_then(basic) {
            Some((given_user, given)) if given_user == *user && given == *password => Ok(()),
            _ => Err(Refusal { status: 401, challenge: Some("Basic realm=\"scripted\"".to_owned()) }),
        },
        Auth::Token(settings) => check_token(host, settings, needs, header),
    }
}

fn check_token(
    host: &str,
    settings: &TokenAuth,
    needs: &[(String, &str)],
    header: Option<&str>,
) -> Result<(), Refusal> {
    let realm = settings.realm.clone().unwrap_or_else(|| format!("http://{host}"));
    let mut scopes: Vec<(&str, Vec<&str>)> = Vec::new();
    for (repository, action) in needs {
        match scopes.iter_mut().find(|(known, _)| known == repository) {
            Some((_, actions)) if actions.contains(action) => {}
            Some((_, actions)) => actions.push(action),
            None => scopes.push((repository, vec![action])),
        }
    }
    let scopes: Vec<String> =
        scopes.iter().map(|(name, actions)| format!("repository:{name}:{}", actions.join(","))).collect();
    let scope = if scopes.is_empty() { String::new() } else { format!(",scope=\"{}\"", scopes.join(" ")) };
    let challenge = |error: &str| Refusal {
        status: 401,
        challenge: Some(format!("Bearer realm=\"{realm}/token\",service=\"{host}\"{scope}{error}")),
    };
    let Some(given) = header.and_then(|header| header.strip_prefix("Bearer ")) else {
        return Err(challenge(""));
    };
    let mut world = WORLD.lock();
    let token = world
        .tokens
        .get_mut(given)
        .filter(|token| token.service == host && token.until.is_none_or(|until| Instant::now() < until));
    let expired = || match settings.expired {
        Expired::Challenge => challenge(",error=\"invalid_token\""),
        Expired::Forbidden => Refusal { status: 403, challenge: None },
    };
    let token = token.ok_or_else(expired)?;
    let allowed = |(repository, action): &(String, &str)| {
        token.allowed.iter().any(|(name, given)| name == repository && (given == action || given == "*"))
    };
    if !needs.iter().all(allowed) {
        return Err(challenge(",error=\"insufficient_scope\""));
    }
    if use_once(&mut token.uses_left) { Ok(()) } else { Err(expired()) }
}

/// User and password of a basic `Authorization` header.
fn basic(header: &str) -> Option<(String, String)> {
    let encoded = header.strip_prefix("Basic ")?;
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// Answers a request to a token endpoint: the JSON body, or `None` for 401. `form` is the decoded query of a GET or
/// body of a POST.
pub(super) fn issue(form: &[(String, String)], header: Option<&str>) -> Option<String> {
    let field = |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let service = field("service")?;
    let mut world = WORLD.lock();
    let settings = world.services.get(service)?.clone();
    if let Some((user, password)) = &settings.credentials {
        let by_header = header.and_then(basic).is_some_and(|given| given == (user.clone(), password.clone()));
        let by_form = match field("grant_type") {
            Some("refresh_token") => field("refresh_token") == Some(password.as_str()),
            Some("password") => {
                field("username") == Some(user.as_str()) && field("password") == Some(password.as_str())
            }
            _ => false,
        };
        if !by_header && !by_form {
            return None;
        }
    }
    // `scope` repeats in a query and holds several, parted by spaces, in a form
    let scopes = form.iter().filter(|(key, _)| key == "scope").flat_map(|(_, value)| value.split(' '));
    let asked = scopes.filter_map(|scope| scope.strip_prefix("repository:")?.rsplit_once(':'));
    let asked = asked.flat_map(|(name, actions)| {
        actions.split(',').map(|action| (name.to_owned(), action.to_owned())).collect::<Vec<_>>()
    });
    let allowed = asked.filter(|one| !settings.withheld.contains(one)).collect();
    let value = world.secret("token");
    let until = settings.ttl.map(|ttl| Instant::now() + ttl);
    let token = Token { service: service.to_owned(), allowed, until, uses_left: settings.max_uses };
    world.tokens.insert(value.clone(), token);
    let mut answer = serde_json::Map::new();
    if settings.field != TokenField::AccessToken {
        answer.insert("token".to_owned(), value.clone().into());
    }
    if settings.field != TokenField::Token {
        answer.insert("access_token".to_owned(), value.into());
    }
    if let Some(ttl) = settings.ttl {
        answer.insert("expires_in".to_owned(), ttl.as_secs().into());
    }
    Some(serde_json::Value::Object(answer).to_string())
}
