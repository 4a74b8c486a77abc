//! The crate from outside: calls, randomised against a model, and over gRPC with real mounts.

#![allow(clippy::unwrap_used, reason = "all of this is test; the lint exempts only the functions marked so")]

#[path = "it/calls.rs"]
mod calls;
#[path = "it/fake.rs"]
mod fake;
#[path = "it/grpc.rs"]
mod grpc;
#[path = "it/model.rs"]
mod model;
#[path = "it/mounts.rs"]
mod mounts;
#[path = "it/node.rs"]
mod node;
#[path = "it/service.rs"]
mod service;
#[path = "it/suite.rs"]
mod suite;
#[path = "it/tree.rs"]
mod tree;
