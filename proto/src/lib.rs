//! Protocol definitions Lazurite speaks that no crate carries.
//!
//! The code is generated from the `.proto` files beside it and committed, so that a build needs no generator; a test
//! generates it again and compares. `BLESS=1 cargo test -p proto` writes it.

/// The daemon's control socket.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, rust_2018_idioms, reason = "generated")]
pub mod control {
    include!("generated/lazurite.v1.rs");
}
