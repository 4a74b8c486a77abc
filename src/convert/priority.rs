//! Which files of a layer come first in its blob: what a recorder saw being read, or what a user listed.
//!
//! Pure. A list (`--prefetch-list`) holds for every layer: each puts first what it has of it. A record (`--record-in`)
//! says of each file which layer of which manifest it was read from. A record of another image (one that was converted
//! before, say) still tells the files: its lines then hold for every layer, as stargz-snapshotter's converter takes
//! them.

use std::collections::HashSet;
use std::fmt;

use anyhow::Context;
use estargz::writer::Pattern;
use serde::Deserialize;

/// Files that shall come first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum First {
    /// The one with this path.
    Path(String),
    /// Those that match.
    Glob(String),
}

impl First {
    fn of(line: &str) -> Self {
        let line = line.to_owned();
        // A set that is not closed is none: coreutils has a program called `[`.
        let glob = line.contains(['*', '?', '[']) && Pattern::glob(&line).is_ok();
        if glob { Self::Glob(line) } else { Self::Path(line) }
    }
}

impl fmt::Display for First {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Path(text) | Self::Glob(text)) = self;
        f.write_str(text)
    }
}

/// A line of a record (stargz-snapshotter: recorder/recorder.go).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Read {
    path: String,
    #[serde(default)]
    manifest_digest: String,
    #[serde(default)]
    layer_index: Option<usize>,
}

/// What was said about the order of files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Priorities {
    list: Vec<First>,
    reads: Vec<Read>,
}

impl Priorities {
    /// Adds the lines of a record.
    ///
    /// # Errors
    ///
    /// A line is not the JSON object of a record; the message names it.
    pub fn record(&mut self, text: &str) -> anyhow::Result<()> {
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let read = serde_json::from_str(line).with_context(|| {
                format!(
                    "line {} is not a record ({{\"path\", \"manifestDigest\", \"layerIndex\"}})",
                    number + 1
                )
            })?;
            self.reads.push(read);
        }
        Ok(())
    }

    /// Adds the lines of a list: paths and globs; empty lines and those that begin with `#` say nothing.
    pub fn list(&mut self, text: &str) {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        self.list.extend(lines.map(First::of));
    }

    /// What comes first in layer `index` of the manifest `digest`, each once, records first. `known` are the
    /// manifests of the source: what was recorded of another one of them is not meant here.
    pub fn of(&self, digest: &str, index: usize, known: &HashSet<String>) -> Vec<First> {
        let here = |read: &&Read| match (known.contains(&read.manifest_digest), read.layer_index) {
            (true, Some(layer)) => read.manifest_digest == digest && layer == index,
            (true, None) => read.manifest_digest == digest,
            (false, _) => true,
        };
        // A name in a record is one file, whatever characters it has.
        let read = self.reads.iter().filter(here).map(|read| First::Path(read.path.clone()));
        let mut seen = HashSet::new();
        read.chain(self.list.iter().cloned()).filter(|first| seen.insert(first.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_go_to_their_layers_and_lists_to_all() {
        let mut priorities = Priorities::default();
        priorities
            .record(
                "{\"path\":\"bin/sh\",\"manifestDigest\":\"m1\",\"layerIndex\":0}\n\n\
                 {\"path\":\"app/[x].py\",\"manifestDigest\":\"m1\",\"layerIndex\":2}\n\
                 {\"path\":\"bin/sh\",\"manifestDigest\":\"m1\",\"layerIndex\":0}\n\
                 {\"path\":\"arm\",\"manifestDigest\":\"m2\",\"layerIndex\":0}\n\
                 {\"path\":\"old\",\"manifestDigest\":\"gone\",\"layerIndex\":7}\n\
                 {\"path\":\"bare\"}\n",
            )
            .unwrap();
        priorities.list("# what the program reads\n\n /usr/lib/python3*/**\nold\n/usr/bin/[\n");
        let known: HashSet<String> = ["m1", "m2"].map(str::to_owned).into();
        let path = |path: &str| First::Path(path.to_owned());
        let everywhere =
            [path("old"), path("bare"), First::Glob("/usr/lib/python3*/**".to_owned()), path("/usr/bin/[")];
        let cases = [
            ("m1", 0, Some(path("bin/sh"))),
            ("m1", 2, Some(path("app/[x].py"))),
            ("m2", 0, Some(path("arm"))),
            ("m2", 1, None),
        ];
        for (manifest, layer, own) in cases {
            let expected: Vec<First> = own.into_iter().chain(everywhere.clone()).collect();
            assert_eq!(priorities.of(manifest, layer, &known), expected, "{manifest} {layer}");
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let error = Priorities::default().record("{\"path\":\"a\"}\nbin/sh\n").unwrap_err();
        assert!(error.to_string().starts_with("line 2 is not a record"), "{error}");
    }
}
