//! Random layers, options and inputs.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn any_options() -> impl Strategy<Value = Options> {
    let chunk_size = prop_oneof![Just(4 << 20), 50_000_u64..200_000, 5000_u64..20_000];
    let min_chunk_size = prop_oneof![Just(0), 1000_u64..50_000, Just(1 << 26)];
    (chunk_size, min_chunk_size, 1_u8..=6).prop_map(|(chunk_size, min_chunk_size, level)| {
        let level = Level::new(level).unwrap();
        Options { chunk_size, min_chunk_size, level, ..Options::default() }
    })
}

/// Patterns for some of a layer's entries, and some that match nothing or much.
fn any_patterns(layer: &Layer, picks: &[Index], globs: u8) -> Vec<Pattern> {
    let mut patterns: Vec<_> = picks
        .iter()
        .filter(|_| !layer.entries().is_empty())
        .map(|pick| Pattern::path(&pick.get(layer.entries()).name))
        .collect();
    for (bit, glob) in ["**/n1*", "*", "nothing/*", "**/*[0-4]"].into_iter().enumerate() {
        if globs & 1 << bit != 0 {
            patterns.push(Pattern::glob(glob).unwrap());
        }
    }
    patterns
}

/// The same tar in any of the forms that are accepted.
fn any_input(tar: Vec<u8>, form: u8, split: Index) -> Vec<u8> {
    let (front, back) = tar.split_at(split.index(tar.len()));
    match form {
        0 => tar,
        1 => gzip(&tar),
        2 => [gzip(front), gzip(back)].concat(),
        3 => zstd(&tar),
        _ => [zstd(front), zstd(back)].concat(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_layers(
        seed: u64,
        entries in 0_usize..50,
        options in any_options(),
        picks in proptest::collection::vec(any::<Index>(), 0..5),
        globs in prop_oneof![Just(0), 0_u8..16],
        (form, split) in (0_u8..5, any::<Index>()),
    ) {
        let layer = random(seed, entries);
        let prioritized = any_patterns(&layer, &picks, globs);
        let tar_size = layer.tar().len() as u64;
        let input = any_input(layer.tar(), form, split);

        // The same bytes for any number of threads, and again from the result.
        let [one, two, eight] = [1, 2, 8].map(|threads: usize| {
            let threads = threads.try_into().unwrap();
            build(&input, &Options { threads, prioritized: prioritized.clone(), ..options.clone() }).unwrap()
        });
        prop_assert!(one == two && one == eight);
        let again = build(&one.blob, &Options { prioritized: prioritized.clone(), ..options.clone() }).unwrap();
        prop_assert!(again.blob == one.blob);
        prop_assert_eq!(&again.summary, &Summary { tar_size: one.summary.uncompressed_size, ..one.summary.clone() });

        one.check();
        let toc = one.toc();
        estargz::fuzzing::check(&toc);
        assert_same_tree(&toc, &layer);
        assert_same_contents(&toc, &one.blob, &layer);
        prop_assert_eq!(one.summary.tar_size, tar_size);
        prop_assert_eq!(one.summary.entries, layer.entries().len() as u64);
        prop_assert_eq!(one.summary.lossy_names, 0);
        let chunks = one.rows().iter().filter(|row| row.get("chunkDigest").is_some()).count();
        prop_assert_eq!(one.summary.chunks + 1, chunks as u64);
    }
}
