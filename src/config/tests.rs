//! What is read, refused, named and rendered; and that the example and the reference page are what the structs say.

use std::time::Duration;

use fusefs::{Audits, CacheConfig, Fill};

use super::convert::Fetch;
use super::*;

fn ok(text: &str) -> (Config, Vec<String>) {
    let (config, notices) = parse("c.toml", text).unwrap();
    (config, notices.iter().map(ToString::to_string).collect())
}

fn fault(text: &str) -> String {
    parse("c.toml", text).unwrap_err().to_string()
}

/// The same text with every commented key switched on.
fn uncommented(text: &str) -> String {
    let is_key = |line: &str| {
        line.strip_prefix("# ").is_some_and(|rest| {
            rest.starts_with("[[")
                || rest.split_once(" = ").is_some_and(|(key, _)| {
                    !key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                })
        })
    };
    text.lines().map(|line| if is_key(line) { &line[2..] } else { line }).collect::<Vec<_>>().join("\n")
}

#[test]
fn example_file_is_what_the_structs_say() {
    assert_eq!(
        include_str!("../../config.toml.example"),
        render(&Config::default()),
        "write it anew: lazurite config example >config.toml.example"
    );
}

#[test]
fn reference_page_is_what_the_structs_say() {
    assert_eq!(
        include_str!("../../docs/CONFIGURATION.md"),
        render_reference(),
        "write it anew: lazurite config reference >docs/CONFIGURATION.md"
    );
}

#[test]
fn example_loads_as_the_defaults() {
    assert_eq!(ok(&render(&Config::default())), (Config::default(), vec![]));
}

#[test]
fn every_default_in_the_example_is_the_default() {
    let (mut config, notices) = ok(&uncommented(&render(&Config::default())));
    assert_eq!(notices, Vec::<String>::new());
    let host = config.resolver.host.remove("docker.io").unwrap();
    assert_eq!(host.mirrors, [Mirror { host: "mirror.example.com".to_owned(), ..Mirror::default() }]);
    assert_eq!(config, Config::default());
}

#[test]
fn changed_values_are_rendered_and_read_back() {
    let text = "root = '/srv/lz'\n[blob]\nmax_retries = 0\n[log]\nformat = 'json'\n\
                [[resolver.host.\"docker.io\".mirrors]]\nhost = 'm:5000'\ninsecure = true\n";
    let (config, _) = ok(text);
    let rendered = render(&config);
    assert!(rendered.contains("\nroot = \"/srv/lz\"\n"), "{rendered}");
    assert!(rendered.contains("\nmax_retries = 0\n"), "{rendered}");
    assert_eq!(ok(&rendered), (config, vec![]));
}

#[test]
fn header_values_are_never_shown() {
    let text = "[[resolver.host.\"docker.io\".mirrors]]\nhost = 'm'\nheader = { Authorization = 'Basic c2VjcmV0' }\n";
    let (config, _) = ok(text);
    assert!(!render(&config).contains("c2VjcmV0"));
    assert!(!format!("{config:?}").contains("c2VjcmV0"));
    let wrong = fault("[[resolver.host.\"docker.io\".mirrors]]\nhost = 'm'\nheader = { A = 1234567 }\n");
    assert!(!wrong.contains("1234567"), "{wrong}");
    assert!(wrong.starts_with("c.toml:3: resolver.host.\"docker.io\".mirrors.header"), "{wrong}");
}

#[test]
fn unknown_names_are_reported_with_line_and_nearest_name() {
    let cases = [
        ("prefetch_sise = 1", "c.toml:1: unknown key prefetch_sise, ignored; did you mean prefetch_size?"),
        ("\n\nmax_retries = 1", "c.toml:3: unknown key max_retries, ignored; did you mean blob.max_retries?"),
        (
            "[blob]\nmax_retires = 1",
            "c.toml:2: unknown key blob.max_retires, ignored; did you mean blob.max_retries?",
        ),
        ("[bolb]\nmax_retries = 1", "c.toml:1: unknown table bolb, ignored; did you mean blob?"),
        ("wholly_else = 1", "c.toml:1: unknown key wholly_else, ignored"),
        (
            "[fuse]\nattr_timeuot = 1",
            "c.toml:2: unknown key fuse.attr_timeuot, ignored; did you mean fuse.attr_timeout?",
        ),
        (
            "[[resolver.host.\"a.io\".mirrors]]\nhost = 'm'\ninsecur = true",
            "c.toml:3: unknown key resolver.host.\"a.io\".mirrors.insecur, ignored; \
             did you mean resolver.host.*.mirrors.insecure?",
        ),
        (
            "[resolver.host.\"a.io\"]\nmirror = []",
            "c.toml:2: unknown key resolver.host.\"a.io\".mirror, ignored; did you mean resolver.host.*.mirrors?",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(ok(text).1, [expected], "{text}");
    }
}

#[test]
fn wrong_types_name_key_line_and_expectation() {
    let cases = [
        (
            "[blob]\n\nmax_retries = \"ten\"",
            "c.toml:3: blob.max_retries must be a whole number, 0 or more, but is \"ten\"",
        ),
        ("prefetch_size = -1", "c.toml:1: prefetch_size must be a whole number, 0 or more, but is -1"),
        (
            "[blob]\nmax_retries = 5000000000",
            "c.toml:2: blob.max_retries must be a whole number, 0 or more, but is 5000000000",
        ),
        ("\nnoprefetch = 1", "c.toml:2: noprefetch must be true or false, but is 1"),
        ("blob = 3", "c.toml:1: blob must be a table, but is 3"),
        ("root = 3", "c.toml:1: root must be a path, but is 3"),
        (
            "[log]\nlevel = \"loud\"",
            "c.toml:2: log.level must be one of \"error\", \"warn\", \"info\", \"debug\", \"trace\", but is \"loud\"",
        ),
        (
            "[[resolver.host.\"a.io\".mirrors]]\nhost = 'm'\ninsecure = 'no'",
            "c.toml:3: resolver.host.\"a.io\".mirrors.insecure must be true or false, but is 'no'",
        ),
        (
            "[resolver.host.\"a.io\"]\nmirrors = 'm'",
            "c.toml:2: resolver.host.\"a.io\".mirrors must be an array of tables, but is 'm'",
        ),
        ("[resolver]\nhost = 1", "c.toml:2: resolver.host must be a table, but is 1"),
    ];
    for (text, expected) in cases {
        assert_eq!(fault(text), expected, "{text}");
    }
}

#[test]
fn contents_that_make_no_sense_are_refused() {
    let cases = [
        ("a = 1\nroot = 'var/lib'", "c.toml:2: root must be an absolute path, but is \"var/lib\""),
        (
            "[cri_keychain]\nenable_keychain = true\nlisten_path = ''",
            "c.toml:3: cri_keychain.listen_path must be an absolute path, but is \"\"",
        ),
        (
            "[cri_keychain]\nenable_keychain = true\nlisten_path = '/c'\nimage_service_path = '/c'",
            "c.toml:1: cri_keychain.listen_path must not be containerd's own socket (image_service_path)",
        ),
        (
            "[[resolver.host.\"a.io\".mirrors]]\ninsecure = true",
            "c.toml:1: resolver.host.\"a.io\".mirrors: host is missing; it names the mirror",
        ),
        (
            "[[resolver.host.\"a.io\".mirrors]]\nhost = \"http://m\"",
            "c.toml:2: resolver.host.\"a.io\".mirrors.host must be a host name with an optional port, but is \
             \"http://m\"; plain http is set with insecure = true",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(fault(text), expected, "{text}");
    }
    ok("[cri_keychain]\nlisten_path = ''");
    let syntax = fault("root = \"/x\"\nnoprefetch = = true\n");
    assert!(syntax.starts_with("c.toml:2: "), "{syntax}");
}

#[test]
fn verification_cannot_be_switched_off() {
    for key in ["disable_verification", "allow_no_verification"] {
        let refusal = fault(&format!("\n{key} = true"));
        assert!(refusal.starts_with(&format!("c.toml:2: {key} is refused: ")), "{refusal}");
        assert_eq!(ok(&format!("{key} = false")).1, Vec::<String>::new());
    }
}

/// Every key stargz-snapshotter knows, with values of the right type.
const INCUMBENT: &str = r#"
http_cache_type = "memory"
filesystem_cache_type = "directory"
resolve_result_entry_ttl_sec = 120
resolve_result_entry = 10
prefetch_size = 10485760
prefetch_timeout_sec = 10
prefetch_async_size = 1
noprefetch = false
no_background_fetch = true
debug = false
allow_no_verification = false
disable_verification = false
max_concurrency = 4
no_prometheus = false
log_file_access = false
metrics_address = "127.0.0.1:8234"
debug_address = "/run/d.sock"
ipfs = false
metadata_store = "memory"

[blob]
valid_interval = 60
check_always = true
chunk_size = 50000
fetching_timeout_sec = 120
force_single_range_mode = false
prefetch_chunk_size = 0
max_retries = 3
min_wait_msec = 10
max_wait_msec = 300000

[directory_cache]
max_lru_cache_entry = 10
max_cache_fds = 10
sync_add = false
direct = true
fadv_dontneed = false

[fuse]
attr_timeout = 1
entry_timeout = 1
passthrough = false
merge_buffer_size = 419430400
merge_worker_count = 10

[resolver]
request_timeout_sec = 20

[[resolver.host."docker.io".mirrors]]
host = "mirror.gcr.io"
[[resolver.host."docker.io".mirrors]]
host = "m2:5000"
insecure = true
request_timeout_sec = 5
[resolver.host."docker.io".mirrors.header]
x-one = "1"
x-two = ["2", "3"]
[[resolver.host."plain.example:5000".mirrors]]
host = "plain.example:5000"
insecure = true
[[resolver.host."plain.example:5000".mirrors]]
host = "slow"
request_timeout_sec = -1

[kubeconfig_keychain]
enable_keychain = true
kubeconfig_path = "/etc/kubernetes/snapshotter/config.conf"

[cri_keychain]
enable_keychain = true
image_service_path = "/run/containerd/containerd.sock"
listen_path = "/run/x.sock"

[snapshotter]
allow_invalid_mounts_on_restart = true

[fuse_manager]
enable = false
address = "/run/f.sock"
path = "/usr/local/bin/stargz-fuse-manager"
metrics_address = ""
"#;

#[test]
fn the_incumbents_file_is_accepted_as_it_is() {
    let (config, notices) = ok(INCUMBENT);
    assert!(notices.iter().all(|notice| notice.contains("accepted and ignored: ")), "{notices:#?}");
    assert!(
        notices.iter().any(|notice| notice == "c.toml:8: accepted and ignored: prefetch_async_size (prefetching is always in the background)"),
        "{notices:#?}"
    );
    for silent in
        ["debug (", "fuse_manager.enable", "fuse_manager.metrics_address", "blob.force_single_range_mode"]
    {
        assert!(!notices.iter().any(|notice| notice.contains(silent)), "{silent}: {notices:#?}");
    }
    assert_eq!(config.prefetch_size, 10 << 20);
    assert_eq!(config.blob.max_retries, 3);
    assert_eq!(config.cri_keychain.listen_path, Path::new("/run/x.sock"));
}

#[test]
fn no_accepted_key_has_an_effect_as_well() {
    let declared: Vec<String> = Config::default()
        .sections()
        .into_iter()
        .flat_map(|section| {
            section.entries.into_iter().map(move |entry| format!("{}.{}", section.path, entry.name))
        })
        .collect();
    for (key, _) in incumbent::IGNORED.iter().chain(incumbent::REFUSED) {
        assert!(!declared.iter().any(|name| name.trim_start_matches('.') == *key), "{key}");
    }
}

#[test]
fn settings_of_the_data_plane() {
    let (config, _) = ok(INCUMBENT);
    let expected = Fetch {
        read_deadline: Duration::from_secs(120),
        prefetch: Prefetch::On { unmarked_bytes: 10 << 20 },
        fill: Fill::Off,
        background_downloads: 4,
        find_tocs: true,
        background_rate: None,
        audits: Audits::On,
        cache: CacheConfig::default(),
        in_flight_bytes: 64 << 20,
    };
    assert_eq!(config.fetch(), expected);

    let (config, _) = ok(
        "max_concurrency = 0\nnoprefetch = true\n[fetch]\nmax_in_flight_bytes = 0\n[blob]\nfetching_timeout_sec = 0",
    );
    let expected = Fetch { prefetch: Prefetch::Off, ..Config::default().fetch() };
    assert_eq!(config.fetch(), expected);
}

#[test]
fn settings_of_the_registry_client() {
    let (config, _) = ok(INCUMBENT);
    let registry = config.registry();
    assert_eq!(registry.first_byte_timeout, Duration::from_secs(20));
    assert_eq!(registry.idle_timeout, Duration::from_secs(20));
    assert_eq!(registry.retries, 3);
    assert_eq!(registry.backoff_min, Duration::from_millis(10));
    assert_eq!(registry.backoff_max, Duration::from_secs(300));

    let docker = &registry.hosts["docker.io"];
    assert!(!docker.insecure);
    assert_eq!(docker.mirrors.len(), 2);
    assert_eq!(docker.mirrors[1].host, "m2:5000");
    assert_eq!(docker.mirrors[1].request_timeout, Some(Duration::from_secs(5)));
    let headers: Vec<(&str, &str)> =
        docker.mirrors[1].headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(headers, [("x-one", "1"), ("x-two", "2"), ("x-two", "3")]);

    let plain = &registry.hosts["plain.example:5000"];
    assert!(plain.insecure, "its own mirror says plain http");
    assert_eq!(plain.mirrors.len(), 1, "and is not asked twice");
    assert_eq!(plain.mirrors[0].request_timeout, Some(Duration::from_secs(120)));

    let (own, theirs) = (Config::default().registry(), registry::Config::default());
    assert_eq!(
        (
            own.retries,
            own.backoff_min,
            own.backoff_max,
            own.connect_timeout,
            own.first_byte_timeout,
            own.idle_timeout
        ),
        (
            theirs.retries,
            theirs.backoff_min,
            theirs.backoff_max,
            theirs.connect_timeout,
            theirs.first_byte_timeout,
            theirs.idle_timeout
        ),
        "one set of defaults"
    );
    assert_eq!(own.docker_config, registry::DockerConfig::FromEnvironment);
    let file = ok("[docker_config]\npath = '/etc/lazurite/docker.json'").0.registry().docker_config;
    assert_eq!(file, registry::DockerConfig::File("/etc/lazurite/docker.json".into()));

    let zero = ok(
        "[blob]\nmax_retries = 0\nmin_wait_msec = 50\nmax_wait_msec = 0\n[resolver]\nrequest_timeout_sec = 0",
    )
    .0;
    assert_eq!(zero.registry().retries, 0, "no retries can be said");
    assert_eq!(zero.registry().first_byte_timeout, Duration::from_secs(30));
    assert_eq!(zero.registry().backoff_max, Duration::from_millis(50), "never below the first pause");
}

#[test]
fn a_named_file_must_exist() {
    let missing = Path::new("/nonexistent/lazurite.toml");
    let fault = Config::load(Some(missing)).unwrap_err();
    assert_eq!(fault.to_string(), "cannot read the configuration file /nonexistent/lazurite.toml");
}

#[test]
fn directories_of_hosts() {
    let paths = |text: &str| {
        let paths = ok(text).0.registry.config_path.0;
        paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(
        paths(""),
        [
            "/etc/containerd/certs.d",
            "/var/lib/rancher/k3s/agent/etc/containerd/certs.d",
            "/var/lib/rancher/rke2/agent/etc/containerd/certs.d"
        ]
    );
    assert_eq!(paths("[registry]\nconfig_path = '/a:/b'"), ["/a", "/b"]);
    let (none, _) = ok("[registry]\nconfig_path = ''");
    assert!(none.registry().host_source.is_none());
    assert!(Config::default().registry().host_source.is_some());
    assert_eq!(
        fault("[registry]\nconfig_path = '/a:b'"),
        "c.toml:1: registry.config_path must name absolute paths, but has \"b\""
    );
    assert_eq!(
        fault("[registry]\nconfig_path = ['/a']"),
        "c.toml:2: registry.config_path must be paths with colons between, but is ['/a']"
    );
    let (_, notices) = ok("[registry.mirrors.'docker.io']\nendpoint = ['https://m']");
    assert!(notices[0].starts_with("c.toml:1: accepted and ignored: registry.mirrors"), "{notices:?}");
}

#[test]
fn sources_of_logins() {
    let own = Config::default().registry();
    assert!(own.kubelet_plugins.is_none() && own.pull_secrets.is_none());
    assert_eq!(own.containers_auth, registry::ContainersAuth::FromEnvironment);
    let (config, notices) = ok("[kubelet_plugins]\nconfig = '/p/config.yaml'\nbin_dir = '/p/bin'\n\
        [docker_config]\nenable = false\npath = '/d'\n[containers_auth]\npath = '/c'\n\
        [kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = '/k'\nnamespaces = ['a', 'b']");
    assert!(notices.is_empty(), "{notices:?}");
    let registry = config.registry();
    let plugins = registry::KubeletPlugins { config: "/p/config.yaml".into(), directory: "/p/bin".into() };
    assert_eq!(registry.kubelet_plugins, Some(plugins));
    assert_eq!(registry.docker_config, registry::DockerConfig::Disabled);
    assert_eq!(registry.containers_auth, registry::ContainersAuth::File("/c".into()));
    let namespaces = vec!["a".to_owned(), "b".to_owned()];
    let secrets = registry::KubernetesSecrets { kubeconfig: Some("/k".into()), namespaces };
    assert_eq!(registry.pull_secrets, Some(secrets));
    assert_eq!(
        fault("\n[kubelet_plugins]\nconfig = '/p'"),
        "c.toml:2: kubelet_plugins must have both config and bin_dir, or neither"
    );
    assert_eq!(
        fault("[kubeconfig_keychain]\nnamespaces = 'a'"),
        "c.toml:2: kubeconfig_keychain.namespaces must be a list of strings, but is 'a'"
    );
}
