//! Models and bundles come and go while requests are answered.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{assert_healthy, client, options, sample};
use edge_client::Payload;
use isthmus_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use isthmus_proto::inference::{
    ModelMetadataRequest, ModelStatisticsRequest, RepositoryIndexRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
    ServerReadyRequest,
};
use isthmus_testkit::{Server, backbones, bundle};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const LITE0: &str = "efficientnet-lite0";
const LITE2: &str = "efficientnet-lite2";
/// Of the key that signs the bundles here.
const SIGNER: &str = "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c";

struct Setup {
    folder: tempfile::TempDir,
    server: Server,
    inference: GrpcInferenceServiceClient<Channel>,
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

impl Setup {
    async fn new(extra: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bundles = folder.path().join("bundles/5");
        copy(&bundle(), &bundles);
        let signature = isthmus_codec::signature::sign(&std::fs::read(bundles.join("manifest.toml")).unwrap(), &[7; 32]);
        std::fs::write(bundles.join(isthmus_codec::signature::SIGNATURE), signature).unwrap();
        copy(&backbones(), &folder.path().join("backbones"));
        let config = folder.path().join("server.toml");
        std::fs::write(&config, format!("bundles = [{:?}]\n{extra}", folder.path().join("bundles"))).unwrap();
        let server = Server::configured(&config, &folder.path().join("backbones"));
        let inference = GrpcInferenceServiceClient::connect(server.url()).await.unwrap();
        Self { folder, server, inference }
    }

    async fn load(&mut self, name: &str) -> Result<(), tonic::Status> {
        let request = RepositoryModelLoadRequest { model_name: name.into(), ..RepositoryModelLoadRequest::default() };
        self.inference.repository_model_load(request).await.map(drop)
    }

    async fn unload(&mut self, name: &str) -> Result<(), tonic::Status> {
        let request = RepositoryModelUnloadRequest { model_name: name.into(), ..RepositoryModelUnloadRequest::default() };
        self.inference.repository_model_unload(request).await.map(drop)
    }

    /// Answers that a model has given.
    async fn statistics(&mut self, name: &str) -> u64 {
        let request = ModelStatisticsRequest { name: name.into(), ..ModelStatisticsRequest::default() };
        let found = self.inference.model_statistics(request).await.unwrap().into_inner().model_stats;
        found[0].inference_stats.unwrap().success.unwrap().count
    }

    /// State and reason of a model.
    async fn state(&mut self, name: &str) -> (String, String) {
        let models = self.inference.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner().models;
        let found = models.into_iter().find(|m| m.name == name).unwrap();
        (found.state, found.reason)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_of_the_bundle_is_taken_up_beside_the_old_one() {
    let mut setup = Setup::new("model_control = true\n").await;
    let (container, _) = sample();
    let mut old = client(&setup.server).await;
    let bundles =
        |d: isthmus_proto::offload_v1::DescribeResponse| d.models[0].bundles.iter().map(|b| b.version.clone()).collect::<Vec<_>>();
    let first = bundles(old.describe(None, Duration::from_secs(5)).await.unwrap());
    copy(&bundle(), &setup.folder.path().join("bundles/6"));
    let manifest = setup.folder.path().join("bundles/6/manifest.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let newer = (first[0].parse::<u32>().unwrap() + 1).to_string();
    std::fs::write(&manifest, text.replacen(&format!("version = {:?}", first[0]), &format!("version = {newer:?}"), 1)).unwrap();
    setup.load(LITE0).await.unwrap();
    assert_eq!(bundles(old.describe(None, Duration::from_secs(5)).await.unwrap()), [newer.as_str(), &first[0]]);
    assert_healthy(&mut old, &container).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_loaded_leaves_the_old_one_in_place() {
    let mut setup = Setup::new("model_control = true\n").await;
    let (container, photo) = sample();
    let mut asking = client(&setup.server).await;
    // a decoder that is not the manifest's
    copy(&bundle(), &setup.folder.path().join("bundles/6"));
    let files = std::fs::read_dir(setup.folder.path().join("bundles/6")).unwrap().map(|e| e.unwrap().path());
    let decoder = files.into_iter().find(|p| p.file_name().unwrap().to_str().unwrap().starts_with("decoder")).unwrap();
    std::fs::write(&decoder, b"nothing").unwrap();
    let refused = setup.load(LITE0).await.unwrap_err();
    assert!(refused.message().contains("bundles/6"), "{refused:?}");
    assert_eq!(setup.state(LITE0).await.0, "READY");
    assert_healthy(&mut asking, &container).await;
    std::fs::remove_dir_all(setup.folder.path().join("bundles/6")).unwrap();
    // a manifest whose golden answer is another
    let manifest = setup.folder.path().join("bundles/5/manifest.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let golden = text.find("[golden]").unwrap();
    let at = golden + text[golden..].find("logits = [").unwrap();
    let digit = at + text[at..].find(|c: char| c.is_ascii_digit()).unwrap();
    std::fs::write(&manifest, format!("{}9{}", &text[..digit], &text[digit..])).unwrap();
    let refused = setup.load(LITE0).await.unwrap_err();
    assert!(refused.message().contains("golden"), "{refused:?}");
    assert_healthy(&mut asking, &container).await;
    std::fs::write(&manifest, text).unwrap();
    setup.load(LITE0).await.unwrap();
    // a backbone that is damaged
    let file = setup.folder.path().join(format!("backbones/{LITE2}.safetensors"));
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    assert!(setup.load(LITE2).await.is_err());
    let (state, reason) = setup.state(LITE2).await;
    assert!(state == "UNAVAILABLE" && reason.contains(LITE2), "{state} {reason}");
    std::fs::write(&file, good).unwrap();
    setup.load(LITE2).await.unwrap();
    assert_eq!(setup.state(LITE2).await, ("READY".into(), String::new()));
    // what is loaded serves on without its file, and is listed
    std::fs::rename(&file, setup.folder.path().join("away")).unwrap();
    assert_eq!(setup.state(LITE2).await, ("READY".into(), String::new()));
    let nameless = setup.unload("").await.unwrap_err();
    assert_eq!(nameless.code(), tonic::Code::InvalidArgument);
    assert_eq!(setup.state(LITE0).await.0, "READY");
    let other = edge_client::InferOptions { model: LITE2.into(), ..options() };
    asking.infer(Payload::Image(photo), &other).await.unwrap();
    let page = setup.server.metrics();
    for (name, outcome, times) in [(LITE0, "failed", 2), (LITE0, "done", 2), (LITE2, "failed", 1), (LITE2, "done", 1)] {
        let line = format!("isthmus_model_loads_total{{model=\"{name}\",outcome=\"{outcome}\"}} {times}\n");
        assert!(page.contains(&line), "{line}{page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_version_of_a_backbone_answers_and_older_ones_as_configured() {
    let mut setup = Setup::new("model_control = true\nmodel_versions = 2\n").await;
    let (container, _) = sample();
    let mut asking = client(&setup.server).await;
    let folder = setup.folder.path().join("backbones");
    std::fs::create_dir(folder.join(LITE0)).unwrap();
    for version in [2, 10] {
        std::fs::copy(folder.join(format!("{LITE0}.safetensors")), folder.join(format!("{LITE0}/{version}.safetensors"))).unwrap();
    }
    std::fs::write(folder.join(format!("{LITE0}/../notes.txt")), "no model").unwrap();
    setup.load(LITE0).await.unwrap();
    let ask = ModelMetadataRequest { name: LITE0.into(), version: String::new() };
    assert_eq!(setup.inference.model_metadata(ask).await.unwrap().into_inner().versions, ["10", "2"]);
    let gone = ModelMetadataRequest { name: LITE0.into(), version: "1".into() };
    assert_eq!(setup.inference.model_metadata(gone).await.unwrap_err().code(), Code::NotFound);
    assert_healthy(&mut asking, &container).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_model_stays_the_configurations() {
    let mut setup = Setup::new("model_control = true\n").await;
    let (container, photo) = sample();
    let mut asking = client(&setup.server).await;
    setup.load(LITE2).await.unwrap();
    setup.unload(LITE0).await.unwrap();
    let away = asking.infer(Payload::Image(photo.clone()), &options()).await;
    assert!(
        matches!(&away, Err(edge_client::ClientError::Server(s)) if s.code() == Code::NotFound),
        "no other one answers in its place: {away:?}"
    );
    setup.load(LITE0).await.unwrap();
    assert_eq!(asking.infer(Payload::Image(photo), &options()).await.unwrap().model, LITE0);
    assert_eq!(asking.describe(None, Duration::from_secs(5)).await.unwrap().models[0].name, LITE0);
    assert_healthy(&mut asking, &container).await;
    let answered = setup.statistics(LITE0).await;
    // nothing is ready that can answer nothing, and balancers hear of it
    let channel = tonic::transport::Channel::from_shared(setup.server.url()).unwrap().connect().await.unwrap();
    let health = async |wanted: i32| {
        let mut health = HealthClient::new(channel.clone());
        for service in ["", "inference.GRPCInferenceService", "isthmus.offload.v1.OffloadService"] {
            let ask = || HealthCheckRequest { service: service.into() };
            for _ in 0..100 {
                if health.check(ask()).await.unwrap().into_inner().status == wanted {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(health.check(ask()).await.unwrap().into_inner().status, wanted, "{service:?}");
        }
    };
    health(1).await;
    setup.unload(LITE0).await.unwrap();
    setup.unload(LITE2).await.unwrap();
    assert!(!setup.inference.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    health(2).await;
    setup.load(LITE0).await.unwrap();
    health(1).await;
    assert_eq!(setup.statistics(LITE0).await, answered, "a version that comes back goes on counting");
}

/// A version of the weights that no bundle was made for does not take a good one's place.
#[tokio::test(flavor = "multi_thread")]
async fn weights_that_no_bundle_knows_are_refused() {
    let mut setup = Setup::new("model_control = true\n").await;
    let (container, _) = sample();
    let mut asking = client(&setup.server).await;
    let folder = setup.folder.path().join("backbones").join(LITE0);
    std::fs::create_dir(&folder).unwrap();
    let mut changed = std::fs::read(setup.folder.path().join(format!("backbones/{LITE0}.safetensors"))).unwrap();
    let end = changed.len();
    changed[end - 400..].fill(0);
    std::fs::write(folder.join("2.safetensors"), changed).unwrap();
    let refused = setup.load(LITE0).await.unwrap_err();
    assert!(refused.message().contains("no bundle was made for version 2"), "{refused:?}");
    assert_eq!(setup.state(LITE0).await.0, "UNAVAILABLE", "that of version 2, which is first in the index");
    assert_healthy(&mut asking, &container).await;
}

/// The time limit of requests is not that of a model's load, which takes longer.
/// A file system that hangs holds up the load that reads from it; others wait in a bounded queue while their callers do, photos are answered, and the server
/// ends when it is told to.
#[tokio::test(flavor = "multi_thread")]
async fn loads_that_hang_are_bounded_and_hold_up_nothing() {
    let mut setup = Setup::new("model_control = true").await;
    let hung = setup.folder.path().join("backbones").join(LITE0);
    std::fs::create_dir_all(&hung).unwrap();
    // nobody ever writes into it
    assert!(std::process::Command::new("mkfifo").arg(hung.join("2.safetensors")).status().unwrap().success());
    let threads = |setup: &Setup| std::fs::read_dir(format!("/proc/{}/task", setup.server.process.id())).unwrap().count();
    let before = threads(&setup);
    for _ in 0..3 {
        let calls = (0..20).map(|_| {
            let mut inference = setup.inference.clone();
            tokio::spawn(async move {
                let mut request = tonic::Request::new(RepositoryModelLoadRequest { model_name: LITE0.into(), ..Default::default() });
                request.set_timeout(Duration::from_secs(1));
                inference.repository_model_load(request).await.unwrap_err().code()
            })
        });
        let mut codes = Vec::new();
        for call in calls.collect::<Vec<_>>() {
            codes.push(call.await.unwrap());
        }
        // eight run or wait until their callers give up, of which the server hears a little later
        let refused = codes.iter().filter(|c| **c == Code::ResourceExhausted).count();
        assert!((12..20).contains(&refused), "{codes:?}");
    }
    assert!(threads(&setup) <= before + 1, "{} threads, {before} before", threads(&setup));
    let (container, _) = sample();
    assert_healthy(&mut client(&setup.server).await, &container).await;
    setup.server.process.signal("TERM");
    assert_eq!(setup.server.process.wait(Duration::from_secs(15)), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn loading_takes_its_time_whatever_requests_may_take() {
    let mut setup = Setup::new("model_control = true\nmax_deadline = \"150ms\"\n").await;
    setup.load(LITE2).await.unwrap();
    assert_eq!(setup.state(LITE2).await.0, "READY");
}

/// Where bundles have to be signed, weights have to be named by one, older versions too.
#[tokio::test(flavor = "multi_thread")]
async fn threat_unsigned_weights_are_refused_where_bundles_are_signed() {
    for (keys, passes) in [(String::new(), true), (format!("trusted_bundle_keys = [{SIGNER:?}]\n"), false)] {
        let mut setup = Setup::new(&format!("model_control = true\nmodel_versions = 2\n{keys}")).await;
        let (container, _) = sample();
        let mut asking = client(&setup.server).await;
        let folder = setup.folder.path().join("backbones");
        std::fs::create_dir(folder.join(LITE0)).unwrap();
        let good = std::fs::read(folder.join(format!("{LITE0}.safetensors"))).unwrap();
        let mut changed = good.clone();
        let end = changed.len();
        changed[end - 400..].fill(0);
        std::fs::write(folder.join(format!("{LITE0}/1.safetensors")), changed).unwrap();
        std::fs::write(folder.join(format!("{LITE0}/2.safetensors")), good).unwrap();
        let loaded = setup.load(LITE0).await;
        assert_eq!(loaded.is_ok(), passes, "{loaded:?}");
        if let Err(refused) = loaded {
            assert!(refused.message().contains("no signed bundle was made for version 1"), "{refused:?}");
        }
        assert_healthy(&mut asking, &container).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_given_back_after_unloading() {
    let mut setup = Setup::new("model_control = true\n").await;
    let (container, photo) = sample();
    let mut asking = client(&setup.server).await;
    let other = edge_client::InferOptions { model: LITE2.into(), ..options() };
    let allocated = |server: &Server| {
        let text = server.metrics();
        let line = text.lines().find_map(|l| l.strip_prefix("isthmus_memory_allocated_bytes "));
        line.unwrap().parse::<f64>().unwrap() / 1e6
    };
    let (mut loaded, mut after, mut resident) = (Vec::new(), Vec::new(), 0);
    for _ in 0..10 {
        setup.load(LITE2).await.unwrap();
        asking.infer(Payload::Image(photo.clone()), &other).await.unwrap();
        // the gauge is renewed every second
        tokio::time::sleep(Duration::from_millis(1200)).await;
        loaded.push(allocated(&setup.server));
        resident = setup.server.process.memory_kb("VmRSS");
        setup.unload(LITE2).await.unwrap();
        assert_healthy(&mut asking, &container).await;
        // the network's thread ends by itself
        tokio::time::sleep(Duration::from_millis(2200)).await;
        after.push(allocated(&setup.server));
    }
    println!("MB allocated while loaded {loaded:.1?}, after unloading {after:.1?}");
    let least = |part: &[f64]| part.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(least(&after) + 20.0 < least(&loaded), "24 MB of weights go");
    assert!(least(&after[5..]) < least(&after[..5]) + 5.0, "nothing piles up");
    // the allocator gives it back to the system by and by
    let gone = Duration::from_secs(40);
    let began = std::time::Instant::now();
    while setup.server.process.memory_kb("VmRSS") + 20_000 > resident {
        assert!(began.elapsed() < gone, "still {} kB of {resident} after {gone:?}", setup.server.process.memory_kb("VmRSS"));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn threat_authorisation_without_permission_nothing_changes() {
    let mut setup = Setup::new("").await;
    assert_eq!(setup.unload(LITE0).await.unwrap_err().code(), Code::PermissionDenied);
    let refused = setup.load(LITE2).await.unwrap_err();
    assert!(refused.code() == Code::PermissionDenied && refused.message().contains("model_control"), "{refused:?}");
    assert_eq!(setup.state(LITE0).await.0, "READY");
    assert_eq!(setup.state(LITE2).await, ("UNAVAILABLE".into(), "not loaded".into()));
    assert!(setup.inference.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
}
