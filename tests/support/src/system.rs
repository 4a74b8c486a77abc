//! The real components a system test stands on: containerd, podman, docker-registry, Lazurite itself, and
//! images.
//!
//! Each is a guard over a private instance below a directory of the test: nothing of the machine's own containerd is
//! used, every port is ephemeral, and what was started or mounted ends on drop, in the panic case as well. Make them in
//! the order registry, Lazurite, containerd; they then end in the reverse order, clients first.
//!
//! Every wait is for a condition and has a deadline; every command runs under `timeout`, because what hangs in these
//! tests hangs in the kernel.
//!
//! What the shims of containerd keep outside its directory whatever its configuration says (runc's state, cgroups) is
//! named after [`Containerd::namespace`], which is different for every instance.

mod containerd;
mod docker_registry;
mod images;
mod lazurite;
mod podman;
mod store;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;

use crate::guard::{self, ProcessGuard};

pub use containerd::{Containerd, Cri, ImageMount, Task};
pub use docker_registry::{Access, DockerRegistry, LOGIN};
pub use images::{Form, Image};
pub use lazurite::Lazurite;
pub use podman::{Podman, PodmanRelease};
pub use store::LayerStore;

/// The name Lazurite has in containerd's `proxy_plugins`.
pub const SNAPSHOTTER: &str = "lazurite";

/// Daemons get this long to start and to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Seconds after which a command is taken to hang. The slowest honest one unpacks some hundred MiB on a busy machine.
const COMMAND_SECONDS: &str = "180";

/// Whether this machine can run system tests: root, FUSE and the programs are there. If not, says so on standard error.
///
/// # Panics
/// If not, and `CI=true`: where all tests are to run, a skipped one is a failure.
#[track_caller]
pub fn available() -> bool {
    let programs = ["containerd", "containerd-shim-runc-v2", "ctr", "runc", "docker-registry", "timeout"];
    guard::require_root_and_fuse() && guard::require_programs(&programs)
}

/// A command that is killed when it hangs; `timeout` then exits with 124 or 137.
fn patiently(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", COMMAND_SECONDS]).arg(program);
    command
}

/// What a command said, for messages of failed expectations.
fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    format!("{}: {} {}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Ends a daemon the way an operator would, and by force when that takes too long, which is the answer false.
fn end(mut daemon: ProcessGuard) -> bool {
    // An error says that it has ended already; the guard's drop covers the rest.
    daemon.signal(Signal::TERM).is_err() || matches!(daemon.wait_exit(PATIENCE), Ok(Some(_)))
}

/// Detaches every mount below `dir`, the innermost first.
pub fn unmount_below(dir: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let below = table.lines().filter_map(mount_point).filter(|path| path.starts_with(dir));
    for path in below.collect::<Vec<_>>().iter().rev() {
        let _ = unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

/// The fifth field of a line of mountinfo, where white space and backslashes are written as octal numbers (proc(5)).
fn mount_point(line: &str) -> Option<PathBuf> {
    let field = line.split(' ').nth(4)?;
    let mut parts = field.split('\\');
    let mut path = parts.next()?.to_owned();
    for part in parts {
        let (code, rest) = part.split_at_checked(3)?;
        path.push(char::from(u8::from_str_radix(code, 8).ok()?));
        path.push_str(rest);
    }
    Some(path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let line = r"36 35 98:0 /mnt1 /a\040b\134c/d rw,noatime master:1 - ext3 /dev/root rw";
        assert_eq!(mount_point(line), Some(PathBuf::from(r"/a b\c/d")));
        assert_eq!(mount_point("36 35"), None);
    }

    #[test]
    fn hanging_commands_end() {
        let output = patiently("true").output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
}
