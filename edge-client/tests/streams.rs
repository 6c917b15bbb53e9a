//! `stream` against servers that take streams and end them at once, or refuse what comes on them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use isthmus_proto::offload_v1::infer_request::Payload;
use isthmus_proto::offload_v1::infer_stream_response::Result as Outcome;
use isthmus_proto::offload_v1::offload_service_server::{OffloadService, OffloadServiceServer};
use isthmus_proto::offload_v1::{DescribeRequest, DescribeResponse, InferError, InferRequest, InferResponse, InferStreamResponse};
use isthmus_testkit::{binary, bundle, demo_photos};
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

/// A service on a port of its own.
async fn serve<S: OffloadService>(service: S) -> (String, tokio::task::JoinHandle<Result<(), tonic::transport::Error>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let server = tonic::transport::Server::builder().add_service(OffloadServiceServer::new(service));
    (url, tokio::spawn(server.serve_with_incoming(incoming)))
}

struct Ends(Arc<AtomicUsize>);

#[tonic::async_trait]
impl OffloadService for Ends {
    type InferStreamStream = tokio_stream::Empty<Result<InferStreamResponse, Status>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(DescribeResponse::default()))
    }

    async fn infer(&self, _: Request<InferRequest>) -> Result<Response<InferResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn infer_stream(&self, _: Request<Streaming<InferRequest>>) -> Result<Response<Self::InferStreamStream>, Status> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(tokio_stream::empty()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_keep_their_time_limit_however_often_a_stream_is_opened_again() {
    let asked = Arc::new(AtomicUsize::new(0));
    let (url, serving) = serve(Ends(asked.clone())).await;
    let folder = tempfile::tempdir().unwrap();
    for photo in &demo_photos()[..2] {
        std::fs::copy(photo, folder.path().join(photo.file_name().unwrap())).unwrap();
    }
    let mut command = std::process::Command::new(binary("edge-client"));
    command
        .arg("stream")
        .arg(folder.path())
        .args(["--fps", "10", "--deadline", "1s", "--server", &url, "--json"])
        .arg("--bundle")
        .arg(bundle());
    let began = Instant::now();
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    serving.abort();
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success(), "{lines}{}", String::from_utf8_lossy(&output.stderr));
    assert!(lines.lines().count() > 0 && lines.lines().all(|l| l.contains("\"error\"")), "what was sent has its line: {lines}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("edge-client: "), "and the command says why it ends");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    // a pause before each
    assert!((2..40).contains(&asked.load(Ordering::Relaxed)), "{asked:?}");
}

/// Busy for whoever streams; answers single photos.
struct Busy(Arc<AtomicUsize>);

#[tonic::async_trait]
impl OffloadService for Busy {
    type InferStreamStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<InferStreamResponse, Status>> + Send>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(DescribeResponse::default()))
    }

    async fn infer(&self, _: Request<InferRequest>) -> Result<Response<InferResponse>, Status> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(InferResponse { model: "other".into(), ..InferResponse::default() }))
    }

    async fn infer_stream(&self, request: Request<Streaming<InferRequest>>) -> Result<Response<Self::InferStreamStream>, Status> {
        let refused = |request: InferRequest| {
            let error =
                InferError { id: request.id, code: tonic::Code::ResourceExhausted as i32, message: "busy".into(), retry_pushback_ms: 20 };
            InferStreamResponse { result: Some(Outcome::Error(error)) }
        };
        Ok(Response::new(Box::pin(request.into_inner().map(move |r| r.map(refused)))))
    }
}

/// Of two servers that end streams at once, until Ctrl-C.
#[tokio::test(flavor = "multi_thread")]
async fn an_interruption_is_heard_while_a_stream_is_opened_again() {
    let asked = Arc::new(AtomicUsize::new(0));
    let (url, _serving) = serve(Ends(asked.clone())).await;
    let mut command = std::process::Command::new(binary("edge-client"));
    command.arg("stream").arg(demo_photos()[0].parent().unwrap()).args(["--fps", "10", "--deadline", "60s", "--server", &url, "--json"]);
    let child = command.arg("--bundle").arg(bundle()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let began = Instant::now();
    let signalled = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(signalled.success());
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    assert!(!output.status.success() && began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(asked.load(Ordering::Relaxed) >= 2, "it was opening streams");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stream_s_server_refuses_is_asked_of_the_others() {
    let folder = tempfile::tempdir().unwrap();
    for photo in &demo_photos()[..4] {
        std::fs::copy(photo, folder.path().join(photo.file_name().unwrap())).unwrap();
    }
    let asked = Arc::new(AtomicUsize::new(0));
    let mut urls = Vec::new();
    for _ in 0..2 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        urls.push(format!("http://{}", listener.local_addr().unwrap()));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let server = tonic::transport::Server::builder().add_service(OffloadServiceServer::new(Busy(asked.clone())));
        tokio::spawn(server.serve_with_incoming(incoming));
    }
    for (servers, answered) in [(urls.join(","), 4), (urls[0].clone(), 0)] {
        let mut command = std::process::Command::new(binary("edge-client"));
        command.arg("stream").arg(folder.path()).args(["--fps", "20", "--deadline", "2s", "--server", &servers, "--json"]);
        command.arg("--bundle").arg(bundle());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(lines.lines().count(), 4, "{lines}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(lines.lines().filter(|l| !l.contains("\"error\"")).count(), answered, "{lines}");
        assert_eq!(asked.swap(0, Ordering::Relaxed), answered);
        assert_eq!(output.status.success(), answered == 4);
    }
}

/// Answers beginnings with a wish for more, and refinements not at all as it should: it has forgotten what they refine, or is too busy.
struct Forgets {
    code: tonic::Code,
    whole: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl OffloadService for Forgets {
    type InferStreamStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<InferStreamResponse, Status>> + Send>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(DescribeResponse::default()))
    }

    async fn infer(&self, _: Request<InferRequest>) -> Result<Response<InferResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn infer_stream(&self, requests: Request<Streaming<InferRequest>>) -> Result<Response<Self::InferStreamStream>, Status> {
        let (code, whole) = (self.code, self.whole.clone());
        let answers = requests.into_inner().map(move |request| {
            let request = request?;
            let result = match request.payload {
                Some(Payload::Bitstream(bytes)) => {
                    let refinements = isthmus_codec::Progressive::parse(&bytes).unwrap().refinements();
                    whole.fetch_add(refinements, Ordering::Relaxed);
                    Outcome::Response(InferResponse { id: request.id, wants_more: refinements == 0, ..InferResponse::default() })
                }
                _ => Outcome::Error(InferError { id: request.id, code: code as i32, ..InferError::default() }),
            };
            Ok(InferStreamResponse { result: Some(result) })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_forgot_is_sent_whole_and_an_answer_that_came_is_kept() {
    for (code, whole) in [(tonic::Code::FailedPrecondition, 2), (tonic::Code::ResourceExhausted, 0)] {
        let sent_whole = Arc::new(AtomicUsize::new(0));
        let (url, serving) = serve(Forgets { code, whole: sent_whole.clone() }).await;
        let folder = tempfile::tempdir().unwrap();
        for photo in &demo_photos()[..2] {
            std::fs::copy(photo, folder.path().join(photo.file_name().unwrap())).unwrap();
        }
        let mut command = std::process::Command::new(binary("edge-client"));
        command
            .arg("stream")
            .arg(folder.path())
            .args(["--progressive", "--fps", "20", "--server", &url, "--json", "--bundle"])
            .arg(bundle());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        serving.abort();
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{lines}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(lines.lines().filter(|l| l.contains("\"refinements\":1")).count(), 2, "{lines}");
        assert_eq!(sent_whole.load(Ordering::Relaxed), whole, "{code:?}");
    }
}
