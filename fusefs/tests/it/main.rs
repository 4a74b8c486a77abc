//! The data plane on a real mount, fed by a scriptable registry.
//!
//! The process serves the mount it looks at. That is safe here because requests are answered by threads of their own
//! and every look runs under a deadline; the daemon never does it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bed;
mod cost;
mod faults;
mod graduate;
mod hostile;
mod refs;
mod restart;
mod tree;
