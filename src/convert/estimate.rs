//! What a conversion would do, and how long it would take: `--dry-run`.
//!
//! Layers are decided on as for a real run; nothing is written. Sizes and times of what would be converted are rules
//! of thumb from measured layers, and say so.

use std::fmt;

use async_trait::async_trait;
use estargz::writer::Target;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::earlier::Shape;
use super::layer::{Fate, Work};
use super::plan::{Plan, Task};
use super::report::{Outcome, name, outcome};
use crate::image::{Descriptor, short};
use crate::progress::size;
use crate::transport::{BlobWriter, Destination, Location, Raw, Source};

/// What a conversion would do.
#[derive(Debug, Serialize)]
pub struct Estimate {
    /// What layers would be converted to.
    pub format: &'static str,
    /// Each distinct layer.
    pub layers: Vec<Layer>,
    /// Bytes that would be read of layers.
    pub bytes_read: u64,
    /// Bytes that would be stored of layers, about.
    pub bytes_stored: u64,
    /// Seconds of computing, about; the time that transfers take comes on top if it is longer.
    pub seconds: f64,
}

/// What would become of a layer.
#[derive(Debug, Serialize)]
pub struct Layer {
    /// Digest of its blob.
    pub digest: String,
    /// Size of its blob in bytes.
    pub size: u64,
    /// What would become of it.
    pub outcome: Outcome,
    /// Why, where that is not plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Size of the new blob in bytes, about.
    pub new_size: u64,
}

impl Estimate {
    /// Looks at each layer.
    ///
    /// # Errors
    ///
    /// The source or the destination cannot be asked.
    pub async fn of(plan: &Plan, work: &Work<'_>, jobs: usize) -> anyhow::Result<Self> {
        let fates: Vec<Fate> =
            stream::iter(plan.tasks.iter().map(|task| work.fate(task))).buffered(jobs).try_collect().await?;
        let target = work.settings.shape.target;
        let mut estimate =
            Self { format: name(target), layers: Vec::new(), bytes_read: 0, bytes_stored: 0, seconds: 0.0 };
        for (task, fate) in plan.tasks.iter().zip(&fates) {
            let present = matches!(fate, Fate::Earlier(_) | Fate::Leave(_))
                || (*fate != Fate::Convert && work.destination.has(&task.layer).await?);
            estimate.add(task, fate, present, &work.settings.shape, work.settings.threads.get());
        }
        Ok(estimate)
    }
}

impl Estimate {
    fn add(&mut self, task: &Task, fate: &Fate, present: bool, shape: &Shape, threads: usize) {
        let before = task.layer.size;
        let (new_size, seconds) = match fate {
            Fate::Convert => converted(&task.layer, shape, threads),
            Fate::Earlier(change) => (change.size, 0.0),
            Fate::Reuse { .. } | Fate::Copy(_) | Fate::Leave(_) => (before, 0.0),
        };
        if !present {
            self.bytes_read += before;
            self.bytes_stored += new_size;
        }
        self.seconds += seconds;
        let (outcome, reason) = outcome(fate);
        let digest = task.layer.digest.clone();
        self.layers.push(Layer { digest, size: before, outcome, reason, new_size });
    }
}

/// How many times its compressed size a layer of programs and libraries has: Debian with Python.
const RATIO: f64 = 2.5;

/// What gzip needs in place of zstd's default level.
const ZSTD_TO_GZIP: f64 = 1.12;

/// What the table of contents and compressing each file apart add.
const OVERHEAD: f64 = 1.04;

/// Bytes a second that one thread reads of a tar, compressed or not, and hashes.
const READ_RATE: f64 = 250e6;

/// The size in bytes and the seconds of a converted layer, about.
fn converted(layer: &Descriptor, shape: &Shape, threads: usize) -> (u64, f64) {
    // No blob is so large that this loses anything that matters.
    let size = layer.size as f64;
    let gzip = match layer.media_type.as_str() {
        kind if kind.ends_with("zstd") => size * ZSTD_TO_GZIP,
        kind if kind.ends_with("gzip") => size,
        _ => size / RATIO,
    };
    let tar = gzip * RATIO;
    let compressing = tar / (compression_rate(shape.level) * threads as f64);
    let new = match shape.target {
        Target::EStargz => gzip,
        Target::ZstdChunked(_) => gzip / ZSTD_TO_GZIP,
    };
    ((new * OVERHEAD) as u64, compressing.max(tar / READ_RATE))
}

/// Bytes a second that one thread compresses: Debian with Python, on a virtual machine of two common cores.
fn compression_rate(level: u8) -> f64 {
    match level {
        0..=2 => 110e6,
        3..=4 => 75e6,
        5..=6 => 55e6,
        7 => 40e6,
        8..=9 => 23e6,
        10 => 7e6,
        _ => 3.5e6,
    }
}

impl fmt::Display for Estimate {
    /// A line for each layer, then the sums.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in &self.layers {
            let what = match layer.outcome {
                Outcome::Converted => format!("to convert, about {}", size(layer.new_size)),
                Outcome::AlreadyConverted => "converted before".to_owned(),
                Outcome::Reused => format!("{} already", self.format),
                Outcome::Kept => format!("stays ({})", layer.reason.unwrap_or("as it is")),
            };
            writeln!(f, "{}  {:>10}  {what}", short(&layer.digest), size(layer.size))?;
        }
        write!(
            f,
            "{} to read, about {} to store; about {:.0} s of computing, transfers on top if they are slower",
            size(self.bytes_read),
            size(self.bytes_stored),
            self.seconds.ceil()
        )
    }
}

/// A destination of which is only asked what it has.
pub struct Nowhere {
    there: Option<Box<dyn Source>>,
}

impl Nowhere {
    /// The real destination as far as it can be read.
    pub fn new(there: Option<Box<dyn Source>>) -> Self {
        Self { there }
    }
}

#[async_trait]
impl Destination for Nowhere {
    async fn has(&self, descriptor: &Descriptor) -> anyhow::Result<bool> {
        match &self.there {
            Some(there) => Ok(there.range(descriptor, 0..descriptor.size.min(1)).await.is_ok()),
            None => Ok(false),
        }
    }

    async fn adopt(&self, _: &Descriptor, _: &Location) -> anyhow::Result<bool> {
        Ok(false)
    }

    async fn create(&self) -> anyhow::Result<Box<dyn BlobWriter>> {
        anyhow::bail!("a dry run writes nothing")
    }

    async fn put(&self, _: &Raw) -> anyhow::Result<()> {
        anyhow::bail!("a dry run writes nothing")
    }

    async fn publish(&self, _: &Raw) -> anyhow::Result<()> {
        anyhow::bail!("a dry run writes nothing")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::media::LayerKind;
    use crate::convert::rewrite::Change;

    fn shape(level: u8) -> Shape {
        Shape { target: Target::EStargz, chunk_size: 4 << 20, min_chunk_size: 0, level }
    }

    fn task(n: u32, media_type: &str) -> Task {
        let layer = Descriptor {
            media_type: media_type.to_owned(),
            digest: format!("sha256:{}", n.to_string().repeat(64)),
            size: 10 << 20,
            annotations: Default::default(),
            platform: None,
        };
        Task { layer, first: Vec::new(), kind: LayerKind::Tar }
    }

    #[test]
    fn only_what_is_not_there_is_read_and_stored() {
        let change = Change {
            digest: "d".to_owned(),
            size: 5 << 20,
            diff_id: None,
            zstd: false,
            annotations: Default::default(),
        };
        let shape = shape(6);
        let mut estimate =
            Estimate { format: "eStargz", layers: Vec::new(), bytes_read: 0, bytes_stored: 0, seconds: 0.0 };
        estimate.add(&task(1, "a+gzip"), &Fate::Convert, false, &shape, 2);
        estimate.add(&task(2, "a+gzip"), &Fate::Earlier(change), true, &shape, 2);
        estimate.add(&task(3, "a+gzip"), &Fate::Copy("why"), false, &shape, 2);
        estimate.add(&task(4, "a+gzip"), &Fate::Leave("why not"), true, &shape, 2);
        assert_eq!(estimate.bytes_read, 20 << 20);
        assert_eq!(estimate.bytes_stored, estimate.layers[0].new_size + (10 << 20));
        let text = estimate.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("111111111111   10.00 MiB  to convert, about 10."), "{text}");
        assert_eq!(lines[3], "444444444444   10.00 MiB  stays (why not)");
        assert!(lines[4].starts_with("20.00 MiB to read"), "{text}");
    }

    #[test]
    fn more_threads_and_lower_levels_take_less_time() {
        let seconds = |level, threads| converted(&task(1, "a+gzip").layer, &shape(level), threads).1;
        assert!(seconds(6, 1) > seconds(6, 2));
        assert!(seconds(9, 1) > seconds(6, 1) && seconds(6, 1) > seconds(1, 1));
        assert_eq!(seconds(1, 100), seconds(1, 1000), "reading is the limit");
    }
}
