//! What containerd is told: judgements over its configuration and its running state. Pure.
//!
//! Three ways lead to lazy pulls, and which of them is open depends on containerd's version:
//!
//! | containerd | Kubernetes (CRI) | `ctr image pull` |
//! |---|---|---|
//! | up to 2.0 | snapshot annotations switched on | never; `lazurite pull` |
//! | 2.1 and newer | annotations switched on (then CRI pulls by itself), or the transfer service | the transfer service |
//!
//! The transfer service needs an unpack_config entry and the plugin's enable_remote_snapshot_annotations.
//! A configuration of version 2 names CRI's tables otherwise than versions 3 and 4 do; a newer containerd converts an
//! old file when it starts, with one trap that only the file itself shows.

use toml::{Table, Value};

use super::Finding;

const CONFIG: &str = "containerd config";
const CRI: &str = "containerd CRI";
const TRANSFER: &str = "containerd transfer";

/// The snapshotters built into containerd: a proxy plugin of the same name makes it panic at start.
const BUILT_IN: [&str; 7] = ["overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile", "erofs"];

/// The name used where nothing is configured yet.
const DEFAULT_NAME: &str = "lazurite";

/// What is known of containerd's setup.
#[derive(Debug, Default)]
pub struct Setup<'a> {
    /// The running daemon's version, if it could be asked.
    pub version: Option<(u32, u32)>,
    /// The configuration file as it is written, if there is one.
    pub file: Option<&'a Table>,
    /// The configuration in force: what `containerd config dump` prints, or the file if it cannot be run.
    pub effective: Option<&'a Table>,
    /// The file's path, for messages.
    pub path: &'a str,
    /// Our socket.
    pub address: &'a str,
    /// Our root directory.
    pub root: &'a str,
}

/// A version's first two numbers, from the likes of `v2.1.4`, `1.6.20~ds1` and `6.12-rc1`.
pub fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim_start_matches('v').split('.');
    let leading = |part: &str| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    Some((leading(numbers.next()?)?, leading(numbers.next()?)?))
}

/// A plugin as the running containerd reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// Its name.
    pub id: String,
    /// Why it could not be loaded.
    pub error: Option<String>,
}

impl Setup<'_> {
    /// The name containerd knows us by: that of the proxy plugin with our address.
    pub fn name(&self) -> Option<&str> {
        let plugins = self.effective?.get("proxy_plugins")?.as_table()?;
        let ours = plugins.iter().find(|(_, plugin)| {
            let text = |key| plugin.get(key).and_then(Value::as_str);
            let address = text("address").map(|address| address.trim_start_matches("unix://"));
            matches!(text("type"), Some("snapshot" | "io.containerd.snapshotter.v1"))
                && address == Some(self.address)
        });
        ours.map(|(name, _)| name.as_str())
    }

    /// Everything that can be said of the configuration.
    pub fn findings(&self) -> Vec<Finding> {
        let Some(config) = self.effective else {
            return vec![Finding::fail(
                CONFIG,
                format!("there is no {}", self.path),
                format!("Write {} with:\n\n{}", self.path, self.whole_config()),
            )];
        };
        let Some(name) = self.name() else { return vec![self.no_plugin(config)] };
        let mut findings = vec![Finding::ok(CONFIG, format!("proxy plugin {name} has our address"))];
        findings.extend(self.plugin(config, name));
        match self.dropped_by_migration() {
            Some(finding) => findings.push(finding),
            None => findings.push(self.cri(config, name)),
        }
        findings.extend(self.transfer(config, name));
        findings
    }

    fn no_plugin(&self, config: &Table) -> Finding {
        let named = lookup(config, &["proxy_plugins", DEFAULT_NAME]);
        let detail = match named.and_then(|plugin| plugin.get("address")).and_then(Value::as_str) {
            Some(other) => format!("proxy plugin {DEFAULT_NAME} has address {other}, not {}", self.address),
            None => format!("no proxy plugin of type snapshot has address {}", self.address),
        };
        let fix = match named {
            Some(_) => format!("In {}, give it this address (or change ours):\n\n", self.path),
            None => format!("Add to {}:\n\n", self.path),
        };
        Finding::fail(CONFIG, detail, fix + &self.plugin_config(DEFAULT_NAME) + RESTART)
    }

    /// What the plugin's table says besides its address.
    fn plugin(&self, config: &Table, name: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        // `config dump` of 1.6 leaves out the exports, which the file shows.
        let at = |key: &str| {
            let path = ["proxy_plugins", name, "exports", key];
            lookup(config, &path).or_else(|| lookup(self.file?, &path)).and_then(Value::as_str)
        };
        let add = || format!("In {}:\n\n{}{RESTART}", self.path, self.plugin_config(name));
        if BUILT_IN.contains(&name) {
            findings.push(Finding::fail(
                CONFIG,
                format!("a snapshotter {name} is built in: containerd panics at start when a proxy plugin has its name"),
                format!("Rename the table to [proxy_plugins.{DEFAULT_NAME}]."),
            ));
        }
        match at("root") {
            Some(root) if root == self.root => {}
            Some(other) => findings.push(Finding::warn(
                CONFIG,
                format!(
                    "exports.root is {other}, but layers are in {}: Kubernetes watches the wrong disk",
                    self.root
                ),
                add(),
            )),
            None => findings.push(Finding::warn(
                CONFIG,
                "exports.root is not set: Kubernetes does not see how full the disk with the layers is",
                add(),
            )),
        }
        if self.version() >= (2, 1) && at("enable_remote_snapshot_annotations") != Some("true") {
            findings.push(Finding::warn(
                CONFIG,
                "exports.enable_remote_snapshot_annotations is not \"true\": pulls by the transfer service (`ctr`, \
                 nerdctl, CRI without annotations) are not lazy",
                add(),
            ));
        }
        let capabilities = lookup(config, &["proxy_plugins", name, "capabilities"]).and_then(Value::as_array);
        if capabilities.is_some_and(|all| all.iter().any(|one| one.as_str() == Some("rebase"))) {
            findings.push(Finding::fail(
                CONFIG,
                "the plugin claims the capability rebase: containerd would prepare layers without their parents",
                "Remove \"rebase\" from capabilities.",
            ));
        }
        findings
    }

    /// The trap of converting a file of version 1 or 2: without a `runtimes` table, CRI's snapshotter settings are
    /// dropped without a word, whatever they say.
    fn dropped_by_migration(&self) -> Option<Finding> {
        let file = self.file?;
        let path = cri_path(file).filter(|_| file_version(file) <= 2 && self.version() >= (2, 0))?;
        let table = lookup(file, path)?.as_table()?;
        let set = ["snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers"];
        if table.contains_key("runtimes") || !set.iter().any(|key| table.contains_key(*key)) {
            return None;
        }
        Some(Finding::fail(
            CRI,
            format!(
                "{} is written for containerd 1.x, and containerd 2.x drops the snapshotter settings of a file \
                 without a runtimes table",
                self.path
            ),
            format!(
                "Add to {} (or convert it: containerd config migrate):\n\n\
                 [{}.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"{RESTART}",
                self.path,
                header(path)
            ),
        ))
    }

    /// Whether pods are pulled lazily.
    fn cri(&self, config: &Table, name: &str) -> Finding {
        let disabled = config.get("disabled_plugins").and_then(Value::as_array);
        let off = |all: &Vec<Value>| {
            let cri = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"];
            all.iter().filter_map(Value::as_str).any(|plugin| cri.contains(&plugin))
        };
        if disabled.is_some_and(off) {
            return Finding::ok(
                CRI,
                "switched off (disabled_plugins), so there is nothing to set up for Kubernetes",
            );
        }
        let path = cri_path(config);
        let table = path.and_then(|path| lookup(config, path));
        let flag = |key: &str| table.and_then(|table| table.get(key)).and_then(Value::as_bool);
        let snapshotter = table.and_then(|table| table.get("snapshotter")).and_then(Value::as_str);
        let wanted = |keys: &str| {
            let header = header(path.unwrap_or(cri_default(self.version())));
            format!("In {}:\n\n[{header}]\n{keys}{RESTART}", self.path)
        };
        if snapshotter != Some(name) {
            return Finding::warn(
                CRI,
                format!(
                    "pods use snapshotter {}, so they are not pulled lazily",
                    snapshotter.unwrap_or("overlayfs")
                ),
                wanted(&format!("  snapshotter = \"{name}\"\n  disable_snapshot_annotations = false"))
                    + &self.runtimes_hint(config, path),
            );
        }
        let annotated = flag("disable_snapshot_annotations") == Some(false);
        if annotated {
            return Finding::ok(CRI, format!("pods use snapshotter {name}, with annotations"));
        }
        // From here on CRI tells the snapshotter nothing itself.
        let local = self.version() < (2, 1)
            || flag("use_local_image_pull") == Some(true)
            || flag("discard_unpacked_layers") == Some(true);
        if local {
            return Finding::fail(
                CRI,
                "snapshot annotations are off: the snapshotter is not told which image a layer belongs to, so \
                 nothing is lazy",
                wanted("  disable_snapshot_annotations = false"),
            );
        }
        match unpacks(config, name) {
            true => Finding::ok(CRI, format!("pods use snapshotter {name}, through the transfer service")),
            false => Finding::fail(
                CRI,
                format!(
                    "pods use snapshotter {name}, but neither annotations nor an unpack_config are set: pulls fail"
                ),
                wanted("  disable_snapshot_annotations = false"),
            ),
        }
    }

    /// A table added to a version 2 file that is read by containerd 2.x needs the runtimes table too.
    fn runtimes_hint(&self, config: &Table, path: Option<&[&str]>) -> String {
        let file = self.file.unwrap_or(config);
        let Some(path) = path.filter(|_| file_version(file) <= 2 && self.version() >= (2, 0)) else {
            return String::new();
        };
        match lookup(file, path).and_then(|table| table.get("runtimes")) {
            Some(_) => String::new(),
            None => format!(
                "\nwith this table besides, or the settings are dropped:\n\n\
                 [{}.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"",
                header(path)
            ),
        }
    }

    /// Whether `ctr image pull`, which is the transfer service's since 2.0, can use us.
    fn transfer(&self, config: &Table, name: &str) -> Vec<Finding> {
        if self.version() < (2, 1) {
            return vec![Finding::ok(
                TRANSFER,
                "not able to pull lazily in this version of containerd; `lazurite pull` is",
            )];
        }
        let entries =
            format!("In {}:\n\n{}\n{}{RESTART}", self.path, unpack_config(name), unpack_config("overlayfs"));
        match (unpacks(config, name), unpacks(config, "overlayfs")) {
            (true, true) => vec![Finding::ok(TRANSFER, format!("unpack_config names {name}"))],
            (true, false) => vec![Finding::warn(
                TRANSFER,
                "unpack_config names no overlayfs: giving any entry replaces the default one, and pulls into \
                 overlayfs fail",
                entries,
            )],
            (false, _) => vec![Finding::warn(
                TRANSFER,
                format!("no unpack_config names {name}: `ctr image pull --snapshotter {name}` fails"),
                entries,
            )],
        }
    }

    fn plugin_config(&self, name: &str) -> String {
        format!(
            "[proxy_plugins.{name}]\n  type = \"snapshot\"\n  address = {:?}\n  \
             [proxy_plugins.{name}.exports]\n    root = {:?}\n    \
             enable_remote_snapshot_annotations = \"true\"",
            self.address, self.root
        )
    }

    fn whole_config(&self) -> String {
        let version = self.version();
        let number = if version >= (2, 0) { 3 } else { 2 };
        format!(
            "version = {number}\n\n{}\n\n[{}]\n  snapshotter = \"{DEFAULT_NAME}\"\n  \
             disable_snapshot_annotations = false{RESTART}",
            self.plugin_config(DEFAULT_NAME),
            header(cri_default(version))
        )
    }

    /// The running version, or the oldest that reads this configuration.
    fn version(&self) -> (u32, u32) {
        let by_config = || match self.effective.map_or(2, file_version) {
            ..=2 => (1, 6),
            3 => (2, 0),
            _ => (2, 3),
        };
        self.version.unwrap_or_else(by_config)
    }
}

/// What the running containerd says of the plugin `name`.
pub fn loaded(plugins: &[Plugin], name: &str) -> Finding {
    let subject = "containerd plugin";
    match plugins.iter().find(|plugin| plugin.id == name) {
        Some(Plugin { error: None, .. }) => Finding::ok(subject, format!("snapshotter {name} is loaded")),
        Some(Plugin { error: Some(error), .. }) => Finding::fail(
            subject,
            format!("snapshotter {name} could not be loaded: {error}"),
            "Correct the cause, then: systemctl restart containerd",
        ),
        None => Finding::fail(
            subject,
            format!(
                "containerd runs without snapshotter {name}: it was not restarted since the plugin was configured"
            ),
            "systemctl restart containerd",
        ),
    }
}

const RESTART: &str = "\n\nand restart containerd.";

const CRI_V1: &[&str] = &["plugins", "cri", "containerd"];
const CRI_V2: &[&str] = &["plugins", "io.containerd.grpc.v1.cri", "containerd"];
const CRI_V3: &[&str] = &["plugins", "io.containerd.cri.v1.images"];

/// A file without a version is of version 1.
fn file_version(config: &Table) -> i64 {
    config.get("version").and_then(Value::as_integer).unwrap_or(1)
}

/// Where CRI's snapshotter settings are in a configuration of this version; `None` if the version is unheard of.
fn cri_path(config: &Table) -> Option<&'static [&'static str]> {
    match file_version(config) {
        1 => Some(CRI_V1),
        2 => Some(CRI_V2),
        3.. => Some(CRI_V3),
        _ => None,
    }
}

/// Where they are in the newest configuration this containerd reads.
fn cri_default(version: (u32, u32)) -> &'static [&'static str] {
    if version >= (2, 0) { CRI_V3 } else { CRI_V2 }
}

/// The names of tables as a TOML header.
fn header(path: &[&str]) -> String {
    let part = |name: &&str| if name.contains('.') { format!("\"{name}\"") } else { (*name).to_owned() };
    path.iter().map(part).collect::<Vec<_>>().join(".")
}

fn lookup<'t>(table: &'t Table, path: &[&str]) -> Option<&'t Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(table.get(*first)?, |value, key| value.get(*key))
}

/// Whether the transfer service unpacks into `snapshotter`. Without any entry it does so into overlayfs.
fn unpacks(config: &Table, snapshotter: &str) -> bool {
    let entries = lookup(config, &["plugins", "io.containerd.transfer.v1.local", "unpack_config"]);
    match entries.and_then(Value::as_array) {
        Some(entries) if !entries.is_empty() => {
            entries.iter().any(|entry| entry.get("snapshotter").and_then(Value::as_str) == Some(snapshotter))
        }
        _ => snapshotter == "overlayfs",
    }
}

fn unpack_config(snapshotter: &str) -> String {
    let platform = format!("linux/{}", architecture());
    format!(
        "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"{platform}\"\n  \
         snapshotter = \"{snapshotter}\""
    )
}

/// This host's architecture as containerd names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests;
