//! The rules of `tree` and `payload`, as tables over hand-made JSON.

use crate::{Digest, Error, Format, Inode, Kind, Landmark, Limits, Member, Timestamp, Toc, TocJson};

/// The TOC's offset in all of these blobs.
const END: u64 = 10_000;

fn json(entries: &str) -> TocJson {
    let json = format!(r#"{{"version":1,"entries":[{entries}]}}"#);
    TocJson::new(Format::EStargz, END, json.into_bytes())
}

fn limited(entries: &str, limits: &Limits) -> Result<Toc, Error> {
    json(entries).parse(limits)
}

fn parse(entries: &str) -> Toc {
    limited(entries, &Limits::default()).unwrap_or_else(|error| panic!("{error}\n{entries}"))
}

fn fails(entries: &str) -> Error {
    match limited(entries, &Limits::default()) {
        Ok(toc) => panic!("{toc:#?}\n{entries}"),
        Err(error) => error,
    }
}

/// Asserts that parsing fails because of the entry `name`, with a message that holds `part`.
#[track_caller]
fn bad_entry(entries: &str, name: &str, part: &str) {
    match fails(entries) {
        Error::BadEntry { name: n, why } => {
            assert!(n == name && why.contains(part), "{n:?}: {why}\n{entries}")
        }
        other => panic!("{other}\n{entries}"),
    }
}

/// The tree as text: one path, kind, link count per line, in the order of numbering; later names of an inode
/// as `path = number`.
fn outline(toc: &Toc) -> Vec<String> {
    let mut seen = vec![false; toc.inodes().len()];
    seen[0] = true;
    let mut lines = vec![format!("/ {:?} {}", toc.inodes()[0].kind, toc.inodes()[0].nlink)];
    fn walk(toc: &Toc, directory: u32, path: &str, seen: &mut [bool], lines: &mut Vec<String>) {
        for (name, number) in &toc.inodes()[directory as usize].children {
            let path = format!("{path}/{}", str::from_utf8(name).unwrap());
            let inode = &toc.inodes()[*number as usize];
            if std::mem::replace(&mut seen[*number as usize], true) {
                lines.push(format!("{path} = {number}"));
                continue;
            }
            assert_eq!(seen.iter().position(|seen| !seen).unwrap_or(seen.len()), *number as usize + 1);
            lines.push(format!("{path} {:?} {}", inode.kind, inode.nlink));
            walk(toc, *number, &path, seen, lines);
        }
    }
    walk(toc, 0, "", &mut seen, &mut lines);
    assert!(seen.iter().all(|seen| *seen));
    lines
}

fn inode<'a>(toc: &'a Toc, path: &str) -> &'a Inode {
    &toc.inodes()[toc.lookup(path).unwrap_or_else(|| panic!("{path}: {:?}", outline(toc))) as usize]
}

/// A one-byte file at `offset`.
fn file(name: &str, offset: u64) -> String {
    format!(r#"{{"name":{name:?},"type":"reg","size":1,"offset":{offset}}}"#)
}

#[test]
fn an_empty_layer_is_a_root_directory() {
    let toc = parse("");
    assert_eq!(outline(&toc), ["/ Directory 2"]);
    let root = &toc.inodes()[0];
    assert_eq!((root.mode, root.uid, root.gid, root.mtime), (0o755, 0, 0, Timestamp::default()));
    assert_eq!((toc.chunks(), toc.members(), toc.landmark()), (&[][..], &[][..], Landmark::Absent));
    assert_eq!((toc.format(), toc.toc_offset(), toc.lossy_names()), (Format::EStargz, END, false));
}

#[test]
fn all_types_with_their_attributes() {
    let toc = parse(
        r#"{"name":"d/","type":"dir","mode":17389,"uid":1,"gid":2,"userName":"u","groupName":"g","size":4096,
            "modtime":"2006-01-02T15:04:05.5Z","xattrs":{"user.b":"AP8=","user.a":""}},
        {"name":"d/reg","type":"reg","mode":33279,"size":5,"offset":100,"digest":"sha256:DIGEST"},
        {"name":"d/empty","type":"reg"},
        {"name":"d/sym","type":"symlink","linkName":"../../x//y/","mode":511},
        {"name":"d/chr","type":"char","devMajor":5,"devMinor":1048575,"uid":4294967295},
        {"name":"d/blk","type":"block","devMajor":8},
        {"name":"d/fifo","type":"fifo","devMajor":8},
        {"name":"d/hard","type":"hardlink","linkName":"d/reg","mode":0,"uid":9}"#
            .replace("DIGEST", &Digest::of(b"12345").hex())
            .as_str(),
    );
    assert_eq!(
        outline(&toc),
        [
            "/ Directory 3",
            "/d Directory 2",
            "/d/blk BlockDevice 1",
            "/d/chr CharDevice 1",
            "/d/empty Regular 1",
            "/d/fifo Fifo 1",
            "/d/hard Regular 2",
            "/d/reg = 6",
            "/d/sym Symlink 1",
        ]
    );
    let d = inode(&toc, "d");
    assert_eq!((d.mode, d.uid, d.gid, d.size), (0o1755, 1, 2, 0));
    assert_eq!((&*d.user_name, &*d.group_name), ("u", "g"));
    assert_eq!(d.mtime, Timestamp { secs: 1_136_214_245, nanos: 500_000_000 });
    assert_eq!(d.xattrs, [(b"user.a".to_vec(), vec![]), (b"user.b".to_vec(), vec![0, 255])]);
    let reg = inode(&toc, "/d/hard");
    assert_eq!((reg.mode, reg.uid, reg.size, reg.chunks.clone()), (0o777, 0, 5, 0..1));
    assert_eq!(reg.digest, Some(Digest::of(b"12345")));
    let empty = inode(&toc, "d//empty/");
    assert_eq!((empty.size, empty.chunks.clone(), empty.digest), (0, 0..0, None));
    let sym = inode(&toc, "d/sym");
    assert_eq!((&*sym.link_target, sym.size), (&b"../../x//y/"[..], 11));
    let chr = inode(&toc, "d/chr");
    assert_eq!((chr.rdev_major, chr.rdev_minor, chr.uid), (5, 1_048_575, u32::MAX));
    assert_eq!(inode(&toc, "d/blk").rdev_major, 8);
    assert_eq!(inode(&toc, "d/fifo").rdev_major, 0);

    assert_eq!(toc.chunks().len(), 1);
    assert_eq!(toc.chunks()[0].inode, toc.lookup("d/reg").unwrap());
    assert_eq!(toc.lookup(""), Some(0));
    for path in ["x", "d/x", "d/reg/x", "d/.", "d/..", "d/sym/x"] {
        assert_eq!(toc.lookup(path), None, "{path}");
    }
}

#[test]
fn names_are_cleaned() {
    for name in ["a/b", "/a/b", "./a/b", "a//b", "a/./b", "a/b/", "//a/b//", "./././a/b/.", "a\\/b"] {
        let toc = parse(&format!(r#"{{"name":"{name}","type":"fifo"}}"#));
        assert_eq!(outline(&toc), ["/ Directory 3", "/a Directory 2", "/a/b Fifo 1"], "{name}");
    }
    for name in ["", "/", ".", "./", "/.//"] {
        let toc = parse(&format!(r#"{{"name":"{name}","type":"dir","mode":448}}"#));
        assert_eq!(outline(&toc), ["/ Directory 2"], "{name}");
        assert_eq!(toc.inodes()[0].mode, 0o700, "{name}");
        bad_entry(&format!(r#"{{"name":"{name}","type":"fifo"}}"#), "/", "not a directory");
    }
    for name in ["..", "../a", "a/..", "a/../b", "/..", "./../a", "a/../../b"] {
        bad_entry(&format!(r#"{{"name":"{name}","type":"fifo"}}"#), name, "`..`");
        bad_entry(&format!(r#"{{"name":"{}","type":"dir"}}"#, name.replace('.', "\\u002e")), name, "`..`");
    }
    for name in ["\0", "a\0", "a\0/b", "a/\0b"] {
        let escaped = name.replace('\0', "\\u0000");
        bad_entry(&format!(r#"{{"name":"{escaped}","type":"fifo"}}"#), name, "NUL");
    }
    // Not special: dots, backslashes, blanks, whiteouts.
    for name in ["...", "..a", "a\\b", " ", "\n", ".wh.x", ".wh..wh..opq"] {
        let toc = parse(&format!(r#"{{"name":{name:?},"type":"fifo"}}"#));
        assert_eq!(toc.inodes()[0].children, [(name.as_bytes().to_vec(), 1)]);
    }
}

#[test]
fn parents_are_implied_in_any_order() {
    let toc = parse(
        r#"{"name":"a/b/c","type":"fifo"},{"name":"a/b/d","type":"fifo"},
        {"name":"a/x","type":"dir","mode":493},{"name":"a","type":"dir","uid":7}"#,
    );
    assert_eq!(
        outline(&toc),
        [
            "/ Directory 3",
            "/a Directory 4",
            "/a/b Directory 2",
            "/a/b/c Fifo 1",
            "/a/b/d Fifo 1",
            "/a/x Directory 2"
        ]
    );
    assert_eq!((inode(&toc, "a").uid, inode(&toc, "a").mode), (7, 0));
    let b = inode(&toc, "a/b");
    assert_eq!(
        (b.mode, b.uid, b.gid, b.mtime, b.user_name.as_str()),
        (0o755, 0, 0, Timestamp::default(), "")
    );
}

#[test]
fn numbering_is_by_name_bytes_not_by_entry_order() {
    let names = ["b", "a.x", "a", "é", "a/z", "z", "Z", "a-", "a/y/1", "\u{10ffff}", "\u{fffe}"];
    let entry = |name: &&str| {
        format!(r#"{{"name":"{name}","type":"{}"}}"#, if *name == "a" { "dir" } else { "fifo" })
    };
    let forward: Vec<_> = names.iter().map(entry).collect();
    let backward: Vec<_> = names.iter().rev().map(entry).collect();
    let toc = parse(&forward.join(","));
    assert_eq!(toc.inodes(), parse(&backward.join(",")).inodes());
    let order = ["Z", "a", "a/y", "a/y/1", "a/z", "a-", "a.x", "b", "z", "é", "\u{fffe}", "\u{10ffff}"];
    for (number, path) in order.iter().enumerate() {
        assert_eq!(toc.lookup(path), Some(number as u32 + 1), "{path}");
    }
}

#[test]
fn later_duplicates_replace_earlier_ones() {
    let toc = parse(&format!(
        r#"{{"name":"d","type":"dir","mode":448,"xattrs":{{"user.a":""}}}},{},
        {{"name":"./d/","type":"dir","mode":493,"uid":3}},
        {{"name":"f","type":"symlink","linkName":"x"}},{},
        {{"name":"g","type":"fifo"}},{{"name":"g","type":"dir"}},{{"name":"g/h","type":"fifo"}}"#,
        file("d/f", 100),
        file("f", 300),
    ));
    assert_eq!(
        outline(&toc),
        [
            "/ Directory 4",
            "/d Directory 2",
            "/d/f Regular 1",
            "/f Regular 1",
            "/g Directory 2",
            "/g/h Fifo 1"
        ]
    );
    let d = inode(&toc, "d");
    assert_eq!((d.mode, d.uid, d.xattrs.len()), (0o755, 3, 0));

    // A replaced file is gone, but its member still ends the one before it.
    let toc = parse(
        &[file("a", 100), file("b", 200), file("c", 300), r#"{"name":"b","type":"fifo"}"#.into()].join(","),
    );
    assert_eq!(outline(&toc), ["/ Directory 2", "/a Regular 1", "/b Fifo 1", "/c Regular 1"]);
    let member = |offset, end| Member { offset, end };
    assert_eq!(toc.members(), [member(100, 200), member(200, 300), member(300, END)]);
    assert_eq!(
        toc.chunks().iter().map(|chunk| (chunk.inode, chunk.member)).collect::<Vec<_>>(),
        [(1, 0), (3, 2)]
    );
}

#[test]
fn only_directories_have_something_below_them() {
    for kind in ["reg", "symlink", "char", "block", "fifo", "hardlink"] {
        let parent = format!(r#"{{"name":"p","type":"{kind}","linkName":"q"}}"#);
        let child = r#"{"name":"./p/c","type":"fifo"}"#;
        let q = r#"{"name":"q","type":"fifo"}"#;
        bad_entry(&format!("{parent},{child},{q}"), "p", "not a directory");
        bad_entry(&format!("{child},{q},{parent}"), "p", "not a directory");
    }
}

#[test]
fn hard_links_in_any_order_and_chained() {
    let links = [("a/1", "/a/2"), ("a/2", "./z/f"), ("b", "a//1")]
        .map(|(name, target)| format!(r#"{{"name":"{name}","type":"hardlink","linkName":"{target}"}}"#));
    let file = r#"{"name":"z/f","type":"fifo","mode":420,"uid":5}"#.to_owned();
    let mut entries = [file, links[0].clone(), links[1].clone(), links[2].clone()];
    for _ in 0..4 {
        entries.rotate_left(1);
        let toc = parse(&entries.join(","));
        let expected = [
            "/ Directory 4",
            "/a Directory 2",
            "/a/1 Fifo 4",
            "/a/2 = 2",
            "/b = 2",
            "/z Directory 2",
            "/z/f = 2",
        ];
        assert_eq!(outline(&toc), expected);
        assert_eq!((inode(&toc, "b").mode, inode(&toc, "b").uid), (0o644, 5));
    }
}

#[test]
fn hard_links_that_lead_nowhere() {
    let link =
        |name: &str, target: &str| format!(r#"{{"name":"{name}","type":"hardlink","linkName":"{target}"}}"#);
    bad_entry(&link("a", "b"), "a", "does not exist");
    bad_entry(&link("d/a", "../d/b"), "d/a", "does not exist");
    bad_entry(&link("a", "d\\u0000"), "a", "does not exist");
    bad_entry(&format!("{},{}", link("a", "d"), r#"{"name":"d","type":"dir"}"#), "a", "directory");
    bad_entry(&format!("{},{}", link("a", "d"), r#"{"name":"d/e","type":"fifo"}"#), "a", "directory");
    bad_entry(&link("a", ""), "a", "directory");
    bad_entry(&link("a", "a"), "a", "circle");
    bad_entry(&[link("a", "b"), link("b", "c"), link("c", "b")].join(","), "a", "circle");
    bad_entry(&[file("a", 9), link("a", "a")].join(","), "a", "circle");
    bad_entry(
        &[file(".prefetch.landmark", 9), link("a", ".prefetch.landmark")].join(","),
        "a",
        "does not exist",
    );
}

#[test]
fn long_chains_of_hard_links_cost_no_stack_and_are_limited() {
    let chain = |links: usize| {
        let link = |n| format!(r#"{{"name":"{n:06}","type":"hardlink","linkName":"{:06}"}}"#, n + 1);
        let mut entries: Vec<_> = (0..links).map(link).collect();
        entries.push(format!(r#"{{"name":"{links:06}","type":"fifo"}}"#));
        entries.join(",")
    };
    let limits = Limits { link_depth: 50_000, ..Limits::default() };
    let toc = limited(&chain(2000), &limits).unwrap();
    assert_eq!((toc.inodes().len(), toc.inodes()[1].nlink), (2, 2001));
    assert!(limited(&chain(64), &Limits::default()).is_ok());
    let error = fails(&chain(65));
    assert!(matches!(error, Error::Limit { value: 65, limit: 64, .. }), "{error}");
    let error = fails(&chain(50_000));
    assert!(matches!(error, Error::Limit { value: 50_000, limit: 64, .. }), "{error}");
}

#[test]
fn landmarks_are_taken_from_the_root_only() {
    let toc = parse(&[file("a", 100), file("./.prefetch.landmark", 200), file("b", 300)].join(","));
    assert_eq!(outline(&toc), ["/ Directory 2", "/a Regular 1", "/b Regular 1"]);
    assert_eq!(toc.landmark(), Landmark::Prefetch { end: 200 });
    assert_eq!(toc.members().len(), 3);
    assert_eq!(toc.members()[0], Member { offset: 100, end: 200 });

    let toc = parse(&[file(".no.prefetch.landmark", 100), file("b", 300)].join(","));
    assert_eq!((toc.landmark(), toc.inodes().len()), (Landmark::NoPrefetch, 2));
    let toc = parse(&[file(".no.prefetch.landmark", 100), file(".prefetch.landmark", 200)].join(","));
    assert_eq!((toc.landmark(), toc.inodes().len()), (Landmark::NoPrefetch, 1));
    let toc = parse(r#"{"name":".prefetch.landmark","type":"reg"}"#);
    assert_eq!((toc.landmark(), toc.inodes().len()), (Landmark::Absent, 1));

    let deep = ["d/.prefetch.landmark", "d/.no.prefetch.landmark", "d/stargz.index.json"];
    let toc = parse(&deep.map(|name| file(name, 100 + name.len() as u64)).join(","));
    assert_eq!((toc.landmark(), toc.inodes().len()), (Landmark::Absent, 5));

    for name in [".prefetch.landmark", ".no.prefetch.landmark"] {
        bad_entry(&format!(r#"{{"name":"{name}","type":"fifo"}}"#), name, "regular");
        bad_entry(&format!(r#"{{"name":"{name}/x","type":"fifo"}}"#), name, "regular");
    }
}

#[test]
fn the_toc_s_own_name_is_not_in_the_tree() {
    assert_eq!(outline(&parse(&file("stargz.index.json", 100))), ["/ Directory 2"]);
    // Writers skip only the file: a directory of that name is in the layer.
    let toc = parse(r#"{"name":"stargz.index.json/x","type":"fifo"}"#);
    assert_eq!(toc.inodes().len(), 3);
}

#[test]
fn user_and_group_names_are_filled_in_by_id() {
    let toc = parse(
        r#"{"name":"1","type":"dir","uid":5,"gid":6,"userName":"five","groupName":"six"},
        {"name":"2","type":"fifo","uid":5,"gid":6},
        {"name":"3","type":"fifo","uid":6,"gid":5},
        {"name":"4","type":"hardlink","linkName":"2","uid":6,"gid":5,"userName":"u6","groupName":"g5"},
        {"name":"5","type":"fifo","uid":6,"gid":5},
        {"name":"6","type":"fifo","uid":5,"userName":"other"},
        {"name":"7","type":"fifo","uid":5},
        {"name":"1","type":"dir","uid":6,"gid":6}"#,
    );
    let names = |path| {
        let inode = inode(&toc, path);
        (inode.user_name.as_str(), inode.group_name.as_str())
    };
    assert_eq!(names("1"), ("u6", "six"));
    assert_eq!(names("2"), ("five", "six"));
    assert_eq!(names("3"), ("", ""));
    assert_eq!(names("4"), ("five", "six"));
    assert_eq!(names("5"), ("u6", "g5"));
    assert_eq!(names("6"), ("other", ""));
    assert_eq!(names("7"), ("other", ""));
}

#[test]
fn lossy_names_are_noticed() {
    for (entry, lossy) in [
        (r#"{"name":"a\ufffd","type":"fifo"}"#, true),
        ("{\"name\":\"a\u{fffd}/b\",\"type\":\"fifo\"}", true),
        (r#"{"name":"a","type":"symlink","linkName":"\uFFFD"}"#, true),
        (r#"{"name":"a","type":"dir","xattrs":{"user.\ufffd":""}}"#, true),
        (r#"{"name":"a","type":"dir","xattrs":{"user.a":""},"userName":"\ufffd"}"#, false),
        (r#"{"name":"a\ufffc","type":"fifo"}"#, false),
    ] {
        assert_eq!(parse(entry).lossy_names(), lossy, "{entry}");
    }
}

#[test]
fn entries_that_make_no_sense() {
    for (fields, part) in [
        (r#""type":"socket""#, r#"type "socket" is not known"#),
        (r#""type":"REG""#, "not known"),
        (r#""size":1"#, "no type"),
        (r#""type":"dir","mode":-1"#, "mode is -1"),
        (r#""type":"dir","uid":-1"#, "uid is -1"),
        (r#""type":"dir","gid":4294967296"#, "gid is 4294967296"),
        (r#""type":"hardlink","uid":-9223372036854775808"#, "uid is -9223372036854775808"),
        (r#""type":"char","devMajor":-1"#, "devMajor is -1"),
        (r#""type":"block","devMinor":4294967296"#, "devMinor is 4294967296"),
        (r#""type":"dir","modtime":"yesterday""#, "yesterday"),
        (r#""type":"symlink""#, "target is empty"),
        (r#""type":"symlink","linkName":"a\u0000b""#, "holds NUL"),
        (r#""type":"dir","xattrs":{"":""}"#, "xattr is empty"),
        (r#""type":"dir","xattrs":{"a\u0000":""}"#, "holds NUL"),
        (r#""type":"dir","xattrs":{"a":"","b":"","a":"AA=="}"#, "given twice"),
        (r#""type":"dir","xattrs":{"a":"A"}"#, "not base64"),
        (r#""type":"dir","xattrs":{"a":"AA"}"#, "not base64"),
        (r#""type":"dir","xattrs":{"a":"A-=="}"#, "not base64"),
        (r#""type":"reg","digest":"sha512:00""#, "digest: "),
        (r#""type":"reg","size":1,"chunkDigest":"md5""#, "chunkDigest: "),
        (r#""type":"reg","size":-1"#, "size is -1"),
        (r#""type":"dir","size":-1"#, "size is -1"),
        (r#""type":"reg","size":1,"offset":-1"#, "offset is -1"),
        (r#""type":"reg","size":1,"innerOffset":-1"#, "innerOffset is -1"),
        (r#""type":"reg","size":1,"chunkOffset":-1"#, "chunkOffset is -1"),
        (r#""type":"reg","size":1,"chunkSize":-1"#, "chunkSize is -1"),
    ] {
        bad_entry(&format!(r#"{{"name":"etc/x",{fields}}}"#), "etc/x", part);
    }
}

fn reg(fields: &str) -> String {
    format!(r#"{{"name":"./f","type":"reg",{fields}}}"#)
}

fn chunk(fields: &str) -> String {
    format!(r#"{{"type":"chunk",{fields}}}"#)
}

/// Chunks as (file_offset, size, member offset, inner_offset).
fn layout(toc: &Toc) -> Vec<(u64, u64, u64, u64)> {
    let place = |chunk: &crate::Chunk| {
        (chunk.file_offset, chunk.size, toc.members()[chunk.member as usize].offset, chunk.inner_offset)
    };
    toc.chunks().iter().map(place).collect()
}

#[test]
fn chunks_cover_their_file() {
    // As a writer with 4-byte chunks puts it: no chunkSize for the shorter last one.
    let toc = parse(
        &[
            reg(r#""size":10,"offset":100,"chunkSize":4"#),
            r#"{"name":"f","type":"chunk","offset":200,"chunkOffset":4,"chunkSize":4}"#.into(),
            r#"{"type":"dir","name":"between"}"#.into(),
            chunk(r#""offset":300,"chunkOffset":8"#),
        ]
        .join(","),
    );
    assert_eq!(layout(&toc), [(0, 4, 100, 0), (4, 4, 200, 0), (8, 2, 300, 0)]);
    assert_eq!(inode(&toc, "f").chunks, 0..3);

    // Several in one member, which may start the blob.
    let toc = parse(
        &[
            reg(r#""size":10,"innerOffset":512,"chunkSize":4"#),
            chunk(r#""innerOffset":516,"chunkOffset":4,"chunkSize":6"#),
            file("g", 0).replace("}", r#","innerOffset":1024}"#),
            file("h", 50),
        ]
        .join(","),
    );
    assert_eq!(layout(&toc), [(0, 4, 0, 512), (4, 6, 0, 516), (0, 1, 0, 1024), (0, 1, 50, 0)]);
    assert_eq!(toc.members(), [Member { offset: 0, end: 50 }, Member { offset: 50, end: END }]);

    // chunkSize of a whole file may be written.
    assert_eq!(layout(&parse(&reg(r#""size":10,"offset":9,"chunkSize":10"#))), [(0, 10, 9, 0)]);
    // Files need not be in blob order; chunks are grouped by inode.
    let toc = parse(&[file("z", 100), file("a", 300), file("m", 200)].join(","));
    assert_eq!(layout(&toc), [(0, 1, 300, 0), (0, 1, 200, 0), (0, 1, 100, 0)]);
    let members: Vec<_> = toc.members().iter().map(|member| (member.offset, member.end)).collect();
    assert_eq!(members, [(100, 200), (200, 300), (300, END)]);
}

#[test]
fn chunks_that_do_not_fit() {
    let first = reg(r#""size":10,"offset":100,"chunkSize":4"#);
    let then = |fields: &str| format!("{first},{}", chunk(fields));
    for (entries, part) in [
        (first.clone(), "cover 4 of 10"),
        (then(r#""offset":200,"chunkOffset":4,"chunkSize":5"#), "cover 9 of 10"),
        (then(r#""offset":200,"chunkOffset":4,"chunkSize":7"#), "chunk of 7 bytes at 4 in a file of 10"),
        (then(r#""offset":200,"chunkOffset":3"#), "overlap"),
        (then(r#""offset":200"#), "overlap"),
        (then(r#""offset":200,"chunkOffset":5"#), "gap"),
        (then(r#""offset":200,"chunkOffset":9223372036854775807"#), "gap"),
        (then(r#""offset":100,"chunkOffset":4"#), "not behind"),
        (then(r#""offset":100,"innerOffset":3,"chunkOffset":4"#), "not behind"),
        (then(r#""offset":99,"chunkOffset":4"#), "not behind"),
        (then(r#""offset":10000,"chunkOffset":4"#), "TOC is at 10000"),
        (then(r#""offset":9223372036854775807,"chunkOffset":4"#), "TOC is at 10000"),
        (
            format!(
                "{},{}",
                then(r#""offset":200,"chunkOffset":4"#),
                chunk(r#""offset":300,"chunkOffset":10"#)
            ),
            "chunk of 0",
        ),
        (reg(r#""size":10,"offset":100,"chunkSize":11"#), "chunk of 11 bytes at 0 in a file of 10"),
        (reg(r#""size":10,"offset":100,"chunkOffset":1"#), "gap"),
        (reg(r#""size":10,"offset":10000"#), "TOC is at 10000"),
        (reg(r#""chunkSize":1"#), "chunk of 1 bytes at 0 in a file of 0"),
        (reg(r#""chunkOffset":1"#), "gap"),
        (format!("{},{}", reg(r#""size":0"#), chunk(r#""offset":100"#)), "chunk of 0"),
        (
            format!("{},{}", reg(r#""size":10,"offset":100"#), chunk(r#""offset":200,"chunkOffset":4"#)),
            "overlap",
        ),
        (format!("{},{}", file("g", 100), reg(r#""size":1,"offset":100"#)), "overlaps another"),
        (
            format!("{},{}", file("g", 100), reg(r#""size":2,"offset":100,"innerOffset":0"#)),
            "overlaps another",
        ),
    ] {
        bad_entry(&entries, "./f", part);
    }
    bad_entry(&chunk(r#""offset":100"#), "", "before any regular file");
    let stray = r#"{"name":"g","type":"chunk","offset":200,"chunkOffset":4}"#;
    bad_entry(&format!("{first},{stray}"), "g", "another file");
    let after_replaced = format!("{first},{},{}", r#"{"name":"f","type":"fifo"}"#, file("g", 9));
    bad_entry(&after_replaced, "./f", "cover 4 of 10");
}

#[test]
fn verification_needs_the_digest_first_and_one_for_every_chunk() {
    let limits = Limits::default();
    let verify = |entries: &str| {
        let json = json(entries);
        let digest = json.digest();
        json.verify(&digest, &limits)
    };

    let garbage = TocJson::new(Format::EStargz, END, b"not JSON".to_vec());
    let expected = Digest::of(b"something else");
    let actual = garbage.digest();
    assert_eq!(
        garbage.clone().verify(&expected, &limits),
        Err(Error::TocDigestMismatch { expected, actual })
    );
    assert!(matches!(garbage.verify(&actual, &limits), Err(Error::BadJson { .. })));

    let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
    let whole = reg(&format!(r#""size":4,"offset":100,"digest":"{one}""#));
    let toc = verify(&whole).unwrap();
    assert_eq!(toc.digest(), json(&whole).digest());
    assert_eq!((toc.chunks()[0].digest, toc.inodes()[1].digest), (Some(one), Some(one)));
    assert_eq!(
        toc.chunks()[0].spec().map(|spec| (spec.inner_offset, spec.size, spec.digest)),
        Some((0, 4, one))
    );

    let both = reg(&format!(r#""size":4,"offset":100,"digest":"{one}","chunkDigest":"{one}""#));
    assert_eq!(verify(&both).unwrap().chunks()[0].digest, Some(one));
    let chunked = [
        reg(&format!(r#""size":4,"offset":100,"chunkSize":3,"digest":"{one}","chunkDigest":"{two}""#)),
        chunk(&format!(r#""offset":200,"chunkOffset":3,"chunkDigest":"{one}""#)),
    ];
    let toc = verify(&chunked.join(",")).unwrap();
    assert_eq!(toc.chunks().iter().map(|chunk| chunk.digest).collect::<Vec<_>>(), [Some(two), Some(one)]);
    assert!(verify(r#"{"name":"e","type":"reg"}"#).is_ok());

    let differing = both.replacen(&one.to_string(), &two.to_string(), 1);
    assert!(matches!(verify(&differing), Err(Error::BadEntry { why, .. }) if why.contains("differ")));
    for (entries, at) in [
        (reg(r#""size":4,"offset":100"#), "chunk at 0"),
        (chunked.join(",").replace(&format!(r#""chunkDigest":"{two}""#), r#""mode":0"#), "chunk at 0"),
        (chunked.join(",").replace(&format!(r#""chunkDigest":"{one}""#), r#""mode":0"#), "chunk at 3"),
        // Also of a file that is not in the tree.
        (file(".prefetch.landmark", 9), "chunk at 0"),
        (format!("{},{}", file("a", 9), r#"{"name":"a","type":"dir"}"#), "chunk at 0"),
    ] {
        assert!(
            parse(&entries).chunks().iter().all(|chunk| chunk.spec().is_none() == chunk.digest.is_none())
        );
        let error = verify(&entries).unwrap_err();
        assert!(matches!(&error, Error::BadEntry { why, .. } if why.contains(at)), "{error}");
    }
}

#[test]
fn limits_hold_at_their_value_and_fail_above() {
    let tight = Limits {
        entries: 4,
        name_bytes: 5,
        path_depth: 3,
        link_target_bytes: 6,
        xattr_bytes: 7,
        chunk_bytes: 8,
        member_bytes: 9,
        ..Limits::default()
    };
    let fifo = |name: &str| format!(r#"{{"name":"{name}","type":"fifo"}}"#);
    let many = |n: usize| vec![fifo("a"); n].join(",");
    let xattr = |value: &str| format!(r#"{{"name":"a","type":"dir","xattrs":{{"b":"AAAA","c":"{value}"}}}}"#);
    let symlink = |target: &str| format!(r#"{{"name":"a","type":"symlink","linkName":"{target}"}}"#);
    let sized = |size: u64| reg(&format!(r#""size":{size},"offset":1"#));
    let inner = |offset: u64| reg(&format!(r#""size":1,"offset":1,"innerOffset":{offset}"#));
    let user = |name: &str| format!(r#"{{"name":"a","type":"dir","userName":"{name}"}}"#);
    for (fits, exceeds, value, limit) in [
        (many(4), many(5), 5, 4),
        (fifo("a/b/c"), fifo("a/b/c/d"), 4, 3),
        (fifo("/a/./b/"), fifo("a/b/c/d/"), 4, 3),
        (fifo("12345"), fifo("123456"), 6, 5),
        (fifo("12345/1"), fifo("123456/1"), 6, 5),
        ([fifo("a/b"), fifo("c/d")].join(","), [fifo("a/b"), fifo("c/d/e")].join(","), 5, 4),
        (symlink("123456"), symlink("1234567"), 7, 6),
        (xattr("AAA="), xattr("AAAA"), 8, 7),
        (user("12345"), user("123456"), 6, 5),
        (user("12345").replace("user", "group"), user("123456").replace("user", "group"), 6, 5),
        (sized(8), sized(9), 9, 8),
        (inner(8), inner(9), 10, 9),
        (inner(8), inner(i64::MAX as u64), 1 << 63, 9),
    ] {
        assert!(limited(&fits, &tight).is_ok(), "{:?}\n{fits}", limited(&fits, &tight));
        match limited(&exceeds, &tight) {
            Err(Error::Limit { value: v, limit: l, .. }) => assert_eq!((v, l), (value, limit), "{exceeds}"),
            other => panic!("{other:?}\n{exceeds}"),
        }
    }
}

#[test]
fn deep_trees_cost_no_stack() {
    let limits = Limits { path_depth: 100_000, ..Limits::default() };
    let deep = |depth: usize| format!(r#"{{"name":"{}","type":"dir"}}"#, "d/".repeat(depth));
    let on_a_small_stack = move || {
        let toc = limited(&deep(100_000), &limits).unwrap();
        assert_eq!(toc.inodes().len(), 100_001);
        drop(toc);
        let error = fails(&deep(100_000));
        assert!(matches!(error, Error::Limit { value: 1025, limit: 1024, .. }), "{error}");
    };
    std::thread::Builder::new().stack_size(256 << 10).spawn(on_a_small_stack).unwrap().join().unwrap();
}

#[test]
fn a_toc_json_prints_without_its_bytes() {
    let text = format!("{:?}", json(&file("a", 1)));
    assert!(text.contains("len: ") && text.contains("sha256:") && !text.contains("reg"), "{text}");
    assert_eq!(json("").bytes(), br#"{"version":1,"entries":[]}"#);
    assert!(matches!(inode(&parse(&file("a", 1)), "a").kind, Kind::Regular));
}
