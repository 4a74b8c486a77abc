//! Mounts the file system and runs its session.

use std::{
    ffi::OsString,
    fs,
    io::{self, ErrorKind},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver},
    time::Duration,
};

use fuser::{Config, INodeNo, Notifier, Session, SessionACL};
use parking_lot::Mutex;
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, UnmountFlags},
};

use super::{
    Adapter,
    handover::{self, Agreement, Keeper},
};
use crate::slots::ROOT_INO;

/// The kernel's own limit on one request is 256 pages.
const READ_AHEAD_KIB: u32 = 1024;

/// How long the threads of a session take to end after the last use of its file system, and far more.
const SESSION_END: Duration = Duration::from_millis(500);

/// A mounted, served connection. Dropping it detaches the mount, unless that is kept.
#[derive(Debug)]
pub struct Connection {
    mountpoint: PathBuf,
    notifier: Notifier,
    /// Hears when the session's threads have ended.
    ended: Mutex<Option<Receiver<()>>>,
    lifetime: Lifetime,
}

/// How long a connection lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// As long as this process.
    Process,
    /// Until it is unmounted: somebody keeps it.
    Kept,
}

/// What the mount's root holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// Slots. Nothing can be changed.
    Slots,
    /// References. Nothing can be changed here either, but we are asked: who creates or removes says with it what it uses.
    References,
}

impl Connection {
    /// Goes on with the connection that is kept for `mountpoint`, or mounts anew after clearing what is left there, and serves
    /// with `threads` threads.
    pub fn open(
        mountpoint: &Path,
        adapter: &dyn Fn() -> Adapter,
        shown: Shown,
        threads: usize,
        keeper: &dyn Keeper,
    ) -> io::Result<Connection> {
        if let Some(session) = resumed(mountpoint, adapter, threads, keeper) {
            tracing::info!(mount = %mountpoint.display(), "the mount of the process before goes on");
            return Connection::run(mountpoint, session, Lifetime::Kept);
        }
        match clear_stale(mountpoint)? {
            0 => {}
            n => tracing::info!(mount = %mountpoint.display(), n, "detached the mount of an earlier process"),
        }
        Connection::mount(mountpoint, adapter(), shown, threads, keeper)
    }

    fn mount(
        mountpoint: &Path,
        adapter: Adapter,
        shown: Shown,
        threads: usize,
        keeper: &dyn Keeper,
    ) -> io::Result<Connection> {
        let device =
            rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
                let e = io::Error::from(e);
                let what = match e.kind() {
                    ErrorKind::PermissionDenied => "this user must be able to read and write it",
                    _ => "is the fuse module loaded?",
                };
                io::Error::new(e.kind(), format!("opening /dev/fuse: {e}; {what}"))
            })?;
        mount(mountpoint, &device, shown)?;
        let name = || entries_of(mountpoint)?.pop().ok_or_else(|| ErrorKind::NotFound.into());
        let begun = handover::begin(adapter, device, config(threads), name);
        let (session, agreement) = begun.inspect_err(|_| detach(mountpoint))?;
        let lifetime = match keeper.keep(session.as_fd(), &agreement) {
            Ok(()) => Lifetime::Kept,
            Err(error) => {
                tracing::warn!(%error, "nobody keeps the mount: containers lose it when this process ends");
                Lifetime::Process
            }
        };
        Connection::run(mountpoint, session, lifetime)
    }

    fn run(mountpoint: &Path, session: Session<Adapter>, lifetime: Lifetime) -> io::Result<Connection> {
        let notifier = session.notifier();
        let path = mountpoint.to_owned();
        let (end, ended) = mpsc::channel();
        let run = move || {
            match session.run() {
                Ok(()) => tracing::debug!(mount = %path.display(), "the file system is unmounted"),
                Err(error) => tracing::error!(mount = %path.display(), %error, "the FUSE session failed"),
            }
            // Nobody listens if the connection was dropped.
            let _ = end.send(());
        };
        std::thread::Builder::new().name("fuse-session".into()).spawn(run)?;
        if let Err(error) = raise_read_ahead(mountpoint) {
            tracing::warn!(mount = %mountpoint.display(), %error, "read-ahead stays at the kernel's default");
        }
        Ok(Connection {
            mountpoint: mountpoint.to_owned(),
            notifier,
            ended: Mutex::new(Some(ended)),
            lifetime,
        })
    }

    /// Tells the kernel that a slot's directory is gone from the root, and that the root's listing changed. May block
    /// on locks that requests hold: never call it on a FUSE thread.
    pub fn forget_slot(&self, slot: u32) {
        self.forget_name(&slot.to_string());
    }

    /// Tells the kernel that a name is gone from the root, as [`Connection::forget_slot`].
    pub fn forget_name(&self, name: &str) {
        // Errors say that the kernel did not know it.
        let _ = self.notifier.inval_entry(INodeNo(ROOT_INO), name.as_ref());
        self.root_changed();
    }

    /// Tells the kernel that the root's listing changed. May block as [`Connection::forget_slot`].
    pub fn root_changed(&self) {
        let _ = self.notifier.inval_inode(INodeNo(ROOT_INO), 0, 0);
    }

    /// How long it lives.
    pub fn lifetime(&self) -> Lifetime {
        self.lifetime
    }

    /// Unmounts if nothing uses the mount by its path. `false`: something uses the file system, and goes on with what
    /// the page cache holds when the process ends. An overlay has mounts of its own of the lower directories it took,
    /// so unmounting may succeed and yet end nothing: the session is waited for only as long as its end takes.
    pub fn close_if_idle(&self) -> bool {
        let unmounted = rustix::mount::unmount(&self.mountpoint, UnmountFlags::NOFOLLOW).is_ok();
        let ended = self.ended.lock().take();
        unmounted && ended.is_some_and(|ended| ended.recv_timeout(SESSION_END).is_ok())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // One that is kept is the next process's, however this one ends.
        if self.ended.lock().take().is_some() && self.lifetime == Lifetime::Process {
            detach(&self.mountpoint);
        }
    }
}

fn config(threads: usize) -> Config {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    // A cloned fd would end its requests in flight when it is closed; the connection must outlive any one fd.
    config.clone_fd = false;
    config
}

/// The session that goes on with what is kept, if that is still the mount at `mountpoint`.
fn resumed(
    mountpoint: &Path,
    adapter: &dyn Fn() -> Adapter,
    threads: usize,
    keeper: &dyn Keeper,
) -> Option<Session<Adapter>> {
    let kept = keeper
        .kept()
        .inspect_err(|error| tracing::warn!(%error, "cannot ask who keeps the mount"))
        .ok()??;
    let agreement = kept.agreement.clone();
    let mounted =
        entries_of(mountpoint).is_ok_and(|all| all.iter().any(|dev| dev == kept.agreement.device()));
    let why = match (mounted, handover::is_alive(&kept.device)) {
        (true, true) => match handover::go_on(adapter(), kept, config(threads)) {
            Ok(session) => return Some(session),
            Err(error) => error.to_string(),
        },
        (false, _) => "it is not mounted any more".to_owned(),
        (true, false) => "its connection was ended".to_owned(),
    };
    tracing::warn!(mount = %mountpoint.display(), why, "the mount that was kept cannot be used; mounting anew");
    keeper.forget();
    // It may be somewhere else, where it would be dead now.
    if let Err(error) = let_go(&agreement) {
        tracing::warn!(%error, "a mount that was kept cannot be detached");
    }
    None
}

fn mount(mountpoint: &Path, device: &OwnedFd, shown: Shown) -> io::Result<()> {
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
    let flags = match shown {
        Shown::Slots => MountFlags::RDONLY | MountFlags::NOATIME,
        // On a read-only mount the kernel answers for us.
        Shown::References => MountFlags::NOATIME,
    };
    // Not `nosuid`, not `nodev`: a view of one layer is a bind mount of its directory and would inherit them.
    rustix::mount::mount("lazurite", mountpoint, "fuse.lazurite", flags, Some(data.as_c_str())).map_err(|e| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("mounting at {}: {e}", mountpoint.display()))
    })
}

fn detach(mountpoint: &Path) {
    if let Err(error) = rustix::mount::unmount(mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        tracing::debug!(mount = %mountpoint.display(), %error, "detaching");
    }
}

/// Detaches whatever an earlier process left mounted at `mountpoint`; how many mounts there were. Works from the mount
/// table alone: a look at a dead mount fails, a look at a stuck one hangs.
pub fn clear_stale(mountpoint: &Path) -> io::Result<usize> {
    let mut cleared = 0;
    while !entries_of(mountpoint)?.is_empty() {
        rustix::mount::unmount(mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
        cleared += 1;
    }
    Ok(cleared)
}

/// Detaches the mount of a connection that nobody will go on with: a directory without a file system is less in the way than
/// one with a dead one.
///
/// # Errors
///
/// The mount table cannot be read, or the mount cannot be detached.
pub fn let_go(agreement: &Agreement) -> io::Result<()> {
    for point in roots_of(&fs::read("/proc/self/mountinfo")?, agreement.device()) {
        rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    }
    Ok(())
}

/// Where the whole of a file system of ours is mounted, the last mount first.
fn roots_of(table: &[u8], device: &str) -> Vec<PathBuf> {
    let root = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        let (found, root, point) = (*fields.get(2)?, *fields.get(3)?, *fields.get(4)?);
        let kind = fields.iter().position(|field| *field == b"-").and_then(|dash| fields.get(dash + 1));
        let is_ours = found == device.as_bytes() && root == b"/" && kind == Some(&&b"fuse.lazurite"[..]);
        is_ours.then(|| PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(point))))
    };
    let mut roots: Vec<PathBuf> = table.split(|&b| b == b'\n').filter_map(root).collect();
    roots.reverse();
    roots
}

/// The mounts that use the file system at `mountpoint`, or may: bind mounts of it, and overlays with lower directories that
/// `leads` here, or named by relative paths, as containerd shortens long options. Works from the mount table alone.
pub fn users(mountpoint: &Path, leads: &dyn Fn(&Path) -> bool) -> io::Result<Vec<PathBuf>> {
    let own = entries_of(mountpoint)?;
    Ok(users_in(&fs::read("/proc/self/mountinfo")?, mountpoint, leads, &own))
}

fn users_in(table: &[u8], mountpoint: &Path, leads: &dyn Fn(&Path) -> bool, own: &[String]) -> Vec<PathBuf> {
    let mountpoint = escape(mountpoint.as_os_str().as_bytes());
    let user = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        let (device, point) = (String::from_utf8_lossy(fields.get(2)?).into_owned(), *fields.get(4)?);
        let kind = fields.iter().position(|field| *field == b"-").and_then(|dash| fields.get(dash + 1));
        let uses = match kind {
            Some(&b"overlay") => fields.last()?.split(|&b| b == b',').any(|option| {
                let names = [&b"lowerdir="[..], b"lowerdir+=", b"datadir+="];
                let lower = names.iter().find_map(|name| option.strip_prefix(*name));
                lower.is_some_and(|lower| {
                    let mut dirs =
                        lower_dirs(lower).into_iter().map(|dir| PathBuf::from(OsString::from_vec(dir)));
                    dirs.any(|dir| dir.is_relative() || leads(&dir))
                })
            }),
            _ => own.contains(&device) && point != mountpoint,
        };
        uses.then(|| PathBuf::from(std::ffi::OsStr::from_bytes(point)))
    };
    table.split(|&b| b == b'\n').filter_map(user).collect()
}

/// The lower directories in an option as the mount table has it: in a name, a colon follows a backslash.
fn lower_dirs(option: &[u8]) -> Vec<Vec<u8>> {
    let mut dirs = vec![Vec::new()];
    let mut bytes = unescape(option).into_iter();
    while let Some(byte) = bytes.next() {
        match (byte, dirs.last_mut()) {
            (b':', _) => dirs.push(Vec::new()),
            (b'\\', Some(dir)) => dir.extend(bytes.next()),
            (byte, Some(dir)) => dir.push(byte),
            (_, None) => {}
        }
    }
    dirs
}

/// `major:minor` of each mount at a path, in the order they were made.
fn entries_of(mountpoint: &Path) -> io::Result<Vec<String>> {
    let table = fs::read("/proc/self/mountinfo")?;
    // Fields of proc(5): id parent major:minor root mountpoint ...; blanks in paths are written \040.
    let wanted = escape(mountpoint.as_os_str().as_bytes());
    Ok(table
        .split(|&b| b == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&b| b == b' ');
            let device = fields.nth(2)?;
            (fields.nth(1)? == wanted).then(|| String::from_utf8_lossy(device).into_owned())
        })
        .collect())
}

fn escape(path: &[u8]) -> Vec<u8> {
    path.iter()
        .flat_map(|&b| match b {
            b' ' | b'\t' | b'\n' | b'\\' => format!("\\{b:03o}").into_bytes(),
            _ => vec![b],
        })
        .collect()
}

/// The reverse of [`escape`]; what is no escape stays.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| first == b'\\');
        let code = code.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    out
}

/// INIT cannot ask for more than the kernel's default of 128 KiB, but the mount's own setting can be raised after it.
fn raise_read_ahead(mountpoint: &Path) -> io::Result<()> {
    let device = entries_of(mountpoint)?.pop().ok_or(ErrorKind::NotFound)?;
    fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), READ_AHEAD_KIB.to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn who_uses_a_mount_is_seen_in_the_mount_table() {
        let table = b"30 1 0:45 / /r/mnt ro - fuse.lazurite lazurite ro\n\
            31 1 0:45 /7 /view ro - fuse.lazurite lazurite ro\n\
            32 1 0:46 / /run/c1 rw - overlay overlay rw,lowerdir=/r/snapshots/7/fs:/r/snapshots/5/fs,upperdir=/x\n\
            33 1 0:47 / /run/c2 rw - overlay overlay rw,lowerdir=7/fs:5/fs,upperdir=/y\n\
            34 1 0:48 / /run/c3 rw - overlay overlay rw,lowerdir=/other/snapshots/7/fs,upperdir=/z\n\
            35 1 8:1 / / rw - ext4 /dev/sda rw\n\
            36 1 0:49 / /run/c4 rw - overlay overlay ro,lowerdir=/s/sha256\\134:12/diff:/s/sha256\\134:34/diff\n";
        let leads = |lower: &std::path::Path| lower.starts_with("/r/snapshots");
        let users = super::users_in(table, "/r/mnt".as_ref(), &leads, &["0:45".to_owned()]);
        assert_eq!(users, ["/view", "/run/c1", "/run/c2"].map(std::path::PathBuf::from));
    }

    #[test]
    fn the_roots_of_a_file_system_are_seen_in_the_mount_table() {
        let table = b"30 1 0:45 / /r/m\\040t rw - fuse.lazurite lazurite rw\n\
            31 1 0:45 /7 /view ro - fuse.lazurite lazurite ro\n\
            32 1 0:46 / /other rw - fuse.lazurite lazurite rw\n\
            33 1 0:45 / /second rw - fuse.lazurite lazurite rw\n\
            34 1 0:45 / /no rw - ext4 /dev/sda rw\n";
        assert_eq!(super::roots_of(table, "0:45"), ["/second", "/r/m t"].map(std::path::PathBuf::from));
        assert_eq!(super::roots_of(b"garbage\n\n", "0:45"), [""; 0].map(std::path::PathBuf::from));
    }

    #[test]
    fn paths_are_escaped_as_the_mount_table_has_them() {
        assert_eq!(super::escape(b"/a b\\c"), b"/a\\040b\\134c");
        assert_eq!(super::unescape(b"/a\\040b\\134c"), b"/a b\\c");
        assert_eq!(super::unescape(b"/a\\04\\"), b"/a\\04\\");
    }
}
