//! eStargz, legacy stargz and zstd:chunked layers: footers, tables of contents, members, chunks, verification.
//!
//! An eStargz blob is a gzip file that is also a valid `tar.gz` layer. It is cut into *members* (complete gzip
//! streams), one for about every file payload, so that a file can be decompressed on its own. A *table of
//! contents* (TOC, JSON in a member of its own) says which member holds which *chunk* of which file, and a
//! fixed-size *footer* at the end of the blob says where the TOC starts:
//!
//! ```text
//! blob    | member | member | member | ... | TOC member | footer |
//!         0                                ^ toc_offset
//! member  = gzip( chunk of a file, tar padding, headers of the next files, perhaps more chunks )
//! chunk   = size bytes at inner_offset of the decompressed member, sha256 in the TOC
//! ```
//!
//! A zstd:chunked blob is the same in zstd, which is a valid `tar+zstd` layer: members are zstd frames, TOC and footer are in
//! frames that decoders skip, and so no part of the tar. There are two dialects, one written by stargz-snapshotter and one
//! by containers/storage (podman, buildah, skopeo); both are read. Where the TOC is, and which digest it has, is said by
//! the image's manifest too ([`announced`]).
//!
//! This crate turns bytes into verified values. It performs no I/O, starts no threads and reads no clock; the
//! caller brings the bytes. (Building layers, in [`writer`], is the exception: it takes any [`Read`](std::io::Read) and
//! [`Write`](std::io::Write), and compresses on threads of its own.) One layer takes three steps:
//!
//! 1. [`Opener`] is told the blob's size, says which ranges it needs, and yields a [`TocJson`].
//! 2. [`TocJson::verify`] compares the digest of the JSON with the trusted one and only then parses it, into a
//!    [`VerifiedToc`]: a normalised tree of [`Inode`]s, their [`Chunk`]s, and the [`Member`]s these live in.
//! 3. [`decode_member`] takes the bytes of one member and the chunks wanted from it, and returns
//!    [`VerifiedChunk`]s. [`DecodedMember`] does so for a member whose bytes are all there, faster, and reads the tar headers
//!    between its chunks, by which a TOC can be compared with the tar it claims to describe.
//!
//! # Invariants
//!
//! - A [`VerifiedToc`] exists only if the sha256 of the TOC matched (see [`TocJson::verify`]), and each of its chunks has a digest.
//!   A [`VerifiedChunk`] exists only if its bytes matched such a digest. Neither has another constructor.
//! - No input makes this crate panic. What is allocated for an input is bounded by [`Limits`], which are
//!   checked before the allocation; a size that the input merely claims is never believed.
//! - Equal TOC JSON gives an equal [`Toc`], inode numbers included, on every machine and in every run.
//!
//! [`writer`] makes such blobs: [`writer::convert`] turns any layer into eStargz in one streaming, parallel pass.
//!
//! The format is the one that containerd/stargz-snapshotter's `estargz` package writes and reads; where that
//! reader is lax about a TOC that no writer produces, this one returns [`Error`].

mod announce;
mod digest;
mod error;
#[cfg(test)]
mod fixture;
mod footer;
#[doc(hidden)]
pub mod fuzzing;
mod headers;
mod inflate;
mod limits;
mod member;
mod open;
mod split;
mod toc;
pub mod writer;

pub use announce::{Announced, announced, announced_digest, announced_tar_split};
pub use digest::Digest;
pub use error::Error;
pub use footer::{Format, Position};
pub use headers::{Content, TarEntry};
pub use inflate::Compression;
pub use limits::Limits;
pub use member::{ChunkSpec, DecodedMember, VerifiedChunk, decode_member};
pub use open::{Opener, Step};
pub use split::TarSplit;
pub use toc::{Chunk, Inode, Kind, Landmark, Member, Timestamp, Toc, TocJson, VerifiedToc};
pub use writer::tar::Kind as TarKind;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
