//! What the command line says about registries: a login, and plain http.
//!
//! The registry client reads logins from a docker configuration file. A login given on the command line is such a
//! file in anonymous memory: the password is never on a disk, and gone with the process.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::Context;
use rustix::fs::MemfdFlags;

use crate::cli::RegistryArgs;
use crate::config::Config;

/// What the command line says of one registry.
#[derive(Debug, Clone, Copy)]
pub struct Wishes<'a> {
    /// `name:password`.
    pub user: Option<&'a str>,
    /// Whether it is reached without TLS.
    pub plain_http: bool,
}

impl<'a> From<&'a RegistryArgs> for Wishes<'a> {
    fn from(args: &'a RegistryArgs) -> Self {
        Self { user: args.user.as_deref(), plain_http: args.plain_http }
    }
}

/// The registry client's settings: those of the configuration with the command line's wishes for `host`. The login
/// must live as long as the client.
///
/// # Errors
///
/// The login has another form, or cannot be kept.
pub fn settings<'a>(
    config: &Config,
    wishes: impl Into<Wishes<'a>>,
    host: Option<&str>,
) -> anyhow::Result<(registry::Config, Option<Login>)> {
    let mut settings = config.registry();
    let (wishes, Some(host)) = (wishes.into(), host) else { return Ok((settings, None)) };
    if wishes.plain_http {
        settings.hosts.entry(host.to_owned()).or_default().insecure = true;
    }
    let login = wishes.user.map(|user| Login::new(host, user)).transpose()?;
    if let Some(login) = &login {
        settings = settings.only_docker_config(login.path());
    }
    Ok((settings, login))
}

/// One login, readable at [`Login::path`] while this is alive.
#[derive(Debug)]
pub struct Login {
    file: File,
}

impl Login {
    /// A login at `host` with `user`, which is `name:password`.
    ///
    /// # Errors
    ///
    /// There is no colon in it, or no memory for it.
    fn new(host: &str, user: &str) -> anyhow::Result<Self> {
        let (name, password) =
            user.split_once(':').context("--user takes a name and a password with a colon between")?;
        let entry = serde_json::json!({ "username": name, "password": password });
        let contents = serde_json::json!({ "auths": { host: entry } });
        let mut file = File::from(
            rustix::fs::memfd_create("login", MemfdFlags::CLOEXEC).context("cannot keep the login")?,
        );
        file.write_all(contents.to_string().as_bytes()).context("cannot keep the login")?;
        Ok(Self { file })
    }

    /// Where this process can read it.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_docker_configuration_with_one_entry() {
        let login = Login::new("r.example:5000", "bob:a:\"b").unwrap();
        let read: serde_json::Value = serde_json::from_slice(&std::fs::read(login.path()).unwrap()).unwrap();
        let entry = serde_json::json!({ "username": "bob", "password": "a:\"b" });
        assert_eq!(read, serde_json::json!({ "auths": { "r.example:5000": entry } }));
        assert!(Login::new("r.example", "bob").is_err());
    }
}
