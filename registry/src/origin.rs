//! What is known from outside of the hosts that serve an origin's objects: the port for settings that change
//! while the process runs.
//!
//! Owns the values and their validity: a [`HostSettings`] that exists can be used, so that whoever reads settings
//! from somewhere finds out what is wrong with them there. Does no I/O and knows no file format. How a host is
//! asked follows in `hosts`.

use crate::Error;
use crate::reference::check_repository;
use crate::tls::TlsSettings;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// Where the settings of origins come from while the process runs.
pub trait HostSource: Send + Sync + fmt::Debug {
    /// What is known of `origin` now, as it stands in references. Asked before every read: it must be cheap, and
    /// give the same `Arc` for as long as nothing has changed.
    fn hosts(&self, origin: &str) -> Arc<OriginHosts>;
}

/// The hosts that serve one origin's objects.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OriginHosts {
    /// Asked in this order, after the mirrors of [`Config::hosts`](crate::Config::hosts).
    pub hosts: Vec<HostSettings>,
    /// Asked last, and the only one to which anything is pushed.
    pub server: HostSettings,
}

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Blobs, and manifests by digest.
    Pull,
    /// Manifests by tag.
    Resolve,
    /// Taking blobs and manifests.
    Push,
}

impl Capability {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Resolve => "resolve",
            Self::Push => "push",
        }
    }
}

/// How the path of a host's URL is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// `/v2` follows it, unless it ends so.
    Standard,
    /// It is the API's root itself.
    Given,
}

/// One host and how it is asked. The default is the origin itself, asked for everything.
#[derive(Clone, PartialEq)]
pub struct HostSettings {
    /// The API's root, without the slash at its end; `None` for the origin's own.
    pub(crate) base: Option<Url>,
    capabilities: [bool; 3],
    pub(crate) headers: HeaderMap,
    pub(crate) tls: Option<Arc<TlsSettings>>,
    pub(crate) dial_timeout: Option<Duration>,
    pub(crate) rewrites: Rewrites,
}

impl Default for HostSettings {
    fn default() -> Self {
        Self {
            base: None,
            capabilities: [true; 3],
            headers: HeaderMap::new(),
            tls: None,
            dial_timeout: None,
            rewrites: Rewrites::default(),
        }
    }
}

impl HostSettings {
    /// The host at `url`, which is a scheme, a host and perhaps a path; without a scheme it is https.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for another form.
    pub fn at(url: &str, root: Root) -> Result<Self, Error> {
        let bad = |why: &str| Error::Config { key: url.to_owned(), why: why.to_owned() };
        let full = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
        // The user part may be a password: such a URL is not repeated.
        let mut base = Url::parse(&full)
            .map_err(|error| Error::Config { key: "url".to_owned(), why: format!("not a URL: {error}") })?;
        if !base.username().is_empty() || base.password().is_some() {
            let why = "a URL with a user; logins belong into the docker configuration file";
            return Err(Error::Config { key: "url".to_owned(), why: why.to_owned() });
        }
        if !matches!(base.scheme(), "http" | "https") {
            return Err(bad("the scheme must be http or https"));
        }
        if base.query().is_some() || base.fragment().is_some() {
            return Err(bad("must be a scheme, a host and a path only"));
        }
        // Its own website answers there; containerd's documentation writes it all the same.
        if base.host_str() == Some("docker.io") {
            let _ = base.set_host(Some("registry-1.docker.io"));
        }
        let path = base.path().trim_end_matches('/').to_owned();
        let path = match root {
            Root::Standard if !path.ends_with("/v2") => format!("{path}/v2"),
            _ => path,
        };
        base.set_path(&path);
        Ok(Self { base: Some(base), ..Self::default() })
    }

    /// Restricts what it may be asked for.
    pub fn set_capabilities(&mut self, capabilities: &[Capability]) {
        self.capabilities = [false; 3];
        capabilities.iter().for_each(|&capability| self.capabilities[capability as usize] = true);
    }

    /// Whether it may be asked for this.
    pub fn can(&self, capability: Capability) -> bool {
        self.capabilities[capability as usize]
    }

    /// Adds a header for every request to this host, never forwarded to another.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for what no header may be; the value is not repeated.
    pub fn add_header(&mut self, name: &str, value: &str) -> Result<(), Error> {
        add_header(&mut self.headers, name, value)
            .map_err(|why| Error::Config { key: format!("header {name:?}"), why: why.to_owned() })
    }

    /// Gives the host TLS settings of its own.
    pub fn set_tls(&mut self, tls: TlsSettings) {
        self.tls = Some(Arc::new(tls));
    }

    /// In place of [`Config::connect_timeout`](crate::Config::connect_timeout) for this host.
    pub fn set_dial_timeout(&mut self, limit: Duration) {
        self.dial_timeout = Some(limit.min(crate::config::LONGEST));
    }

    /// Asks for repositories whose names match `pattern` under the name that `replacement` makes of it: a regular expression
    /// without look-around, and `$1` for its first group. The first of several that changes the name counts.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for what is no regular expression.
    pub fn add_rewrite(&mut self, pattern: &str, replacement: &str) -> Result<(), Error> {
        let compiled = regex::Regex::new(pattern).map_err(|error| Error::Config {
            key: format!("rewrite {pattern:?}"),
            why: error
                .to_string()
                .lines()
                .last()
                .unwrap_or_default()
                .trim_start_matches("error: ")
                .to_owned(),
        })?;
        let replacement = replacement.to_owned();
        self.rewrites.0.push(Rewrite { pattern: compiled, replacement });
        Ok(())
    }
}

/// What a host calls repositories.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Rewrites(Vec<Rewrite>);

#[derive(Debug, Clone)]
struct Rewrite {
    pattern: regex::Regex,
    replacement: String,
}

impl PartialEq for Rewrite {
    fn eq(&self, other: &Self) -> bool {
        (self.pattern.as_str(), &self.replacement) == (other.pattern.as_str(), &other.replacement)
    }
}

impl Rewrites {
    /// The host's name for a repository: its own if no rule changes it, or makes of it what no repository is called.
    pub(crate) fn apply(&self, repository: &str) -> String {
        let renamed = self.0.iter().find_map(|Rewrite { pattern, replacement }| {
            let renamed = pattern.replace_all(repository, replacement.as_str());
            (renamed != repository).then(|| renamed.trim_matches('/').to_owned())
        });
        renamed.filter(|name| check_repository(name).is_ok()).unwrap_or_else(|| repository.to_owned())
    }
}

impl fmt::Debug for HostSettings {
    /// Header values may be secrets: only the names are shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.keys().map(HeaderName::as_str).collect();
        f.debug_struct("HostSettings")
            .field("base", &self.base.as_ref().map(Url::as_str))
            .field("capabilities", &self.capabilities)
            .field("headers", &names)
            .field("tls", &self.tls)
            .field("dial_timeout", &self.dial_timeout)
            .field("rewrites", &self.rewrites)
            .finish()
    }
}

impl fmt::Display for HostSettings {
    /// Where it is, and what it may be asked for if that is not everything.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base.as_ref().map_or("the registry itself", Url::as_str))?;
        let all = [Capability::Pull, Capability::Resolve, Capability::Push];
        let can: Vec<&str> = all.into_iter().filter(|&one| self.can(one)).map(Capability::as_str).collect();
        if can.len() < all.len() { write!(f, " ({})", can.join(", ")) } else { Ok(()) }
    }
}

impl fmt::Display for OriginHosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.hosts.iter().try_for_each(|host| write!(f, "{host}, "))?;
        write!(f, "{}", self.server)
    }
}

/// Adds a header whose value prints nothing.
pub(crate) fn add_header(headers: &mut HeaderMap, name: &str, value: &str) -> Result<(), &'static str> {
    let name: HeaderName = name.parse().map_err(|_| "not a header name")?;
    let mut value: HeaderValue = value.parse().map_err(|_| "the value has forbidden characters")?;
    value.set_sensitive(true);
    headers.append(name, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots() {
        for (url, root, expected) in [
            ("https://m.example", Root::Standard, "https://m.example/v2"),
            ("m.example:5000/", Root::Standard, "https://m.example:5000/v2"),
            ("http://m.example/v2/", Root::Standard, "http://m.example/v2"),
            ("https://m.example/proxy//", Root::Standard, "https://m.example/proxy/v2"),
            ("https://m.example/v2/proxy", Root::Standard, "https://m.example/v2/proxy/v2"),
            ("https://m.example/v2/proxy", Root::Given, "https://m.example/v2/proxy"),
            ("https://m.example", Root::Given, "https://m.example/"),
            ("https://docker.io", Root::Standard, "https://registry-1.docker.io/v2"),
            ("http://[::1]:5000", Root::Standard, "http://[::1]:5000/v2"),
        ] {
            let settings = HostSettings::at(url, root).unwrap();
            assert_eq!(settings.base.unwrap().as_str(), expected, "{url}");
        }
    }

    #[test]
    fn names_of_repositories() {
        for (rules, name, expected) in [
            (&[][..], "a/b", "a/b"),
            (&[("^library/alpine$", "my-org/alpine")], "library/alpine", "my-org/alpine"),
            (&[("^library/alpine$", "my-org/alpine")], "library/alpine2", "library/alpine2"),
            (&[("^rancher/(.*)", "mirror/rancher-$1")], "rancher/pause", "mirror/rancher-pause"),
            (&[("^x", "y"), ("(.*)", "hub/$1"), ("(.*)", "other")], "a/b", "hub/a/b"),
            (&[("^(.*)$", "/team/proxy/$1")], "a/b", "team/proxy/a/b"),
            (&[("^(.*)$", "../$1")], "a/b", "a/b"),
            (&[("^(.*)$", "UPPER/$1")], "a/b", "a/b"),
        ] {
            let mut settings = HostSettings::default();
            rules.iter().for_each(|(pattern, name)| settings.add_rewrite(pattern, name).unwrap());
            assert_eq!(settings.rewrites.apply(name), expected, "{rules:?}");
        }
        let error = HostSettings::default().add_rewrite("^(?!a)", "b").unwrap_err().to_string();
        assert!(error.contains("look-around"), "{error}");
    }

    #[test]
    fn what_cannot_be_used_is_refused_and_secrets_are_not_repeated() {
        for url in
            ["ftp://m.example", "https://", "", "https://m.example/?ns=x", "https://me:hunter2@m.example"]
        {
            let error = HostSettings::at(url, Root::Standard).unwrap_err();
            assert!(
                matches!(error, Error::Config { .. }) && !error.to_string().contains("hunter2"),
                "{error}"
            );
        }
        let mut settings = HostSettings::default();
        for (name, value) in [("bad name", "hunter2"), ("x-ok", "hunter2\n")] {
            let error = settings.add_header(name, value).unwrap_err();
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        settings.add_header("x-ok", "hunter2").unwrap();
        assert!(!format!("{settings:?}").contains("hunter2"));
        assert!(settings.can(Capability::Push));
        settings.set_capabilities(&[Capability::Pull]);
        assert!(settings.can(Capability::Pull) && !settings.can(Capability::Resolve));
        let hosts = vec![HostSettings::at("m.example", Root::Standard).unwrap(), settings];
        let hosts = OriginHosts { hosts, server: HostSettings::default() };
        let expected = "https://m.example/v2, the registry itself (pull), the registry itself";
        assert_eq!(hosts.to_string(), expected);
    }
}
