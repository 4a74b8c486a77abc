//! A private docker-registry.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Image, PATIENCE, end};
use crate::guard::{self, ProcessGuard};

/// A docker-registry on a loopback port of its own.
#[derive(Debug)]
pub struct DockerRegistry {
    dir: PathBuf,
    storage: PathBuf,
    mode: Mode,
    address: String,
    process: Option<ProcessGuard>,
}

/// What clients may do.
#[derive(Clone, Debug)]
enum Mode {
    ReadWrite,
    /// Other tests serve the same files.
    ReadOnly,
    /// The same, for who knows [`LOGIN`].
    Locked,
    /// As these parts of its configuration say: what stands at the top, and in `http`.
    Configured {
        top: String,
        http: String,
    },
}

/// User and password that [`DockerRegistry::locked`] takes.
pub const LOGIN: (&str, &str) = ("user", "U*U");
/// The password's bcrypt: a test vector of crypt_blowfish.
const HASH: &str = "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";

/// One answered request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// GET, HEAD, ...
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The status answered.
    pub status: u16,
    /// Bytes of the body sent.
    pub bytes: u64,
}

impl DockerRegistry {
    /// An empty one that takes pushes. `dir` is made if need be and belongs to it.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(dir: &Path) -> DockerRegistry {
        DockerRegistry::open(dir, dir.join("storage"), Mode::ReadWrite)
    }

    /// One that serves all cached images, `image` among them. Nothing is copied, so it takes no pushes.
    ///
    /// # Panics
    /// If it does not start.
    pub fn with_images(dir: &Path, image: &Image) -> DockerRegistry {
        DockerRegistry::open(dir, image.storage(), Mode::ReadOnly)
    }

    /// As [`DockerRegistry::with_images`], for who knows [`LOGIN`].
    ///
    /// # Panics
    /// If it does not start.
    pub fn locked(dir: &Path, image: &Image) -> DockerRegistry {
        DockerRegistry::open(dir, image.storage(), Mode::Locked)
    }

    /// An empty one that fetches from the registry with the URL `remote` what it is asked for, and keeps it.
    ///
    /// # Panics
    /// If it does not start.
    pub fn proxy(dir: &Path, remote: &str) -> DockerRegistry {
        DockerRegistry::configured(dir, &format!("proxy: {{remoteurl: {remote:?}}}\n"), "")
    }

    /// An empty one with more configuration: lines of YAML at the top, and keys of the map `http`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn configured(dir: &Path, top: &str, http: &str) -> DockerRegistry {
        let mode = Mode::Configured { top: top.to_owned(), http: http.to_owned() };
        DockerRegistry::open(dir, dir.join("storage"), mode)
    }

    /// From now on it serves what it holds to who knows [`LOGIN`].
    ///
    /// # Panics
    /// If it does not start again.
    pub fn lock(&mut self) {
        self.stop();
        self.mode = Mode::Locked;
        self.resume();
    }

    fn open(dir: &Path, storage: PathBuf, mode: Mode) -> DockerRegistry {
        std::fs::create_dir_all(&storage).expect("the registry's storage directory");
        let address = "127.0.0.1:0".to_owned();
        let mut registry = DockerRegistry { dir: dir.to_owned(), storage, mode, address, process: None };
        registry.resume();
        registry
    }

    /// Ends the server; connections to its port are then refused.
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            end(process);
        }
    }

    /// Starts it again after [`DockerRegistry::stop`], on the same port.
    ///
    /// # Panics
    /// If it does not start, for instance because the port was taken meanwhile.
    pub fn resume(&mut self) {
        std::fs::create_dir_all(&self.dir).expect("the registry's directory");
        let config = self.dir.join("registry.yml");
        std::fs::write(&config, self.config()).expect("the registry's configuration");
        let log = self.log_path();
        let seen = self.log().len();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).env_remove("REGISTRY_HTTP_ADDR");
        let process = ProcessGuard::spawn(&mut command, log).expect("docker-registry");
        self.process = Some(process);
        let started = guard::eventually(PATIENCE, || {
            let log = self.log();
            match log[seen..].split_once("listening on ") {
                Some((_, rest)) => {
                    self.address =
                        rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
                    true
                }
                None => false,
            }
        });
        assert!(started, "docker-registry does not listen: {}", self.log());
    }

    fn config(&self) -> String {
        let maintenance = match self.mode {
            Mode::ReadWrite | Mode::Configured { .. } => "",
            Mode::ReadOnly | Mode::Locked => "  maintenance: {readonly: {enabled: true}}\n",
        };
        let (top, http) = match &self.mode {
            Mode::ReadWrite | Mode::ReadOnly => Default::default(),
            Mode::Configured { top, http } => (top.clone(), http.clone()),
            Mode::Locked => {
                let path = self.dir.join("htpasswd");
                std::fs::write(&path, format!("{}:{HASH}\n", LOGIN.0)).expect("the registry's users");
                (format!("auth: {{htpasswd: {{realm: test, path: {path:?}}}}}\n"), String::new())
            }
        };
        format!(
            "version: 0.1\n\
             log: {{level: info, accesslog: {{disabled: false}}}}\n\
             storage:\n  filesystem: {{rootdirectory: {:?}}}\n{maintenance}\
             {top}http: {{addr: {:?}, {http}}}\n",
            self.storage, self.address
        )
    }

    /// `127.0.0.1:<port>`.
    pub fn address(&self) -> &str {
        &self.address
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("registry.log")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Requests whose answers have ended, in the order of their ends. A client may have its answer before it is here.
    pub fn accesses(&self) -> Vec<Access> {
        self.log().lines().filter_map(access).collect()
    }

    /// Bytes of all bodies sent in answer to GET.
    pub fn bytes_sent(&self) -> u64 {
        self.accesses().iter().filter(|access| access.method == "GET").map(|access| access.bytes).sum()
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Reads a line of the access log, which is in Apache's combined format and mixed with other lines.
fn access(line: &str) -> Option<Access> {
    let mut quoted = line.split('"');
    let (_client, request, answer) = (quoted.next()?, quoted.next()?, quoted.next()?);
    let mut request = request.split(' ');
    let (method, path) = (request.next()?.to_owned(), request.next()?.to_owned());
    request.next().filter(|version| version.starts_with("HTTP/"))?;
    let mut answer = answer.split_whitespace();
    let (status, bytes) = (answer.next()?.parse().ok()?, answer.next()?.parse().ok()?);
    Some(Access { method, path, status, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_lines_are_told_from_others() {
        let line = r#"127.0.0.1 - - [22/Nov/2026:00:53:18 +0000] "GET /v2/a/blobs/sha256:1 HTTP/1.1" 206 17 "" "x/1""#;
        let (method, path) = ("GET".to_owned(), "/v2/a/blobs/sha256:1".to_owned());
        assert_eq!(access(line), Some(Access { method, path, status: 206, bytes: 17 }));
        let event = r#"time="2026-11-22T00:53:17Z" level=info msg="listening on 127.0.0.1:36805" go.version=go1.19.8"#;
        assert_eq!(access(event), None);
        assert_eq!(access(""), None);
    }
}
