//! Which directory counts, what a change does, and what a bad file does not.

use registry::Root;
use support::log::Log;

use super::*;

/// Looks at every question.
fn eager(roots: &[&Path]) -> Live {
    let roots = roots.iter().map(|root| root.to_path_buf()).collect();
    Live { period: Duration::ZERO, ..Live::new(roots) }
}

fn put(path: &Path, contents: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, contents).unwrap();
}

fn server(url: &str) -> OriginHosts {
    OriginHosts { hosts: vec![], server: HostSettings::at(url, Root::Standard).unwrap() }
}

/// A certificate that is its own authority, and its key.
fn certificate() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(vec!["r.example".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

#[test]
fn the_first_directory_that_knows_the_host_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let live = eager(&[&first, &second]);
    let origin = "r.example:5000";
    assert_eq!(*live.hosts(origin), OriginHosts::default());
    // The worst first: each one hides those before it.
    for (directory, host) in [
        (second.join("_default"), "a"),
        (second.join("r.example:5000"), "b"),
        (second.join("r.example_5000_"), "c"),
        (first.join("_default"), "d"),
        (first.join("r.example:5000"), "e"),
        (first.join("r.example_5000_"), "f"),
    ] {
        put(&directory.join("hosts.toml"), &format!("server = 'http://{host}.example'"));
        assert_eq!(*live.hosts(origin), server(&format!("http://{host}.example")), "{}", directory.display());
    }
    assert_eq!(*live.hosts("r.example"), server("http://d.example"), "another port is another registry");
    fs::remove_dir_all(&first).unwrap();
    assert_eq!(*live.hosts(origin), server("http://c.example"));
    fs::create_dir_all(first.join("_default")).unwrap();
    assert_eq!(*live.hosts(origin), OriginHosts::default(), "an empty directory says: as usual");
}

#[test]
fn the_same_files_give_the_same_settings_and_are_not_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.example/hosts.toml");
    put(&file, "server = 'http://a.example'");
    let live = eager(&[dir.path()]);
    let before = live.hosts("r.example");
    assert!(Arc::ptr_eq(&before, &live.hosts("r.example")));
    put(&file, "# said otherwise\nserver = 'http://a.example'");
    assert!(Arc::ptr_eq(&before, &live.hosts("r.example")), "what is the same is not handed out anew");

    let patient = Live { period: Duration::from_secs(3600), ..Live::new(vec![dir.path().to_owned()]) };
    patient.hosts("r.example");
    put(&file, "server = 'http://b.example'");
    assert_eq!(*patient.hosts("r.example"), server("http://a.example"), "it was looked at lately");
    assert_eq!(*live.hosts("r.example"), server("http://b.example"));
}

#[test]
fn a_bad_file_changes_nothing_and_is_complained_about_once() {
    let log = Log::default();
    let writer = log.clone();
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _installed = tracing::subscriber::set_default(subscriber);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.example/hosts.toml");
    let live = eager(&[dir.path()]);
    let ask = || {
        for _ in 0..3 {
            live.hosts("r.example");
        }
        live.hosts("r.example")
    };
    let warnings = |log: String| log.lines().filter(|line| line.contains("WARN")).count();

    put(&file, "server = ");
    assert_eq!(*ask(), OriginHosts::default());
    let said = log.take();
    assert!(said.contains("hosts.toml:1: ") && said.contains("the registry itself is asked"), "{said}");
    assert_eq!(warnings(said), 1);

    put(&file, "server = 'http://good.example'\n[header]\nx-pass = 'hunter2'");
    let good = ask();
    assert_ne!(*good, OriginHosts::default());
    let said = log.take();
    assert!(said.contains("good.example") && !said.contains("hunter2"), "{said}");

    for bad in ["server = 1", "server = 'http://next.example'\nca = 'missing.pem'", "\u{0}"] {
        put(&file, bad);
        assert!(Arc::ptr_eq(&good, &ask()), "{bad}");
        let said = log.take();
        assert!(said.contains("stays in force") && said.contains("hosts.toml:"), "{said}");
        assert_eq!(warnings(said), 1, "{bad}");
    }
    put(&file, "server = 'http://next.example'\nsever = 1");
    assert_eq!(*ask(), server("http://next.example"));
    let said = log.take();
    assert!(said.contains("did you mean server?"), "{said}");
    assert_eq!(warnings(said), 1);
}

#[test]
fn certificates_belong_to_what_is_watched() {
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = certificate();
    let root = dir.path().join("r.example");
    put(
        &root.join("hosts.toml"),
        "[host.'https://m.example']\nca = 'ca.pem'\nclient = [['me.cert', 'me.key']]\nskip_verify = false\n",
    );
    let live = eager(&[dir.path()]);
    assert_eq!(*live.hosts("r.example"), OriginHosts::default(), "no file is there");
    put(&root.join("ca.pem"), &certificate);
    put(&root.join("me.cert"), &certificate);
    put(&root.join("me.key"), "no key");
    assert_eq!(*live.hosts("r.example"), OriginHosts::default());
    put(&root.join("me.key"), &key);
    let before = live.hosts("r.example");
    let mut tls = TlsSettings::default();
    tls.trust(certificate.as_bytes()).unwrap();
    tls.identify(certificate.as_bytes(), key.as_bytes()).unwrap();
    let mut expected = HostSettings::at("https://m.example", Root::Standard).unwrap();
    expected.set_tls(tls);
    assert_eq!(before.hosts, [expected]);

    let (other, _) = self::certificate();
    put(&root.join("ca.pem"), &other);
    assert_ne!(*live.hosts("r.example"), *before, "a new certificate under the old name");
}

#[test]
fn a_directory_without_hosts_has_certificates_as_docker_does() {
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = certificate();
    let root = dir.path().join("r.example");
    put(&root.join("ca.crt"), &certificate);
    put(&root.join("notes.txt"), "nothing");
    let live = eager(&[dir.path()]);
    let mut tls = TlsSettings::default();
    tls.trust(certificate.as_bytes()).unwrap();
    let mut expected = OriginHosts::default();
    expected.server.set_tls(tls);
    assert_eq!(*live.hosts("r.example"), expected);

    put(&root.join("me.cert"), &certificate);
    put(&root.join("me.key"), &key);
    let both = format!("{certificate}{key}");
    put(&root.join("you.cert"), &both);
    let mut tls = TlsSettings::default();
    tls.trust(certificate.as_bytes()).unwrap();
    tls.identify(certificate.as_bytes(), key.as_bytes()).unwrap();
    tls.identify(both.as_bytes(), both.as_bytes()).unwrap();
    expected.server.set_tls(tls);
    assert_eq!(*live.hosts("r.example"), expected);

    put(&root.join("hosts.toml"), "server = 'http://a.example'");
    assert_eq!(*live.hosts("r.example"), server("http://a.example"), "which hosts.toml hides");
}

#[test]
fn what_is_wrong_can_be_listed() {
    let dir = tempfile::tempdir().unwrap();
    put(&dir.path().join("a.example/hosts.toml"), "server = 'http://a.example'");
    put(&dir.path().join("b.example/hosts.toml"), "server = 1");
    put(&dir.path().join("c.example/hosts.toml"), "sever = 'x'");
    let (read, faults) = faults(&[dir.path().to_owned(), dir.path().join("missing")]);
    assert_eq!((read, faults.len()), (3, 2), "{faults:?}");
    assert!(faults[0].contains("b.example/hosts.toml:1: server must be a string"), "{faults:?}");
    assert!(faults[1].contains("did you mean server?"), "{faults:?}");
}

/// The files' words, down to a request.
#[tokio::test]
async fn the_client_goes_by_the_files_as_they_are() {
    let (mirror, origin) =
        (support::registry::ScriptedRegistry::start(), support::registry::ScriptedRegistry::start());
    let digest = origin.put_blob("a", &b"0123456789"[..]);
    mirror.put_blob("p/a", &b"0123456789"[..]);
    let dir = tempfile::tempdir().unwrap();
    let live = Arc::new(eager(&[dir.path()]));
    let settings = registry::Config {
        docker_config: registry::DockerConfig::Disabled,
        host_source: Some(live),
        ..registry::Config::default()
    };
    let registry = registry::Registry::new(settings).unwrap();
    let reference = format!("{}/a:v1", origin.host()).parse().unwrap();
    let blob = registry.blob(&reference, &digest, Some(10)).unwrap();
    let deadline = || tokio::time::Instant::now() + Duration::from_secs(60);
    let read = async || {
        let options = registry::ReadOptions::until(deadline());
        blob.read(0..10, &options).await.unwrap().host.to_string()
    };
    assert_eq!(read().await, origin.host());

    let file = dir.path().join(origin.host().replace(':', "_") + "_/hosts.toml");
    let url = format!("{}/v2/p", mirror.url());
    put(&file, &format!("[host.'{url}']\noverride_path = true\n[host.'{url}'.header]\nx-team = ['blue']"));
    assert_eq!(read().await, mirror.host());
    let asked = &mirror.requests()[0];
    assert_eq!(asked.headers["x-team"], "blue");
    assert_eq!(asked.query, format!("ns={}", origin.host().replace(':', "%3A")));

    put(&file, "no toml");
    assert_eq!(read().await, mirror.host(), "the last good ones");
    put(&file, &format!("[host.'{url}']\noverride_path = true\ncapabilities = ['resolve']"));
    assert_eq!(read().await, origin.host());
    fs::remove_file(&file).unwrap();
    assert_eq!(read().await, origin.host());
}
