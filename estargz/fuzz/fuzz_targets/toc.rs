//! TOC JSON: errors are fine, panics and oversize allocations are bugs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| estargz::fuzzing::toc(data));
