//! Between async transports and blocking code: bytes through bounded channels, in both directions.
//!
//! [`Inlet`] is what blocking code reads a blob from, [`Outlet`] what it writes one to; their other ends are
//! [`feed`] and a receiver. A few pieces are in flight, so that a slow side holds the fast one back and memory stays
//! bounded. When one side ends early, the other sees an error at its next step and ends too; nothing waits for ever.

use std::io::{self, Read, Write};

use anyhow::ensure;
use bytes::{Buf, Bytes, BytesMut};
use estargz::Digest;
use futures::TryStreamExt;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::transport::ByteStream;

/// Pieces in flight. With pieces of at most 1 MiB, 4 MiB in each direction.
const IN_FLIGHT: usize = 4;

/// Bytes that are written are gathered into pieces of this size.
const PIECE: usize = 1 << 20;

/// `None` ends the blob; a channel that closes without it means that the sender gave up.
type Piece = Option<Bytes>;

/// The sending end of an [`Inlet`].
#[derive(Debug)]
pub struct Feed(mpsc::Sender<Piece>);

/// A blob as blocking code reads it.
#[derive(Debug)]
pub struct Inlet {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    hash: Sha256,
    length: u64,
    ended: bool,
}

/// Makes an inlet and its sending end.
pub fn inlet() -> (Feed, Inlet) {
    let (sender, pieces) = mpsc::channel(IN_FLIGHT);
    let inlet = Inlet { pieces, current: Bytes::new(), hash: Sha256::new(), length: 0, ended: false };
    (Feed(sender), inlet)
}

/// Sends a blob into an inlet; `passed` is told how many bytes each piece has. Ends early, without an error, when the
/// inlet is gone: its owner knows why.
///
/// # Errors
///
/// The stream's.
pub async fn feed(Feed(sender): Feed, mut stream: ByteStream, passed: impl Fn(u64)) -> anyhow::Result<()> {
    loop {
        let piece = tokio::select! {
            piece = stream.try_next() => piece?,
            () = sender.closed() => return Ok(()),
        };
        let last = piece.is_none();
        if let Some(piece) = &piece {
            passed(piece.len() as u64);
        }
        if sender.send(piece).await.is_err() || last {
            return Ok(());
        }
    }
}

impl Inlet {
    /// Makes more bytes current; false at the end.
    fn advance(&mut self) -> io::Result<bool> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => {
                    self.hash.update(&piece);
                    self.length += piece.len() as u64;
                    self.current = piece;
                }
                Some(None) => self.ended = true,
                None => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the blob could not be read"));
                }
            }
        }
        Ok(!self.current.is_empty())
    }

    /// Reads what is left and checks that all that was read is the blob `digest` of `size` bytes.
    ///
    /// # Errors
    ///
    /// It is not.
    pub fn verify(mut self, digest: &Digest, size: u64) -> anyhow::Result<()> {
        while self.advance()? {
            self.current.clear();
        }
        let actual = Digest::from_bytes(self.hash.finalize().into());
        ensure!(
            actual == *digest && self.length == size,
            "the source sent {} bytes with digest {actual} instead of {size} bytes with {digest}",
            self.length
        );
        Ok(())
    }
}

impl Read for Inlet {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || !self.advance()? {
            return Ok(0);
        }
        let length = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// Where blocking code writes a blob to.
#[derive(Debug)]
pub struct Outlet {
    pieces: mpsc::Sender<Bytes>,
    gathered: BytesMut,
}

/// Makes an outlet and its receiving end, whose end is the end of the blob or that the writer gave up.
pub fn outlet() -> (Outlet, mpsc::Receiver<Bytes>) {
    let (sender, pieces) = mpsc::channel(IN_FLIGHT);
    (Outlet { pieces: sender, gathered: BytesMut::new() }, pieces)
}

impl Outlet {
    fn send(&mut self) -> io::Result<()> {
        let piece = self.gathered.split().freeze();
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the blob could not be written");
        self.pieces.blocking_send(piece).map_err(gone)
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE - self.gathered.len());
        self.gathered.reserve(PIECE - self.gathered.len());
        self.gathered.extend_from_slice(&bytes[..length]);
        if self.gathered.len() == PIECE {
            self.send()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() { Ok(()) } else { self.send() }
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, stream};
    use tokio::task::spawn_blocking;

    use super::*;

    fn pieces(sizes: &[usize]) -> (Vec<Bytes>, Vec<u8>) {
        let pieces: Vec<Bytes> =
            sizes.iter().enumerate().map(|(n, size)| Bytes::from(vec![n as u8; *size])).collect();
        let all = pieces.concat();
        (pieces, all)
    }

    fn source(pieces: Vec<Bytes>) -> ByteStream {
        stream::iter(pieces.into_iter().map(Ok)).boxed()
    }

    #[tokio::test]
    async fn bytes_pass_in_order_and_are_verified() {
        let (given, all) = pieces(&[0, 1, PIECE, 0, 3 * PIECE + 7, 5]);
        let (digest, size) = (Digest::of(&all), all.len() as u64);
        let (feeding, mut inlet) = inlet();
        let (mut outlet, mut received) = outlet();
        let copying = spawn_blocking(move || {
            // A part is read here, the rest by the check.
            io::copy(&mut inlet.by_ref().take(size - 100), &mut outlet).unwrap();
            outlet.flush().unwrap();
            inlet.verify(&digest, size)
        });
        let storing = async {
            let mut stored = Vec::new();
            while let Some(piece) = received.recv().await {
                stored.extend_from_slice(&piece);
            }
            stored
        };
        let (fed, copied, stored) = tokio::join!(feed(feeding, source(given), |_| {}), copying, storing);
        fed.unwrap();
        copied.unwrap().unwrap();
        assert_eq!(stored, all[..all.len() - 100]);
    }

    #[tokio::test]
    async fn other_bytes_are_told() {
        let (given, all) = pieces(&[10, 20]);
        for (digest, size) in [(Digest::of(b"x"), 30), (Digest::of(&all), 31)] {
            let (feeding, inlet) = inlet();
            let checking = spawn_blocking(move || inlet.verify(&digest, size));
            feed(feeding, source(given.clone()), |_| {}).await.unwrap();
            let error = checking.await.unwrap().unwrap_err().to_string();
            assert!(error.starts_with("the source sent 30 bytes with digest sha256:"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_side_that_ends_early_ends_the_other() {
        let broken = stream::iter([Ok(Bytes::from_static(b"half")), Err(anyhow::anyhow!("gone"))]).boxed();
        let (feeding, mut inlet1) = inlet();
        let reading = spawn_blocking(move || inlet1.read_to_end(&mut Vec::new()));
        assert_eq!(feed(feeding, broken, |_| {}).await.unwrap_err().to_string(), "gone");
        assert_eq!(reading.await.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);

        // Nobody reads: feeding ends although the source would never.
        let (feeding, inlet2) = inlet();
        drop(inlet2);
        feed(feeding, stream::pending().boxed(), |_| {}).await.unwrap();

        let (mut outlet, received) = outlet();
        drop(received);
        let writing = spawn_blocking(move || outlet.write_all(&vec![0; 2 * PIECE]));
        assert_eq!(writing.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
