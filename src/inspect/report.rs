//! What an inspection found, for people and for programs.

use std::fmt;

use serde::Serialize;

use super::examine::{Contents, File, Format, Lazy, Named};
use super::verify::Findings;
use crate::convert::media::LayerKind;
use crate::image::{Descriptor, short};
use crate::progress::size;

/// An inspected image, or file.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it is.
    pub image: String,
    /// Digest of what its name stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Each manifest.
    pub images: Vec<Image>,
}

/// One manifest.
#[derive(Debug, Serialize)]
pub struct Image {
    /// What it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Its digest; empty for a file.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub digest: String,
    /// From the bottom up.
    pub layers: Vec<Layer>,
}

/// One layer.
#[derive(Debug, Serialize)]
pub struct Layer {
    /// Digest of its blob, or the name of the file.
    pub digest: String,
    /// What the manifest says it is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Bytes of its blob.
    pub size: u64,
    /// How it is packed.
    pub format: Format,
    /// The TOC digest that the manifest names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub named_toc_digest: Option<String>,
    /// Digest of its contents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// Whether it is mounted lazily.
    #[serde(flatten)]
    pub lazy: Lazy,
    /// What is in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contents: Option<Contents>,
    /// Every name in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<Vec<File>>,
    /// What reading all of it has shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub findings: Option<Findings>,
}

impl Layer {
    /// A layer of which the outside is known.
    pub fn new(layer: &Descriptor, format: Format, named: &Named, lazy: Lazy) -> Self {
        let named_toc_digest = match named {
            Named::As(digest) => Some(digest.clone()),
            Named::Not | Named::Unknown => None,
        };
        Self {
            digest: layer.digest.clone(),
            media_type: layer.media_type.clone(),
            size: layer.size,
            format,
            named_toc_digest,
            diff_id: None,
            lazy,
            contents: None,
            files: None,
            findings: None,
        }
    }

    /// Something that is no file system layer, or may not be copied.
    pub fn other(layer: &Descriptor, kind: LayerKind) -> Self {
        let why = match kind {
            LayerKind::NotDistributable => "it is not distributable",
            LayerKind::Tar | LayerKind::Other => "it is not a file system layer",
        };
        Self::new(layer, Format::Other, &Named::Not, Lazy::not("not_estargz", why))
    }
}

impl Report {
    /// Whether nothing wrong was found.
    pub fn sound(&self) -> bool {
        let mut findings =
            self.images.iter().flat_map(|image| &image.layers).flat_map(|layer| &layer.findings);
        findings.all(|findings| findings.problems.is_empty())
    }
}

impl fmt::Display for Report {
    /// A paragraph for each layer, then how many are lazy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for image in &self.images {
            if self.images.len() > 1 {
                writeln!(f, "{} {}", image.platform.as_deref().unwrap_or("other"), image.digest)?;
            }
            for layer in &image.layers {
                write!(f, "{layer}")?;
            }
        }
        let Some(digest) = &self.digest else { return Ok(()) };
        let layers = || self.images.iter().flat_map(|image| &image.layers);
        let lazy = layers().filter(|layer| layer.lazy.lazy).count();
        writeln!(f, "{} {digest}: {lazy} of {} layers lazy", self.image, layers().count())
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.digest.starts_with("sha256:") { short(&self.digest) } else { self.digest.clone() };
        let Lazy { lazy, reason, message } = &self.lazy;
        let verdict = match (lazy, reason) {
            (true, _) => "lazy".to_owned(),
            (false, reason) => format!("not lazy ({})", reason.unwrap_or("unknown")),
        };
        writeln!(f, "{name}  {:>10}  {}  {verdict}", size(self.size), self.format.name())?;
        if let Some(message) = message {
            writeln!(f, "    {message}")?;
        }
        if let Some(contents) = &self.contents {
            write!(f, "{contents}")?;
            let plain = self.size.saturating_sub(contents.overhead_bytes).max(1);
            // Shares need no more precision than this.
            let share = contents.overhead_bytes as f64 * 100.0 / plain as f64;
            writeln!(f, "    overhead {} ({share:.1} %)", size(contents.overhead_bytes))?;
        }
        for file in self.files.iter().flatten() {
            writeln!(f, "    {file}")?;
        }
        if let Some(findings) = &self.findings {
            for problem in &findings.problems {
                writeln!(f, "    WRONG: {problem}")?;
            }
            if findings.problems.is_empty() {
                writeln!(f, "    verified: {}", findings.verified.join(", "))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Contents { toc_digest, entries, files, chunks, members, landmark, .. } = self;
        writeln!(f, "    TOC {toc_digest}, {} of JSON", size(self.toc_json_bytes))?;
        if let Some(digest) = &self.toc_stored_digest {
            writeln!(f, "    TOC as it is compressed {digest}")?;
        }
        writeln!(
            f,
            "    {entries} entries, {files} files of {} in {chunks} chunks in {members} members",
            size(self.file_bytes)
        )?;
        write!(f, "    landmark: {landmark}")?;
        if self.prefetch_bytes > 0 {
            write!(f, ", {} files in the first {}", self.prioritized.len(), size(self.prefetch_bytes))?;
        }
        writeln!(f)
    }
}

impl fmt::Display for File {
    /// Kind, mode, owner, size, offset of the first chunk, path.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.kind {
            "file" => '-',
            kind => kind.chars().next().unwrap_or('?'),
        };
        let offset = self.chunks.first().map_or_else(|| "-".to_owned(), |chunk| chunk.offset.to_string());
        write!(
            f,
            "{letter}{} {}:{} {:>11} {offset:>12} {}",
            self.mode,
            self.uid,
            self.gid,
            self.size,
            shown(&self.path)
        )?;
        match &self.target {
            Some(target) => write!(f, " -> {}", shown(target)),
            None => Ok(()),
        }
    }
}

/// A name that a terminal shows as one line, whatever the layer's builder put into it.
fn shown(name: &str) -> String {
    let escaped = |letter: char| match letter.is_control() {
        true => letter.escape_default().collect(),
        false => letter.to_string(),
    };
    name.chars().map(escaped).collect::<Vec<String>>().concat()
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(shown("a\u{1b}[2J\nb ü"), "a\\u{1b}[2J\\nb ü");
    }
}
