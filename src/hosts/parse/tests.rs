//! What a file says, and what is said of files that say nothing usable.

use super::*;

fn read(text: &str) -> (HostsFile, Vec<String>) {
    let (file, notices) = parse("hosts.toml", text).unwrap();
    (file, notices.iter().map(ToString::to_string).collect())
}

fn ok(text: &str) -> HostsFile {
    let (file, notices) = read(text);
    assert_eq!(notices, Vec::<String>::new());
    file
}

fn at(url: &str) -> HostSettings {
    HostSettings::at(url, Root::Standard).unwrap()
}

fn paths(named: &[Named]) -> Vec<&str> {
    named.iter().map(|named| named.path.to_str().unwrap()).collect()
}

#[test]
fn nothing_is_the_registry_itself() {
    for text in ["", "server = ''", "# nothing", "[host]"] {
        assert_eq!(ok(text), HostsFile { hosts: vec![], server: Described::default() }, "{text}");
    }
}

/// The example of containerd's documentation, with every key.
const ALL: &str = r#"
server = "https://registry-1.docker.io"    # Exclude this to not use upstream

[host."https://public-mirror.example.com"]
  capabilities = ["pull"]                  # Requires less trust, won't resolve tag to digest from this host
[host."https://docker-mirror.internal"]
  capabilities = ["pull", "Resolve"]
  ca = "docker-mirror.crt"                 # Or absolute path /etc/containerd/certs.d/docker.io/docker-mirror.crt
  dial_timeout = "1m30s"
[host."http://a.example:5000/v2/proxy"]
  override_path = true
  ca = ["/etc/certs/test-1-ca.pem", "b.pem"]
  client = [["/c/test-1.cert", "/c/test-1.key"], ["/c/2.cert", "2.key"], "both.pem"]
  skip_verify = true
  [host."http://a.example:5000/v2/proxy".header]
    x-custom-1 = "custom header"
    x-custom-2 = ["1", "2"]
"#;

#[test]
fn every_key_in_the_order_of_the_file() {
    let HostsFile { hosts, server } = ok(ALL);
    assert_eq!(server, Described { settings: at("registry-1.docker.io"), ..Described::default() });
    let [public, internal, proxy] = &hosts[..] else { panic!("{hosts:?}") };

    let mut expected = at("https://public-mirror.example.com");
    expected.set_capabilities(&[Capability::Pull]);
    assert_eq!(public.settings, expected);

    let mut expected = at("https://docker-mirror.internal");
    expected.set_capabilities(&[Capability::Pull, Capability::Resolve]);
    expected.set_dial_timeout(Duration::from_secs(90));
    assert_eq!(internal.settings, expected);
    assert_eq!(paths(&internal.ca), ["docker-mirror.crt"]);
    assert_eq!(internal.verification, None);

    let mut expected = HostSettings::at("http://a.example:5000/v2/proxy", Root::Given).unwrap();
    for (name, value) in [("x-custom-1", "custom header"), ("x-custom-2", "1"), ("x-custom-2", "2")] {
        expected.add_header(name, value).unwrap();
    }
    assert_eq!(proxy.settings, expected);
    assert_eq!(paths(&proxy.ca), ["/etc/certs/test-1-ca.pem", "b.pem"]);
    let client = proxy.client.iter().map(|(certificate, key)| {
        (certificate.path.to_str().unwrap(), key.as_ref().map(|key| key.to_str().unwrap()))
    });
    let expected =
        [("/c/test-1.cert", Some("/c/test-1.key")), ("/c/2.cert", Some("2.key")), ("both.pem", None)];
    assert_eq!(client.collect::<Vec<_>>(), expected);
    assert_eq!(proxy.verification, Some(Verification::Skipped));
}

#[test]
fn hosts_keep_their_order_whatever_their_names() {
    let text = "[host.'https://b.example']\n[host.'https://c.example']\n[host.'https://a.example']\n\
                [host.'https://c.example'.header]\nx = '1'\n";
    let hosts: Vec<HostSettings> = ok(text).hosts.into_iter().map(|host| host.settings).collect();
    let mut c = at("https://c.example");
    c.add_header("x", "1").unwrap();
    assert_eq!(hosts, [at("https://b.example"), c, at("https://a.example")]);
}

#[test]
fn what_stands_beside_server_is_about_it() {
    let server = ok("server = 'https://s.example'\nskip_verify = true\nca = 'a'\ncapabilities = ['pull']\n\
                     client = 'both.pem'\n[header]\nx = '1'")
    .server;
    assert!(server.settings.can(Capability::Pull) && !server.settings.can(Capability::Push));
    assert_eq!((paths(&server.ca), server.verification), (vec!["a"], Some(Verification::Skipped)));
    assert_eq!(server.client.len(), 1);
    assert_eq!(ok("client = [['me.pem', '']]").server.client[0].1, None);
    assert_eq!(ok("dial_timeout = '0s'").server, Described::default());
    let server = ok("skip_verify = false\ncapabilities = ['pull']").server;
    assert!(server.settings.can(Capability::Push), "the registry itself can do everything");
    assert_eq!(server.verification, Some(Verification::Full));
}

#[test]
fn complaints_name_file_line_and_key() {
    for (text, expected) in [
        ("server = 1", "hosts.toml:1: server must be a string, but is 1"),
        ("\nserver = 'ftp://x'", "hosts.toml:2: server: the scheme must be http or https"),
        ("[host.'']", "hosts.toml:1: host: the name of a host must be its URL"),
        ("host = 'x'", "hosts.toml:1: host must be a table, but is 'x'"),
        ("\n[host.'https://h/?q']", "hosts.toml:2: host: must be a scheme, a host and a path only"),
        (
            "[host.'https://h']\ncapabilities = 'pull'",
            "hosts.toml:2: host.\"https://h\".capabilities must be a list of \"pull\", \"resolve\" and \"push\", \
             but is 'pull'",
        ),
        (
            "[host.'https://h']\ncapabilities = ['pull', 'fetch']",
            "hosts.toml:2: host.\"https://h\".capabilities must be a list of \"pull\", \"resolve\" and \"push\", \
             but is 'fetch'",
        ),
        ("ca = [1]", "hosts.toml:1: ca must be a string or a list of strings, but is 1"),
        (
            "client = [['a', 'b', 'c']]",
            "hosts.toml:1: client must be a string, a list of strings, or a list of pairs of certificate and key, \
             but is ['a', 'b', 'c']",
        ),
        ("skip_verify = 'yes'", "hosts.toml:1: skip_verify must be true or false, but is 'yes'"),
        ("override_path = 1", "hosts.toml:1: override_path must be true or false, but is 1"),
        (
            "dial_timeout = '5'",
            "hosts.toml:1: dial_timeout must be a time such as \"5s\" or \"1m30s\", but is '5'",
        ),
        (
            "header = { x = 17 }",
            "hosts.toml:1: header.x must be a string or a list of strings, but is of type integer",
        ),
        ("[header]\nx = \"hunter2\\n\"", "hosts.toml:2: header.x: the value has forbidden characters"),
        ("[header]\n'a b' = 'hunter2'", "hosts.toml:2: header.a b: not a header name"),
    ] {
        assert_eq!(parse("hosts.toml", text).unwrap_err().to_string(), expected, "{text}");
    }
    for text in [
        "[host.'https://me:hunter2@h']\noverride_path = 1",
        "[host]\n'https://me:hunter2@h' = 1",
        "server = 'https://me:hunter2@h'\noverride_path = true",
        "server = 'x",
        "[host",
        "[header]\nx = 'hunter2' y",
        "[host.'https://me:hunter2@h']",
    ] {
        let error = parse("hosts.toml", text).unwrap_err().to_string();
        assert!(error.starts_with("hosts.toml:") && !error.contains("hunter2"), "{error}");
    }
}

#[test]
fn unknown_keys_are_named_with_the_nearest() {
    let (_, notices) = read(
        "sever = 'x'\nfoo = 1\n[host.'https://h']\nskip_verfy = true\ncapabilites = []\n[host.'https://h'.mirror]\n\
         ",
    );
    assert_eq!(
        notices,
        [
            "hosts.toml:1: unknown key sever, ignored; did you mean server?",
            "hosts.toml:2: unknown key foo, ignored",
            "hosts.toml:4: unknown key host.\"https://h\".skip_verfy, ignored; did you mean skip_verify?",
            "hosts.toml:5: unknown key host.\"https://h\".capabilites, ignored; did you mean capabilities?",
            "hosts.toml:6: unknown table host.\"https://h\".mirror, ignored",
        ]
    );
}

#[test]
fn rewrites_are_k3ss() {
    let text = "server = 'https://s'\n[host.'https://h']\n[host.'https://h'.rewrite]\n'^rancher/(.*)' = 'mirror/$1'\n";
    let (file, notices) = read(text);
    let mut expected = HostSettings::at("https://h", Root::Standard).unwrap();
    expected.add_rewrite("^rancher/(.*)", "mirror/$1").unwrap();
    assert_eq!((&file.hosts[0].settings, notices), (&expected, Vec::<String>::new()));
    for (rules, expected) in [
        ("'(' = 'b'", "hosts.toml:3: host.\"https://h\".rewrite.\"(\": unclosed group"),
        ("'a' = 1", "hosts.toml:3: host.\"https://h\".rewrite.\"a\" must be a string, but is 1"),
    ] {
        let text = format!("[host.'https://h']\n[host.'https://h'.rewrite]\n{rules}\n");
        assert_eq!(parse("hosts.toml", &text).unwrap_err().to_string(), expected);
    }
}

#[test]
fn durations_are_gos() {
    let seconds = |seconds| Some(Duration::from_secs_f64(seconds));
    for (text, expected) in [
        ("5s", seconds(5.0)),
        ("1h2m3s", seconds(3723.0)),
        ("1.5s", seconds(1.5)),
        ("300ms", seconds(0.3)),
        ("0", seconds(0.0)),
        ("0s", seconds(0.0)),
        ("+1m", seconds(60.0)),
        ("", None),
        ("5", None),
        ("s", None),
        ("5x", None),
        ("-5s", None),
        ("1..5s", None),
        ("5s ", None),
        ("1e9h", None),
        ("99999999999999999999h", None),
    ] {
        assert_eq!(duration(text), expected, "{text:?}");
    }
}
