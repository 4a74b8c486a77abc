//! From the text of a `hosts.toml` to what it says of hosts, with every complaint tied to a line and a key.
//!
//! Owns the format: containerd's, as its documentation and its own reading of it have it. Pure: certificates are only
//! named here, whoever asked reads them. Header values and keys are never repeated in a complaint.
//!
//! Stricter than containerd in one thing: a key that does not exist is named, since it is a slip of the pen.

use std::path::PathBuf;
use std::time::Duration;

use registry::{Capability, HostSettings, Root, Verification};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::{Fault, Notice, distance};

/// What a file says.
#[derive(Debug, PartialEq)]
pub struct HostsFile {
    /// `[host."URL"]`, in the order of the file.
    pub hosts: Vec<Described>,
    /// `server` and what stands beside it.
    pub server: Described,
}

/// One host as described, and the files to read for it.
#[derive(Debug, PartialEq, Default)]
pub struct Described {
    /// All but TLS.
    pub settings: HostSettings,
    /// Files with authorities to trust.
    pub ca: Vec<Named>,
    /// Files with a certificate and, if not in the same one, its key.
    pub client: Vec<(Named, Option<PathBuf>)>,
    /// Whether it has to prove who it is, if that is said.
    pub verification: Option<Verification>,
}

/// A path as written, and where.
#[derive(Debug, PartialEq, Clone)]
pub struct Named {
    /// The path; a relative one starts at the file's directory.
    pub path: PathBuf,
    /// The byte of the file at which it is named.
    pub offset: usize,
}

/// Keys of the file's top, and of each host.
const TOP: [&str; 2] = ["server", "host"];
const KEYS: [&str; 8] =
    ["capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout", "rewrite"];

/// Reads `text`; `file` is only used in messages.
///
/// # Errors
///
/// The first of: a TOML error, a value of the wrong type, a value that makes no sense. Unknown keys are no errors; they
/// come back as notices.
pub fn parse(file: &str, text: &str) -> Result<(HostsFile, Vec<Notice>), Fault> {
    let tree = DeTable::parse(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        // The message says what was expected; what stands there may be a secret.
        Fault::at(file, text, offset, error.message().to_owned())
    })?;
    let mut reader = Reader { file, text, notices: Vec::new() };
    let top = tree.get_ref();
    let mut server = None;
    let mut hosts = Vec::new();
    for (key, value) in top.iter() {
        match &**key.get_ref() {
            "server" => server = Some((reader.string(value, "server")?, value.span().start)),
            "host" => {
                let table = value.get_ref().as_table();
                let table = table.ok_or_else(|| reader.wrong(value, "host", "a table"))?;
                hosts = reader.hosts(table)?;
            }
            _ => {}
        }
    }
    let server = server.filter(|(url, _)| !url.is_empty());
    let server = reader.described(top, "", server, &TOP)?;
    let mut notices = reader.notices;
    notices.sort_by_key(Notice::line);
    Ok((HostsFile { hosts, server }, notices))
}

struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    notices: Vec<Notice>,
}

type Value<'i> = Spanned<DeValue<'i>>;

impl Reader<'_> {
    fn hosts(&mut self, table: &DeTable<'_>) -> Result<Vec<Described>, Fault> {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let mut hosts = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            let url = &**key.get_ref();
            let place = format!("host.{url:?}");
            let at = key.span().start;
            if url.is_empty() {
                return Err(self.fault(at, "host: the name of a host must be its URL".to_owned()));
            }
            // Before the URL is named in any other complaint: there may be a password in it.
            HostSettings::at(url, Root::Standard)
                .map_err(|error| self.fault(at, format!("host: {}", why(&error))))?;
            let table = value.get_ref().as_table();
            let table = table.ok_or_else(|| self.wrong(value, &place, "a table"))?;
            hosts.push(self.described(table, &place, Some((url, at)), &[])?);
        }
        Ok(hosts)
    }

    /// `also` are keys of the table that are read elsewhere.
    fn described(
        &mut self,
        table: &DeTable<'_>,
        place: &str,
        url: Option<(&str, usize)>,
        also: &[&str],
    ) -> Result<Described, Fault> {
        let root = match table.get("override_path") {
            Some(value) if self.boolean(value, &join(place, "override_path"))? => Root::Given,
            _ => Root::Standard,
        };
        let mut found = Described::default();
        let named = url.is_some();
        if let Some((url, at)) = url {
            found.settings = HostSettings::at(url, root).map_err(|error| {
                let key = if place.is_empty() { "server" } else { "host" };
                self.fault(at, format!("{key}: {}", why(&error)))
            })?;
        }
        for (key, value) in table.iter() {
            let name = &**key.get_ref();
            let here = join(place, name);
            match name {
                // Without a URL it is the registry itself, which can do everything: so containerd has it.
                "capabilities" => {
                    let capabilities = self.capabilities(value, &here)?;
                    if named && !capabilities.is_empty() {
                        found.settings.set_capabilities(&capabilities);
                    }
                }
                "ca" => found.ca = self.paths(value, &here)?,
                "client" => found.client = self.client(value, &here)?,
                "skip_verify" => {
                    let skipped = self.boolean(value, &here)?;
                    found.verification =
                        Some(if skipped { Verification::Skipped } else { Verification::Full });
                }
                "header" => self.headers(value, &here, &mut found.settings)?,
                "override_path" => {}
                // Of the containerd that comes with k3s and RKE2.
                "rewrite" if named => self.rewrites(value, &here, &mut found.settings)?,
                "dial_timeout" => {
                    let text = self.string(value, &here)?;
                    if !text.is_empty() {
                        let limit = duration(text)
                            .ok_or_else(|| self.wrong(value, &here, "a time such as \"5s\" or \"1m30s\""))?;
                        // To Go, none is no limit.
                        if !limit.is_zero() {
                            found.settings.set_dial_timeout(limit);
                        }
                    }
                }
                _ if also.contains(&name) => {}
                _ => {
                    let nearest =
                        KEYS.iter().chain(also).filter_map(|known| Some((distance(name, known)?, known)));
                    let hint =
                        nearest.min().map_or(String::new(), |(_, known)| format!("; did you mean {known}?"));
                    let kind = if value.get_ref().is_table() { "table" } else { "key" };
                    let what = format!("unknown {kind} {here}, ignored{hint}");
                    self.notices.push(Notice::at(self.file, self.text, key.span().start, what));
                }
            }
        }
        Ok(found)
    }

    fn capabilities(&self, value: &Value<'_>, here: &str) -> Result<Vec<Capability>, Fault> {
        const KIND: &str = "a list of \"pull\", \"resolve\" and \"push\"";
        let items = value.get_ref().as_array().ok_or_else(|| self.wrong(value, here, KIND))?;
        let known = [Capability::Pull, Capability::Resolve, Capability::Push];
        let read = |item: &Value<'_>| {
            let word = self.string(item, here)?.to_lowercase();
            known.into_iter().find(|known| known.as_str() == word).ok_or_else(|| self.wrong(item, here, KIND))
        };
        items.iter().map(read).collect()
    }

    /// A string or a list of strings.
    fn strings<'v>(&self, value: &'v Value<'_>, here: &str) -> Result<Vec<(&'v str, usize)>, Fault> {
        const KIND: &str = "a string or a list of strings";
        let one = |value: &'v Value<'_>| {
            let text = value.get_ref().as_str().ok_or_else(|| self.wrong(value, here, KIND))?;
            Ok((text, value.span().start))
        };
        match value.get_ref() {
            DeValue::Array(items) => items.iter().map(one).collect(),
            _ => Ok(vec![one(value)?]),
        }
    }

    fn paths(&self, value: &Value<'_>, here: &str) -> Result<Vec<Named>, Fault> {
        let paths = self.strings(value, here)?.into_iter();
        Ok(paths.map(|(path, offset)| Named { path: path.into(), offset }).collect())
    }

    /// A string, or a list of strings and pairs of strings.
    fn client(&self, value: &Value<'_>, here: &str) -> Result<Vec<(Named, Option<PathBuf>)>, Fault> {
        const KIND: &str = "a string, a list of strings, or a list of pairs of certificate and key";
        let items = match value.get_ref() {
            DeValue::Array(items) => items,
            DeValue::String(_) => {
                return Ok(self.paths(value, here)?.into_iter().map(|path| (path, None)).collect());
            }
            _ => return Err(self.wrong(value, here, KIND)),
        };
        let mut pairs = Vec::new();
        for item in items.iter() {
            match (item.get_ref(), &self.paths(item, here).map_err(|_| self.wrong(item, here, KIND))?[..]) {
                (DeValue::String(_), [path]) => pairs.push((path.clone(), None)),
                (_, [certificate, key]) => {
                    // k3s writes an empty one for none.
                    let key = Some(key.path.clone()).filter(|key| !key.as_os_str().is_empty());
                    pairs.push((certificate.clone(), key));
                }
                _ => return Err(self.wrong(item, here, KIND)),
            }
        }
        Ok(pairs)
    }

    fn headers(&self, value: &Value<'_>, here: &str, settings: &mut HostSettings) -> Result<(), Fault> {
        let table = value.get_ref().as_table();
        let table = table.ok_or_else(|| self.wrong(value, here, "a table"))?;
        for (name, value) in table.iter() {
            let here = join(here, name.get_ref());
            for (text, at) in self.strings(value, &here)? {
                let added = settings.add_header(name.get_ref(), text);
                added.map_err(|error| self.fault(at, format!("{here}: {}", why(&error))))?;
            }
        }
        Ok(())
    }

    fn rewrites(&self, value: &Value<'_>, here: &str, settings: &mut HostSettings) -> Result<(), Fault> {
        let table = value.get_ref().as_table();
        let table = table.ok_or_else(|| self.wrong(value, here, "a table"))?;
        let mut rules: Vec<_> = table.iter().collect();
        rules.sort_by_key(|(pattern, _)| pattern.span().start);
        for (pattern, replacement) in rules {
            let here = join(here, &format!("{:?}", pattern.get_ref()));
            let added = settings.add_rewrite(pattern.get_ref(), self.string(replacement, &here)?);
            added.map_err(|error| self.fault(pattern.span().start, format!("{here}: {}", why(&error))))?;
        }
        Ok(())
    }

    fn string<'v>(&self, value: &'v Value<'_>, here: &str) -> Result<&'v str, Fault> {
        value.get_ref().as_str().ok_or_else(|| self.wrong(value, here, "a string"))
    }

    fn boolean(&self, value: &Value<'_>, here: &str) -> Result<bool, Fault> {
        value.get_ref().as_bool().ok_or_else(|| self.wrong(value, here, "true or false"))
    }

    fn wrong(&self, value: &Value<'_>, here: &str, kind: &str) -> Fault {
        // A header may be a credential: it is never repeated.
        let found = match self.text.get(value.span()) {
            Some(text) if !here.contains("header") && !text.contains('\n') => text.to_owned(),
            _ => format!("of type {}", value.get_ref().type_str()),
        };
        self.fault(value.span().start, format!("{here} must be {kind}, but is {found}"))
    }

    fn fault(&self, offset: usize, what: String) -> Fault {
        Fault::at(self.file, self.text, offset, what)
    }
}

fn join(place: &str, key: &str) -> String {
    if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") }
}

/// What is wrong with a setting, for a place that names the setting itself.
pub fn why(error: &registry::Error) -> String {
    match error {
        registry::Error::Config { why, .. } => why.clone(),
        other => other.to_string(),
    }
}

/// A duration as Go writes them: decimal numbers, each with a unit.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    loop {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let part = number.parse::<f64>().ok()? * seconds;
        total = total.checked_add(Duration::try_from_secs_f64(part).ok()?)?;
        rest = tail;
        if rest.is_empty() {
            return Some(total);
        }
    }
}

#[cfg(test)]
mod tests;
