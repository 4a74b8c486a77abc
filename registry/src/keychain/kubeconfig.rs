//! What a kubeconfig file says of its current context: where the apiserver is, whom to trust, and who asks.
//!
//! Understood are client certificates, tokens and files of tokens; what runs programs or asks others (`exec`,
//! `auth-provider`) is named and refused, since a read waits for this. The format is Kubernetes' `clientcmd/api/v1`.

use super::parse_yaml;
use super::watched::contents;
use crate::secret::Secret;
use crate::tls::{TlsSettings, Verification};
use base64::Engine as _;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use url::Url;

/// An apiserver and how it is asked.
pub(super) struct Cluster {
    pub(super) server: Url,
    pub(super) tls: Arc<TlsSettings>,
    pub(super) token: Option<Secret>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[derive(Default)]
struct File {
    current_context: String,
    contexts: Vec<Named<ContextOf>>,
    clusters: Vec<Named<ClusterOf>>,
    users: Vec<Named<UserOf>>,
}

#[derive(Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "context", alias = "cluster", alias = "user")]
    value: T,
}

#[derive(Deserialize)]
struct ContextOf {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClusterOf {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct UserOf {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    username: Option<String>,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
}

/// `$KUBECONFIG`, of which the first file counts, else `~/.kube/config`.
pub(super) fn usual_path() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let named = variable("KUBECONFIG").and_then(|paths| std::env::split_paths(&paths).next());
    named.unwrap_or_else(|| {
        PathBuf::from(variable("HOME").unwrap_or_else(|| "/root".into())).join(".kube/config")
    })
}

/// Reads a kubeconfig and the files it names.
///
/// # Errors
///
/// What cannot be used, to follow the file's name; no value is repeated.
pub(super) async fn read(path: &Path) -> Result<Cluster, String> {
    let file: File = parse_yaml(&contents(path).await.map_err(|unread| unread.why)?)?;
    let name = &file.current_context;
    let context = named(&file.contexts, name).ok_or("has no current-context among its contexts")?;
    let cluster = named(&file.clusters, &context.cluster).ok_or("has no cluster for its current-context")?;
    let user = named(&file.users, &context.user).ok_or("has no user for its current-context")?;
    for (given, what) in [
        (user.exec.is_some(), "a user that logs in by a program (exec)"),
        (user.auth_provider.is_some(), "a user that logs in by an auth-provider"),
        (user.username.is_some(), "a user with a password"),
        (cluster.tls_server_name.is_some(), "a tls-server-name"),
        (cluster.proxy_url.is_some(), "a proxy-url"),
    ] {
        if given {
            return Err(format!(
                "has {what}, which is not supported: use a client certificate, a token or a tokenFile"
            ));
        }
    }
    let files = Files(path.parent().unwrap_or(Path::new("/")));
    let server = Url::parse(&cluster.server).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let server = server.ok_or("has a server that is no URL")?;
    let unusable =
        |what: &'static str| move |error: crate::Error| format!("has {what} that cannot be used: {error}");
    let mut tls = TlsSettings::default();
    let authority = files.pem(&cluster.certificate_authority_data, &cluster.certificate_authority);
    if let Some(pem) = authority.await? {
        tls.trust(&pem).map_err(unusable("a certificate-authority"))?;
    }
    if cluster.insecure_skip_tls_verify {
        tls.set_verification(Verification::Skipped);
    }
    let certificate = files.pem(&user.client_certificate_data, &user.client_certificate).await?;
    let key = files.pem(&user.client_key_data, &user.client_key).await?;
    if let Some((certificate, key)) = certificate.zip(key) {
        tls.identify(&certificate, &key).map_err(unusable("a client-certificate"))?;
    }
    let token = match (&user.token_file, &user.token) {
        (Some(file), _) => {
            String::from_utf8(files.read(file).await?).map_err(|_| "has a tokenFile that is no text")?
        }
        (None, token) => token.clone().unwrap_or_default(),
    };
    let token = Some(token.trim()).filter(|token| !token.is_empty()).map(Secret::new);
    Ok(Cluster { server, tls: Arc::new(tls), token })
}

fn named<'a, T>(list: &'a [Named<T>], name: &str) -> Option<&'a T> {
    list.iter().find(|item| item.name == name).map(|item| &item.value)
}

/// Files that are named from this directory.
struct Files<'a>(&'a Path);

impl Files<'_> {
    /// What is given in place, else what a file has.
    async fn pem(&self, data: &Option<String>, file: &Option<PathBuf>) -> Result<Option<Vec<u8>>, String> {
        match (data.as_deref().filter(|data| !data.is_empty()), file) {
            (Some(data), _) => {
                let decoded = base64::engine::general_purpose::STANDARD.decode(data.trim());
                decoded.map(Some).map_err(|_| "has a certificate or key that is not base64".to_owned())
            }
            (None, Some(file)) => self.read(file).await.map(Some),
            (None, None) => Ok(None),
        }
    }

    async fn read(&self, file: &Path) -> Result<Vec<u8>, String> {
        let path = self.0.join(file);
        contents(&path).await.map_err(|unread| format!("names {}, which {}", path.display(), unread.why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YAML: &str = "
apiVersion: v1
kind: Config
current-context: here
contexts:
- name: elsewhere
  context: {cluster: x, user: y}
- name: here
  context:
    cluster: local
    user: node
    namespace: default
clusters:
- name: local
  cluster:
    server: https://127.0.0.1:6443
users:
- name: node
  user:
    token: hunter2
";

    async fn parse(text: &str) -> Result<Cluster, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        std::fs::write(&path, text).unwrap();
        std::fs::write(directory.path().join("token"), "from-file\n").unwrap();
        read(&path).await
    }

    #[tokio::test]
    async fn the_current_context_counts() {
        let cluster = parse(YAML).await.unwrap();
        assert_eq!(cluster.server.as_str(), "https://127.0.0.1:6443/");
        assert_eq!(cluster.token.unwrap().expose(), "hunter2");
        let cluster = parse(&YAML.replace("token: hunter2", "tokenFile: token")).await.unwrap();
        assert_eq!(cluster.token.unwrap().expose(), "from-file");
        let cluster = parse(&YAML.replace("    token: hunter2", "    {}")).await.unwrap();
        assert!(cluster.token.is_none());
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_said() {
        for (from, to, expected) in [
            ("current-context: here", "current-context: there", "no current-context"),
            ("cluster: local", "cluster: remote", "no cluster"),
            ("user: node", "user: hunter2", "no user"),
            ("https://127", "ftp://127", "no URL"),
            ("token: hunter2", "exec: {command: hunter2}", "by a program (exec)"),
            ("token: hunter2", "auth-provider: {name: hunter2}", "auth-provider"),
            ("token: hunter2", "username: hunter2", "a user with a password"),
            ("token: hunter2", "token: [hunter2]", "is not valid (line"),
            ("token: hunter2", "tokenFile: missing", "/missing, which cannot be read"),
            ("token: hunter2", "{client-certificate-data: hunter2, client-key-data: hunter2}", "not base64"),
            (
                "token: hunter2",
                "{client-certificate-data: aHVudGVyMg==, client-key-data: aA==}",
                "a client-certificate",
            ),
            (
                "    server:",
                "    certificate-authority-data: aHVudGVyMg==\n    server:",
                "a certificate-authority",
            ),
            ("    server:", "    proxy-url: http://hunter2\n    server:", "a proxy-url"),
        ] {
            let text = YAML.replacen(from, to, 1);
            assert_ne!(text, YAML, "{from}");
            let Err(error) = parse(&text).await else { panic!("{to}") };
            assert!(error.contains(expected) && !error.contains("hunter2"), "{to}: {error}");
        }
        assert!(read(Path::new("/nonexistent")).await.err().unwrap().contains("cannot be read"));
    }
}
