//! Fuzz targets, kept here so that the fuzzer and the tests run the same code. Not part of the API.
//!
//! The contract of every target: errors are fine; panics, wrong results and oversize allocations are bugs. A run
//! under [`limits`] never has more memory allocated than [`TARGETS`] says.

use std::io::{self, Read, Write};
use std::num::NonZero;

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;

use crate::writer::{self, Dialect, Pattern, Target as Form};
use crate::{
    ChunkSpec, Compression, Content, DecodedMember, Digest, Error, Format, Kind, Limits, Opener, Position,
    Step, TarSplit, Toc, TocJson, decode_member, headers, inflate,
};

/// Limits small enough that a fuzzer reaches them.
pub fn limits() -> Limits {
    Limits {
        toc_compressed_bytes: 256 << 10,
        toc_json_bytes: 1 << 20,
        entries: 2000,
        name_bytes: 64,
        path_depth: 64,
        link_target_bytes: 512,
        xattr_bytes: 1024,
        chunk_bytes: 64 << 10,
        member_bytes: 512 << 10,
        link_depth: 16,
        tar_split_bytes: 256 << 10,
        tar_split_line_bytes: 4 << 10,
    }
}

/// A target: its name, the function, and the most bytes a run on an input of the given length may have allocated
/// at a time.
pub type Target = (&'static str, fn(&[u8]), fn(usize) -> usize);

/// All targets. The ceilings follow from [`limits`] and the costs that [`Limits`] documents.
pub const TARGETS: [Target; 7] = [
    ("footer", footer, opening),
    ("blob", blob, opening),
    ("toc", toc, parsing),
    ("member", member, decoding),
    ("whole", whole, decoding_all),
    ("tar_split", tar_split, summing),
    ("writer_tar", writer_tar, writing),
];

/// The JSON is held twice by the target itself.
fn opening(len: usize) -> usize {
    let json = (limits().toc_json_bytes as usize).min(ZSTD_RATIO * len);
    len + DECODER + parsing(json)
}

/// An entry, or a name that a path implies, takes two bytes of JSON at least.
fn parsing(json: usize) -> usize {
    2 * json + 2048 * (limits().entries as usize).min(json / 2 + 1) + (64 << 10)
}

fn decoding(len: usize) -> usize {
    len + limits().chunk_bytes as usize + DECODER
}

/// A growing buffer is held twice while it is moved. What headers become takes some multiple of their blocks, and an
/// extension's records are held along with it.
fn decoding_all(len: usize) -> usize {
    len + 16 * limits().member_bytes as usize + DECODER
}

/// The target compresses its input; a growing line is held twice while it is moved.
fn summing(len: usize) -> usize {
    len + 3 * limits().tar_split_line_bytes as usize + 2 * DECODER
}

/// Members are allocated here and freed elsewhere, so all that the output's limit lets through counts, with rows that
/// repeat a long name; and the spool holds what a compressed input unpacks to.
fn writing(len: usize) -> usize {
    (128 << 20) + 2 * 1032 * len
}

const DECODER: usize = 128 << 10;

/// zstd cannot do better: a block of 128 KiB from four bytes.
const ZSTD_RATIO: usize = 32 << 10;

const COMPRESSIONS: [Compression; 2] = [Compression::Gzip, Compression::Zstd];

/// `data` is the end of a blob of various sizes.
pub fn footer(data: &[u8]) {
    let len = data.len() as u64;
    for size in [len, len + 1, 1 << 20, 1 << 40, i64::MAX as u64, u64::MAX] {
        let Ok(mut opener) = Opener::new(size, Limits { toc_compressed_bytes: u64::MAX, ..limits() }) else {
            assert!(size <= 72);
            continue;
        };
        let tail = opener.tail(len);
        assert!(tail.end == size && tail.start < size && size - tail.start >= len.min(size));
        if size < len {
            continue;
        }
        if let Ok(Step::Need(range)) = opener.feed(size - len, data) {
            assert!(range.start < range.end && range.end <= size, "{range:?}");
            assert!(range.start < size - len, "{range:?} has arrived already");
        }
    }
}

/// `data` is a whole blob.
pub fn blob(data: &[u8]) {
    let size = data.len() as u64;
    let open = |speculative| {
        let mut opener = Opener::new(size, limits())?;
        let mut range = opener.tail(speculative);
        for _ in 0..2 {
            match opener.feed(range.start, &data[range.start as usize..range.end as usize])? {
                Step::Need(next) => range = next,
                Step::Done(json) => return Ok(json),
            }
        }
        panic!("{range:?} still needed");
    };
    let whole: Result<TocJson, Error> = open(size);
    assert_eq!(whole, open(0), "the tail's length makes a difference");
    assert_eq!(whole, open(size / 2), "the tail's length makes a difference");
    if let Ok(json) = whole {
        assert!(json.toc_offset() < size);
        parse(&json);
    }
}

/// `data` is TOC JSON.
pub fn toc(data: &[u8]) {
    for format in [Format::EStargz, Format::ZstdChunked] {
        parse(&TocJson::new(format, 1 << 40, data.to_vec()));
    }
}

fn parse(json: &TocJson) {
    let parsed = json.parse(&limits());
    if let Ok(toc) = &parsed {
        check(toc);
    }
    let verified = json.clone().verify(&json.digest(), &limits());
    match (&parsed, &verified) {
        (Ok(toc), Ok(verified)) => assert_eq!(toc, &**verified),
        (Ok(_), Err(error)) => assert!(matches!(error, Error::BadEntry { .. }), "{error}"),
        (Err(_), Ok(_)) => panic!("verified what cannot be parsed"),
        (Err(_), Err(_)) => {}
    }
    if let Some(stored) = json.stored_digest() {
        let by_stored = json.clone().verify(&stored, &limits());
        assert_eq!(by_stored.as_deref(), verified.as_deref(), "the two digests make a difference");
    }
    if let Ok(toc) = verified {
        assert!(toc.chunks().iter().all(|chunk| chunk.digest.is_some()));
    }
    let mut other = *json.digest().as_bytes();
    other[0] ^= 1;
    let refused = json.clone().verify(&Digest::from_bytes(other), &limits());
    assert!(matches!(refused, Err(Error::TocDigestMismatch { .. })));
}

/// `data` is a member, of which nothing is known.
pub fn member(data: &[u8]) {
    let nothing = Digest::from_bytes([0; 32]);
    let places = [(0, 1), (0, 4096), (512, 100), (3000, 60_000), (500_000, 1), (u64::MAX, u64::MAX)];
    let cases = COMPRESSIONS.into_iter().flat_map(|compression| places.map(|place| (compression, place)));
    for (compression, (inner_offset, size)) in cases {
        let spec = ChunkSpec { inner_offset, size, digest: nothing };
        match decode_member(compression, data, &[spec], &limits()) {
            Ok(_) => panic!("{spec:?} was verified"),
            Err(Error::ChunkDigestMismatch { actual, .. }) => {
                let right = ChunkSpec { digest: actual, ..spec };
                let chunks = decode_member(compression, data, &[right], &limits()).unwrap_or_default();
                assert_eq!(chunks.iter().map(|chunk| Digest::of(chunk.data())).collect::<Vec<_>>(), [actual]);
            }
            Err(_) => {}
        }
    }
    let spec = ChunkSpec { inner_offset: 0, size: data.len() as u64, digest: Digest::of(data) };
    assert!(spec.verify(Bytes::copy_from_slice(data)).is_ok());
}

/// `data` is a member with headers in it, of which nothing is known; or its decompressed bytes.
pub fn whole(data: &[u8]) {
    let limits = limits();
    for compression in COMPRESSIONS {
        let Ok(member) = DecodedMember::decode(compression, data, &limits) else { continue };
        let all = inflate::members(compression, data, limits.member_bytes);
        assert!(all.is_ok_and(|all| all.len() as u64 >= member.len() && member.len() <= limits.member_bytes));
        let nothing = Digest::from_bytes([0; 32]);
        let spec = ChunkSpec { inner_offset: 0, size: member.len(), digest: nothing };
        let Err(Error::ChunkDigestMismatch { actual, .. }) = member.chunk(spec) else {
            panic!("a chunk was verified")
        };
        assert!(member.chunk(ChunkSpec { digest: actual, ..spec }).is_ok());
        let _ = member.headers(0..member.len());
    }
    let mut tar = data.to_vec();
    seal(&mut tar);
    for entry in headers::read(&tar).unwrap_or_default() {
        assert!(entry.mode <= 0o7777 && !entry.name.is_empty());
        assert!(entry.xattrs.array_windows().all(|[(one, _), (other, _)]| one < other));
        assert_eq!(entry.size == 0, entry.content == Content::None);
    }
}

/// Makes checksums right: no mutation finds them, and behind a wrong one nothing is read.
fn seal(tar: &mut [u8]) {
    for block in tar.as_chunks_mut::<512>().0 {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// `data` is a tar-split, compressed or not.
pub fn tar_split(data: &[u8]) {
    let limits = limits();
    let length = |stored: &[u8], json: u64| {
        let position = Position { offset: 1, stored: stored.len() as u64, json };
        let split = TarSplit { position, digest: None };
        let range = split.range(u64::MAX, &limits)?;
        assert!(range.end - range.start == stored.len() as u64 && json <= limits.tar_split_bytes);
        split.tar_length(stored, None, &limits)
    };
    let sizes: Vec<u64> = (0..19).map(|bits| (1 << bits) - 1).collect();
    let fits = sizes.iter().filter(|&&json| length(data, json).is_ok()).count();
    assert!(fits <= 1, "one tar-split has several lengths");
    let Ok(stored) = zstd::encode_all(data, 1) else { return };
    let whole = length(&stored, data.len() as u64);
    assert!(whole.as_ref().map_or(true, |&length| length <= i64::MAX as u64));
    let wrong = Digest::of(&[0]);
    let split =
        TarSplit { position: Position { offset: 0, stored: 1, json: data.len() as u64 }, digest: None };
    assert!(split.tar_length(&stored, Some(wrong), &limits).is_err());
    // Frames that follow one another are added up, if none ends within a line.
    if let Ok(length_of_one) = whole
        && data.ends_with(b"\n")
        && let Ok(twice) = length(&[&stored[..], &stored].concat(), 2 * data.len() as u64)
    {
        assert_eq!(twice, 2 * length_of_one);
    }
}

/// `data` is a layer, compressed or not.
pub fn writer_tar(data: &[u8]) {
    let mut data = data.to_vec();
    seal(&mut data);
    // Half of all inputs are reordered, and half become zstd:chunked.
    let dice = Digest::of(&data);
    let front = || vec![Pattern::path("etc/passwd"), Pattern::path("link")];
    let (target, prioritized) = match dice.as_bytes()[0] {
        0..64 => (Form::EStargz, vec![]),
        64..128 => (Form::EStargz, front()),
        128..192 => (Form::ZstdChunked(Dialect::Podman), vec![]),
        192.. => (Form::ZstdChunked(Dialect::Stargz), front()),
    };
    let min_chunk_size = if target == Form::EStargz { 1500 } else { 0 };
    let build = |layer: &[u8]| {
        let options = writer::Options {
            target,
            chunk_size: 1000,
            min_chunk_size,
            level: writer::Level::new(1)?,
            prioritized: prioritized.clone(),
            threads: NonZero::<usize>::MIN,
            ..writer::Options::default()
        };
        let mut blob = Short(Vec::new());
        let spool = || Ok(io::Cursor::new(Vec::new()));
        writer::convert(layer, &mut blob, &options, spool, &()).map(|summary| (blob.0, summary))
    };
    let Ok((blob, summary)) = build(&data) else { return };
    assert_eq!((blob.len() as u64, Digest::of(&blob)), (summary.blob_size, summary.blob_digest));
    let mut tar = Vec::new();
    let read = match target {
        Form::EStargz => MultiGzDecoder::new(&blob[..]).read_to_end(&mut tar),
        Form::ZstdChunked(_) => zstd::Decoder::new(&blob[..]).and_then(|mut all| all.read_to_end(&mut tar)),
    };
    assert!(read.is_ok_and(|len| len as u64 == summary.uncompressed_size));
    assert_eq!(Digest::of(&tar), summary.diff_id);

    // It opens; but a tar may hold what no tree can, such as a file below a file.
    let opened =
        Opener::new(summary.blob_size, Limits::default()).and_then(|mut opener| opener.feed(0, &blob));
    let Ok(Step::Done(json)) = opened else { panic!("{opened:?}") };
    match json.verify(&summary.toc_digest, &Limits::default()) {
        Ok(toc) => {
            check(&toc);
            assert_eq!(toc.lossy_names(), summary.lossy_names > 0);
            let compression = toc.format().compression();
            for chunk in toc.chunks() {
                let member = toc.members()[chunk.member as usize];
                let bytes = &blob[member.offset as usize..member.end as usize];
                let spec = chunk.spec().unwrap_or_else(|| panic!("{chunk:?} has no digest"));
                assert!(decode_member(compression, bytes, &[spec], &Limits::default()).is_ok(), "{chunk:?}");
            }
        }
        Err(Error::BadEntry { .. } | Error::Limit { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    match build(&blob) {
        Ok((again, _)) => assert_eq!(Digest::of(&again), summary.blob_digest, "not the same again"),
        Err(error) => panic!("{error}"),
    }
}

/// An output that is soon full: a sparse file may have 2^63 bytes.
struct Short(Vec<u8>);

impl Write for Short {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() > 64 << 10 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Panics unless a TOC has the properties that its documentation promises.
pub fn check(toc: &Toc) {
    let inodes = toc.inodes();
    assert_eq!(inodes[0].kind, Kind::Directory);
    let mut names = vec![0; inodes.len()];
    let mut chunks = 0;
    for (number, inode) in inodes.iter().enumerate() {
        let is = |kind| inode.kind == kind;
        assert!(inode.mode <= 0o7777 && inode.mtime.nanos < 1_000_000_000);
        assert!(is(Kind::Directory) || inode.children.is_empty() && !inode.implied);
        assert!(is(Kind::Symlink) != inode.link_target.is_empty());
        assert!(is(Kind::Regular) || inode.chunks.is_empty() && inode.digest.is_none());
        assert!(is(Kind::Regular) || inode.size == inode.link_target.len() as u64);
        assert!(inode.xattrs.is_sorted_by(|one, other| one.0 < other.0));
        assert!(inode.children.is_sorted_by(|one, other| one.0 < other.0));
        for (name, child) in &inode.children {
            assert!(!name.is_empty() && *name != b"." && *name != b"..");
            assert!(!name.contains(&b'/') && !name.contains(&0));
            names[*child as usize] += 1;
        }

        if !inode.chunks.is_empty() {
            assert_eq!(inode.chunks.start, chunks, "chunks are not grouped in the order of inodes");
            chunks = inode.chunks.end;
        }
        let mut covered = 0;
        for chunk in &toc.chunks()[inode.chunks.start as usize..inode.chunks.end as usize] {
            assert_eq!((chunk.inode as usize, chunk.file_offset), (number, covered));
            assert!(chunk.size > 0);
            covered += chunk.size;
        }
        assert!(!is(Kind::Regular) || covered == inode.size);
    }
    assert_eq!(chunks as usize, toc.chunks().len());

    for (inode, names) in inodes.iter().zip(&names).skip(1) {
        let subdirectories = |inode: &crate::Inode| {
            inode.children.iter().filter(|(_, child)| inodes[*child as usize].kind == Kind::Directory).count()
        };
        if inode.kind == Kind::Directory {
            assert_eq!((*names, inode.nlink as usize), (1, 2 + subdirectories(inode)));
        } else {
            assert_eq!(inode.nlink, *names);
        }
    }
    assert_eq!(names[0], 0, "the root is below something");

    // Depth-first numbering: whoever walks the tree meets the numbers in order.
    let mut next = 0;
    let mut path = vec![0];
    while let Some(number) = path.pop() {
        if number == next {
            next += 1;
            path.extend(inodes[number as usize].children.iter().rev().map(|(_, child)| *child));
        } else {
            assert!(number < next && inodes[number as usize].kind != Kind::Directory);
        }
    }
    assert_eq!(next as usize, inodes.len());

    let mut end = 0;
    for member in toc.members() {
        assert!(member.offset >= end && member.offset < member.end);
        end = member.end;
    }
    assert!(end <= toc.toc_offset());
    let mut places: Vec<_> =
        toc.chunks().iter().map(|chunk| (chunk.member, chunk.inner_offset, chunk.size)).collect();
    places.sort();
    assert!(places.last().is_none_or(|last| (last.0 as usize) < toc.members().len()));
    assert!(places.is_sorted_by(|one, other| one.0 < other.0 || one.1 + one.2 <= other.1));
}
