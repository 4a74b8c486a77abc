//! What podman, Buildah and CRI-O are told of a layer store: judgements over containers/storage's configuration and what is
//! at the paths it names. Pure.
//!
//! containers/storage reads `additionallayerstores` of storage.conf (config.go, `OptionsConfig`): values of `PATH[:ref]`,
//! separated by commas, absolute directories that must exist (overlay.go, `parseOptions`). One that does not makes every
//! command fail, whatever it is about.

use std::io;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Finding;

const CONFIG: &str = "podman storage";
const STORE: &str = "layer store";
const LOGIN: &str = "layer store logins";

/// From here on podman asks by the digest of the table of contents, and before by that of the blob.
const ASKS_BY_TOC: (u32, u32) = (5, 1);

/// From here on podman does not write down the layers it takes from a store (containers/storage 1.58.0).
const FORGETS: (u32, u32) = (5, 5);

/// An entry of `additionallayerstores`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// Where the store is mounted.
    pub path: PathBuf,
    /// What follows it behind colons.
    pub options: Vec<String>,
}

/// What is at the path of a [`Store`], in the mount namespace podman works in.
#[derive(Debug)]
pub enum Place {
    /// A mount of ours that answers.
    Ours,
    /// A mount of ours, but podman works in a namespace of its own that does not have it. Rootless only.
    Outside,
    /// Mounted by another program, as this type of file system.
    Foreign(String),
    /// A directory of the file system around it.
    Directory,
    /// Not a directory.
    File,
    /// A mount whose program is gone (`ENOTCONN`).
    Dead,
    /// A mount that did not answer in time.
    Silent,
    /// It cannot be looked at, for instance because there is nothing.
    Error(io::Error),
}

/// A program that is named in registries.conf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Helper {
    /// Its path as it is written.
    pub path: PathBuf,
    /// Whether it is a file that can be executed.
    pub executable: bool,
}

/// What is known of podman's setup.
#[derive(Debug)]
pub struct Setup<'a> {
    /// The storage.conf that is read, for messages.
    pub path: &'a Path,
    /// What it says; `None` if it does not exist.
    pub storage: Option<&'a Table>,
    /// `STORAGE_DRIVER`, which wins over the file.
    pub driver: Option<&'a str>,
    /// The stores of [`stores`] and what was found.
    pub stores: &'a [(Store, Place)],
    /// Whether podman is run by a user other than root.
    pub rootless: bool,
}

/// The stores a storage.conf names, in the order they are asked.
pub fn stores(storage: &Table) -> Vec<Store> {
    let values = options(storage).and_then(|options| options.get("additionallayerstores"));
    let values = values.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let store = |entry: &str| {
        let mut parts = entry.split(':');
        let path = parts.next().unwrap_or_default().into();
        Store { path, options: parts.map(str::to_owned).collect() }
    };
    values.flat_map(|value| value.split(',')).map(store).collect()
}

fn options(storage: &Table) -> Option<&Table> {
    storage.get("storage")?.get("options")?.as_table()
}

impl Setup<'_> {
    /// Everything that can be said of the configuration and the stores it names.
    pub fn findings(&self) -> Vec<Finding> {
        let path = self.path.display();
        let Some(storage) = self.storage else {
            return vec![Finding::fail(
                CONFIG,
                format!("there is no {path}"),
                format!("Write {path} with:\n\n[storage]\n  driver = \"overlay\"\n\n{}", self.snippet()),
            )];
        };
        let mut findings = vec![self.graph_driver(storage)];
        findings.extend(partial_pulls(storage));
        match self.stores {
            [] => findings.push(Finding::fail(
                CONFIG,
                format!("{path} names no additional layer store"),
                format!("Mount the store, then add to {path}:\n\n{}", self.snippet()),
            )),
            stores => findings.extend(stores.iter().flat_map(|(store, place)| self.store(store, place))),
        }
        findings
    }

    fn snippet(&self) -> String {
        let mount =
            if self.rootless { "/home/USER/.local/share/lazurite/store" } else { "/var/lib/lazurite/store" };
        format!("[storage.options]\n  additionallayerstores = [\"{mount}:ref\"]")
    }

    fn graph_driver(&self, storage: &Table) -> Finding {
        let (driver, place) = match self.driver {
            Some(driver) => (Some(driver), "STORAGE_DRIVER".to_owned()),
            None => {
                let table = storage.get("storage").and_then(|table| table.get("driver"));
                (
                    table.and_then(Value::as_str).filter(|name| !name.is_empty()),
                    self.path.display().to_string(),
                )
            }
        };
        let fix = format!("In {}:\n\n[storage]\n  driver = \"overlay\"", self.path.display());
        match driver {
            Some("overlay" | "overlay2") => Finding::ok(CONFIG, format!("driver overlay, by {place}")),
            Some(other) => Finding::fail(
                CONFIG,
                format!("driver {other}, by {place}: only overlay asks a layer store"),
                match self.driver {
                    Some(_) => "Unset STORAGE_DRIVER.".to_owned(),
                    None => format!("{fix}\n\nand pull again: images of another driver are not seen."),
                },
            ),
            None => Finding::warn(CONFIG, format!("{place} names no driver: podman picks one"), fix),
        }
    }

    fn store(&self, Store { path, options }: &Store, place: &Place) -> Vec<Finding> {
        let (shown, conf) = (path.display(), self.path.display());
        let or_remove = |first: String| {
            format!("{first}\n(or take the line out of {conf}: until then every command of podman fails)")
        };
        let mount = match self.rootless {
            true => format!("podman unshare lazurite store {shown}"),
            false => format!("lazurite store {shown}"),
        };
        if !path.is_absolute() {
            return vec![Finding::fail(
                STORE,
                format!("{path:?} is not absolute: every command of podman fails"),
                format!("Write the whole path in {conf}."),
            )];
        }
        let mut findings = Vec::new();
        let unknown: Vec<&str> =
            options.iter().map(String::as_str).filter(|option| *option != "ref").collect();
        if !unknown.is_empty() || options.len() > 1 {
            findings.push(Finding::fail(
                STORE,
                format!(
                    "{shown}:{} has other options than one \"ref\": every command of podman fails",
                    options.join(":")
                ),
                format!("In {conf}, write \"{shown}:ref\"."),
            ));
        }
        let reference = options.iter().any(|option| option == "ref");
        findings.push(match place {
            Place::Ours if reference => Finding::ok(STORE, format!("{shown} is mounted and answers")),
            Place::Ours => Finding::fail(
                STORE,
                format!("{shown} is asked without the image's name, so it has no layer to show"),
                format!("In {conf}, write \"{shown}:ref\"."),
            ),
            Place::Outside => Finding::fail(
                STORE,
                format!("{shown} is mounted, but not in the namespaces rootless podman works in"),
                format!("umount {shown}\n{mount}"),
            ),
            Place::Foreign(kind) => Finding::warn(
                STORE,
                format!("{shown} is mounted by another program ({kind})"),
                format!("If it is to be Lazurite's: umount {shown}\n{mount}"),
            ),
            Place::Directory => {
                Finding::fail(STORE, format!(
                    "nothing is mounted at {shown}: images are pulled whole, and those taken from the store do not run"
                ), mount)
            }
            Place::File => Finding::fail(
                STORE,
                format!("{shown} is not a directory: every command of podman fails"),
                or_remove(format!(
                    "mkdir another directory, name it in {conf}, and: lazurite store DIRECTORY"
                )),
            ),
            Place::Dead => Finding::fail(
                STORE,
                format!("the program behind {shown} is gone: every command of podman fails"),
                or_remove(format!("umount --lazy {shown}\n{mount}")),
            ),
            Place::Silent => Finding::fail(
                STORE,
                format!("{shown} does not answer: every command of podman hangs"),
                or_remove(format!("End the program behind it, then:\numount --lazy {shown}\n{mount}")),
            ),
            Place::Error(error) if error.kind() == io::ErrorKind::NotFound => Finding::fail(
                STORE,
                format!("{shown} does not exist: every command of podman fails"),
                or_remove(format!("mkdir -p {shown}\n{mount}")),
            ),
            Place::Error(error) => Finding::fail(
                STORE,
                format!("{shown} cannot be looked at ({error}): every command of podman fails"),
                or_remove(mount),
            ),
        });
        findings
    }
}

/// What becomes of layers the store does not have. The values are strings, also where they look like booleans.
fn partial_pulls(storage: &Table) -> Option<Finding> {
    let pulls = options(storage)?.get("pull_options")?;
    let on = pulls.get("enable_partial_images").and_then(Value::as_str)? == "true";
    on.then(|| {
        Finding::ok(
            CONFIG,
            "enable_partial_images is on: the store is asked first, and of a zstd:chunked layer it does not have only \
             what is new is pulled",
        )
    })
}

/// podman by what `podman --version` prints.
pub fn podman(said: Result<&str, &str>) -> Finding {
    let subject = "podman";
    let said = match said {
        Ok(said) => said.trim(),
        Err(why) => {
            return Finding::warn(
                subject,
                why,
                "Have podman in PATH; for Buildah and CRI-O alone this is no matter.",
            );
        }
    };
    let number = said.rsplit(' ').next().unwrap_or_default();
    match super::setup::version(number) {
        None => Finding::warn(
            subject,
            format!("cannot tell the version of {said:?}"),
            "Versions up to 5.4 are known to work.",
        ),
        Some(version) if version >= FORGETS => Finding::warn(
            subject,
            format!(
                "{number} does not write down the layers it takes from a store, by an error of its own: `podman run` \
                 works and asks the store each time, `podman images` and `podman save` do not know the image"
            ),
            "Use podman 5.4 or older with a layer store.",
        ),
        Some(version) if version >= ASKS_BY_TOC => Finding::ok(
            subject,
            format!(
                "{number} asks for layers with the annotation of a table of contents (eStargz, zstd:chunked; OCI \
                 manifests only)"
            ),
        ),
        Some(_) => Finding::ok(subject, format!("{number} asks for every layer")),
    }
}

/// The program that is given the logins of pulls. `path` is the registries.conf that is read.
pub fn logins(path: &Path, helper: Option<&Helper>) -> Finding {
    let set = |detail: String| {
        Finding::warn(
            LOGIN,
            detail,
            format!(
                "For private images, at the top of {}:\n\nadditional-layer-store-auth-helper = \"/path/of/the/helper\"\n\n\
                 or give the store logins of its own (lazurite login-check REF says which it has).",
                path.display()
            ),
        )
    };
    match helper {
        Some(Helper { path, executable: true }) => {
            Finding::ok(LOGIN, format!("podman hands its logins to {}", path.display()))
        }
        Some(Helper { path, executable: false }) => {
            set(format!("{} is to be given podman's logins, and cannot be executed", path.display()))
        }
        None => set("podman does not hand its logins to the store".to_owned()),
    }
}

/// A configuration file that cannot be used.
pub fn unusable(why: String) -> Finding {
    Finding::fail(CONFIG, format!("{why}: every command of podman fails"), "Correct the file.")
}

/// What is mounted somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// What is mounted, in the words of who mounts it.
    pub source: String,
    /// The type of file system.
    pub kind: String,
}

impl Mount {
    /// Whether it is one of Lazurite's.
    pub fn is_ours(&self) -> bool {
        self.source == "lazurite" || self.kind.starts_with("fuse.lazurite")
    }

    /// The uppermost mount at exactly `path`, by the text of a mountinfo (proc(5)).
    pub fn at(table: &str, path: &Path) -> Option<Mount> {
        let mount = |line: &str| {
            let (before, after) = line.split_once(" - ")?;
            let point = unescaped(before.split(' ').nth(4)?);
            let mut after = after.split(' ');
            let (kind, source) = (after.next()?.to_owned(), after.next()?.to_owned());
            (Path::new(&point) == path).then_some(Mount { source, kind })
        };
        table.lines().filter_map(mount).next_back()
    }
}

/// A path of mountinfo, which has white space and backslashes as `\\` and three octal digits.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |mut path, part| {
        let code = part.get(..3).and_then(|code| u8::from_str_radix(code, 8).ok());
        match code {
            Some(code) => {
                path.push(char::from(code));
                path.push_str(&part[3..]);
            }
            None => path.push_str(part),
        }
        path
    })
}

#[cfg(test)]
mod tests;
