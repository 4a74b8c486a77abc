//! Logins that image pulls brought along: kubelet sends them with each pull, and containerd tells no snapshotter.
//!
//! Owns the store, which is memory only: nothing here is ever written, and a new process begins with none. A login given for
//! a repository serves that repository and no other. Bounded in number and size: what was not used for longest goes first.

use super::{Answer, Credential, Place, canonical, decode_auth, host_of};
use crate::secret::Secret;
use crate::{Error, Reference};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Repositories whose logins are kept.
const MAX_REPOSITORIES: usize = 512;
/// Logins of one repository: those of several pods.
const MAX_LOGINS: usize = 4;
/// Bytes of one login; tokens of clouds have some KiB.
const MAX_BYTES: usize = 16 << 10;

/// A login as a pull brings it: the fields of CRI's `AuthConfig`. Empty fields are not given.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PullLogin {
    /// The user's name.
    pub username: String,
    /// The user's password.
    pub password: String,
    /// Name and password in one: base64 of `name:password`.
    pub auth: String,
    /// An OAuth2 refresh token, which the host's token server takes.
    pub identity_token: String,
    /// A token that the host takes itself.
    pub registry_token: String,
    /// The host it is for, or a URL of it; any if empty.
    pub server_address: String,
}

impl fmt::Debug for PullLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PullLogin(***)")
    }
}

impl PullLogin {
    /// The most specific of what is given; `None` if nothing is.
    fn credential(&self) -> Result<Option<Credential>, &'static str> {
        let fields = [&self.username, &self.password, &self.auth, &self.identity_token, &self.registry_token];
        if fields.iter().map(|field| field.len()).sum::<usize>() > MAX_BYTES {
            return Err("is larger than 16 KiB");
        }
        if !self.registry_token.is_empty() {
            return Ok(Some(Credential::AccessToken(Secret::new(&self.registry_token))));
        }
        if !self.identity_token.is_empty() {
            return Ok(Some(Credential::IdentityToken(Secret::new(&self.identity_token))));
        }
        if !self.username.is_empty() {
            let password = Secret::new(&self.password);
            return Ok(Some(Credential::Password { user: self.username.clone(), password }));
        }
        (!self.auth.is_empty()).then(|| decode_auth(&self.auth)).transpose()
    }
}

/// Logins of image pulls, by repository. Clones are the same store.
#[derive(Clone, Default)]
pub struct PullCredentials(Arc<Mutex<Store>>);

#[derive(Default)]
struct Store {
    /// By host and repository.
    logins: HashMap<(String, String), Logins>,
    /// Grows with each use.
    clock: u64,
}

struct Logins {
    used: u64,
    /// The newest first.
    credentials: Vec<Credential>,
}

impl fmt::Debug for PullCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullCredentials").field("repositories", &self.0.lock().logins.len()).finish()
    }
}

impl PullCredentials {
    /// Keeps the login that a pull of `image` brought along, as the one to be tried first. `image` is a reference as pulls
    /// name it: `host/repository:tag`, `…@digest`, or short for Docker Hub. A pull without a login, or with one that is for
    /// another host, leaves everything as it is.
    ///
    /// # Errors
    ///
    /// [`Error::BadReference`]; [`Error::BadLogin`] for a login that nothing can be made of.
    pub fn remember(&self, image: &str, login: PullLogin) -> Result<(), Error> {
        let key = key_of(image)?;
        let meant = host_of(&login.server_address);
        if !meant.is_empty() && canonical(meant) != key.0 {
            tracing::debug!(host = key.0, repository = key.1, "the login of a pull is for another host");
            return Ok(());
        }
        let bad = |why| Error::BadLogin { repository: format!("{}/{}", key.0, key.1), why };
        let Some(credential) = login.credential().map_err(bad)? else { return Ok(()) };
        let mut store = self.0.lock();
        store.clock += 1;
        let used = store.clock;
        if !store.logins.contains_key(&key) && store.logins.len() >= MAX_REPOSITORIES {
            let oldest =
                store.logins.iter().min_by_key(|(_, logins)| logins.used).map(|(key, _)| key.clone());
            oldest.map(|oldest| store.logins.remove(&oldest));
        }
        let logins = store.logins.entry(key).or_insert(Logins { used, credentials: Vec::new() });
        logins.used = used;
        logins.credentials.retain(|known| *known != credential);
        logins.credentials.insert(0, credential);
        logins.credentials.truncate(MAX_LOGINS);
        Ok(())
    }

    /// Forgets all logins for the repository of `image`.
    ///
    /// # Errors
    ///
    /// [`Error::BadReference`].
    pub fn forget(&self, image: &str) -> Result<(), Error> {
        let key = key_of(image)?;
        self.0.lock().logins.remove(&key);
        Ok(())
    }

    pub(super) fn answer(&self, place: Place<'_>) -> Answer {
        let mut store = self.0.lock();
        store.clock += 1;
        let used = store.clock;
        let key = (canonical(place.host).to_owned(), place.repository.to_owned());
        let credentials = match store.logins.get_mut(&key) {
            None => Vec::new(),
            Some(logins) => {
                logins.used = used;
                logins.credentials.clone()
            }
        };
        let said = match credentials.len() {
            0 => format!("no pull of {place} has brought a login"),
            1 => format!("login of a pull of {place}"),
            several => format!("{several} logins of pulls of {place}"),
        };
        Answer { source: "CRI pulls".to_owned(), credentials, said, quiet: false }
    }
}

fn key_of(image: &str) -> Result<(String, String), Error> {
    let reference: Reference = image.parse()?;
    Ok((canonical(reference.host()).to_owned(), reference.repository().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(user: &str) -> PullLogin {
        PullLogin { username: user.into(), password: "hunter2".into(), ..PullLogin::default() }
    }

    fn users(pulls: &PullCredentials, host: &str, repository: &str) -> Vec<String> {
        let answer = pulls.answer(Place { host, repository });
        let users = answer.credentials.into_iter().map(|credential| match credential {
            Credential::Password { user, .. } => user,
            other => panic!("{other:?}"),
        });
        users.collect()
    }

    #[test]
    fn a_login_serves_its_repository_only() {
        let pulls = PullCredentials::default();
        pulls.remember("r.example:5000/team/app:v1", login("one")).unwrap();
        pulls.remember("nginx", login("hub")).unwrap();
        for (host, repository, expected) in [
            ("r.example:5000", "team/app", &["one"][..]),
            ("r.example:5000", "team/other", &[]),
            ("r.example:5000", "team", &[]),
            ("r.example", "team/app", &[]),
            ("docker.io", "library/nginx", &["hub"]),
            ("registry-1.docker.io", "library/nginx", &["hub"]),
            ("docker.io", "nginx", &[]),
        ] {
            assert_eq!(users(&pulls, host, repository), expected, "{host}/{repository}");
        }
        pulls.forget("r.example:5000/team/app@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef").unwrap();
        assert!(users(&pulls, "r.example:5000", "team/app").is_empty());
        assert!(matches!(pulls.remember("http://x", login("x")), Err(Error::BadReference { .. })));
    }

    #[test]
    fn the_newest_comes_first_and_few_are_kept() {
        let pulls = PullCredentials::default();
        for user in ["a", "b", "a", "c"] {
            pulls.remember("r.example/app", login(user)).unwrap();
        }
        assert_eq!(users(&pulls, "r.example", "app"), ["c", "a", "b"]);
        for n in 0..10 {
            pulls.remember("r.example/app", login(&n.to_string())).unwrap();
        }
        assert_eq!(users(&pulls, "r.example", "app"), ["9", "8", "7", "6"]);
        for n in 0..MAX_REPOSITORIES {
            pulls.remember(&format!("r.example/n{n}"), login("x")).unwrap();
            users(&pulls, "r.example", "app");
        }
        assert_eq!(pulls.0.lock().logins.len(), MAX_REPOSITORIES);
        assert!(!users(&pulls, "r.example", "app").is_empty(), "it was in use");
        assert!(users(&pulls, "r.example", "n0").is_empty());
    }

    #[test]
    fn every_form_of_a_login() {
        let secret = |text: &str| Secret::new(text);
        let password = |user: &str| Some(Credential::Password { user: user.into(), password: secret("p") });
        let given = |field: fn(&mut PullLogin) -> &mut String, value: &str| {
            let mut login = PullLogin { username: "u".into(), password: "p".into(), ..PullLogin::default() };
            *field(&mut login) = value.to_owned();
            login
        };
        let auth = PullLogin { auth: "dTI6cA==".into(), ..PullLogin::default() };
        for (login, expected) in [
            (PullLogin::default(), Ok(None)),
            (given(|login| &mut login.auth, "dTI6cA=="), Ok(password("u"))),
            (auth.clone(), Ok(password("u2"))),
            (PullLogin { auth: "!".into(), ..auth }, Err("has an auth that is not base64 text")),
            (given(|login| &mut login.identity_token, "t"), Ok(Some(Credential::IdentityToken(secret("t"))))),
            (given(|login| &mut login.registry_token, "t"), Ok(Some(Credential::AccessToken(secret("t"))))),
            (given(|login| &mut login.password, &"x".repeat(MAX_BYTES)), Err("is larger than 16 KiB")),
        ] {
            assert_eq!(login.credential(), expected);
        }
        let shown = format!("{:?} {:?}", login("hunter2"), PullCredentials::default());
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn a_login_for_another_host_is_left() {
        for (image, address, kept) in [
            ("r.example/app", "https://r.example/v2/", true),
            ("r.example/app", "r.example", true),
            ("r.example/app", "other.example", false),
            ("r.example:5000/app", "https://r.example", false),
            ("busybox", "https://index.docker.io/v1/", true),
        ] {
            let pulls = PullCredentials::default();
            let login = PullLogin { server_address: address.into(), ..login("u") };
            pulls.remember(image, login).unwrap();
            assert_eq!(pulls.0.lock().logins.len(), usize::from(kept), "{image} {address}");
        }
    }
}
