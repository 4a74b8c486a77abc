//! The kubelet's way to images, played by a client of its interface: through the daemon to containerd, with logins.

use std::os::unix::fs::PermissionsExt as _;

use proto::cri::image_service_client::ImageServiceClient;
use proto::cri::runtime_service_client::RuntimeServiceClient;
use proto::cri::{
    AuthConfig, ImageFsInfoRequest, ImageFsInfoResponse, ImageSpec, ImageStatusRequest, ListImagesRequest,
    ListImagesResponse, PullImageRequest, RemoveImageRequest, VersionRequest,
};
use support::system::LOGIN;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::*;

/// Where CRI keeps everything.
const NAMESPACE: &str = "k8s.io";
const REMOTE: &str = "containerd.io/snapshot/remote";

/// containerd that serves Kubernetes, and the daemon before it. Fields end in order.
struct Node {
    stand: Stand,
    runtime: Runtime,
}

impl Node {
    fn new() -> Option<Node> {
        if !system::available() {
            return None;
        }
        let dir = guard::temp_dir();
        let containerd = dir.path().join("containerd");
        let config = format!(
            "log.level = \"trace\"\n{ONLY_WHAT_IS_READ}[cri_keychain]\nenable_keychain = true\nlisten_path = {:?}\n\
             image_service_path = {:?}\n",
            dir.path().join("kubelet/cri.sock"),
            containerd.join("containerd.sock"),
        );
        let lazurite = Lazurite::start(Path::new(BINARY), &dir.path().join("lazurite"), &config);
        let containerd = Containerd::start(&containerd, &lazurite.socket(), Cri::On);
        let stand = Stand { containerd, lazurite, dir, started: 0 };
        Some(Node { stand, runtime: Runtime::new().unwrap() })
    }

    fn socket(&self) -> PathBuf {
        self.stand.dir.path().join("kubelet/cri.sock")
    }

    fn channel(&self, socket: &Path) -> Channel {
        self.runtime.block_on(containerd_client::connect(socket)).unwrap()
    }

    /// By way of the daemon.
    fn images(&self) -> Images<'_> {
        self.images_at(&self.socket())
    }

    fn images_at(&self, socket: &Path) -> Images<'_> {
        Images { client: ImageServiceClient::new(self.channel(socket)), runtime: &self.runtime }
    }

    fn snapshot_labels(&self) -> Vec<Value> {
        let snapshots = ["--namespace", NAMESPACE, "snapshots", "--snapshotter", SNAPSHOTTER];
        let list = self.stand.containerd.ctr_ok(&[&snapshots[..], &["ls"]].concat());
        let names = list.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        let info = |name| self.stand.containerd.ctr_ok(&[&snapshots[..], &["info", name]].concat());
        names.map(|name| serde_json::from_str::<Value>(&info(name)).unwrap()["Labels"].clone()).collect()
    }
}

/// What a kubelet calls.
struct Images<'a> {
    client: ImageServiceClient<Channel>,
    runtime: &'a Runtime,
}

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: image.to_owned() })
}

impl Images<'_> {
    fn list(&mut self) -> Result<ListImagesResponse, Status> {
        let answer = self.client.list_images(ListImagesRequest::default());
        self.runtime.block_on(answer).map(tonic::Response::into_inner)
    }

    fn file_systems(&mut self) -> Result<ImageFsInfoResponse, Status> {
        let answer = self.client.image_fs_info(ImageFsInfoRequest {});
        self.runtime.block_on(answer).map(tonic::Response::into_inner)
    }

    fn status(&mut self, image: &str) -> Option<proto::cri::Image> {
        let answer = self.client.image_status(ImageStatusRequest { image: spec(image) });
        self.runtime.block_on(answer).unwrap().into_inner().image
    }

    fn pull(&mut self, image: &str, auth: Option<AuthConfig>) -> Result<String, Status> {
        let answer = self.client.pull_image(PullImageRequest { image: spec(image), auth });
        self.runtime.block_on(answer).map(|answer| answer.into_inner().image_ref)
    }

    fn remove(&mut self, image: &str) {
        let answer = self.client.remove_image(RemoveImageRequest { image: spec(image) });
        self.runtime.block_on(answer).unwrap();
    }
}

#[track_caller]
fn same(ours: &Status, theirs: &Status) {
    assert_eq!((ours.code(), ours.message()), (theirs.code(), theirs.message()));
    assert_eq!(ours.details(), theirs.details());
}

#[test]
fn a_kubelet_gets_containerds_answers_through_the_daemon() {
    let Some(mut node) = Node::new() else { return };
    assert_eq!(fs::metadata(node.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    let image = Image::busybox();
    let registry = DockerRegistry::with_images(&node.stand.dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    let (mut ours, mut theirs) = (node.images(), node.images_at(&node.stand.containerd.address()));

    assert_eq!(ours.list().unwrap().images, []);
    assert_eq!(ours.file_systems().unwrap(), theirs.file_systems().unwrap());
    assert_eq!(ours.status(&reference), None);
    let missing = format!("{}/busybox:none", registry.address());
    let error = ours.pull(&missing, None).unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains(&missing), "{error}");
    same(&error, &theirs.pull(&missing, None).unwrap_err());
    same(&ours.pull("NO", None).unwrap_err(), &theirs.pull("NO", None).unwrap_err());

    let id = ours.pull(&reference, None).unwrap();
    let status = ours.status(&reference).unwrap();
    assert_eq!((&status.id, &status.repo_tags[..]), (&id, std::slice::from_ref(&reference)));
    assert_eq!(ours.list().unwrap(), theirs.list().unwrap());
    let labels = node.snapshot_labels();
    assert!(!labels.is_empty() && labels.iter().all(|labels| !labels[REMOTE].is_null()), "{labels:?}");

    // What a kubelet asks of the runtime is passed on as well.
    let mut version = RuntimeServiceClient::new(node.channel(&node.socket()));
    let version = node.runtime.block_on(version.version(VersionRequest::default())).unwrap();
    assert_eq!(version.into_inner().runtime_name, "containerd");

    // So is whatever a client written in Go says.
    let socket = node.socket();
    let ctr =
        ["60", "ctr", "--namespace", NAMESPACE, "--address", socket.to_str().unwrap(), "images", "ls", "-q"];
    let listed = text(&Command::new("timeout").args(ctr).output().unwrap());
    assert!(listed.lines().any(|line| line == reference), "{listed}");

    ours.remove(&reference);
    assert_eq!(theirs.status(&reference), None);
    drop((ours, theirs));

    // containerd goes and comes back; the kubelet's connections are made anew by themselves.
    node.stand.containerd.stop();
    let mut ours = node.images();
    let error = ours.list().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("cannot reach containerd at"), "{error}");
    drop(ours);
    node.stand.containerd.resume();
    let mut ours = node.images();
    assert!(guard::eventually(LIMIT, || ours.list().is_ok()));
    drop(ours);

    // So does the daemon.
    node.stand.lazurite.replace();
    assert!(guard::eventually(LIMIT, || node.images().list().is_ok()));
    node.stand.lazurite.kill();
    node.stand.lazurite.resume();
    node.images().list().unwrap();
    node.stand.lazurite.stop();
    assert!(!node.socket().exists());
}

#[test]
fn the_login_of_a_pull_is_used_and_written_nowhere() {
    let Some(node) = Node::new() else { return };
    let image = Image::busybox();
    let registry = DockerRegistry::locked(&node.stand.dir.path().join("registry"), &image);
    let reference = image.reference(&registry, Form::Estargz);
    let (user, password) = LOGIN;
    let auth = |password: &str| {
        let (username, password) = (user.to_owned(), password.to_owned());
        Some(AuthConfig { username, password, ..AuthConfig::default() })
    };
    let mut images = node.images();
    let refused = images.pull(&reference, None).unwrap_err();
    same(&refused, &node.images_at(&node.stand.containerd.address()).pull(&reference, None).unwrap_err());
    let lazurite = &node.stand.lazurite;
    let seen = || lazurite.log().lines().filter(|line| line.contains("a login for a pull")).count();
    assert_eq!(seen(), 0);
    images.pull(&reference, auth("hunter2")).unwrap_err();
    assert_eq!(seen(), 1);
    let id = images.pull(&reference, auth(password)).unwrap();
    assert_eq!(images.status(&reference).unwrap().id, id);
    let log = lazurite.log();
    assert_eq!(seen(), 2, "{log}");
    assert!(log.contains(&format!("image=\"{reference}\"")), "{log}");
    assert!(!log.contains("hunter2") && !log.contains(password), "{log}");
    // With what the kubelet sent, and nothing else, the layers are mounted.
    let labels = node.snapshot_labels();
    assert!(!labels.is_empty() && labels.iter().all(|labels| !labels[REMOTE].is_null()), "{labels:?}\n{log}");
}
