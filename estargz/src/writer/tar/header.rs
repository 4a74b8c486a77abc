//! One tar header block: its fields, numbers and checksum.
//!
//! ```text
//! 0    name      100    157  linkname  100    345  prefix    155  (ustar; star: 131)
//! 100  mode        8    257  magic       6         or, GNU:
//! 108  uid         8    263  version     2    345  atime 12, ctime 12, ...
//! 116  gid         8    265  uname      32    386  sparse   4 x (offset 12, size 12)
//! 124  size       12    297  gname      32    482  isextended 1
//! 136  mtime      12    329  devmajor    8    483  realsize  12
//! 148  checksum    8    337  devminor    8    500  unused
//! 156  type        1                          508  "tar\0" (star)
//! ```
//!
//! Sources: POSIX.1-2017 pax(1), "ustar Interchange Format"; GNU tar's manual, "Basic Tar Format". Where they leave a
//! choice, fields are read as Go's `archive/tar` reads them, because that is what container engines unpack layers
//! with.

use std::borrow::Cow;

/// Size of a tar block in bytes.
pub(crate) const BLOCK: usize = 512;

/// A block of a tar.
pub(super) type Block = [u8; BLOCK];

/// Why a header is not accepted.
pub(super) type Why = Cow<'static, str>;

const NAME: Field = Field(0, 100);
const MODE: Field = Field(100, 8);
const UID: Field = Field(108, 8);
const GID: Field = Field(116, 8);
const SIZE: Field = Field(124, 12);
const MTIME: Field = Field(136, 12);
const CHECKSUM: Field = Field(148, 8);
const TYPE: usize = 156;
const LINK: Field = Field(157, 100);
const MAGIC: Field = Field(257, 8); // with the version
const UNAME: Field = Field(265, 32);
const GNAME: Field = Field(297, 32);
const DEVMAJOR: Field = Field(329, 8);
const DEVMINOR: Field = Field(337, 8);
const PREFIX: Field = Field(345, 155);
const STAR_PREFIX: Field = Field(345, 131);
const STAR_TRAILER: Field = Field(508, 4);
const STAR_ATIME: Field = Field(476, 12);
const STAR_CTIME: Field = Field(488, 12);
const GNU_ATIME: Field = Field(345, 12);
const GNU_CTIME: Field = Field(357, 12);
/// Sparse map, its continuation flag and the real size.
const GNU_SPARSE: Field = Field(386, 109);

/// Largest number in eleven octal digits: 8 GiB - 1.
pub(super) const MAX_OCTAL_SIZE: u64 = 0o777_7777_7777;

/// Where a field is, and how long.
#[derive(Clone, Copy)]
struct Field(usize, usize);

/// Dialects, told apart by magic, version and trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Before POSIX: no names of owners, no devices, no prefix.
    V7,
    /// POSIX, with or without pax records.
    Ustar,
    /// Jörg Schilling's star: ustar with times at the prefix's end.
    Star,
    /// GNU tar's own: no prefix.
    Gnu,
}

/// A header block with a sound checksum.
#[derive(Clone)]
pub(crate) struct Header {
    block: Block,
    dialect: Dialect,
}

impl Header {
    /// # Errors
    ///
    /// If the checksum is not that of the block.
    pub(super) fn parse(block: Block) -> Result<Self, Why> {
        let header = Header { block, dialect: Dialect::V7 };
        let claimed = octal(header.field(CHECKSUM)).ok_or("its checksum is not a number")?;
        if ![sum(&block, i64::from), sum(&block, |byte| i64::from(byte as i8))].contains(&claimed) {
            return Err("its checksum is wrong".into());
        }
        let dialect = match header.field(MAGIC) {
            b"ustar  \0" => Dialect::Gnu,
            [b'u', b's', b't', b'a', b'r', 0, ..] if header.field(STAR_TRAILER) == b"tar\0" => Dialect::Star,
            [b'u', b's', b't', b'a', b'r', 0, ..] => Dialect::Ustar,
            _ => Dialect::V7,
        };
        Ok(Header { dialect, ..header })
    }

    /// The header of an entry that this crate makes: a regular file of root's without mode and time.
    pub(crate) fn file(name: &[u8], size: u64) -> Self {
        let mut header = Header { block: [0; BLOCK], dialect: Dialect::Ustar };
        header.put(NAME, name);
        for field in [MODE, UID, GID, DEVMAJOR, DEVMINOR] {
            header.put(field, b"0000000");
        }
        header.put(MTIME, b"00000000000");
        header.put(MAGIC, b"ustar\x0000");
        header.block[TYPE] = b'0';
        header.set_size(size);
        header
    }

    /// The header of `size` bytes of pax records for the entry behind it.
    pub(super) fn pax(size: u64) -> Self {
        let mut header = Header::file(b"././@PaxHeader", size);
        header.block[TYPE] = b'x';
        header.seal();
        header
    }

    pub(crate) fn block(&self) -> &Block {
        &self.block
    }

    /// Seconds of last access and last change, where the dialect has them.
    pub(super) fn other_times(&self) -> [Option<i64>; 2] {
        let fields = match self.dialect {
            Dialect::Gnu => [GNU_ATIME, GNU_CTIME],
            Dialect::Star => [STAR_ATIME, STAR_CTIME],
            Dialect::V7 | Dialect::Ustar => return [None; 2],
        };
        fields.map(|field| Some(self.field(field)).filter(|field| field[0] != 0).and_then(number))
    }

    pub(super) fn dialect(&self) -> Dialect {
        self.dialect
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.block[TYPE]
    }

    /// The name as far as this block has it.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(self.field(NAME));
        let prefix = match self.dialect {
            Dialect::V7 => b"",
            Dialect::Ustar => text(self.field(PREFIX)),
            Dialect::Star => text(self.field(STAR_PREFIX)),
            // Go before 1.8 wrote a prefix into GNU headers, over the times. They are nearly always 0 otherwise.
            Dialect::Gnu => {
                let is_time = |field: &[u8]| field[0] == 0 || number(field).is_some();
                let prefix = text(self.field(PREFIX));
                let buggy = !is_time(self.field(GNU_ATIME)) || !is_time(self.field(GNU_CTIME));
                if buggy && prefix.is_ascii() { prefix } else { b"" }
            }
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> &[u8] {
        text(self.field(LINK))
    }

    pub(super) fn mode(&self) -> Result<i64, Why> {
        self.number(MODE, "mode")
    }

    pub(super) fn uid(&self) -> Result<i64, Why> {
        self.number(UID, "uid")
    }

    pub(super) fn gid(&self) -> Result<i64, Why> {
        self.number(GID, "gid")
    }

    pub(super) fn size(&self) -> Result<i64, Why> {
        self.number(SIZE, "size")
    }

    pub(super) fn mtime(&self) -> Result<i64, Why> {
        self.number(MTIME, "modification time")
    }

    /// Name of the owner; empty if the dialect has none.
    pub(super) fn user(&self) -> &[u8] {
        if self.dialect == Dialect::V7 { b"" } else { text(self.field(UNAME)) }
    }

    /// Name of the group; empty if the dialect has none.
    pub(super) fn group(&self) -> &[u8] {
        if self.dialect == Dialect::V7 { b"" } else { text(self.field(GNAME)) }
    }

    /// Major and minor device number; 0 if the dialect has none.
    pub(super) fn device(&self) -> Result<(i64, i64), Why> {
        if self.dialect == Dialect::V7 {
            return Ok((0, 0));
        }
        Ok((self.number(DEVMAJOR, "major device number")?, self.number(DEVMINOR, "minor device number")?))
    }

    /// The four map entries, the flag and the real size of GNU tar's sparse header.
    pub(super) fn gnu_sparse(&self) -> &[u8] {
        self.field(GNU_SPARSE)
    }

    /// Changes the size. More than 8 GiB - 1 is written in base 256, as GNU tar writes it and every other tar reads it.
    pub(super) fn set_size(&mut self, size: u64) {
        if size > MAX_OCTAL_SIZE {
            let mut field = [0; 12];
            field[0] = 0x80;
            field[4..].copy_from_slice(&size.to_be_bytes());
            self.put(SIZE, &field);
        } else {
            self.put(SIZE, format!("{size:011o}\0").as_bytes());
        }
        self.seal();
    }

    /// Makes this the header of a regular file of `size` bytes without holes.
    pub(super) fn make_regular(&mut self, size: u64) {
        self.block[TYPE] = b'0';
        if self.dialect == Dialect::Gnu {
            self.put(GNU_SPARSE, b"");
        }
        self.set_size(size);
    }

    /// Replaces the name, cut to what fits.
    pub(super) fn set_name(&mut self, name: &[u8]) {
        self.put(NAME, &name[..name.len().min(NAME.1)]);
        match self.dialect {
            Dialect::Ustar => self.put(PREFIX, b""),
            Dialect::Star => self.put(STAR_PREFIX, b""),
            Dialect::V7 | Dialect::Gnu => {}
        }
        self.seal();
    }

    fn field(&self, Field(start, len): Field) -> &[u8] {
        &self.block[start..start + len]
    }

    /// Writes a field and fills its rest with NULs.
    fn put(&mut self, Field(start, len): Field, value: &[u8]) {
        let field = &mut self.block[start..start + len];
        field.fill(0);
        field[..value.len()].copy_from_slice(value);
    }

    fn seal(&mut self) {
        let sum = sum(&self.block, i64::from);
        self.put(CHECKSUM, format!("{sum:06o}\0 ").as_bytes());
    }

    fn number(&self, field: Field, what: &str) -> Result<i64, Why> {
        number(self.field(field)).ok_or_else(|| format!("its {what} is not a number").into())
    }
}

/// The sum of all bytes, the checksum's own counted as blanks. POSIX sums unsigned bytes; old writers signed ones.
fn sum(block: &Block, value: impl Fn(u8) -> i64) -> i64 {
    let Field(start, len) = CHECKSUM;
    let own = start..start + len;
    block.iter().enumerate().map(|(at, &byte)| if own.contains(&at) { 32 } else { value(byte) }).sum()
}

/// A text field: up to the first NUL, if there is one.
pub(super) fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    &field[..end]
}

/// A number field: octal digits, or, marked by the highest bit, two's complement in base 256.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // The sign is the bit below the mark; negative numbers are read as their complement.
    let inverted = if first & 0x40 == 0 { 0 } else { 0xff };
    let mut value = u64::from((first ^ inverted) & 0x7f);
    for &byte in rest {
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte ^ inverted);
    }
    let value = i64::try_from(value).ok()?;
    Some(if inverted == 0 { value } else { !value })
}

/// Octal digits between blanks and NULs; nothing at all is 0.
fn octal(field: &[u8]) -> Option<i64> {
    let is_filler = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !is_filler(byte)).unwrap_or(field.len());
    let end = field.iter().rposition(|byte| !is_filler(byte)).map_or(start, |last| last + 1);
    text(&field[start..end]).iter().try_fold(0_i64, |value, &byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644\0junk", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"77777777", Some(0o77777777)),
            (b"0000648\0", None),
            (b"-000001\0", None),
            (b"6 4\0\0\0\0\0", None),
            (b"\x80\0\0\0\0\0\x01\x02", Some(258)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\0", Some(-256)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x81\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"\xc0\0\0\0\0\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }

    #[test]
    fn own_headers_are_read_back() {
        for size in [0, 1, MAX_OCTAL_SIZE, MAX_OCTAL_SIZE + 1, i64::MAX as u64] {
            let header = Header::parse(*Header::file(b"a/b", size).block()).unwrap();
            assert_eq!(header.dialect(), Dialect::Ustar);
            assert_eq!((header.name(), header.size().unwrap()), (b"a/b".to_vec(), size as i64));
            assert_eq!((header.mode(), header.uid(), header.mtime()), (Ok(0), Ok(0), Ok(0)));
            assert_eq!((header.type_flag(), header.link(), header.user()), (b'0', &b""[..], &b""[..]));
        }
    }

    #[test]
    fn checksums_are_checked() {
        let good = *Header::file(b"name", 7).block();
        // Behind the NUL of the checksum's own field nothing is read.
        for at in (0..BLOCK).filter(|at| *at != 155) {
            let mut bad = good;
            bad[at] ^= 1;
            assert!(Header::parse(bad).is_err(), "byte {at}");
        }
        // A sum of signed bytes, as some old writers made it.
        let mut old = Header::file(b"caf\xe9", 7);
        let signed = sum(&old.block, |byte| i64::from(byte as i8));
        old.put(CHECKSUM, format!("{signed:06o}\0 ").as_bytes());
        assert_eq!(Header::parse(old.block).unwrap().name(), b"caf\xe9");
    }

    fn sealed(edit: impl FnOnce(&mut Header)) -> Header {
        let mut header = Header::file(b"name", 7);
        edit(&mut header);
        header.seal();
        Header::parse(header.block).unwrap()
    }

    #[test]
    fn dialects_and_their_names() {
        let long = sealed(|header| header.put(PREFIX, &[b'p'; 155]));
        assert_eq!(long.name(), [&[b'p'; 155][..], b"/name"].concat());
        let star = sealed(|header| {
            header.put(PREFIX, &[b'p'; 155]);
            header.put(STAR_TRAILER, b"tar\0");
        });
        assert_eq!(star.dialect(), Dialect::Star);
        assert_eq!(star.name(), [&[b'p'; 131][..], b"/name"].concat());
        let old = sealed(|header| {
            header.put(MAGIC, b"");
            header.put(PREFIX, b"prefix");
            header.put(UNAME, b"root");
        });
        assert_eq!((old.dialect(), old.name(), old.user()), (Dialect::V7, b"name".to_vec(), &b""[..]));
        let gnu = |prefix: &[u8]| {
            sealed(|header| {
                header.put(MAGIC, b"ustar  \0");
                header.put(PREFIX, prefix);
            })
        };
        assert_eq!(gnu(b"00000001234\0").name(), b"name");
        assert_eq!(gnu(b"written by an old Go").name(), b"written by an old Go/name");
        assert_eq!(gnu(b"not ASCII: \xff").name(), b"name");
        assert_eq!(gnu(b"").dialect(), Dialect::Gnu);
    }
}
