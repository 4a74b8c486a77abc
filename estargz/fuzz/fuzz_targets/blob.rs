//! A whole blob: errors are fine, panics and oversize allocations are bugs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| estargz::fuzzing::blob(data));
