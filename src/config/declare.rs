//! How a table of the configuration file is declared.
//!
//! Owns the `section!` macro and what it yields: from one declaration come the typed struct, its defaults, the
//! names the reader knows, the example file and the reference page. A key that is not declared does not exist,
//! and a key cannot be declared without a comment, a type and a default.
//!
//! May not read files or know any particular key.

use std::path::{Path, PathBuf};

/// A type a key may have.
pub trait Setting {
    /// What the file has to hold, as the end of "must be ...".
    const KIND: &'static str;

    /// The value as TOML source.
    fn toml(&self) -> String;
}

/// One key of one table.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The key as written in the file.
    pub name: &'static str,
    /// Its comment, one item a line, without comment marks.
    pub doc: Vec<&'static str>,
    /// What the file has to hold ([`Setting::KIND`]).
    pub kind: &'static str,
    /// The default as TOML source.
    pub default: String,
    /// The value in force as TOML source.
    pub value: String,
}

/// One table of the file with the values in force.
#[derive(Debug, Clone)]
pub struct Section {
    /// Dotted path; empty for the top level. `*` stands for a name the user chooses.
    pub path: &'static str,
    /// The table's comment, one item a line.
    pub about: Vec<&'static str>,
    /// The keys in the order of declaration.
    pub entries: Vec<Entry>,
}

/// A declared table.
pub trait Table {
    /// The table with its keys, comments, defaults and values in force.
    fn section(&self) -> Section;
}

/// Declares one table of the file: its path, its struct, and for each key the comment, type and default.
///
/// Fields after `tables` hold further tables and are not keys of this one.
macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $path:literal => $name:ident {
            $( $(#[doc = $doc:literal])+ $key:ident : $kind:ty = $default:expr, )*
        } $(tables {
            $( $(#[doc = $table_doc:literal])+ $table:ident : $table_type:ty, )*
        })?
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq, serde::Deserialize)]
        #[serde(default)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $key: $kind, )*
            $( $( $(#[doc = $table_doc])+ pub $table: $table_type, )* )?
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $( $key: $default, )*
                    $( $( $table: Default::default(), )* )?
                }
            }
        }

        impl $crate::config::declare::Table for $name {
            fn section(&self) -> $crate::config::declare::Section {
                use $crate::config::declare::{Entry, Section, Setting, undent};
                let initial = Self::default();
                Section {
                    path: $path,
                    about: [$($about),+].into_iter().map(undent).collect(),
                    entries: vec![$( Entry {
                        name: stringify!($key),
                        doc: [$($doc),+].into_iter().map(undent).collect(),
                        kind: <$kind as Setting>::KIND,
                        default: initial.$key.toml(),
                        value: self.$key.toml(),
                    } ),*],
                }
            }
        }
    };
}
pub(crate) use section;

/// A doc comment's line without the one space that follows the slashes.
pub fn undent(line: &'static str) -> &'static str {
    line.strip_prefix(' ').unwrap_or(line)
}

/// A string as TOML source.
pub fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

impl Setting for bool {
    const KIND: &'static str = "true or false";

    fn toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for u32 {
    const KIND: &'static str = "a whole number, 0 or more";

    fn toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for u64 {
    const KIND: &'static str = "a whole number, 0 or more";

    fn toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for i64 {
    const KIND: &'static str = "a whole number";

    fn toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for String {
    const KIND: &'static str = "a string";

    fn toml(&self) -> String {
        quoted(self)
    }
}

impl Setting for Vec<String> {
    const KIND: &'static str = "a list of strings";

    fn toml(&self) -> String {
        let items: Vec<String> = self.iter().map(|item| quoted(item)).collect();
        format!("[{}]", items.join(", "))
    }
}

impl Setting for PathBuf {
    const KIND: &'static str = "a path";

    fn toml(&self) -> String {
        quoted(&Path::display(self).to_string())
    }
}
