//! A zstd:chunked encoder for tests, in both dialects: the same bytes that containers/storage and stargz-snapshotter mean.
//!
//! ```text
//! podman  | headers | chunk | chunk | padding, headers | chunk | padding, end |
//!         | skippable: TOC | skippable: tar-split | skippable: footer |
//! stargz  | headers | chunk | chunk, padding, headers | chunk, padding | skippable: TOC | skippable: footer |
//! ```
//!
//! Source of the rules: containers/storage, `pkg/chunked/compressor/compressor.go` and
//! `pkg/chunked/internal/minimal/compression.go` (1.59); containerd/stargz-snapshotter, `estargz/zstdchunked` (0.18). The
//! tar-split's checksums are all zero: no reader here looks at them.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::estargz::{
    Built, NO_PREFETCH_LANDMARK, TOC_DIGEST_ANNOTATION, UNCOMPRESSED_SIZE_ANNOTATION, lossy, rfc3339, to_json,
};
use crate::layer::{Body, Entry, Layer, clean, end_of_archive, padding};
use crate::registry::LAYER_ZSTD;
use crate::sha256_digest;

/// Prefix of the annotations by containers/storage since 1.45.
pub const PREFIX: &str = "io.github.containers.zstd-chunked.";
/// Prefix of the annotations before that, and by stargz-snapshotter.
pub const OLD_PREFIX: &str = "io.containers.zstd-chunked.";

/// Whose zstd:chunked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// podman's, buildah's, skopeo's.
    Podman,
    /// ctr-remote's and nerdctl's.
    Stargz,
}

type Edit = Arc<dyn Fn(&mut Value) + Send + Sync>;

/// Settings of an encoding.
#[derive(Clone)]
pub struct ZstdEncoder {
    dialect: Dialect,
    chunk_size: u64,
    footer: usize,
    prefix: &'static str,
    edits: Vec<Edit>,
    forged: BTreeMap<Vec<u8>, Bytes>,
}

impl std::fmt::Debug for ZstdEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ZstdEncoder")
            .field("dialect", &self.dialect)
            .field("chunk_size", &self.chunk_size)
            .field("footer", &self.footer)
            .finish_non_exhaustive()
    }
}

impl ZstdEncoder {
    /// The newest form of a dialect, with chunks of 64 KiB.
    pub fn new(dialect: Dialect) -> ZstdEncoder {
        let (footer, prefix) = match dialect {
            Dialect::Podman => (64, PREFIX),
            Dialect::Stargz => (40, OLD_PREFIX),
        };
        ZstdEncoder {
            dialect,
            chunk_size: 64 << 10,
            footer,
            prefix,
            edits: Vec::new(),
            forged: BTreeMap::new(),
        }
    }

    /// Podman's dialect as containers/storage wrote it up to 1.44 (40 bytes, with the old prefix) or 1.49 (56 bytes).
    pub fn podman_before(footer: usize) -> ZstdEncoder {
        assert!(matches!(footer, 40 | 56), "there was no footer of {footer} bytes");
        let prefix = if footer == 40 { OLD_PREFIX } else { PREFIX };
        ZstdEncoder { footer, prefix, ..ZstdEncoder::new(Dialect::Podman) }
    }

    /// Bytes of a file in one chunk.
    pub fn chunk_size(mut self, bytes: u64) -> ZstdEncoder {
        self.chunk_size = bytes;
        self
    }

    /// Edits the TOC before it is written; the digests are those of the edited one.
    pub fn edit_toc(mut self, edit: impl Fn(&mut Value) + Send + Sync + 'static) -> ZstdEncoder {
        self.edits.push(Arc::new(edit));
        self
    }

    /// Compresses other contents of the same length for the file at `path`.
    pub fn forge_payload(mut self, path: impl AsRef<[u8]>, data: impl Into<Bytes>) -> ZstdEncoder {
        self.forged.insert(clean(path.as_ref()), data.into());
        self
    }

    /// Encodes `layer`.
    ///
    /// # Panics
    /// If forged contents have another length than the true ones.
    pub fn encode(&self, layer: &Layer) -> Built {
        let mut entries = layer.entries().to_vec();
        if self.dialect == Dialect::Stargz {
            let mut mark = Entry::new(NO_PREFETCH_LANDMARK, Body::Regular(Bytes::from_static(&[0x0f])));
            (mark.mode, mark.mtime) = (0, (0, 0));
            entries.insert(0, mark);
        }
        let (mut frames, mut rows) = (Frames::default(), Vec::new());
        for entry in &entries {
            frames.push_split(&layer.header(entry));
            let payload = entry.payload();
            frames.split_line(&json!({
                "type": 1, "name": lossy(&entry.name), "size": payload.len(), "payload": STANDARD.encode([0; 8]),
            }));
            let written = self.forged.get(&clean(&entry.name)).unwrap_or(&payload).clone();
            assert_eq!(written.len(), payload.len(), "forged contents of another length");
            let first = rows.len();
            rows.push(self.row(entry));
            let chunks: Vec<&[u8]> = payload.chunks(self.chunk_size as usize).collect();
            let mut at = 0;
            for (number, chunk) in chunks.iter().enumerate() {
                if number > 0 {
                    rows.push(Map::from_iter([
                        ("type".to_owned(), json!("chunk")),
                        ("name".to_owned(), json!(lossy(&entry.name))),
                        ("chunkOffset".to_owned(), json!(at)),
                    ]));
                }
                let row = rows.last_mut().expect("one was pushed");
                row.insert("offset".to_owned(), json!(frames.close()));
                frames.push(&written[at..at + chunk.len()]);
                if self.dialect == Dialect::Podman {
                    frames.close();
                }
                let zeros = chunk.iter().all(|byte| *byte == 0);
                match (self.dialect, chunks.len() > 1) {
                    (Dialect::Podman, false) => {}
                    (Dialect::Podman, true) => {
                        row.insert("chunkSize".to_owned(), json!(chunk.len()));
                        row.insert("chunkDigest".to_owned(), json!(sha256_digest(chunk)));
                        if zeros {
                            row.insert("chunkType".to_owned(), json!("zeros"));
                        }
                    }
                    (Dialect::Stargz, _) => {
                        row.insert("chunkDigest".to_owned(), json!(sha256_digest(chunk)));
                        if chunk.len() as u64 == self.chunk_size {
                            row.insert("chunkSize".to_owned(), json!(chunk.len()));
                        }
                    }
                }
                at += chunk.len();
            }
            if self.dialect == Dialect::Podman && !payload.is_empty() {
                rows[first].insert("endOffset".to_owned(), json!(frames.close()));
            }
            frames.push_split(padding(payload.len()));
        }
        if self.dialect == Dialect::Podman {
            frames.push_split(end_of_archive());
        }
        self.finish(frames, rows)
    }

    /// Everything of an entry's row that does not depend on where its payload lands.
    fn row(&self, entry: &Entry) -> Map<String, Value> {
        let mut row = Map::new();
        let mut put = |key: &str, value: Value| row.insert(key.to_owned(), value);
        put("name", json!(lossy(&entry.name)));
        put("mode", json!(entry.mode));
        put("uid", json!(entry.uid));
        put("gid", json!(entry.gid));
        put("modtime", json!(self.time(entry.mtime)));
        let xattrs = entry.xattrs.iter().map(|(key, value)| (lossy(key), json!(STANDARD.encode(value))));
        put("xattrs", Value::Object(xattrs.collect()));
        let kind = match &entry.body {
            Body::Directory => "dir",
            Body::Regular(data) => {
                put("size", json!(data.len()));
                if !data.is_empty() || self.dialect == Dialect::Stargz {
                    put("digest", json!(sha256_digest(data)));
                }
                "reg"
            }
            Body::Symlink(target) | Body::Hardlink(target) => {
                put("linkName", json!(lossy(target)));
                if matches!(entry.body, Body::Symlink(_)) { "symlink" } else { "hardlink" }
            }
            Body::Char(major, minor) | Body::Block(major, minor) => {
                put("devMajor", json!(major));
                put("devMinor", json!(minor));
                if matches!(entry.body, Body::Char(..)) { "char" } else { "block" }
            }
            Body::Fifo => "fifo",
        };
        put("type", json!(kind));
        row
    }

    /// Podman keeps the fraction of a second, and tells the epoch.
    fn time(&self, (secs, nanos): (i64, u32)) -> String {
        if self.dialect == Dialect::Stargz {
            return rfc3339((secs, nanos));
        }
        let whole = match secs {
            0 => "1970-01-01T00:00:00Z".to_owned(),
            _ => rfc3339((secs, 0)),
        };
        if nanos == 0 { whole } else { whole.replace('Z', &format!(".{nanos:09}Z")) }
    }

    fn finish(&self, mut frames: Frames, rows: Vec<Map<String, Value>>) -> Built {
        let toc_offset = frames.close();
        let Frames { mut out, tar, split: split_json, .. } = frames;
        let split = frame(&split_json);
        let mut toc = json!({"version": 1, "entries": rows});
        if self.footer == 64 {
            toc["tarSplitDigest"] = json!(sha256_digest(&split));
        }
        self.edits.iter().for_each(|edit| edit(&mut toc));
        let toc_json = to_json(&toc);
        let stored = frame(&toc_json);
        let position = [toc_offset + 8, stored.len() as u64, toc_json.len() as u64, 1];
        skippable(&mut out, &stored);
        let split_position = [out.len() as u64 + 8, split.len() as u64, split_json.len() as u64];
        let mut footer = position.map(u64::to_le_bytes).concat();
        match self.footer {
            64 => {
                skippable(&mut out, &split);
                footer.extend(split_position.map(u64::to_le_bytes).concat());
                footer.extend(b"GNUlInUx");
            }
            56 => {
                skippable(&mut out, &split);
                footer.extend(b"GnUlInUx");
                footer.extend([0; 16]);
            }
            _ => footer.extend(b"GnUlInUx"),
        }
        skippable(&mut out, &footer);

        let checksum = sha256_digest(&stored);
        let prefix = self.prefix;
        let mut annotations = BTreeMap::from([
            (format!("{prefix}manifest-checksum"), checksum.clone()),
            (format!("{prefix}manifest-position"), position.map(|number| number.to_string()).join(":")),
        ]);
        if self.footer > 40 {
            let position = split_position.map(|number| number.to_string()).join(":");
            annotations.insert(format!("{prefix}tarsplit-position"), position);
        }
        if self.footer == 56 {
            annotations.insert(format!("{prefix}tarsplit-checksum"), sha256_digest(&split));
        }
        let toc_digest = match self.dialect {
            Dialect::Podman => checksum,
            Dialect::Stargz => sha256_digest(&toc_json),
        };
        if self.dialect == Dialect::Stargz {
            annotations.insert(TOC_DIGEST_ANNOTATION.to_owned(), toc_digest.clone());
            annotations.insert(UNCOMPRESSED_SIZE_ANNOTATION.to_owned(), tar.len().to_string());
        }
        Built {
            digest: sha256_digest(&out),
            size: out.len() as u64,
            blob: out.into(),
            toc_json,
            toc_digest,
            toc_offset,
            diff_id: sha256_digest(&tar),
            uncompressed_size: tar.len() as u64,
            media_type: LAYER_ZSTD,
            annotations,
        }
    }
}

/// The frames written so far, and the tar that they are.
#[derive(Default)]
struct Frames {
    out: Vec<u8>,
    tar: Vec<u8>,
    open: Vec<u8>,
    /// The tar-split's lines.
    split: Vec<u8>,
}

impl Frames {
    fn push(&mut self, bytes: &[u8]) {
        self.tar.extend_from_slice(bytes);
        self.open.extend_from_slice(bytes);
    }

    /// What is no file's content.
    fn push_split(&mut self, bytes: &[u8]) {
        self.push(bytes);
        self.split_line(&json!({"type": 2, "payload": STANDARD.encode(bytes)}));
    }

    fn split_line(&mut self, line: &Value) {
        let mut line = line.clone();
        line["position"] = json!(self.split.iter().filter(|byte| **byte == b'\n').count());
        self.split.extend(line.to_string().bytes().chain([b'\n']));
    }

    /// Ends the open frame; the offset of the next.
    fn close(&mut self) -> u64 {
        if !self.open.is_empty() {
            self.out.extend(frame(&std::mem::take(&mut self.open)));
        }
        self.out.len() as u64
    }
}

/// A frame that does not tell how much it holds, as a streaming writer's.
fn frame(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).expect("compressing in memory")
}

fn skippable(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend([0x50, 0x2a, 0x4d, 0x18]);
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_plain_decoder_gives_the_tar() {
        let layer =
            Layer::new().dir("a").noise("a/b", 200_000, 1).file("zeros", vec![0; 200_000]).file("e", "");
        let encoders = [
            ZstdEncoder::new(Dialect::Podman),
            ZstdEncoder::podman_before(40),
            ZstdEncoder::podman_before(56),
        ];
        for encoder in encoders {
            let built = encoder.encode(&layer);
            assert_eq!(zstd::decode_all(&built.blob[..]).unwrap(), layer.tar());
            assert_eq!(built.diff_id, sha256_digest(&layer.tar()));
            let toc: Value = serde_json::from_slice(&built.toc_json).unwrap();
            let rows = toc["entries"].as_array().unwrap();
            assert_eq!(rows.iter().filter(|row| row["chunkType"] == "zeros").count(), 4);
        }
        let built = ZstdEncoder::new(Dialect::Stargz).encode(&layer);
        let tar = zstd::decode_all(&built.blob[..]).unwrap();
        assert!(layer.tar().starts_with(&tar[1024..]), "the landmark, and no end");
        if let Ok(mut zstd) =
            Command::new("zstd").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        {
            let mut stdin = zstd.stdin.take().unwrap();
            let blob = built.blob.clone();
            let feed = std::thread::spawn(move || stdin.write_all(&blob));
            assert_eq!(zstd.wait_with_output().unwrap().stdout, tar);
            feed.join().unwrap().unwrap();
        }
    }
}
