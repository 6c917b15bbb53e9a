//! Whatever a client sends, it gets a clear status and the server stays healthy.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{assert_healthy, client, code_of, configured, options, sample};
use edge_client::{Client, ClientError, Endpoint, InferOptions, Payload};
use isthmus_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use isthmus_proto::inference::model_infer_request::InferInputTensor;
use isthmus_proto::inference::{InferTensorContents, ModelInferRequest};
use isthmus_proto::offload_v1::infer_stream_response::Result as Outcome;
use isthmus_proto::offload_v1::offload_service_client::OffloadServiceClient;
use isthmus_proto::offload_v1::{Features, InferRequest, infer_request};
use isthmus_testkit::Server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

fn bitstream(bytes: Vec<u8>) -> Payload {
    Payload::Bitstream(Bytes::from(bytes))
}

fn image(bytes: Vec<u8>) -> Payload {
    Payload::Image(Bytes::from(bytes))
}

/// CRC of a PNG chunk.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let crc = |bytes: &[u8]| {
        let mut c = u32::MAX;
        for &b in bytes {
            c ^= u32::from(b);
            for _ in 0..8 {
                c = if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 };
            }
        }
        !c
    };
    let mut body = kind.to_vec();
    body.extend(data);
    let mut out = (data.len() as u32).to_be_bytes().to_vec();
    out.extend(&body);
    out.extend(crc(&body).to_be_bytes());
    out
}

fn png(width: u32, height: u32, extra: Vec<u8>) -> Vec<u8> {
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut header = width.to_be_bytes().to_vec();
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    out.extend(chunk(b"IHDR", &header));
    out.extend(extra);
    out.extend(chunk(b"IDAT", &[0x78, 0x9c, 0x03, 0, 0, 0, 0, 1]));
    out.extend(chunk(b"IEND", &[]));
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn threat_bombs_containers_of_every_kind_of_wrong() {
    let server = Server::start(&[]);
    let mut client = client(&server).await;
    let (good, _) = sample();
    let before = server.process.memory_kb("VmRSS");

    // every single-byte flip and a spread of truncations, over one stream each
    let mut bad: Vec<Vec<u8>> = (0..good.len())
        .map(|i| {
            let mut b = good.to_vec();
            b[i] ^= 1 << (i % 8);
            b
        })
        .collect();
    bad.extend((0..good.len()).map(|len| good[..len].to_vec()));
    let total = bad.len();
    let (send, requests) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        for (id, bytes) in bad.into_iter().enumerate() {
            let payload = Some(infer_request::Payload::Bitstream(bytes.into()));
            let request = InferRequest { id: id as u64 + 1, payload, timeout_ms: 20_000, ..InferRequest::default() };
            if send.send(request).await.is_err() {
                return;
            }
        }
    });
    let mut answers = client.raw().infer_stream(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let mut seen = 0;
    while let Some(answer) = answers.message().await.unwrap() {
        let Some(Outcome::Error(error)) = answer.result else { panic!("a damaged container was answered: {answer:?}") };
        assert_eq!(Code::from(error.code), Code::InvalidArgument, "{}", error.message);
        seen += 1;
    }
    assert_eq!(seen, total, "every damaged container got its own answer");

    let mut claims = good.to_vec();
    claims[25..29].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(code_of(&mut client, bitstream(claims)).await.0, Code::InvalidArgument);
    for nonsense in [vec![], vec![0; 3], b"not a container at all, but long enough for one".to_vec(), vec![0xff; 100_000]] {
        assert_eq!(code_of(&mut client, bitstream(nonsense)).await.0, Code::InvalidArgument);
    }
    assert_healthy(&mut client, &good).await;
    let grown = server.process.memory_kb("VmRSS").saturating_sub(before);
    assert!(grown < 300_000, "memory grew by {grown} kB");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bundle_shape_model_and_empty_requests() {
    let server = Server::start(&[]);
    let mut client = client(&server).await;
    let (good, _) = sample();

    let mut other_bundle = good.to_vec();
    other_bundle[6] ^= 0xff;
    reseal(&mut other_bundle);
    let (code, message) = code_of(&mut client, bitstream(other_bundle)).await;
    assert_eq!(code, Code::FailedPrecondition, "{message}");
    assert!(message.contains("bundle"), "{message}");

    let mut other_shape = good.to_vec();
    other_shape[17..19].copy_from_slice(&14u16.to_le_bytes());
    other_shape[21..25].copy_from_slice(&(48u32 * 14 * 28).to_le_bytes());
    reseal(&mut other_shape);
    let (code, message) = code_of(&mut client, bitstream(other_shape)).await;
    assert_eq!(code, Code::InvalidArgument, "{message}");

    let unknown = InferOptions { model: "resnet-9000".into(), ..options() };
    let refused = client.infer(Payload::Bitstream(good.clone()), &unknown).await;
    assert!(matches!(refused, Err(ClientError::Server(s)) if s.code() == Code::NotFound));
    let nothing = client.raw().infer(InferRequest::default()).await.unwrap_err();
    assert_eq!(nothing.code(), Code::InvalidArgument);
    let described = client.describe(Some(&isthmus_codec::BundleHash([3; 32])), Duration::from_secs(5)).await;
    assert!(matches!(described, Err(ClientError::Server(s)) if s.code() == Code::FailedPrecondition));
    assert_healthy(&mut client, &good).await;
}

fn reseal(bytes: &mut [u8]) {
    // CRC-32C, bitwise: independent of the library that the server uses
    let end = bytes.len() - 4;
    let mut c = u32::MAX;
    for &b in &bytes[..end] {
        c ^= u32::from(b);
        for _ in 0..8 {
            c = if c & 1 == 1 { 0x82f6_3b78 ^ (c >> 1) } else { c >> 1 };
        }
    }
    bytes[end..].copy_from_slice(&(!c).to_le_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn threat_bombs_images_of_every_kind_of_wrong() {
    let server = Server::start(&[]);
    let mut client = client(&server).await;
    let (good, photo) = sample();
    let before = server.process.memory_kb("VmHWM");

    let animated_png = png(8, 8, chunk(b"acTL", &[0, 0, 0, 2, 0, 0, 0, 0]));
    let animated_webp = std::fs::read(isthmus_testkit::root().join("fuzz/corpus/image/animated.webp")).unwrap();
    let mut large = std::io::Cursor::new(Vec::new());
    ::image::RgbImage::new(5000, 4000).write_to(&mut large, ::image::ImageFormat::Png).unwrap();
    let scans = std::fs::read(isthmus_testkit::root().join("fuzz/corpus/image/scans")).unwrap();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("a jpeg of 70 scans", scans),
        ("text", b"hello, this is not an image".to_vec()),
        ("gif", b"GIF89a\x01\0\x01\0\0\0\0;".to_vec()),
        ("huge header", png(30_000, 30_000, vec![])),
        ("sound but of more pixels than the server takes", large.into_inner()),
        ("zero size", png(0, 0, vec![])),
        ("animated png", animated_png),
        ("animated webp", animated_webp),
        ("no pixels", png(100, 100, vec![])),
        ("cut jpeg header", photo[..200].to_vec()),
        ("just a jpeg marker", vec![0xff, 0xd8, 0xff]),
        ("avif without boxes", b"\0\0\0\x18ftypavif\0\0\0\0avifmif1".to_vec()),
        ("animated avif", b"\0\0\0\x18ftypavis\0\0\0\0avismsf1".to_vec()),
    ];
    for (name, bytes) in cases {
        let start = Instant::now();
        let (code, message) = code_of(&mut client, image(bytes)).await;
        assert_eq!(code, Code::InvalidArgument, "{name}: {message}");
        assert!(!message.is_empty() && start.elapsed() < Duration::from_secs(5), "{name}");
        assert!(!name.starts_with("sound") || message.contains("at most 16777216 pixels"), "{name}: {message}");
        assert!(!name.starts_with("animated") || message.contains("animated"), "{name}: {message}");
    }
    let values = |block, encoding: i32, data: Vec<u8>| Payload::Features(Features { block, encoding, data: data.into() });
    for (name, payload) in [
        ("no such block", values(99, 1, vec![])),
        ("too few values", values(0, 1, vec![0; 16])),
        ("no encoding", values(0, 0, vec![])),
        ("no zstd", values(0, 2, vec![7; 100])),
    ] {
        let (code, message) = code_of(&mut client, payload).await;
        assert!(code == Code::InvalidArgument && message.contains("features"), "{name}: {message}");
    }
    // larger than a message may be
    let (code, _) = code_of(&mut client, image(vec![1; 9 << 20])).await;
    assert!(matches!(code, Code::InvalidArgument | Code::ResourceExhausted), "{code:?}");
    assert_healthy(&mut client, &good).await;
    let grown = server.process.memory_kb("VmHWM").saturating_sub(before);
    println!("peak memory grew by {grown} kB");
    assert!(grown < 400_000, "peak memory grew by {grown} kB");
}

#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_streams_that_stop_or_never_read() {
    // small batches: the memory in question is that of what waits, not of the network at work
    let server = Server::start(&["--max-batch", "1"]);
    let mut good_client = client(&server).await;
    let (good, photo) = sample();

    // stops in the middle: the connection goes away with requests under way
    {
        let mut leaving = client(&server).await;
        let (send, requests) = tokio::sync::mpsc::channel(8);
        let answers = leaving.raw().infer_stream(ReceiverStream::new(requests)).await.unwrap();
        for id in 0..4 {
            let payload = Some(infer_request::Payload::Bitstream(good.clone()));
            send.send(InferRequest { id, payload, ..InferRequest::default() }).await.unwrap();
        }
        drop(answers);
    }
    assert_healthy(&mut good_client, &good).await;

    // never reads: the window fills, the server stops reading, memory stays bounded
    let mut silent = client(&server).await;
    let (send, requests) = tokio::sync::mpsc::channel(1);
    let answers = silent.raw().infer_stream(ReceiverStream::new(requests)).await.unwrap();
    let before = server.process.memory_kb("VmRSS");
    let mut accepted = 0u64;
    let flood = async {
        loop {
            let payload = Some(infer_request::Payload::Image(photo.clone()));
            let request = InferRequest { id: accepted, payload, logits: true, ..InferRequest::default() };
            if send.send(request).await.is_err() {
                return;
            }
            accepted += 1;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(6), flood).await;
    let grown = server.process.memory_kb("VmRSS").saturating_sub(before);
    assert!(accepted < 2000, "the server went on reading: {accepted} requests");
    println!("memory grew by {grown} kB");
    assert!(grown < 250_000, "memory grew by {grown} kB");
    assert_healthy(&mut good_client, &good).await;
    drop(answers);
    assert_healthy(&mut good_client, &good).await;
}

/// Connections, streams and half-sent messages are bounded, and what the transport refuses is counted.
#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_connections_streams_and_uploads_are_bounded() {
    let server = configured("max_connections = 3\nmax_streams = 1\nmax_request_bytes = 100000\n");
    let mut first = client(&server).await;
    let (good, _) = sample();

    let (_send, requests) = tokio::sync::mpsc::channel(1);
    let stream = first.raw().infer_stream(ReceiverStream::new(requests)).await.unwrap();
    let (_send, requests) = tokio::sync::mpsc::channel(1);
    let refused = first.raw().infer_stream(ReceiverStream::new(requests)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    drop(stream);

    let (code, message) = code_of(&mut first, image(vec![0; 200_000])).await;
    assert!(code == Code::InvalidArgument && message.contains("100000"), "{code:?} {message}");
    assert!(server.metrics().contains("isthmus_failed_calls_total{code=\"InvalidArgument\"} 1"));

    let second = client(&server).await;
    let third = client(&server).await;
    let endpoint = Endpoint::new(&server.url()).unwrap().with_connect_timeout(Duration::from_secs(5));
    let fourth = async {
        let mut client = Client::connect(&endpoint).await?;
        client.infer(bitstream(good.to_vec()), &options()).await
    };
    assert!(fourth.await.is_err());
    assert!(!server.metrics().contains("isthmus_connections_refused_total 0"));
    drop((second, third));
    assert_healthy(&mut first, &good).await;
}

/// A request of many photos of which one is damaged fails at once: the others are not computed in vain.
#[tokio::test(flavor = "multi_thread")]
async fn one_bad_photo_of_many_ends_the_request() {
    let server = configured("max_in_flight = 256\n");
    let (_, photo) = sample();
    let photos: Vec<Vec<u8>> = (0..64).map(|i| if i < 63 { photo.to_vec() } else { photo[..200].to_vec() }).collect();
    let contents =
        Some(InferTensorContents { bytes_contents: photos.into_iter().map(Into::into).collect(), ..InferTensorContents::default() });
    let input =
        InferInputTensor { name: "image".into(), datatype: "BYTES".into(), shape: vec![64], contents, ..InferInputTensor::default() };
    let request = ModelInferRequest { model_name: "efficientnet-lite0".into(), inputs: vec![input], ..ModelInferRequest::default() };
    let mut inference = GrpcInferenceServiceClient::connect(server.url()).await.unwrap();
    let refused = inference.model_infer(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    let metrics = server.metrics();
    let answered = metrics.lines().find_map(|l| l.strip_prefix("isthmus_requests_total{payload=\"image\",code=\"Ok\"} "));
    let answered: u32 = answered.map_or(0, |n| n.parse().unwrap());
    assert!(answered < 40, "{answered} of 63 were computed first");
}

/// One address holds no more than its share of the connections: others still come in.
#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_one_peer_does_not_keep_out_the_others() {
    let server = configured("max_connections_per_peer = 2\n");
    let (good, _) = sample();
    let mut first = client(&server).await;
    let second = client(&server).await;
    let address: SocketAddr = server.url().trim_start_matches("http://").parse().unwrap();
    let from = |host: [u8; 4]| async move {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((host, 0).into()).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        // the server's settings, or its end
        let mut settings = [0; 9];
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").await.is_ok()
            && stream.read_exact(&mut settings).await.is_ok()
    };
    assert!(!from([127, 0, 0, 1]).await);
    assert!(from([127, 0, 0, 2]).await);
    drop(second);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !from([127, 0, 0, 1]).await {
        assert!(Instant::now() < deadline, "the place of a connection that was closed did not come back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_healthy(&mut first, &good).await;
}

/// A stream on which nothing moves ends with a status, as does one with a message that is too large; requests
/// before it are still answered.
#[tokio::test(flavor = "multi_thread")]
async fn threat_slow_loris_idle_and_oversized_streams_end_with_a_status() {
    let server = configured("stream_idle = \"1s\"\nmax_stream_message_bytes = 100000\n");
    let mut client = client(&server).await;
    let (good, _) = sample();
    let request =
        |id, bytes: Bytes| InferRequest { id, payload: Some(infer_request::Payload::Bitstream(bytes)), ..InferRequest::default() };

    let (send, requests) = tokio::sync::mpsc::channel(8);
    let mut answers = client.raw().infer_stream(ReceiverStream::new(requests)).await.unwrap().into_inner();
    send.send(request(1, good.clone())).await.unwrap();
    let start = Instant::now();
    assert!(matches!(answers.message().await.unwrap().unwrap().result, Some(Outcome::Response(r)) if r.id == 1));
    let ended = answers.message().await.unwrap_err();
    assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended:?}");
    assert!(start.elapsed() < Duration::from_secs(10));

    let (send, requests) = tokio::sync::mpsc::channel(8);
    let mut answers = client.raw().infer_stream(ReceiverStream::new(requests)).await.unwrap().into_inner();
    send.send(request(2, good.clone())).await.unwrap();
    send.send(request(3, vec![0; 200_000].into())).await.unwrap();
    assert!(matches!(answers.message().await.unwrap().unwrap().result, Some(Outcome::Response(r)) if r.id == 2));
    let ended = answers.message().await.unwrap_err();
    assert!(matches!(ended.code(), Code::InvalidArgument | Code::ResourceExhausted), "{ended:?}");
    assert_healthy(&mut client, &good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_are_kept() {
    let server = Server::start(&["--threads", "1"]);
    let mut client = client(&server).await;
    let (good, photo) = sample();
    // more work than a short deadline allows
    let mut slow = Vec::new();
    for _ in 0..40 {
        let mut client = client.clone();
        let photo = photo.clone();
        slow.push(tokio::spawn(async move { client.infer(Payload::Image(photo), &options()).await }));
    }
    tokio::time::sleep(Duration::from_millis(30)).await;
    let hurried = InferOptions { deadline: Duration::from_millis(40), ..options() };
    let start = Instant::now();
    let refused = client.infer(Payload::Bitstream(good.clone()), &hurried).await;
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    if let Err(error) = refused {
        let timed_out = match &error {
            ClientError::Deadline(_) => true,
            ClientError::Server(s) => matches!(s.code(), Code::DeadlineExceeded | Code::ResourceExhausted),
            _ => false,
        };
        assert!(timed_out, "{error:?}");
    }
    for task in slow {
        task.await.unwrap().unwrap();
    }
    assert_healthy(&mut client, &good).await;
}

/// Images that find no decode worker in time can be seen: autoscalers go by that.
#[tokio::test(flavor = "multi_thread")]
async fn waits_in_vain_for_a_decode_worker_are_counted() {
    let server = configured("decode_workers = 1\nmax_batch = 1\n");
    let mut large = std::io::Cursor::new(Vec::new());
    ::image::RgbImage::new(4000, 4000).write_to(&mut large, ::image::ImageFormat::Png).unwrap();
    let large = bytes::Bytes::from(large.into_inner());
    let asking = client(&server).await;
    let hurried = InferOptions { deadline: Duration::from_millis(600), ..options() };
    let asked = (0..14).map(|_| {
        let (mut asking, large, hurried) = (asking.clone(), large.clone(), hurried.clone());
        tokio::spawn(async move { asking.infer(Payload::Image(large), &hurried).await })
    });
    for answer in asked.collect::<Vec<_>>() {
        let _ = answer.await.unwrap();
    }
    // the server is told of the deadline with its last moments still to come
    tokio::time::sleep(Duration::from_millis(300)).await;
    let page = server.metrics();
    let counted = |name: &str| page.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<f64>().ok()).unwrap_or(0.0);
    let dropped = counted("isthmus_dropped_total{reason=\"decode\"}");
    assert!(dropped >= 1.0, "fourteen decodings take longer: {page}");
    assert!(counted("isthmus_queue_seconds_count{model=\"efficientnet-lite0\"}") >= dropped, "{page}");
}

/// The answers that fit are delivered, then a status says that the others are not.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_too_late_learns_that_answers_are_missing() {
    let server = configured("stream_idle = \"1s\"\nstream_window = 2\n");
    // small windows of the transport: they are full soon on a busy machine too
    let channel = tonic::transport::Channel::from_shared(server.url()).unwrap();
    let channel = channel.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    let mut late = OffloadServiceClient::new(channel.connect().await.unwrap());
    let (good, _) = sample();
    let (send, requests) = tokio::sync::mpsc::channel(1);
    let mut answers = late.infer_stream(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let flood = async {
        let mut sent = 0;
        loop {
            let payload = Some(infer_request::Payload::Bitstream(good.clone()));
            if send.send(InferRequest { id: sent, payload, logits: true, ..InferRequest::default() }).await.is_err() {
                return;
            }
            sent += 1;
        }
    };
    // ends by itself once windows and buffers are full and the limit has passed, which takes a busy machine a while
    let _ = tokio::time::timeout(Duration::from_secs(60), flood).await;
    let status = loop {
        match tokio::time::timeout(Duration::from_secs(10), answers.message()).await.unwrap() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended as if nothing was missing"),
            Err(status) => break status,
        }
    };
    assert!(status.code() == Code::DeadlineExceeded && status.message().contains("read by the client"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn threat_slow_loris_connections_that_say_nothing_are_closed() {
    use tokio::io::AsyncReadExt;
    let server = Server::start(&[]);
    let mut silent = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let mut greeting = Vec::new();
    // the server may greet, and then closes
    let closed = tokio::time::timeout(Duration::from_secs(30), silent.read_to_end(&mut greeting)).await;
    assert!(closed.is_ok(), "the connection is still open");
}
