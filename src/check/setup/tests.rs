//! Configurations of every version and each known trap, as tables.

use super::super::Verdict::{self, Fail, Ok as Fine, Warn};
use super::super::usable;
use super::*;

const ADDRESS: &str = "/run/lazurite/lazurite.sock";
const ROOT: &str = "/var/lib/lazurite";

const PLUGIN: &str = r#"
[proxy_plugins.lazurite]
  type = "snapshot"
  address = "/run/lazurite/lazurite.sock"
  [proxy_plugins.lazurite.exports]
    root = "/var/lib/lazurite"
    enable_remote_snapshot_annotations = "true"
"#;

const UNPACK: &str = r#"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "lazurite"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
"#;

/// The findings for a configuration that is in force as it is written.
fn judge(version: Option<(u32, u32)>, text: &str) -> Vec<Finding> {
    judge_converted(version, text, text)
}

/// The findings for a file and what containerd made of it.
fn judge_converted(version: Option<(u32, u32)>, file: &str, effective: &str) -> Vec<Finding> {
    let (file, effective): (Table, Table) = (file.parse().unwrap(), effective.parse().unwrap());
    let setup = Setup {
        version,
        file: Some(&file),
        effective: Some(&effective),
        path: "/etc/containerd/config.toml",
        address: ADDRESS,
        root: ROOT,
    };
    setup.findings()
}

fn verdicts(findings: &[Finding]) -> Vec<(&str, Verdict)> {
    findings.iter().map(|finding| (finding.subject, finding.verdict)).collect()
}

/// A configuration with our plugin, these lines in CRI's table of that version, and more after them.
fn config(version: u32, cri: &str, more: &str) -> String {
    let header = match version {
        1 => "plugins.cri.containerd",
        2 => "plugins.\"io.containerd.grpc.v1.cri\".containerd",
        _ => "plugins.'io.containerd.cri.v1.images'",
    };
    format!("version = {version}\n{PLUGIN}\n[{header}]\n{cri}\n{more}")
}

const LAZY: &str = "snapshotter = 'lazurite'\ndisable_snapshot_annotations = false";

#[test]
fn versions_are_read() {
    let cases = [
        ("1.6.20~ds1", Some((1, 6))),
        ("v2.1.4", Some((2, 1))),
        ("2.3.0-beta.1", Some((2, 3))),
        ("6.18.44-fc", Some((6, 18))),
        ("7.0-rc1", Some((7, 0))),
        ("5.11+", Some((5, 11))),
        ("2", None),
        ("x.y", None),
        ("", None),
    ];
    for (text, expected) in cases {
        assert_eq!(version(text), expected, "{text}");
    }
}

#[test]
fn correct_setups_pass_in_every_version() {
    let runtimes = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type='io.containerd.runc.v2'";
    let cases = [
        ((1, 6), config(2, LAZY, "")),
        ((1, 7), config(2, LAZY, "")),
        ((1, 6), config(1, LAZY, "")),
        ((2, 0), config(3, LAZY, "")),
        ((2, 0), config(2, LAZY, runtimes)),
        ((2, 1), config(3, LAZY, UNPACK)),
        ((2, 2), config(3, "snapshotter = 'lazurite'", UNPACK)),
        ((2, 3), config(4, LAZY, UNPACK)),
        ((2, 3), config(4, "snapshotter = 'lazurite'\ndisable_snapshot_annotations = true", UNPACK)),
    ];
    for (version, text) in cases {
        let found = judge(Some(version), &text);
        assert_eq!(
            verdicts(&found),
            [(CONFIG, Fine), (CRI, Fine), (TRANSFER, Fine)],
            "{version:?} {text} {found:#?}"
        );
    }
}

#[test]
fn a_missing_file_or_plugin_comes_with_what_to_paste() {
    let setup = Setup {
        version: Some((2, 1)),
        path: "/etc/containerd/config.toml",
        address: ADDRESS,
        root: ROOT,
        ..Setup::default()
    };
    let found = setup.findings();
    assert_eq!(verdicts(&found), [(CONFIG, Fail)]);
    let fix = found[0].fix.as_deref().unwrap();
    let pasted = fix.split_once("\n\n").unwrap().1.replace(RESTART, "");
    let table: Table = pasted.parse().unwrap();
    let repaired = Setup { effective: Some(&table), file: Some(&table), ..setup };
    assert!(usable(&repaired.findings()), "{:#?}", repaired.findings());

    for (text, detail) in [
        ("version = 3", "no proxy plugin of type snapshot has address /run/lazurite/lazurite.sock"),
        (
            "[proxy_plugins.x]\ntype = 'content'\naddress = '/run/lazurite/lazurite.sock'",
            "no proxy plugin of type snapshot has address /run/lazurite/lazurite.sock",
        ),
        (
            "[proxy_plugins.lazurite]\ntype = 'snapshot'\naddress = '/run/other.sock'",
            "proxy plugin lazurite has address /run/other.sock, not /run/lazurite/lazurite.sock",
        ),
    ] {
        let found = judge(Some((2, 1)), text);
        assert_eq!((found.len(), found[0].verdict, found[0].detail.as_str()), (1, Fail, detail));
        assert!(found[0].fix.as_deref().unwrap().contains("[proxy_plugins.lazurite]"));
    }
}

#[test]
fn the_plugin_may_have_another_name_and_spelling() {
    let text = PLUGIN.replace("proxy_plugins.lazurite", "proxy_plugins.stargz").replace(
        "type = \"snapshot\"\n  address = \"",
        "type = \"io.containerd.snapshotter.v1\"\n  address = \"unix://",
    );
    let cri = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'stargz'\ndisable_snapshot_annotations = false";
    let found = judge(Some((2, 0)), &format!("version = 3\n{text}\n{cri}"));
    assert_eq!(verdicts(&found), [(CONFIG, Fine), (CRI, Fine), (TRANSFER, Fine)], "{found:#?}");
}

#[test]
fn the_plugins_table() {
    let cases = [
        ("    root = \"/var/lib/lazurite\"\n", "", (1, 6), Warn, "exports.root is not set"),
        ("/var/lib/lazurite", "/var/lib/other", (1, 6), Warn, "exports.root is /var/lib/other"),
        (
            "enable_remote_snapshot_annotations = \"true\"",
            "",
            (2, 1),
            Warn,
            "enable_remote_snapshot_annotations",
        ),
        (
            "annotations = \"true\"",
            "annotations = \"false\"",
            (2, 3),
            Warn,
            "enable_remote_snapshot_annotations",
        ),
        ("type = ", "capabilities = ['remap-ids', 'rebase']\n  type = ", (2, 2), Fail, "capability rebase"),
        ("proxy_plugins.lazurite", "proxy_plugins.overlayfs", (1, 7), Fail, "is built in"),
    ];
    for (from, to, version, verdict, words) in cases {
        let number = if version >= (2, 0) { 3 } else { 2 };
        let found = judge(Some(version), &config(number, LAZY, UNPACK).replace(from, to));
        let hit = found.iter().find(|finding| finding.detail.contains(words));
        let hit = hit.unwrap_or_else(|| panic!("{words}: {found:#?}"));
        assert_eq!((hit.subject, hit.verdict), (CONFIG, verdict));
    }
    let old = judge(
        Some((2, 0)),
        &config(3, LAZY, "").replace("enable_remote_snapshot_annotations = \"true\"", ""),
    );
    assert!(
        !old.iter().any(|finding| finding.detail.contains("annotations is not")),
        "2.0 has no such export"
    );
}

#[test]
fn kubernetes_setups() {
    let cases = [
        ((1, 6), 2, "", "", Warn, "pods use snapshotter overlayfs"),
        ((1, 6), 1, "snapshotter = 'overlayfs'", "", Warn, "pods use snapshotter overlayfs"),
        ((1, 6), 2, "snapshotter = 'lazurite'", "", Fail, "annotations are off"),
        (
            (1, 7),
            2,
            "snapshotter = 'lazurite'\ndisable_snapshot_annotations = true",
            "",
            Fail,
            "annotations are off",
        ),
        ((2, 0), 3, "snapshotter = 'lazurite'", UNPACK, Fail, "annotations are off"),
        ((2, 1), 3, "snapshotter = 'lazurite'", "", Fail, "neither annotations nor an unpack_config"),
        ((2, 1), 3, "snapshotter = 'lazurite'", UNPACK, Fine, "through the transfer service"),
        ((2, 3), 4, "snapshotter = 'lazurite'", "", Fail, "neither annotations nor an unpack_config"),
        ((2, 3), 4, "snapshotter = 'lazurite'", UNPACK, Fine, "through the transfer service"),
        ((2, 3), 4, LAZY, "", Fine, "with annotations"),
        (
            (2, 2),
            3,
            "snapshotter = 'lazurite'\nuse_local_image_pull = true",
            UNPACK,
            Fail,
            "annotations are off",
        ),
        (
            (2, 2),
            3,
            "snapshotter = 'lazurite'\ndiscard_unpacked_layers = true",
            UNPACK,
            Fail,
            "annotations are off",
        ),
        (
            (2, 2),
            3,
            "snapshotter = 'lazurite'\ndiscard_unpacked_layers = true\ndisable_snapshot_annotations = false",
            UNPACK,
            Fine,
            "with annotations",
        ),
        ((1, 7), 2, LAZY, "", Fine, "with annotations"),
    ];
    for (version, number, cri, more, verdict, words) in cases {
        let found = judge(Some(version), &config(number, cri, more));
        let hit = found.iter().find(|finding| finding.subject == CRI).unwrap();
        assert_eq!(hit.verdict, verdict, "{version:?} {cri} {hit:#?}");
        assert!(hit.detail.contains(words), "{version:?} {cri} {hit:#?}");
        let header = if number >= 3 { "[plugins.\"io.containerd.cri.v1.images\"]" } else { "containerd]" };
        assert!(hit.fix.as_deref().is_none_or(|fix| fix.contains(header)), "{hit:#?}");
    }
    for plugin in ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"] {
        let text = config(2, "", "")
            .replace("version = 2", &format!("version = 2\ndisabled_plugins = ['{plugin}']"));
        assert!(judge(Some((1, 6)), &text).iter().any(|f| f.subject == CRI && f.verdict == Fine));
    }
}

#[test]
fn settings_an_old_file_loses_in_a_new_containerd() {
    let converted = config(3, "snapshotter = 'overlayfs'\ndisable_snapshot_annotations = true", "");
    let runtimes = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type='io.containerd.runc.v2'";
    for version in [(2, 0), (2, 1), (2, 3)] {
        let found = judge_converted(Some(version), &config(2, LAZY, ""), &converted);
        let cri: Vec<&Finding> = found.iter().filter(|finding| finding.subject == CRI).collect();
        assert_eq!(cri.len(), 1, "one trap, one line: {found:#?}");
        assert_eq!(cri[0].verdict, Fail);
        assert!(cri[0].fix.as_deref().unwrap().contains(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\""
        ));
    }
    // Nothing is lost with the table, in a file of the new form, or in an old containerd.
    let kept = config(3, LAZY, UNPACK);
    for (version, file, effective) in [
        ((2, 1), config(2, LAZY, runtimes), kept.clone()),
        ((2, 1), config(3, LAZY, UNPACK), kept.clone()),
        ((1, 7), config(2, LAZY, ""), config(2, LAZY, "")),
    ] {
        let found = judge_converted(Some(version), &file, &effective);
        assert!(usable(&found), "{version:?} {found:#?}");
    }
    // Adding the settings to an old file needs the table as well: the advice says so.
    let found = judge_converted(Some((2, 0)), &config(2, "", ""), &config(2, "", ""));
    let cri = found.iter().find(|finding| finding.subject == CRI).unwrap();
    assert!(cri.fix.as_deref().unwrap().contains("runtimes.runc"), "{cri:#?}");
}

#[test]
fn the_transfer_service() {
    let only_ours = UNPACK.split_inclusive("snapshotter = \"lazurite\"\n").next().unwrap();
    let cases = [
        ((1, 7), "", Fine, "lazurite pull"),
        ((2, 0), UNPACK, Fine, "lazurite pull"),
        ((2, 1), "", Warn, "no unpack_config names lazurite"),
        ((2, 1), only_ours, Warn, "replaces the default"),
        ((2, 3), UNPACK, Fine, "unpack_config names lazurite"),
    ];
    for (version, more, verdict, words) in cases {
        let found = judge(Some(version), &config(3, LAZY, more));
        let hit = found.iter().find(|finding| finding.subject == TRANSFER).unwrap();
        assert_eq!(hit.verdict, verdict, "{version:?} {hit:#?}");
        assert!(hit.detail.contains(words), "{hit:#?}");
    }
}

#[test]
fn without_a_running_containerd_the_configuration_tells_the_age() {
    let of = |text: &str| {
        let found = judge(None, text);
        found.iter().find(|finding| finding.subject == CRI).unwrap().detail.clone()
    };
    assert!(of(&config(2, "snapshotter = 'lazurite'", "")).contains("annotations are off"));
    assert!(
        of(&config(3, "snapshotter = 'lazurite'", UNPACK)).contains("annotations are off"),
        "might be 2.0"
    );
    assert!(of(&config(4, "snapshotter = 'lazurite'", UNPACK)).contains("transfer service"));
}

#[test]
fn loaded_plugins() {
    let plugin = |error: Option<&str>| Plugin { id: "lazurite".to_owned(), error: error.map(str::to_owned) };
    assert_eq!(loaded(&[plugin(None)], "lazurite").verdict, Fine);
    let broken = loaded(&[plugin(Some("boom"))], "lazurite");
    assert_eq!((broken.verdict, broken.detail.contains("boom")), (Fail, true));
    assert_eq!(loaded(&[plugin(None)], "stargz").verdict, Fail);
}
