//! Registries as they are: hosts.toml, hosts that die and come back, certificates of a private authority.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use support::system::LOGIN;

use super::*;

/// A registry's name that no resolver knows: it is reached by what hosts.toml says, or not at all.
const NAME: &str = "images.invalid";
/// Files are looked at once a second; there is nothing to wait for but the time.
const LOOK: Duration = Duration::from_millis(1100);

/// Where containerd's settings of registries would be, with those of [`NAME`].
struct Hosts(tempfile::TempDir);

impl Hosts {
    fn new(text: &str) -> Hosts {
        let hosts = Hosts(guard::temp_dir());
        fs::create_dir(hosts.0.path().join(NAME)).unwrap();
        hosts.write(text);
        hosts
    }

    fn write(&self, text: &str) {
        let file = self.0.path().join(NAME).join("hosts.toml");
        fs::write(file.with_extension("new"), text).unwrap();
        fs::rename(file.with_extension("new"), file).unwrap();
    }

    fn config(&self) -> String {
        format!("{ONLY_WHAT_IS_READ}[registry]\nconfig_path = \"{}\"\n", self.0.path().display())
    }
}

fn asked(registries: &[&ScriptedRegistry]) -> Vec<bool> {
    registries.iter().map(|one| one.take_requests().iter().any(Logged::is_blob_get)).collect()
}

/// Pulls with the daemon's configuration.
#[track_caller]
pub fn pull(stand: &Stand, reference: &str) -> Value {
    let config = stand.lazurite.root().with_file_name("config.toml");
    let output = stand.lazurite.pull(&stand.containerd, &["--config", config.to_str().unwrap(), reference]);
    assert!(output.status.success(), "{}\n{}", text(&output), stand.lazurite.log());
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn reads_go_from_host_to_host_as_these_die_come_back_and_are_exchanged() {
    let (one, two, three) = (ScriptedRegistry::start(), ScriptedRegistry::start(), ScriptedRegistry::start());
    let order = |hosts: &[&ScriptedRegistry]| {
        let tables = hosts
            .iter()
            .map(|host| format!("[host.\"{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", host.url()));
        format!("server = \"{}\"\n{}", hosts[hosts.len() - 1].url(), tables.collect::<String>())
    };
    let hosts = Hosts::new(&order(&[&one, &two]));
    let Some(stand) = Stand::new(&hosts.config()) else { return };
    let layer = (0..24).fold(base(), |layer, n| layer.noise(format!("data/{n}"), 400_000, n + 1));
    let blobs = [LayerBlob::lazy(&Encoder::new().chunk_size(64 << 10).encode(&layer))];
    for registry in [&one, &two, &three] {
        registry.put_image("app", "v1", &blobs, &json!({"config": {"Cmd": ["/bin/sh"]}}));
    }
    let reference = format!("{NAME}/app:v1");
    assert_eq!(outcomes(&pull(&stand, &reference)), ["lazy"]);
    let files = Files::of(&stand, &layer);
    let read = |n: u64| files.read(n);
    // Four readers at once, of files nobody has read before, backwards: nothing is fetched ahead of them.
    let left = std::sync::atomic::AtomicU64::new(24);
    let read_next = || {
        let n = left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        read(n.checked_sub(1).expect("there are files left"));
    };
    let load = || {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(read_next);
            }
        });
    };
    let all = [&one, &two, &three];
    load();
    assert_eq!(asked(&all), [true, false, false], "the first that is named");
    one.stop();
    load();
    assert_eq!(asked(&all), [false, true, false], "the next");
    one.restart();
    two.stop();
    load();
    assert_eq!(asked(&all), [true, false, false], "and back");
    one.stop();
    std::thread::scope(|scope| {
        let readers = [scope.spawn(read_next), scope.spawn(read_next)];
        assert!(stand.lazurite.wait_log(&format!("failing host={}", two.host()), LIMIT));
        assert!(readers.iter().all(|reader| !reader.is_finished()), "they wait");
        two.restart();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    assert_eq!(asked(&all), [false, true, false]);
    // What is written into the file is used by the next look, without a restart.
    hosts.write(&order(&[&three]));
    std::thread::sleep(LOOK);
    load();
    assert_eq!(asked(&all), [false, false, true]);
    // What cannot be used is said, and changes nothing.
    hosts.write("[host.\"http://\"]\n");
    std::thread::sleep(LOOK);
    read_next();
    assert_eq!(asked(&all), [false, false, true]);
}

/// A registry that fetches from another sends a blob whole until it has it, whatever range it is asked for.
#[test]
fn a_registry_that_proxies_another_fills_a_layer_it_has_not_and_serves_one_it_has() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let origin = ScriptedRegistry::start();
    let layer = (0..24).fold(base(), |layer, n| layer.noise(format!("data/{n}"), 400_000, n + 1));
    let blob = LayerBlob::lazy(&Encoder::new().chunk_size(64 << 10).encode(&layer));
    let image = origin.put_image("app", "v1", &[blob], &json!({"config": {"Cmd": ["/bin/sh"]}}));
    let mut proxy = DockerRegistry::proxy(&dir.path().join("proxy"), &origin.url());
    let through_proxy = format!(
        "server = \"{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        origin.url(),
        proxy.address()
    );
    let hosts = Hosts::new(&format!("server = \"{}\"\n", origin.url()));
    let Some(stand) = Stand::new(&hosts.config()) else { return };
    let reference = format!("{NAME}/app:v1");
    assert_eq!(outcomes(&pull(&stand, &reference)), ["lazy"]);
    hosts.write(&through_proxy);
    std::thread::sleep(LOOK);
    let files = Files::of(&stand, &layer);
    files.read(20);
    let taken = "taking all of the blob as it comes";
    assert!(stand.lazurite.wait_log(taken, LIMIT), "{}", stand.lazurite.log());
    // Nothing else is fetched but what is read, and yet all is here.
    assert!(stand.lazurite.wait_log("all of the blob has come", LIMIT), "{}", stand.lazurite.log());
    // The proxy keeps it as well, and serves ranges from then on.
    let serves_ranges = || {
        let mut connection = TcpStream::connect(proxy.address()).unwrap();
        let path = format!("/v2/app/blobs/{}", image.layers[0]);
        write!(connection, "GET {path} HTTP/1.0\r\nRange: bytes=5-9\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        answer.starts_with(b"HTTP/1.0 206 ")
    };
    assert!(guard::eventually(LIMIT, serves_ranges), "{:?}", proxy.accesses());
    proxy.stop();
    origin.stop();
    for n in [15, 10, 5, 0] {
        files.read(n);
    }
}

/// A credential helper that answers with what is in its file `login`.
fn helper(dir: &Path) {
    let path = dir.join("docker-credential-test");
    support::write_script(&path, &format!("#!/bin/sh\ncat {}\n", dir.join("login").display()));
}

#[test]
fn it_is_said_with_which_login_a_registry_is_asked_and_whether_it_lets_in() {
    if !system::available() {
        return;
    }
    let dir = guard::temp_dir();
    let image = Image::busybox();
    let registry = DockerRegistry::locked(&dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    let (user, password) = LOGIN;
    let config = dir.path().join("config.json");
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap_or_default());
    helper(dir.path());
    let login = |password: &str| json!({"ServerURL": "", "Username": user, "Secret": password}).to_string();
    let check = |docker: Value| {
        fs::write(&config, docker.to_string()).unwrap();
        let output = Command::new("timeout")
            .args(["60", BINARY, "login-check", "--json", &reference])
            .env("DOCKER_CONFIG", dir.path())
            .env("PATH", &path)
            .output()
            .unwrap();
        let said = text(&output);
        assert!(!said.contains(password) && !said.contains("hunter2"), "{said}");
        (
            output.status.code(),
            serde_json::from_slice::<Value>(&output.stdout).unwrap_or_else(|_| panic!("{said}")),
        )
    };
    let host = registry.address();

    let (code, said) = check(json!({}));
    assert_eq!((code, &said["hosts"][0]["login"]), (Some(1), &json!("none")), "{said:#}");
    assert_eq!(said["answer"]["reason"], "auth_denied", "{said:#}");

    let (code, said) = check(json!({"auths": {host: {"username": user, "password": password}}}));
    assert_eq!((code, &said["hosts"][0]["login"]), (Some(0), &json!("user and password")), "{said:#}");

    let helped = json!({"credHelpers": {host: "test"}});
    fs::write(dir.path().join("login"), login("hunter2")).unwrap();
    let (code, said) = check(helped.clone());
    assert_eq!((code, &said["answer"]["reason"]), (Some(1), &json!("auth_denied")), "{said:#}");
    let error = said["answer"]["error"].as_str().unwrap();
    assert!(error.contains("auth failed at") && error.contains("docker-credential-test"), "{error}");
    fs::write(dir.path().join("login"), login(password)).unwrap();
    let (code, said) = check(helped);
    assert_eq!(code, Some(0), "{said:#}");
    assert!(said["hosts"][0]["from"].as_str().unwrap().contains("docker-credential-test"), "{said:#}");
}

#[test]
fn reads_go_on_after_a_password_was_rotated_under_a_running_container() {
    if !system::available() {
        return;
    }
    let registry = ScriptedRegistry::start();
    registry.set_auth(Auth::Basic { user: "user".to_owned(), password: "first".to_owned() });
    let docker = guard::temp_dir();
    let config = docker.path().join("config.json");
    let write = |password: &str| {
        let auths = json!({"auths": {registry.host(): {"username": "user", "password": password}}});
        fs::write(&config, auths.to_string()).unwrap();
    };
    write("first");
    let settings = format!("{ONLY_WHAT_IS_READ}[docker_config]\npath = \"{}\"\n", config.display());
    let Some(stand) = Stand::new(&settings) else { return };
    let layer = (0..8).fold(base(), |layer, n| layer.noise(format!("data/{n}"), 400_000, n + 1));
    let reference = push(&registry, &[LayerBlob::lazy(&Encoder::new().encode(&layer))]);
    assert_eq!(outcomes(&pull(&stand, &reference)), ["lazy"]);
    let files = Files::of(&stand, &layer);
    let read = |n: u64| files.read(n);
    read(7);
    registry.set_password("second");
    write("second");
    registry.take_requests();
    // Backwards: nothing is fetched ahead.
    read(4);
    let refused = registry.take_requests().iter().filter(|request| request.status == 401).count();
    assert!(refused <= 1, "{refused} requests were refused before the new password was used");
    read(1);
}
