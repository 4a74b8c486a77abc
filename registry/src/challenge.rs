//! `WWW-Authenticate`: parsing and the choice among challenges. Pure.
//!
//! Grammar: RFC 9110, section 11.6.1 (several challenges in one field, quoted strings with escapes,
//! token68). Parameters of the Bearer challenge: the distribution project's token specification.

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Challenge {
    /// User name and password with every request.
    Basic,
    /// A token from `realm`.
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// The challenge to answer out of all `WWW-Authenticate` fields: Bearer before Basic, `None` if neither
/// is there or a Bearer challenge names no realm.
pub(crate) fn choose<'a>(fields: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let challenges: Vec<_> = fields.flat_map(parse).collect();
    let bearer = challenges.iter().filter(|(scheme, _)| scheme == "bearer").find_map(|(_, parameters)| {
        let get = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        Some(Challenge::Bearer { realm: get("realm")?, service: get("service"), scope: get("scope") })
    });
    bearer.or_else(|| challenges.iter().any(|(scheme, _)| scheme == "basic").then_some(Challenge::Basic))
}

type Parameters = Vec<(String, String)>;

/// All challenges of one field value, scheme and parameter names in lower case. Stops at the first byte
/// that fits no rule and keeps what came before.
pub(crate) fn parse(field: &str) -> Vec<(String, Parameters)> {
    let mut rest = Scanner(field);
    let mut challenges = Vec::new();
    loop {
        rest.skip([' ', '\t', ',']);
        let Some(scheme) = rest.token() else { return challenges };
        rest.skip([' ', '\t']);
        let mut parameters = Vec::new();
        while let Some(parameter) = rest.parameter() {
            parameters.push(parameter);
            rest.skip([' ', '\t', ',']);
        }
        if parameters.is_empty() {
            rest.skip_token68();
        }
        challenges.push((scheme.to_ascii_lowercase(), parameters));
    }
}

struct Scanner<'a>(&'a str);

impl<'a> Scanner<'a> {
    fn skip<const N: usize>(&mut self, characters: [char; N]) {
        self.0 = self.0.trim_start_matches(characters);
    }

    fn token(&mut self) -> Option<&'a str> {
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        let end = self.0.find(|c| !token(c)).unwrap_or(self.0.len());
        let (found, rest) = self.0.split_at(end);
        self.0 = rest;
        (end > 0).then_some(found)
    }

    /// `name = value`; leaves the scanner untouched when the next thing is not a parameter.
    fn parameter(&mut self) -> Option<(String, String)> {
        let mut ahead = Scanner(self.0);
        let name = ahead.token()?.to_ascii_lowercase();
        ahead.skip([' ', '\t']);
        ahead.0 = ahead.0.strip_prefix('=')?;
        ahead.skip([' ', '\t']);
        let value = match ahead.0.strip_prefix('"') {
            Some(quoted) => ahead.quoted(quoted)?,
            None => ahead.token()?.to_owned(),
        };
        self.0 = ahead.0;
        Some((name, value))
    }

    fn quoted(&mut self, text: &'a str) -> Option<String> {
        let mut value = String::new();
        let mut characters = text.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '"' => {
                    self.0 = &text[at + 1..];
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                _ => value.push(c),
            }
        }
        None
    }

    /// A single opaque value after the scheme (`Negotiate YWJj==`), of no use to us.
    fn skip_token68(&mut self) {
        let ahead = self.0.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c));
        let ahead = ahead.trim_start_matches('=').trim_start_matches([' ', '\t']);
        if ahead.len() < self.0.len() && (ahead.is_empty() || ahead.starts_with(',')) {
            self.0 = ahead;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        let owned = |s: Option<&str>| s.map(str::to_owned);
        Some(Challenge::Bearer { realm: realm.to_owned(), service: owned(service), scope: owned(scope) })
    }

    #[test]
    fn fields() {
        for (field, expected) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/x:pull""#,
                bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    Some("repository:library/x:pull"),
                ),
            ),
            (
                r#"bearer  REALM = "https://a/t" , scope="repository:x:pull,push""#,
                bearer("https://a/t", None, Some("repository:x:pull,push")),
            ),
            (r#"Bearer realm="a\"b\\c""#, bearer(r#"a"b\c"#, None, None)),
            (r#"Bearer realm=plain,service=s"#, bearer("plain", Some("s"), None)),
            (r#"Bearer realm="x",,  ,service="s""#, bearer("x", Some("s"), None)),
            (r#"Basic realm="r""#, Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (r#"Basic realm="r", Bearer realm="t",service="s""#, bearer("t", Some("s"), None)),
            (r#"Negotiate, Basic realm="r""#, Some(Challenge::Basic)),
            (r#"Negotiate YWJj==, Bearer realm="t""#, bearer("t", None, None)),
            (r#"Negotiate YWJj=, Bearer realm="t""#, bearer("t", None, None)),
            (r#"Bearer service="s", Basic"#, Some(Challenge::Basic)),
            (r#"Bearer service="s""#, None),
            (r#"Bearer realm="unterminated"#, None),
            (r#"Digest realm="x""#, None),
            ("", None),
            (",,,", None),
            ("\"", None),
            ("=", None),
        ] {
            assert_eq!(choose([field].into_iter()), expected, "{field}");
        }
    }

    #[test]
    fn several_fields_are_one_list() {
        let fields = [r#"Basic realm="r""#, r#"Bearer realm="t""#];
        assert_eq!(choose(fields.into_iter()), bearer("t", None, None));
    }

    #[test]
    fn error_parameters_do_not_disturb() {
        let field =
            r#"Bearer realm="https://a/t",service="s",scope="repository:x:pull",error="invalid_token""#;
        assert_eq!(choose([field].into_iter()), bearer("https://a/t", Some("s"), Some("repository:x:pull")));
    }
}
