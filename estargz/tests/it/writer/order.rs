//! Prioritized files.

use std::io;

use estargz::Landmark;
use estargz::writer::Missing;

use super::*;

fn layer() -> Layer {
    Layer::new()
        .dir("bin")
        .noise("bin/sh", 3000, 1)
        .dir("etc")
        .file("etc/passwd", "root")
        .hardlink("etc/link", "lib/target")
        .dir("lib")
        .file("lib/target", "t")
        .file("lib/a.so", "a")
        .file("lib/b.so", "b")
        .file("top", "x")
}

fn first(patterns: Vec<Pattern>) -> Options {
    Options { prioritized: patterns, ..options() }
}

#[test]
fn prioritized_files_come_first_with_what_they_need() {
    let patterns = vec![
        Pattern::path("/etc/link"),
        Pattern::glob("lib/*.so").unwrap(),
        Pattern::path("etc/link"),
        Pattern::path("missing"),
        Pattern::glob("no/*").unwrap(),
    ];
    let built = build(&layer().tar(), &first(patterns)).unwrap();
    let expected = [
        "etc/",
        "lib/",
        "lib/target",
        "etc/link",
        "lib/a.so",
        "lib/b.so",
        ".prefetch.landmark",
        "bin/",
        "bin/sh",
        "etc/passwd",
        "top",
    ];
    assert_eq!(built.names(), expected);
    let missing: Vec<_> = built.summary.prioritized_missing.iter().map(Pattern::to_string).collect();
    assert_eq!(missing, ["missing", "no/*"]);

    let toc = built.toc();
    assert_same_tree(&toc, &layer());
    assert_same_contents(&toc, &built.blob, &layer());
    let Landmark::Prefetch { end } = toc.landmark() else { panic!("{:?}", toc.landmark()) };
    for chunk in toc.chunks() {
        let early =
            ["lib/target", "lib/a.so", "lib/b.so"].iter().any(|name| toc.lookup(name) == Some(chunk.inode));
        assert_eq!(toc.members()[chunk.member as usize].end <= end, early);
    }
}

#[test]
fn the_rest_stays_in_order_and_the_landmark_first_without_matches() {
    let plain = build(&layer().tar(), &options()).unwrap();
    assert_eq!(plain.toc().landmark(), Landmark::NoPrefetch);
    assert_eq!(plain.names()[0], ".no.prefetch.landmark");
    let unmatched = build(&layer().tar(), &first(vec![Pattern::path("missing")])).unwrap();
    assert_eq!(unmatched.blob, plain.blob);
    assert_eq!(unmatched.summary.prioritized_missing.len(), 1);
    // What was prioritized before is not any more.
    let marked = build(&layer().tar(), &first(vec![Pattern::path("bin/sh")])).unwrap();
    assert_eq!(
        build(&marked.blob, &options()).unwrap().blob,
        plain.blob,
        "bin/ and bin/sh were first already"
    );
}

#[test]
fn missing_files_may_be_an_error() {
    let strict = |patterns| Options { missing_prioritized: Missing::Fail, ..first(patterns) };
    assert!(build(&layer().tar(), &strict(vec![Pattern::path("top")])).is_ok());
    let mut output = Vec::new();
    let options = strict(vec![Pattern::path("top"), Pattern::path("b"), Pattern::path("a")]);
    let error =
        convert(&layer().tar()[..], &mut output, &options, || Ok(Cursor::new(vec![])), &()).unwrap_err();
    assert!(matches!(&error, Error::Missing { patterns } if *patterns == ["b", "a"]), "{error}");
    assert!(output.is_empty());
}

#[test]
fn what_is_listed_twice_stays_in_order() {
    let layer =
        Layer::new().file("x", "1").file("a", "old").hardlink("link", "a").file("a", "new").file("y", "2");
    let built = build(&layer.tar(), &first(vec![Pattern::path("a")])).unwrap();
    assert_eq!(built.names(), ["a", "a", ".prefetch.landmark", "x", "link", "y"]);
    assert_same_contents(&built.toc(), &built.blob, &layer);
}

#[test]
fn without_prioritized_files_nothing_is_spooled() {
    let no_spool = || -> io::Result<Cursor<Vec<u8>>> { panic!("spooled") };
    convert(&layer().tar()[..], io::sink(), &options(), no_spool, &()).unwrap();
}

#[test]
fn extensions_move_with_their_entry() {
    let long = support::layer::long_path(300);
    let layer =
        Layer::new().file("a", "1").xattr("user.a", "1").file(&long, "2").mtime_nanos(1, 5).file("b", "3");
    let built = build(&layer.tar(), &first(vec![Pattern::path("b"), Pattern::path(&long)])).unwrap();
    assert_eq!(built.names(), ["b", &long, ".prefetch.landmark", "a"]);
    assert_same_tree(&built.toc(), &layer);
}
