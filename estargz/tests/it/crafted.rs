//! Blobs that want to do harm.

use estargz::Compression::Gzip;
use estargz::{Error, Kind, Limits, decode_member};
use flate2::{Compress, Compression, FlushCompress};
use serde_json::{Value, json};
use support::estargz::{Built, Encoder, footer};
use support::layer::Layer;

use crate::{alloc, digest, open};

const MIB: usize = 1 << 20;

fn layer() -> Layer {
    Layer::new().dir("etc").file("etc/passwd", "root:x:0:0").noise("big", 10_000, 1)
}

/// What becomes of a blob that its manifest vouches for.
fn outcome(built: &Built) -> Result<(), Error> {
    let limits = Limits::default();
    for speculative in [0, 1 << 20] {
        let (result, peak) = alloc::peak(|| {
            open(&built.blob, speculative, &limits)?.verify(&digest(&built.toc_digest), &limits)
        });
        assert!(
            peak < 4 * MIB,
            "{peak} bytes for {} of blob and {} of TOC",
            built.blob.len(),
            built.toc_json.len()
        );
        result?;
    }
    Ok(())
}

fn with_footer(offset: u64) -> Result<(), Error> {
    outcome(&Encoder::new().footer_offset(offset).encode(&layer()))
}

#[test]
fn footers_that_point_elsewhere() {
    let honest = Encoder::new().encode(&layer());
    outcome(&honest).unwrap();
    let size = honest.size;
    for offset in [size - 51, size - 50, size, size + 1, i64::MAX as u64, 1 << 63, u64::MAX] {
        let error = with_footer(offset).unwrap_err();
        assert!(matches!(error, Error::BadToc { offset: o, .. } if o == offset), "{error}");
    }
    for offset in [0, 1, honest.toc_offset - 1, honest.toc_offset + 1, size - 52] {
        let error = with_footer(offset).unwrap_err();
        assert!(matches!(error, Error::BadToc { offset: o, .. } if o == offset), "{error}");
    }
    let text = Encoder::new().raw_toc_member("no gzip").encode(&layer());
    assert!(matches!(outcome(&text), Err(Error::BadToc { .. })));
    let empty = Encoder::new().raw_toc_member("").encode(&layer());
    assert!(matches!(outcome(&empty), Err(Error::BadToc { .. })));
    let plain = layer().tar_gzip();
    assert!(matches!(open(&plain, 1 << 20, &Limits::default()), Err(Error::NotEstargz { .. })));
}

/// A gzip member of `start` and then `mib` MiB of zeros, made without compressing them all.
fn bomb(start: &[u8], mib: usize) -> Vec<u8> {
    let mut deflate = Compress::new(Compression::best(), false);
    let mut block = |data: &[u8]| {
        let mut out = Vec::with_capacity(data.len() + 1000);
        // A full flush forgets what came before, so the block can be repeated.
        deflate.compress_vec(data, &mut out, FlushCompress::Full).unwrap();
        assert_eq!(deflate.total_in() as usize % data.len(), start.len() % data.len());
        out
    };
    let start = block(start);
    let zeros = block(&vec![0; MIB]);
    [b"\x1f\x8b\x08\0\0\0\0\0\0\xff", &start[..], &zeros.repeat(mib)].concat()
}

/// The tar header of a TOC of `size` bytes.
fn header(size: usize) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..17].copy_from_slice(b"stargz.index.json");
    header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    header[148..157].copy_from_slice(b"        0");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[test]
fn toc_bombs_are_not_inflated() {
    let blob = |member: Vec<u8>| [member, footer(0)].concat();
    let limits = Limits::default();
    let honest = blob(bomb(&header(1024 * MIB), 1024));
    assert!(honest.len() < 3 * MIB);
    let (result, peak) = alloc::peak(|| open(&honest, u64::MAX, &limits));
    assert!(matches!(result, Err(Error::Limit { value, .. }) if value == 1024 * MIB as u64));
    assert!(peak < MIB, "{peak}");

    // The same behind a small TOC: it is never reached.
    let json = br#"{"version":1,"entries":[]}"#;
    let hidden = blob(bomb(&[&header(json.len()), &json[..]].concat(), 1024));
    let (result, peak) = alloc::peak(|| open(&hidden, u64::MAX, &limits).unwrap());
    assert_eq!(result.bytes(), json);
    assert!(peak < MIB, "{peak}");

    // A small blob that claims as much as the limit allows.
    let boast = blob(bomb(&header(limits.toc_json_bytes as usize), 1));
    let (result, peak) = alloc::peak(|| open(&boast, u64::MAX, &limits));
    assert!(matches!(result, Err(Error::BadToc { .. })), "{result:?}");
    assert!(peak < MIB, "{peak}");
}

#[test]
fn member_bombs_are_not_inflated() {
    let bomb = bomb(b"x", 1024);
    let spec =
        |inner_offset, size| estargz::ChunkSpec { inner_offset, size, digest: estargz::Digest::of(b"x") };
    let (result, peak) = alloc::peak(|| decode_member(Gzip, &bomb, &[spec(0, 1)], &Limits::default()));
    assert_eq!(result.unwrap()[0].data(), "x");
    assert!(peak < 128 << 10, "{peak}");
    let (result, peak) =
        alloc::peak(|| decode_member(Gzip, &bomb, &[spec(20 << 20, 100)], &Limits::default()));
    assert!(matches!(result, Err(Error::ChunkDigestMismatch { .. })));
    assert!(peak < 128 << 10, "{peak}");
    let (result, _) = alloc::peak(|| decode_member(Gzip, &bomb, &[spec(1 << 30, 1)], &Limits::default()));
    assert!(matches!(result, Err(Error::Limit { .. })));
}

/// Rows are: no-prefetch landmark, etc/, etc/passwd, big.
fn edited(edit: impl Fn(&mut Vec<Value>) + Send + Sync + 'static) -> Result<(), Error> {
    outcome(
        &Encoder::new().edit_toc(move |toc| edit(toc["entries"].as_array_mut().unwrap())).encode(&layer()),
    )
}

#[test]
fn crafted_entries() {
    edited(|_| {}).unwrap();
    type Edit = fn(&mut Vec<Value>);
    let edits: [(&str, &str, Edit); 17] = [
        ("../../etc/shadow", "`..`", |rows| rows[2]["name"] = "../../etc/shadow".into()),
        ("/../x", "`..`", |rows| rows[1]["name"] = "/../x".into()),
        ("a\0b", "NUL", |rows| rows[2]["name"] = "a\0b".into()),
        ("self", "circle", |rows| rows.push(json!({"name": "self", "type": "hardlink", "linkName": "self"}))),
        ("one", "circle", |rows| {
            rows.push(json!({"name": "one", "type": "hardlink", "linkName": "two"}));
            rows.push(json!({"name": "two", "type": "hardlink", "linkName": "/one"}));
        }),
        ("out", "does not exist", |rows| {
            rows.push(json!({"name": "out", "type": "hardlink", "linkName": "../big"}));
        }),
        ("dir", "directory", |rows| rows.push(json!({"name": "dir", "type": "hardlink", "linkName": "etc"}))),
        ("etc", "not a directory", |rows| rows[1]["type"] = "fifo".into()),
        ("etc/passwd", "socket", |rows| rows[2]["type"] = "socket".into()),
        ("big", "size is -1", |rows| rows[3]["size"] = (-1).into()),
        ("big", "offset is -512", |rows| rows[3]["offset"] = (-512).into()),
        ("big", "cover 9999 of 10000", |rows| rows[3]["chunkSize"] = 9999.into()),
        ("big", "chunk of 10001 bytes", |rows| rows[3]["chunkSize"] = 10_001.into()),
        ("big", "overlap", |rows| {
            let chunk = json!({"name": "big", "type": "chunk", "offset": 9, "chunkOffset": 9999});
            rows.push(chunk);
        }),
        ("big", "overlaps another", |rows| rows[3]["offset"] = rows[2]["offset"].clone()),
        ("big", "TOC is at", |rows| rows[3]["offset"] = 1_000_000_000_000_i64.into()),
        ("etc/passwd", "no digest", |rows| {
            rows[2].as_object_mut().unwrap().retain(|key, _| !key.to_lowercase().ends_with("digest"));
        }),
    ];
    for (name, part, edit) in edits {
        match edited(edit) {
            Err(Error::BadEntry { name: n, why }) => assert!(n == name && why.contains(part), "{n:?}: {why}"),
            other => panic!("{other:?}, not {part}"),
        }
    }
    let huge = edited(|rows| rows[3]["size"] = i64::MAX.into()).unwrap_err();
    assert!(matches!(huge, Error::Limit { value, .. } if value == i64::MAX as u64), "{huge}");
    edited(|rows| rows[2]["name"] = "/etc/./passwd".into()).unwrap();
}

#[test]
fn nesting() {
    let deep = |depth: usize| {
        Encoder::new().edit_toc(move |toc| {
            let row = json!({"name": "d/".repeat(depth), "type": "dir"});
            toc["entries"].as_array_mut().unwrap().push(row);
        })
    };
    outcome(&deep(1024).encode(&layer())).unwrap();
    assert!(matches!(outcome(&deep(500_000).encode(&layer())), Err(Error::Limit { value: 1025, .. })));
    let nested = format!(r#"{{"version":1,"x":{}"#, "[".repeat(500_000));
    assert!(matches!(outcome(&Encoder::new().raw_toc(nested).encode(&layer())), Err(Error::BadJson { .. })));
}

#[test]
fn a_million_entries_are_the_limit_and_cost_what_is_documented() {
    let limits = Limits { path_depth: 1_000_000, ..Limits::default() };
    // The shortest way to a million names: directories that paths imply.
    let path = |first: usize| format!(r#"{{"type":"dir","name":"{first}/{}"}}"#, "a/".repeat(999));
    for (paths, fits) in [(999, true), (1001, false)] {
        let rows: Vec<_> = (0..paths).map(path).collect();
        let toc = format!(r#"{{"version":1,"entries":[{}]}}"#, rows.join(","));
        let built = Encoder::new().raw_toc(toc).encode(&Layer::new());
        let json = open(&built.blob, 1 << 20, &limits).unwrap();
        let (result, peak) = alloc::peak(|| json.parse(&limits));
        assert!(peak < 2048 * limits.entries as usize, "{peak}");
        match result {
            Ok(toc) => assert!(fits && toc.inodes().len() == paths * 1000 + 1),
            Err(error) => assert!(!fits && matches!(error, Error::Limit { value: 1_000_001, .. }), "{error}"),
        }
    }
}

#[test]
fn texts_that_are_copied_to_many_inodes_are_counted() {
    let name = "n".repeat(255);
    let row = |at: usize| format!(r#"{{"name":"{at}/x","type":"reg","size":1,"offset":{at}}}"#);
    let mut rows: Vec<_> = (1..10_000).map(row).collect();
    rows[0].insert_str(1, &format!(r#""userName":"{name}","groupName":"{name}","#));
    let toc = format!(r#"{{"version":1,"entries":[{}]}}"#, rows.join(","));
    let built = Encoder::new().raw_toc(toc).footer_offset(1 << 20).encode(&Layer::new());
    let blob = [&vec![0; 1 << 20][..], &built.blob[built.toc_offset as usize..]].concat();
    let json = open(&blob, 1 << 20, &Limits::default()).unwrap();
    let (toc, peak) = alloc::peak(|| json.parse(&Limits::default()).unwrap());
    assert_eq!(toc.inodes().len(), 2 * 9999 + 1);
    assert_eq!(toc.inodes()[19_998].user_name, name);
    // 9,999 entries and as many implied names.
    assert!(peak < json.bytes().len() + 2 * 2048 * 9999, "{peak}");
}

#[test]
fn forgeries_do_not_verify() {
    let forged = Encoder::new().forge_toc(|toc| toc["entries"][2]["uid"] = 1.into()).encode(&layer());
    assert!(matches!(outcome(&forged), Err(Error::TocDigestMismatch { .. })));

    let limits = Limits::default();
    let forged = Encoder::new().forge_payload("etc/passwd", "root::0:0:").encode(&layer());
    let toc =
        open(&forged.blob, 1 << 20, &limits).unwrap().verify(&digest(&forged.toc_digest), &limits).unwrap();
    let decode = |path| {
        let inode = &toc.inodes()[toc.lookup(path).unwrap() as usize];
        assert_eq!(inode.kind, Kind::Regular);
        let chunk = toc.chunks()[inode.chunks.start as usize];
        let member = toc.members()[chunk.member as usize];
        let bytes = &forged.blob[member.offset as usize..member.end as usize];
        decode_member(Gzip, bytes, &[chunk.spec().unwrap()], &limits)
    };
    assert!(matches!(decode("etc/passwd"), Err(Error::ChunkDigestMismatch { .. })));
    assert!(decode("big").is_ok());
}
