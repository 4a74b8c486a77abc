//! Where a layer's bytes come from: one or more remote blobs with the same content.
//!
//! Owns: the order in which a layer's sources are asked. May not: choose hosts (crate `registry` does) or know what
//! the bytes mean.

use std::{fmt, ops::Range, sync::Arc};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use registry::{ReadOptions, Served};
use tokio::time::Instant;

/// A remote object that is read by range. Implemented by [`registry::Blob`]; tests have their own.
#[async_trait]
pub trait Blob: fmt::Debug + Send + Sync + 'static {
    /// Exactly `range.end - range.start` bytes, or an error, within the options' deadline.
    async fn read(&self, range: Range<u64>, options: &ReadOptions) -> Result<Served, registry::Error>;

    /// Drops what was learnt of where the bytes are.
    fn forget_route(&self);
}

#[async_trait]
impl Blob for registry::Blob {
    async fn read(&self, range: Range<u64>, options: &ReadOptions) -> Result<Served, registry::Error> {
        registry::Blob::read(self, range, options).await
    }

    fn forget_route(&self) {
        registry::Blob::forget_route(self);
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

/// The sources of one layer, in the order in which they are asked. One that fails goes to the end. A new one starts
/// there: any image may name the layer, and must not make it worse for those that have it.
#[derive(Debug)]
pub struct Sources(ArcSwap<Vec<Source>>);

/// More sources than this add nothing but time to a read that fails.
const MAX_SOURCES: usize = 4;

impl Sources {
    /// With one source.
    pub fn new(source: Source) -> Sources {
        Sources(ArcSwap::from_pointee(vec![source]))
    }

    /// Adds a source, or replaces the one of its name. The one before the last makes room.
    pub fn add(&self, source: Source) {
        self.0.rcu(|old| {
            let mut new = Vec::clone(old);
            match new.iter_mut().find(|s| s.name == source.name) {
                Some(known) => *known = source.clone(),
                None => {
                    if new.len() == MAX_SOURCES {
                        new.remove(MAX_SOURCES - 2);
                    }
                    new.push(source.clone());
                }
            }
            new
        });
    }

    /// Asks a source last from now on, and by no route that it has learnt.
    pub fn demote(&self, name: &str) {
        self.0.rcu(|old| {
            let (demoted, mut new): (Vec<_>, Vec<_>) = old.iter().cloned().partition(|s| &*s.name == name);
            demoted.iter().for_each(|source| source.blob.forget_route());
            new.extend(demoted);
            new
        });
    }

    /// Reads a range from the first source that has it, and names that source. Each but the last may use half of the
    /// time that is left.
    pub async fn read(
        &self,
        range: Range<u64>,
        options: &ReadOptions,
    ) -> Result<(Served, Arc<str>), (registry::Error, Arc<str>)> {
        let sources = self.0.load_full();
        let (last, earlier) = sources.split_last().expect("a layer has at least one source");
        for source in earlier {
            let left = options.deadline.saturating_duration_since(Instant::now());
            let share = ReadOptions { deadline: Instant::now() + left / 2, ..options.clone() };
            match source.blob.read(range.clone(), &share).await {
                Ok(served) => return Ok((served, source.name.clone())),
                Err(error) => {
                    tracing::debug!(source = %source.name, ?range, %error, "source failed, trying the next");
                    self.demote(&source.name);
                }
            }
        }
        match last.blob.read(range, options).await {
            Ok(served) => Ok((served, last.name.clone())),
            Err(error) => Err((error, last.name.clone())),
        }
    }

    /// The registry of the source that is asked first.
    pub fn host(&self) -> Arc<str> {
        let name = self.name();
        name.split('/').next().unwrap_or_default().into()
    }

    /// The name of the source that is asked first.
    pub fn name(&self) -> Arc<str> {
        self.0.load()[0].name.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nothing;

    #[async_trait]
    impl Blob for Nothing {
        async fn read(&self, _: Range<u64>, _: &ReadOptions) -> Result<Served, registry::Error> {
            std::future::pending().await
        }
        fn forget_route(&self) {}
    }

    #[test]
    fn newcomers_and_failures_are_asked_last() {
        let source = |name: &str| Source { name: name.into(), blob: Arc::new(Nothing) };
        let sources = Sources::new(source("a"));
        let names = || sources.0.load().iter().map(|s| s.name.to_string()).collect::<String>();
        for name in ["b", "c", "d", "b"] {
            sources.add(source(name));
        }
        assert_eq!(names(), "abcd");
        sources.demote("a");
        assert_eq!(names(), "bcda");
        sources.add(source("e"));
        assert_eq!(names(), "bcae");
        sources.demote("unknown");
        assert_eq!(names(), "bcae");
    }
}
