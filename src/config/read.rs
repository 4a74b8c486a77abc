//! From the text of a configuration file to a [`Config`], with every complaint tied to a line and a key.
//!
//! The text is parsed once with positions. A walk over that tree finds keys that are unknown, without effect or
//! refused; serde then fills the typed struct, and when a value has the wrong type the position serde reports is
//! looked up in the tree to name the key. Pure: no files, no logging; the caller prints the notices.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::declare::{Table, quoted};
use super::incumbent::{IGNORED, REFUSED};
use super::{Config, Mirror};

/// Something about the file the user should know; the file was taken all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    file: String,
    line: usize,
    text: String,
}

impl Notice {
    /// About `file` at the byte `offset` of its `text`.
    pub fn at(file: &str, text: &str, offset: usize, what: String) -> Self {
        Self { file: file.to_owned(), line: line_of(text, offset), text: what }
    }

    /// Its 1-based line.
    pub fn line(&self) -> usize {
        self.line
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.text)
    }
}

/// Why a file was not taken.
#[derive(Debug)]
pub enum Fault {
    /// The file cannot be read.
    File {
        /// The path as given.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// The contents are wrong.
    Contents {
        /// The path as given.
        file: String,
        /// 1-based line.
        line: usize,
        /// What is wrong and what was expected.
        text: String,
    },
}

impl Fault {
    /// The file cannot be read.
    pub fn file(path: &Path, source: std::io::Error) -> Self {
        Self::File { file: path.display().to_string(), source }
    }

    /// The contents of `file` are wrong at the byte `offset` of its `text`.
    pub fn at(file: &str, text: &str, offset: usize, what: String) -> Self {
        Self::Contents { file: file.to_owned(), line: line_of(text, offset), text: what }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, .. } => write!(f, "cannot read the configuration file {file}"),
            Self::Contents { file, line, text } => write!(f, "{file}:{line}: {text}"),
        }
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::File { source, .. } => Some(source),
            Self::Contents { .. } => None,
        }
    }
}

/// Reads a configuration from `text`; `file` is only used in messages.
///
/// # Errors
///
/// The first of: a TOML error, a refused key, a value of the wrong type, a value that makes no sense. Unknown keys
/// and keys without effect are not errors; they come back as notices in the order of the file.
pub fn parse(file: &str, text: &str) -> Result<(Config, Vec<Notice>), Fault> {
    let source = Source { file, text };
    let tree = DeTable::parse(text).map_err(|error| {
        source.fault(error.span().map_or(0, |span| span.start), error.message().to_owned())
    })?;

    let known = Known::new();
    let mut findings = Findings { source, known: &known, notices: Vec::new() };
    findings.table(tree.get_ref(), &Place::default())?;
    let mut notices = findings.notices;
    notices.sort_by_key(Notice::line);

    let config = Config::deserialize(toml::Deserializer::from(tree.clone()))
        .map_err(|error| source.wrong_type(&tree, &known, &error))?;
    if let Some(relative) = config.registry.config_path.0.iter().find(|path| !path.is_absolute()) {
        let table = tree.get_ref().iter().find(|(key, _)| key.get_ref() == "registry");
        let found = quoted(&relative.display().to_string());
        let text = format!("registry.config_path must name absolute paths, but has {found}");
        return Err(source.fault(table.map_or(0, |(_, table)| table.span().start), text));
    }
    let keychain = &config.cri_keychain;
    let sockets = [
        ("cri_keychain.listen_path", &keychain.listen_path),
        ("cri_keychain.image_service_path", &keychain.image_service_path),
    ];
    let sockets = sockets.into_iter().filter(|_| keychain.enable_keychain);
    for (path, value) in [("root", &config.root), ("address", &config.address)].into_iter().chain(sockets) {
        if !value.is_absolute() {
            let (table, key) = path.split_once('.').unwrap_or((path, ""));
            let table = tree.get_ref().iter().find(|(name, _)| name.get_ref() == table);
            let inner = table.and_then(|(_, value)| value.get_ref().as_table());
            let key = inner.and_then(|inner| inner.iter().find(|(name, _)| name.get_ref() == key));
            let text =
                format!("{path} must be an absolute path, but is {}", quoted(&value.display().to_string()));
            return Err(source.fault(key.or(table).map_or(0, |(key, _)| key.span().start), text));
        }
    }
    if keychain.enable_keychain && keychain.listen_path == keychain.image_service_path {
        let table = tree.get_ref().iter().find(|(key, _)| key.get_ref() == "cri_keychain");
        let text = "cri_keychain.listen_path must not be containerd's own socket (image_service_path)";
        return Err(source.fault(table.map_or(0, |(key, _)| key.span().start), text.to_owned()));
    }
    let table = |name: &str| {
        let found = tree.get_ref().iter().find(|(key, _)| key.get_ref() == name);
        found.map_or(0, |(_, table)| table.span().start)
    };
    let plugins = &config.kubelet_plugins;
    if plugins.config.as_os_str().is_empty() != plugins.bin_dir.as_os_str().is_empty() {
        let text = "kubelet_plugins must have both config and bin_dir, or neither".to_owned();
        return Err(source.fault(table("kubelet_plugins"), text));
    }
    if config.kubeconfig_keychain.enable_keychain && config.kubeconfig_keychain.namespaces.is_empty() {
        let text = "accepted and ignored: kubeconfig_keychain (it names no namespaces, and secrets of all of them are \
                    never asked for)";
        notices.push(Notice::at(file, source.text, table("kubeconfig_keychain"), text.to_owned()));
        notices.sort_by_key(Notice::line);
    }
    Ok((config, notices))
}

/// The 1-based line of the byte at `offset`.
pub fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// How far two names are apart, if one may be a slip of the pen for the other: a third of the letters may differ.
pub fn distance(one: &str, other: &str) -> Option<usize> {
    let distance = strsim::damerau_levenshtein(one, other);
    (distance <= one.chars().count().min(other.chars().count()) / 3).then_some(distance)
}

#[derive(Clone, Copy)]
struct Source<'a> {
    file: &'a str,
    text: &'a str,
}

impl Source<'_> {
    fn fault(&self, offset: usize, text: String) -> Fault {
        Fault::at(self.file, self.text, offset, text)
    }

    /// Names the key serde stumbled over. What it says itself is used only where no declared key is involved.
    fn wrong_type(&self, tree: &Spanned<DeTable<'_>>, known: &Known, error: &toml::de::Error) -> Fault {
        let offset = error.span().map_or(0, |span| span.start);
        let Some((place, value)) = find(tree.get_ref(), offset, &Place::default()) else {
            return self.fault(offset, error.message().to_owned());
        };
        let Some(kind) = known.kinds.get(&place.pattern) else {
            return self.fault(offset, format!("{}: {}", place.path, error.message()));
        };
        // A header may be a credential: it is never repeated.
        let found = match self.text.get(value.span()) {
            Some(text) if !place.pattern.contains(".header") && !text.contains('\n') => text.to_owned(),
            _ => format!("of type {}", value.get_ref().type_str()),
        };
        self.fault(offset, format!("{} must be {kind}, but is {found}", place.path))
    }
}

/// Where a value stands: as the user wrote it, and with the names users choose replaced by `*`.
#[derive(Debug, Clone, Default)]
struct Place {
    path: String,
    pattern: String,
}

impl Place {
    fn child(&self, key: &str) -> Self {
        let bare =
            !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        let shown = if bare { Cow::Borrowed(key) } else { Cow::Owned(quoted(key)) };
        let general = if self.pattern == "resolver.host" { "*" } else { key };
        Self { path: join(&self.path, &shown), pattern: join(&self.pattern, general) }
    }
}

fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

/// The innermost value whose source contains `offset`.
fn find<'t, 'i>(
    table: &'t DeTable<'i>,
    offset: usize,
    place: &Place,
) -> Option<(Place, &'t Spanned<DeValue<'i>>)> {
    for (key, value) in table.iter() {
        let here = place.child(key.get_ref());
        let inner = match value.get_ref() {
            DeValue::Table(table) => find(table, offset, &here),
            DeValue::Array(items) => items
                .iter()
                .find_map(|item| item.get_ref().as_table().and_then(|table| find(table, offset, &here))),
            _ => None,
        };
        if inner.is_some() {
            return inner;
        }
        if value.span().contains(&offset) || value.span().start == offset {
            return Some((here, value));
        }
    }
    None
}

/// Every name the reader knows.
struct Known {
    /// What each table and key has to hold, by pattern.
    kinds: BTreeMap<String, &'static str>,
    tables: Vec<String>,
}

impl Known {
    fn new() -> Self {
        const TABLE: &str = "a table";
        let mut kinds = BTreeMap::new();
        let mut tables: Vec<String> = ["", "resolver.host", "resolver.host.*"].map(str::to_owned).to_vec();
        let mut sections = Config::default().sections();
        sections.push(Mirror::default().section());
        for section in sections {
            tables.push(section.path.to_owned());
            for entry in section.entries {
                kinds.insert(join(section.path, entry.name), entry.kind);
            }
        }
        for (path, _) in IGNORED {
            if let Some((table, _)) = path.rsplit_once('.') {
                tables.push(table.to_owned());
            }
        }
        tables.sort();
        tables.dedup();
        for table in &tables {
            let kind = if table.ends_with("mirrors") { "an array of tables" } else { TABLE };
            kinds.insert(table.clone(), kind);
        }
        Self { kinds, tables }
    }

    /// The nearest known name to one that is not known, if any is near enough to be a slip of the pen.
    ///
    /// A name counts by its last part, so that a key in the wrong table finds its table; at equal distance the
    /// same table wins.
    fn nearest(&self, pattern: &str) -> Option<String> {
        let (table, name) = pattern.rsplit_once('.').unwrap_or(("", pattern));
        let accepted = IGNORED.iter().chain(REFUSED).map(|(path, _)| *path);
        self.kinds
            .keys()
            .map(String::as_str)
            .chain(accepted)
            .filter(|candidate| !candidate.is_empty() && !candidate.ends_with('*'))
            .filter_map(|candidate| {
                let (its_table, its_name) = candidate.rsplit_once('.').unwrap_or(("", candidate));
                Some((distance(name, its_name)?, its_table != table, candidate))
            })
            .min()
            .map(|(_, _, candidate)| candidate.to_owned())
    }
}

struct Findings<'a> {
    source: Source<'a>,
    known: &'a Known,
    notices: Vec<Notice>,
}

impl Findings<'_> {
    fn table(&mut self, table: &DeTable<'_>, place: &Place) -> Result<(), Fault> {
        for (key, value) in table.iter() {
            let here = place.child(key.get_ref());
            let at = key.span().start;
            if self.known.tables.binary_search(&here.pattern).is_ok() {
                match value.get_ref() {
                    DeValue::Table(inner) => self.table(inner, &here)?,
                    DeValue::Array(items) => self.mirrors(items, &here)?,
                    // Left to the typed reading, which names what was expected.
                    _ => {}
                }
            } else if self.known.kinds.contains_key(&here.pattern) {
                continue;
            } else if let Some((_, why)) = REFUSED.iter().find(|(path, _)| *path == here.pattern) {
                if value.get_ref().as_bool() != Some(false) {
                    return Err(self.source.fault(at, format!("{} is refused: {why}", here.path)));
                }
            } else if let Some((_, why)) = IGNORED.iter().find(|(path, _)| *path == here.pattern) {
                if value.get_ref().as_bool() != Some(false) && value.get_ref().as_str() != Some("") {
                    self.notice(at, format!("accepted and ignored: {} ({why})", here.path));
                }
            } else {
                let kind = if value.get_ref().is_table() { "table" } else { "key" };
                let hint = match self.known.nearest(&here.pattern) {
                    Some(name) => format!("; did you mean {name}?"),
                    None => String::new(),
                };
                self.notice(at, format!("unknown {kind} {}, ignored{hint}", here.path));
            }
        }
        Ok(())
    }

    fn mirrors(&mut self, items: &toml::de::DeArray<'_>, place: &Place) -> Result<(), Fault> {
        for item in items.iter() {
            let Some(table) = item.get_ref().as_table() else { continue };
            self.table(table, place)?;
            let host = table.iter().find(|(key, _)| key.get_ref() == "host");
            match host.map(|(_, value)| (value.span().start, value.get_ref().as_str())) {
                None | Some((_, Some(""))) => {
                    let text = format!("{}: host is missing; it names the mirror", place.path);
                    return Err(self.source.fault(item.span().start, text));
                }
                Some((at, Some(host))) if host.contains('/') => {
                    let text = format!(
                        "{}.host must be a host name with an optional port, but is {}; \
                         plain http is set with insecure = true",
                        place.path,
                        quoted(host)
                    );
                    return Err(self.source.fault(at, text));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn notice(&mut self, offset: usize, text: String) {
        self.notices.push(Notice::at(self.source.file, self.source.text, offset, text));
    }
}
