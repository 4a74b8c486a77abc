//! containerd's settings of registries: `hosts.toml`, read while they are in use.
//!
//! Owns where the files are and when they are read. [`Live`] answers the registry client's question for an origin's
//! hosts from memory, and looks at the files at most once a second: it remembers every path it looked at with what
//! `stat` said, and reads again when any differs. What a file says is [`parse`]'s.
//!
//! Invariants: settings that cannot be used change nothing, and are complained about once for each state of the files;
//! as long as nothing has changed the same `Arc` is handed out.
//!
//! The layout is containerd's: in each root the directories `<host>_<port>_`, `<host:port>`, `_default`, the first
//! that exists; roots in order, so that a `_default` of the first hides all of the second. A directory without a
//! `hosts.toml` may hold certificates as docker has them: `*.crt` are authorities, `*.cert` with `*.key` the client's.

mod parse;

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use registry::{HostSettings, HostSource, OriginHosts, TlsSettings, Verification};

use crate::config::{Fault, Notice};
use parse::{Described, HostsFile, why};

/// Between two looks at the files of one origin. A dozen `stat`s, which the busiest reader must not notice.
const PERIOD: Duration = Duration::from_secs(1);
/// Origins remembered; names of registries come from whoever starts containers.
const MAX_ORIGINS: usize = 1000;

/// The hosts of origins by the files as they are.
#[derive(Debug)]
pub struct Live {
    roots: Vec<PathBuf>,
    period: Duration,
    origins: Mutex<HashMap<String, Known>>,
}

#[derive(Debug)]
struct Known {
    looked: Instant,
    seen: Seen,
    hosts: Arc<OriginHosts>,
}

impl Live {
    /// By the directories in `roots`. No I/O.
    pub fn new(roots: Vec<PathBuf>) -> Self {
        Self { roots, period: PERIOD, origins: Mutex::default() }
    }
}

impl HostSource for Live {
    fn hosts(&self, origin: &str) -> Arc<OriginHosts> {
        // Nothing is left half done in there.
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some(known) = origins.get_mut(origin) {
            if now.duration_since(known.looked) >= self.period {
                known.looked = now;
                if known.seen.differs() {
                    known.renew(origin, &self.roots);
                }
            }
            return known.hosts.clone();
        }
        if origins.len() >= MAX_ORIGINS {
            origins.clear();
        }
        let mut known = Known { looked: now, seen: Seen::default(), hosts: Arc::default() };
        known.renew(origin, &self.roots);
        let hosts = known.hosts.clone();
        origins.insert(origin.to_owned(), known);
        hosts
    }
}

impl Known {
    /// Reads the files; what cannot be used changes nothing.
    fn renew(&mut self, origin: &str, roots: &[PathBuf]) {
        self.seen = Seen::default();
        match look(&mut self.seen, roots, origin) {
            Ok((hosts, notices)) => {
                notices.iter().for_each(|notice| tracing::warn!("{notice}"));
                // Whoever holds the settings need not make anything new of the same.
                if hosts != *self.hosts {
                    tracing::info!(registry = origin, %hosts, "hosts are asked in this order from now on");
                    self.hosts = Arc::new(hosts);
                }
            }
            Err(error) => {
                let kept = match *self.hosts == OriginHosts::default() {
                    true => "the registry itself is asked",
                    false => "what was read before stays in force",
                };
                tracing::warn!(registry = origin, "{error:#}; {kept}");
            }
        }
    }
}

/// Every path that was looked at, and what it was.
#[derive(Debug, Default)]
struct Seen(Vec<(PathBuf, Option<Facts>)>);

/// What tells one state of a file from another.
#[derive(Debug, PartialEq)]
struct Facts {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// A file may be written twice within one tick of the clock, but not changed and its time set back.
    changed: (i64, i64),
}

impl Facts {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Seen {
    fn differs(&self) -> bool {
        self.0.iter().any(|(path, facts)| fs::metadata(path).ok().as_ref().map(Facts::of) != *facts)
    }

    /// Whether there is something at `path`.
    fn exists(&mut self, path: &Path) -> io::Result<bool> {
        let found = fs::metadata(path);
        self.0.push((path.to_owned(), found.as_ref().ok().map(Facts::of)));
        match found {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The contents at `path`. It is looked at first, so that a change in between is seen later.
    fn read(&mut self, path: &Path) -> io::Result<Vec<u8>> {
        self.exists(path)?;
        fs::read(path)
    }
}

/// What the files say of `origin`.
fn look(seen: &mut Seen, roots: &[PathBuf], origin: &str) -> anyhow::Result<(OriginHosts, Vec<Notice>)> {
    for path in roots.iter().flat_map(|root| candidates(root, origin)) {
        if seen.exists(&path).with_context(|| format!("cannot look at {}", path.display()))? {
            return directory(seen, &path);
        }
    }
    Ok((OriginHosts::default(), Vec::new()))
}

/// The directories of `origin` in one root, the best first. The name of an origin was checked: it stays in the root.
fn candidates(root: &Path, origin: &str) -> Vec<PathBuf> {
    let with_port = origin.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let with_port = with_port.map(|(host, port)| format!("{host}_{port}_"));
    let names = with_port.iter().map(String::as_str).chain([origin, "_default"]);
    names.map(|name| root.join(name)).collect()
}

fn directory(seen: &mut Seen, directory: &Path) -> anyhow::Result<(OriginHosts, Vec<Notice>)> {
    let path = directory.join("hosts.toml");
    let file = path.display().to_string();
    let contents = match seen.read(&path) {
        Ok(contents) => contents,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Fault::file(&path, error).into()),
    };
    if contents.is_empty() {
        return Ok((certificates(seen, directory)?, Vec::new()));
    }
    let text = String::from_utf8(contents).with_context(|| format!("{file} is not UTF-8"))?;
    let (HostsFile { hosts, server }, notices) = parse::parse(&file, &text)?;
    let mut complete = |host: Described| {
        let fault = |offset, what: String| anyhow::Error::new(Fault::at(&file, &text, offset, what));
        settings(seen, directory, host, fault)
    };
    let hosts = hosts.into_iter().map(&mut complete).collect::<Result<_, _>>()?;
    Ok((OriginHosts { hosts, server: complete(server)? }, notices))
}

/// A host's settings with the files that are named for it.
fn settings(
    seen: &mut Seen,
    directory: &Path,
    host: Described,
    fault: impl Fn(usize, String) -> anyhow::Error,
) -> anyhow::Result<HostSettings> {
    let Described { mut settings, ca, client, verification } = host;
    if ca.is_empty() && client.is_empty() && verification.is_none() {
        return Ok(settings);
    }
    let mut tls = TlsSettings::default();
    let mut read = |path: &Path, offset, key| {
        let path = directory.join(path);
        let cannot = |error| fault(offset, format!("{key}: cannot read {}: {error}", path.display()));
        seen.read(&path).map_err(cannot)
    };
    let unusable = |error: &registry::Error, path: &Path, offset, key| {
        fault(offset, format!("{key}: {}: {}", directory.join(path).display(), why(error)))
    };
    for parse::Named { path, offset } in &ca {
        let pem = read(path, *offset, "ca")?;
        tls.trust(&pem).map_err(|error| unusable(&error, path, *offset, "ca"))?;
    }
    for (parse::Named { path, offset }, key) in &client {
        let certificate = read(path, *offset, "client")?;
        let key = key.as_ref().map(|key| read(key, *offset, "client")).transpose()?;
        tls.identify(&certificate, key.as_deref().unwrap_or(&certificate))
            .map_err(|error| unusable(&error, path, *offset, "client"))?;
    }
    tls.set_verification(verification.unwrap_or_default());
    // `skip_verify = false` alone says what holds anyhow.
    if tls != TlsSettings::default() {
        settings.set_tls(tls);
    }
    Ok(settings)
}

/// Certificates as docker lays them out, for the registry itself.
fn certificates(seen: &mut Seen, directory: &Path) -> anyhow::Result<OriginHosts> {
    let cannot = || format!("cannot read {}", directory.display());
    if !directory.is_dir() {
        return Ok(OriginHosts::default());
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        if !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    let ending = |end: &'static str| {
        let files = files.iter().filter(move |path| path.extension().is_some_and(|found| found == end));
        files.map(|path| parse::Named { path: path.clone(), offset: 0 })
    };
    let host = Described {
        ca: ending("crt").collect(),
        client: ending("cert")
            .map(|certificate| {
                let key = certificate.path.with_extension("key");
                let key = files.contains(&key).then_some(key);
                (certificate, key)
            })
            .collect(),
        verification: None::<Verification>,
        settings: HostSettings::default(),
    };
    let server = settings(seen, directory, host, |_, what| anyhow::anyhow!(what))?;
    Ok(OriginHosts { hosts: Vec::new(), server })
}

/// What is wrong with the files in `roots`, if anything, and how many were read.
pub fn faults(roots: &[PathBuf]) -> (usize, Vec<String>) {
    let directories = roots.iter().filter_map(|root| fs::read_dir(root).ok()).flatten().flatten();
    let mut directories: Vec<PathBuf> =
        directories.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    directories.sort();
    let faults = directories.iter().flat_map(|path| match directory(&mut Seen::default(), path) {
        Ok((_, notices)) => notices.iter().map(ToString::to_string).collect(),
        Err(error) => vec![format!("{error:#}")],
    });
    let faults = faults.collect();
    (directories.len(), faults)
}

#[cfg(test)]
mod tests;
