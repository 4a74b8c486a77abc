//! Logins of a daemon: kubelet's plugins, what is kept of them, what is said of them, and proxies on the way.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::{Arc, Mutex},
};

use super::{hosts::pull, *};

/// kubelet's settings with one plugin for `host`, which answers with what is in `login`.
struct Plugin(tempfile::TempDir);

impl Plugin {
    fn new(host: &str, login: (&str, &str)) -> Plugin {
        let plugin = Plugin(guard::temp_dir());
        let version = "credentialprovider.kubelet.k8s.io/v1";
        let provider = json!({
            "name": "cloud", "matchImages": [host], "defaultCacheDuration": "12h", "apiVersion": version,
        });
        let file = json!({
            "apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [provider],
        });
        fs::write(plugin.0.path().join("config.json"), file.to_string()).unwrap();
        let script = format!("#!/bin/sh\ncat {}/login\n", plugin.0.path().display());
        support::write_script(&plugin.0.path().join("cloud"), &script);
        plugin.knows(host, login);
        plugin
    }

    fn knows(&self, host: &str, (username, password): (&str, &str)) {
        let answer = json!({
            "kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "cacheKeyType": "Registry", "auth": {host: {"username": username, "password": password}},
        });
        fs::write(self.0.path().join("login"), answer.to_string()).unwrap();
    }

    fn config(&self) -> String {
        let directory = self.0.path().display();
        format!("[kubelet_plugins]\nconfig = \"{directory}/config.json\"\nbin_dir = \"{directory}\"\n")
    }
}

/// Files under `directory` that have one of `secrets` in them.
fn holding(directory: &Path, secrets: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            found.extend(holding(&path, secrets));
        } else if kind.is_file() {
            let contents = fs::read(&path).unwrap();
            let has =
                |secret: &&str| contents.windows(secret.len()).any(|window| window == secret.as_bytes());
            if secrets.iter().any(has) {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn reads_go_on_after_a_plugins_password_was_rotated_and_nothing_of_it_is_written() {
    if !system::available() {
        return;
    }
    const PASSWORDS: [&str; 2] = ["hunter2-first", "hunter2-second"];
    let registry = ScriptedRegistry::start();
    registry.set_auth(Auth::Basic { user: "user".to_owned(), password: PASSWORDS[0].to_owned() });
    let plugin = Plugin::new(&registry.host(), ("user", PASSWORDS[0]));
    let settings = format!("{ONLY_WHAT_IS_READ}log.level = \"trace\"\n{}", plugin.config());
    let Some(stand) = Stand::new(&settings) else { return };
    let layer = (0..8).fold(base(), |layer, n| layer.noise(format!("data/{n}"), 400_000, n + 1));
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&layer))]);
    assert_eq!(outcomes(&pull(&stand, &reference)), ["lazy"]);
    let files = Files::of(&stand, &layer);
    files.read(7);
    registry.set_password(PASSWORDS[1]);
    plugin.knows(&registry.host(), ("user", PASSWORDS[1]));
    registry.take_requests();
    files.read(4);
    let refused = registry.take_requests().iter().filter(|request| request.status == 401).count();
    assert!(refused <= 1, "{refused} requests were refused before the new password was used");
    files.read(1);

    let log = stand.lazurite.log();
    assert!(log.contains("status=401"), "requests were logged");
    let mut secrets = PASSWORDS.to_vec();
    // Base64 of what begins with `user:hunter2`.
    secrets.push("dXNlcjpodW50ZXIy");
    for secret in &secrets {
        assert!(!log.contains(secret), "{secret} was logged");
    }
    let root = stand.lazurite.root();
    assert!(root.join("layers").is_dir());
    for kept in ["layers", "snapshots"] {
        let found = holding(&root.join(kept), &secrets);
        assert!(found.is_empty(), "{found:?}");
    }
}

#[test]
fn every_source_is_shown_with_what_it_says() {
    let registry = ScriptedRegistry::start();
    registry.set_auth(Auth::Basic { user: "user".to_owned(), password: "hunter2".to_owned() });
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&base()))]);
    let plugin = Plugin::new(&registry.host(), ("user", "hunter2-ended"));
    let dir = guard::temp_dir();
    let (docker, config) = (dir.path().join("docker.json"), dir.path().join("config.toml"));
    let auths = json!({"auths": {registry.host(): {"username": "user", "password": "hunter2"}}});
    fs::write(&docker, auths.to_string()).unwrap();
    let text = format!("{}[docker_config]\npath = \"{}\"\n", plugin.config(), docker.display());
    fs::write(&config, text + "[containers_auth]\npath = \"/nonexistent/auth.json\"\n").unwrap();
    let check = |more: &[&str]| {
        let mut command = Command::new("timeout");
        command.args(["60", BINARY, "login-check", "--config"]).arg(&config).args(more);
        let output = command.arg(&reference).output().unwrap();
        let said = super::text(&output);
        assert!(output.status.success() && !said.contains("hunter2"), "{said}");
        said
    };
    let said: Value = serde_json::from_str(&check(&["--json"])).unwrap();
    let sources = said["hosts"][0]["sources"].as_array().unwrap();
    let shown: Vec<(&str, &str)> = sources
        .iter()
        .map(|source| (source["source"].as_str().unwrap(), source["login"].as_str().unwrap()))
        .collect();
    let docker = format!("docker config {}", docker.display());
    let expected = [
        ("kubelet plugins", "user and password"),
        (docker.as_str(), "user and password"),
        ("containers auth file /nonexistent/auth.json", "none"),
    ];
    assert_eq!(shown, expected, "{said:#}");
    assert_eq!(said["answer"]["ok"], true, "the plugin's login is refused, docker's is not: {said:#}");
    let said = check(&[]);
    let at = |part: &str| said.find(part).unwrap_or_else(|| panic!("{part}: {said}"));
    assert!(at("  kubelet plugins: ") < at("  docker config ") && at("let in: ") > 0, "{said}");
}

/// A proxy that notes what it is asked for and gives nothing.
fn refusing_proxy() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (url, asked) = (format!("http://{}", listener.local_addr().unwrap()), Arc::default());
    let notes: Arc<Mutex<Vec<String>>> = Arc::clone(&asked);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            notes.lock().unwrap().push(head[0].clone());
            let _ = stream
                .write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    (url, asked)
}

#[test]
fn registries_are_reached_through_the_proxies_of_the_environment_unless_they_are_exempt() {
    let registry = ScriptedRegistry::start();
    push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&base()))]);
    let (refusing, asked) = refusing_proxy();
    let dir = guard::temp_dir();
    let config = dir.path().join("config.toml");
    fs::write(&config, "blob.max_retries = 0\nregistry.config_path = \"\"\n").unwrap();
    let check = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = Command::new("timeout");
        command.args(["60", BINARY, "login-check", "--json", "--config"]).arg(&config).args(arguments);
        for name in ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        let output =
            command.env("DOCKER_CONFIG", dir.path()).envs(environment.iter().copied()).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)))
    };
    let asked = || std::mem::take(&mut *asked.lock().unwrap());

    // In the clear: the proxy is asked for the whole URL, which the test kit's registry can be.
    let proxy = registry.url();
    let said = check(&["--plain-http", "images.invalid/app:v1"], &[("http_proxy", &proxy)]);
    assert_eq!(said["answer"]["ok"], true, "{said:#}");
    let requests = registry.take_requests();
    assert!(requests.iter().all(|request| request.headers["host"] == "images.invalid"), "{requests:?}");

    // By TLS: a tunnel.
    let https = [("https_proxy", refusing.as_str())];
    let said = check(&["images.invalid:8443/app:v1"], &https);
    assert_eq!(said["answer"]["ok"], false, "{said:#}");
    assert_eq!(asked(), ["CONNECT images.invalid:8443 HTTP/1.1"]);

    for exempt in ["images.invalid", ".invalid", "other.example,images.invalid", "*"] {
        let said = check(&["images.invalid:8443/app:v1"], &[https[0], ("no_proxy", exempt)]);
        assert_eq!(said["answer"]["ok"], false, "{said:#}");
        assert_eq!(asked(), [""; 0], "{exempt}");
    }
    // A registry of this node is never asked for elsewhere.
    let local = format!("{}/app:v1", registry.host());
    let said =
        check(&[&local], &[("http_proxy", &refusing), ("https_proxy", &refusing), ("all_proxy", &refusing)]);
    assert_eq!((&said["answer"]["ok"], asked()), (&json!(true), Vec::new()), "{said:#}");
}
