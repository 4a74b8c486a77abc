//! Against the reference implementation, as Debian packages it.

use crate::{config, content, later};
use futures::TryStreamExt;
use registry::{Error, Reference, Registry, StreamOptions, UploadOptions};
use serde_json::json;
use std::io::Read;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;
use support::guard;
use support::registry::{CONFIG, LAYER_GZIP, MANIFEST};
use support::sha256_digest;
use support::system::DockerRegistry;

#[tokio::test]
async fn what_is_pushed_can_be_read_back() {
    if !guard::require_programs(&["docker-registry"]) {
        return;
    }
    let dir = guard::temp_dir();
    let server = DockerRegistry::start(dir.path());
    let registry = Registry::new(config()).unwrap();
    let repository = |name: &str| -> Reference { format!("{}/{name}:v1", server.address()).parse().unwrap() };
    let (source, target) = (repository("team/source"), repository("team/target"));
    let (layer, image_config) = (content(5_000_000), json!({ "architecture": "amd64" }).to_string());
    let (layer_digest, config_digest) = (sha256_digest(&layer), sha256_digest(image_config.as_bytes()));
    let options = UploadOptions { chunk_size: 1 << 20, chunk_timeout: Duration::from_secs(60) };

    assert_eq!(registry.has_blob(&source, &layer_digest, later()).await.unwrap(), None);
    let mut upload = registry.upload(&source, options.clone()).await.unwrap();
    for piece in layer.chunks(300_000) {
        upload.write(piece.to_vec().into()).await.unwrap();
    }
    assert_eq!(upload.confirmed(), 4 << 20);
    upload.finish(&layer_digest).await.unwrap();
    assert_eq!(registry.has_blob(&source, &layer_digest, later()).await.unwrap(), Some(5_000_000));
    registry.put_blob(&target, &config_digest, image_config.clone().into(), options.clone()).await.unwrap();

    let document = |layer: &str| {
        let described = |media_type: &str, digest: &str, size: usize| json!({ "mediaType": media_type, "digest": digest, "size": size });
        let config = described(CONFIG, &config_digest, image_config.len());
        let layers = [described(LAYER_GZIP, layer, 5_000_000)];
        json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers }).to_string()
    };
    let manifest = document(&layer_digest);
    let put = async || registry.put_manifest(&target, MANIFEST, manifest.clone().into(), later()).await;
    let error = put().await.unwrap_err();
    assert!(error.to_string().contains("BLOB_UNKNOWN"), "{error}");
    assert!(registry.mount_blob(&target, &layer_digest, "team/source", later()).await.unwrap());
    assert!(!registry.mount_blob(&target, &sha256_digest(b"x"), "team/source", later()).await.unwrap());
    let digest = put().await.unwrap();

    let read = registry.manifest(&target, None, later()).await.unwrap();
    assert_eq!((read.bytes, read.digest), (manifest.into(), digest));
    let blob = registry.blob(&target, &layer_digest, Some(5_000_000)).unwrap();
    let stream = blob.stream(StreamOptions { range_size: 1 << 20, ..Default::default() }).unwrap();
    let pieces: Vec<_> = stream.try_collect().await.unwrap();
    assert_eq!(pieces.concat(), layer);

    let mut unwanted = registry.upload(&source, options.clone()).await.unwrap();
    unwanted.write(layer[..2 << 20].to_vec().into()).await.unwrap();
    unwanted.cancel().await.unwrap();
    let ends = server.accesses().into_iter().filter(|access| access.method == "DELETE");
    let ends: Vec<u16> = ends.map(|access| access.status).collect();
    assert_eq!(ends, [204, 204], "the upload begun in place of a mount, and the one cancelled");
    for name in ["source", "target"] {
        let uploads = format!("storage/docker/registry/v2/repositories/team/{name}/_uploads");
        let left = std::fs::read_dir(dir.path().join(uploads)).into_iter().flatten().flatten();
        // It keeps the state of its hash function, a few bytes; the blob's are what counts.
        let left: Vec<_> =
            left.map(|upload| upload.path().join("data")).filter(|path| path.exists()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let mut wrong = registry.upload(&source, options).await.unwrap();
    wrong.write(content(100).into()).await.unwrap();
    let error = wrong.finish(&sha256_digest(b"other")).await.unwrap_err();
    assert!(matches!(&error, Error::BadResponse { why, .. } if why.contains("DIGEST_INVALID")), "{error}");
}

/// A way to `target` whose first connection is cut when so many bytes have gone there.
fn cut_after(bytes: u64, target: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (address, target) = (listener.local_addr().expect("a bound socket"), target.to_owned());
    let relay = |from: TcpStream, to: TcpStream, limit: u64| {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut (&from).take(limit), &mut &to);
            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
        });
    };
    std::thread::spawn(move || {
        let mut limit = bytes;
        for client in listener.incoming().map_while(Result::ok) {
            let server = TcpStream::connect(&target).expect("the registry runs");
            let (Ok(from_client), Ok(from_server)) = (client.try_clone(), server.try_clone()) else { return };
            relay(from_client, server, std::mem::replace(&mut limit, u64::MAX));
            relay(from_server, client, u64::MAX);
        }
    });
    address.to_string()
}

#[tokio::test]
async fn a_connection_that_breaks_in_a_chunk() {
    if !guard::require_programs(&["docker-registry"]) {
        return;
    }
    let dir = guard::temp_dir();
    let server = DockerRegistry::start(dir.path());
    let data = content(2_500_000);
    for (cut, chunk) in [(600_000, 0), (1_600_000, 1)] {
        let host = cut_after(cut, server.address());
        let reference: Reference = format!("{host}/team/cut{chunk}").parse().unwrap();
        let registry = Registry::new(config()).unwrap();
        let options = UploadOptions { chunk_size: 1 << 20, chunk_timeout: Duration::from_secs(60) };
        let outcome =
            registry.put_blob(&reference, &sha256_digest(&data), data.clone().into(), options.clone()).await;
        match chunk {
            0 => outcome.expect("what is lost is still held, and sent again"),
            // This version knows no more of an upload whose chunk broke off.
            _ => assert!(matches!(outcome, Err(Error::UploadLost { .. })), "{outcome:?}"),
        }
        // The way is whole now: the same again succeeds.
        registry.put_blob(&reference, &sha256_digest(&data), data.clone().into(), options).await.unwrap();
        let blob = registry.blob(&reference, &sha256_digest(&data), Some(2_500_000)).unwrap();
        let pieces: Vec<_> = blob.stream(StreamOptions::default()).unwrap().try_collect().await.unwrap();
        assert_eq!(pieces.concat(), data);
    }
}
