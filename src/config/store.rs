//! Where the additional layer store keeps its data and listens: defaults that differ for root and for a user.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Store;

/// How long a lookup may take where the file says 0.
const DEFAULT_LOOKUP: Duration = Duration::from_secs(30);

impl Store {
    /// Where it keeps its data.
    pub fn root(&self) -> PathBuf {
        named(&self.root).unwrap_or_else(|| data_dir(&Situation::here()))
    }

    /// Its socket; what is asked of it goes to the one beside it.
    pub fn address(&self) -> PathBuf {
        named(&self.address).unwrap_or_else(|| socket(&Situation::here()))
    }

    /// How long a lookup may take.
    pub fn lookup_timeout(&self) -> Duration {
        match self.lookup_timeout_sec {
            0 => DEFAULT_LOOKUP,
            seconds => Duration::from_secs(seconds),
        }
    }
}

fn named(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

/// Who runs the store.
struct Situation {
    /// Root of the machine; otherwise a user, who is root only in a user namespace of his own.
    is_root: bool,
    home: PathBuf,
    data: Option<PathBuf>,
    runtime: Option<PathBuf>,
}

impl Situation {
    fn here() -> Situation {
        let path = |name| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        Situation {
            is_root: crate::user::is_root(),
            home: path("HOME").unwrap_or_else(|| "/".into()),
            data: path("XDG_DATA_HOME"),
            runtime: path("XDG_RUNTIME_DIR"),
        }
    }
}

fn data_dir(situation: &Situation) -> PathBuf {
    match situation {
        Situation { is_root: true, .. } => "/var/lib/lazurite-store".into(),
        Situation { data: Some(data), .. } => data.join("lazurite-store"),
        Situation { home, .. } => home.join(".local/share/lazurite-store"),
    }
}

fn socket(situation: &Situation) -> PathBuf {
    match situation {
        Situation { is_root: false, runtime: Some(runtime), .. } => runtime.join("lazurite-store/store.sock"),
        Situation { is_root: false, .. } => data_dir(situation).join("store.sock"),
        Situation { .. } => "/run/lazurite-store/store.sock".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_store_is_his_own() {
        let user = |data: Option<&str>, runtime: Option<&str>| Situation {
            is_root: false,
            home: "/home/u".into(),
            data: data.map(PathBuf::from),
            runtime: runtime.map(PathBuf::from),
        };
        let root = Situation { is_root: true, ..user(Some("/d"), Some("/r")) };
        assert_eq!(data_dir(&root), Path::new("/var/lib/lazurite-store"));
        assert_eq!(socket(&root), Path::new("/run/lazurite-store/store.sock"));
        assert_eq!(data_dir(&user(Some("/d"), None)), Path::new("/d/lazurite-store"));
        assert_eq!(socket(&user(Some("/d"), None)), Path::new("/d/lazurite-store/store.sock"));
        assert_eq!(data_dir(&user(None, None)), Path::new("/home/u/.local/share/lazurite-store"));
        assert_eq!(
            socket(&user(None, Some("/run/user/1"))),
            Path::new("/run/user/1/lazurite-store/store.sock")
        );
    }
}
