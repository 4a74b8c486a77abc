//! What is passed on is what was said, both ways; and what the observer sees in it, whatever it is given.

use std::sync::Mutex;

use proptest::prelude::*;
use prost::Message as _;
use proto::cri::image_service_client::ImageServiceClient;
use proto::cri::image_service_server::{ImageService, ImageServiceServer};
use proto::cri::runtime_service_client::RuntimeServiceClient;
use proto::cri::*;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Response};

use super::*;
use crate::containerd::connect as channel;

const LIMIT: Duration = Duration::from_secs(60);
const LARGE: usize = 15 << 20;

type Seen = Arc<Mutex<Vec<(String, PullLogin)>>>;

fn seen() -> (Seen, OnPull) {
    let seen = Seen::default();
    let to = seen.clone();
    (seen, Arc::new(move |image, login| to.lock().unwrap().push((image.to_owned(), login))))
}

fn auth() -> AuthConfig {
    AuthConfig {
        username: "user".to_owned(),
        password: "hunter2".to_owned(),
        auth: "dXNlcjpodW50ZXIy".to_owned(),
        server_address: "r.example".to_owned(),
        identity_token: "identity".to_owned(),
        registry_token: "registry".to_owned(),
    }
}

fn request(image: &str, auth: Option<AuthConfig>) -> PullImageRequest {
    PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }), auth }
}

// The observer.

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn grpc(message: &[u8]) -> Vec<u8> {
    [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat()
}

/// A connection of a client in Go: the path of the socket as authority, header blocks that refer to earlier ones, every
/// form a frame may have, calls that overlap.
fn connection() -> Vec<u8> {
    let mut encoder = loona_hpack::Encoder::new();
    let mut block = |path: &str| {
        let authority = b":authority" as &[u8];
        let fields = [(b":method" as &[u8], b"POST" as &[u8]), (b":path", path.as_bytes())];
        encoder.encode(fields.into_iter().chain([(authority, b"%2Frun%2Fcri.sock" as &[u8])]))
    };
    let pull = "/runtime.v1.ImageService/PullImage";
    let (one, two, list) = (block(pull), block(pull), block("/runtime.v1.ImageService/ListImages"));
    let (old, reset, bare) = (block("/runtime.v1alpha2.ImageService/PullImage"), block(pull), block(pull));
    let body = |image| grpc(&request(image, Some(auth())).encode_to_vec());
    let (first, second) = (body("one"), body("two"));
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        // With padding and priority, in three parts.
        frame(1, 0x8 | 0x20, 1, &[&[3, 0, 0, 0, 0, 9], &one[..2], &[0; 3]].concat()),
        frame(9, 0, 1, &one[2..5]),
        frame(9, 0x4, 1, &one[5..]),
        frame(1, 0x4, 3, &two),
        frame(0, 0, 3, &second[..7]),
        frame(8, 0, 0, &[0, 0, 1, 0]),
        frame(0, 0x8, 1, &[&[2], &first[..3], &[0; 2]].concat()),
        frame(1, 0x4, 5, &list),
        frame(0, 0x1, 5, &body("listed")),
        frame(0, 0, 1, &first[3..]),
        // The message was complete before.
        frame(0, 0x1, 1, &[]),
        frame(0, 0x1, 3, &second[7..]),
        frame(1, 0x4, 7, &old),
        frame(0, 0x1, 7, &body("old")),
        frame(1, 0x4, 9, &reset),
        frame(0, 0, 9, &body("reset")[..9]),
        frame(3, 0, 9, &[0; 4]),
        frame(0, 0x1, 9, &body("reset")[9..]),
        frame(1, 0x4, 11, &bare),
        frame(0, 0x1, 11, &grpc(&request("bare", None).encode_to_vec())),
    ]
    .concat()
}

fn observe(pieces: impl Iterator<Item = Vec<u8>>) -> anyhow::Result<Vec<(String, PullLogin)>> {
    let (seen, on_pull) = seen();
    let mut observer = Observer::new();
    for piece in pieces {
        observer.read(&piece, &*on_pull)?;
    }
    let seen = seen.lock().unwrap().clone();
    Ok(seen)
}

#[test]
fn every_pull_with_a_login_is_seen_once_however_the_bytes_come() {
    let bytes = connection();
    let expected = ["one", "two", "old"].map(|image| (image.to_owned(), observe::login(auth())));
    for size in [1, 2, 3, 10, 100, bytes.len()] {
        assert_eq!(observe(bytes.chunks(size).map(<[u8]>::to_vec)).unwrap(), expected, "{size} at a time");
    }
}

#[test]
fn what_cannot_be_followed_is_an_error() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let path = loona_hpack::Encoder::new()
        .encode([(b":path" as &[u8], b"/runtime.v1.ImageService/PullImage" as &[u8])]);
    let pull = |body: &[u8]| [&preface[..], &frame(1, 0x4, 1, &path), &frame(0, 0, 1, body)].concat();
    let cases = [
        (b"GET / HTTP/1.1\r\n".to_vec(), "does not begin"),
        ([&preface[..], &frame(9, 0, 1, &[])].concat(), "interrupted"),
        ([&preface[..], &frame(1, 0, 1, &path), &frame(9, 0, 3, &[])].concat(), "interrupted"),
        ([&preface[..], &frame(1, 0x8, 1, &[])].concat(), "too short"),
        ([&preface[..], &frame(1, 0x8, 1, &[9, 0])].concat(), "too short"),
        ([&preface[..], &frame(1, 0x4, 1, &[0xff])].concat(), "octets"),
        ([&preface[..], &frame(1, 0, 1, &vec![0; (1 << 20) + 1])].concat(), "too long"),
        // A table of 1 MiB.
        ([&preface[..], &frame(1, 0x4, 1, &[0x3f, 0xe1, 0xff, 0x3f])].concat(), "maximum size"),
        (pull(&[1, 0, 0, 0, 1, 0]), "compressed"),
        (pull(&grpc(&[0xff])), "varint"),
        (
            [pull(&grpc(&vec![0; 12 << 20])[..9 << 20]), frame(0, 0, 1, &vec![0; 8 << 20])].concat(),
            "too long",
        ),
    ];
    for (bytes, why) in cases {
        let error = observe([bytes].into_iter()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}: {why}");
    }
}

#[test]
fn logins_are_not_shown() {
    assert_eq!(format!("{:?}", observe::login(auth())), "PullLogin(***)");
}

proptest! {
    #[test]
    fn nothing_makes_the_observer_panic(
        noise in prop::collection::vec(any::<u8>(), 0..400),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
    ) {
        let mut bytes = connection();
        let after = [&bytes[..24], &frame(1, 0x4, 1, &noise), &noise].concat();
        for (place, byte) in changes {
            *place.get_mut(&mut bytes) = byte;
        }
        for bytes in [noise, after, bytes] {
            let _ = observe([bytes].into_iter());
        }
    }
}

// The connections.

/// Plays containerd: says how it was called, fails in detail, answers at length, or not at all.
struct Played(mpsc::UnboundedSender<&'static str>);

#[tonic::async_trait]
impl ImageService for Played {
    async fn list_images(
        &self,
        _: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let image = Image { id: "i".repeat(LARGE), ..Image::default() };
        let mut response = Response::new(ListImagesResponse { images: vec![image] });
        response.metadata_mut().insert("x-answer", MetadataValue::from_static("there"));
        Ok(response)
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        let say = |key| request.metadata().get(key).map(|value| value.to_str().unwrap().to_owned());
        let repo_tags = ["x-test", "grpc-timeout"].into_iter().filter_map(say).collect();
        Ok(Response::new(ImageStatusResponse { image: Some(Image { repo_tags, ..Image::default() }) }))
    }

    async fn pull_image(&self, _: Request<PullImageRequest>) -> Result<Response<PullImageResponse>, Status> {
        struct Told(mpsc::UnboundedSender<&'static str>);
        impl Drop for Told {
            fn drop(&mut self) {
                let _ = self.0.send("cancelled");
            }
        }
        let _told = Told(self.0.clone());
        let _ = self.0.send("called");
        std::future::pending().await
    }

    async fn remove_image(
        &self,
        _: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        let mut status = Status::with_details(Code::NotFound, "no such image: §", vec![0, 1, 2, 255].into());
        status.metadata_mut().insert("x-failed", MetadataValue::from_static("there"));
        Err(status)
    }

    async fn image_fs_info(
        &self,
        _: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        Ok(Response::new(ImageFsInfoResponse::default()))
    }
}

/// A proxy in a directory of its own, and what it saw.
struct Stand {
    dir: tempfile::TempDir,
    seen: Seen,
    stop: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<()>,
}

impl Stand {
    fn new() -> Stand {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("cri.sock")).unwrap();
        let (seen, on_pull) = seen();
        let (stop, stopped) = oneshot::channel();
        let shutdown = async { drop(stopped.await) };
        let served = tokio::spawn(serve(listener, dir.path().join("containerd.sock"), on_pull, shutdown));
        Stand { dir, seen, stop, served }
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(self.dir.path().join("containerd.sock")).unwrap()
    }

    fn play(&self) -> mpsc::UnboundedReceiver<&'static str> {
        let (to, told) = mpsc::unbounded_channel();
        let service = ImageServiceServer::new(Played(to)).max_encoding_message_size(usize::MAX);
        let incoming = UnixListenerStream::new(self.listen());
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        told
    }

    async fn client(&self) -> ImageServiceClient<Channel> {
        let channel = channel(&self.dir.path().join("cri.sock")).await.unwrap();
        ImageServiceClient::new(channel).max_decoding_message_size(usize::MAX)
    }

    fn seen(&self) -> Vec<(String, PullLogin)> {
        self.seen.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn calls_and_answers_pass_as_they_are() {
    let stand = Stand::new();
    let _told = stand.play();
    let mut client = stand.client().await;

    let mut request = Request::new(ImageStatusRequest::default());
    request.metadata_mut().insert("x-test", MetadataValue::from_static("here"));
    request.set_timeout(Duration::from_secs(50));
    let image = client.image_status(request).await.unwrap().into_inner().image.unwrap();
    assert_eq!(image.repo_tags, ["here", "50000000u"]);

    let answer = client.list_images(ListImagesRequest::default()).await.unwrap();
    assert_eq!(answer.metadata().get("x-answer").unwrap(), "there");
    assert_eq!(answer.into_inner().images[0].id.len(), LARGE);

    let status = client.remove_image(RemoveImageRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "no such image: §"));
    assert_eq!(status.details(), [0, 1, 2, 255]);
    assert_eq!(status.metadata().get("x-failed").unwrap(), "there");

    // Whatever is called gets containerd's answer, not one of ours.
    let mut runtime = RuntimeServiceClient::new(channel(&stand.dir.path().join("cri.sock")).await.unwrap());
    let status = runtime.version(VersionRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_login_is_seen_before_the_call_is_and_a_cancelled_call_is_cancelled() {
    let stand = Stand::new();
    let mut told = stand.play();
    let mut client = stand.client().await;
    let pull = tokio::spawn(async move { client.pull_image(request("r.example/app:1", Some(auth()))).await });
    assert_eq!(told.recv().await, Some("called"));
    assert_eq!(stand.seen(), [("r.example/app:1".to_owned(), observe::login(auth()))]);
    pull.abort();
    assert_eq!(told.recv().await, Some("cancelled"));
}

#[tokio::test]
async fn connections_that_rust_would_refuse_pass_unchanged() {
    let stand = Stand::new();
    let listener = stand.listen();
    let mut client = UnixStream::connect(stand.dir.path().join("cri.sock")).await.unwrap();
    let bytes = [connection(), b"and what is no HTTP at all".to_vec()].concat();
    client.write_all(&bytes).await.unwrap();
    let mut server = listener.accept().await.unwrap().0;
    let mut got = vec![0; bytes.len()];
    server.read_exact(&mut got).await.unwrap();
    assert!(got == bytes);
    assert_eq!(stand.seen().len(), 3);
    server.write_all(b"whatever").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"whatever");
}

#[tokio::test]
async fn without_containerd_calls_fail_and_say_so_until_it_is_there() {
    let stand = Stand::new();
    let mut client = stand.client().await;
    let status = client.image_fs_info(ImageFsInfoRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("lazurite cannot reach containerd at"), "{status}");
    assert!(status.message().contains("containerd.sock: No such file"), "{status}");
    let _told = stand.play();
    let answered = async {
        while let Err(status) = client.image_fs_info(ImageFsInfoRequest {}).await {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
        }
    };
    tokio::time::timeout(LIMIT, answered).await.unwrap();
}

#[tokio::test]
async fn a_stop_ends_connections_and_their_calls() {
    let stand = Stand::new();
    let mut told = stand.play();
    let mut client = stand.client().await;
    let pull = tokio::spawn(async move { client.pull_image(request("a", None)).await });
    assert_eq!(told.recv().await, Some("called"));
    stand.stop.send(()).unwrap();
    stand.served.await.unwrap();
    pull.await.unwrap().unwrap_err();
    assert_eq!(told.recv().await, Some("cancelled"));
}
