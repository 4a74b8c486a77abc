//! Real programs as plugins.

use super::*;
use std::path::Path;

/// A plugin directory and a file that names one plugin.
struct Stand {
    directory: tempfile::TempDir,
}

const V1: &str = "credentialprovider.kubelet.k8s.io/v1";

impl Stand {
    fn new(name: &str) -> Self {
        let stand = Self { directory: tempfile::tempdir().unwrap() };
        let provider = serde_json::json!({
            "name": name, "matchImages": ["*.example", "*.example:5000"], "defaultCacheDuration": "12h",
            "apiVersion": V1, "args": ["--one", "two"], "env": [{"name": "WHO", "value": "me"}],
        });
        stand.configure(&[provider]);
        stand
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn configure(&self, providers: &[serde_json::Value]) {
        let file = serde_json::json!({
            "apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": providers,
        });
        std::fs::write(self.path().join("config"), file.to_string()).unwrap();
    }

    /// Writes a program that notes each call.
    fn program(&self, name: &str, script: &str) {
        let calls = self.path().join("calls");
        let script =
            format!("#!/bin/sh\nread request\necho \"$request $WHO $*\" >>{}\n{script}\n", calls.display());
        support::write_script(&self.path().join(name), &script);
    }

    /// A program that answers with one login.
    fn answering(&self, kind: &str, glob: &str, user: &str, duration: &str) {
        let auth = serde_json::json!({ glob: { "username": user, "password": "p" } });
        let answer = format!(
            r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","cacheKeyType":"{kind}","cacheDuration":{duration},"auth":{auth}}}"#
        );
        self.program("plugin", &format!("echo '{answer}'"));
    }

    fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path().join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn plugins(&self) -> Plugins {
        let (config, directory) = (self.path().join("config"), self.path().to_owned());
        Plugins::new(&KubeletPlugins { config, directory })
    }
}

async fn users(plugins: &Plugins, image: &str) -> Vec<String> {
    let (credentials, _) = plugins.ask(image).await;
    let users = credentials.into_iter().map(|credential| match credential {
        Credential::Password { user, .. } => user,
        other => panic!("{other:?}"),
    });
    users.collect()
}

fn identity(user: &str) -> Identity {
    Identity::of(Some(&Credential::Password { user: user.into(), password: Secret::new("p") }))
}

#[tokio::test]
async fn a_program_is_asked_as_kubelet_asks() {
    let stand = Stand::new("plugin");
    stand.answering("Image", "*.example", "ann", "null");
    assert_eq!(users(&stand.plugins(), "r.example/team/app").await, ["ann"]);
    let request = r#"{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"r.example/team/app","kind":"CredentialProviderRequest"}"#;
    assert_eq!(stand.calls(), [format!("{request} me --one two")]);
    assert_eq!(users(&stand.plugins(), "other.io/app").await, [""; 0]);
    assert_eq!(stand.calls().len(), 1);
}

#[tokio::test]
async fn answers_are_kept_for_what_they_are_good_for() {
    let images = ["a.example/x", "a.example/x", "a.example/y", "b.example/x"];
    for (kind, expected) in [("Image", 3), ("Registry", 2), ("Global", 1)] {
        let stand = Stand::new("plugin");
        stand.answering(kind, "*.example", "ann", "null");
        let plugins = stand.plugins();
        for image in images {
            assert_eq!(users(&plugins, image).await, ["ann"]);
        }
        assert_eq!(stand.calls().len(), expected, "{kind}");
    }
}

#[tokio::test]
async fn readers_share_one_call() {
    let stand = Stand::new("plugin");
    stand.answering("Registry", "*.example", "ann", "null");
    let plugins = stand.plugins();
    futures::future::join_all((0..8).map(|_| users(&plugins, "r.example/app"))).await;
    assert_eq!(stand.calls().len(), 1);
    // By now it is known for what its answers are good.
    plugins.refuse(identity("ann"));
    let images: Vec<_> = (0..8).map(|n| format!("r.example/{n}")).collect();
    futures::future::join_all(images.iter().map(|image| users(&plugins, image))).await;
    assert_eq!(stand.calls().len(), 2);
}

#[tokio::test]
async fn what_was_refused_is_asked_for_anew() {
    let stand = Stand::new("plugin");
    stand.answering("Registry", "*.example", "old", "\"6h\"");
    let plugins = stand.plugins();
    assert_eq!(users(&plugins, "r.example/app").await, ["old"]);
    stand.answering("Registry", "*.example", "new", "\"6h\"");
    assert_eq!(users(&plugins, "r.example/app").await, ["old"]);
    plugins.refuse(identity("another"));
    assert_eq!(users(&plugins, "r.example/app").await, ["old"]);
    plugins.refuse(identity("old"));
    assert_eq!(users(&plugins, "r.example/app").await, ["new"]);
}

#[tokio::test]
async fn only_logins_for_the_image_are_used_and_the_closest_first() {
    let stand = Stand::new("plugin");
    let login = |user: &str| serde_json::json!({ "username": user, "password": "p" });
    let auth = serde_json::json!({
        "*.example": login("any"), "r.example/team": login("team"), "other.example": login("other"),
        "r.example/team/app": {"username": "", "password": ""},
    });
    let answer = format!(
        r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","cacheKeyType":"Image","auth":{auth}}}"#
    );
    stand.program("plugin", &format!("echo '{answer}'"));
    let plugins = stand.plugins();
    assert_eq!(users(&plugins, "r.example/team/app").await, ["team", "any"]);
    assert_eq!(users(&plugins, "r.example:5000/app").await, [""; 0]);
}

#[tokio::test]
async fn failures_are_told_without_what_was_written_and_not_repeated_at_once() {
    let valid =
        format!(r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","cacheKeyType":"Image""#);
    for (script, expected) in [
        ("echo hunter2; echo hunter2 >&2; exit 3".to_owned(), "plugin has failed (exit status: 3)"),
        ("echo hunter2".to_owned(), "has not answered with a CredentialProviderResponse"),
        ("exec yes hunter2".to_owned(), "has failed"),
        (format!("echo '{}}}'", valid.replace("/v1", "/v9")), "CredentialProviderResponse of"),
        (format!("echo '{}}}'", valid.replace("Image", "hunter2")), "has not answered"),
        (format!("echo '{valid},\"cacheDuration\":\"hunter2\"}}'"), "cacheDuration"),
        (format!("echo '{valid},\"auth\":{{}}}}'"), "plugin knows no login for r.example/app"),
        (format!("echo '{valid},\"auth\":null}}'"), "plugin knows no login for r.example/app"),
    ] {
        let stand = Stand::new("plugin");
        stand.program("plugin", &script);
        let plugins = stand.plugins();
        for _ in 0..2 {
            let (credentials, said) = plugins.ask("r.example/app").await;
            assert!(credentials.is_empty());
            assert!(said.contains(expected) && !said.contains("hunter2"), "{script}: {said}");
        }
        assert_eq!(stand.calls().len(), 1, "{script}");
    }
}

#[tokio::test]
async fn what_cannot_be_run_is_said() {
    let stand = Stand::new("missing");
    let said = stand.plugins().ask("r.example/app").await.1;
    assert!(said.contains("missing cannot be run"), "{said}");
    let said = stand.plugins().ask("r.io/app").await.1;
    assert!(said.contains("no matchImages in") && said.contains("fits r.io/app"), "{said}");
    let pods = serde_json::json!({
        "name": "pods", "matchImages": ["*.example"], "defaultCacheDuration": "0s", "apiVersion": V1,
        "tokenAttributes": {"serviceAccountTokenAudience": "x", "requireServiceAccount": true},
    });
    stand.configure(&[pods]);
    let said = stand.plugins().ask("r.example/app").await.1;
    assert!(said.contains("pods is passed over"), "{said}");
    std::fs::write(stand.path().join("config"), "kind: Pod").unwrap();
    let said = stand.plugins().ask("r.example/app").await.1;
    assert!(said.contains("/config is not valid"), "{said}");
    std::fs::remove_file(stand.path().join("config")).unwrap();
    let said = stand.plugins().ask("r.example/app").await.1;
    assert!(said.contains("cannot be read"), "{said}");
}
