//! Protocol definitions Lazurite speaks that no crate carries.
