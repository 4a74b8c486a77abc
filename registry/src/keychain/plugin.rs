//! kubelet's credential provider plugins: programs that clouds ship for their registries.
//!
//! Owns what kubelet's `--image-credential-provider-config` says, the calls of the programs in its
//! `--image-credential-provider-bin-dir`, and how long their answers are kept: as they say, but they are run anew for
//! what a host refused. The file may change at any time.
//!
//! Protocol: Kubernetes, "Configure a kubelet image credential provider", groups `kubelet.config.k8s.io` (the file) and
//! `credentialprovider.kubelet.k8s.io` (the calls), v1 and its forerunners.

mod config;

use super::kept::Kept;
use super::program::{self, Said};
use super::watched::Watched;
use super::{Answer, Credential, FAILED, Identity, Place, pattern};
use crate::config::KubeletPlugins;
use crate::secret::Secret;
use config::{Provider, Settings, duration};
use parking_lot::Mutex;
use serde::Deserialize;
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio::process::Command;

/// The plugins that a file names.
#[derive(Debug)]
pub(super) struct Plugins {
    settings: Watched<Settings>,
    directory: PathBuf,
    /// What programs said, by program and by what it is good for.
    kept: Kept<(String, Scope), Outcome>,
    /// What a program's last answer was good for: whoever asks for another image of the kind waits for the same.
    kinds: Mutex<HashMap<String, Kind>>,
}

/// Logins with the patterns of the images that they are for, or why there are none.
type Outcome = Result<Vec<(String, Credential)>, String>;

/// What an answer is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Scope {
    Image(String),
    Registry(String),
    Global,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Kind {
    Image,
    Registry,
    Global,
}

impl Kind {
    fn scope(self, image: &str) -> Scope {
        match self {
            Self::Image => Scope::Image(image.to_owned()),
            Self::Registry => Scope::Registry(image.split('/').next().unwrap_or(image).to_owned()),
            Self::Global => Scope::Global,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    kind: String,
    api_version: String,
    cache_key_type: Kind,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<HashMap<String, Login>>,
}

#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// What a program answered.
struct Told {
    kind: Kind,
    /// For how long, if it says so; zero for not at all.
    life: Option<Duration>,
    logins: Vec<(String, Credential)>,
}

impl Plugins {
    pub(super) fn new(plugins: &KubeletPlugins) -> Self {
        Self {
            settings: Watched::new(plugins.config.clone()),
            directory: plugins.directory.clone(),
            kept: Kept::default(),
            kinds: Mutex::default(),
        }
    }

    pub(super) async fn answer(&self, place: Place<'_>) -> Answer {
        let (credentials, said) = self.ask(&place.to_string()).await;
        Answer { source: "kubelet plugins".to_owned(), credentials, said, quiet: false }
    }

    /// Asks every provider for the image, as kubelet does.
    async fn ask(&self, image: &str) -> (Vec<Credential>, String) {
        let settings = match self.settings.read(config::parse).await {
            Ok(settings) => settings,
            Err(unread) => return (Vec::new(), format!("{} {}", self.settings.path().display(), unread.why)),
        };
        let (mut credentials, mut said) = (Vec::new(), Vec::new());
        let fitting =
            |provider: &&Provider| provider.patterns.iter().any(|glob| pattern::matches(glob, image));
        for provider in settings.providers.iter().filter(fitting) {
            let name = &provider.name;
            match self.provider(provider, image).await {
                Err(why) => said.push(format!("{name} {why}")),
                Ok(logins) => {
                    let logins = logins.iter().map(|(glob, credential)| (glob.as_str(), credential));
                    let chosen = pattern::chosen(logins, image);
                    said.push(match chosen.is_empty() {
                        true => format!("{name} knows no login for {image}"),
                        false => format!("{name} for {image}"),
                    });
                    credentials.extend(chosen.into_iter().cloned());
                }
            }
        }
        if said.is_empty() {
            let path = self.settings.path().display();
            said.push(format!("no matchImages in {path} fits {image}"));
        }
        (credentials, said.join(", "))
    }

    async fn provider(&self, provider: &Provider, image: &str) -> Outcome {
        if provider.for_pods {
            return Err("is passed over: tokens of service accounts (tokenAttributes) are kubelet's to give"
                .to_owned());
        }
        if let Some(outcome) = self.kept(provider, image) {
            return outcome;
        }
        let kind = self.kinds.lock().get(&provider.name).copied().unwrap_or(Kind::Image);
        let _turn = self.kept.turn(&(provider.name.clone(), kind.scope(image))).await;
        if let Some(outcome) = self.kept(provider, image) {
            return outcome;
        }
        match self.run(provider, image).await {
            Ok(Told { kind, life, logins }) => {
                self.kinds.lock().insert(provider.name.clone(), kind);
                let key = (provider.name.clone(), kind.scope(image));
                self.kept.put(key, Ok(logins.clone()), life.unwrap_or(provider.life));
                Ok(logins)
            }
            Err(why) => {
                tracing::debug!(
                    plugin = provider.name,
                    image,
                    why,
                    "a credential provider plugin has failed"
                );
                let key = (provider.name.clone(), Kind::Image.scope(image));
                self.kept.put(key, Err(why.clone()), FAILED);
                Err(why)
            }
        }
    }

    /// What is still good, looked for as kubelet does.
    fn kept(&self, provider: &Provider, image: &str) -> Option<Outcome> {
        let kinds = [Kind::Image, Kind::Registry, Kind::Global];
        kinds.iter().find_map(|kind| self.kept.get(&(provider.name.clone(), kind.scope(image))))
    }

    async fn run(&self, provider: &Provider, image: &str) -> Result<Told, String> {
        let request = serde_json::json!({
            "kind": "CredentialProviderRequest",
            "apiVersion": provider.api_version,
            "image": image,
        });
        let mut command = Command::new(self.directory.join(&provider.name));
        command.args(&provider.arguments);
        command.envs(provider.environment.iter().map(|variable| (&variable.name, &variable.value)));
        let Said { status, output } = program::run(command, request.to_string().as_bytes()).await?;
        if !status.success() {
            return Err(format!("has failed ({status})"));
        }
        understand(&output, &provider.api_version)
    }

    /// The programs that gave this login, or none, are run anew.
    pub(super) fn refuse(&self, identity: Identity) {
        self.settings.forget();
        self.kept.refuse(|outcome| match outcome {
            // A failure ends by itself.
            Err(_) => false,
            Ok(logins) if logins.is_empty() => identity == Identity::Anonymous,
            Ok(logins) => logins.iter().any(|(_, credential)| Identity::of(Some(credential)) == identity),
        });
    }
}

/// The answer in a program's output, of which nothing is repeated.
fn understand(output: &[u8], api_version: &str) -> Result<Told, String> {
    let response: Response = serde_json::from_slice(output)
        .map_err(|_| "has not answered with a CredentialProviderResponse".to_owned())?;
    if response.kind != "CredentialProviderResponse" || response.api_version != api_version {
        return Err(format!("has not answered with a CredentialProviderResponse of {api_version}"));
    }
    let life = response.cache_duration.as_deref().map(duration).transpose();
    let life = life.map_err(|()| "has answered with a cacheDuration that is none".to_owned())?;
    let logins = response.auth.unwrap_or_default().into_iter();
    let logins = logins.filter(|(_, login)| !login.username.is_empty() || !login.password.is_empty());
    let logins = logins.map(|(glob, Login { username, password })| {
        (glob, Credential::Password { user: username, password: Secret::new(password) })
    });
    Ok(Told { kind: response.cache_key_type, life, logins: logins.collect() })
}

#[cfg(test)]
mod tests;
