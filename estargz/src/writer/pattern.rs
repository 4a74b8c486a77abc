//! Which files come first: paths and globs.

use std::fmt;

use super::Error;
use super::order::clean;

/// Names files of a layer: one path, or all paths that a glob matches.
///
/// A glob is matched against whole paths from the layer's root, component by component: `?` is any byte, `*` any bytes,
/// `[a-z]` and `[!a-z]` one byte of a set or out of it, and a component `**` any number of components, also none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: Vec<u8>,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// A path without leading slash, `.` and `..`.
    Path(Vec<u8>),
    Glob(Vec<Component>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Component {
    /// `**`
    Any,
    One(Vec<Token>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Byte(u8),
    /// `?`
    AnyByte,
    /// `*`
    AnyBytes,
    Set {
        ranges: Vec<(u8, u8)>,
        negated: bool,
    },
}

impl Pattern {
    /// Exactly this path, relative to the layer's root however it is written.
    pub fn path(path: impl AsRef<[u8]>) -> Self {
        let text = path.as_ref().to_vec();
        Pattern { kind: Kind::Path(clean(&text)), text }
    }

    /// All paths that `glob` matches, in the order of the tar.
    ///
    /// # Errors
    ///
    /// [`Error::BadOption`] if a set is not closed.
    pub fn glob(glob: impl AsRef<[u8]>) -> Result<Self, Error> {
        let text = glob.as_ref().to_vec();
        let components = text.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
        let components =
            components.map(component).collect::<Option<_>>().ok_or_else(|| Error::BadOption {
                name: "prioritized",
                value: String::from_utf8_lossy(&text).into_owned(),
                why: "its [ has no ]".to_owned(),
            })?;
        Ok(Pattern { kind: Kind::Glob(components), text })
    }

    /// The path, unless this is a glob.
    pub(super) fn exact(&self) -> Option<&[u8]> {
        match &self.kind {
            Kind::Path(path) => Some(path),
            Kind::Glob(_) => None,
        }
    }

    /// Whether `path` (without leading slash, `.` and `..`) is meant.
    pub fn matches(&self, path: &[u8]) -> bool {
        match &self.kind {
            Kind::Path(own) => own == path,
            Kind::Glob(components) => {
                let parts: Vec<&[u8]> =
                    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty()).collect();
                let is_any = |component: &Component| *component == Component::Any;
                let one = |component: &Component, part: &&[u8]| match component {
                    Component::Any => true,
                    Component::One(tokens) => wild(tokens, part, |token| *token == Token::AnyBytes, accepts),
                };
                wild(components, &parts, is_any, one)
            }
        }
    }
}

/// The text that it was made from.
impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.text))
    }
}

/// Parses a component of a glob; `None` if a set is not closed.
fn component(text: &[u8]) -> Option<Component> {
    if text == b"**" {
        return Some(Component::Any);
    }
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        tokens.push(match byte {
            b'?' => Token::AnyByte,
            b'*' => Token::AnyBytes,
            b'[' => {
                let negated = rest.starts_with(b"!") || rest.starts_with(b"^");
                let set = &rest[usize::from(negated)..];
                // A bracket that comes first is a member of the set.
                let end = 1 + set.iter().skip(1).position(|&byte| byte == b']')?;
                rest = &set[end + 1..];
                Token::Set { ranges: ranges(&set[..end]), negated }
            }
            byte => Token::Byte(byte),
        });
    }
    Some(Component::One(tokens))
}

fn ranges(mut set: &[u8]) -> Vec<(u8, u8)> {
    let mut ranges = Vec::new();
    loop {
        match set {
            [] => return ranges,
            [first, b'-', last, rest @ ..] => {
                ranges.push((*first, *last));
                set = rest;
            }
            [byte, rest @ ..] => {
                ranges.push((*byte, *byte));
                set = rest;
            }
        }
    }
}

fn accepts(token: &Token, byte: &u8) -> bool {
    match token {
        Token::Byte(own) => own == byte,
        Token::AnyByte | Token::AnyBytes => true,
        Token::Set { ranges, negated } => {
            ranges.iter().any(|(first, last)| (first..=last).contains(&byte)) != *negated
        }
    }
}

/// Whether `pattern` matches all of `text`, where items that are `many` match any number of items of the text. Going
/// back to the last of those suffices: what an earlier one could take in addition, the last one can too.
fn wild<P, T>(pattern: &[P], text: &[T], many: impl Fn(&P) -> bool, one: impl Fn(&P, &T) -> bool) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on if a later item does not match: behind the last `many`, one item of the text further on.
    let mut retry = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(item) if many(item) => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(item) if one(item, &text[t]) => (p, t) = (p + 1, t + 1),
            _ => match &mut retry {
                Some((behind, taken)) => {
                    *taken += 1;
                    (p, t) = (*behind, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(many)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (glob, matching, other) in [
            ("etc/passwd", "etc/passwd", "etc/passwd-"),
            ("/etc/./passwd", "etc/passwd", "etc"),
            ("*.so", "a.so", "lib/a.so"),
            ("lib/*.so*", "lib/libc.so.6", "lib/x/libc.so.6"),
            ("**/*.so", "a.so", "a.so/b"),
            ("**/*.so", "usr/lib/x/a.so", "usr/lib/a.sox"),
            ("usr/**", "usr/lib/x", "var/lib"),
            ("usr/**", "usr", "us"),
            ("usr/**/b/*/c", "usr/a/b/b/x/c", "usr/a/b/c"),
            ("**", "", "x/../nothing excluded but this is a path"),
            ("a?c", "abc", "ac"),
            ("a*b*c", "a-b-b-c", "a-b-b-cd"),
            ("[a-cx]1", "b1", "d1"),
            ("[!a-c]1", "d1", "b1"),
            ("[]a]", "]", "b"),
            ("[a-]", "-", "b"),
            ("x[*]", "x*", "xy"),
        ] {
            let pattern = Pattern::glob(glob).unwrap();
            assert!(pattern.matches(matching.as_bytes()), "{glob} {matching}");
            assert!(glob == "**" || !pattern.matches(other.as_bytes()), "{glob} {other}");
        }
        for glob in ["[", "a[b", "[]", "[!]", "x/[a/b]"] {
            assert!(matches!(Pattern::glob(glob), Err(Error::BadOption { .. })), "{glob}");
        }
        assert_eq!(Pattern::glob("/a/*").unwrap().to_string(), "/a/*");
    }

    #[test]
    fn paths_are_literal() {
        let pattern = Pattern::path("/a/./b/../*");
        assert!(pattern.matches(b"a/*") && !pattern.matches(b"a/x"));
        assert_eq!(pattern.exact(), Some(&b"a/*"[..]));
    }

    #[test]
    fn hostile_globs_take_little_time() {
        let glob = Pattern::glob("*a".repeat(500) + "b").unwrap();
        assert!(!glob.matches(&[b'a'; 4000]));
        let deep = Pattern::glob("**/a/".repeat(500) + "b").unwrap();
        assert!(!deep.matches("a/".repeat(4000).as_bytes()));
    }
}
