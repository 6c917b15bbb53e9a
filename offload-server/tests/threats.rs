//! Threats of docs/threat-model.md that no other file's tests are about; and that document against the code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{assert_healthy, client, options, sample};
use edge_client::{Client, ClientError, Endpoint, InferOptions, Payload};
use isthmus_codec::bundle::sha256;
use isthmus_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use isthmus_proto::inference::model_infer_request::InferInputTensor;
use isthmus_proto::inference::{ModelInferRequest, ModelMetadataRequest, RepositoryModelLoadRequest};
use isthmus_testkit::{Authority, Process, Server, Signed, backbones, binary, bundle, free_port};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use tonic::Code;

/// Every row of docs/threat-model.md names tests that exist.
#[test]
fn every_threat_of_the_document_has_its_tests() {
    let root = isthmus_testkit::root();
    let text = std::fs::read_to_string(root.join("docs/threat-model.md")).unwrap();
    let mut tests = 0;
    for row in text.lines().filter(|l| l.starts_with("| ") && l.contains("CWE-")) {
        let named: Vec<&str> = row.split('`').filter(|t| t.contains("::")).collect();
        assert!(!named.is_empty(), "no test is named: {row}");
        for test in named {
            let (file, function) = test.split_once("::").unwrap();
            let code = std::fs::read_to_string(root.join(file)).unwrap_or_else(|_| panic!("{file} does not exist: {row}"));
            assert!(function.starts_with("threat_"), "{test}");
            assert!(code.contains(&format!("fn {function}(")), "{test} does not exist");
            tests += 1;
        }
    }
    assert!(tests >= 20, "{tests} tests");
}

fn configured(text: &str, folder: &std::path::Path) -> Server {
    let config = folder.join("server.toml");
    std::fs::write(&config, format!("bundles = [{:?}]\n{text}", bundle())).unwrap();
    Server::configured(&config, &backbones())
}

/// Names of models and versions never become paths that leave the repository, whatever they hold.
#[tokio::test(flavor = "multi_thread")]
async fn threat_path_traversal_in_model_names_and_versions() {
    let folder = tempfile::tempdir().unwrap();
    let server = configured("model_control = true\n", folder.path());
    let mut inference = GrpcInferenceServiceClient::connect(server.url()).await.unwrap();
    let (container, _) = sample();
    let names = [
        "../backbones/efficientnet-lite0",
        "..",
        "/etc/passwd",
        "efficientnet-lite0/../efficientnet-lite2",
        "efficientnet-lite0\0",
        "%2e%2e",
        "",
    ];
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let drawn = (0..50).map(|_| "[./%\\\\a-z0-9\\x00-\\x1f-]{1,80}".new_tree(&mut runner).unwrap().current());
    for name in names.iter().map(ToString::to_string).chain(drawn) {
        let load = RepositoryModelLoadRequest { model_name: name.clone(), ..RepositoryModelLoadRequest::default() };
        let refused = inference.repository_model_load(load).await.unwrap_err();
        assert!(matches!(refused.code(), Code::InvalidArgument | Code::NotFound), "{name:?}: {refused:?}");
        assert!(!refused.message().contains(backbones().to_str().unwrap()), "no path is told: {refused:?}");
        let ask = ModelMetadataRequest { name: "efficientnet-lite0".into(), version: name.clone() };
        if !name.is_empty() {
            assert!(inference.model_metadata(ask).await.is_err(), "version {name:?}");
        }
    }
    assert_healthy(&mut client(&server).await, &container).await;
}

/// Shapes whose products overflow, at every datatype, with whatever contents.
#[tokio::test(flavor = "multi_thread")]
async fn threat_integer_overflow_in_tensor_shapes() {
    let server = Server::start(&[]);
    let mut inference = GrpcInferenceServiceClient::connect(server.url()).await.unwrap();
    let (container, _) = sample();
    let before = server.process.memory_kb("VmHWM");
    let side = prop_oneof![
        Just(0i64),
        Just(1),
        Just(-1),
        Just(i64::MAX),
        Just(i64::MIN),
        Just(1 << 31),
        Just(1 << 32),
        Just((1 << 62) + 1),
        any::<i64>()
    ];
    let shape = prop::collection::vec(side, 0..10);
    let datatype = prop::sample::select(vec!["UINT8", "FP32", "FP64", "FP16", "BYTES", "INT64", "NONE"]);
    let name = prop::sample::select(vec!["bitstream", "image", "pixels", "nothing"]);
    let case = (shape, datatype, name, prop::collection::vec(any::<u8>(), 0..64));
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..400 {
        let (shape, datatype, name, raw) = case.new_tree(&mut runner).unwrap().current();
        let input = InferInputTensor { name: name.into(), datatype: datatype.into(), shape: shape.clone(), ..InferInputTensor::default() };
        let request = ModelInferRequest {
            model_name: "efficientnet-lite0".into(),
            inputs: vec![input],
            raw_input_contents: vec![raw.into()],
            ..ModelInferRequest::default()
        };
        let refused = inference.model_infer(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{datatype} {shape:?}: {refused:?}");
    }
    let grown = server.process.memory_kb("VmHWM").saturating_sub(before);
    assert!(grown < 100_000, "memory grew by {grown} kB");
    assert_healthy(&mut client(&server).await, &container).await;
}

/// As many inputs as fit into a message, two bytes each.
#[derive(Clone, PartialEq, prost::Message)]
struct Empties {
    #[prost(message, repeated, tag = "5")]
    inputs: Vec<()>,
}

/// A field may take two bytes on the wire and hundreds in memory.
#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_by_fields_that_grow_when_decoded() {
    let server = Server::start(&[]);
    let (container, _) = sample();
    let mut asking = client(&server).await;
    assert_healthy(&mut asking, &container).await;
    let before = server.process.memory_kb("VmHWM");
    let channel = tonic::transport::Endpoint::new(server.url()).unwrap().connect().await.unwrap();
    let mut raw = tonic::client::Grpc::new(channel);
    raw.ready().await.unwrap();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/inference.GRPCInferenceService/ModelInfer");
    let codec = tonic_prost::ProstCodec::<Empties, isthmus_proto::inference::ModelInferResponse>::default();
    let refused = raw.unary(tonic::Request::new(Empties { inputs: vec![(); 4_000_000] }), path, codec).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("fields"), "{refused:?}");
    let grown = server.process.memory_kb("VmHWM").saturating_sub(before);
    assert!(grown < 60_000, "memory grew by {grown} kB");
    assert_healthy(&mut asking, &container).await;
}

/// Certificates that have expired, are not valid yet, are for another name or of another authority, on either side.
#[tokio::test(flavor = "multi_thread")]
async fn threat_wrong_tls_identity() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (servers, clients) = (Authority::new(), Authority::new());
    let (container, _) = sample();
    std::fs::write(at("clients.pem"), &clients.pem).unwrap();
    let start = |own: &Signed| {
        std::fs::write(at("server.pem"), &own.pem).unwrap();
        std::fs::write(at("server.key"), &own.key).unwrap();
        let text =
            format!("tls_cert = {:?}\ntls_key = {:?}\ntls_client_ca = {:?}\n", at("server.pem"), at("server.key"), at("clients.pem"));
        configured(&text, folder.path())
    };
    let ask = async |server: &Server, ca: &Authority, own: Option<&Signed>| {
        let url = format!("https://localhost:{}", server.address.port());
        let mut endpoint = Endpoint::new(&url).unwrap().with_ca(ca.pem.clone().into_bytes());
        if let Some(own) = own {
            endpoint = endpoint.with_identity(own.pem.as_bytes(), own.key.as_bytes());
        }
        Client::connect(&endpoint).await?.infer(Payload::Bitstream(container.clone()), &options()).await
    };
    let good = clients.sign(&["camera"]);
    for (what, own) in [
        ("expired", servers.sign_between(&["localhost"], [2001, 2002])),
        ("not valid yet", servers.sign_between(&["localhost"], [2090, 2091])),
        ("another name", servers.sign(&["elsewhere.example"])),
    ] {
        let server = start(&own);
        assert!(ask(&server, &servers, Some(&good)).await.is_err(), "a server whose certificate is {what}");
    }
    let server = start(&servers.sign(&["localhost"]));
    ask(&server, &servers, Some(&good)).await.unwrap();
    assert!(ask(&server, &Authority::new(), Some(&good)).await.is_err(), "a server of an authority that is not trusted");
    assert!(ask(&server, &servers, None).await.is_err(), "a client without certificate");
    for (what, own) in [
        ("expired", clients.sign_between(&["camera"], [2001, 2002])),
        ("of another authority", Authority::new().sign(&["camera"])),
        ("of the servers' authority", servers.sign(&["camera"])),
    ] {
        assert!(ask(&server, &servers, Some(&own)).await.is_err(), "a client whose certificate is {what}");
    }
    ask(&server, &servers, Some(&good)).await.unwrap();
}

/// Tokens, contents and whatever clients send to break lines are not in the logs, at the most talkative level.
#[tokio::test(flavor = "multi_thread")]
async fn threat_secrets_and_line_breaks_in_logs() {
    const TOKEN: &str = "a-very-secret-token-0123456789";
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = (folder.path().join("server.toml"), folder.path().join("log"));
    let text = format!(
        "log_format = \"json\"\nbundles = [{:?}]\n[[tenants]]\nname = \"cameras\"\ntoken_sha256 = {:?}\n",
        bundle(),
        sha256(TOKEN.as_bytes())
    );
    std::fs::write(&config, text).unwrap();
    let admin = free_port();
    let mut command = Command::new(binary("offload-server"));
    command.arg("--config").arg(&config).args(["--listen", "127.0.0.1:0", "--admin-listen", &admin.to_string()]);
    command.arg("--backbones").arg(backbones()).env("RUST_LOG", "trace").stderr(Stdio::from(std::fs::File::create(&log).unwrap()));
    let (process, line) = Process::spawn(&mut command);
    let server = Server { process, address: line.strip_prefix("listening on ").unwrap().parse().unwrap(), admin };
    let mut asking = Client::connect(&Endpoint::new(&server.url()).unwrap().with_token(TOKEN).unwrap()).await.unwrap();
    let (container, _) = sample();
    assert_healthy(&mut asking, &container).await;
    let forged = "x\n{\"level\":\"ERROR\",\"fields\":{\"message\":\"forged\"}}\r\n\x1b[31mred";
    let refused = asking.infer(Payload::Bitstream(container), &InferOptions { model: forged.into(), ..options() }).await;
    assert!(matches!(refused, Err(ClientError::Server(s)) if s.code() == Code::NotFound));
    let mut wrong = Client::connect(&Endpoint::new(&server.url()).unwrap().with_token("guessed-0123456789").unwrap()).await.unwrap();
    assert!(wrong.describe(None, Duration::from_secs(5)).await.is_err());
    drop(server);
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("cameras") || text.contains("call"), "the log is talkative: {} bytes", text.len());
    for secret in [TOKEN, "guessed-0123456789"] {
        assert!(!text.contains(secret), "a token is in the log");
    }
    for line in text.lines() {
        let parsed: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(parsed["fields"]["message"] != "forged", "{line}");
    }
}

/// Whatever clients call themselves, models or versions, the number of series stays.
#[tokio::test(flavor = "multi_thread")]
async fn threat_metric_label_explosion() {
    let server = Server::start(&[]);
    let mut asking = client(&server).await;
    let (container, _) = sample();
    let ask = async |asking: &mut Client, n: u32| {
        let strange = InferOptions { model: format!("model-{n}"), ..options() };
        let _ = asking.infer(Payload::Bitstream(container.clone()), &strange).await;
        let _ = asking.infer(Payload::Bitstream(format!("garbage {n}").into_bytes().into()), &options()).await;
        let _ = asking.describe(Some(&isthmus_codec::BundleHash([n as u8; 32])), Duration::from_secs(5)).await;
    };
    ask(&mut asking, 0).await;
    let series = |page: &str| page.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).count();
    let before = series(&server.metrics());
    for n in 1..200 {
        ask(&mut asking, n).await;
    }
    let page = server.metrics();
    assert_eq!(series(&page), before, "{page}");
    assert!(!page.contains("model-1"), "{page}");
}

/// Triton's shared memory is not offered: no client reaches into this machine's memory.
#[tokio::test(flavor = "multi_thread")]
async fn threat_shared_memory_is_not_offered() {
    let server = Server::start(&[]);
    let channel = tonic::transport::Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
    for method in ["SystemSharedMemoryRegister", "CudaSharedMemoryRegister", "SystemSharedMemoryStatus"] {
        let mut raw = tonic::client::Grpc::new(channel.clone());
        raw.ready().await.unwrap();
        let path = format!("/inference.GRPCInferenceService/{method}").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<ModelInferRequest, ModelInferRequest>::default();
        let refused = raw.unary(tonic::Request::new(ModelInferRequest::default()), path, codec).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unimplemented, "{method}");
    }
    let mut inference = GrpcInferenceServiceClient::new(channel);
    let region = isthmus_proto::inference::InferParameter {
        parameter_choice: Some(isthmus_proto::inference::infer_parameter::ParameterChoice::StringParam("region".into())),
    };
    let input = InferInputTensor {
        name: "image".into(),
        datatype: "BYTES".into(),
        shape: vec![1],
        parameters: [("shared_memory_region".to_owned(), region)].into(),
        ..InferInputTensor::default()
    };
    let request = ModelInferRequest { model_name: "efficientnet-lite0".into(), inputs: vec![input], ..ModelInferRequest::default() };
    let refused = inference.model_infer(request).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("shared memory"), "{refused:?}");
}

/// Files of models hold numbers: what is no safetensors file is refused, a pickle too, and nothing in it is run.
#[test]
fn threat_model_files_that_execute_code() {
    let folder = tempfile::tempdir().unwrap();
    let marker = folder.path().join("executed");
    // a pickle whose loading would call os.system("touch executed")
    let pickle = format!("cos\nsystem\n(S'touch {}'\ntR.", marker.display());
    for (name, content) in
        [("pickle", pickle.into_bytes()), ("a TorchScript archive", b"PK\x03\x04constants.pkl".to_vec()), ("nothing", vec![])]
    {
        let backbones_here = folder.path().join(name.replace(' ', "-"));
        std::fs::create_dir(&backbones_here).unwrap();
        std::fs::copy(backbones().join("labels.json"), backbones_here.join("labels.json")).unwrap();
        std::fs::write(backbones_here.join("efficientnet-lite0.safetensors"), content).unwrap();
        let mut command = Command::new(binary("offload-server"));
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]).arg("--bundle").arg(bundle());
        let refused = command.arg("--backbones").arg(&backbones_here).output().unwrap();
        assert!(!refused.status.success(), "{name}");
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(error.contains("efficientnet-lite0.safetensors"), "{name}: {error}");
    }
    assert!(!marker.exists());
}
