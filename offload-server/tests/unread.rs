//! Clients that take their answers slowly, or not at all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use common::{assert_healthy, client, code_of, configured, sample};
use edge_client::Payload;
use h2::client::{ResponseFuture, SendRequest};
use isthmus_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use isthmus_proto::inference::{InferParameter, ModelInferRequest, infer_parameter};
use isthmus_proto::offload_v1::{InferRequest, infer_request};
use isthmus_testkit::Server;
use prost::Message;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::codegen::http::{HeaderMap, Method, Request};

/// A connection that takes so many bytes of each answer before it says that it has room for more.
async fn connected(server: &Server, window: u32) -> (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let connection = TcpStream::connect(server.address).await.unwrap();
    let (requests, driver) = h2::client::Builder::new().initial_window_size(window).handshake(connection).await.unwrap();
    (requests, tokio::spawn(driver))
}

async fn ask(server: &Server, requests: &SendRequest<Bytes>, path: &str, message: &impl Message) -> ResponseFuture {
    let uri = format!("http://{}/{path}", server.address);
    let head = Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc").header("te", "trailers");
    let (answer, mut body) = requests.clone().ready().await.unwrap().send_request(head.body(()).unwrap(), false).unwrap();
    let mut framed = BytesMut::from(&[0][..]);
    framed.extend((message.encoded_len() as u32).to_be_bytes());
    message.encode(&mut framed).unwrap();
    body.send_data(framed.freeze(), true).unwrap();
    answer
}

fn with_logits(container: &Bytes) -> InferRequest {
    InferRequest { payload: Some(infer_request::Payload::Bitstream(container.clone())), logits: true, ..InferRequest::default() }
}

fn gauge(server: &Server, name: &str) -> f64 {
    let page = server.metrics();
    let line = page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
    line.unwrap_or_else(|| panic!("{name}: {page}")).parse().unwrap()
}

/// Answers that nobody reads are requests in flight: as many as there may be, and for a while only.
#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_answers_that_nobody_reads_are_bounded_and_dropped() {
    let server = configured("max_in_flight = 6\nstream_idle = \"3s\"\n");
    let (container, _) = sample();
    let mut asking = client(&server).await;
    assert_healthy(&mut asking, &container).await;
    let (requests, driver) = connected(&server, 0).await;
    let mut answers = Vec::new();
    for _ in 0..6 {
        answers.push(ask(&server, &requests, "isthmus.offload.v1.OffloadService/Infer", &with_logits(&container)).await);
    }
    let mut bodies = Vec::new();
    for answer in answers {
        // heads need no room
        bodies.push(tokio::time::timeout(Duration::from_secs(10), answer).await.unwrap().unwrap().into_body());
    }
    assert_eq!(gauge(&server, "isthmus_in_flight"), 6.0);
    let (code, why) = code_of(&mut asking, Payload::Bitstream(container.clone())).await;
    assert!(code == Code::ResourceExhausted && why.contains("in flight"), "{why}");
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(gauge(&server, "isthmus_in_flight"), 0.0, "nobody took them for three seconds");
    assert_healthy(&mut asking, &container).await;
    drop(bodies);
    driver.abort();
}

/// The same on a stream: what waits there to be read is in flight too.
#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_streams_of_answers_that_nobody_reads_are_bounded() {
    let server = configured("max_in_flight = 6\nstream_idle = \"2s\"\nstream_window = 64\n");
    let (container, _) = sample();
    let mut asking = client(&server).await;
    let (requests, driver) = connected(&server, 0).await;
    let uri = format!("http://{}/isthmus.offload.v1.OffloadService/InferStream", server.address);
    let head = Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc").header("te", "trailers");
    let (answer, mut body) = requests.clone().ready().await.unwrap().send_request(head.body(()).unwrap(), false).unwrap();
    let message = with_logits(&container);
    for _ in 0..30 {
        let framed = [&[0][..], &(message.encoded_len() as u32).to_be_bytes(), &message.encode_to_vec()].concat();
        body.send_data(framed.into(), false).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let unread = answer.await.unwrap();
    // what was refused has its answer there too, but no place; what was not has both
    let held = gauge(&server, "isthmus_in_flight");
    assert!((1.0..=6.0).contains(&held), "{held} of 6");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(gauge(&server, "isthmus_in_flight"), 0.0);
    assert_healthy(&mut asking, &container).await;
    drop(unread);
    driver.abort();
}

/// An answer that a slow link takes for longer than a drain would wait for nothing still comes whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_answers_that_are_being_read() {
    const PHOTOS: usize = 24;
    let mut server = configured("drain_delay = \"0s\"\ndrain_limit = \"30s\"\n");
    let (requests, driver) = connected(&server, 65_535).await;
    let classes = InferParameter { parameter_choice: Some(infer_parameter::ParameterChoice::Int64Param(1000)) };
    let message = ModelInferRequest {
        model_name: "efficientnet-lite0".into(),
        inputs: vec![InferInputTensor {
            name: "pixels".into(),
            datatype: "UINT8".into(),
            shape: vec![PHOTOS as i64, 8, 8, 3],
            ..InferInputTensor::default()
        }],
        outputs: vec![InferRequestedOutputTensor { name: "labels".into(), parameters: [("classification".into(), classes)].into() }],
        raw_input_contents: vec![vec![7; PHOTOS * 8 * 8 * 3].into()],
        ..ModelInferRequest::default()
    };
    let answer = ask(&server, &requests, "inference.GRPCInferenceService/ModelInfer", &message).await;
    let mut body = answer.await.unwrap().into_body();
    server.process.signal("TERM");
    let (mut come, mut slept) = (0, Duration::ZERO);
    while let Some(data) = body.data().await {
        let data = data.unwrap_or_else(|e| panic!("cut off after {come} bytes: {e}"));
        come += data.len();
        let pause = Duration::from_millis(300) * (data.len() as u32) / 65_536;
        tokio::time::sleep(pause).await;
        slept += pause;
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    let trailers: HeaderMap = body.trailers().await.unwrap().expect("trailers");
    assert_eq!(trailers.get("grpc-status").unwrap(), "0");
    assert!(come > 500_000 && slept > Duration::from_secs(2), "{come} bytes in {slept:?}");
    drop((body, requests));
    assert_eq!(server.process.wait(Duration::from_secs(20)), Some(0));
    driver.abort();
}
