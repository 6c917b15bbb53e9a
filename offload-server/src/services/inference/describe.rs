//! What models are, and what they have done, in the protocol's words.

use std::collections::HashMap;
use std::time::Duration;

use isthmus_proto::inference::model_config::SchedulingChoice;
use isthmus_proto::inference::model_input::Format;
use isthmus_proto::inference::model_instance_group::Kind as InstanceKind;
use isthmus_proto::inference::model_metadata_response::TensorMetadata;
use isthmus_proto::inference::model_version_policy::{Latest, PolicyChoice};
use isthmus_proto::inference::{
    DataType, InferBatchStatistics, InferStatistics, ModelConfig, ModelDynamicBatching, ModelInput, ModelInstanceGroup,
    ModelMetadataResponse, ModelOutput, ModelParameter, ModelQueuePolicy, ModelStatistics, ModelVersionPolicy, StatisticDuration,
};
use tch::Device;

use crate::Config;
use crate::registry::{Entry, Registry};
use crate::statistics::Sum;

const PLATFORM: &str = "isthmus_libtorch";

fn tensor(name: &str, datatype: &str, shape: &[i64]) -> TensorMetadata {
    TensorMetadata { name: name.into(), datatype: datatype.into(), shape: shape.into() }
}

/// Inputs (one of them is to be sent), outputs, versions.
pub fn metadata(registry: &Registry, entry: &Entry) -> ModelMetadataResponse {
    let versions = registry.models.iter().filter(|m| m.name == entry.name).map(|m| m.version.to_string());
    let bundles = registry.bundles.iter().filter(|b| entry.stage(&b.hash).is_some());
    let bundles = bundles.map(|b| format!("{} {} {}", b.manifest.name, b.manifest.version, b.hash)).collect::<Vec<_>>().join(", ");
    ModelMetadataResponse {
        name: entry.name.into(),
        versions: versions.collect(),
        platform: PLATFORM.into(),
        inputs: vec![
            tensor("bitstream", "BYTES", &[-1, 1]),
            tensor("image", "BYTES", &[-1, 1]),
            tensor("pixels", "UINT8", &[-1, -1, -1, 3]),
        ],
        outputs: vec![tensor("logits", "FP32", &[-1, registry.labels.len() as i64]), tensor("labels", "BYTES", &[-1, -1])],
        properties: HashMap::from([
            ("bundles".into(), bundles),
            ("input".into(), "exactly one of the inputs; pixels also as FP32 [n, 3, side, side], normalised".into()),
            ("side".into(), entry.input_size.to_string()),
        ]),
    }
}

/// How the model is served.
pub fn config(registry: &Registry, entry: &Entry, config: &Config) -> ModelConfig {
    let input = |name: &str, data_type: DataType, format: Format, dims: &[i64]| ModelInput {
        name: name.into(),
        data_type: data_type.into(),
        format: format.into(),
        dims: dims.into(),
        optional: true,
    };
    let mut groups: Vec<ModelInstanceGroup> = Vec::new();
    for same in entry.instances.chunk_by(|a, b| a.device == b.device) {
        let cuda = same.first().and_then(|i| if let Device::Cuda(n) = i.device { i32::try_from(n).ok() } else { None });
        groups.push(ModelInstanceGroup {
            name: format!("{}_{}", entry.name, groups.len()),
            kind: if cuda.is_some() { InstanceKind::Gpu } else { InstanceKind::Cpu }.into(),
            count: same.len() as i32,
            gpus: cuda.into_iter().collect(),
        });
    }
    let queue = ModelQueuePolicy {
        default_timeout_microseconds: config.max_deadline.as_micros() as u64,
        allow_timeout_override: true,
        max_queue_size: config.max_queue as u32,
        ..ModelQueuePolicy::default()
    };
    let parameter = |value: String| ModelParameter { string_value: value };
    ModelConfig {
        name: entry.name.into(),
        platform: PLATFORM.into(),
        backend: "libtorch".into(),
        version_policy: Some(ModelVersionPolicy {
            policy_choice: Some(PolicyChoice::Latest(Latest { num_versions: config.model_versions as u32 })),
        }),
        max_batch_size: config.max_batch as i32,
        input: vec![
            input("bitstream", DataType::TypeString, Format::None, &[1]),
            input("image", DataType::TypeString, Format::None, &[1]),
            input("pixels", DataType::TypeUint8, Format::Nhwc, &[-1, -1, 3]),
        ],
        output: vec![
            ModelOutput {
                name: "logits".into(),
                data_type: DataType::TypeFp32.into(),
                dims: vec![registry.labels.len() as i64],
                ..ModelOutput::default()
            },
            ModelOutput { name: "labels".into(), data_type: DataType::TypeString.into(), dims: vec![-1], ..ModelOutput::default() },
        ],
        scheduling_choice: Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching {
            preferred_batch_size: config.preferred_batch_sizes.iter().map(|n| *n as i32).collect(),
            max_queue_delay_microseconds: config.queue_delay.as_micros() as u64,
            priority_levels: config.priority_levels.into(),
            default_priority_level: u64::from(config.priority_levels / 2) + 1,
            default_queue_policy: Some(queue),
            ..ModelDynamicBatching::default()
        })),
        instance_group: groups,
        parameters: HashMap::from([("device".into(), parameter(entry.device())), ("side".into(), parameter(entry.input_size.to_string()))]),
    }
}

fn duration(sum: Sum) -> Option<StatisticDuration> {
    Some(StatisticDuration { count: sum.count, ns: u64::try_from(sum.time.as_nanos()).unwrap_or(u64::MAX) })
}

/// Counts and times since the model was loaded.
pub fn statistics(entry: &Entry) -> ModelStatistics {
    let totals = entry.statistics.read();
    let none = || duration(Sum::default());
    let inside = [totals.queue.time, totals.input.time, totals.infer.time].iter().sum();
    let output = Sum { count: totals.success.count, time: totals.success.time.saturating_sub(inside) };
    ModelStatistics {
        name: entry.name.into(),
        version: entry.version.to_string(),
        last_inference: totals.last_ms,
        inference_count: totals.batches.iter().map(|(size, sum)| *size as u64 * sum.count).sum(),
        execution_count: totals.batches.values().map(|sum| sum.count).sum(),
        inference_stats: Some(InferStatistics {
            success: duration(totals.success),
            fail: duration(totals.fail),
            queue: duration(totals.queue),
            compute_input: duration(totals.input),
            compute_infer: duration(totals.infer),
            compute_output: duration(output),
            cache_hit: none(),
            cache_miss: none(),
        }),
        batch_stats: totals
            .batches
            .iter()
            .map(|(size, sum)| {
                let zero = duration(Sum { count: sum.count, time: Duration::ZERO });
                InferBatchStatistics { batch_size: *size as u64, compute_input: zero, compute_infer: duration(*sum), compute_output: zero }
            })
            .collect(),
        memory_usage: Vec::new(),
    }
}
