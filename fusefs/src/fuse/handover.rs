//! Handing a live connection from one process to the next.
//!
//! The kernel's side of a connection lives as long as any descriptor of it does. Whoever keeps one beside us (a service
//! manager, a keeper process) keeps the mount alive while we are away: readers wait. The next process serves on: the session
//! is told the kernel's INIT again, through a pair of sockets, then gets the real descriptor under the number it already
//! uses, and the kernel is asked to send again what was under way.
//!
//! Owns: what has to be kept ([`Kept`]), its form as bytes, and that sequence. Does not own where it is kept ([`Keeper`]).
//!
//! Invariant: the kernel's INIT is answered once, by the first process; later ones must come to the same answer, or they
//! would believe in other rules than the kernel.

use std::{
    fmt,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
};

use fuser::{Config, Session, SessionACL};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};

use super::Adapter;

/// Linux asks for 8 KiB at least; an INIT is about a hundred bytes.
const INIT_BUFFER: usize = 64 << 10;
/// FUSE_NOTIFY_RESEND (linux/fuse.h): fuse_out_header with this as its error.
const NOTIFY_RESEND: i32 = 7;

/// A live connection and what was agreed on it.
#[derive(Debug)]
pub struct Kept {
    /// A descriptor of the connection.
    pub device: OwnedFd,
    /// What was said on it.
    pub agreement: Agreement,
}

/// The kernel's INIT and our answer, and which mount the connection is of.
#[derive(Clone, PartialEq, Eq)]
pub struct Agreement {
    init: Vec<u8>,
    reply: Vec<u8>,
    /// `major:minor` of the file system, as the mount table has it.
    device: String,
}

impl fmt::Debug for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agreement").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Keeps a connection while no process serves it.
pub trait Keeper: fmt::Debug + Send + Sync {
    /// The connection that is kept, if there is one.
    ///
    /// # Errors
    ///
    /// The keeper cannot be asked.
    fn kept(&self) -> io::Result<Option<Kept>>;

    /// Keeps a connection, and returns when it is kept.
    ///
    /// # Errors
    ///
    /// It is not.
    fn keep(&self, device: BorrowedFd<'_>, agreement: &Agreement) -> io::Result<()>;

    /// Lets go of what is kept. What fails is logged.
    fn forget(&self);
}

/// Keeps nothing: the connection ends with the process.
#[derive(Debug, Clone, Copy)]
pub struct NoKeeper;

impl Keeper for NoKeeper {
    fn kept(&self) -> io::Result<Option<Kept>> {
        Ok(None)
    }

    fn keep(&self, _: BorrowedFd<'_>, _: &Agreement) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "there is no keeper"))
    }

    fn forget(&self) {}
}

const MAGIC: &[u8; 8] = b"LZRKEPT1";

impl Agreement {
    /// The mount it is about: `major:minor`.
    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// As bytes: a magic, then INIT, answer and device, each behind its length (32 bits, little endian).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for part in [&self.init[..], &self.reply, self.device.as_bytes()] {
            bytes.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend_from_slice(part);
        }
        bytes
    }

    /// From its bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Agreement> {
        let mut rest = bytes.strip_prefix(MAGIC)?;
        let mut part = || {
            let (length, tail) = rest.split_first_chunk::<4>()?;
            let (part, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            rest = tail;
            Some(part.to_vec())
        };
        let (init, reply, device) = (part()?, part()?, part()?);
        Some(Agreement { init, reply, device: String::from_utf8(device).ok()? })
    }
}

/// Whether the kernel's side of a connection lives.
pub(super) fn is_alive(device: &impl AsFd) -> bool {
    let mut polled = [PollFd::new(device, PollFlags::IN)];
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&zero)).is_ok() && !polled[0].revents().contains(PollFlags::ERR)
}

/// Begins a session on a fresh connection, and says what was agreed. `name` is called once the file system is there.
pub(super) fn begin(
    adapter: Adapter,
    device: OwnedFd,
    config: Config,
    name: impl FnOnce() -> io::Result<String>,
) -> io::Result<(Session<Adapter>, Agreement)> {
    let mut file = std::fs::File::from(device);
    let mut init = vec![0; INIT_BUFFER];
    let length = file.read(&mut init)?;
    init.truncate(length);
    let (session, reply) = negotiate(adapter, &init, config)?;
    // The kernel takes it in within the call.
    file.write_all(&reply)?;
    let agreement = Agreement { init, reply, device: name()? };
    adopt(&session, file.into())?;
    Ok((session, agreement))
}

/// Goes on with a session on a connection that another process has served.
pub(super) fn go_on(adapter: Adapter, kept: Kept, config: Config) -> io::Result<Session<Adapter>> {
    let (session, reply) = negotiate(adapter, &kept.agreement.init, config)?;
    if reply != kept.agreement.reply {
        return Err(io::Error::other("the connection was agreed on by a version with other rules"));
    }
    adopt(&session, kept.device)?;
    resend(&session);
    Ok(session)
}

/// Lets a session shake hands on a pair of sockets; its answer to INIT.
fn negotiate(adapter: Adapter, init: &[u8], config: Config) -> io::Result<(Session<Adapter>, Vec<u8>)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut kernel = std::fs::File::from(ours);
    kernel.write_all(init)?;
    let session = Session::from_fd(adapter, theirs, SessionACL::All, config)?;
    let mut reply = vec![0; INIT_BUFFER];
    let length = kernel.read(&mut reply)?;
    reply.truncate(length);
    Ok((session, reply))
}

/// Puts the real descriptor under the number that the session uses. No thread of it runs yet.
fn adopt(session: &Session<Adapter>, device: OwnedFd) -> io::Result<()> {
    // SAFETY: both are open descriptors of this process, and nobody reads or writes the session's before `run`.
    let moved = unsafe { libc::dup3(device.as_raw_fd(), session.as_fd().as_raw_fd(), libc::O_CLOEXEC) };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks the kernel for what was under way in the process before. Linux 6.9 and newer: on older ones its readers wait until
/// they are killed.
fn resend(session: &Session<Adapter>) {
    let mut message = [0; 16];
    message[..4].copy_from_slice(&16_u32.to_le_bytes());
    message[4..8].copy_from_slice(&NOTIFY_RESEND.to_le_bytes());
    if let Err(error) = rustix::io::write(session.as_fd(), &message) {
        tracing::warn!(%error, "this kernel does not send requests again: reads that were under way hang");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreements_pass_through_bytes_and_damage_is_seen() {
        let agreement = Agreement { init: vec![1; 104], reply: vec![2; 80], device: "0:45".to_owned() };
        let bytes = agreement.to_bytes();
        assert_eq!(Agreement::from_bytes(&bytes), Some(agreement));
        for length in 0..bytes.len() {
            assert_eq!(Agreement::from_bytes(&bytes[..length]), None, "{length}");
        }
        assert_eq!(Agreement::from_bytes(b"LZRKEPT2"), None);
    }
}
