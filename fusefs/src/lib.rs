//! Lazurite's data plane: what a mounted layer looks like and where its bytes come from.
//!
//! A layer is immutable, so everything served is a pure function of (layer, offset). One FUSE connection shows every
//! attached layer as a directory (a *slot*) of one mount; reads are answered from the local store or fetched by range
//! from the registry, verified, stored and never fetched again.
//!
//! | module | owns |
//! |---|---|
//! | [`audit`] | whether the TOC tells the truth about the tar |
//! | [`graduate`] | a complete layer becoming a plain directory |
//! | [`cache`] | how much is kept, and what goes first |
//! | [`index`] | a layer's tree in one mapped file |
//! | [`store`] | contents of files, and which chunks are there |
//! | [`fetch`] | what is downloaded when, and once |
//! | [`reader`] | bytes of a file |
//! | [`fs`] | POSIX semantics, no FUSE types |
//! | [`fuse`] | /dev/fuse |
//! | [`slots`], [`view`] | what each directory shows |
//! | [`resolve`] | opening a layer from disk or from its blob's tail |
//! | [`refs`] | references as directories, for podman and CRI-O |
//! | [`manifest`] | sizes and TOC digests of an image's layers |
//! | [`plane`] | all of it together |

pub mod audit;
pub mod blob;
pub mod cache;
pub mod fetch;
pub mod fs;
pub mod fuse;
pub mod graduate;
pub mod index;
pub mod layer;
pub mod manifest;
pub mod plane;
pub mod reader;
pub mod refs;
pub mod resolve;
pub mod slots;
pub mod store;
#[cfg(test)]
mod testing;
pub mod view;

pub use cache::CacheConfig;
pub use fs::OpaqueXattr;
pub use fuse::{Agreement, Keeper, Kept, NoKeeper, let_go};
pub use layer::{Audits, Layer};
pub use plane::{
    AttachRequest, Attached, Below, Evicted, Fill, Graduation, LayerUsage, Plane, PlaneConfig, Stay,
};
pub use refs::Refs;
pub use resolve::AttachError;
