//! The crate's error: one variant per thing a caller can do about it.

use std::borrow::Cow;

use crate::Digest;

/// Why bytes were not accepted as (part of) an eStargz layer.
///
/// [`Truncated`](Error::Truncated), [`BadMember`](Error::BadMember) and
/// [`ChunkDigestMismatch`](Error::ChunkDigestMismatch) say that *these bytes* are wrong: another host may serve
/// the right ones. After [`NotEstargz`](Error::NotEstargz) the blob can still be unpacked as an ordinary layer,
/// and [`BadTarSplit`](Error::BadTarSplit) says nothing of the layer's contents. All others say that the layer itself must not be mounted lazily.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The blob does not end in a footer of a supported format.
    #[error("not an eStargz blob: {why}; it can only be unpacked as an ordinary layer")]
    NotEstargz {
        /// What was found instead of a footer.
        why: Cow<'static, str>,
    },

    /// [`Opener::feed`](crate::Opener::feed) was given bytes from beyond the end of the blob.
    #[error(
        "{len} bytes at offset {offset} do not lie in a blob of {blob_size} bytes; check the blob's size"
    )]
    OutsideBlob {
        /// Blob offset of the first byte given.
        offset: u64,
        /// Number of bytes given.
        len: u64,
        /// Size of the blob, as told to [`Opener::new`](crate::Opener::new).
        blob_size: u64,
    },

    /// The footer points to something that is not a TOC.
    #[error("the footer points to a TOC at blob offset {offset}, but {why}; rebuild the layer")]
    BadToc {
        /// Blob offset of the TOC according to the footer.
        offset: u64,
        /// What is wrong there.
        why: Cow<'static, str>,
    },

    /// The TOC is not the JSON document that the format describes.
    #[error("TOC JSON, line {line} column {column}: {why}; rebuild the layer")]
    BadJson {
        /// Line, from 1.
        line: usize,
        /// Column in bytes, from 1; 0 at the start of a line.
        column: usize,
        /// The JSON parser's message.
        why: String,
    },

    /// The tar-split is not one, or not where or what it is said to be. The layer can be mounted all the same.
    #[error("the length of the layer's tar cannot be told from its tar-split: {why}")]
    BadTarSplit {
        /// What is wrong with it.
        why: Cow<'static, str>,
    },

    /// One entry of the TOC contradicts the format, another entry, or the blob.
    #[error("TOC entry {name:?}: {why}; rebuild the layer")]
    BadEntry {
        /// The entry's name as written in the TOC, shortened if very long.
        name: String,
        /// What is wrong with it.
        why: Cow<'static, str>,
    },

    /// A limit of [`Limits`](crate::Limits) would have been exceeded.
    #[error("{what}: {value} is over the limit of {limit}")]
    Limit {
        /// What was counted, and of which entry.
        what: Cow<'static, str>,
        /// The value found; counting stops at the limit, so the full value may be higher.
        value: u64,
        /// The limit.
        limit: u64,
    },

    /// The TOC is not the one that the image's manifest names.
    #[error("the TOC has digest {actual}, but the image names {expected}")]
    TocDigestMismatch {
        /// The trusted digest.
        expected: Digest,
        /// Digest of the TOC JSON found in the blob.
        actual: Digest,
    },

    /// A chunk's bytes are not the ones that the TOC names.
    #[error(
        "{size} bytes at {inner_offset} of the member have digest {actual}, but the TOC names {expected}"
    )]
    ChunkDigestMismatch {
        /// Offset of the chunk in the decompressed member.
        inner_offset: u64,
        /// Size of the chunk in bytes.
        size: u64,
        /// Digest named by the TOC.
        expected: Digest,
        /// Digest of the bytes.
        actual: Digest,
    },

    /// The compressed bytes end before the last wanted byte.
    #[error("{len} compressed bytes end before byte {wanted} of the member")]
    Truncated {
        /// Number of compressed bytes given.
        len: u64,
        /// End of the wanted chunk in the decompressed member.
        wanted: u64,
    },

    /// The compressed bytes are not a member that holds the wanted chunks.
    #[error("cannot decode the member: {why}")]
    BadMember {
        /// What is wrong with it.
        why: Cow<'static, str>,
    },

    /// A text is not a digest of the one supported form.
    #[error("{text:?} is not a digest of the form sha256:<64 lower-case hex digits>")]
    BadDigest {
        /// The text, shortened if very long.
        text: String,
    },
}

impl Error {
    pub(crate) fn entry(name: &str, why: impl Into<Cow<'static, str>>) -> Self {
        Error::BadEntry { name: shorten(name), why: why.into() }
    }

    pub(crate) fn limit(what: impl Into<Cow<'static, str>>, value: u64, limit: u64) -> Self {
        Error::Limit { what: what.into(), value, limit }
    }
}

/// Copies hostile text into an error message, at most 200 bytes of it.
pub(crate) fn shorten(text: &str) -> String {
    const MAX: usize = 200;
    if text.len() <= MAX {
        return text.to_owned();
    }
    format!("{}...", &text[..text.floor_char_boundary(MAX)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_shortened_at_a_character_boundary() {
        assert_eq!(shorten("etc/passwd"), "etc/passwd");
        let long = "é".repeat(4000);
        let short = shorten(&format!("x{long}"));
        assert!(short.len() <= 203 && short.starts_with("xé") && short.ends_with("é..."), "{short}");
    }

    #[test]
    fn names_are_escaped_in_messages() {
        let message = Error::entry("a\n\u{1b}[2J", "why").to_string();
        assert_eq!(message, r#"TOC entry "a\n\u{1b}[2J": why; rebuild the layer"#);
    }
}
