//! An eStargz and stargz encoder for tests: the same bytes a build with the Go writer means, from a [`Layer`].
//!
//! Mechanism: headers and payloads of the tar run through a chain of gzip members. Before each payload, and before
//! each chunk of it, the current member is flushed and, unless it is shorter than the wanted minimum, closed; so a
//! member holds a chunk (or several), the padding after it and all headers up to the next payload. The table of
//! contents (TOC) is a member of its own that holds a tar with `stargz.index.json`, then comes the footer. The tar
//! before the TOC is not ended by zero blocks, the one in the TOC's member is.
//!
//! Source of the rules: the eStargz document of containerd/stargz-snapshotter (`docs/estargz.md`) and the behaviour
//! of its writer (`estargz/estargz.go`, `build.go`, `types.go`, `gzip.go`, v0.18): which keys are written, when
//! they are omitted, and in what order.
//!
//! Forgery is part of the job: the TOC, the footer's offset and payloads can be altered, see [`Encoder::edit_toc`]
//! and its neighbours.

mod toc;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::Write;
use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::layer::{Body, Entry, Layer, clean, end_of_archive, header_blocks, padding};
use crate::registry::LAYER_GZIP;
use crate::sha256_digest;
use toc::{Row, Toc, changed};
pub(crate) use toc::{lossy, rfc3339, to_json};

/// Name of the TOC's file inside its tar.
pub const TOC_NAME: &str = "stargz.index.json";
/// Name of the file that ends the part of the blob worth fetching before it is asked for.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// Name of the file that says that no part is.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
/// Key of the layer annotation that carries the TOC's digest.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Key of the layer annotation that carries the length of the decompressed blob.
pub const UNCOMPRESSED_SIZE_ANNOTATION: &str = "io.containers.estargz.uncompressed-size";

/// Length of the eStargz footer: header 10, XLEN 2, subfield 4 + 22, empty stored block 5, trailer 8.
pub const FOOTER_BYTES: usize = 51;
/// Length of the stargz footer, which has no subfield header.
pub const LEGACY_FOOTER_BYTES: usize = 47;

/// Which landmark the blob gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Landmark {
    /// None; entries stay as they are, also those listed twice, as when the writer is fed directly.
    None,
    /// `.no.prefetch.landmark` in front of everything; of entries listed twice only the last stays, as in a build
    /// without prioritized files.
    #[default]
    NoPrefetch,
    /// The named paths first, each after its parents and, for a hard link, its target; then `.prefetch.landmark`;
    /// then the rest. Of entries listed twice only the last stays.
    Prefetch(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Footer {
    EStargz,
    Legacy,
}

/// Which digest [`Built::toc_digest`] tells after the TOC was edited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Announced {
    Edited,
    Original,
}

type Edit = Arc<dyn Fn(&mut Value) + Send + Sync>;

/// Settings of an encoding; [`Encoder::encode`] may be used many times.
#[derive(Clone)]
pub struct Encoder {
    chunk_size: u64,
    min_chunk_size: u64,
    level: u32,
    landmark: Landmark,
    footer: Footer,
    digests: bool,
    edits: Vec<(Edit, Announced)>,
    raw_toc: Option<Vec<u8>>,
    raw_toc_member: Option<Vec<u8>>,
    footer_offset: Option<u64>,
    forged: BTreeMap<Vec<u8>, Bytes>,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder")
            .field("chunk_size", &self.chunk_size)
            .field("min_chunk_size", &self.min_chunk_size)
            .field("level", &self.level)
            .field("landmark", &self.landmark)
            .field("footer", &self.footer)
            .field("edits", &self.edits.len())
            .finish_non_exhaustive()
    }
}

impl Default for Encoder {
    fn default() -> Encoder {
        Encoder {
            chunk_size: 4 << 20,
            min_chunk_size: 0,
            level: 6,
            landmark: Landmark::default(),
            footer: Footer::EStargz,
            digests: true,
            edits: Vec::new(),
            raw_toc: None,
            raw_toc_member: None,
            footer_offset: None,
            forged: BTreeMap::new(),
        }
    }
}

impl Encoder {
    /// eStargz with chunks of 4 MiB, each in a member of its own, and a no-prefetch landmark.
    pub fn new() -> Encoder {
        Encoder::default()
    }

    /// Largest number of bytes of a file in one chunk.
    pub fn chunk_size(mut self, bytes: u64) -> Encoder {
        assert!(bytes > 0, "chunks of 0 bytes never end");
        self.chunk_size = bytes;
        self
    }

    /// Compressed bytes a member must have before the next chunk starts a new one; 0 gives every chunk its own.
    pub fn min_chunk_size(mut self, bytes: u64) -> Encoder {
        self.min_chunk_size = bytes;
        self
    }

    /// Compression level, 0 to 9; 6 unless set, because the writer's 9 is slow and changes nothing else.
    pub fn level(mut self, level: u32) -> Encoder {
        self.level = level;
        self
    }

    /// Chooses the landmark and, with it, the order of the entries.
    pub fn landmark(mut self, landmark: Landmark) -> Encoder {
        self.landmark = landmark;
        self
    }

    /// Short for [`Landmark::Prefetch`].
    pub fn prioritized(self, paths: &[&str]) -> Encoder {
        self.landmark(Landmark::Prefetch(paths.iter().map(|path| (*path).to_owned()).collect()))
    }

    /// Makes stargz, the format before eStargz: its footer, no landmark, no digests in the TOC.
    pub fn legacy(mut self) -> Encoder {
        self.footer = Footer::Legacy;
        self.landmark = Landmark::None;
        self.without_digests()
    }

    /// Leaves `digest` and `chunkDigest` out of the TOC.
    pub fn without_digests(mut self) -> Encoder {
        self.digests = false;
        self
    }

    /// Edits the TOC before it is written; [`Built::toc_digest`] is that of the edited one. Keys are then written in
    /// alphabetical order.
    pub fn edit_toc(mut self, edit: impl Fn(&mut Value) + Send + Sync + 'static) -> Encoder {
        self.edits.push((Arc::new(edit), Announced::Edited));
        self
    }

    /// Edits the TOC behind the back of whoever announced its digest: [`Built::toc_digest`] stays that of the
    /// unedited one.
    pub fn forge_toc(mut self, edit: impl Fn(&mut Value) + Send + Sync + 'static) -> Encoder {
        self.edits.push((Arc::new(edit), Announced::Original));
        self
    }

    /// Writes these bytes, JSON or not, as `stargz.index.json`; [`Built::toc_digest`] is theirs.
    pub fn raw_toc(mut self, json: impl Into<Vec<u8>>) -> Encoder {
        self.raw_toc = Some(json.into());
        self
    }

    /// Writes these bytes where the TOC's compressed member belongs.
    pub fn raw_toc_member(mut self, bytes: impl Into<Vec<u8>>) -> Encoder {
        self.raw_toc_member = Some(bytes.into());
        self
    }

    /// Writes this offset into the footer instead of the TOC's.
    pub fn footer_offset(mut self, offset: u64) -> Encoder {
        self.footer_offset = Some(offset);
        self
    }

    /// Compresses other contents of the same length for the file at `path`, while the TOC keeps the digests of the
    /// true ones: sound gzip that must fail verification.
    pub fn forge_payload(mut self, path: impl AsRef<[u8]>, data: impl Into<Bytes>) -> Encoder {
        self.forged.insert(clean(path.as_ref()), data.into());
        self
    }

    /// Encodes `layer`.
    ///
    /// # Panics
    /// If a prioritized path is not in the layer, or forged contents have another length than the true ones.
    pub fn encode(&self, layer: &Layer) -> Built {
        let mut writer = Members::new(self.level);
        let mut toc = Toc { version: 1, entries: Vec::new() };
        let mut users = HashMap::new();
        let mut groups = HashMap::new();
        // start of the member chunks are collected in, in blob and in decompressed bytes
        let mut member = (0, 0);
        for entry in self.arrange(layer) {
            let payload = entry.payload();
            let mut row = self.row(&entry, &mut users, &mut groups);
            writer.write(&layer.header(&entry));
            let written = self.forged.get(&clean(&entry.name)).cloned().unwrap_or_else(|| payload.clone());
            assert_eq!(written.len(), payload.len(), "forged contents of another length");
            let landmark = matches!(row.name.as_str(), PREFETCH_LANDMARK | NO_PREFETCH_LANDMARK);
            for (index, chunk) in payload.chunks(self.chunk_size as usize).enumerate() {
                let chunk_offset = index as u64 * self.chunk_size;
                if chunk.len() as u64 == self.chunk_size {
                    row.chunk_size = self.chunk_size;
                }
                let at = writer.flush();
                if landmark && index == 0 || at - member.0 >= self.min_chunk_size {
                    member = (writer.close(), writer.raw_bytes);
                } else {
                    row.inner_offset = writer.raw_bytes - member.1;
                }
                row.offset = member.0;
                row.chunk_offset = chunk_offset;
                if self.digests {
                    row.chunk_digest = sha256_digest(chunk);
                }
                writer.write(&written[chunk_offset as usize..][..chunk.len()]);
                let next = Row { name: row.name.clone(), kind: "chunk", ..Row::default() };
                toc.entries.push(std::mem::replace(&mut row, next));
            }
            if payload.is_empty() {
                toc.entries.push(row);
            }
            writer.write(padding(payload.len()));
        }
        let toc_offset = writer.close();
        self.finish(writer, toc_offset, &toc)
    }

    /// Everything of a TOC row that does not depend on where its payload lands.
    fn row(&self, entry: &Entry, users: &mut HashMap<u32, String>, groups: &mut HashMap<u32, String>) -> Row {
        let mut row = Row {
            name: lossy(&entry.name),
            modtime: rfc3339(entry.mtime),
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            user_name: changed(users, entry.uid, &entry.user),
            group_name: changed(groups, entry.gid, &entry.group),
            xattrs: entry
                .xattrs
                .iter()
                .map(|(key, value)| (lossy(key), base64::engine::general_purpose::STANDARD.encode(value)))
                .collect(),
            ..Row::default()
        };
        match &entry.body {
            Body::Directory => row.kind = "dir",
            Body::Regular(data) => {
                row.kind = "reg";
                row.size = data.len() as u64;
                if self.digests {
                    row.digest = sha256_digest(data);
                }
            }
            Body::Symlink(target) => (row.kind, row.link_name) = ("symlink", lossy(target)),
            Body::Hardlink(target) => (row.kind, row.link_name) = ("hardlink", lossy(target)),
            Body::Char(major, minor) => (row.kind, row.dev_major, row.dev_minor) = ("char", *major, *minor),
            Body::Block(major, minor) => (row.kind, row.dev_major, row.dev_minor) = ("block", *major, *minor),
            Body::Fifo => row.kind = "fifo",
        }
        row
    }

    /// The entries in the order they are written, with the landmark.
    fn arrange(&self, layer: &Layer) -> Vec<Entry> {
        let source = layer.entries().iter().filter(|entry| clean(&entry.name) != TOC_NAME.as_bytes());
        let landmarks = [PREFETCH_LANDMARK.as_bytes(), NO_PREFETCH_LANDMARK.as_bytes()];
        let last: HashMap<Vec<u8>, usize> =
            source.clone().enumerate().map(|(index, entry)| (clean(&entry.name), index)).collect();
        let source: Vec<&Entry> = source.collect();
        let paths = match &self.landmark {
            Landmark::None => return source.into_iter().cloned().collect(),
            Landmark::NoPrefetch => [].as_slice(),
            Landmark::Prefetch(paths) => paths.as_slice(),
        };
        let mut first = Vec::new();
        let mut moved = BTreeSet::new();
        for path in paths {
            prioritize(&clean(path.as_bytes()), &source, &last, &mut moved, &mut first);
        }
        let name = match self.landmark {
            Landmark::Prefetch(_) => PREFETCH_LANDMARK,
            _ => NO_PREFETCH_LANDMARK,
        };
        let mut mark = Entry::new(name, Body::Regular(Bytes::from_static(&[0x0f])));
        (mark.mode, mark.mtime) = (0, (0, 0));
        let rest = source.iter().enumerate().filter(|(index, entry)| {
            let path = clean(&entry.name);
            last[&path] == *index && !moved.contains(index) && !landmarks.contains(&path.as_slice())
        });
        let first = first.into_iter().chain([mark]);
        first.chain(rest.map(|(_, entry)| (*entry).clone())).collect()
    }

    fn finish(&self, mut writer: Members, toc_offset: u64, toc: &Toc) -> Built {
        let original = to_json(toc);
        let mut toc_json = original.clone();
        let mut announced = Announced::Edited;
        if !self.edits.is_empty() {
            let mut value = serde_json::from_slice(&original).expect("own JSON");
            for (edit, digest) in &self.edits {
                edit(&mut value);
                if *digest == Announced::Original {
                    announced = Announced::Original;
                }
            }
            toc_json = to_json(&value);
        }
        if let Some(raw) = &self.raw_toc {
            toc_json.clone_from(raw);
        }
        match &self.raw_toc_member {
            Some(raw) => writer.out.extend_from_slice(raw),
            None => {
                let mut entry = Entry::new(TOC_NAME, Body::Regular(toc_json.clone().into()));
                (entry.mode, entry.mtime) = (0, (0, 0));
                writer.write(&header_blocks(&entry, Default::default()));
                writer.write(&toc_json);
                writer.write(padding(toc_json.len()));
                writer.write(end_of_archive());
                writer.close();
            }
        }
        let diff_id = format!("sha256:{}", crate::hex(&writer.raw_hash.clone().finalize()));
        let uncompressed_size = writer.raw_bytes;
        let offset = self.footer_offset.unwrap_or(toc_offset);
        let mut blob = writer.out;
        blob.extend_from_slice(&match self.footer {
            Footer::EStargz => footer(offset),
            Footer::Legacy => legacy_footer(offset),
        });
        let toc_digest = sha256_digest(if announced == Announced::Original { &original } else { &toc_json });
        let annotations = BTreeMap::from([
            (TOC_DIGEST_ANNOTATION.to_owned(), toc_digest.clone()),
            (UNCOMPRESSED_SIZE_ANNOTATION.to_owned(), uncompressed_size.to_string()),
        ]);
        Built {
            media_type: LAYER_GZIP,
            annotations,
            digest: sha256_digest(&blob),
            size: blob.len() as u64,
            blob: blob.into(),
            toc_json,
            toc_digest,
            toc_offset,
            diff_id,
            uncompressed_size,
        }
    }
}

/// Moves the parents of `path`, its link target and itself to the front, each once.
fn prioritize(
    path: &[u8],
    source: &[&Entry],
    last: &HashMap<Vec<u8>, usize>,
    moved: &mut BTreeSet<usize>,
    first: &mut Vec<Entry>,
) {
    if !path.is_empty() {
        let parent =
            path.iter().rposition(|byte| *byte == b'/').map_or(b"".as_slice(), |slash| &path[..slash]);
        if parent.is_empty() || last.contains_key(parent) {
            prioritize(parent, source, last, moved, first);
        }
    }
    let Some(index) = last.get(path) else {
        assert!(path.is_empty(), "prioritized path {} is not in the layer", path.escape_ascii());
        return;
    };
    if moved.contains(index) {
        return;
    }
    if let Body::Hardlink(target) = &source[*index].body {
        prioritize(&clean(target), source, last, moved, first);
    }
    moved.insert(*index);
    first.push(source[*index].clone());
}

/// The chain of gzip members written so far.
struct Members {
    /// Finished members; taken by `open` while there is one.
    out: Vec<u8>,
    open: Option<GzEncoder<Vec<u8>>>,
    level: Compression,
    raw_bytes: u64,
    raw_hash: Sha256,
}

impl Members {
    fn new(level: u32) -> Members {
        Members {
            out: Vec::new(),
            open: None,
            level: Compression::new(level),
            raw_bytes: 0,
            raw_hash: Sha256::new(),
        }
    }

    /// Writes into the current member, starting one if there is none.
    fn write(&mut self, bytes: &[u8]) {
        let Members { out, open, level, .. } = self;
        let gzip = open.get_or_insert_with(|| GzEncoder::new(std::mem::take(out), *level));
        gzip.write_all(bytes).expect("writing to memory");
        self.raw_bytes += bytes.len() as u64;
        self.raw_hash.update(bytes);
    }

    /// Pushes out what the compressor holds; returns the length of the blob so far.
    fn flush(&mut self) -> u64 {
        match &mut self.open {
            None => self.out.len() as u64,
            Some(gzip) => {
                gzip.flush().expect("writing to memory");
                gzip.get_ref().len() as u64
            }
        }
    }

    /// Ends the current member; returns the offset of the next.
    fn close(&mut self) -> u64 {
        if let Some(gzip) = self.open.take() {
            self.out = gzip.finish().expect("writing to memory");
        }
        self.out.len() as u64
    }
}

/// The eStargz footer: an empty gzip member whose extra field has one subfield `SG` with the offset.
pub fn footer(toc_offset: u64) -> Vec<u8> {
    let field = format!("{toc_offset:016x}STARGZ");
    let mut extra = b"SG".to_vec();
    extra.extend_from_slice(&(field.len() as u16).to_le_bytes());
    extra.extend_from_slice(field.as_bytes());
    empty_member(&extra)
}

/// The stargz footer: the same without the subfield's header.
pub fn legacy_footer(toc_offset: u64) -> Vec<u8> {
    empty_member(format!("{toc_offset:016x}STARGZ").as_bytes())
}

/// RFC 1952: FEXTRA, no time, unknown system (255); one final stored block; checksum and length 0.
fn empty_member(extra: &[u8]) -> Vec<u8> {
    let mut out = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255];
    out.extend_from_slice(&(extra.len() as u16).to_le_bytes());
    out.extend_from_slice(extra);
    out.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    out.extend_from_slice(&[0; 8]);
    out
}

/// An encoded layer and what an image says of it.
#[derive(Clone, Debug)]
pub struct Built {
    /// The compressed layer.
    pub blob: Bytes,
    /// The TOC as written.
    pub toc_json: Vec<u8>,
    /// Digest announced for the TOC: of the decompressed JSON, or in podman's zstd:chunked of the compressed.
    pub toc_digest: String,
    /// Offset of the TOC's member or frame, whatever the footer says.
    pub toc_offset: u64,
    /// Digest of the blob.
    pub digest: String,
    /// Digest of the decompressed blob, in eStargz TOC included.
    pub diff_id: String,
    /// Length of the blob in bytes.
    pub size: u64,
    /// Length of the decompressed blob in bytes.
    pub uncompressed_size: u64,
    /// Media type of the layer.
    pub media_type: &'static str,
    /// The annotations a build puts on the layer's descriptor.
    pub annotations: BTreeMap<String, String>,
}

impl Built {
    /// The TOC parsed.
    ///
    /// # Panics
    /// If raw bytes that are not JSON were written as the TOC.
    pub fn toc(&self) -> Value {
        serde_json::from_slice(&self.toc_json).expect("the TOC is JSON")
    }

    /// The same with one bit of the blob flipped, counted from the lowest bit of the first byte. `digest` is that of
    /// the damaged blob, all else stays.
    pub fn flip(&self, bit: u64) -> Built {
        let mut blob = self.blob.to_vec();
        blob[(bit / 8) as usize] ^= 1 << (bit % 8);
        Built { digest: sha256_digest(&blob), blob: blob.into(), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::layer::{long_path, random};

    fn sample() -> Layer {
        Layer::new()
            .dir("bin")
            .noise("bin/big", 10_000, 1)
            .mode(0o755)
            .names("root", "root")
            .file("empty", "")
            .names("root", "root")
            .dir("a")
            .dir("a/b")
            .file("a/b/first", "<first>")
            .xattr("user.k", b"\xff")
            .hardlink("link", "a/b/first")
            .char_device("null", 1, 3)
            .symlink("sym", "bin")
            .fifo("pipe")
            .file(long_path(200), vec![7; 4096])
            .file("last", "the end")
            .mtime(0)
    }

    fn gunzip_with_gzip(blob: &[u8]) -> Vec<u8> {
        let mut child =
            Command::new("gzip").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let blob = blob.to_vec();
        let feed = std::thread::spawn(move || stdin.write_all(&blob));
        let output = child.wait_with_output().unwrap();
        feed.join().unwrap().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    /// First gzip member of `blob` from `offset`, decompressed whole.
    fn inflate(blob: &[u8], offset: u64) -> Vec<u8> {
        let mut out = Vec::new();
        flate2::bufread::GzDecoder::new(&blob[offset as usize..]).read_to_end(&mut out).unwrap();
        out
    }

    fn check(layer: &Layer, encoder: &Encoder) -> Built {
        let built = encoder.encode(layer);
        let raw = gunzip_with_gzip(&built.blob);
        assert_eq!(sha256_digest(&raw), built.diff_id);
        assert_eq!(raw.len() as u64, built.uncompressed_size);
        assert_eq!(sha256_digest(&built.blob), built.digest);

        // what is decompressed is the tar of the entries in their order, not ended, and then the TOC's tar, ended
        let mut arranged = Layer::new();
        *arranged.entries_mut() = encoder.arrange(layer);
        let tar = arranged.tar();
        let toc_tar = Layer::new().file(TOC_NAME, built.toc_json.clone()).mode(0).mtime(0).tar();
        let body = &tar[..tar.len() - 1024];
        assert_eq!(raw.len(), body.len() + toc_tar.len());
        assert!(raw.starts_with(body) && raw.ends_with(&toc_tar));

        // the footer leads to the TOC
        let length = if encoder.footer == Footer::EStargz { FOOTER_BYTES } else { LEGACY_FOOTER_BYTES };
        let tail = &built.blob[built.blob.len() - length..];
        let hex_at = length - 13 - 22;
        let offset =
            u64::from_str_radix(std::str::from_utf8(&tail[hex_at..hex_at + 16]).unwrap(), 16).unwrap();
        assert_eq!(&tail[hex_at + 16..hex_at + 22], b"STARGZ");
        assert_eq!(offset, built.toc_offset);
        assert_eq!(inflate(&built.blob, offset), toc_tar);
        assert_eq!(sha256_digest(&built.toc_json), built.toc_digest);

        check_chunks(layer, &built);
        built
    }

    /// Each chunk's bytes lie where the TOC says, have the digest it says, and together give the files.
    fn check_chunks(layer: &Layer, built: &Built) {
        let toc = built.toc();
        let rows = toc["entries"].as_array().unwrap();
        let mut files: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut size = 0;
        let mut sizes = BTreeMap::new();
        for row in rows {
            let number = |key: &str| row[key].as_u64().unwrap_or(0);
            let name = clean(row["name"].as_str().unwrap().as_bytes());
            match row["type"].as_str().unwrap() {
                "reg" => {
                    size = number("size");
                    files.insert(name.clone(), Vec::new());
                    sizes.insert(name.clone(), size);
                }
                "chunk" => {}
                _ => continue,
            }
            if size == 0 {
                assert!(row.get("offset").is_none() && row.get("chunkDigest").is_none());
                continue;
            }
            let file = files.get_mut(&name).unwrap();
            assert_eq!(number("chunkOffset"), file.len() as u64);
            let length = match number("chunkSize") {
                0 => size - file.len() as u64,
                length => length,
            };
            let member = inflate(&built.blob, number("offset"));
            let chunk = &member[number("innerOffset") as usize..][..length as usize];
            if let Some(digest) = row["chunkDigest"].as_str() {
                assert_eq!(sha256_digest(chunk), digest);
            }
            file.extend_from_slice(chunk);
        }
        for (path, data) in layer.contents() {
            if let Some(found) = files.get(&path) {
                assert_eq!(found, &data.to_vec(), "{}", path.escape_ascii());
            }
        }
        for (path, size) in sizes {
            assert_eq!(files[&path].len() as u64, size);
        }
    }

    #[test]
    fn blobs_hold_what_they_promise() {
        let encoders = [
            Encoder::new(),
            Encoder::new().chunk_size(1000),
            Encoder::new().chunk_size(512).landmark(Landmark::None),
            Encoder::new().chunk_size(900).min_chunk_size(2000),
            Encoder::new().min_chunk_size(1 << 20).landmark(Landmark::None),
            Encoder::new().chunk_size(5000).prioritized(&["link", "/bin/big"]),
            Encoder::new().legacy(),
            Encoder::new().legacy().chunk_size(777),
        ];
        for encoder in &encoders {
            check(&sample(), encoder);
        }
        for seed in 0..4 {
            let layer = random(seed, 40);
            check(&layer, &Encoder::new().chunk_size(30_000));
            check(&layer, &Encoder::new().chunk_size(20_000).min_chunk_size(8000).landmark(Landmark::None));
        }
        check(&Layer::new(), &Encoder::new());
        check(&Layer::new(), &Encoder::new().landmark(Landmark::None));
    }

    #[test]
    fn footers_have_their_length_and_shape() {
        let modern = footer(0x1234);
        assert_eq!(modern.len(), FOOTER_BYTES);
        assert_eq!(&modern[..16], [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 26, 0, b'S', b'G', 22, 0]);
        assert_eq!(&modern[16..38], b"0000000000001234STARGZ");
        assert_eq!(&modern[38..], [1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(legacy_footer(1).len(), LEGACY_FOOTER_BYTES);
        for footer in [modern, legacy_footer(u64::MAX)] {
            assert_eq!(inflate(&footer, 0), b"");
        }
    }

    #[test]
    fn rows_are_written_as_go_writes_them() {
        let built = Encoder::new().chunk_size(4096).encode(&sample());
        let text = String::from_utf8(built.toc_json.clone()).unwrap();
        assert!(text.starts_with(
            "{\n\t\"version\": 1,\n\t\"entries\": [\n\t\t{\n\t\t\t\"name\": \".no.prefetch.landmark\""
        ));
        let toc = built.toc();
        let rows = toc["entries"].as_array().unwrap();
        let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
        assert_eq!(row("bin/")["type"], "dir");
        assert_eq!(row("bin/")["mode"], 0o755);
        assert_eq!(row("bin/")["modtime"], "2020-09-13T12:26:40Z");
        assert_eq!(row("bin/big")["chunkSize"], 4096);
        assert_eq!(row("bin/big")["userName"], "root");
        assert!(row("empty").get("userName").is_none());
        assert_eq!(row("empty")["digest"], sha256_digest(b""));
        assert!(row("last").get("modtime").is_none());
        assert!(row("last").get("chunkSize").is_none());
        assert_eq!(row("null")["devMajor"], 1);
        assert_eq!(row("a/b/first")["xattrs"]["user.k"], "/w==");
        assert_eq!(row("link")["linkName"], "a/b/first");
        assert_eq!(rows[0]["offset"], inflate_end(&built.blob), "the landmark has a member of its own");
        let chunks: Vec<_> = rows.iter().filter(|row| row["type"] == "chunk").collect();
        assert_eq!(chunks.len(), 2);
        assert_eq!(chunks[1]["chunkOffset"], 8192);
        assert!(chunks[1].get("chunkSize").is_none());
        assert!(!String::from_utf8(built.toc_json).unwrap().contains('<'));
        let legacy = Encoder::new().legacy().encode(&sample());
        assert!(!String::from_utf8(legacy.toc_json).unwrap().contains("igest"));
    }

    /// Length of the first member of a blob.
    fn inflate_end(blob: &[u8]) -> u64 {
        let mut decoder = flate2::bufread::GzDecoder::new(blob);
        std::io::copy(&mut decoder, &mut std::io::sink()).unwrap();
        (blob.len() - decoder.into_inner().len()) as u64
    }

    #[test]
    fn grouped_chunks_share_members() {
        let built = Encoder::new().min_chunk_size(1 << 20).encode(&sample());
        let toc = built.toc();
        let offsets: BTreeSet<u64> =
            toc["entries"].as_array().unwrap().iter().filter_map(|row| row["offset"].as_u64()).collect();
        assert_eq!(offsets.len(), 1, "all behind the landmark");
        assert!(toc["entries"].as_array().unwrap().iter().any(|row| row["innerOffset"].as_u64() > Some(512)));
    }

    #[test]
    fn prioritized_files_come_first_with_all_they_need() {
        let built = Encoder::new().prioritized(&["link"]).encode(&sample());
        let toc = built.toc();
        let names: Vec<&str> =
            toc["entries"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert_eq!(&names[..6], ["a/", "a/b/", "a/b/first", "link", PREFETCH_LANDMARK, "bin/"]);
        assert_eq!(names.len(), sample().entries().len() + 1);
    }

    #[test]
    fn forgeries_are_what_they_say() {
        let layer = sample();
        let honest = Encoder::new().encode(&layer);
        let edited = Encoder::new().edit_toc(|toc| toc["entries"][1]["uid"] = 7.into()).encode(&layer);
        assert_ne!(edited.toc_digest, honest.toc_digest);
        assert_eq!(sha256_digest(&edited.toc_json), edited.toc_digest);
        let forged = Encoder::new().forge_toc(|toc| toc["entries"][1]["uid"] = 7.into()).encode(&layer);
        assert_eq!(forged.toc_digest, honest.toc_digest);
        assert_eq!(forged.toc_json, edited.toc_json);
        let raw = Encoder::new().raw_toc("not json").encode(&layer);
        assert!(inflate(&raw.blob, raw.toc_offset)[512..].starts_with(b"not json"));
        let member = Encoder::new().raw_toc_member("x").encode(&layer);
        assert_eq!(
            &member.blob[member.toc_offset as usize..],
            ["x".as_bytes(), &footer(member.toc_offset)].concat()
        );
        let lost = Encoder::new().footer_offset(u64::MAX).encode(&layer);
        assert!(lost.blob.ends_with(&footer(u64::MAX)));
        let payload = Encoder::new().forge_payload("/last", "THE END").encode(&layer);
        assert_eq!(payload.toc()["entries"], honest.toc()["entries"]);
        assert!(gunzip_with_gzip(&payload.blob).windows(7).any(|window| window == b"THE END"));
        let flipped = honest.flip(8 * 20 + 3);
        assert_eq!(flipped.blob[20], honest.blob[20] ^ 8);
        assert_ne!(flipped.digest, honest.digest);
    }
}
