//! Translates between FUSE requests and the layers' semantics.

use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt as _,
    panic::AssertUnwindSafe,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use estargz::Kind;
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use tokio::{runtime::Handle, time::Instant};

use crate::{
    fs::{self, OpaqueXattr, STATE_DIR, STATE_FILE},
    index::{Attr, Node},
    reader,
    refs::{Refs, name::Place},
    slots::{self, ROOT_INO, Slots},
    view::View,
};

/// Layers never change. (The kernel takes any number of seconds; this is a century.)
pub(super) const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// Requests the kernel may have under way in the background: read-ahead, and with it most reads. It is one number for
/// the whole node, so that any limit would let readers of a registry that hangs hold up all others; what is
/// downloaded at once is bounded by layer.
const MAX_BACKGROUND: u16 = u16::MAX;
/// The largest request the kernel makes (256 pages).
const MAX_REQUEST: u32 = 1 << 20;

/// The requests that are counted, by their names in the FUSE protocol.
pub const OPS: [&str; 10] =
    ["lookup", "getattr", "readlink", "open", "opendir", "read", "readdir", "getxattr", "listxattr", "other"];

/// Requests answered since start, in the order of [`OPS`], and what became of reads.
#[derive(Debug, Default)]
pub struct FuseCounters {
    ops: [AtomicU64; OPS.len()],
    /// Reads that had to wait for the network.
    pub read_misses: AtomicU64,
    /// Reads answered EIO.
    pub read_errors: AtomicU64,
    /// Requests that panicked.
    pub panics: AtomicU64,
}

impl FuseCounters {
    /// How often each of [`OPS`] was asked.
    pub fn ops(&self) -> [u64; OPS.len()] {
        self.ops.each_ref().map(|n| n.load(Ordering::Relaxed))
    }

    /// All requests together.
    pub fn total(&self) -> u64 {
        self.ops().iter().sum()
    }
}

#[derive(Clone, Copy)]
enum Op {
    Lookup,
    Getattr,
    Readlink,
    Open,
    Opendir,
    Read,
    Readdir,
    Getxattr,
    Listxattr,
    Other,
}

/// Answers the kernel.
#[derive(Debug)]
pub struct Adapter {
    pub(super) slots: Arc<Slots>,
    counters: Arc<FuseCounters>,
    pub(super) runtime: Handle,
    opaque: OpaqueXattr,
    pub(super) read_deadline: Duration,
    pub(super) refs: Option<Arc<Refs>>,
}

thread_local! {
    /// One buffer per FUSE thread for reads answered at once.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Adapter {
    /// Answers for `slots`; reads that miss run on `runtime` and fail after `read_deadline`.
    pub fn new(
        slots: Arc<Slots>,
        counters: Arc<FuseCounters>,
        runtime: Handle,
        opaque: OpaqueXattr,
        read_deadline: Duration,
    ) -> Adapter {
        Adapter { slots, counters, runtime, opaque, read_deadline, refs: None }
    }

    /// Shows references in the root instead of slots.
    pub fn with_refs(self, refs: Option<Arc<Refs>>) -> Adapter {
        Adapter { refs, ..self }
    }

    /// Counts a request and answers it; a panic drops the reply, which answers EIO.
    fn answer(&self, op: Op, request: impl FnOnce()) {
        self.counters.ops[op as usize].fetch_add(1, Ordering::Relaxed);
        if std::panic::catch_unwind(AssertUnwindSafe(request)).is_err() {
            self.counters.panics.fetch_add(1, Ordering::Relaxed);
            tracing::error!(op = OPS[op as usize], "a request panicked; it was answered EIO");
        }
    }

    fn node(&self, ino: INodeNo) -> Result<(u32, Arc<View>, Node), Errno> {
        let (slot, node) = slots::split(ino.0);
        let view = self.slots.await_slot(slot).ok_or(Errno::ESTALE)?;
        Ok((slot, view, node))
    }

    fn attr_of(&self, ino: INodeNo) -> Result<(Duration, FileAttr), Errno> {
        if let Some((refs, place)) = self.place(ino) {
            return Self::place_attr(refs, place).ok_or(Errno::ESTALE);
        }
        if ino.0 == ROOT_INO {
            return Ok((FOREVER, root_attr()));
        }
        let (slot, view, node) = self.node(ino)?;
        let attr = view.attr(node).ok_or(Errno::ESTALE)?;
        Ok((attr_ttl(node), file_attr(slot, node, &attr)))
    }

    fn lookup_entry(&self, parent: INodeNo, name: &OsStr) -> Result<(Duration, FileAttr), Errno> {
        if parent.0 == ROOT_INO {
            // Not found is not remembered here: slots come.
            let slot = slots::parse(name.as_bytes()).ok_or(Errno::ENOENT)?;
            let view = self.slots.await_slot(slot).ok_or(Errno::ENOENT)?;
            let attr = view.attr(0).ok_or(Errno::ESTALE)?;
            return Ok((FOREVER, file_attr(slot, 0, &attr)));
        }
        let (slot, view, dir) = self.node(parent)?;
        let Some(node) = fs::lookup(view.layer(), dir, name.as_bytes()) else {
            // Inode 0 with a lifetime is a negative entry.
            return Ok((FOREVER, FileAttr { ino: INodeNo(0), ..root_attr() }));
        };
        let attr = view.attr(node).ok_or(Errno::ESTALE)?;
        Ok((attr_ttl(node), file_attr(slot, node, &attr)))
    }

    /// Calls `add(ino, offset of the next entry, name, attributes)` until it says that the buffer is full.
    fn list(
        &self,
        ino: INodeNo,
        offset: u64,
        mut add: impl FnMut(u64, u64, &[u8], &dyn Fn() -> (Duration, FileAttr)) -> bool,
    ) -> Result<(), Errno> {
        if let Some((refs, place)) = self.place(ino) {
            return self.list_place(refs, place, offset, add);
        }
        if ino.0 == ROOT_INO {
            let root = || (FOREVER, root_attr());
            for (at, name) in [(0, &b"."[..]), (1, b"..")] {
                if offset <= at && add(ROOT_INO, at + 1, name, &root) {
                    return Ok(());
                }
            }
            self.slots.await_all();
            for (slot, view) in self.slots.all().into_iter().filter(|(slot, _)| u64::from(*slot) + 2 > offset)
            {
                let attr = || (FOREVER, view.attr(0).map_or(root_attr(), |a| file_attr(slot, 0, &a)));
                // A slot's offset is its number, so that a listing goes on rightly while slots come and go.
                if add(slots::ino(slot, 0), u64::from(slot) + 2, slot.to_string().as_bytes(), &attr) {
                    return Ok(());
                }
            }
            return Ok(());
        }
        let (slot, view, dir) = self.node(ino)?;
        let layer = view.layer();
        let attr =
            |node: Node| (attr_ttl(node), view.attr(node).map_or(root_attr(), |a| file_attr(slot, node, &a)));
        let above = match (dir, &self.refs) {
            (0, None) => ROOT_INO,
            (0, Some(_)) => Place::Layer(slot).ino(),
            _ => slots::ino(slot, fs::parent(layer, dir)),
        };
        let dots = [(0, slots::ino(slot, dir), &b"."[..]), (1, above, b"..")];
        for (at, ino, name) in dots {
            if offset <= at && add(ino, at + 1, name, &|| attr(dir)) {
                return Ok(());
            }
        }
        let skip = offset.saturating_sub(2);
        for (at, (name, node)) in
            fs::entries(layer, dir, usize::try_from(skip).unwrap_or(usize::MAX)).enumerate()
        {
            if add(slots::ino(slot, node), skip + at as u64 + 3, &name, &|| attr(node)) {
                break;
            }
        }
        Ok(())
    }

    fn read_file(&self, ino: INodeNo, offset: u64, len: u32, reply: ReplyData) {
        if let Some((refs, place)) = self.place(ino) {
            return self.read_place(refs, place, offset, len, reply);
        }
        let (layer, node) = match self.node(ino) {
            Ok((_, view, node)) => (view.layer().clone(), node),
            Err(errno) => return reply.error(errno),
        };
        let size = match fs::attr(&layer, node) {
            Some(Attr { kind: Kind::Regular, size, .. }) => size,
            Some(Attr { kind: Kind::Directory, .. }) => return reply.error(Errno::EISDIR),
            Some(_) => return reply.error(Errno::EINVAL),
            None => return reply.error(Errno::ESTALE),
        };
        let bytes = reader::clip(size, offset, len);
        if node == STATE_FILE {
            let content = fs::state_content(&layer);
            return reply.data(&content[bytes.start as usize..bytes.end as usize]);
        }
        let reply = BUFFER.with_borrow_mut(|buffer| {
            if reader::read_local(&layer, node, bytes.clone(), buffer) {
                reply.data(buffer);
                return None;
            }
            Some(reply)
        });
        let Some(reply) = reply else { return };
        self.counters.read_misses.fetch_add(1, Ordering::Relaxed);
        let (deadline, counters) = (Instant::now() + self.read_deadline, self.counters.clone());
        // The kernel bounds these itself: by its own read-ahead, and one for each thread that reads.
        self.runtime.spawn(async move {
            match reader::read(&layer, node, bytes.clone(), deadline).await {
                Ok(data) => reply.data(&data),
                Err(error) => {
                    counters.read_errors.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(
                        layer = %layer.digest(), source = %layer.sources().name(), node, start = bytes.start,
                        end = bytes.end, reason = error.reason(), %error, "read failed"
                    );
                    reply.error(Errno::EIO);
                }
            }
        });
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_NO_OPEN_SUPPORT,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ASYNC_DIO,
            // For the state file alone: its time changes with its content.
            InitFlags::FUSE_AUTO_INVAL_DATA,
        ] {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "this kernel's FUSE lacks a capability; doing without");
            }
        }
        // Neither number is out of range.
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_max_write(MAX_REQUEST);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.answer(Op::Lookup, || {
            if let Some((refs, place)) = self.place(parent) {
                return self.lookup_place(refs, place, name, reply);
            }
            match self.lookup_entry(parent, name) {
                Ok((ttl, attr)) => reply.entry_with_ttls(&FOREVER, &ttl, &attr, Generation(0)),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(Op::Getattr, || match self.attr_of(ino) {
            Ok((ttl, attr)) => reply.attr(&ttl, &attr),
            Err(errno) => reply.error(errno),
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.answer(Op::Readlink, || match self.node(ino) {
            Ok((_, view, node)) => match view.layer().index().link_target(node) {
                Some(target) => reply.data(target),
                None => reply.error(Errno::EINVAL),
            },
            Err(errno) => reply.error(errno),
        });
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Once: the kernel then opens without asking and keeps the page cache between opens.
        self.answer(Op::Open, || reply.error(Errno::ENOSYS));
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.answer(Op::Opendir, || reply.error(Errno::ENOSYS));
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer(Op::Read, || self.read_file(ino, offset, size, reply));
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.answer(Op::Readdir, || {
            let listed = self.list(ino, offset, |ino, next, name, attr| {
                reply.add(INodeNo(ino), next, attr().1.kind, OsStr::from_bytes(name))
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.answer(Op::Readdir, || {
            let listed = self.list(ino, offset, |ino, next, name, attr| {
                let (ttl, attr) = attr();
                reply.add(INodeNo(ino), next, OsStr::from_bytes(name), &ttl, &attr, Generation(0))
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.answer(Op::Getxattr, || match self.node(ino) {
            Ok((_, view, node)) => match fs::xattr(view.layer(), node, name.as_bytes(), self.opaque) {
                Some(value) => sized(reply, value, size),
                None => reply.error(Errno::ENODATA),
            },
            Err(_) if ino.0 == ROOT_INO || self.place(ino).is_some() => reply.error(Errno::ENODATA),
            Err(errno) => reply.error(errno),
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer(Op::Listxattr, || match self.node(ino) {
            Ok((_, view, node)) => sized(reply, &fs::xattr_names(view.layer(), node, self.opaque), size),
            Err(_) if ino.0 == ROOT_INO || self.place(ino).is_some() => sized(reply, b"", size),
            Err(errno) => reply.error(errno),
        });
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        self.answer(Op::Other, || reply.error(self.create_name(parent, name)));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.answer(Op::Other, || reply.error(self.remove_name(parent, name)));
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.answer(Op::Other, || reply.error(Errno::EROFS));
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // Go asks for each file it opens; after this the kernel knows that all can be read at any time.
        self.answer(Op::Other, || reply.error(Errno::ENOSYS));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.answer(Op::Other, || reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096));
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        // Once: the kernel then answers SEEK_DATA and SEEK_HOLE itself, as for a file without holes.
        self.answer(Op::Other, || reply.error(Errno::ENOSYS));
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        // Whoever opens a file may ask whether it is a terminal.
        self.answer(Op::Other, || reply.error(Errno::ENOTTY));
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.answer(Op::Other, || reply.error(Errno::ENOSYS));
    }
}

/// The two-step protocol of `getxattr` and `listxattr`: size first, then the value if it fits.
fn sized(reply: ReplyXattr, value: &[u8], size: u32) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

fn attr_ttl(node: Node) -> Duration {
    if node == STATE_FILE || node == STATE_DIR { Duration::ZERO } else { FOREVER }
}

pub(super) fn file_attr(slot: u32, node: Node, attr: &Attr) -> FileAttr {
    let mtime = time(attr.mtime);
    FileAttr {
        ino: INodeNo(slots::ino(slot, node)),
        size: attr.size,
        // stat counts in units of 512 bytes; disks allocate 4096.
        blocks: attr.size.div_ceil(4096) * 8,
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: UNIX_EPOCH,
        kind: match attr.kind {
            Kind::Directory => FileType::Directory,
            Kind::Regular => FileType::RegularFile,
            Kind::Symlink => FileType::Symlink,
            Kind::CharDevice => FileType::CharDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Fifo => FileType::NamedPipe,
        },
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        // The kernel's 32-bit encoding (new_encode_dev): 12 bits of major between two parts of minor.
        rdev: (attr.rdev.1 & 0xff) | (attr.rdev.0 & 0xfff) << 8 | (attr.rdev.1 & !0xff) << 12,
        blksize: 4096,
        flags: 0,
    }
}

fn time((secs, nanos): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(secs.unsigned_abs());
    let base = if secs >= 0 { UNIX_EPOCH.checked_add(whole) } else { UNIX_EPOCH.checked_sub(whole) };
    base.and_then(|t| t.checked_add(Duration::from_nanos(u64::from(nanos)))).unwrap_or(UNIX_EPOCH)
}

fn root_attr() -> FileAttr {
    let attr = Attr {
        kind: Kind::Directory,
        mode: 0o755,
        uid: 0,
        gid: 0,
        nlink: 2,
        rdev: (0, 0),
        size: 0,
        mtime: (0, 0),
    };
    FileAttr { ino: INodeNo(ROOT_INO), ..file_attr(0, 0, &attr) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_its_request_and_nothing_else() {
        /// Stands for a reply: the library's own answers EIO when it is dropped.
        struct Reply(Arc<AtomicU64>);
        impl Drop for Reply {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let counters = Arc::new(FuseCounters::default());
        let runtime = Handle::current();
        let deadline = Duration::from_secs(1);
        let adapter = Adapter::new(Arc::default(), counters.clone(), runtime, OpaqueXattr::Trusted, deadline);
        let dropped = Arc::new(AtomicU64::new(0));
        let reply = Reply(dropped.clone());
        adapter.answer(Op::Read, move || {
            let _reply = reply;
            panic!("injected");
        });
        assert_eq!(dropped.load(Ordering::Relaxed), 1, "it is answered");
        let mut answered = false;
        adapter.answer(Op::Read, || answered = true);
        assert!(answered);
        assert_eq!((counters.panics.load(Ordering::Relaxed), counters.total()), (1, 2));
    }

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_decodes_them() {
        let rdev = |major, minor| {
            let attr = Attr {
                kind: Kind::CharDevice,
                mode: 0,
                uid: 0,
                gid: 0,
                nlink: 1,
                rdev: (major, minor),
                size: 0,
                mtime: (0, 0),
            };
            file_attr(1, 1, &attr).rdev
        };
        assert_eq!(rdev(0, 0), 0);
        assert_eq!(rdev(1, 3), 0x103);
        assert_eq!(rdev(8, 0x12345), 0x1230_0845);
    }

    #[test]
    fn times_before_the_epoch_count_backwards() {
        assert_eq!(time((-1, 0)), UNIX_EPOCH - Duration::from_secs(1));
        assert_eq!(time((-1, 500_000_000)), UNIX_EPOCH - Duration::from_millis(500));
        // Whatever a TOC says is a time, not a panic.
        for secs in [i64::MIN, i64::MAX] {
            time((secs, 999_999_999));
        }
    }
}
