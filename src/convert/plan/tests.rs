//! Plans of images and indexes that lie in an image layout.

use crate::image::TOC_DIGEST;
use serde_json::{Value, json};

use super::*;
use crate::convert::media::{OCI_CONFIG, OCI_MANIFEST};
use crate::transport::{Location, Means};

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layout in which documents are made.
struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        Self { dir }
    }

    fn put(&self, media_type: &str, document: &Value) -> Value {
        let raw = Raw::new(media_type, document.to_string());
        let hex = raw.digest.trim_start_matches("sha256:");
        std::fs::write(self.dir.path().join("blobs/sha256").join(hex), &raw.bytes).unwrap();
        json!({ "mediaType": media_type, "digest": raw.digest, "size": raw.bytes.len() })
    }

    fn image(&self, architecture: &str, layers: &[(u32, &str)]) -> Value {
        let config = json!({
            "os": "linux", "architecture": architecture,
            "rootfs": { "diff_ids": layers.iter().map(|(n, _)| digest(n + 1000)).collect::<Vec<_>>() },
        });
        let layers: Vec<Value> = layers
            .iter()
            .map(|(n, media_type)| json!({ "mediaType": media_type, "digest": digest(*n), "size": n }))
            .collect();
        let config = self.put(OCI_CONFIG, &config);
        let mut entry = self.put(OCI_MANIFEST, &json!({ "config": config, "layers": layers }));
        entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        entry
    }

    async fn plan(&self, root: &Value, wanted: &Wanted, priorities: &Priorities) -> anyhow::Result<Plan> {
        std::fs::write(self.dir.path().join("index.json"), json!({ "manifests": [root] }).to_string())
            .unwrap();
        let registry = registry::Registry::new(registry::Config::default()).unwrap();
        let containerd =
            crate::cli::ContainerdArgs { address: "/nowhere".into(), namespace: "default".to_owned() };
        let means = Means {
            registry: &registry,
            containerd: &containerd,
            deadline: std::time::Duration::from_secs(1),
        };
        let source = Location::Directory(self.dir.path().to_owned(), None).source(means).await.unwrap();
        let root = source.root().await.unwrap().unwrap();
        Plan::read(&*source, root, wanted, priorities).await
    }
}

fn digest(n: u32) -> String {
    format!("sha256:{n:064x}")
}

fn these(platforms: &[&str]) -> Wanted {
    Wanted::These(platforms.iter().map(|text| Platform::parse(text).unwrap()).collect())
}

/// The tree with images by platform.
fn shape(plan: &Plan, node: &Node) -> String {
    match node {
        Node::Image(n) => plan.images[*n].platform.as_ref().map_or("?".to_owned(), Platform::to_string),
        Node::Index(_, children) => {
            let children: Vec<String> = children.iter().map(|(_, child)| shape(plan, child)).collect();
            format!("[{}]", children.join(" "))
        }
    }
}

#[tokio::test]
async fn platforms_are_selected() {
    let bed = Bed::new();
    let (amd, arm) = (bed.image("amd64", &[(1, GZIP)]), bed.image("arm64", &[(2, GZIP)]));
    let attestation = bed.put(
        OCI_MANIFEST,
        &json!({
            "config": bed.put("application/vnd.oci.empty.v1+json", &json!({})),
            "layers": [{ "mediaType": "application/vnd.in-toto+json", "digest": digest(9), "size": 9 }],
        }),
    );
    let mut about = attestation.clone();
    about["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    about["annotations"] = json!({ super::super::select::ATTESTED: amd["digest"] });
    let inner = bed.put(OCI_INDEX, &json!({ "manifests": [amd] }));
    let index = bed.put(OCI_INDEX, &json!({ "manifests": [amd, arm, about, amd] }));
    let nested = bed.put(OCI_INDEX, &json!({ "manifests": [inner, arm] }));

    let host = Platform::host().to_string();
    let cases = [
        (&index, Wanted::All, "[linux/amd64 linux/arm64 ? linux/amd64]"),
        (&index, Wanted::Any, host.as_str()),
        (&index, these(&["linux/arm64"]), "linux/arm64"),
        (&index, these(&["linux/arm64", "linux/amd64"]), "[linux/amd64 linux/arm64 ? linux/amd64]"),
        (&nested, Wanted::All, "[[linux/amd64] linux/arm64]"),
        (&arm, Wanted::Any, "linux/arm64"),
        (&arm, Wanted::All, "linux/arm64"),
        (&arm, these(&["linux/arm64"]), "linux/arm64"),
    ];
    for (root, wanted, expected) in cases {
        let plan = bed.plan(root, &wanted, &Priorities::default()).await.unwrap();
        assert_eq!(shape(&plan, &plan.root), expected, "{wanted:?}");
    }
    for (root, wanted) in [(&index, these(&["linux/s390x"])), (&arm, these(&["linux/amd64"]))] {
        assert!(bed.plan(root, &wanted, &Priorities::default()).await.is_err(), "{wanted:?}");
    }
}

#[tokio::test]
async fn a_layer_that_occurs_again_is_one_task() {
    let bed = Bed::new();
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let amd = bed.image("amd64", &[(1, GZIP), (2, GZIP), (1, GZIP), (3, foreign)]);
    let arm = bed.image("arm64", &[(1, GZIP), (4, GZIP)]);
    let index = bed.put(OCI_INDEX, &json!({ "manifests": [amd, arm] }));

    let plan = bed.plan(&index, &Wanted::All, &Priorities::default()).await.unwrap();
    let tasks = |plan: &Plan| -> Vec<Vec<usize>> {
        plan.images.iter().map(|image| image.layers.iter().map(|(_, task)| *task).collect()).collect()
    };
    assert_eq!(tasks(&plan), [vec![0, 1, 0, 2], vec![0, 3]]);
    let kinds: Vec<LayerKind> = plan.tasks.iter().map(|task| task.kind).collect();
    use LayerKind::{NotDistributable, Tar};
    assert_eq!(kinds, [Tar, Tar, NotDistributable, Tar]);

    // One that is annotated as lazy and one that is not have different descriptors in the result.
    let mut annotated = json!({ "mediaType": GZIP, "digest": digest(1), "size": 1 });
    let bare = annotated.clone();
    annotated["annotations"] = json!({ TOC_DIGEST: digest(5) });
    let config = json!({
        "os": "linux", "architecture": "amd64",
        "rootfs": { "diff_ids": [digest(1001), digest(1001), digest(1001)] },
    });
    let config = bed.put(OCI_CONFIG, &config);
    let image = bed.put(OCI_MANIFEST, &json!({ "config": config, "layers": [annotated, bare, annotated] }));
    let plan = bed.plan(&image, &Wanted::Any, &Priorities::default()).await.unwrap();
    assert_eq!(tasks(&plan), [vec![0, 1, 0]]);

    // The same blob with other files first is another result.
    let mut priorities = Priorities::default();
    let line = json!({ "path": "a", "manifestDigest": amd["digest"], "layerIndex": 2 });
    priorities.record(&line.to_string()).unwrap();
    let plan = bed.plan(&index, &Wanted::All, &priorities).await.unwrap();
    assert_eq!(tasks(&plan), [vec![0, 1, 2, 3], vec![0, 4]]);
    assert_eq!(
        (&plan.tasks[2].layer.digest, &plan.tasks[2].first),
        (&digest(1), &vec![First::Path("a".to_owned())])
    );
}

#[tokio::test]
async fn what_is_no_container_image_has_no_layers_to_convert() {
    let bed = Bed::new();
    let chart = bed.put(
        OCI_MANIFEST,
        &json!({
            "config": bed.put("application/vnd.cncf.helm.config.v1+json", &json!({})),
            "layers": [{ "mediaType": GZIP, "digest": digest(1), "size": 1 }],
        }),
    );
    let plan = bed.plan(&chart, &Wanted::Any, &Priorities::default()).await.unwrap();
    assert_eq!(plan.tasks[0].kind, LayerKind::Other);
    assert_eq!(plan.images[0].contents, None);

    let damaged = json!({
        "config": bed.put(OCI_CONFIG, &json!({ "os": "linux", "architecture": "amd64", "rootfs": {} })),
        "layers": [{ "mediaType": GZIP, "digest": digest(1), "size": 1 }],
    });
    let error = bed.plan(&bed.put(OCI_MANIFEST, &damaged), &Wanted::Any, &Priorities::default()).await;
    assert!(error.unwrap_err().to_string().contains("damaged"));
}
