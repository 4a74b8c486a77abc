//! Protocol definitions Lazurite speaks that no crate carries.
//!
//! The code is generated from the `.proto` files beside it and committed, so that a build needs no generator; a test
//! generates it again and compares. `BLESS=1 cargo test -p proto` writes it.

/// The daemon's control socket.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, rust_2018_idioms, reason = "generated")]
pub mod control {
    include!("generated/lazurite.v1.rs");
}

/// Kubernetes' Container Runtime Interface, as far as Lazurite reads it.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, rust_2018_idioms, reason = "generated")]
pub mod cri {
    include!("generated/runtime.v1.rs");

    /// Shows nothing: it is all secret.
    impl std::fmt::Debug for AuthConfig {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("AuthConfig(hidden)")
        }
    }
}
