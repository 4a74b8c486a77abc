//! /dev/fuse: the one connection through which the kernel reads every layer.
//!
//! Owns: mounting, negotiation, the threads that take requests, the translation of requests and replies, the panic
//! edge. May not: decide what a layer looks like ([`crate::fs`]) or where bytes come from ([`crate::reader`]).
//!
//! The connection may outlive the process ([`handover`]): it is stateless. An inode number names a slot and a node ([`crate::slots`]); there are no lookup
//! counts and no file handles: OPEN and OPENDIR are answered ENOSYS once and never asked again. Attributes and
//! entries, also negative ones, hold for ever, because layers never change.
//!
//! Where the root holds references ([`crate::refs`]) instead of slots, [`names`] answers for what is above the layers' trees.
//!
//! Invariants: no thread here waits for the network, a read that must is moved into a task with its reply; a panic in
//! a request answers EIO to that request and nothing else; no request is left unanswered.

mod adapter;
pub mod handover;
mod mount;
mod names;

pub use adapter::{Adapter, FuseCounters, OPS};
pub use handover::{Agreement, Keeper, Kept, NoKeeper};
pub use mount::{Connection, Lifetime, Shown, let_go, users};
