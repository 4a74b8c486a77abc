//! The detour for a layer whose order changes: its tar goes to the caller's spool, and comes back entry by entry.

use std::io::{self, BufReader, BufWriter, Read, Seek, Write};

use super::order::{Item, clean};
use super::tar::{self, Kind};
use super::{Error, is_own};

/// Bytes moved to or from the spool at a time.
const BUFFER: usize = 256 << 10;

/// A spooled tar.
pub(super) struct Spool<S> {
    store: BufReader<Store<S>>,
    position: u64,
    /// Where each item starts: with its first extension header.
    starts: Vec<u64>,
}

impl<S: Read + Write + Seek> Spool<S> {
    /// Reads the whole tar `input` and keeps it in `store`. Returns what is in it, without files that belong to the
    /// format, and the tar's size.
    pub(super) fn fill(input: impl Read, store: S) -> Result<(Self, Vec<Item>, u64), Error> {
        let mut tee = Tee { input, store: BufWriter::with_capacity(BUFFER, store) };
        let mut tar = tar::Reader::new(&mut tee);
        let (mut starts, mut items) = (Vec::new(), Vec::new());
        loop {
            tar.skip()?;
            let start = tar.position();
            let Some(entry) = tar.next()? else { break };
            let path = clean(&entry.name);
            if !is_own(&path) {
                starts.push(start);
                let target = (entry.kind == Kind::HardLink).then(|| clean(&entry.link));
                items.push(Item { path, target });
            }
        }
        let size = tar.position();
        let mut store = tee.store.into_inner().map_err(|error| Error::Spool(error.into_error()))?;
        store.rewind().map_err(Error::Spool)?;
        let store = BufReader::with_capacity(BUFFER, Store(store));
        Ok((Spool { store, position: 0, starts }, items, size))
    }

    /// A tar that starts with an item. Must not be read beyond it.
    pub(super) fn item(&mut self, number: u32) -> Result<tar::Reader<&mut Self>, Error> {
        let start = self.starts[number as usize];
        // Both are positions in a file: no overflow.
        self.store.seek_relative(start as i64 - self.position as i64).map_err(Error::Spool)?;
        self.position = start;
        Ok(tar::Reader::new(self))
    }
}

impl<S: Read> Read for Spool<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.store.read(buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

/// The caller's spool, its errors wrapped.
struct Store<S>(S);

impl<S: Read> Read for Store<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read.map_err(|error| io::Error::other(Error::Spool(error))),
            }
        }
    }
}

impl<S: Seek> Seek for Store<S> {
    fn seek(&mut self, position: io::SeekFrom) -> io::Result<u64> {
        self.0.seek(position)
    }
}

/// Hands on what it reads, and keeps it.
struct Tee<R, S: Write> {
    input: R,
    store: BufWriter<S>,
}

impl<R: Read, S: Write> Read for Tee<R, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.store.write_all(&buffer[..count]).map_err(|error| io::Error::other(Error::Spool(error)))?;
        Ok(count)
    }
}
