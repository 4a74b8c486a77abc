//! Where a layer's bytes come from: one or more remote blobs with the same content.
//!
//! Owns: the order in which a layer's sources are asked. May not: choose hosts (crate `registry` does) or know what
//! the bytes mean.

use std::{fmt, ops::Range, sync::Arc};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use registry::{ReadOptions, Served};

/// A remote object that is read by range. Implemented by [`registry::Blob`]; tests have their own.
#[async_trait]
pub trait Blob: fmt::Debug + Send + Sync + 'static {
    /// Exactly `range.end - range.start` bytes, or an error, within the options' deadline.
    async fn read(&self, range: Range<u64>, options: &ReadOptions) -> Result<Served, registry::Error>;
}

#[async_trait]
impl Blob for registry::Blob {
    async fn read(&self, range: Range<u64>, options: &ReadOptions) -> Result<Served, registry::Error> {
        registry::Blob::read(self, range, options).await
    }
}

/// One place a layer can be had from.
#[derive(Debug, Clone)]
pub struct Source {
    /// `host/repository@digest`, for people.
    pub name: Arc<str>,
    /// Its bytes.
    pub blob: Arc<dyn Blob>,
}

/// The sources of one layer, the latest first: the image pulled last is the one whose registry and credentials are
/// most likely to work.
#[derive(Debug)]
pub struct Sources(ArcSwap<Vec<Source>>);

/// More sources than this add nothing but time to a read that fails.
const MAX_SOURCES: usize = 4;

impl Sources {
    /// With one source.
    pub fn new(source: Source) -> Sources {
        Sources(ArcSwap::from_pointee(vec![source]))
    }

    /// Puts a source in front, replacing one of the same name.
    pub fn prefer(&self, source: Source) {
        self.0.rcu(|old| {
            let rest = old.iter().filter(|s| s.name != source.name).take(MAX_SOURCES - 1).cloned();
            std::iter::once(source.clone()).chain(rest).collect::<Vec<_>>()
        });
    }

    /// Reads a range from the first source that has it. The deadline covers all attempts; a source that fails before
    /// it leaves the rest of the time to the next.
    pub async fn read(&self, range: Range<u64>, options: &ReadOptions) -> Result<Served, registry::Error> {
        let sources = self.0.load_full();
        let (last, earlier) = sources.split_last().expect("a layer has at least one source");
        for source in earlier {
            match source.blob.read(range.clone(), options).await {
                Ok(served) => return Ok(served),
                Err(error) => {
                    tracing::debug!(source = %source.name, ?range, %error, "source failed, trying the next")
                }
            }
        }
        last.blob.read(range, options).await
    }

    /// The preferred source's name.
    pub fn name(&self) -> Arc<str> {
        self.0.load()[0].name.clone()
    }
}
