//! Credential helpers: programs `docker-credential-<name>` that keep logins elsewhere (a cloud's token service, a keychain).
//!
//! Protocol: docker/docker-credential-helpers. `get` reads a server's name from standard input and writes
//! `{"ServerURL", "Username", "Secret"}`, or fails and says so on standard output. The user name `<token>` means that the
//! secret is an identity token.
//!
//! Owns the words of the call. What a helper writes is never repeated: it may be the secret.

use super::Credential;
use super::program::{self, Said};
use crate::secret::Secret;
use serde::Deserialize;
use std::path::PathBuf;
use tokio::process::Command;

/// What docker's own helpers say when they know nothing of a server.
const NOT_FOUND: &str = "credentials not found in native keychain";
/// The user name that says that the secret is a token.
const TOKEN_USER: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    secret: String,
}

/// Asks the helper `name` for the login at `server`; `directory` is where helpers are, the search path's if `None`.
///
/// # Errors
///
/// Why it has not answered, without anything it wrote.
pub(super) async fn get(
    name: &str,
    server: &str,
    directory: Option<&PathBuf>,
) -> Result<Option<Credential>, String> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err("has a name that no program can have".to_owned());
    }
    let program = format!("docker-credential-{name}");
    let program = directory.map_or_else(|| PathBuf::from(&program), |directory| directory.join(&program));
    let mut command = Command::new(program);
    command.arg("get");
    let Said { status, output } = program::run(command, server.as_bytes()).await?;
    if !status.success() {
        let said = String::from_utf8_lossy(&output);
        return if said.trim() == NOT_FOUND { Ok(None) } else { Err(format!("has failed ({status})")) };
    }
    let Answer { username, secret } =
        serde_json::from_slice(&output).map_err(|_| "has not answered with a login".to_owned())?;
    let secret = Secret::new(&secret);
    Ok(Some(match username == TOKEN_USER {
        true => Credential::IdentityToken(secret),
        false => Credential::Password { user: username, password: secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(script: &str, server: &str) -> Result<Option<Credential>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("docker-credential-test");
        support::write_script(&path, &format!("#!/bin/sh\n{script}\n"));
        get("test", server, Some(&directory.path().to_owned())).await
    }

    #[tokio::test]
    async fn answers() {
        let echo = r#"read server; printf '{"ServerURL":"%s","Username":"%s","Secret":"hunter2"}' "$server" "$server""#;
        let password = Credential::Password { user: "r.example".into(), password: Secret::new("hunter2") };
        assert_eq!(ask(echo, "r.example").await, Ok(Some(password)));
        let token = r#"echo '{"Username":"<token>","Secret":"t0k"}'"#;
        assert_eq!(ask(token, "r").await, Ok(Some(Credential::IdentityToken(Secret::new("t0k")))));
        let unknown = format!("echo {NOT_FOUND}; exit 1");
        assert_eq!(ask(&unknown, "r").await, Ok(None));
    }

    #[tokio::test]
    async fn failures_are_told_without_what_was_written() {
        for (script, expected) in [
            ("echo hunter2; exit 3", "has failed (exit status: 3)"),
            ("echo hunter2", "has not answered with a login"),
            ("exit 0", "has not answered with a login"),
            ("yes hunter2", "has failed"),
        ] {
            let error = ask(script, "r").await.unwrap_err();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{script}: {error}");
        }
        let nowhere = PathBuf::from("/nonexistent");
        assert!(get("test", "r", Some(&nowhere)).await.unwrap_err().contains("cannot be run"));
        for name in ["", "../x", "a b", "a/b"] {
            assert!(get(name, "r", Some(&nowhere)).await.unwrap_err().contains("no program"), "{name}");
        }
    }
}
