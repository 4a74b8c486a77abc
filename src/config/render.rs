//! The configuration written out: as a file, and as the reference page.
//!
//! Both are derived from the declared tables, so they cannot say anything the reader does not do.

use std::fmt::Write;

use super::declare::{Entry, Section, Table, quoted};
use super::incumbent::{IGNORED, REFUSED};
use super::{Config, Mirror};

/// The configuration as a file: every key with its comment, commented out where it has its default.
///
/// For the default configuration this is the example file.
pub fn render(config: &Config) -> String {
    let mut out = String::new();
    for section in config.sections() {
        comment(&mut out, &section.about);
        if section.path.is_empty() {
            out.push('\n');
        } else {
            let _ = writeln!(out, "[{}]", section.path);
        }
        for entry in &section.entries {
            comment(&mut out, &entry.doc);
            let mark = if entry.value == entry.default { "# " } else { "" };
            let _ = writeln!(out, "{mark}{} = {}\n", entry.name, entry.value);
        }
        if section.path == "resolver" {
            hosts(&mut out, config);
        }
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn comment(out: &mut String, lines: &[&str]) {
    for line in lines {
        let _ = writeln!(out, "# {line}");
    }
}

fn hosts(out: &mut String, config: &Config) {
    let example = Mirror { host: "mirror.example.com".to_owned(), ..Mirror::default() }.section();
    comment(out, &example.about);
    if config.resolver.host.values().all(|host| host.mirrors.is_empty()) {
        let _ = writeln!(out, "# [[resolver.host.\"docker.io\".mirrors]]");
        for entry in &example.entries {
            comment(out, &entry.doc);
            let _ = writeln!(out, "# {} = {}", entry.name, entry.value);
        }
        out.push('\n');
    }
    for (name, host) in &config.resolver.host {
        for mirror in &host.mirrors {
            let _ = writeln!(out, "[[resolver.host.{}.mirrors]]", quoted(name));
            for entry in mirror.section().entries {
                if entry.value != entry.default {
                    let _ = writeln!(out, "{} = {}", entry.name, shown(&entry));
                }
            }
            out.push('\n');
        }
    }
}

/// A value for people: headers may be credentials, so only their names are shown.
fn shown(entry: &Entry) -> &str {
    if entry.name == "header" { "{} # set, not shown" } else { &entry.value }
}

/// The reference page, in Markdown.
pub fn render_reference() -> String {
    let mut out = String::from(INTRODUCTION);
    let mut sections = Config::default().sections();
    // Mirrors belong to [resolver]; they follow it.
    let resolver = sections.iter().position(|section| section.path == "resolver");
    sections.insert(resolver.map_or(sections.len(), |at| at + 1), Mirror::default().section());
    for section in &sections {
        table(&mut out, section);
    }
    out.push_str("\n## Accepted without effect\n\n");
    out.push_str(
        "These keys of stargz-snapshotter's file are taken and named at start (unless they are `false` or \
         empty).\n\n| key | why it has no effect |\n|---|---|\n",
    );
    for (key, why) in IGNORED {
        let _ = writeln!(out, "| `{key}` | {} |", sentence(why));
    }
    out.push_str("\n## Refused\n\nWith one of these set to `true` the daemon does not start.\n\n");
    out.push_str("| key | why |\n|---|---|\n");
    for (key, why) in REFUSED {
        let _ = writeln!(out, "| `{key}` | {}. |", sentence(why));
    }
    out
}

const INTRODUCTION: &str = "\
# Configuration

<!-- Written by `lazurite config reference`; a test compares. Change the comments in src/config.rs instead. -->

Lazurite reads `/etc/lazurite/config.toml`, or the file `--config` names. The default file may be missing; a file
that is named must exist. `lazurite config example` prints a file with every key and its default, `lazurite config
print` the values in force, and `lazurite config check FILE` says what is wrong with a file before a restart does.
Options on the command line win over the file.

Key names are stargz-snapshotter's where the meaning is the same, and its file can be used as it is. Unknown keys are
named with their line and the nearest known name, and do not stop the start. A value of the wrong type does.
";

fn table(out: &mut String, section: &Section) {
    match section.path {
        "" => out.push_str("\n## Top level\n"),
        "resolver.host.*.mirrors" => out.push_str("\n## `[[resolver.host.\"HOST\".mirrors]]`\n"),
        path => {
            let _ = writeln!(out, "\n## `[{path}]`");
        }
    }
    if !section.path.is_empty() {
        let _ = writeln!(out, "\n{}", section.about.join("\n"));
    }
    out.push_str("\n| key | value | default | meaning |\n|---|---|---|---|\n");
    for entry in &section.entries {
        let default = if section.path.ends_with("mirrors") && entry.name == "host" {
            "must be set".to_owned()
        } else {
            format!("`{}`", entry.default)
        };
        let meaning = entry.doc.join(" ").replace('|', "\\|");
        let _ = writeln!(out, "| `{}` | {} | {default} | {meaning} |", entry.name, entry.kind);
    }
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
