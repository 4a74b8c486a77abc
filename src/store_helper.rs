//! `lazurite store-helper`: what containers/image calls `additional-layer-store-auth-helper`.
//!
//! It is run at the begin of a pull, with the logins of the image on its standard input, and hands them to the store. Nothing of
//! a login is printed, logged or written.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;

use anyhow::{Context, ensure};
use proto::control::LoginRequest;
use serde::Deserialize;

use crate::config::Config;
use crate::containerd::refused;
use crate::daemon;

/// One image's login is a few hundred bytes; tokens are a few thousand.
const LIMIT: u64 = 1 << 20;

/// A login as containers/image writes it (image/docker/docker_image_src.go).
#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default, rename = "identityToken")]
    identity_token: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login")
    }
}

/// Reads logins and hands them over.
///
/// # Errors
///
/// They cannot be read, or the store cannot be reached or refuses.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    let mut text = String::new();
    std::io::stdin().lock().take(LIMIT).read_to_string(&mut text).context("reading standard input")?;
    let logins = parse(&text)?;
    let mut client = daemon::client(&config.store.address()).await?;
    for (reference, Login { username, password, identity_token }) in logins {
        let request = LoginRequest { reference, username, password, identity_token };
        client.login(request).await.map_err(refused("the store does not take the login"))?;
    }
    Ok(())
}

fn parse(text: &str) -> anyhow::Result<BTreeMap<String, Login>> {
    // The error of the parser quotes what it has read.
    let logins: Option<BTreeMap<String, Login>> = serde_json::from_str(text).ok();
    let logins = logins
        .context(r#"standard input is no {"<reference>": {"username", "password", "identityToken"}}"#)?;
    ensure!(!logins.is_empty(), "standard input names no reference");
    Ok(logins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_read_and_never_quoted() {
        let logins =
            parse(r#"{"h/r:t":{"username":"u","password":"secret"},"h/other:t":{"identityToken":"token"}}"#)
                .unwrap();
        let login = &logins["h/r:t"];
        assert_eq!(
            (&login.username[..], &login.password[..], &login.identity_token[..]),
            ("u", "secret", "")
        );
        assert_eq!(logins["h/other:t"].identity_token, "token");
        for bad in ["", "{}", "[]", r#"{"h/r:t":{"password":["secret"]}}"#, r#"{"h/r:t":"secret"}"#] {
            let error = format!("{:#} {:?}", parse(bad).unwrap_err(), parse(bad).unwrap_err());
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(!format!("{logins:?}").contains("secret"));
    }
}
