//! Shared by the tests of the running server.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::time::Duration;

use bytes::Bytes;
use edge_client::{Client, ClientError, Encoder, Endpoint, InferOptions, Payload, open_bundle};
use isthmus_testkit::Server;
use tonic::Code;

pub fn encoder() -> Encoder {
    Encoder::new(open_bundle(&isthmus_testkit::bundle()).unwrap(), 1).unwrap()
}

pub async fn client(server: &Server) -> Client {
    Client::connect(&Endpoint::new(&server.url()).unwrap()).await.unwrap()
}

/// A server with the default bundle and this configuration.
pub fn configured(toml: &str) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("server.toml");
    std::fs::write(&config, toml).unwrap();
    Server::start(&["--config", config.to_str().unwrap()])
}

pub fn options() -> InferOptions {
    InferOptions { deadline: Duration::from_secs(20), ..InferOptions::default() }
}

/// A good container and the photo's file.
pub fn sample() -> (Bytes, Bytes) {
    let photo = std::fs::read(&isthmus_testkit::demo_photos()[0]).unwrap();
    let container = encoder().encode(&photo, 3).unwrap().container;
    (container.into(), photo.into())
}

/// The status code of a failed request.
pub async fn code_of(client: &mut Client, payload: Payload) -> (Code, String) {
    match client.infer(payload, &options()).await {
        Err(ClientError::Server(status)) => (status.code(), status.message().to_owned()),
        other => panic!("a refusal was expected, got {other:?}"),
    }
}

/// The server still answers good requests.
pub async fn assert_healthy(client: &mut Client, container: &Bytes) {
    let answer = client.infer(Payload::Bitstream(container.clone()), &options()).await.unwrap();
    assert_eq!(answer.labels.len(), 5);
}
