//! A tar-split: errors are fine, panics and oversize allocations are bugs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| estargz::fuzzing::tar_split(data));
