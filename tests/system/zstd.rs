//! zstd:chunked in both dialects through containerd: as `lazurite convert` makes it, and as the test kit does by hand.

use support::zstd::{Dialect, ZstdEncoder};

use super::*;

/// Converts an image into a registry; the reference of the result.
#[track_caller]
fn convert(reference: &str, registry: &DockerRegistry, dialect: &str) -> String {
    let converted = format!("{}/converted:{dialect}", registry.address());
    let (from, to) = (format!("docker://{reference}"), format!("docker://{converted}"));
    let args = ["convert", "--json", "--format", "zstd:chunked", "--dialect", dialect, &from, &to];
    let output = Command::new("timeout").args(["300", BINARY]).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["format"], "zstd:chunked");
    converted
}

#[test]
fn the_trees_of_zstd_chunked_images_equal_the_unpacked_ones() {
    let Some(stand) = Stand::new("no_graduation = true\n") else { return };
    for image in [Image::torture(), Image::python()] {
        let registry = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
        let plain = image.reference(&registry, Form::Plain);
        stand.containerd.pull_eagerly("overlayfs", &plain);
        let eager = described(stand.tree("overlayfs"), stand.started);
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &plain]);
        assert!(eager.len() > 50, "{} has a tree", image.name());
        let destination = DockerRegistry::start(&stand.dir.path().join(format!("to-{}", image.name())));
        for dialect in ["podman", "stargz"] {
            let reference = convert(&plain, &destination, dialect);
            // Unpacked it is the same image as before.
            stand.containerd.pull_eagerly("overlayfs", &reference);
            assert_same(&eager, &described(stand.tree("overlayfs"), stand.started));
            stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);

            let summary = stand.pull(&reference);
            let lazy = outcomes(&summary).iter().filter(|o| *o == "lazy").count();
            assert!(lazy >= 3, "{dialect}: {summary:#}\n{}", stand.lazurite.log());
            assert_same(&eager, &described(stand.tree(SNAPSHOTTER), stand.started));
            stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
        }
    }
}

#[test]
fn what_other_tools_have_made_is_mounted_lazily_and_becomes_a_directory() {
    if !guard::require_programs(&["ctr-remote", "skopeo"]) {
        return;
    }
    let Some(stand) = Stand::new("") else { return };
    let image = Image::busybox();
    let source = DockerRegistry::with_images(&stand.dir.path().join("registry"), &image);
    let registry = DockerRegistry::start(&stand.dir.path().join("to"));
    let plain = image.reference(&source, Form::Plain);
    stand.containerd.pull_eagerly("overlayfs", &plain);
    let eager = described(stand.tree("overlayfs"), stand.started);

    // stargz-snapshotter's dialect, by its own tool.
    let theirs = format!("{}/busybox:ctr-remote", registry.address());
    let made = Command::new("timeout")
        .args(["60", "ctr-remote", "--namespace", stand.containerd.namespace(), "--address"])
        .arg(stand.containerd.address())
        .args(["images", "convert", "--zstdchunked", "--oci", &plain, &theirs])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made));
    stand.containerd.ctr_ok(&["images", "push", "--plain-http", &theirs]);
    stand.containerd.ctr_ok(&["images", "rm", "--sync", &plain, &theirs]);

    // podman's, by the library that podman has.
    let podmans = format!("{}/busybox:skopeo", registry.address());
    let made = Command::new("timeout")
        .args(["60", "skopeo", "copy", "--format", "oci", "--dest-compress-format", "zstd:chunked"])
        .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
        .args([format!("docker://{plain}"), format!("docker://{podmans}")])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made));

    for reference in [&theirs, &podmans] {
        let summary = stand.pull(reference);
        assert!(outcomes(&summary).iter().all(|o| o == "lazy"), "{summary:#}\n{}", stand.lazurite.log());
        assert_same(&eager, &described(stand.tree(SNAPSHOTTER), stand.started));
        graduated(&stand, reference);
        assert_same(&eager, &described(stand.tree(SNAPSHOTTER), stand.started));
        stand.containerd.ctr_ok(&["images", "rm", "--sync", reference]);
    }
}

/// Waits until all layers of the only image are directories.
#[track_caller]
fn graduated(stand: &Stand, reference: &str) {
    let root = stand.lazurite.root();
    let done = || {
        let (links, graduated) = places(&root);
        graduated > 0 && graduated == links.len()
    };
    assert!(guard::eventually(LIMIT, done), "{reference}: {:?} {}", places(&root), stand.lazurite.log());
}

#[test]
fn podmans_images_run_lazily_and_become_directories() {
    let registry = ScriptedRegistry::start();
    let Some(stand) = Stand::new("") else { return };
    let layer = base().noise("data/large", 3 << 20, 1).sparse("data/holes", 1 << 20, &[(5000, b"island")]);
    let encoders = [
        ("new", ZstdEncoder::new(Dialect::Podman)),
        ("middle", ZstdEncoder::podman_before(56)),
        ("old", ZstdEncoder::podman_before(40)),
        ("stargz", ZstdEncoder::new(Dialect::Stargz)),
    ];
    for (tag, encoder) in encoders {
        let blob = LayerBlob::lazy(&encoder.encode(&layer));
        registry.put_image("app", tag, &[blob], &json!({"config": {"Cmd": ["/bin/sh"]}}));
        let reference = format!("{}/app:{tag}", registry.host());
        assert_eq!(outcomes(&stand.pull(&reference)), ["lazy"], "{tag}: {}", stand.lazurite.log());
        let command = ["/bin/sh", "-c", "cat /data/holes /data/large | busybox sha256sum"];
        let contents = layer.contents();
        let both = [&contents[&b"data/holes"[..]][..], &contents[&b"data/large"[..]]].concat();
        let told = stand.run(&reference, &command);
        assert_eq!(told.split_whitespace().next(), Some(&sha256_digest(&both)["sha256:".len()..]), "{tag}");
        graduated(&stand, &reference);
        stand.containerd.ctr_ok(&["images", "rm", "--sync", &reference]);
    }
}

#[test]
fn manifests_are_not_asked_for_if_they_shall_not_be() {
    let registry = ScriptedRegistry::start();
    let Some(stand) = Stand::new("[fetch]\nno_manifest_lookup = true\n") else { return };
    let blob = LayerBlob::lazy(&ZstdEncoder::new(Dialect::Podman).encode(&base()));
    registry.put_image("app", "v1", &[blob], &json!({"config": {"Cmd": ["/bin/sh"]}}));
    let reference = format!("{}/app:v1", registry.host());
    let outcomes = outcomes(&stand.pull(&reference));
    assert!(outcomes.iter().all(|outcome| outcome != "lazy"), "{outcomes:?}");
    assert_eq!(stand.run(&reference, &["/bin/sh", "-c", "echo here"]), "here\n");
}
