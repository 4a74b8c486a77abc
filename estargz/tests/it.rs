//! The crate from outside: against an independent encoder, against crafted blobs, and over the fuzz corpora.
//! One binary, because it measures memory with an allocator of its own.

#![allow(clippy::unwrap_used, reason = "all of this is test code, which may stop at the first surprise")]

#[path = "it/alloc.rs"]
mod alloc;
#[path = "it/corpus.rs"]
mod corpus;
#[path = "it/crafted.rs"]
mod crafted;
#[path = "it/roundtrip.rs"]
mod roundtrip;
#[path = "it/writer.rs"]
mod writer;

use estargz::{Digest, Error, Limits, Opener, Step, TocJson};

/// Opens a blob as a caller does, with a first read of `speculative` bytes.
fn open(blob: &[u8], speculative: u64, limits: &Limits) -> Result<TocJson, Error> {
    let mut opener = Opener::new(blob.len() as u64, *limits)?;
    let mut range = opener.tail(speculative);
    for _ in 0..2 {
        match opener.feed(range.start, &blob[range.start as usize..range.end as usize])? {
            Step::Need(next) => range = next,
            Step::Done(json) => return Ok(json),
        }
    }
    panic!("{range:?} needed after two feeds");
}

fn digest(text: &str) -> Digest {
    text.parse().unwrap()
}
