//! Pull secrets of Kubernetes: secrets of the types `kubernetes.io/dockerconfigjson` and `kubernetes.io/dockercfg` in
//! namespaces that are named for it.
//!
//! Owns the asking of the apiserver: a list for each namespace, used again for a short time, with bounds on its size and on
//! the wait for it. An apiserver that is not there is a source that knows nothing. A list of all pods' secrets cannot tell
//! which of them an image was pulled with: any that fits the image's name is tried, as kubelet would for one pod.
//!
//! API: Kubernetes, `GET /api/v1/namespaces/{namespace}/secrets`.

use super::file::Entry;
use super::kept::Kept;
use super::{Answer, Credential, FAILED, Identity, Place, kubeconfig, pattern};
use crate::config::KubernetesSecrets;
use crate::transport::{Transport, describe};
use base64::Engine as _;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long a read may wait for the apiserver.
const LIMIT: Duration = Duration::from_secs(3);
/// How long a list is used again; one that had what was refused is dropped.
const KEPT: Duration = Duration::from_secs(60);
/// Bytes of one list, at most.
const MAX_LIST: usize = 16 << 20;
/// Secrets of one namespace and type that are looked at.
const MAX_SECRETS: usize = 500;
/// Types of secrets, and where each has its logins.
const TYPES: [(&str, &str); 2] =
    [("kubernetes.io/dockerconfigjson", ".dockerconfigjson"), ("kubernetes.io/dockercfg", ".dockercfg")];

/// The pull secrets of some namespaces.
pub(super) struct PullSecrets {
    kubeconfig: Option<PathBuf>,
    namespaces: Vec<String>,
    transport: Transport,
    /// By namespace.
    kept: Kept<String, Outcome>,
}

impl std::fmt::Debug for PullSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PullSecrets").field("namespaces", &self.namespaces).finish_non_exhaustive()
    }
}

/// Logins by the pattern of the images they are for, or why there are none.
type Outcome = Result<Arc<Vec<(String, Credential)>>, String>;

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    data: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
struct Metadata {
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct DockerConfigJson {
    #[serde(default)]
    auths: HashMap<String, Entry>,
}

impl PullSecrets {
    pub(super) fn new(secrets: &KubernetesSecrets, transport: Transport) -> Self {
        let KubernetesSecrets { kubeconfig, namespaces } = secrets.clone();
        Self { kubeconfig, namespaces, transport, kept: Kept::default() }
    }

    pub(super) async fn answer(&self, place: Place<'_>) -> Answer {
        let image = place.to_string();
        let lists =
            futures::future::join_all(self.namespaces.iter().map(|namespace| self.list(namespace))).await;
        let (mut credentials, mut said) = (Vec::new(), Vec::new());
        for (namespace, outcome) in self.namespaces.iter().zip(lists) {
            match outcome {
                Err(why) => said.push(format!("namespace {namespace}: {why}")),
                Ok(logins) => {
                    let logins = logins.iter().map(|(key, credential)| (key.as_str(), credential));
                    let chosen: Vec<Credential> =
                        pattern::chosen(logins, &image).into_iter().cloned().collect();
                    said.push(match chosen.len() {
                        0 => format!("namespace {namespace} has none for {image}"),
                        found => format!("namespace {namespace} has {found} for {image}"),
                    });
                    credentials.extend(chosen);
                }
            }
        }
        if said.is_empty() {
            said.push("no namespaces are named".to_owned());
        }
        Answer { source: "pull secrets".to_owned(), credentials, said: said.join(", "), quiet: false }
    }

    /// Lists that had this login, or none, are asked for anew.
    pub(super) fn refuse(&self, identity: Identity) {
        self.kept.refuse(|outcome| match outcome {
            // A failure ends by itself.
            Err(_) => false,
            Ok(logins) => {
                identity == Identity::Anonymous
                    || logins.iter().any(|(_, credential)| Identity::of(Some(credential)) == identity)
            }
        });
    }

    async fn list(&self, namespace: &String) -> Outcome {
        if let Some(outcome) = self.kept.get(namespace) {
            return outcome;
        }
        let _turn = self.kept.turn(namespace).await;
        if let Some(outcome) = self.kept.get(namespace) {
            return outcome;
        }
        let fetched = tokio::time::timeout(LIMIT, self.fetch(namespace)).await;
        let outcome = fetched
            .unwrap_or_else(|_| Err(format!("the apiserver is unreachable (no answer within {LIMIT:?})")));
        let life = if outcome.is_ok() { KEPT } else { FAILED };
        if let Err(why) = &outcome {
            tracing::debug!(namespace, why, "pull secrets cannot be listed");
        }
        self.kept.put(namespace.clone(), outcome.clone(), life);
        outcome
    }

    async fn fetch(&self, namespace: &str) -> Outcome {
        let path = self.kubeconfig.clone().unwrap_or_else(kubeconfig::usual_path);
        let cluster = kubeconfig::read(&path).await.map_err(|why| format!("{} {why}", path.display()))?;
        let client = self.transport.trusted(cluster.tls.clone()).map_err(|error| error.to_string())?;
        let mut logins = Vec::new();
        for (kind, key) in TYPES {
            let mut url = cluster.server.clone();
            let segments = ["api", "v1", "namespaces", namespace, "secrets"];
            let unusable = || format!("{} has a server that is no base of URLs", path.display());
            url.path_segments_mut().map_err(|()| unusable())?.pop_if_empty().extend(segments);
            let selector = format!("type={kind}");
            url.query_pairs_mut()
                .append_pair("fieldSelector", &selector)
                .append_pair("limit", &MAX_SECRETS.to_string());
            let mut request = client.get(url).header(ACCEPT, "application/json");
            if let Some(token) = &cluster.token {
                let value = HeaderValue::try_from(format!("Bearer {}", token.expose()));
                let mut value =
                    value.map_err(|_| "the token has characters a header must not have".to_owned())?;
                value.set_sensitive(true);
                request = request.header(AUTHORIZATION, value);
            }
            let unreachable = |error| format!("the apiserver is unreachable ({})", describe(error));
            let mut response = request.send().await.map_err(unreachable)?;
            match response.status() {
                StatusCode::OK => {}
                status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                    return Err(format!(
                        "the apiserver answered {status}: the user of {} may not list secrets",
                        path.display()
                    ));
                }
                status => return Err(format!("the apiserver answered {status}")),
            }
            let mut body = Vec::new();
            while let Some(piece) = response.chunk().await.map_err(unreachable)? {
                body.extend_from_slice(&piece);
                if body.len() > MAX_LIST {
                    return Err("the list is larger than 16 MiB".to_owned());
                }
            }
            let list: List = serde_json::from_slice(&body)
                .map_err(|_| "the apiserver has not answered with a list".to_owned())?;
            logins.extend(logins_in(list, key));
        }
        Ok(Arc::new(logins))
    }
}

/// The logins in a list of secrets that have them under `key`. Secrets and entries that cannot be read are passed over.
fn logins_in(mut list: List, key: &str) -> Vec<(String, Credential)> {
    list.items.sort_by(|one, other| one.metadata.name.cmp(&other.metadata.name));
    let mut logins = Vec::new();
    for item in list.items.iter().take(MAX_SECRETS) {
        let data = item.data.as_ref().and_then(|data| data.get(key));
        let decoded = data.and_then(|data| base64::engine::general_purpose::STANDARD.decode(data).ok());
        let entries: Option<HashMap<String, Entry>> = decoded.and_then(|text| match key {
            ".dockercfg" => serde_json::from_slice(&text).ok(),
            _ => serde_json::from_slice::<DockerConfigJson>(&text).ok().map(|config| config.auths),
        });
        if entries.is_none() {
            tracing::debug!(secret = item.metadata.name, "a pull secret is not what its type says");
        }
        let mut entries: Vec<(String, Entry)> = entries.unwrap_or_default().into_iter().collect();
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        logins.extend(
            entries.into_iter().filter_map(|(pattern, entry)| Some((pattern, entry.credential().ok()?))),
        );
    }
    logins
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    #[test]
    fn logins_of_both_types() {
        let encoded =
            |value: serde_json::Value| base64::engine::general_purpose::STANDARD.encode(value.to_string());
        let entry = |user: &str| serde_json::json!({ "username": user, "password": "p" });
        let list = |key: &str, contents: &[(&str, String)]| {
            let item = |(name, data): &(&str, String)| serde_json::json!({ "metadata": {"name": name}, "data": {key: data} });
            let items: Vec<_> = contents.iter().map(item).collect();
            serde_json::from_value::<List>(serde_json::json!({ "items": items })).unwrap()
        };
        let users = |logins: Vec<(String, Credential)>| -> Vec<String> {
            let user = |credential| match credential {
                Credential::Password { user, password } if password == Secret::new("p") => user,
                other => panic!("{other:?}"),
            };
            logins.into_iter().map(|(key, credential)| format!("{key} {}", user(credential))).collect()
        };
        let new = encoded(
            serde_json::json!({ "auths": {"r.example/b": entry("b"), "r.example/a": entry("a"), "x": {}} }),
        );
        let broken = "!".to_owned();
        let of_no_use = encoded(serde_json::json!([]));
        let contents = [
            ("z", new.clone()),
            ("broken", broken),
            ("no", of_no_use),
            ("a", encoded(serde_json::json!({"auths": {"q": entry("q")}}))),
        ];
        let logins = logins_in(list(".dockerconfigjson", &contents), ".dockerconfigjson");
        assert_eq!(users(logins), ["q q", "r.example/a a", "r.example/b b"]);
        let old = encoded(serde_json::json!({ "https://index.docker.io/v1/": entry("old") }));
        assert_eq!(
            users(logins_in(list(".dockercfg", &[("o", old)]), ".dockercfg")),
            ["https://index.docker.io/v1/ old"]
        );
        assert!(logins_in(list("other", &[("z", new)]), ".dockercfg").is_empty());
        let missing: List =
            serde_json::from_str(r#"{"items":[{"metadata":{"name":"x"},"data":null}]}"#).unwrap();
        assert!(logins_in(missing, ".dockercfg").is_empty());
    }
}
