//! Values that must not be printed, and URLs that may be printed only in part.
//!
//! `Debug` of a [`Secret`] is `***`; a [`SignedUrl`] shows scheme, host and path, because signatures live in
//! the query and passwords in the user part. There is no `Display` for a secret: using one takes `expose`.

use std::fmt;
use url::Url;

/// A password, token or identity token.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the one place that writes it into a request.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A URL somebody may have signed: the target of a redirect or a token endpoint.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SignedUrl(Url);

impl SignedUrl {
    pub(crate) fn new(url: Url) -> Self {
        Self(url)
    }

    pub(crate) fn expose(&self) -> &Url {
        &self.0
    }

    /// `host` or `host:port`, for naming the host in errors.
    pub(crate) fn host(&self) -> String {
        let host = self.0.host_str().unwrap_or("?");
        self.0.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }

    /// Whether what is meant for `other` would be readable on its way to this URL, and is not on its way there.
    pub(crate) fn reveals(&self, other: &Url) -> bool {
        other.scheme() == "https" && self.0.scheme() != "https"
    }

    /// Whether it is the same machine by name, whatever the port: what certificates are about.
    pub(crate) fn same_host(&self, other: &Url) -> bool {
        self.0.host() == other.host()
    }

    /// Whether credentials meant for `other` may be sent to this URL: same scheme, host and port.
    pub(crate) fn same_origin(&self, other: &Url) -> bool {
        self.0.scheme() == other.scheme()
            && self.0.host() == other.host()
            && self.0.port_or_known_default() == other.port_or_known_default()
    }
}

impl fmt::Display for SignedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.0.scheme(), self.host(), self.0.path())
    }
}

impl fmt::Debug for SignedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_printed() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "***");
        let url = SignedUrl::new(
            Url::parse("https://me:hunter2@cdn.example:8443/b/x?sig=hunter2#hunter2").unwrap(),
        );
        assert_eq!(format!("{url} {url:?}"), "https://cdn.example:8443/b/x https://cdn.example:8443/b/x");
    }

    #[test]
    fn only_the_way_from_https_to_another_scheme_reveals() {
        for (url, base, reveals) in [
            ("http://r.example/x", "https://r.example/", true),
            ("https://other.example/x", "https://r.example/", false),
            ("http://other.example/x", "http://r.example/", false),
            ("https://r.example/x", "http://r.example/", false),
        ] {
            let url = SignedUrl::new(Url::parse(url).unwrap());
            assert_eq!(url.reveals(&Url::parse(base).unwrap()), reveals, "{url} {base}");
        }
    }

    #[test]
    fn origin_is_scheme_host_and_port() {
        let base = Url::parse("https://r.example/").unwrap();
        for (url, same) in [
            ("https://r.example/v2/x?y", true),
            ("https://r.example:443/v2/x", true),
            ("https://R.example/v2/x", true),
            ("http://r.example/v2/x", false),
            ("https://r.example:8443/", false),
            ("https://r.example.evil/", false),
            ("https://cdn.r.example/", false),
        ] {
            assert_eq!(SignedUrl::new(Url::parse(url).unwrap()).same_origin(&base), same, "{url}");
        }
    }
}
