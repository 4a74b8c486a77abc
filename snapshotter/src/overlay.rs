//! The mounts of a snapshot, as a pure function of its kind, its id and its ancestors' ids.
//!
//! | kind | parents | mount |
//! |---|---|---|
//! | active | none | bind, `rw`, of its own `fs` |
//! | view | none | bind, `ro`, of its own `fs` |
//! | view | one | bind, `ro`, of the parent's `fs` |
//! | view | more | overlay with `lowerdir` only, read-only by nature |
//! | active | any | overlay with `upperdir` and `workdir` |
//!
//! Every lower directory is spelled `<root>/snapshots/<id>/fs`, also where it is a symlink to a lazy layer:
//! containerd shortens `lowerdir` by the common parent of all of them when the options outgrow the one page that
//! mount(2) takes, and only so do 128 layers fit. An active snapshot never has `ro` in its last mount, which
//! containerd 2.4 and later reads as "contents are in place, do not unpack".

use std::path::Path;

use crate::record::Kind;

/// One mount, in the form containerd hands to mount(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// File system type, or `bind`.
    pub fs_type: &'static str,
    /// Directory to bind, or `overlay`.
    pub source: String,
    /// Options as in fstab.
    pub options: Vec<String>,
}

/// What the kernel needs to be told for overlay mounts on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The kernel knows the inode index; switch it off, since it refuses lowers that moved or are shared.
    pub index_off: bool,
    /// We run in a user namespace, where overlayfs may only keep its marks in `user.overlay.*`.
    pub userxattr: bool,
}

impl Options {
    /// What this host needs. Reads `/sys` and `/proc`; a host that shows neither needs nothing.
    pub fn detect() -> Options {
        Options {
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
            userxattr: std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !maps_everything(&map)),
        }
    }
}

/// Whether a `uid_map` is the one of the initial user namespace: all 2^32 - 1 ids onto themselves.
fn maps_everything(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// The mounts of a view or active snapshot. `ancestors` are ids, the parent's first; `snapshots` is the
/// directory `<root>/snapshots`.
pub(crate) fn mounts(
    kind: Kind,
    id: u64,
    ancestors: &[u64],
    snapshots: &Path,
    options: Options,
) -> Vec<Mount> {
    let dir = |id: u64, name: &str| format!("{}/{id}/{name}", snapshots.display());
    let writable = kind == Kind::Active;
    let mount = match ancestors {
        [] => bind(dir(id, "fs"), if writable { "rw" } else { "ro" }),
        [parent] if !writable => bind(dir(*parent, "fs"), "ro"),
        _ => {
            let lower: Vec<String> = ancestors.iter().map(|&ancestor| dir(ancestor, "fs")).collect();
            let mut all = vec![];
            all.extend(options.index_off.then(|| "index=off".to_owned()));
            all.extend(options.userxattr.then(|| "userxattr".to_owned()));
            if writable {
                all.push(format!("workdir={}", dir(id, "work")));
                all.push(format!("upperdir={}", dir(id, "fs")));
            }
            all.push(format!("lowerdir={}", lower.join(":")));
            Mount { fs_type: "overlay", source: "overlay".into(), options: all }
        }
    };
    vec![mount]
}

fn bind(source: String, mode: &str) -> Mount {
    Mount { fs_type: "bind", source, options: vec![mode.to_owned(), "rbind".to_owned()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(kind: Kind, ancestors: &[u64], options: Options) -> String {
        let mounts = mounts(kind, 9, ancestors, Path::new("/r/snapshots"), options);
        assert_eq!(mounts.len(), 1);
        format!("{} {} {}", mounts[0].fs_type, mounts[0].source, mounts[0].options.join(","))
    }

    #[test]
    fn each_case_of_the_table() {
        let plain = Options::default();
        let index = Options { index_off: true, userxattr: false };
        let rootless = Options { index_off: true, userxattr: true };
        let up = "workdir=/r/snapshots/9/work,upperdir=/r/snapshots/9/fs";
        let one = "lowerdir=/r/snapshots/4/fs";
        let two = "lowerdir=/r/snapshots/4/fs:/r/snapshots/2/fs";
        let table = [
            (Kind::Active, &[][..], rootless, "bind /r/snapshots/9/fs rw,rbind".to_owned()),
            (Kind::View, &[], rootless, "bind /r/snapshots/9/fs ro,rbind".to_owned()),
            (Kind::View, &[4], rootless, "bind /r/snapshots/4/fs ro,rbind".to_owned()),
            (Kind::View, &[4, 2], plain, format!("overlay overlay {two}")),
            (Kind::View, &[4, 2], index, format!("overlay overlay index=off,{two}")),
            (Kind::Active, &[4], plain, format!("overlay overlay {up},{one}")),
            (Kind::Active, &[4, 2], rootless, format!("overlay overlay index=off,userxattr,{up},{two}")),
        ];
        for (kind, ancestors, options, expected) in table {
            assert_eq!(show(kind, ancestors, options), expected);
        }
    }

    #[test]
    fn a_user_namespace_is_told_by_its_map() {
        assert!(maps_everything("         0          0 4294967295\n"));
        assert!(!maps_everything("         0       1000          1\n"));
        assert!(!maps_everything("0 0 65536\n65536 65536 10\n"));
    }

    /// containerd's compaction: change directory to the common parent, and name the lowers from there.
    #[test]
    fn layers_128_deep_fit_a_page_once_shortened() {
        let snapshots = Path::new("/var/lib/lazurite/snapshots");
        let ancestors: Vec<u64> = (0..128).map(|n| 4_000_000_000 - n).collect();
        let options = Options { index_off: true, userxattr: true };
        let mount = mounts(Kind::Active, u32::MAX.into(), &ancestors, snapshots, options).remove(0);
        let data = mount.options.join(",").replace(":/var/lib/lazurite/snapshots/", ":");
        let data = data.replace("lowerdir=/var/lib/lazurite/snapshots/", "lowerdir=");
        assert!(data.len() < 4096, "{} bytes", data.len());
    }
}
