//! What a test's code logs.

use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;

/// Keeps what is written into any of its clones: `tracing_subscriber::fmt().with_writer(move || log.clone())`.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// What was written since the last call.
    ///
    /// # Panics
    /// If that is not UTF-8.
    pub fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock())).expect("a log in UTF-8")
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
