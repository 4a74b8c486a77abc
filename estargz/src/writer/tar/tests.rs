//! The reader over archives made by hand.

use support::layer::{Layer, LongNames, long_path, random};

use super::pax::Records;
use super::*;

/// An archive under construction.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    /// A header, edited and sealed again, and its data.
    fn add(mut self, name: &str, data: &[u8], edit: impl FnOnce(&mut [u8])) -> Self {
        let mut block = *Header::file(name.as_bytes(), data.len() as u64).block();
        edit(&mut block);
        crate::fixture::seal(&mut block);
        self.0.extend_from_slice(&block);
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    fn file(self, name: &str, data: &[u8]) -> Self {
        self.add(name, data, |_| {})
    }

    fn typed(self, type_flag: u8, name: &str, data: &[u8]) -> Self {
        self.add(name, data, |block| block[156] = type_flag)
    }

    fn pax(self, type_flag: u8, records: &[(&str, &str)]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            Records::write(&mut body, key.as_bytes(), value.as_bytes());
        }
        self.typed(type_flag, "pax", &body)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

/// All entries with their contents.
fn read(tar: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, Error> {
    let mut reader = Reader::new(tar);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut content = Vec::new();
        reader.read(entry.size, &mut content)?;
        entries.push((entry, content));
    }
    assert_eq!(reader.position(), tar.len() as u64);
    Ok(entries)
}

fn one(tar: &[u8]) -> (Entry, Vec<u8>) {
    let mut entries = read(tar).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

/// Why an archive is refused: the entry named, and the reason.
fn refused(tar: &[u8]) -> (String, String) {
    match read(tar).map(|entries| entries.len()).unwrap_err() {
        Error::BadEntry { name, why } => (name, why.into_owned()),
        Error::BadTar { entry, why, .. } => (entry, why.into_owned()),
        other => panic!("{other}"),
    }
}

#[test]
fn fields_of_a_header() {
    let owned = |block: &mut [u8]| {
        block[100..107].copy_from_slice(b"0104755");
        block[108..116].copy_from_slice(b"\x80\0\0\0\0\x2d\xc6\xc0"); // base 256: 3,000,000
        block[116..123].copy_from_slice(b"0001750");
        block[136..148].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfb"); // -5
        block[265..269].copy_from_slice(b"user");
        block[297..302].copy_from_slice(b"group");
    };
    let tar = Archive::default().add("bin/x", b"content", owned).end();
    let (entry, content) = one(&tar);
    assert_eq!(content, b"content");
    assert_eq!((entry.kind, &*entry.name, entry.size), (Kind::Regular, &b"bin/x"[..], 7));
    assert_eq!((entry.mode, entry.uid, entry.gid), (0o104755, 3_000_000, 1000));
    assert_eq!((entry.mtime.secs, entry.mtime.nanos), (-5, 0));
    assert_eq!((&*entry.user, &*entry.group), (&b"user"[..], &b"group"[..]));
    assert_eq!(entry.header, tar[..BLOCK]);
}

#[test]
fn kinds() {
    let kind = |type_flag, name| {
        let link = |block: &mut [u8]| {
            block[156] = type_flag;
            block[157..160].copy_from_slice(b"to\0");
            block[329..337].copy_from_slice(b"0000010\0");
            block[337..345].copy_from_slice(b"0000021\0");
        };
        let (entry, _) = one(&Archive::default().add(name, b"", link).end());
        (entry.kind, entry.link, entry.device)
    };
    assert_eq!(kind(b'0', "x"), (Kind::Regular, vec![], (0, 0)));
    assert_eq!(kind(0, "x"), (Kind::Regular, vec![], (0, 0)));
    assert_eq!(kind(0, "x/"), (Kind::Directory, vec![], (0, 0)));
    assert_eq!(kind(b'1', "x"), (Kind::HardLink, b"to".to_vec(), (0, 0)));
    assert_eq!(kind(b'2', "x"), (Kind::Symlink, b"to".to_vec(), (0, 0)));
    assert_eq!(kind(b'3', "x"), (Kind::CharDevice, vec![], (8, 17)));
    assert_eq!(kind(b'4', "x"), (Kind::BlockDevice, vec![], (8, 17)));
    assert_eq!(kind(b'5', "x"), (Kind::Directory, vec![], (0, 0)));
    assert_eq!(kind(b'6', "x"), (Kind::Fifo, vec![], (0, 0)));
}

#[test]
fn only_files_have_contents() {
    // A directory's size field says nothing of what follows.
    let sized = |block: &mut [u8]| {
        block[156] = b'5';
        block[124..135].copy_from_slice(b"00000010000");
    };
    let tar = Archive::default().add("dir/", b"", sized).file("file", b"x").end();
    let entries = read(&tar).unwrap();
    assert_eq!((entries[0].0.size, &*entries[1].1), (0, &b"x"[..]));
}

#[test]
fn pax_records_win_and_only_over_the_next_entry() {
    let records = [
        ("path", "real/name"),
        ("size", "3"),
        ("uid", "4000000000"),
        ("gid", "7"),
        ("uname", "user"),
        ("gname", "group"),
        ("mtime", "-1.25"),
        ("atime", "5.5"),
        ("SCHILY.xattr.user.a", "=1\n"),
        ("SCHILY.xattr.user.empty", ""),
        ("LIBARCHIVE.xattr.user.b", "Mg"),
        ("hdrcharset", "BINARY"),
        ("linkpath", "ignored"),
    ];
    let wrong_size = |block: &mut [u8]| {
        block[124..135].copy_from_slice(b"00000000000");
    };
    let tar = Archive::default().pax(b'x', &records).add("short", b"abc", wrong_size).file("next", b"").end();
    let entries = read(&tar).unwrap();
    let (entry, content) = &entries[0];
    assert_eq!((&*entry.name, &**content), (&b"real/name"[..], &b"abc"[..]));
    assert_eq!(
        (entry.uid, entry.gid, &*entry.user, &*entry.group),
        (4_000_000_000, 7, &b"user"[..], &b"group"[..])
    );
    assert_eq!((entry.mtime.secs, entry.mtime.nanos), (-2, 750_000_000));
    let xattrs = [(b"user.a".to_vec(), b"=1\n".to_vec()), (b"user.empty".to_vec(), vec![])];
    assert_eq!(entry.xattrs, xattrs);
    assert_eq!(entry.header, tar[..entry.header.len()]);
    assert_eq!((&*entries[1].0.name, entries[1].0.uid), (&b"next"[..], 0));
    assert_eq!(entries[1].0.header.len(), BLOCK);

    // Of two headers the last counts; empty values leave the field as it is.
    let twice =
        Archive::default().pax(b'x', &[("uid", "1"), ("gid", "1")]).pax(b'x', &[("uid", "2"), ("path", "")]);
    let (entry, _) = one(&twice.file("name", b"").end());
    assert_eq!((entry.uid, entry.gid, &*entry.name), (2, 0, &b"name"[..]));
}

#[test]
fn global_headers_mean_nothing_and_are_dropped() {
    let tar = Archive::default().pax(b'g', &[("uid", "5"), ("comment", "c")]).file("a", b"").end();
    let (entry, _) = one(&tar);
    assert_eq!((entry.uid, entry.header.len()), (0, BLOCK));
    let between =
        Archive::default().pax(b'x', &[("uid", "1")]).pax(b'g', &[("uid", "5")]).file("a", b"").end();
    let (entry, _) = one(&between);
    assert_eq!((entry.uid, entry.header.len()), (1, 3 * BLOCK));
}

#[test]
fn long_names() {
    let (name, target) = (long_path(300), long_path(250));
    for style in [LongNames::Gnu, LongNames::Pax] {
        let tar = Layer::new().symlink(&name, &target).long_names(style).tar();
        let (entry, _) = one(&tar);
        assert_eq!((entry.name, entry.link), (name.clone().into_bytes(), target.clone().into_bytes()));
        assert_eq!(entry.header, tar[..tar.len() - 2 * BLOCK]);
    }
    let raw = Archive::default().typed(b'L', "x", b"caf\xe9\0junk").file("short", b"").end();
    assert_eq!(one(&raw).0.name, b"caf\xe9");
}

#[test]
fn fixtures_read_back() {
    for seed in 0..5 {
        let layer = random(seed, 60);
        let entries = read(&layer.tar()).unwrap();
        assert_eq!(entries.len(), layer.entries().len());
        let mut headers = Vec::new();
        for ((entry, content), expected) in entries.iter().zip(layer.entries()) {
            assert_eq!((&entry.name, &**content), (&expected.name, &expected.payload()[..]));
            assert_eq!(
                (entry.uid, entry.gid, entry.mode),
                (expected.uid, expected.gid, expected.mode.into())
            );
            assert_eq!((entry.mtime.secs, entry.mtime.nanos), expected.mtime);
            assert_eq!(entry.xattrs, expected.xattrs.clone().into_iter().collect::<Vec<_>>());
            headers.extend_from_slice(&entry.header);
            headers.extend_from_slice(content);
            headers.resize(headers.len().next_multiple_of(BLOCK), 0);
        }
        assert_eq!([headers, vec![0; 2 * BLOCK]].concat(), layer.tar(), "headers pass through");
    }
}

/// Bytes of a sparse file in every way to store it.
fn sparse_archives() -> Vec<(&'static str, Vec<u8>)> {
    let old = |extended: bool| {
        let pieces: Vec<_> = (0..30).map(|n| (n * 1000, 10)).collect();
        let (first, rest) = pieces.split_at(4);
        let put = |field: &mut [u8], pieces: &[(u64, u64)]| {
            for ((offset, len), field) in pieces.iter().zip(field.chunks_mut(24)) {
                field[..12].copy_from_slice(format!("{offset:011o}\0").as_bytes());
                field[12..].copy_from_slice(format!("{len:011o}\0").as_bytes());
            }
        };
        let count = if extended { 30 } else { 4 };
        let data: Vec<u8> = (0..count * 10).map(|n| b'a' + (n % 26) as u8).collect();
        let mut map = Vec::new();
        if extended {
            for pieces in rest.chunks(21) {
                let mut block = [0; BLOCK];
                put(&mut block[..504], pieces);
                block[504] = u8::from(pieces.len() == 21);
                map.extend_from_slice(&block);
            }
        }
        let archive = Archive::default().add("old/sparse", b"", |block| {
            block[156] = b'S';
            block[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
            block[257..265].copy_from_slice(b"ustar  \0");
            put(&mut block[386..482], first);
            block[482] = u8::from(extended);
            block[483..494].copy_from_slice(b"00000100000");
        });
        let mut tar = [archive.0, map, data].concat();
        tar.resize(tar.len().next_multiple_of(BLOCK), 0);
        Archive(tar).end()
    };
    let name = ("GNU.sparse.name", "pax/sparse");
    let other = ("SCHILY.xattr.user.a", "1");
    let made_up = "pax/GNUSparseFile.1/sparse";
    let data = b"0123456789abcdefghij";
    let numbers = [("GNU.sparse.major", "0"), ("GNU.sparse.minor", "0"), ("GNU.sparse.size", "32768")];
    let pieces = [
        ("GNU.sparse.offset", "0"),
        ("GNU.sparse.numbytes", "10"),
        ("GNU.sparse.offset", "20000"),
        ("GNU.sparse.numbytes", "10"),
    ];
    let map = ("GNU.sparse.map", "0,10,20000,10");
    let mut in_data = b"2\n0\n10\n20000\n10\n".to_vec();
    in_data.resize(BLOCK, 0);
    in_data.extend_from_slice(data);
    let version = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "32768")];
    let pax = |records: &[(&str, &str)], data: &[u8]| {
        let all = [records, &[name, other]].concat();
        Archive::default().pax(b'x', &all).file(made_up, data).end()
    };
    vec![
        ("old", old(false)),
        ("old, extended", old(true)),
        ("0.0", pax(&[&numbers[..], &pieces].concat(), data)),
        ("0.1", pax(&[numbers[2], map], data)),
        ("1.0", pax(&version, &in_data)),
    ]
}

#[test]
fn sparse_files_are_filled() {
    for (version, tar) in sparse_archives() {
        let (entry, content) = one(&tar);
        assert_eq!(entry.size, 32768, "{version}");
        let mut expected = vec![0; 32768];
        if version.starts_with("old") {
            assert_eq!(entry.name, b"old/sparse");
            for piece in 0..if version == "old" { 4 } else { 30 } {
                for n in 0..10 {
                    expected[piece * 1000 + n] = b'a' + ((piece * 10 + n) % 26) as u8;
                }
            }
        } else {
            assert_eq!(entry.name, b"pax/sparse");
            assert_eq!(entry.xattrs, [(b"user.a".to_vec(), b"1".to_vec())]);
            expected[..10].copy_from_slice(b"0123456789");
            expected[20_000..20_010].copy_from_slice(b"abcdefghij");
        }
        assert!(content == expected, "{version}");

        // The header made for it says the same of the filled file.
        let filled = Archive([&entry.header[..], &content].concat()).end();
        let (again, same) = one(&filled);
        assert_eq!((&again.header, &again.name, &again.xattrs), (&entry.header, &entry.name, &entry.xattrs));
        assert!(same == content, "{version}");
    }
}

#[test]
fn sparse_files_may_be_large() {
    let size = (9_u64 << 30).to_string();
    let records = [("GNU.sparse.map", "0,1"), ("GNU.sparse.size", &size), ("GNU.sparse.name", "big")];
    let tar = Archive::default().pax(b'x', &records).file("made/up", b"x").end();
    let mut reader = Reader::new(&tar[..]);
    let entry = reader.next().unwrap().unwrap();
    assert_eq!((entry.size, &*entry.name), (9 << 30, &b"big"[..]));
    let mut content = Vec::new();
    reader.read(4096, &mut content).unwrap();
    assert!(content[0] == b'x' && content[1..] == [0; 4095]);
    assert!(reader.next().unwrap().is_none());
    // Without its map, but with its size.
    let again = Reader::new(&entry.header[..]).next().unwrap().unwrap();
    assert_eq!((again.size, &*again.name), (9 << 30, &b"big"[..]));
}

#[test]
fn sizes_beyond_eight_gibibytes() {
    let size = (1_u64 << 33) + 5;
    let base_256 = Header::file(b"big", size).block().to_vec();
    let pax = Archive::default().pax(b'x', &[("size", &size.to_string())]).file("big", b"").0;
    for header in [base_256, pax] {
        let mut reader = Reader::new(header.chain(io::repeat(7).take(size)).chain(&[0; 507 + 1024][..]));
        let entry = reader.next().unwrap().unwrap();
        assert_eq!((entry.size, &entry.header), (size, &header));
        let mut content = Vec::new();
        reader.read(10, &mut content).unwrap();
        assert_eq!(content, [7; 10]);
    }
}

#[test]
fn what_is_refused_is_named() {
    let edited = |edit: fn(&mut [u8])| Archive::default().add("bad", b"", edit).end();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("mode is not", edited(|block| block[100] = b'x')),
        ("mode is -", edited(|block| block[100..108].fill(0xff))),
        ("uid is not", edited(|block| block[108] = b'9')),
        ("uid is -1", edited(|block| block[108..116].fill(0xff))),
        ("gid is 4294967296", edited(|block| block[116..124].copy_from_slice(b"\x80\0\0\x01\0\0\0\0"))),
        ("size is not", edited(|block| block[124] = b'-')),
        ("size is -", edited(|block| block[124..136].fill(0xff))),
        ("time is not", edited(|block| block[136] = b'8')),
        ("without a target", edited(|block| block[156] = b'1')),
        ("without a target", edited(|block| block[156] = b'2')),
        (
            "minor device number is not",
            edited(|block| {
                block[156] = b'3';
                block[337] = b'x';
            }),
        ),
        (
            "device number is 0:-1",
            edited(|block| {
                block[156] = b'4';
                block[337..345].fill(0xff);
            }),
        ),
        ("GNU tar's own", edited(|block| block[156] = b'S')),
    ];
    for (part, tar) in cases {
        let (name, why) = refused(&tar);
        assert!(name == "bad" && why.contains(part), "{name}: {why}, not {part}");
    }
    for (part, records) in [
        ("size is -1", &[("size", "-1")][..]),
        ("size is not", &[("size", "1k")]),
        ("uid is 4294967296", &[("uid", "4294967296")]),
        ("mtime is not", &[("mtime", "now")]),
        ("not known", &[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")]),
        ("covers 9 bytes, but 0", &[("GNU.sparse.map", "0,9"), ("GNU.sparse.size", "9")]),
        ("does not end", &[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")]),
    ] {
        let (name, why) = refused(&Archive::default().pax(b'x', records).file("bad", b"").end());
        assert!(name == "bad" && why.contains(part), "{name}: {why}, not {part}");
    }
    let (name, why) = refused(&Archive::default().typed(b'x', "pax", b"nonsense").file("bad", b"").end());
    assert!(name == "pax" && why.contains("malformed"), "{why}");
    let (name, why) = refused(&Archive::default().typed(b'g', "global", b"nonsense").end());
    assert!(name == "global" && why.contains("malformed"), "{why}");
    assert!(refused(&Archive::default().file("", b"").end()).1.contains("no name"));

    for style in [LongNames::Gnu, LongNames::Pax] {
        let at_most = Layer::new().symlink("n".repeat(4095), "t".repeat(4095)).long_names(style);
        assert_eq!(one(&at_most.tar()).0.link.len(), 4095);
        assert!(
            refused(&Layer::new().file("n".repeat(4096), "").long_names(style).tar())
                .1
                .contains("4096 bytes")
        );
        let target = Layer::new().symlink("s", "t".repeat(4096)).long_names(style);
        assert_eq!(
            refused(&target.tar()),
            ("s".into(), "its target has 4096 bytes, and no path has more than 4095".into())
        );
    }

    for type_flag in [b'7', b'D', b'V', b'M', b'X', 0xff] {
        match read(&Archive::default().file("a", b"").typed(type_flag, "odd", b"").end()).map(|_| ()) {
            Err(Error::UnknownType { name, type_flag: found }) => {
                assert_eq!((&*name, found), ("odd", type_flag))
            }
            other => panic!("{other:?}"),
        }
    }
    let large = |block: &mut [u8]| {
        block[156] = b'L';
        block[124..135].copy_from_slice(b"77777777777");
    };
    let error = read(&Archive::default().add("long", b"", large).end()).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Limit { value: 0o77777777777, limit: MAX_EXTENSION, .. }), "{error}");
}

#[test]
fn what_is_no_tar_is_refused_with_its_place() {
    let (entry, why) = refused(&[b'x'; 1024]);
    assert!(entry.is_empty() && why.contains("checksum"), "{why}");
    let mut tar = Archive::default().file("a", b"").file("b", b"").end();
    tar[BLOCK + 3] ^= 1;
    match read(&tar).map(|_| ()).unwrap_err() {
        Error::BadTar { offset: 512, entry, .. } => assert_eq!(entry, "a"),
        other => panic!("{other}"),
    }
    let lone = [Archive::default().file("a", b"").0, vec![0; BLOCK], Archive::default().file("b", b"").end()]
        .concat();
    assert!(refused(&lone).1.contains("single zero block"));
    let dangling = Archive::default().pax(b'x', &[("uid", "1")]).end();
    assert!(refused(&dangling).1.contains("behind an extension header"));
}

#[test]
fn what_follows_the_end_is_ignored() {
    let tar = [Archive::default().file("a", b"x").end(), vec![7; 5000]].concat();
    assert_eq!(read(&tar).unwrap().len(), 1);
    assert_eq!(read(&[0; 512]).unwrap().len(), 0);
}

#[test]
fn every_truncation_is_an_error() {
    let mut archives = sparse_archives();
    archives
        .push(("files", Archive::default().pax(b'x', &[("uid", "1")]).file("a", b"x").file("b", b"").end()));
    for (version, tar) in archives {
        for len in 0..tar.len() - 2 * BLOCK + 1 {
            match read(&tar[..len]).map(|_| ()).unwrap_err() {
                Error::Truncated { offset, .. } => assert_eq!(offset, len as u64, "{version}"),
                other => panic!("{version}, {len} bytes: {other}"),
            }
        }
    }
}
