//! Patterns of images, as kubelet has them in `matchImages`, in answers of plugins and in pull secrets. Pure.
//!
//! Source of the rules: Kubernetes, `pkg/credentialprovider/keyring.go` (`URLsMatch`, `BasicDockerKeyring`) and Go's
//! `path/filepath.Match`. A pattern is a URL without its scheme: the host's labels are globs, as many as the image's host
//! has; ports are equal; the image's path begins with the pattern's.

/// `host/repository` or a pattern of such.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern<'a> {
    labels: Vec<&'a str>,
    port: &'a str,
    path: &'a str,
}

impl<'a> Pattern<'a> {
    /// `None` for what is no URL.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let end = text.find(['?', '#']).unwrap_or(text.len());
        let (host, path) = text[..end].split_at(text[..end].find('/').unwrap_or(end));
        if host.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return None;
        }
        let (name, port) = match (host.strip_prefix('['), host.rsplit_once(':')) {
            // An address of IPv6 has colons of its own, and its brackets are not part of it.
            (Some(rest), _) => match rest.split_once(']')? {
                (address, "") if !address.is_empty() => (host, ""),
                (address, port) => (address, port.strip_prefix(':')?),
            },
            (None, Some((name, port))) => (name, port),
            (None, None) => (host, ""),
        };
        let valid =
            port.bytes().all(|byte| byte.is_ascii_digit()) && (host.starts_with('[') || !name.contains(':'));
        valid.then(|| Self { labels: name.split('.').collect(), port, path })
    }

    /// Whether this pattern is one of `image`.
    pub(super) fn matches(&self, image: &Pattern<'_>) -> bool {
        self.port == image.port
            && self.labels.len() == image.labels.len()
            && image.path.starts_with(self.path)
            && self.labels.iter().zip(&image.labels).all(|(glob, label)| glob_matches(glob, label))
    }
}

/// Whether the pattern `glob` is one of `image`; what is no pattern is none of anything.
pub(super) fn matches(glob: &str, image: &str) -> bool {
    Pattern::parse(glob).zip(Pattern::parse(image)).is_some_and(|(glob, image)| glob.matches(&image))
}

/// Which entries of a map keyed by patterns are for `image`, the most specific first, as kubelet takes them.
pub(super) fn chosen<'a, V>(entries: impl IntoIterator<Item = (&'a str, V)>, image: &str) -> Vec<V> {
    let mut entries: Vec<(String, V)> =
        entries.into_iter().map(|(key, value)| (normal(key), value)).collect();
    entries.sort_by(|(one, _), (other, _)| other.cmp(one));
    let is_default = image.starts_with("docker.io/");
    let fits: fn(&str, &str) -> bool = match entries.iter().any(|(key, _)| matches(key, image)) {
        false if is_default => |key, _| key == "index.docker.io",
        _ => matches,
    };
    entries.into_iter().filter(|(key, _)| fits(key, image)).map(|(_, value)| value).collect()
}

/// Without a scheme, and without the version of the API that docker writes.
fn normal(key: &str) -> String {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let path = match path.get(..4) {
        Some("/v1/" | "/v2/") => &path[3..],
        _ => path,
    };
    if path == "/" { host.to_owned() } else { format!("{host}{path}") }
}

/// Go's `filepath.Match` for a text without slashes; a bad pattern matches nothing.
fn glob_matches(glob: &str, text: &str) -> bool {
    let (glob, text): (Vec<char>, Vec<char>) = (glob.chars().collect(), text.chars().collect());
    let (mut at, mut seen) = (0, 0);
    // Where the last star was, and how much of the text it has taken.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if glob.get(at) == Some(&'*') {
            at += 1;
            star = Some((at, seen));
            continue;
        }
        let step = match text.get(seen) {
            None if at == glob.len() => return true,
            // Nothing is left for what the pattern still wants: no star can give more.
            None => return false,
            Some(_) if at == glob.len() => None,
            Some(&letter) => match one(&glob[at..], letter) {
                Err(()) => return false,
                Ok(step) => step,
            },
        };
        (at, seen) = match (step, &mut star) {
            (Some(step), _) => (at + step, seen + 1),
            (None, Some((after, taken))) => {
                *taken += 1;
                (*after, *taken)
            }
            (None, None) => return false,
        };
    }
}

/// Whether the first item of `glob` is `letter`: the item's length if so. An error for a bad pattern.
fn one(glob: &[char], letter: char) -> Result<Option<usize>, ()> {
    match glob {
        ['?', ..] => Ok(Some(1)),
        ['\\', escaped, ..] => Ok((*escaped == letter).then_some(2)),
        ['\\'] => Err(()),
        ['[', rest @ ..] => class(rest, letter).map(|(found, length)| found.then_some(1 + length)),
        [literal, ..] => Ok((*literal == letter).then_some(1)),
        [] => Err(()),
    }
}

/// What follows a bracket: whether `letter` is in the class, and the class's length with its end.
fn class(items: &[char], letter: char) -> Result<(bool, usize), ()> {
    let negated = items.first() == Some(&'^');
    let (mut at, mut found, mut ranges) = (usize::from(negated), false, 0);
    let bound = |at: &mut usize| -> Result<char, ()> {
        let escaped = items.get(*at) == Some(&'\\');
        *at += usize::from(escaped);
        let bound = *items.get(*at).ok_or(())?;
        *at += 1;
        if !escaped && matches!(bound, '-' | ']') { Err(()) } else { Ok(bound) }
    };
    while ranges == 0 || items.get(at) != Some(&']') {
        let low = bound(&mut at)?;
        let high = match items.get(at) {
            Some('-') => {
                at += 1;
                bound(&mut at)?
            }
            _ => low,
        };
        found |= (low..=high).contains(&letter);
        ranges += 1;
    }
    Ok((found != negated, at + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_match_as_at_kubelet() {
        for (glob, image, expected) in [
            // Hosts, label by label.
            ("registry.io", "registry.io/app", true),
            ("registry.io", "other.io/app", false),
            ("*.registry.io", "a.registry.io/app", true),
            ("*.registry.io", "a.b.registry.io/app", false),
            ("*.registry.io", "registry.io/app", false),
            ("*.*.registry.io", "a.b.registry.io/app", true),
            ("registry.*", "registry.io/app", true),
            ("reg*.io", "registry.io/app", true),
            ("*reg*y.io", "registry.io/app", true),
            // A question mark begins a URL's query, before it could be part of a glob.
            ("re?istry.io", "registry.io/app", false),
            ("localhost?x", "localhost/app", true),
            ("*", "localhost/app", true),
            ("*", "registry.io/app", false),
            ("*.*", "registry.io/app", true),
            ("r[0-9].io", "r7.io/app", true),
            ("r[^0-9].io", "r7.io/app", false),
            ("r[.io", "r[.io/app", false),
            ("REGISTRY.io", "registry.io/app", false),
            ("*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-west-1.amazonaws.com/app", true),
            ("*.dkr.ecr.*.amazonaws.com.cn", "123.dkr.ecr.eu-west-1.amazonaws.com/app", false),
            ("*.azurecr.io", "azurecr.io.evil.example/app", false),
            ("*.pkg.dev", "evil.example/a.pkg.dev", false),
            // Ports are equal.
            ("registry.io:8080", "registry.io:8080/app", true),
            ("registry.io:8080", "registry.io/app", false),
            ("registry.io", "registry.io:8080/app", false),
            ("*.io:8080", "registry.io:8080/app", true),
            ("registry.io:*", "registry.io:8080/app", false),
            ("[::1]:5000", "[::1]:5000/app", true),
            ("[::1]:5000", "[::2]:5000/app", false),
            // Paths begin alike, and are no globs.
            ("registry.io/team", "registry.io/team/app", true),
            ("registry.io/team", "registry.io/teams/app", true),
            ("registry.io/team/", "registry.io/teams/app", false),
            ("registry.io/team", "registry.io/other/team", false),
            ("registry.io/*", "registry.io/team", false),
            ("*.io/team", "registry.io/team/app", true),
            // No URLs.
            ("", "registry.io/app", false),
            ("registry.io:port", "registry.io:port/app", false),
            ("registry .io", "registry .io/app", false),
        ] {
            assert_eq!(matches(glob, image), expected, "{glob} {image}");
        }
    }

    #[test]
    fn a_pattern_of_many_stars_takes_no_time() {
        let (glob, text) = ("*a".repeat(60) + "b", "a".repeat(5000));
        assert!(!glob_matches(&glob, &text));
    }

    #[test]
    fn classes_and_escapes() {
        for (glob, text, expected) in [
            (r"\*", "*", true),
            (r"\*", "a", false),
            (r"a\", "a", false),
            ("[a-]", "a", false),
            ("[]a]", "a", false),
            ("[^a]", "b", true),
            (r"[\]]", "]", true),
            ("[z-a]", "b", false),
            ("[", "a", false),
            ("a*", "a", true),
            ("*", "", true),
            ("?", "", false),
        ] {
            assert_eq!(glob_matches(glob, text), expected, "{glob} {text}");
        }
    }

    #[test]
    fn the_most_specific_entry_comes_first() {
        for (keys, image, expected) in [
            (&["r.io", "r.io/team/app", "*.io", "r.io/team"][..], "r.io/team/app", &[1, 3, 0, 2][..]),
            (&["https://r.io/v1/", "http://r.io/v2/team", "x.io"], "r.io/team/app", &[1, 0]),
            (&["https://index.docker.io/v1/"], "docker.io/library/x", &[0]),
            (&["https://index.docker.io/v1/", "docker.io"], "docker.io/library/x", &[1]),
            (&["https://index.docker.io/v1/"], "r.io/x", &[]),
        ] {
            let entries = keys.iter().enumerate().map(|(index, key)| (*key, index));
            assert_eq!(chosen(entries, image), expected, "{keys:?} {image}");
        }
    }
}
