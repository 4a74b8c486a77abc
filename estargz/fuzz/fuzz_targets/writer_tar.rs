//! A layer to convert: errors are fine; panics, and blobs that do not open or differ the second time, are bugs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| estargz::fuzzing::writer_tar(data));
