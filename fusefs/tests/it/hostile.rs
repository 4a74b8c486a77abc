//! Blobs made to harm: a typed refusal, nothing mounted, nothing left on disk.

use serde_json::json;
use support::{
    estargz::{Built, Encoder},
    layer::Layer,
};

use super::bed::Bed;

fn plain() -> Layer {
    Layer::new().dir("d").file("d/a", &b"aaaa"[..]).file("b", &b"bbbb"[..])
}

fn with_entry(entry: serde_json::Value) -> Built {
    Encoder::new()
        .edit_toc(move |toc| toc["entries"].as_array_mut().unwrap().push(entry.clone()))
        .encode(&plain())
}

#[test]
fn crafted_blobs_are_refused_with_a_reason_and_leave_nothing() {
    let Some(bed) = Bed::new() else { return };
    let mut plain_gzip = Encoder::new().encode(&plain());
    plain_gzip.blob = plain().tar_gzip().into();
    let cases: Vec<(&str, Built, &str)> = vec![
        ("no footer at all", plain_gzip, "not_estargz"),
        (
            "footer offset beyond the blob",
            Encoder::new().footer_offset(1 << 40).encode(&plain()),
            "toc_invalid",
        ),
        (
            "cyclic hard links",
            Encoder::new()
                .edit_toc(|toc| {
                    let entries = toc["entries"].as_array_mut().unwrap();
                    entries.push(json!({"name": "x", "type": "hardlink", "linkName": "y"}));
                    entries.push(json!({"name": "y", "type": "hardlink", "linkName": "x"}));
                })
                .encode(&plain()),
            "toc_invalid",
        ),
        (
            "a name that climbs out",
            with_entry(json!({"name": "../../etc/cron.d/x", "type": "reg"})),
            "toc_invalid",
        ),
        ("a negative size", with_entry(json!({"name": "n", "type": "reg", "size": -5})), "toc_invalid"),
        (
            "a chunk beyond its file",
            Encoder::new()
                .edit_toc(|toc| {
                    let entries = toc["entries"].as_array_mut().unwrap();
                    let b = entries.iter_mut().find(|e| e["name"] == "b").unwrap();
                    b["chunkSize"] = json!(1_000_000);
                })
                .encode(&plain()),
            "toc_invalid",
        ),
        ("an unknown type", with_entry(json!({"name": "s", "type": "socket"})), "toc_invalid"),
        (
            "names that are not UTF-8",
            Encoder::new().encode(&Layer::new().file(b"caf\xe9", &b"x"[..])),
            "lossy_names",
        ),
    ];
    for (n, (what, built, reason)) in cases.iter().enumerate() {
        let image = bed.push(&[built]);
        let slot = n as u64 + 1;
        let error = bed.attach(slot, &bed.request(&image, &[built], 0)).expect_err(what);
        assert_eq!(error.reason(), *reason, "{what}: {error}");
        assert!(bed.plane().layer(slot).is_none(), "{what}");
        let left = std::fs::read_dir(bed.dir.path().join("layers")).unwrap().count();
        assert_eq!(left, 0, "{what}: something stayed on disk");
    }
    assert_eq!(bed.plane().fuse_counters().panics.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[test]
fn an_absolute_name_stays_inside_the_layer() {
    let Some(bed) = Bed::new() else { return };
    let built = with_entry(json!({"name": "/etc/absolute", "type": "dir", "mode": 0o755}));
    let root = bed.attach_one(&built);
    let names: Vec<_> =
        super::bed::tree(root).into_iter().map(|e| String::from_utf8(e.path).unwrap()).collect();
    assert_eq!(names, ["", "b", "d", "d/a", "etc", "etc/absolute"]);
}
