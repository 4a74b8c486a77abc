//! A whole member and the tar headers in it: errors are fine, panics and oversize allocations are bugs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| estargz::fuzzing::whole(data));
