//! What the host has to offer: kernel, /dev/fuse, overlayfs, disk. Pure judgements over facts.

use std::io;
use std::path::Path;

use super::Finding;

/// Overlayfs over FUSE lower layers as we use it, and FUSE's own features (negative entries, large background queue).
const NEEDED_KERNEL: (u32, u32) = (5, 11);

/// FUSE_NOTIFY_RESEND: a new daemon can have the kernel repeat the requests that the last one had not answered.
const SURVIVING_KERNEL: (u32, u32) = (6, 9);

/// Below this, filling one image of common size can fill the disk, in bytes.
const LITTLE_SPACE: u64 = 5 << 30;

/// Below this, nothing useful fits, in bytes.
const NO_SPACE: u64 = 256 << 20;

/// The running kernel, by `uname -r`.
pub fn kernel(release: &str) -> Finding {
    let subject = "kernel";
    match super::setup::version(release) {
        None => Finding::warn(
            subject,
            format!("cannot tell the version of {release:?}"),
            format!("Linux {} or newer is needed.", dotted(NEEDED_KERNEL)),
        ),
        Some(found) if found < NEEDED_KERNEL => Finding::fail(
            subject,
            format!("{release} is too old"),
            format!("Boot Linux {} or newer.", dotted(NEEDED_KERNEL)),
        ),
        Some(found) if found < SURVIVING_KERNEL => Finding::ok(
            subject,
            format!(
                "{release} (taking over the mount of a killed daemon, which is planned, will need {})",
                dotted(SURVIVING_KERNEL)
            ),
        ),
        Some(_) => Finding::ok(subject, release),
    }
}

fn dotted((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// Whether `/dev/fuse` can be opened.
pub fn fuse(opened: Result<(), &io::Error>) -> Finding {
    let subject = "/dev/fuse";
    match opened {
        Ok(()) => Finding::ok(subject, "can be opened"),
        Err(error) => Finding::fail(
            subject,
            format!("cannot be opened: {error}"),
            match error.kind() {
                io::ErrorKind::PermissionDenied => "Run as root; for rootless podman: chmod 666 /dev/fuse",
                _ => "modprobe fuse\nIn a container, pass the device in (--device /dev/fuse).",
            },
        ),
    }
}

/// Whether the kernel knows overlayfs, by `/proc/filesystems`.
pub fn overlay(filesystems: &str) -> Finding {
    let subject = "overlayfs";
    // Each line is the name, or "nodev" and the name.
    let known = filesystems.lines().any(|line| line.split_whitespace().next_back() == Some("overlay"));
    match known {
        true => Finding::ok(subject, "available"),
        false => Finding::fail(subject, "the kernel does not offer it", "modprobe overlay"),
    }
}

/// The file system the root directory is on, by its magic number (statfs(2), linux/magic.h).
pub fn filesystem(root: &Path, magic: u64) -> Finding {
    let subject = "file system";
    let name = match magic {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0xf2f5_2010 => "f2fs",
        0xca45_1a4e => "bcachefs",
        0x2fc1_2fc1 => "zfs",
        0x794c_7630 => "overlayfs",
        0x0102_1994 => "tmpfs",
        0x6969 => "nfs",
        0x6573_5546 => "fuse",
        _ => "",
    };
    let root = root.display();
    match name {
        "ext4" | "xfs" | "btrfs" | "f2fs" | "bcachefs" => {
            Finding::ok(subject, format!("{root} is on {name}"))
        }
        "overlayfs" => Finding::warn(
            subject,
            format!("{root} is on overlayfs, which cannot hold the upper directories of containers"),
            "Put root on a disk: a volume if this is a container, or --root DIR.",
        ),
        "tmpfs" => Finding::warn(
            subject,
            format!("{root} is on tmpfs: layers use memory and are lost at a reboot"),
            "Put root on a disk (root in /etc/lazurite/config.toml).",
        ),
        "nfs" | "fuse" => Finding::warn(
            subject,
            format!("{root} is on {name}, which cannot hold the upper directories of containers"),
            "Put root on a local disk (root in /etc/lazurite/config.toml).",
        ),
        "zfs" => Finding::warn(
            subject,
            format!("{root} is on zfs, which overlayfs supports since OpenZFS 2.2"),
            "With an older OpenZFS, put root on ext4 or xfs.",
        ),
        _ => Finding::warn(
            subject,
            format!("{root} is on a file system that is not known to work (type {magic:#x})"),
            "ext4, xfs and btrfs are known to work.",
        ),
    }
}

/// Free and total bytes of that file system.
pub fn space(root: &Path, free: u64, total: u64) -> Finding {
    let subject = "disk space";
    let detail = format!(
        "{} free of {} at {}",
        indicatif::BinaryBytes(free),
        indicatif::BinaryBytes(total),
        root.display()
    );
    let fix = "Free some, or put root on a larger disk (root in /etc/lazurite/config.toml).";
    match free {
        free if free < NO_SPACE => Finding::fail(subject, detail, fix),
        free if free < LITTLE_SPACE => Finding::warn(subject, detail, fix),
        _ => Finding::ok(subject, detail),
    }
}

/// The file system cannot be looked at.
pub fn no_filesystem(root: &Path, error: &io::Error) -> Finding {
    Finding::fail(
        "file system",
        format!("{} cannot be looked at: {error}", root.display()),
        "Create the directory, or name another one (root in /etc/lazurite/config.toml).",
    )
}

/// containerd's settings of registries, if there are any: `read` directories, and what is wrong in them.
pub fn registries(read: usize, faults: &[String]) -> Option<Finding> {
    let subject = "registry hosts";
    match (read, faults) {
        (0, _) => None,
        (_, []) => Some(Finding::ok(subject, format!("{read} directories with settings of registries"))),
        _ => Some(Finding::warn(
            subject,
            faults.join("\n"),
            "Correct the files: one that cannot be used changes nothing. No restart is needed.",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{self, Fail, Ok as Fine, Warn};
    use super::*;

    #[test]
    fn kernels() {
        let cases: [(&str, Verdict); 9] = [
            ("5.10.0-28-amd64", Fail),
            ("4.19.0", Fail),
            ("5.11.0", Fine),
            ("6.1.0-18-amd64", Fine),
            ("6.8.0-31-generic", Fine),
            ("6.9.0", Fine),
            ("6.12.73+deb13-amd64", Fine),
            ("7.0-rc1", Fine),
            ("unknown", Warn),
        ];
        for (release, verdict) in cases {
            assert_eq!(kernel(release).verdict, verdict, "{release}");
        }
        assert!(kernel("6.8.0").detail.contains("6.9"));
        assert_eq!(kernel("6.9.0").detail, "6.9.0");
    }

    #[test]
    fn devices_and_filesystems() {
        assert_eq!(fuse(Ok(())).verdict, Fine);
        let denied = fuse(Err(&io::Error::from(io::ErrorKind::PermissionDenied)));
        assert_eq!(
            (denied.verdict, denied.fix.as_deref()),
            (Fail, Some("Run as root; for rootless podman: chmod 666 /dev/fuse"))
        );
        assert!(fuse(Err(&io::Error::from(io::ErrorKind::NotFound))).fix.unwrap().contains("modprobe fuse"));

        assert_eq!(overlay("nodev\tproc\n\text4\nnodev\toverlay\n").verdict, Fine);
        assert_eq!(overlay("nodev\tproc\nnodev\toverlayfs2\n").verdict, Fail);

        let cases = [
            (0xef53, Fine),
            (0x5846_5342, Fine),
            (0x9123_683e, Fine),
            (0x794c_7630, Warn),
            (0x0102_1994, Warn),
            (0x6969, Warn),
            (0x1234, Warn),
        ];
        for (magic, verdict) in cases {
            assert_eq!(filesystem(Path::new("/r"), magic).verdict, verdict, "{magic:#x}");
        }
    }

    #[test]
    fn settings_of_registries() {
        assert_eq!(registries(0, &[]), None);
        assert_eq!(registries(2, &[]).unwrap().verdict, Fine);
        let found = registries(2, &["a".to_owned(), "b".to_owned()]).unwrap();
        assert_eq!((found.verdict, found.detail.as_str()), (Warn, "a\nb"));
    }

    #[test]
    fn disk_space() {
        let cases = [
            (0, Fail),
            (NO_SPACE - 1, Fail),
            (NO_SPACE, Warn),
            (LITTLE_SPACE - 1, Warn),
            (LITTLE_SPACE, Fine),
        ];
        for (free, verdict) in cases {
            assert_eq!(space(Path::new("/r"), free, 100 << 30).verdict, verdict, "{free}");
        }
        assert_eq!(space(Path::new("/r"), 6 << 30, 100 << 30).detail, "6.00 GiB free of 100.00 GiB at /r");
    }
}
