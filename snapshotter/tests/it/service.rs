//! What the gRPC adapter adds: codes, texts, batches, shutdown.

use std::collections::HashMap;

use containerd_snapshots::{
    api::snapshots::v1::Kind,
    tonic::{Code, Status},
};

use crate::{
    fake::{Attach, FakeFs},
    grpc::Served,
    node::offer,
};

fn grpc_offer(target: &str) -> HashMap<String, String> {
    offer(target, 1).into_iter().collect()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, word: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(word), "{status:?} does not speak of {word}");
}

#[tokio::test]
async fn codes_are_those_containerd_reads() {
    let served = Served::new().await;
    let client = &served.client;
    client.prepare("a", "").await.unwrap();
    client.prepare("tmp", "").await.unwrap();
    client.commit("c", "tmp").await.unwrap();
    client.view("v", "c").await.unwrap();

    refused(client.prepare("a", "").await, Code::AlreadyExists, "\"a\"");
    refused(client.view("a", "").await, Code::AlreadyExists, "\"a\"");
    refused(client.prepare("b", "none").await, Code::NotFound, "parent");
    refused(client.prepare("b", "a").await, Code::InvalidArgument, "not committed");
    refused(client.mounts("none").await, Code::NotFound, "\"none\"");
    refused(client.mounts("c").await, Code::FailedPrecondition, "committed");
    refused(client.commit("d", "none").await, Code::NotFound, "\"none\"");
    refused(client.commit("c", "a").await, Code::AlreadyExists, "\"c\"");
    refused(client.commit("d", "v").await, Code::FailedPrecondition, "view");
    refused(client.commit("d", "c").await, Code::FailedPrecondition, "committed");
    refused(client.remove("none").await, Code::NotFound, "\"none\"");
    refused(client.remove("c").await, Code::FailedPrecondition, "cannot remove snapshot with child");
    refused(client.stat("none ü\n").await, Code::NotFound, "ü");
    refused(client.usage("none").await, Code::NotFound, "\"none\"");
    refused(client.walk(&["name=="]).await, Code::InvalidArgument, "filter");
    let info = client.stat("a").await.unwrap();
    refused(client.update(info, &["kind"]).await, Code::InvalidArgument, "\"kind\"");
    assert!(client.walk(&["name==none"]).await.unwrap().is_empty());
    client.cleanup().await.unwrap();
}

#[tokio::test]
async fn an_attached_layer_is_told_as_already_existing_and_then_found() {
    let served = Served::new().await;
    let client = &served.client;
    for key in ["ns/1/extract-1 T", "ns/2/extract-2 T"] {
        refused(client.prepare_with(key, "", grpc_offer("T")).await, Code::AlreadyExists, "\"T\"");
        let found = client.walk(&["labels.\"containerd.io/snapshot.ref\"==T,parent==\"\""]).await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].kind()), ("T", Kind::Committed));
        assert_eq!(found[0].labels["containerd.io/snapshot/remote"], "remote snapshot");
    }
    let usage = client.usage("T").await.unwrap();
    let slot = *served.node.fs.attached().keys().next().unwrap();
    let expected = FakeFs::usage_of(slot);
    assert_eq!((usage.size as u64, usage.inodes as u64), (expected.size, expected.inodes));
}

#[tokio::test]
async fn long_lists_come_in_batches() {
    let served = Served::new().await;
    for n in 0..130 {
        served.client.view(&format!("v{n:03}"), "").await.unwrap();
    }
    let messages = served.client.list(&[]).await.unwrap();
    assert_eq!(messages.iter().map(Vec::len).collect::<Vec<_>>(), [100, 30]);
}

#[tokio::test]
async fn a_shutdown_answers_the_calls_in_flight() {
    let served = Served::new().await;
    served.node.fs.behave(Attach::Waits);
    let client = served.client.clone();
    let prepare = tokio::spawn(async move { client.prepare_with("k", "", grpc_offer("T")).await });
    served.node.fs.entered().await;
    served.stop.send(()).unwrap();
    tokio::task::yield_now().await;
    served.node.fs.let_go();
    refused(prepare.await.unwrap(), Code::AlreadyExists, "\"T\"");
    served.server.await.unwrap().unwrap();
    assert!(served.client.stat("T").await.is_err());
}
