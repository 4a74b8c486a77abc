//! Reading a tar: entries in order, each with the header blocks to write out for it.
//!
//! [`Reader`] takes ustar, pax, GNU and star headers as container engines take them, which read layers with Go's
//! `archive/tar`: where two readings are possible, it is that one, so that what is mounted lazily is what an eager
//! unpack gives. In particular
//!
//! - records of global pax headers mean nothing, and the headers are dropped, since no engine heeds them;
//! - extended attributes are `SCHILY.xattr.*` records;
//! - links, devices, directories and pipes have no contents, whatever their size field says.
//!
//! Everything else is refused rather than guessed: an archive must end in a zero block (unless its end is known by other
//! means), an extension must be followed by its entry, type flags must be known. Header blocks are handed on byte for
//! byte, so that what the table of contents cannot say (names that are not UTF-8, access times, foreign records) stays in
//! the tar. Only the headers of sparse files are made anew, as those of the same file without holes.
//!
//! | module | owns |
//! |---|---|
//! | `header` | one block: fields, numbers, checksum |
//! | `pax` | records |
//! | `entry` | what header and extensions together say of an entry |
//! | `sparse` | maps of sparse files |

mod entry;
mod header;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

use std::io::{self, Read};

pub(crate) use entry::Entry;
pub use entry::Kind;
pub(crate) use header::{BLOCK, Header};

use super::Error;
use super::error::show;
use entry::Extensions;
use header::{Block, text};
use pax::Records;
use sparse::{Piece, Sparse};

/// Largest extension (pax records, a long name) in bytes. Go reads no larger ones.
const MAX_EXTENSION: u64 = 1 << 20;

/// Bytes that end an archive: two zero blocks.
pub(super) const END: u64 = 2 * BLOCK as u64;

/// A tar as a stream of entries. Reads the input in any small pieces: it should be buffered.
pub(crate) struct Reader<R> {
    input: R,
    /// Bytes read so far.
    position: u64,
    /// Name of the last entry, for messages.
    name: Vec<u8>,
    content: Content,
    /// Whether it may end where an entry could begin, without zero blocks.
    may_just_end: bool,
    /// Zero bytes at the end, once that was reached.
    end: u64,
}

/// What is left of the current entry.
#[derive(Default)]
struct Content {
    /// Offset in the file of the next byte to hand out.
    at: u64,
    /// Pieces not wholly handed out, last first.
    pieces: Vec<Piece>,
    /// Bytes of them.
    stored: u64,
    /// Bytes that fill the last block.
    padding: u64,
}

impl<R: Read> Reader<R> {
    /// Reads `input` from where it stands, which must be the start of an entry.
    pub(crate) fn new(input: R) -> Self {
        Reader {
            input,
            position: 0,
            name: Vec::new(),
            content: Content::default(),
            may_just_end: false,
            end: 0,
        }
    }

    /// The same, but of a tar whose end is known otherwise, so that it need not have one of its own.
    pub(super) fn that_may_just_end(input: R) -> Self {
        Reader { may_just_end: true, ..Self::new(input) }
    }

    /// Zero bytes with which the archive ends, usually more than the two blocks that have to be; these at least.
    pub(super) fn end_size(&self) -> u64 {
        self.end.max(END)
    }

    /// Bytes read so far. Between entries, and before anything of the content is read, that is where headers end.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of the current entry's content as stored: fewer than its size if it has holes.
    pub(crate) fn stored(&self) -> u64 {
        self.content.stored
    }

    /// Moves behind the current entry, without regard to how much of it was read.
    pub(super) fn skip(&mut self) -> Result<(), Error> {
        let Content { stored, padding, .. } = std::mem::take(&mut self.content);
        let count = stored + padding;
        let skipped = io::copy(&mut (&mut self.input).take(count), &mut io::sink());
        self.advance(count, skipped)
    }

    /// The next entry; `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, Error> {
        self.skip()?;
        let mut extensions = Extensions::default();
        loop {
            let mut block = [0; BLOCK];
            let read = self.fill(&mut block)?;
            if read == 0 && self.may_just_end && extensions.blocks.is_empty() {
                return Ok(None);
            }
            if read < BLOCK as u64 {
                return Err(self.truncated());
            }
            if block == [0; BLOCK] {
                if !extensions.blocks.is_empty() {
                    return Err(self.bad("the archive ends behind an extension header, before its entry"));
                }
                return self.end().map(|()| None);
            }
            let header = Header::parse(block).map_err(|why| self.bad(why))?;
            match header.type_flag() {
                b'x' | b'g' => {
                    let body = self.extension(&header)?;
                    let records = Records::parse(&body).map_err(|why| Error::entry(&header.name(), why))?;
                    if header.type_flag() == b'x' {
                        extensions.push(&header, &body);
                        extensions.records = records;
                    }
                }
                b'L' => {
                    let body = self.extension(&header)?;
                    extensions.push(&header, &body);
                    extensions.name = text(&body).to_vec();
                }
                b'K' => {
                    let body = self.extension(&header)?;
                    extensions.push(&header, &body);
                    extensions.link = text(&body).to_vec();
                }
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
    }

    /// Appends the next `count` bytes of the current entry's content to `out`. There must be as many.
    pub(super) fn read(&mut self, mut count: u64, out: &mut Vec<u8>) -> Result<(), Error> {
        while count > 0 {
            let content = &mut self.content;
            let start = out.len();
            let len = match content.pieces.last_mut() {
                Some(piece) if piece.offset <= content.at => {
                    let len = count.min(piece.len);
                    piece.offset += len;
                    piece.len -= len;
                    if piece.len == 0 {
                        content.pieces.pop();
                    }
                    content.stored -= len;
                    out.resize(start + len as usize, 0);
                    self.exact(&mut out[start..])?;
                    len
                }
                // A hole, in front of a piece or at the end.
                next => {
                    let len = next.map_or(count, |piece| count.min(piece.offset - content.at));
                    out.resize(start + len as usize, 0);
                    len
                }
            };
            self.content.at += len;
            count -= len;
        }
        Ok(())
    }

    /// Reads an entry whose extensions are known, and prepares for its content.
    fn entry(&mut self, header: &Header, extensions: Extensions) -> Result<Entry, Error> {
        let mut entry = entry::understand(header, &extensions)?;
        self.name.clone_from(&entry.name);
        if entry.kind != Kind::Regular {
            return Ok(entry);
        }
        let bad = |why| Error::entry(&entry.name, why);
        let mut stored = entry.size;
        let padding = stored.next_multiple_of(BLOCK as u64) - stored;
        let sparse = Sparse::of(header, &extensions.records, stored as i64).map_err(bad)?;
        let Some(sparse) = sparse else {
            let pieces = if stored > 0 { vec![Piece { offset: 0, len: stored }] } else { Vec::new() };
            self.content = Content { at: 0, pieces, stored, padding };
            return Ok(entry);
        };

        let (numbers, size) = match sparse {
            Sparse::Records { numbers, size } => (numbers, size),
            Sparse::Old { mut numbers, mut more, size } => {
                while more {
                    more = sparse::old_block(&self.block()?, &mut numbers).map_err(bad)?;
                    if numbers.len() > sparse::MAX_MAP / 12 {
                        return Err(bad("its sparse map is larger than 1 MiB".into()));
                    }
                }
                (numbers, size)
            }
            Sparse::InData { size } => {
                let mut map = sparse::Text::default();
                let numbers = loop {
                    stored = stored
                        .checked_sub(BLOCK as u64)
                        .ok_or_else(|| bad("the sparse map in its data does not end".into()))?;
                    if let Some(numbers) = map.feed(&self.block()?).map_err(bad)? {
                        break numbers;
                    }
                };
                (numbers, size)
            }
        };
        let (mut pieces, size) = sparse::pieces(&numbers, size, stored).map_err(bad)?;
        pieces.reverse();
        self.content = Content { at: 0, pieces, stored, padding };
        entry.header = sparse::filled(header, &extensions.blocks, &extensions.records, &entry.name, size);
        entry.size = size;
        Ok(entry)
    }

    /// The data of an extension header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, Error> {
        let bad = |why| Error::entry(&header.name(), why);
        let size = header.size().map_err(bad)?;
        let size = u64::try_from(size).map_err(|_| bad("its size is negative".into()))?;
        if size > MAX_EXTENSION {
            let what = format!("bytes of the extension header {:?}", show(&header.name()));
            return Err(Error::Limit { what, value: size, limit: MAX_EXTENSION });
        }
        let mut body = vec![0; size as usize];
        self.exact(&mut body)?;
        let mut padding = [0; BLOCK];
        self.exact(&mut padding[..body.len().next_multiple_of(BLOCK) - body.len()])?;
        Ok(body)
    }

    /// The archive's end behind its first zero block: another one, or nothing. Whatever follows is read, because
    /// checksums of a compressed input come last, and dropped, as every tar program does.
    fn end(&mut self) -> Result<(), Error> {
        let mut block = [0; BLOCK];
        let second = self.fill(&mut block)?;
        if block != [0; BLOCK] {
            return Err(self.bad("a single zero block between entries"));
        }
        let mut zeros = Zeros { count: 0, ended: false };
        let rest = io::copy(&mut self.input, &mut zeros);
        self.position += rest.map_err(|error| self.fault(error))?;
        self.end = BLOCK as u64 + second + zeros.count;
        Ok(())
    }

    fn block(&mut self) -> Result<Block, Error> {
        let mut block = [0; BLOCK];
        self.exact(&mut block)?;
        Ok(block)
    }

    fn exact(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        let len = buffer.len() as u64;
        let read = self.fill(buffer);
        match read {
            Ok(count) if count < len => Err(self.truncated()),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Reads until `buffer` is full or the input ends.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<u64, Error> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fault(error)),
            }
        }
        self.position += filled as u64;
        Ok(filled as u64)
    }

    fn advance(&mut self, wanted: u64, read: io::Result<u64>) -> Result<(), Error> {
        let read = read.map_err(|error| self.fault(error))?;
        self.position += read;
        if read < wanted { Err(self.truncated()) } else { Ok(()) }
    }

    fn truncated(&self) -> Error {
        Error::Truncated { offset: self.position, entry: show(&self.name) }
    }

    /// A decoder says that its input ends early by the kind of its error; errors of the input itself are wrapped.
    fn fault(&self, error: io::Error) -> Error {
        if error.kind() == io::ErrorKind::UnexpectedEof { self.truncated() } else { Error::unwrap(error) }
    }

    fn bad(&self, why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        // The block was read.
        let offset = self.position.saturating_sub(BLOCK as u64);
        Error::BadTar { offset, entry: show(&self.name), why: why.into() }
    }
}

/// Counts the zero bytes at the beginning of what is written to it.
struct Zeros {
    count: u64,
    ended: bool,
}

impl io::Write for Zeros {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.ended {
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            self.count += zeros as u64;
            self.ended = zeros < bytes.len();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
