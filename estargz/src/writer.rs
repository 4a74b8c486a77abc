//! Building layers: a layer's tar in, an eStargz or zstd:chunked blob out, in one pass.
//!
//! [`convert`] reads a layer (gzip, zstd or plain tar), cuts it into *members* that are compressed on their own, and
//! ends it with the table of contents (TOC) that says what is where:
//!
//! ```text
//!          decompressed                                                         sha256 of all of it: DiffID
//!          | header   | 0x0f, padding,     | payload of the  | rest of the | ... | TOC as a tar, |         |
//!          | of the   | header, header,    | first file,     | payload,    |     | end of the    |         |
//!          | landmark | header of a file   | padding, header | padding ... |     | archive       |         |
//!          |          |                    |                 |             |     |               |         |
//! blob     | member   | member             | member          | member      | ... | TOC member    | footer  |
//!          0          ^ landmark           ^ chunk           ^ chunk             ^ TOC offset    51 bytes
//! ```
//!
//! The whole is a gzip file of a tar that holds what the input held, so whatever unpacks `tar.gz` layers unpacks it.
//!
//! zstd:chunked ([`Target::ZstdChunked`]) is the same with zstd frames as members, and keeps TOC and footer out of the tar.
//! In podman's dialect there are no landmarks either: decompressed, the blob is the input's tar, and its DiffID is the
//! same as before. There a chunk has a frame to itself, and a *tar-split* follows the TOC: everything of the tar but the
//! contents of files, from which podman puts the tar together again.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use estargz::writer::{Options, convert};
//! use estargz::{Limits, Opener, Step};
//!
//! # let tar = support::layer::Layer::new().file("etc/hostname", "box\n").tar();
//! let mut blob = Vec::new();
//! let summary = convert(
//!     &tar[..],
//!     &mut blob,
//!     &Options::default(),
//!     || Ok(std::io::Cursor::new(Vec::new())), // a spool; not needed, because no file is to come first
//!     &(),                                     // nobody watches
//! )?;
//!
//! // The manifest's annotation containerd.io/snapshot/stargz/toc.digest is what makes a layer lazy:
//! let limits = Limits::default();
//! let Step::Done(toc) = Opener::new(summary.blob_size, limits)?.feed(0, &blob)? else { panic!("it is all there") };
//! let toc = toc.verify(&summary.toc_digest, &limits)?;
//! assert!(toc.lookup("etc/hostname").is_some());
//! # Ok(()) }
//! ```
//!
//! # What is guaranteed
//!
//! - **One pass, bounded memory.** However large the layer, at most 128 MiB of it are in flight, with two threads and
//!   default options 32; beside that there are a few buffers, the window of zstd input (usually 8 MiB, at most 128), and
//!   the TOC with about 300 bytes for an entry. Only prioritized files force a second pass, over a spool that the caller
//!   provides: an earlier entry may have to wait for a later one.
//! - **Equal input and options give equal bytes**, whatever the number of threads and the machine. Converting the result
//!   again with the same options gives the same blob. (Another version of the compressor may give other bytes.)
//! - **The tar's headers pass through** byte for byte, in zstd:chunked also its end, and so do all entries, in their order, also those listed twice:
//!   the later one wins in the TOC as it does in an unpack, and a hard link between the two still finds its target.
//!   Left out are files of the format itself (an existing TOC and landmarks, which are made anew) and global pax
//!   headers, which no container engine heeds. Sparse files are stored whole.
//! - **Input never panics** and is never guessed at: see `tar` in this module for what is accepted.
//!
//! # What differs from the format's first writer
//!
//! Layers are accepted by the same readers, but are not the same bytes as those of containerd/stargz-snapshotter's
//! `estargz`: [`Options::min_chunk_size`] counts bytes before compression (after compression would not work in parallel),
//! times in the TOC keep their fraction, and more than 1 MiB of headers in a row get members of their own.
//!
//! # Stages
//!
//! | module | owns |
//! |---|---|
//! | `input` | sniffing, decompression |
//! | `tar` | headers, extensions, sparse files |
//! | `order`, `pattern`, `spool` | prioritized files |
//! | `cut` | what is compressed together, landmarks |
//! | `pipeline` | threads, order, memory |
//! | `pack` | gzip, zstd |
//! | `split` | the tar-split |
//! | `emit`, `toc` | the blob, its digests, its TOC |

mod cut;
mod emit;
mod error;
mod input;
mod order;
mod pack;
mod pattern;
mod pipeline;
mod split;
mod spool;
pub(crate) mod tar;
mod toc;

use std::io::{self, Read, Seek, Write};
use std::num::NonZero;

use crate::announce::{OLD_PREFIX, PREFIX, TOC_DIGEST, UNCOMPRESSED_SIZE};
use crate::{Digest, Limits, Position};
use cut::{Counts, Cutter};
use emit::{Blob, Emitter};
use input::Input;
use order::{Order, clean, order};
use pack::Packer;
use split::Split;
use spool::Spool;

pub use error::Error;
pub use pattern::Pattern;

const TOC_NAME: &[u8] = b"stargz.index.json";
const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";

/// Whether a path (cleaned) belongs to the format, so that it is not copied.
fn is_own(path: &[u8]) -> bool {
    path == TOC_NAME || path == PREFETCH_LANDMARK.as_bytes() || path == NO_PREFETCH_LANDMARK.as_bytes()
}

/// What is built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Target {
    /// eStargz, a `tar+gzip` layer.
    #[default]
    EStargz,
    /// zstd:chunked, a `tar+zstd` layer.
    ZstdChunked(Dialect),
}

/// Whose zstd:chunked: each reads only its own, because podman refuses a layer with the other's annotation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// That of containers/storage since 1.54: podman, buildah, skopeo, CRI-O.
    #[default]
    Podman,
    /// That of stargz-snapshotter.
    Stargz,
}

impl Target {
    /// Whether a landmark says what to prefetch.
    fn has_landmark(self) -> bool {
        self != Target::ZstdChunked(Dialect::Podman)
    }
}

/// How a layer is built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What is built. Default eStargz.
    pub target: Target,
    /// Most bytes of a file in one chunk: the least that is fetched and verified to read one of them. At least 1, at
    /// most [`Limits::chunk_bytes`]. Default 4 MiB.
    pub chunk_size: u64,
    /// Bytes, before compression, below which a member takes the next chunk too, so that small files share members:
    /// fewer and larger downloads, better compression. At most [`Limits::chunk_bytes`]. Default 0: every chunk has its
    /// own member. In zstd:chunked it always has.
    pub min_chunk_size: u64,
    /// How hard to compress.
    pub level: Level,
    /// Files to put first, in this order, each with its parents and, for a hard link, its target. They are what a
    /// reader fetches before it is asked for anything. If any are given, the input is spooled. Default none. Podman's
    /// dialect of zstd:chunked has no way to say it.
    pub prioritized: Vec<Pattern>,
    /// What to do if a prioritized file is not in the layer.
    pub missing_prioritized: Missing,
    /// Threads that compress, beside three with less to do. No influence on the output. Default: one for each core.
    pub threads: NonZero<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            target: Target::default(),
            chunk_size: 4 << 20,
            min_chunk_size: 0,
            level: Level::default(),
            prioritized: Vec::new(),
            missing_prioritized: Missing::default(),
            threads: std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN),
        }
    }
}

impl Options {
    /// Checks what depends on no layer.
    ///
    /// # Errors
    ///
    /// [`Error::BadOption`].
    pub fn check(&self) -> Result<(), Error> {
        let most = Limits::default().chunk_bytes;
        for (name, value, range) in
            [("chunk_size", self.chunk_size, 1..=most), ("min_chunk_size", self.min_chunk_size, 0..=most)]
        {
            if !range.contains(&value) {
                let why = format!("it must be from {} to {} bytes", range.start(), range.end());
                return Err(Error::BadOption { name, value: value.to_string(), why });
            }
        }
        let none = |name, value, why: &str| Err(Error::BadOption { name, value, why: why.to_owned() });
        match (self.target, &self.prioritized[..]) {
            (Target::ZstdChunked(_), _) if self.min_chunk_size > 0 => none(
                "min_chunk_size",
                self.min_chunk_size.to_string(),
                "zstd:chunked has a frame for every chunk",
            ),
            (target, [first, ..]) if !target.has_landmark() => none(
                "prioritized",
                first.to_string(),
                "podman's dialect of zstd:chunked cannot say which files come first; stargz's can",
            ),
            _ => Ok(()),
        }
    }
}

/// A compression level of libdeflate, or for zstd:chunked of zstd: 1 (fast) to 12 (small). `docs/design/0003-compression.md` has the measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(u8);

impl Level {
    /// # Errors
    ///
    /// [`Error::BadOption`] unless `level` is from 1 to 12.
    pub fn new(level: u8) -> Result<Self, Error> {
        if (1..=12).contains(&level) {
            return Ok(Level(level));
        }
        let why = "levels are from 1 (fast) to 12 (small)".to_owned();
        Err(Error::BadOption { name: "level", value: level.to_string(), why })
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

/// 6.
impl Default for Level {
    fn default() -> Self {
        Level(6)
    }
}

/// What to do if prioritized files are not in the layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Missing {
    /// Go on, and list them in [`Summary::prioritized_missing`].
    #[default]
    Ignore,
    /// Fail before anything is written.
    Fail,
}

/// Is told how far a conversion is, from several threads. All functions do nothing unless implemented.
pub trait Observer: Sync {
    /// So many more bytes of the input, as it is stored, were read.
    fn read(&self, bytes: u64) {
        let _ = bytes;
    }

    /// So many more bytes of the blob were written.
    fn written(&self, bytes: u64) {
        let _ = bytes;
    }

    /// An entry of the tar went in, with its content.
    fn entry(&self) {}
}

/// Does not look.
impl Observer for () {}

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// sha256 of the blob.
    pub blob_digest: Digest,
    /// Bytes of the blob.
    pub blob_size: u64,
    /// sha256 of the decompressed blob: the layer's entry in the image's `rootfs.diff_ids`.
    pub diff_id: Digest,
    /// sha256 by which the image names the TOC: of its JSON, in podman's dialect of zstd:chunked of the compressed JSON.
    pub toc_digest: Digest,
    /// Of zstd:chunked, where the TOC is.
    pub zstd: Option<ZstdChunked>,
    /// Bytes of the TOC's JSON.
    pub toc_json_size: u64,
    /// Bytes of the decompressed blob.
    pub uncompressed_size: u64,
    /// Bytes of the input, decompressed.
    pub tar_size: u64,
    /// Entries of the tar, without those that belong to the format.
    pub entries: u64,
    /// Chunks of their contents.
    pub chunks: u64,
    /// Entries with a name, link target or attribute name that the TOC cannot tell, since it is not UTF-8 or holds
    /// U+FFFD. If there are any, readers that care do not mount the layer lazily; the tar has the true names.
    pub lossy_names: u64,
    /// Of podman's dialect, entries of which it would find that table of contents and tar-split differ, upon which it refuses
    /// the layer as a whole: names that are not UTF-8 or occur twice, and headers with what their type does not have. If there
    /// are any, the layer has no annotations, and is an ordinary one.
    pub unlike: u64,
    /// Prioritized patterns that nothing in the layer matches.
    pub prioritized_missing: Vec<Pattern>,
}

/// What is said of a zstd:chunked layer besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZstdChunked {
    /// Where the TOC is.
    pub toc: Position,
    /// sha256 of the TOC as it is compressed.
    pub toc_stored_digest: Digest,
    /// Where the tar-split is and the sha256 of it compressed; only in podman's dialect.
    pub tar_split: Option<(Position, Digest)>,
}

impl Summary {
    /// The annotations of the layer's descriptor without which it is an ordinary layer to its readers; none if it must be one
    /// ([`Summary::unlike`]).
    pub fn annotations(&self) -> Vec<(String, String)> {
        if self.unlike > 0 {
            return Vec::new();
        }
        let (digest, size) = (self.toc_digest.to_string(), self.uncompressed_size.to_string());
        let mut annotations = Vec::new();
        let mut say = |key: &str, value: String| annotations.push((key.to_owned(), value));
        let Some(ZstdChunked { toc, toc_stored_digest, tar_split }) = self.zstd else {
            say(TOC_DIGEST, digest);
            say(UNCOMPRESSED_SIZE, size);
            return annotations;
        };
        let place = |Position { offset, stored, json }| format!("{offset}:{stored}:{json}");
        let prefix = match tar_split {
            Some((split, split_digest)) => {
                say(&format!("{PREFIX}tarsplit-position"), place(split));
                // What containers/storage 1.50 to 1.53 goes by; later it stands in the TOC.
                say(&format!("{PREFIX}tarsplit-checksum"), split_digest.to_string());
                PREFIX
            }
            None => {
                say(TOC_DIGEST, digest);
                say(UNCOMPRESSED_SIZE, size);
                OLD_PREFIX
            }
        };
        say(&format!("{prefix}manifest-checksum"), toc_stored_digest.to_string());
        say(&format!("{prefix}manifest-position"), format!("{}:1", place(toc)));
        annotations
    }
}

/// Builds a layer from `input` and writes it to `output`.
///
/// `input` is a tar, compressed with gzip, zstd or nothing, and is read to its end. `output` is flushed. Neither needs a
/// buffer. `spool` is called at most once, if [`Options::prioritized`] is not empty, for an empty store that takes the
/// decompressed layer and is dropped before this function returns.
///
/// To cancel, let `input` or `output` fail.
///
/// # Errors
///
/// See [`Error`]. What was written by then is not a layer; it has no footer.
pub fn convert<R: Read, W: Write + Send, S: Read + Write + Seek>(
    input: R,
    output: W,
    options: &Options,
    spool: impl FnOnce() -> io::Result<S>,
    observer: &dyn Observer,
) -> Result<Summary, Error> {
    options.check()?;
    let input = Input::new(input, observer)?;
    let emitter = Emitter::new(options.target, output, observer);
    let (cut, emitter, contents) = pipeline::run(options, emitter, |feed| {
        let cutter = Cutter::new(options, feed, observer)?;
        if options.prioritized.is_empty() {
            in_order(input, cutter, options.target)
        } else {
            reordered(input, cutter, options, spool)
        }
    })?;
    let Cut { tar_size, counts: Counts { entries, chunks, lossy_names, unlike }, split, prioritized_missing } =
        cut;
    let blob = emitter.finish(contents, &mut Packer::new(options), split)?;
    let Blob { digest: blob_digest, size: blob_size, diff_id, uncompressed_size, .. } = blob;
    let Blob { toc_digest, toc_json_size, zstd, .. } = blob;
    Ok(Summary {
        blob_digest,
        blob_size,
        diff_id,
        toc_digest,
        zstd,
        toc_json_size,
        uncompressed_size,
        tar_size,
        entries,
        chunks,
        lossy_names,
        unlike,
        prioritized_missing,
    })
}

/// What is known when the last member is cut.
struct Cut {
    tar_size: u64,
    counts: Counts,
    split: Option<Split>,
    prioritized_missing: Vec<Pattern>,
}

/// The input's own order, behind the landmark.
fn in_order<R: Read>(input: Input<'_, R>, mut cutter: Cutter<'_>, target: Target) -> Result<Cut, Error> {
    if target.has_landmark() {
        cutter.landmark(NO_PREFETCH_LANDMARK)?;
    }
    let mut tar = reader(input);
    while let Some(entry) = tar.next()? {
        if !is_own(&clean(&entry.name)) {
            cutter.entry(&entry, &mut tar)?;
        }
    }
    let (counts, split) = cutter.finish(tar.end_size())?;
    Ok(Cut { tar_size: tar.position(), counts, split, prioritized_missing: Vec::new() })
}

/// Reads the tar in an input. stargz-snapshotter's zstd:chunked has no end of the archive, but that of its frames.
fn reader<R: Read>(input: Input<'_, R>) -> tar::Reader<Input<'_, R>> {
    match input.is_zstd() {
        true => tar::Reader::that_may_just_end(input),
        false => tar::Reader::new(input),
    }
}

/// Prioritized files, the landmark, then the others.
fn reordered<R: Read, S: Read + Write + Seek>(
    input: Input<'_, R>,
    mut cutter: Cutter<'_>,
    options: &Options,
    spool: impl FnOnce() -> io::Result<S>,
) -> Result<Cut, Error> {
    let (mut spool, items, tar_size) = Spool::fill(input, spool().map_err(Error::Spool)?)?;
    let Order { first, rest, missing } = order(&items, &options.prioritized);
    if !missing.is_empty() && options.missing_prioritized == Missing::Fail {
        return Err(Error::Missing { patterns: missing.iter().map(Pattern::to_string).collect() });
    }
    drop(items);
    let mut copy = |cutter: &mut Cutter<'_>, items: Vec<u32>| {
        for item in items {
            let mut tar = spool.item(item)?;
            // It was there when the spool was filled.
            let lost = || Error::Spool(io::Error::other("the spool does not hold what was written to it"));
            let entry = tar.next()?.ok_or_else(lost)?;
            cutter.entry(&entry, &mut tar)?;
        }
        Ok(())
    };
    let landmark = if first.is_empty() { NO_PREFETCH_LANDMARK } else { PREFETCH_LANDMARK };
    copy(&mut cutter, first)?;
    cutter.landmark(landmark)?;
    copy(&mut cutter, rest)?;
    let (counts, split) = cutter.finish(tar::END)?;
    Ok(Cut { tar_size, counts, split, prioritized_missing: missing })
}
