//! containerd's filter language, as List uses it.
//!
//! Pure. Grammar (containerd, package `pkg/filters`), several filters meaning "any of them":
//!
//! ```text
//! filter   := "" | selector ("," selector)*            all of them; the empty filter matches everything
//! selector := field ("." field)* [operator value]      without operator: the field is present
//! field    := quoted with " | [A-Za-z0-9_-]+
//! operator := "==" | "!=" | "~="                       ~= takes a regular expression, unanchored
//! value    := quoted with " | unquoted; after ~= also quoted with / or |
//! ```
//!
//! An unquoted value runs to the next comma or space and may hold `:` or `/`, but not begin with a quote, a
//! separator or an operator. White space is allowed in front of a field, operator or value, nowhere else.
//! Quoting knows Go's escapes. Known fields: `name`, `parent`, `kind` and `labels.<label>`; the parts of a label
//! are joined by dots. An unknown field is never present.

use regex::Regex;

use crate::{Error, error::Result, record::Record};

/// The filters of one List.
#[derive(Debug)]
pub(crate) struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    field: Field,
    test: Test,
}

#[derive(Debug)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
    Unknown,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    pub fn parse(texts: &[String]) -> Result<Filters> {
        texts
            .iter()
            .map(|text| {
                Parser { text, at: 0 }
                    .filter()
                    .map_err(|(at, why)| Error::InvalidArgument(format!("filter {text:?}, byte {at}: {why}")))
            })
            .collect::<Result<_>>()
            .map(Filters)
    }

    pub fn match_record(&self, record: &Record) -> bool {
        self.0.is_empty()
            || self.0.iter().any(|filter| filter.iter().all(|selector| selector.matches(record)))
    }
}

impl Selector {
    fn matches(&self, record: &Record) -> bool {
        let value = match &self.field {
            Field::Name => Some(record.name.as_str()),
            Field::Parent => Some(record.parent.as_str()),
            Field::Kind => Some(record.kind.as_str()),
            Field::Label(label) => record.labels.get(label).map(String::as_str),
            Field::Unknown => None,
        };
        // Absent fields compare as empty text except under ==, where they match nothing.
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

/// Where in the text it went wrong, and what was expected there.
type Broken = (usize, &'static str);

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn filter(mut self) -> std::result::Result<Vec<Selector>, Broken> {
        let mut selectors = vec![];
        if self.text.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => self.at += 1,
                Some(_) => return self.broken("expected a comma or the end"),
            }
        }
    }

    fn selector(&mut self) -> std::result::Result<Selector, Broken> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.at += 1;
            path.push(self.field()?);
        }
        let field = match path[0].as_str() {
            "name" => Field::Name,
            "parent" => Field::Parent,
            "kind" => Field::Kind,
            "labels" => Field::Label(path[1..].join(".")),
            _ => Field::Unknown,
        };
        let test = match self.peek() {
            None | Some(',') => Test::Present,
            Some(_) => self.test()?,
        };
        Ok(Selector { field, test })
    }

    fn field(&mut self) -> std::result::Result<String, Broken> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(c) if is_field_char(c) => Ok(self.take_while(is_field_char)),
            _ => self.broken("expected a field, of letters, digits, _ and -, or in double quotes"),
        }
    }

    fn test(&mut self) -> std::result::Result<Test, Broken> {
        self.skip_space();
        let start = self.at;
        match self.take_while(is_operator_char).as_str() {
            "==" => self.value(&['"']).map(Test::Equal),
            "!=" => self.value(&['"']).map(Test::NotEqual),
            "~=" => {
                let pattern = self.value(&['"', '/', '|'])?;
                Regex::new(&pattern).map(Test::Matches).map_err(|_| (start, "not a regular expression"))
            }
            _ => Err((start, "expected ==, != or ~=")),
        }
    }

    fn value(&mut self, quotes: &[char]) -> std::result::Result<String, Broken> {
        self.skip_space();
        match self.peek() {
            Some(c) if quotes.contains(&c) => self.quoted(c),
            Some('/' | '|') => self.broken("only a regular expression may be quoted like this"),
            Some(c) if is_value_char(c) && !is_operator_char(c) && c != '.' => {
                Ok(self.take_while(is_value_char))
            }
            _ => self.broken("expected a value"),
        }
    }

    fn quoted(&mut self, quote: char) -> std::result::Result<String, Broken> {
        let start = self.at;
        let mut bytes = vec![];
        self.at += quote.len_utf8();
        loop {
            match self.next() {
                None | Some('\n' | '\0') => return Err((start, "the quote is not closed")),
                Some(c) if c == quote => break,
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(c) => push(&mut bytes, c),
            }
        }
        String::from_utf8(bytes).map_err(|_| (start, "the escapes do not make UTF-8"))
    }

    fn escape(&mut self, quote: char, bytes: &mut Vec<u8>) -> std::result::Result<(), Broken> {
        let start = self.at;
        let broken = (start, "not an escape");
        match self.next().ok_or(broken)? {
            'a' => bytes.push(0x07),
            'b' => bytes.push(0x08),
            'f' => bytes.push(0x0c),
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            'v' => bytes.push(0x0b),
            '\\' => bytes.push(b'\\'),
            c if c == quote => push(bytes, c),
            '0'..='7' => {
                self.at = start;
                bytes.push(u8::try_from(self.digits(3, 8)?).map_err(|_| broken)?);
            }
            'x' => bytes.push(u8::try_from(self.digits(2, 16)?).map_err(|_| broken)?),
            'u' => push(bytes, char::from_u32(self.digits(4, 16)?).ok_or(broken)?),
            'U' => push(bytes, char::from_u32(self.digits(8, 16)?).ok_or(broken)?),
            _ => return Err(broken),
        }
        Ok(())
    }

    fn digits(&mut self, count: usize, radix: u32) -> std::result::Result<u32, Broken> {
        let start = self.at;
        let digits =
            self.text.get(start..start + count).filter(|digits| digits.chars().all(|c| c.is_digit(radix)));
        self.at += count;
        digits
            .and_then(|digits| u32::from_str_radix(digits, radix).ok())
            .ok_or((start, "expected the digits of an escape"))
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn take_while(&mut self, wanted: fn(char) -> bool) -> String {
        let start = self.at;
        while self.peek().is_some_and(wanted) {
            self.next();
        }
        self.text[start..self.at].to_owned()
    }

    fn broken<T>(&self, why: &'static str) -> std::result::Result<T, Broken> {
        Err((self.at, why))
    }
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

fn is_field_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-')
}

fn is_operator_char(c: char) -> bool {
    matches!(c, '=' | '!' | '~')
}

fn is_value_char(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Kind, tests::record};

    /// Names of the records matched: `a` view; `b` committed over `p/q:1`; `c` active with labels.
    fn matched(filters: &[&str]) -> Result<String> {
        let mut labelled = record("c", Kind::Active, "");
        for (label, value) in
            [("l", "2"), ("containerd.io/gc.root", "x"), ("x.y", "sha256:ab/c"), ("q\"\\", "ü")]
        {
            labelled.labels.insert(label.into(), value.into());
        }
        let records = [record("a", Kind::View, ""), record("b", Kind::Committed, "p/q:1"), labelled];
        let texts: Vec<String> = filters.iter().map(|text| text.to_string()).collect();
        let filters = Filters::parse(&texts)?;
        Ok(records
            .iter()
            .filter(|record| filters.match_record(record))
            .map(|record| record.name.as_str())
            .collect())
    }

    #[test]
    fn filters_match_as_in_containerd() {
        let table: &[(&[&str], &str)] = &[
            (&[], "abc"),
            (&[""], "abc"),
            (&["name"], "abc"),
            (&["name==b"], "b"),
            (&["name==a", "name==c"], "ac"),
            (&["name!=b"], "ac"),
            (&["kind==view"], "a"),
            (&["kind==active"], "c"),
            (&["kind==committed"], "b"),
            (&["parent==\"\""], "ac"),
            (&["parent!=\"\""], "b"),
            (&["parent==p/q:1"], "b"),
            (&["parent==\"p/q:1\",kind==committed"], "b"),
            (&["parent==\"p/q:1\",kind==view"], ""),
            (&["labels.l"], "c"),
            (&["labels.l==2"], "c"),
            (&["labels.l==3"], ""),
            (&["labels.l!=3"], "abc"),
            (&["labels.\"containerd.io/gc.root\"==x"], "c"),
            (&["labels.\"containerd.io/gc\".root==x"], "c"),
            (&["labels.x.y==sha256:ab/c"], "c"),
            (&["labels.\"q\\\"\\\\\"==\"\\u00fc\""], "c"),
            (&["labels.\"q\\\"\\\\\"==\"\\xc3\\xbc\""], "c"),
            (&["labels.\"q\\\"\\\\\"==ü"], "c"),
            (&["labels.l==\"\\062\""], "c"),
            (&["name~=[ab]"], "ab"),
            (&["name~=/[ab]/"], "ab"),
            (&["name~=/^[a]{1,2}$/,kind==view"], "a"),
            (&["name~=|b|"], "b"),
            (&["parent~=|p/q|"], "b"),
            (&["parent~=/p\\/q/"], "b"),
            (&["name~=\"a|b\""], "ab"),
            (&["unknown"], ""),
            (&["unknown!=x"], "abc"),
            (&["name == b, kind == committed"], "b"),
            (&["\"name\"==b"], "b"),
        ];
        for (filters, expected) in table {
            assert_eq!(matched(filters).unwrap(), *expected, "{filters:?}");
        }
    }

    #[test]
    fn broken_filters_are_refused() {
        for filter in [
            "name==foo,",
            "labels.",
            "labels.?x==y",
            "name=foo",
            "name===foo",
            "name==",
            "name==,kind==view",
            "name==foo ",
            "name==/foo/",
            "labels.|foo|==x",
            "labels.containerd.io/key==value",
            "name==\"foo",
            "name==\"fo\no\"",
            "labels.\"\\g\"",
            "labels.\"\\xaz\"",
            "name==\"\\xff\"",
            "name==\"\\777\"",
            "name==\"\\u12\"",
            "name~=/a\\.b/",
            "name~=[",
            "name==a b",
            "name\0",
            "==x",
            ",",
        ] {
            let error = matched(&[filter]).unwrap_err();
            assert!(
                matches!(&error, Error::InvalidArgument(text) if text.contains("filter")),
                "{filter:?}: {error}"
            );
        }
    }
}
