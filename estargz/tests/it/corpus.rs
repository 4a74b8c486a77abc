//! Every corpus file and mutations of it through its fuzz target, with a ceiling on memory.

use std::fs;
use std::path::Path;

use estargz::fuzzing::{TARGETS, Target};
use support::layer::Xorshift;

use crate::alloc;

/// Mutations of each corpus file; there are about a hundred files.
const MUTATIONS: u64 = 100;

#[test]
fn corpora_and_their_mutations() {
    for target in TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.0);
        let mut files: Vec<_> = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        assert!(files.len() >= 5, "{} is nearly empty", directory.display());
        let inputs: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();
        for (index, (file, input)) in files.iter().zip(&inputs).enumerate() {
            let name = file.file_name().unwrap().to_string_lossy();
            run(target, &name, input);
            for seed in 0..MUTATIONS {
                let mut random = Xorshift::new(seed << 32 | index as u64);
                let mutated = mutate(input, &inputs, &mut random);
                run(target, &format!("{name}, mutation {seed}"), &mutated);
            }
        }
    }
}

fn run((target, function, ceiling): Target, name: &str, input: &[u8]) {
    let run = || std::panic::catch_unwind(|| function(input));
    let (result, peak) = alloc::peak(run);
    if result.is_err() || peak > ceiling(input.len()) {
        let dump = std::env::temp_dir().join(format!("estargz-{target}"));
        fs::write(&dump, input).unwrap();
        let what = if result.is_err() { "panics".into() } else { format!("allocates {peak} bytes") };
        panic!("{target} {what} on {name}, {} bytes; see {}", input.len(), dump.display());
    }
}

/// One to six random edits; some take bytes from one of `others`.
fn mutate(input: &[u8], others: &[Vec<u8>], random: &mut Xorshift) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        let len = random.below(40) as usize;
        let end = (at + len).min(bytes.len());
        match random.below(9) {
            _ if bytes.is_empty() => bytes.push(random.below(256) as u8),
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => bytes[at..end].fill(*random.pick(&[0, 0xff, b'0', b'/', b'9', b'"'])),
            3 => {
                let text: &&[u8] = random.pick(&[
                    b"-1",
                    b"9223372036854775807",
                    b"99999999999999999999",
                    b"../",
                    b"\\u0000",
                    b"null",
                    b"{}",
                    b"0",
                    b"ffffffffffffffff",
                    b"\0\0\0\0",
                ]);
                bytes.splice(at..at, text.iter().copied());
            }
            4 => {
                let piece = bytes[at..end].to_vec();
                let to = random.below(bytes.len() as u64 + 1) as usize;
                bytes.splice(to..to, piece);
            }
            5 => {
                let other = random.pick(others);
                let from = random.below(other.len() as u64 + 1) as usize;
                bytes.splice(at..end, other[from..(from + len).min(other.len())].iter().copied());
            }
            _ => {
                let at = at.min(bytes.len() - 1);
                bytes[at] ^= 1 << random.below(8);
            }
        }
    }
    bytes
}
