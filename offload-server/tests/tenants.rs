//! Tenants by token and by certificate, their quotas, and what others see of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{code_of, options, sample};
use edge_client::{Client, ClientError, Endpoint, Payload};
use isthmus_codec::bundle::sha256;
use isthmus_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use isthmus_proto::inference::{ModelInferRequest, RepositoryModelUnloadRequest, ServerLiveRequest};
use isthmus_testkit::{Authority, Server, Signed, backbones, bundle};
use tonic::Code;

fn start(folder: &Path, more: &str) -> Server {
    let config = folder.join("server.toml");
    std::fs::write(&config, format!("bundles = [{:?}]\n{more}", bundle())).unwrap();
    Server::configured(&config, &backbones())
}

async fn with_token(server: &Server, token: &str) -> Client {
    Client::connect(&Endpoint::new(&server.url()).unwrap().with_token(token).unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn threat_authorisation_only_tenants_are_answered_and_within_their_quotas() {
    let folder = tempfile::tempdir().unwrap();
    let tenant = |name: &str, more: &str| format!("[[tenants]]\nname = {name:?}\ntoken_sha256 = {:?}\n{more}", sha256(name.as_bytes()));
    let tenants = [tenant("cameras", ""), tenant("slow", "max_in_flight = 1\n"), tenant("boss", "operator = true\n")].concat();
    let server = start(folder.path(), &format!("model_control = true\n{tenants}"));
    let (container, photo) = sample();
    let mut stranger = Client::connect(&Endpoint::new(&server.url()).unwrap()).await.unwrap();
    assert_eq!(code_of(&mut stranger, Payload::Bitstream(container.clone())).await.0, Code::Unauthenticated);
    assert!(stranger.describe(None, Duration::from_secs(5)).await.is_err());
    let mut wrong = with_token(&server, "guess").await;
    assert_eq!(code_of(&mut wrong, Payload::Bitstream(container.clone())).await.0, Code::Unauthenticated);
    let mut cameras = with_token(&server, "cameras").await;
    cameras.infer(Payload::Bitstream(container), &options()).await.unwrap();
    // one at a time
    let slow = with_token(&server, "slow").await;
    let asks = (0..6).map(|_| {
        let (mut slow, photo) = (slow.clone(), photo.clone());
        tokio::spawn(async move { slow.infer(Payload::Image(photo), &options()).await })
    });
    let (mut answered, mut refused) = (0, 0);
    for ask in asks.collect::<Vec<_>>() {
        match ask.await.unwrap() {
            Ok(_) => answered += 1,
            Err(ClientError::Server(s)) => {
                assert_eq!(s.code(), Code::ResourceExhausted);
                assert!(s.message().contains("tenant") && s.metadata().get("grpc-retry-pushback-ms").is_some(), "{s:?}");
                refused += 1;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(answered >= 1 && refused >= 1, "{answered} {refused}");
    // the other protocol knows the same tenants
    let mut inference = GrpcInferenceServiceClient::connect(server.url()).await.unwrap();
    assert_eq!(inference.server_live(ServerLiveRequest {}).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(inference.model_infer(ModelInferRequest::default()).await.unwrap_err().code(), Code::Unauthenticated);
    let unload = |token: &str| {
        let mut request = tonic::Request::new(RepositoryModelUnloadRequest { model_name: "vgg".into(), ..Default::default() });
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        request
    };
    assert_eq!(inference.repository_model_unload(unload("cameras")).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(inference.repository_model_unload(unload("boss")).await.unwrap_err().code(), Code::NotFound);
    let page = server.metrics();
    assert!(page.contains("isthmus_tenant_requests_total{tenant=\"cameras\",code=\"Ok\"} 1"), "{page}");
    // health is for everybody: balancers have no token
    let channel = tonic::transport::Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
    let ask = tonic_health::pb::HealthCheckRequest { service: "inference.GRPCInferenceService".into() };
    assert_eq!(tonic_health::pb::health_client::HealthClient::new(channel).check(ask).await.unwrap().into_inner().status, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_name_tenants_and_strangers_do_not_get_in() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (servers, clients) = (Authority::new(), Authority::new());
    let own = servers.sign(&["localhost"]);
    for (name, text) in [("server.pem", &own.pem), ("server.key", &own.key), ("clients.pem", &clients.pem)] {
        std::fs::write(at(name), text).unwrap();
    }
    let (known, other, forged) = (clients.sign(&["camera"]), clients.sign(&["visitor"]), Authority::new().sign(&["camera"]));
    let config = format!(
        "tls_cert = {:?}\ntls_key = {:?}\ntls_client_ca = {:?}\n[[tenants]]\nname = \"camera\"\ncertificate_sha256 = {:?}\n",
        at("server.pem"),
        at("server.key"),
        at("clients.pem"),
        sha256(&known.der)
    );
    let server = start(folder.path(), &config);
    let url = format!("https://localhost:{}", server.address.port());
    let endpoint = || Endpoint::new(&url).unwrap().with_ca(servers.pem.clone().into_bytes());
    let with = |signed: &Signed| endpoint().with_identity(signed.pem.as_bytes(), signed.key.as_bytes());
    let (container, _) = sample();
    let mut camera = Client::connect(&with(&known)).await.unwrap();
    camera.infer(Payload::Bitstream(container.clone()), &options()).await.unwrap();
    // signed by the right authority, but nobody's
    let mut visitor = Client::connect(&with(&other)).await.unwrap();
    assert_eq!(code_of(&mut visitor, Payload::Bitstream(container.clone())).await.0, Code::Unauthenticated);
    // no certificate, or one of another authority: the handshake fails
    for endpoint in [endpoint(), with(&forged)] {
        let answer = match Client::connect(&endpoint).await {
            Ok(mut client) => client.infer(Payload::Bitstream(container.clone()), &options()).await.map(drop),
            Err(error) => Err(error),
        };
        assert!(answer.is_err(), "no stranger is answered");
    }
}

#[tokio::test]
async fn tokens_do_not_travel_in_the_clear() {
    let endpoint = Endpoint::new("http://192.0.2.1:50051").unwrap().allow_insecure(true).with_token("secret").unwrap();
    assert!(matches!(Client::connect(&endpoint).await, Err(ClientError::Usage(why)) if why.contains("TLS")));
    assert!(Endpoint::new("http://localhost:1").unwrap().with_token("line\nbreak").is_err());
}

/// More photos than a tenant can ever have in flight, of its own places and those it shares, are refused for good, not for now.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_can_never_have_their_places_are_invalid() {
    use isthmus_proto::inference::ModelInferRequest;
    use isthmus_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
    use isthmus_proto::inference::model_infer_request::InferInputTensor;
    let folder = tempfile::tempdir().unwrap();
    let tenant = |name: &str| format!("[[tenants]]\nname = {name:?}\ntoken_sha256 = {:?}\n", sha256(name.as_bytes()));
    let server = start(folder.path(), &["max_in_flight = 64\n".to_owned(), tenant("a"), tenant("b")].concat());
    let channel = tonic::transport::Endpoint::new(server.url()).unwrap().connect().await.unwrap();
    let mut inference = GrpcInferenceServiceClient::new(channel);
    let mut ask = async |n: usize| {
        let (name, datatype) = ("pixels".to_owned(), "UINT8".to_owned());
        let mut request = tonic::Request::new(ModelInferRequest {
            model_name: "efficientnet-lite0".into(),
            inputs: vec![InferInputTensor { name, datatype, shape: vec![n as i64, 8, 8, 3], ..InferInputTensor::default() }],
            raw_input_contents: vec![vec![0; n * 8 * 8 * 3].into()],
            ..ModelInferRequest::default()
        });
        request.metadata_mut().insert("authorization", "Bearer a".parse().unwrap());
        inference.model_infer(request).await
    };
    // a quarter is its own, a half is shared
    let refused = ask(49).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("48 at most"), "{refused:?}");
    assert_eq!(ask(8).await.unwrap().into_inner().outputs[0].shape, [8, 1000]);
}

/// Large images of one tenant do not keep another's bitstreams from being decoded.
#[tokio::test(flavor = "multi_thread")]
async fn threat_bombs_a_flood_of_images_leaves_others_their_share() {
    flood(&["flood", "quiet"]).await;
    flood(&["quiet", "flood"]).await;
}

async fn flood(tenants: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let tenant = |name: &str| format!("[[tenants]]\nname = {name:?}\ntoken_sha256 = {:?}\n", sha256(name.as_bytes()));
    let server = start(folder.path(), &tenants.iter().map(|name| tenant(name)).collect::<String>());
    let (container, _) = sample();
    let mut large = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(4000, 4000).write_to(&mut large, image::ImageFormat::Png).unwrap();
    let large = bytes::Bytes::from(large.into_inner());
    let mut quiet = with_token(&server, "quiet").await;
    quiet.infer(Payload::Bitstream(container.clone()), &options()).await.unwrap();
    let mut flood = with_token(&server, "flood").await;
    flood.infer(Payload::Image(large.clone()), &options()).await.expect("it is answered itself");
    let floods: Vec<_> = (0..6)
        .map(|_| {
            let (mut flood, large) = (flood.clone(), large.clone());
            tokio::spawn(async move {
                loop {
                    let _ = flood.infer(Payload::Image(large.clone()), &options()).await;
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let brief = edge_client::InferOptions { deadline: Duration::from_secs(2), ..options() };
    let mut late = Vec::new();
    for _ in 0..20 {
        late.extend(quiet.infer(Payload::Bitstream(container.clone()), &brief).await.err());
    }
    // a busy machine may be late once; behind the flood all of them would be
    assert!(late.len() <= 2, "{} of 20 unanswered: {late:?}", late.len());
    floods.iter().for_each(tokio::task::JoinHandle::abort);
}
