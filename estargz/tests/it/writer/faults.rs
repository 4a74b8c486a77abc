//! Inputs that are cut off, and callers whose ends fail.

use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::sync::atomic::{AtomicU64, Ordering};

use estargz::writer::Observer;

use super::*;

fn layer() -> Layer {
    Layer::new()
        .dir("etc")
        .file("etc/passwd", "root:x:0:0")
        .xattr("user.a", "1")
        .noise("noise", 700, 1)
        .symlink("l", "x")
}

#[test]
fn every_truncation_is_an_error() {
    let tar = layer().tar();
    let prioritized = vec![Pattern::path("noise")];
    for options in [options(), Options { prioritized, ..options() }] {
        // A single zero block is enough of an end. (The tar's parser tries every length, here some will do.)
        for len in (0..=tar.len() - 1024).step_by(61) {
            let error = build(&tar[..len], &options).unwrap_err();
            assert!(
                matches!(error, Error::Truncated { offset, .. } if offset == len as u64),
                "{len}: {error}"
            );
        }
        for stored in [gzip(&tar), zstd(&tar), build(&tar, &options).unwrap().blob.to_vec()] {
            assert!(build(&stored, &options).is_ok());
            // A blob is a gzip file also without its footer, and without its TOC a tar without end.
            for len in (0..stored.len() - 52).step_by(7) {
                match build(&stored[..len], &options) {
                    Err(Error::Truncated { .. } | Error::BadTar { .. }) => {}
                    other => panic!("{len} of {}: {other:?}", stored.len()),
                }
            }
        }
    }
}

/// Works until `left` bytes have gone through, then fails.
struct Fails<T> {
    inner: T,
    left: u64,
}

impl<T> Fails<T> {
    fn spend(&mut self, len: usize) -> io::Result<usize> {
        if self.left == 0 {
            return Err(ErrorKind::StorageFull.into());
        }
        let len = self.left.min(len as u64);
        self.left -= len;
        Ok(len as usize)
    }
}

impl<T: Read> Read for Fails<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.spend(buffer.len())?;
        self.inner.read(&mut buffer[..len])
    }
}

impl<T: Write> Write for Fails<T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let len = self.spend(buffer.len())?;
        self.inner.write(&buffer[..len])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Seek> Seek for Fails<T> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.inner.seek(position)
    }
}

/// 30 MiB: more than fits into all buffers and queues.
fn large() -> Vec<u8> {
    let noise = support::layer::Xorshift::new(1).bytes(1 << 20);
    (0..30).fold(Layer::new(), |layer, n| layer.file(format!("{n}"), noise.clone())).tar()
}

fn is_full(error: &io::Error) -> bool {
    error.kind() == ErrorKind::StorageFull
}

#[test]
fn a_failing_output_ends_everything() {
    let tar = large();
    for left in [0, 1 << 20, 30 << 20] {
        for threads in [1, 4] {
            let options = Options { threads: threads.try_into().unwrap(), ..options() };
            let output = Fails { inner: io::sink(), left };
            let error = convert(&tar[..], output, &options, || Ok(Cursor::new(vec![])), &()).unwrap_err();
            assert!(matches!(&error, Error::Write(inner) if is_full(inner)), "{error}");
        }
    }
}

#[test]
fn a_failing_input_ends_everything() {
    let tar = large();
    for input in [&tar[..], &gzip(&tar), &zstd(&tar)] {
        for left in [0, 3, 20 << 20] {
            let input = Fails { inner: input, left };
            let error = convert(input, io::sink(), &options(), || Ok(Cursor::new(vec![])), &()).unwrap_err();
            assert!(matches!(&error, Error::Read(inner) if is_full(inner)), "{error}");
        }
    }
}

#[test]
fn a_failing_spool_ends_everything() {
    let tar = large();
    let options = Options { prioritized: vec![Pattern::path("7")], ..options() };
    let full = || Err::<Cursor<Vec<u8>>, _>(ErrorKind::StorageFull.into());
    let error = convert(&tar[..], io::sink(), &options, full, &()).unwrap_err();
    assert!(matches!(&error, Error::Spool(inner) if is_full(inner)), "{error}");
    // While it is filled, and while it is read back.
    for left in [0, 1 << 20, tar.len() as u64, tar.len() as u64 + (5 << 20)] {
        let spool = || Ok(Fails { inner: Cursor::new(Vec::new()), left });
        let error = convert(&tar[..], io::sink(), &options, spool, &()).unwrap_err();
        assert!(matches!(&error, Error::Spool(inner) if is_full(inner)), "{left}: {error}");
    }
}

#[derive(Default)]
struct Counter {
    read: AtomicU64,
    written: AtomicU64,
    entries: AtomicU64,
}

impl Observer for Counter {
    fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    fn written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    fn entry(&self) {
        self.entries.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_observer_is_told_everything() {
    for prioritized in [vec![], vec![Pattern::path("noise")]] {
        let (input, counter) = (gzip(&layer().tar()), Counter::default());
        let options = Options { prioritized, ..options() };
        let summary =
            convert(&input[..], io::sink(), &options, || Ok(Cursor::new(vec![])), &counter).unwrap();
        assert_eq!(counter.read.into_inner(), input.len() as u64);
        assert_eq!(counter.written.into_inner(), summary.blob_size);
        assert_eq!((counter.entries.into_inner(), summary.entries), (4, 4));
    }
}
