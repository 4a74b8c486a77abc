//! What a header and the extensions in front of it say of an entry.

use super::header::{BLOCK, Header, Why};
use super::pax::Records;
use crate::Timestamp;
use crate::writer::Error;
use crate::writer::error::show;

/// Longest name and link target in bytes: Linux takes no longer path. Longer ones can be unpacked by no engine, but would
/// cost time in the square of their length.
const MAX_PATH: usize = 4095;

/// Key of a record that holds an extended attribute; star introduced it, all others follow.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// An entry, its extensions taken into account.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The blocks in front of the content: extension headers and the header itself.
    pub(crate) header: Vec<u8>,
    pub(crate) kind: Kind,
    /// As in the tar, not empty.
    pub(crate) name: Vec<u8>,
    /// Target of a link, not empty; empty for all others.
    pub(crate) link: Vec<u8>,
    /// The header's field, which may hold more than permissions.
    pub(crate) mode: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) user: Vec<u8>,
    pub(crate) group: Vec<u8>,
    pub(crate) mtime: Timestamp,
    /// Last access and last change of the inode, where the tar tells them.
    pub(crate) other_times: [Option<Timestamp>; 2],
    /// Bytes of content, holes included; 0 unless regular.
    pub(crate) size: u64,
    /// Major and minor number; 0 unless a device.
    pub(crate) device: (u32, u32),
    /// Whether the header says what its kind does not have: the size of a link, the target of a file.
    pub(crate) has_spare_fields: bool,
    /// Names and values; the last one of a name counts.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry of a tar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular,
    /// Symbolic link.
    Symlink,
    /// Another name for a file met before.
    HardLink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
}

/// Headers that speak of the entry behind them.
#[derive(Default)]
pub(super) struct Extensions {
    /// All of them, byte for byte.
    pub(super) blocks: Vec<u8>,
    /// Those of the last pax header.
    pub(super) records: Records,
    /// GNU long name; empty for none.
    pub(super) name: Vec<u8>,
    /// GNU long link target; empty for none.
    pub(super) link: Vec<u8>,
}

impl Extensions {
    pub(super) fn push(&mut self, header: &Header, body: &[u8]) {
        self.blocks.extend_from_slice(header.block());
        self.blocks.extend_from_slice(body);
        self.blocks.resize(self.blocks.len().next_multiple_of(BLOCK), 0);
    }
}

/// Puts an entry together. Its size is what the tar stores; sparse files are the caller's business.
///
/// # Errors
///
/// [`Error::BadEntry`], [`Error::UnknownType`].
pub(super) fn understand(header: &Header, extensions: &Extensions) -> Result<Entry, Error> {
    let records = &extensions.records;
    // Sparse files of the pax kind have a made-up name elsewhere.
    let name = records
        .get("GNU.sparse.name")
        .or(Some(&extensions.name[..]).filter(|name| !name.is_empty()))
        .or(records.get("path"))
        .map_or_else(|| header.name(), <[u8]>::to_vec);
    let named = |why| Error::entry(&name, why);
    if name.is_empty() {
        return Err(named("it has no name".into()));
    }
    if name.len() > MAX_PATH {
        return Err(named(
            format!("its name has {} bytes, and no path has more than {MAX_PATH}", name.len()).into(),
        ));
    }
    let kind = match header.type_flag() {
        0 if name.ends_with(b"/") => Kind::Directory,
        0 | b'0' | b'S' => Kind::Regular,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        type_flag => return Err(Error::UnknownType { name: show(&name), type_flag }),
    };
    let mut entry = attributes(header, records).map_err(named)?;
    match kind {
        Kind::Regular => entry.size = size(header, records).map_err(named)?,
        Kind::HardLink | Kind::Symlink => {
            entry.link = Some(&extensions.link[..])
                .filter(|link| !link.is_empty())
                .or(records.get("linkpath"))
                .unwrap_or(header.link())
                .to_vec();
            if entry.link.is_empty() {
                return Err(named("it is a link without a target".into()));
            }
            if entry.link.len() > MAX_PATH {
                let len = entry.link.len();
                return Err(named(
                    format!("its target has {len} bytes, and no path has more than {MAX_PATH}").into(),
                ));
            }
        }
        Kind::CharDevice | Kind::BlockDevice => entry.device = device(header).map_err(named)?,
        Kind::Directory | Kind::Fifo => {}
    }
    let has_spare_fields = has_spare_fields(kind, header, extensions);
    let header = [&extensions.blocks[..], header.block()].concat();
    Ok(Entry { header, kind, name, has_spare_fields, ..entry })
}

fn has_spare_fields(kind: Kind, header: &Header, extensions: &Extensions) -> bool {
    let Extensions { records, link, .. } = extensions;
    let is_link = matches!(kind, Kind::HardLink | Kind::Symlink);
    let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
    let target = !header.link().is_empty() || !link.is_empty() || records.get("linkpath").is_some();
    kind != Kind::Regular && size(header, records).ok() != Some(0)
        || !is_device && header.device().ok() != Some((0, 0))
        || !is_link && target
}

/// What all kinds have. Kind, name and header are the caller's.
fn attributes(header: &Header, records: &Records) -> Result<Entry, Why> {
    let owner = |what, field: Result<i64, Why>| {
        let id = records.integer(what)?.map_or(field, Ok)?;
        u32::try_from(id).map_err(|_| Why::from(format!("its {what} is {id}")))
    };
    let text = |key, field: &[u8]| records.get(key).unwrap_or(field).to_vec();
    let mode = header.mode()?;
    let mtime = match records.time("mtime")? {
        Some(mtime) => mtime,
        None => Timestamp { secs: header.mtime()?, nanos: 0 },
    };
    let xattrs =
        records.iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?.to_vec(), value.to_vec())));
    Ok(Entry {
        header: Vec::new(),
        kind: Kind::Directory,
        name: Vec::new(),
        link: Vec::new(),
        mode: u64::try_from(mode).map_err(|_| format!("its mode is {mode}"))?,
        uid: owner("uid", header.uid())?,
        gid: owner("gid", header.gid())?,
        user: text("uname", header.user()),
        group: text("gname", header.group()),
        mtime,
        other_times: other_times(header, records),
        size: 0,
        device: (0, 0),
        has_spare_fields: false,
        xattrs: xattrs.collect(),
    })
}

/// What is no time counts as not told: nobody unpacks these.
fn other_times(header: &Header, records: &Records) -> [Option<Timestamp>; 2] {
    let [accessed, changed] = header.other_times();
    [("atime", accessed), ("ctime", changed)].map(|(key, field)| {
        let field = field.map(|secs| Timestamp { secs, nanos: 0 });
        records.time(key).ok().flatten().or(field)
    })
}

fn size(header: &Header, records: &Records) -> Result<u64, Why> {
    let size = records.integer("size")?.map_or_else(|| header.size(), Ok)?;
    u64::try_from(size).map_err(|_| format!("its size is {size}").into())
}

fn device(header: &Header) -> Result<(u32, u32), Why> {
    let (major, minor) = header.device()?;
    let bad = |_| Why::from(format!("its device number is {major}:{minor}"));
    Ok((u32::try_from(major).map_err(bad)?, u32::try_from(minor).map_err(bad)?))
}
