//! Who keeps the mount while no daemon runs: systemd's store of descriptors, or a process of ours.
//!
//! | keeper | when | what it survives |
//! |---|---|---|
//! | [`FdStore`] | `NOTIFY_SOCKET` is set and systemd has a store for the unit | everything but stopping the unit |
//! | [`Process`] | otherwise | the daemon's end, however it comes |
//!
//! The process is this program with the command `keep`: a few lines ([`run`]) that hold a descriptor and some bytes, and know
//! nothing else, so that no upgrade ever has a reason to replace it. It ends when what it keeps has ended, when it is told to,
//! and when no daemon has come back for an hour: then the mount is detached, and the readers that wait are let go with an
//! error.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use fusefs::{Agreement, Keeper, Kept};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recvmsg, sendmsg, socket_with,
};
use sd_notify::NotifyState;

/// Longer than any agreement: two short messages of the FUSE protocol.
const MESSAGE: usize = 256 << 10;
/// How long the keeper may take to start, and to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long readers wait for a daemon that does not come back.
const ABANDONED: Duration = Duration::from_secs(3600);
/// The names under which systemd stores the connection and what was agreed on it.
const NAMES: [&str; 2] = ["lazurite-fuse", "lazurite-init"];

/// The keeper for the daemon with this root directory.
pub fn find(root: &Path) -> Arc<dyn Keeper> {
    match FdStore::inherited() {
        Some(store) => Arc::new(store),
        None => Arc::new(Process { socket: root.join("keeper.sock") }),
    }
}

/// systemd's store.
#[derive(Debug)]
struct FdStore {
    kept: std::sync::Mutex<Option<Kept>>,
}

impl FdStore {
    /// `None` without a service manager that stores descriptors.
    fn inherited() -> Option<FdStore> {
        std::env::var_os("NOTIFY_SOCKET")?;
        // Set since systemd 254 if the unit has a store; older ones take the descriptors without a word.
        let limit = std::env::var("FDSTORE").ok().and_then(|text| text.parse::<u32>().ok());
        if limit.is_some_and(|limit| limit < 2)
            || (limit.is_none() && std::env::var_os("INVOCATION_ID").is_none())
        {
            tracing::warn!(
                "the service manager stores no descriptors for this unit: set FileDescriptorStoreMax=8"
            );
            return None;
        }
        let (mut device, mut agreement) = (None, None);
        let passed = sd_notify::listen_fds_with_names().map(Iterator::collect::<Vec<_>>);
        let passed = passed.unwrap_or_else(|error| {
            tracing::warn!(%error, "what the service manager has stored cannot be used");
            Vec::new()
        });
        for (number, name) in passed {
            // SAFETY: the service manager has passed the descriptor to this process, and nobody else takes it.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
            match NAMES.iter().position(|known| *known == name) {
                Some(0) => device = Some(fd),
                Some(_) => agreement = read_all(&fd).ok().and_then(|bytes| Agreement::from_bytes(&bytes)),
                None => {}
            }
        }
        let kept = device.zip(agreement).map(|(device, agreement)| Kept { device, agreement });
        Some(FdStore { kept: std::sync::Mutex::new(kept) })
    }

    fn remove() {
        for name in NAMES {
            if let Err(error) = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]) {
                tracing::warn!(%error, name, "the service manager keeps a descriptor that is of no use");
            }
        }
    }
}

/// All of a memory file, wherever it is read from elsewhere.
fn read_all(fd: &OwnedFd) -> io::Result<Vec<u8>> {
    let size = usize::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0).min(MESSAGE);
    let mut bytes = vec![0; size];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(fd.try_clone()?), &mut bytes, 0)?;
    Ok(bytes)
}

impl Keeper for FdStore {
    fn kept(&self) -> io::Result<Option<Kept>> {
        Ok(self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take())
    }

    fn keep(&self, device: BorrowedFd<'_>, agreement: &Agreement) -> io::Result<()> {
        // Those of an earlier mount would come back beside these.
        FdStore::remove();
        let file = memfd_create(NAMES[1], MemfdFlags::CLOEXEC)?;
        io::Write::write_all(&mut std::fs::File::from(file.try_clone()?), &agreement.to_bytes())?;
        for (name, fd) in NAMES.into_iter().zip([device, file.as_fd()]) {
            sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd])?;
        }
        Ok(())
    }

    fn forget(&self) {
        FdStore::remove();
    }
}

/// A process that keeps.
#[derive(Debug)]
struct Process {
    socket: PathBuf,
}

/// What the keeper is asked: the first byte of a message. An agreement may follow, with a descriptor beside it.
const GIVE: u8 = b'g';
const TAKE: u8 = b't';
const FORGET: u8 = b'f';

impl Process {
    /// Asks the keeper; `None` if there is none.
    fn ask(&self, what: u8, kept: Option<(BorrowedFd<'_>, &[u8])>) -> io::Result<Option<Message>> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        match connect(&socket, &SocketAddrUnix::new(&self.socket)?) {
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => return Ok(None),
            connected => connected?,
        }
        let (fd, bytes) = kept.map_or((None, &[][..]), |(fd, bytes)| (Some(fd), bytes));
        send(&socket, &[&[what], bytes].concat(), fd)?;
        if !ready(&[PollFd::new(&socket, PollFlags::IN)], PATIENCE)? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the keeper does not answer"));
        }
        receive(&socket).map(Some)
    }

    /// Starts the process: in a session of its own, so that what ends the daemon does not end it.
    fn start(&self) -> io::Result<()> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("lazurite-keep").arg("keep").arg(&self.socket).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: setsid may be called between fork and exec.
        unsafe {
            command.pre_exec(|| rustix::process::setsid().map(drop).map_err(Into::into));
        }
        let mut child = command.spawn()?;
        // It goes on in the background once it listens, and the one we started ends.
        match child.wait()?.success() {
            true => Ok(()),
            false => Err(io::Error::other("the keeper did not start")),
        }
    }
}

impl Keeper for Process {
    fn kept(&self) -> io::Result<Option<Kept>> {
        let Some(Message { bytes, fd: Some(device) }) = self.ask(GIVE, None)? else { return Ok(None) };
        Ok(Agreement::from_bytes(&bytes).map(|agreement| Kept { device, agreement }))
    }

    fn keep(&self, device: BorrowedFd<'_>, agreement: &Agreement) -> io::Result<()> {
        let bytes = agreement.to_bytes();
        if let Some(Message { bytes, .. }) = self.ask(TAKE, Some((device, &bytes)))?
            && bytes == [TAKE]
        {
            return Ok(());
        }
        self.start()?;
        match self.ask(TAKE, Some((device, &bytes)))? {
            Some(Message { bytes, .. }) if bytes == [TAKE] => Ok(()),
            _ => Err(io::Error::other("the keeper does not keep")),
        }
    }

    fn forget(&self) {
        if let Err(error) = self.ask(FORGET, None) {
            tracing::warn!(%error, "the keeper keeps what is of no use");
        }
    }
}

/// Bytes, and a descriptor if one came along.
struct Message {
    bytes: Vec<u8>,
    fd: Option<OwnedFd>,
}

fn send(socket: &OwnedFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<Message> {
    let mut bytes = vec![0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    bytes.truncate(received.bytes);
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last().or(fd);
        }
    }
    Ok(Message { bytes, fd })
}

/// Whether anything happens on one of them in time.
fn ready(fds: &[PollFd<'_>], limit: Duration) -> io::Result<bool> {
    let mut fds = fds.to_vec();
    let limit = Timespec { tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    loop {
        match poll(&mut fds, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            polled => return Ok(polled? > 0),
        }
    }
}

/// The keeper itself: listens, goes into the background, keeps.
///
/// # Errors
///
/// It cannot listen.
pub fn run(path: &Path) -> anyhow::Result<()> {
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let _ = std::fs::remove_file(path);
    let address = SocketAddrUnix::new(path).with_context(|| format!("{} is too long", path.display()))?;
    bind(&listener, &address).with_context(|| format!("listening on {}", path.display()))?;
    listen(&listener, 8)?;
    // SAFETY: no thread was started, so that the child is as good a process as this one.
    match unsafe { libc::fork() } {
        0 => {}
        child if child > 0 => return Ok(()),
        _ => return Err(io::Error::last_os_error()).context("going into the background"),
    }
    keep(&listener, path);
    Ok(())
}

fn keep(listener: &OwnedFd, path: &Path) {
    let mut kept: Option<(OwnedFd, Vec<u8>)> = None;
    let mut served = Instant::now();
    loop {
        let device = kept.as_ref().map(|(device, _)| PollFd::new(device, PollFlags::empty()));
        let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
        fds.extend(device);
        let tick = Timespec { tv_sec: 10, tv_nsec: 0 };
        if poll(&mut fds, Some(&tick)).is_err() {
            continue;
        }
        let ended = fds.get(1).is_some_and(|device| device.revents().contains(PollFlags::ERR));
        let asked = fds[0].revents().contains(PollFlags::IN);
        drop(fds);
        if ended {
            return;
        }
        if asked && let Ok(client) = accept_with(listener, SocketFlags::CLOEXEC) {
            // A client that says nothing may not hold up the next one.
            if !ready(&[PollFd::new(&client, PollFlags::IN)], PATIENCE).unwrap_or(false) {
                continue;
            }
            served = Instant::now();
            let Ok(Message { bytes, fd }) = receive(&client) else { continue };
            let _ = match (bytes.split_first(), fd) {
                (Some((&GIVE, _)), _) => match &kept {
                    Some((device, bytes)) => send(&client, bytes, Some(device.as_fd())),
                    None => send(&client, &[GIVE], None),
                },
                (Some((&TAKE, agreement)), Some(device)) => {
                    kept = Some((device, agreement.to_vec()));
                    send(&client, &[TAKE], None)
                }
                (Some((&FORGET, _)), _) => {
                    // Before the answer: the next keeper may be started after it.
                    let _ = std::fs::remove_file(path);
                    let _ = send(&client, &[FORGET], None);
                    return;
                }
                _ => Ok(()),
            };
        }
        // A daemon says that it lives by holding the lock on its root.
        if !is_abandoned(path) {
            served = Instant::now();
        }
        if served.elapsed() > ABANDONED {
            let agreement = kept.as_ref().and_then(|(_, bytes)| Agreement::from_bytes(bytes));
            // What fails there fails for whoever looks at the mount. Nobody reads what we could say.
            let _ = agreement.map(|agreement| fusefs::let_go(&agreement));
            return;
        }
    }
}

/// Whether no daemon holds the lock of the root that the keeper's socket lies in.
fn is_abandoned(socket: &Path) -> bool {
    let Some(root) = socket.parent() else { return true };
    let Ok(lock) = std::fs::File::open(root.join("lock")) else { return true };
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockShared).is_ok()
}
