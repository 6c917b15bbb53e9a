//! `inference.GRPCInferenceService`: the Open Inference Protocol, version 2, as its public clients speak it.
//!
//! A model takes one of three inputs: `bitstream` (BYTES, containers of an edge encoder), `image` (BYTES, image files) or `pixels`
//! (UINT8 `[n, height, width, 3]`, or floats `[n, 3, side, side]` as the network wants them), and gives `logits` (FP32) and `labels`
//! (BYTES, `probability:index:name`). The classification extension works on `logits`.

mod describe;
mod logs;
mod request;
mod tensors;

use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use isthmus_proto::inference::infer_parameter::ParameterChoice;
use isthmus_proto::inference::repository_index_response::ModelIndex;
use isthmus_proto::inference::{
    InferParameter, LogSettingsRequest, LogSettingsResponse, ModelConfigRequest, ModelConfigResponse, ModelInferRequest,
    ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ModelStatisticsRequest,
    ModelStatisticsResponse, ModelStreamInferResponse, RepositoryIndexRequest, RepositoryIndexResponse, RepositoryModelLoadRequest,
    RepositoryModelLoadResponse, RepositoryModelUnloadRequest, RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse,
    ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

use super::stream::{self, Answers};
use crate::answering::Kept;
use crate::pipeline::{Pipeline, grpc_timeout};
use crate::receiving;
use crate::tenants::{self, Tenant};
use crate::{Config, ServerError, telemetry};

/// Changes of the repository that run or wait.
const MOST_CHANGES: usize = 8;
/// A load takes about so long.
const CHANGE_RETRY: Duration = Duration::from_secs(1);
/// Parameter of a stream's answers to which no other answer to the same request follows.
const FINAL: &str = "triton_final_response";
const EXTENSIONS: [&str; 5] = ["classification", "model_configuration", "model_repository", "statistics", "logging"];

/// The service; clones share everything.
#[derive(Clone)]
pub struct Inference {
    pipeline: Arc<Pipeline>,
    config: Arc<Config>,
    changes: Changes,
}

/// Changes of the repository: one at a time, and few that wait.
#[derive(Clone)]
struct Changes {
    running: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Inference {
    /// Refuses everybody (`off` says why) unless `model_control` is on, and then all but operators.
    fn operators_only(&self, tenant: &Tenant, off: &'static str) -> Result<(), ServerError> {
        let why = match () {
            () if !self.config.model_control => off,
            () if !tenant.operator => "only tenants with operator = true may do this",
            () => return Ok(()),
        };
        let error = ServerError::Forbidden(why);
        telemetry::refused(&error, Some(tenant));
        Err(error)
    }

    /// Over `pipeline`, which was made with `config`.
    pub fn new(pipeline: Arc<Pipeline>, config: &Config) -> Self {
        let changes = Changes { running: Arc::new(Semaphore::new(1)), waiting: Arc::new(Semaphore::new(MOST_CHANGES)) };
        Self { pipeline, config: Arc::new(config.clone()), changes }
    }

    /// Runs a change of the repository on a thread that ends afterwards: a living one's OpenMP team would count against the network's. One that waits for
    /// another ends with its call; one that runs cannot be stopped.
    async fn change(
        &self,
        tenant: &Tenant,
        change: impl FnOnce(&Pipeline) -> Result<(), ServerError> + Send + 'static,
    ) -> Result<(), ServerError> {
        let why = "loading and unloading is off; set model_control = true where only operators reach the server";
        self.operators_only(tenant, why)?;
        let busy = || ServerError::Busy { why: "as many changes of models wait as may", retry: CHANGE_RETRY };
        let _waits = self.changes.waiting.try_acquire().map_err(|_| busy()).inspect_err(|error| telemetry::refused(error, Some(tenant)))?;
        let turn = tokio::select! {
            turn = self.changes.running.clone().acquire_owned() => turn.map_err(|_| ServerError::Draining)?,
            () = self.pipeline.draining.cancelled() => return Err(ServerError::Draining),
        };
        let pipeline = self.pipeline.clone();
        let (done, changed) = tokio::sync::oneshot::channel();
        let change = move || {
            let _turn = turn;
            done.send(change(&pipeline))
        };
        let thread = std::thread::Builder::new().name("load".into()).spawn(change);
        thread.map_err(|e| ServerError::Transport(e.to_string()))?;
        changed.await.map_err(|_| ServerError::Network("loading ended early".into()))?
    }
}

/// Refuses another repository than the one there is.
fn the_repository(name: &str) -> Result<(), ServerError> {
    if name.is_empty() {
        return Ok(());
    }
    Err(ServerError::Invalid("repository_name: there is one repository, which has no name".into()))
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        let ready = !self.pipeline.leaving.is_cancelled() && self.pipeline.repository.is_ready();
        Ok(Response::new(ServerReadyResponse { ready }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let request = request.into_inner();
        let loaded = self.pipeline.repository.current().model(&request.name, &request.version).is_ok();
        Ok(Response::new(ModelReadyResponse { ready: loaded && !self.pipeline.leaving.is_cancelled() }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: "isthmus".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: EXTENSIONS.map(String::from).into(),
        }))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Result<Response<ModelMetadataResponse>, Status> {
        let request = request.into_inner();
        let registry = self.pipeline.repository.current();
        let entry = registry.model(&request.name, &request.version)?;
        Ok(Response::new(describe::metadata(&registry, entry)))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let (arrived, limit, tenant) = (Instant::now(), grpc_timeout(request.metadata()), tenants::of(&request)?);
        let _held = receiving::of(&request);
        let (response, places) = request::infer(&self.pipeline, request.into_inner(), arrived, limit, &tenant).await?;
        Ok(Kept::beside(response, Some(places)))
    }

    type ModelStreamInferStream = Answers<ModelStreamInferResponse>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let tenant = tenants::of(&request)?;
        let asking = (self.pipeline.clone(), tenant.clone());
        let answer = move |request: ModelInferRequest| {
            let (pipeline, tenant) = asking.clone();
            let arrived = Instant::now();
            async move {
                let id = request.id.clone();
                let (error, mut response, places) = match request::infer(&pipeline, request, arrived, None, &tenant).await {
                    Ok((response, places)) => (String::new(), response, Some(places)),
                    Err(error) => (error.to_string(), ModelInferResponse { id, ..ModelInferResponse::default() }, None),
                };
                // one answer for each request
                response.parameters.insert(FINAL.into(), InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) });
                (ModelStreamInferResponse { error_message: error, infer_response: Some(response) }, places)
            }
        };
        Ok(Response::new(stream::serve((&self.pipeline, &tenant), request.into_inner(), answer)?))
    }

    async fn model_config(&self, request: Request<ModelConfigRequest>) -> Result<Response<ModelConfigResponse>, Status> {
        let request = request.into_inner();
        let registry = self.pipeline.repository.current();
        let entry = registry.model(&request.name, &request.version)?;
        Ok(Response::new(ModelConfigResponse { config: Some(describe::config(&registry, entry, &self.config)) }))
    }

    async fn model_statistics(&self, request: Request<ModelStatisticsRequest>) -> Result<Response<ModelStatisticsResponse>, Status> {
        let request = request.into_inner();
        let registry = self.pipeline.repository.current();
        let model_stats = if request.version.is_empty() {
            let of = |name: &str| request.name.is_empty() || name == request.name;
            registry.models.iter().filter(|m| of(m.name)).map(|m| describe::statistics(m)).collect::<Vec<_>>()
        } else {
            vec![describe::statistics(registry.model(&request.name, &request.version)?)]
        };
        if model_stats.is_empty() && !request.name.is_empty() {
            registry.model(&request.name, "")?;
        }
        Ok(Response::new(ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(&self, request: Request<RepositoryIndexRequest>) -> Result<Response<RepositoryIndexResponse>, Status> {
        let request = request.into_inner();
        let only_ready = request.ready;
        the_repository(&request.repository_name)?;
        let repository = self.pipeline.clone();
        let listed = tokio::task::spawn_blocking(move || repository.repository.index()).await;
        let listed = listed.map_err(|e| ServerError::Network(e.to_string()))?;
        let models = listed.into_iter().filter(|m| m.ready || !only_ready).map(|m| ModelIndex {
            name: m.name,
            version: m.version.to_string(),
            state: if m.ready { "READY" } else { "UNAVAILABLE" }.into(),
            reason: m.reason,
        });
        Ok(Response::new(RepositoryIndexResponse { models: models.collect() }))
    }

    async fn repository_model_load(
        &self,
        request: Request<RepositoryModelLoadRequest>,
    ) -> Result<Response<RepositoryModelLoadResponse>, Status> {
        let tenant = tenants::of(&request)?;
        let request = request.into_inner();
        the_repository(&request.repository_name)?;
        if let Some(parameter) = request.parameters.keys().next() {
            let shown: String = parameter.chars().take(64).collect();
            return Err(ServerError::Invalid(format!("parameter {shown:?}: models are loaded as they lie in the repository")).into());
        }
        self.change(&tenant, move |p| p.repository.load(&request.model_name)).await?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Result<Response<RepositoryModelUnloadResponse>, Status> {
        let tenant = tenants::of(&request)?;
        let request = request.into_inner();
        the_repository(&request.repository_name)?;
        self.change(&tenant, move |p| p.repository.unload(&request.model_name)).await?;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }

    async fn log_settings(&self, request: Request<LogSettingsRequest>) -> Result<Response<LogSettingsResponse>, Status> {
        let tenant = tenants::of(&request)?;
        let settings = request.into_inner().settings;
        if !settings.is_empty() {
            self.operators_only(&tenant, "log settings are read only unless model_control = true")?;
            telemetry::set_log_filter(&logs::filter(&settings, &telemetry::log_filter())?)?;
        }
        Ok(Response::new(LogSettingsResponse { settings: logs::settings(&telemetry::log_filter()) }))
    }
}
