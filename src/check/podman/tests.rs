//! Every verdict about podman's setup, from text and named states.

use super::super::Verdict::{self, Fail, Ok as Fine, Warn};
use super::*;

fn table(text: &str) -> Table {
    text.parse().unwrap()
}

fn storage(value: &str) -> Table {
    table(&format!("[storage]\ndriver = \"overlay\"\n[storage.options]\nadditionallayerstores = [{value}]\n"))
}

fn setup<'a>(storage: &'a Table, stores: &'a [(Store, Place)]) -> Setup<'a> {
    let path = Path::new("/etc/containers/storage.conf");
    Setup { path, storage: Some(storage), driver: None, stores, rootless: false }
}

fn error(kind: io::ErrorKind) -> Place {
    Place::Error(kind.into())
}

/// The findings that are about a store.
fn judged(value: &str, place: Place, rootless: bool) -> Vec<Finding> {
    let storage = storage(value);
    let mut found = stores(&storage);
    assert_eq!(found.len(), 1, "{value}");
    let all = [(found.remove(0), place)];
    let mut findings = Setup { rootless, ..setup(&storage, &all) }.findings();
    findings.retain(|finding| finding.subject == STORE);
    findings
}

#[test]
fn stores_are_read_as_podman_reads_them() {
    let store = |path: &str, options: &[&str]| Store {
        path: path.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    };
    let cases: [(&str, Vec<Store>); 6] = [
        ("", vec![]),
        ("\"/s:ref\"", vec![store("/s", &["ref"])]),
        ("\"/s\"", vec![store("/s", &[])]),
        (
            "\"/a:ref,/b\", \"c:ref:x\"",
            vec![store("/a", &["ref"]), store("/b", &[]), store("c", &["ref", "x"])],
        ),
        ("\"\"", vec![store("", &[])]),
        ("1, \"/s:ref\"", vec![store("/s", &["ref"])]),
    ];
    for (value, expected) in cases {
        assert_eq!(stores(&storage(value)), expected, "{value}");
    }
    for text in
        ["", "storage = 1", "[storage]", "[storage.options]", "[storage.options]\nadditionallayerstores = 1"]
    {
        assert_eq!(stores(&table(text)), [], "{text}");
    }
}

#[test]
fn stores_are_judged_by_what_is_at_their_place() {
    let cases: [(&str, Place, bool, Verdict, &str, &str); 16] = [
        ("\"/s:ref\"", Place::Ours, false, Fine, "mounted and answers", ""),
        ("\"/s:ref\"", Place::Ours, true, Fine, "mounted and answers", ""),
        ("\"/s\"", Place::Ours, false, Fail, "without the image's name", "\"/s:ref\""),
        (
            "\"/s:ref\"",
            Place::Outside,
            true,
            Fail,
            "not in the namespaces",
            "podman unshare lazurite store /s",
        ),
        (
            "\"/s:ref\"",
            Place::Foreign("fuse.rawBridge".to_owned()),
            false,
            Warn,
            "(fuse.rawBridge)",
            "umount /s",
        ),
        ("\"/s:ref\"", Place::Directory, false, Fail, "nothing is mounted", "lazurite store /s"),
        (
            "\"/s:ref\"",
            Place::Directory,
            true,
            Fail,
            "nothing is mounted",
            "podman unshare lazurite store /s",
        ),
        ("\"/s:ref\"", Place::File, false, Fail, "not a directory", "take the line out"),
        (
            "\"/s:ref\"",
            Place::Dead,
            false,
            Fail,
            "is gone: every command",
            "umount --lazy /s\nlazurite store /s\n",
        ),
        ("\"/s:ref\"", Place::Dead, true, Fail, "is gone: every command", "podman unshare lazurite store /s"),
        ("\"/s:ref\"", Place::Silent, false, Fail, "every command of podman hangs", "umount --lazy /s"),
        (
            "\"/s:ref\"",
            error(io::ErrorKind::NotFound),
            false,
            Fail,
            "does not exist",
            "mkdir -p /s\nlazurite",
        ),
        (
            "\"/s:ref\"",
            error(io::ErrorKind::PermissionDenied),
            false,
            Fail,
            "cannot be looked at",
            "take the line out",
        ),
        ("\"s:ref\"", error(io::ErrorKind::NotFound), false, Fail, "is not absolute", "whole path"),
        ("\"\"", error(io::ErrorKind::NotFound), false, Fail, "is not absolute", "whole path"),
        ("\"~/s:ref\"", error(io::ErrorKind::NotFound), true, Fail, "is not absolute", "whole path"),
    ];
    for (value, place, rootless, verdict, detail, fix) in cases {
        let shown = format!("{value} {place:?}");
        let findings = judged(value, place, rootless);
        assert_eq!(findings.len(), 1, "{shown}: {findings:?}");
        assert_eq!(findings[0].verdict, verdict, "{shown}");
        assert!(findings[0].detail.contains(detail), "{shown}: {}", findings[0].detail);
        assert!(findings[0].fix.clone().unwrap_or_default().contains(fix), "{shown}: {:?}", findings[0].fix);
    }
}

#[test]
fn options_podman_does_not_know_are_named() {
    for value in ["\"/s:ref:ref\"", "\"/s:ref:fast\"", "\"/s:fast:ref\""] {
        let findings = judged(value, Place::Ours, false);
        assert_eq!((findings[0].verdict, findings[1].verdict), (Fail, Fine), "{value}");
        assert!(findings[0].detail.contains("other options"), "{}", findings[0].detail);
    }
    // Both at once: it is not known, and what is missing is.
    let findings = judged("\"/s:fast\"", Place::Ours, false);
    assert_eq!((findings[0].verdict, findings[1].verdict), (Fail, Fail));
}

#[test]
fn drivers_and_files() {
    let named = |driver: &str| table(&format!("[storage]\ndriver = {driver:?}"));
    let cases = [
        (named("overlay"), None, Fine, "overlay"),
        (named("overlay2"), None, Fine, "overlay"),
        (named("vfs"), None, Fail, "/etc/containers/storage.conf"),
        (named("vfs"), Some("overlay"), Fine, "STORAGE_DRIVER"),
        (named("overlay"), Some("btrfs"), Fail, "STORAGE_DRIVER"),
        (named(""), None, Warn, "names no driver"),
        (table(""), None, Warn, "names no driver"),
    ];
    for (storage, driver, verdict, detail) in cases {
        let findings = Setup { driver, ..setup(&storage, &[]) }.findings();
        assert_eq!(findings[0].verdict, verdict, "{storage} {driver:?}");
        assert!(findings[0].detail.contains(detail), "{}", findings[0].detail);
        assert_eq!(findings[1].verdict, Fail, "no store is named");
        assert!(
            findings[1]
                .fix
                .as_ref()
                .unwrap()
                .contains("additionallayerstores = [\"/var/lib/lazurite/store:ref\"]")
        );
    }
    let none = Setup { storage: None, rootless: true, ..setup(&table(""), &[]) }.findings();
    assert_eq!((none.len(), none[0].verdict), (1, Fail));
    assert!(none[0].fix.as_ref().unwrap().contains("driver = \"overlay\"\n\n[storage.options]"), "{none:?}");
    assert_eq!(unusable("x is not valid".to_owned()).verdict, Fail);
}

#[test]
fn what_is_pulled_in_part_is_said() {
    let with = |value: &str| {
        table(&format!("[storage.options]\npull_options = {{enable_partial_images = {value}}}"))
    };
    assert!(partial_pulls(&with("\"true\"")).unwrap().detail.contains("store is asked first"));
    for other in [with("\"false\""), with("true"), table(""), table("[storage.options]\npull_options = 1")] {
        assert_eq!(partial_pulls(&other), None, "{other}");
    }
}

#[test]
fn versions() {
    let cases: [(Result<&str, &str>, Verdict, &str); 9] = [
        (Ok("podman version 4.3.1\n"), Fine, "4.3.1 asks for every layer"),
        (Ok("podman version 5.0.3"), Fine, "asks for every layer"),
        (Ok("podman version 5.1.0"), Fine, "table of contents"),
        (Ok("podman version 5.4.2"), Fine, "5.4.2 asks for layers with the annotation"),
        (Ok("podman version 5.5.0-dev"), Warn, "does not write down"),
        (Ok("podman version 6.0.0"), Warn, "does not write down"),
        (Ok("podman version unknown"), Warn, "cannot tell"),
        (Ok(""), Warn, "cannot tell"),
        (Err("podman cannot be run: gone"), Warn, "cannot be run"),
    ];
    for (said, verdict, detail) in cases {
        let finding = podman(said);
        assert_eq!(finding.verdict, verdict, "{said:?}");
        assert!(finding.detail.contains(detail), "{said:?}: {}", finding.detail);
    }
}

#[test]
fn helpers_for_logins() {
    let path = Path::new("/etc/containers/registries.conf");
    let helper = |executable| Helper { path: "/bin/h".into(), executable };
    assert_eq!(logins(path, Some(&helper(true))).verdict, Fine);
    for broken in [Some(helper(false)), None] {
        let finding = logins(path, broken.as_ref());
        assert_eq!(finding.verdict, Warn);
        assert!(finding.fix.unwrap().contains("additional-layer-store-auth-helper = "));
    }
}

#[test]
fn mounts_are_found_in_the_table() {
    let text = "\
22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw
30 22 0:40 / /var/store rw - fuse.lazurite lazurite ro
31 22 0:41 / /var/a\\040b\\134c rw shared:7 master:1 - fuse.rawBridge stargz rw
32 22 0:42 / /over rw - fuse.lazurite lazurite ro
33 22 0:43 / /over rw - tmpfs tmpfs rw
a line of another kind
";
    let at = |path: &str| Mount::at(text, Path::new(path)).map(|mount| (mount.kind.clone(), mount.is_ours()));
    assert_eq!(at("/var/store"), Some(("fuse.lazurite".to_owned(), true)));
    assert_eq!(at("/var/a b\\c"), Some(("fuse.rawBridge".to_owned(), false)));
    assert_eq!(at("/over"), Some(("tmpfs".to_owned(), false)), "the uppermost");
    assert_eq!(at("/var"), None);
    let ours =
        |kind: &str, source: &str| Mount { kind: kind.to_owned(), source: source.to_owned() }.is_ours();
    assert!(ours("fuse.lazurite-store", "x") && ours("fuse", "lazurite"));
    assert!(!ours("fuse.sshfs", "host:") && !ours("tmpfs", "tmpfs"));
    assert_eq!(unescaped("a\\9"), "a9");
}
