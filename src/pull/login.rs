//! A login given on the command line.
//!
//! The registry client reads logins from a docker configuration file. This is such a file with one entry, in
//! anonymous memory: the password is never on a disk, and gone with the process.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::Context;
use rustix::fs::MemfdFlags;

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
    pub fn new(host: &str, user: &str) -> anyhow::Result<Self> {
        let (name, password) =
            user.split_once(':').context("--user takes a name and a password with a colon between")?;
        let contents = serde_json::json!({ "auths": { host: { "username": name, "password": password } } });
        let mut file = File::from(
            rustix::fs::memfd_create("login", MemfdFlags::CLOEXEC).context("cannot keep the login")?,
        );
        file.write_all(contents.to_string().as_bytes()).context("cannot keep the login")?;
        Ok(Self { file })
    }

    /// Where this process can read it.
    pub fn path(&self) -> PathBuf {
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
