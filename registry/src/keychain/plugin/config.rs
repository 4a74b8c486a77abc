//! The file that names the plugins. Pure.

use crate::keychain::parse_yaml;
use crate::keychain::pattern::Pattern;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::fmt;
use std::time::Duration;

/// Versions of the file's group, and of the calls'.
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];
const FILE_GROUP: &str = "kubelet.config.k8s.io";
const CALL_GROUP: &str = "credentialprovider.kubelet.k8s.io";
/// More than any duration means; keeps arithmetic on instants from overflowing.
const LONGEST: f64 = 366.0 * 24.0 * 3600.0;

/// What the file says.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) providers: Vec<Provider>,
}

/// One plugin.
#[derive(Debug)]
pub(super) struct Provider {
    /// Of the program.
    pub(super) name: String,
    /// Of the images it knows logins for.
    pub(super) patterns: Vec<String>,
    /// How long an answer is kept that does not say so.
    pub(super) life: Duration,
    pub(super) api_version: String,
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<Variable>,
    /// It wants a token of the pod's service account.
    pub(super) for_pods: bool,
}

/// An environment variable, whose value may be a secret.
#[derive(Deserialize)]
pub(super) struct Variable {
    pub(super) name: String,
    #[serde(default)]
    pub(super) value: String,
}

impl fmt::Debug for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    kind: String,
    api_version: String,
    #[serde(default)]
    providers: Vec<Written>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: String,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<IgnoredAny>,
}

/// What the text says, or why it is of no use, to follow the file's name.
pub(super) fn parse(text: &[u8]) -> Result<Settings, String> {
    let file: File = parse_yaml(text)?;
    if file.kind != "CredentialProviderConfig" || !is_version(&file.api_version, FILE_GROUP) {
        return Err(format!("is no CredentialProviderConfig of {FILE_GROUP}/v1, v1beta1 or v1alpha1"));
    }
    let mut providers: Vec<Provider> = Vec::with_capacity(file.providers.len());
    for written in file.providers {
        let provider = provider(written)?;
        if providers.iter().any(|other| other.name == provider.name) {
            return Err(format!("names the provider {:?} twice", provider.name));
        }
        providers.push(provider);
    }
    Ok(Settings { providers })
}

fn provider(written: Written) -> Result<Provider, String> {
    let name = written.name;
    if name.is_empty() || [".", ".."].contains(&name.as_str()) || name.contains(['/', ' ', '\0']) {
        return Err(format!("has a provider with the name {name:?}, which no program can have"));
    }
    if !is_version(&written.api_version, CALL_GROUP) {
        return Err(format!("has no apiVersion {CALL_GROUP}/v1, v1beta1 or v1alpha1 for {name:?}"));
    }
    if written.match_images.is_empty() {
        return Err(format!("has no matchImages for {name:?}"));
    }
    if let Some(bad) = written.match_images.iter().find(|glob| Pattern::parse(glob).is_none()) {
        return Err(format!("has {bad:?} among the matchImages of {name:?}, which is no pattern of images"));
    }
    let life = duration(&written.default_cache_duration)
        .map_err(|()| format!("has a defaultCacheDuration for {name:?} that is none (write 12h or 30m)"))?;
    Ok(Provider {
        name,
        patterns: written.match_images,
        life,
        api_version: written.api_version,
        arguments: written.args.unwrap_or_default(),
        environment: written.env.unwrap_or_default(),
        for_pods: written.token_attributes.is_some(),
    })
}

fn is_version(text: &str, group: &str) -> bool {
    text.split_once('/').is_some_and(|(found, version)| found == group && VERSIONS.contains(&version))
}

/// A duration as Go writes it: `1h30m`, `1.5s`, `0`. Nothing below zero, and at most a year.
pub(super) fn duration(text: &str) -> Result<Duration, ()> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut seconds) = (text, 0.0);
    while !rest.is_empty() || text.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(())?;
        let (number, after) = rest.split_at(digits);
        let unit = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let unit = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(()),
        };
        seconds += number.parse::<f64>().map_err(|_| ())? * unit;
        rest = after;
    }
    Ok(Duration::from_secs_f64(seconds.min(LONGEST)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, expected) in [
            ("0", Ok(0)),
            ("0s", Ok(0)),
            ("12h", Ok(43_200_000)),
            ("1h30m", Ok(5_400_000)),
            ("1h0m0s", Ok(3_600_000)),
            ("1.5s", Ok(1500)),
            ("300ms", Ok(300)),
            ("99999999999999h", Ok(31_622_400_000)),
            ("", Err(())),
            ("5", Err(())),
            ("h", Err(())),
            ("-1h", Err(())),
            ("1d", Err(())),
            ("1h 1m", Err(())),
            ("1.2.3s", Err(())),
        ] {
            assert_eq!(duration(text).map(|life| life.as_millis()), expected, "{text}");
        }
    }

    const YAML: &str = "
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages:
      - \"*.dkr.ecr.*.amazonaws.com\"
    defaultCacheDuration: \"12h\"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args:
      - --v=2
    env:
      - name: AWS_PROFILE
        value: hunter2
  - name: pods
    matchImages: [r.example]
    defaultCacheDuration: 0s
    apiVersion: credentialprovider.kubelet.k8s.io/v1beta1
    tokenAttributes:
      serviceAccountTokenAudience: x
      requireServiceAccount: true
";

    #[test]
    fn a_file_of_kubelets() {
        let Settings { providers } = parse(YAML.as_bytes()).unwrap();
        let [ecr, pods] = &providers[..] else { panic!("{providers:?}") };
        assert_eq!((ecr.name.as_str(), ecr.patterns.len()), ("ecr-credential-provider", 1));
        assert_eq!(
            (ecr.life.as_secs(), &ecr.arguments[..], ecr.for_pods),
            (43_200, &["--v=2".to_owned()][..], false)
        );
        assert!(pods.for_pods);
        assert!(!format!("{providers:?}").contains("hunter2"), "{providers:?}");
        let json = "{\n\t\"apiVersion\": \"kubelet.config.k8s.io/v1alpha1\", \"kind\": \"CredentialProviderConfig\",\n\
            \t\"providers\": [{\"name\": \"x\", \"matchImages\": [\"*.x.io\"], \"defaultCacheDuration\": \"0\",\n\
            \t\t\"apiVersion\": \"credentialprovider.kubelet.k8s.io/v1alpha1\", \"args\": null}]\n}\n";
        assert_eq!(parse(json.as_bytes()).unwrap().providers.len(), 1);
    }

    #[test]
    fn what_is_wrong_is_said_and_no_value_of_the_environment() {
        for (from, to, expected) in [
            ("kubelet.config.k8s.io/v1\n", "kubelet.config.k8s.io/v2\n", "is no CredentialProviderConfig"),
            ("kind: CredentialProviderConfig", "kind: Pod", "is no CredentialProviderConfig"),
            ("name: pods", "name: a/b", "which no program can have"),
            ("name: pods", "name: ecr-credential-provider", "twice"),
            ("matchImages: [r.example]", "matchImages: []", "no matchImages for \"pods\""),
            (
                "matchImages: [r.example]",
                "matchImages: [\"r.example:*\"]",
                "among the matchImages of \"pods\"",
            ),
            ("12h", "12 hours", "defaultCacheDuration for \"ecr-credential-provider\""),
            ("credentialprovider.kubelet.k8s.io/v1beta1", "x/v1", "no apiVersion credentialprovider"),
            ("value: hunter2", "value: [hunter2]", "is not valid (line 14"),
            ("name: AWS_PROFILE", "names: hunter2", "is not valid (line"),
        ] {
            let text = YAML.replacen(from, to, 1);
            assert_ne!(text, YAML, "{from}");
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{to}: {error}");
        }
        for text in [&b"\xff"[..], b"", b"a: &a [*a]", b"- - - {"] {
            assert!(parse(text).is_err());
        }
    }
}
