//! An Open Inference Protocol request as payloads of the pipeline, and their answers as tensors.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::stream::FuturesUnordered;
use isthmus_proto::inference::infer_parameter::ParameterChoice;
use isthmus_proto::inference::model_infer_request::InferRequestedOutputTensor;
use isthmus_proto::inference::model_infer_response::InferOutputTensor;
use isthmus_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse};

use super::tensors::{Datatype, Tensor, Values, packed};
use crate::ServerError;
use crate::pipeline::{Answer, Ask, Pipeline, Places};
use crate::telemetry::{self, Kind};
use crate::tenants::Tenant;

/// Photos in one request.
pub const MOST_PHOTOS: usize = 64;
const DEFAULT_TOP_K: u64 = 5;

type Parameters = HashMap<String, InferParameter>;

fn invalid(why: impl Into<String>) -> ServerError {
    ServerError::Invalid(why.into())
}

/// A parameter that is a count.
fn number(parameters: &Parameters, name: &str) -> Result<Option<u64>, ServerError> {
    let Some(found) = parameters.get(name) else { return Ok(None) };
    let value = match &found.parameter_choice {
        Some(ParameterChoice::Int64Param(v)) => u64::try_from(*v).ok(),
        Some(ParameterChoice::Uint64Param(v)) => Some(*v),
        Some(ParameterChoice::StringParam(v)) => v.parse().ok(),
        _ => None,
    };
    value.map(Some).ok_or_else(|| invalid(format!("parameter {name:?}: a whole number, 0 or more, is wanted")))
}

/// The photos of a request.
#[derive(Debug)]
pub struct Photos {
    kind: Kind,
    payloads: Vec<Bytes>,
}

impl Photos {
    /// From the one input that a request has.
    ///
    /// # Errors
    /// [`ServerError::Invalid`] for another input than metadata lists.
    pub fn read(request: &mut ModelInferRequest) -> Result<Self, ServerError> {
        let raw = std::mem::take(&mut request.raw_input_contents);
        let mut inputs = std::mem::take(&mut request.inputs);
        if !raw.is_empty() && raw.len() != inputs.len() {
            return Err(invalid(format!("{} raw_input_contents for {} inputs", raw.len(), inputs.len())));
        }
        let (Some(input), true) = (inputs.pop(), inputs.is_empty()) else {
            return Err(invalid("exactly one input is wanted: bitstream, image or pixels"));
        };
        let tensor = Tensor::read(input, raw.into_iter().next())?;
        let wrong = |wanted: &str| {
            let shape = &tensor.shape;
            Err(invalid(format!("input {:?}: {wanted} is wanted, not {} of shape {shape:?}", tensor.name, tensor.datatype.name())))
        };
        match (tensor.name.as_str(), &tensor.values) {
            ("bitstream" | "image", Values::Elements(elements)) => {
                let kind = if tensor.name == "image" { Kind::Image } else { Kind::Bitstream };
                // one a row, or a row of one
                if !matches!(tensor.shape[..], [_] | [_, 1]) {
                    return wrong("BYTES of shape [n] or [n, 1]");
                }
                Self { kind, payloads: elements.clone() }.bounded()
            }
            ("bitstream" | "image", _) => wrong("BYTES of shape [n] or [n, 1]"),
            ("pixels", Values::Raw(raw)) if tensor.datatype == Datatype::Uint8 => {
                let (n, height, width) = match tensor.shape[..] {
                    [h, w, 3] => (1, h, w),
                    [n, h, w, 3] => (n, h, w),
                    _ => return wrong("UINT8 of shape [n, height, width, 3]"),
                };
                let side = |d: usize| u32::try_from(d).ok().filter(|d| (1..=isthmus_pixels::MAX_SIDE).contains(d));
                let (Some(h), Some(w)) = (side(height), side(width)) else { return wrong("an image of sensible size") };
                Self { kind: Kind::Pixels { height: h, width: w }, payloads: rows(raw, n) }.bounded()
            }
            ("pixels", _) => {
                let n = match tensor.shape[..] {
                    [3, _, _] => 1,
                    [n, 3, _, _] => n,
                    _ => return wrong("UINT8 of shape [n, height, width, 3] or FP32 of shape [n, 3, side, side]"),
                };
                let Some(floats) = tensor.floats() else { return wrong("UINT8, FP32, FP64, FP16 or BF16") };
                Self { kind: Kind::Normalised, payloads: rows(&floats, n) }.bounded()
            }
            (other, _) => {
                let other: String = other.chars().take(64).collect();
                Err(invalid(format!("unexpected inference input {other:?}: bitstream, image or pixels is wanted")))
            }
        }
    }

    fn bounded(self) -> Result<Self, ServerError> {
        match self.payloads.len() {
            0 => Err(invalid("the input is empty")),
            n if n > MOST_PHOTOS => Err(invalid(format!("{n} photos in one request, at most {MOST_PHOTOS}"))),
            _ => Ok(self),
        }
    }
}

/// A tensor's `n` rows.
fn rows(raw: &Bytes, n: usize) -> Vec<Bytes> {
    let each = raw.len().checked_div(n).unwrap_or(0);
    // more rows than allowed are refused by their number
    (0..n.min(MOST_PHOTOS + 1)).map(|i| raw.slice(i * each..(i + 1) * each)).collect()
}

/// What a requested output shall hold.
enum Wanted {
    Logits,
    /// The best classes as text.
    Classes {
        name: &'static str,
        top_k: usize,
    },
}

impl Wanted {
    /// No more bytes than this for each photo.
    fn bytes(&self, labels: &[String]) -> usize {
        /// Length, value and number of a class as text.
        const AROUND: usize = 4 + "-123456.123456:9999:".len();
        match self {
            Self::Logits => 4 * labels.len(),
            Self::Classes { top_k, .. } => {
                let mut names: Vec<usize> = labels.iter().map(String::len).collect();
                names.sort_unstable_by(|a, b| b.cmp(a));
                names.iter().take(*top_k).map(|name| name + AROUND).sum()
            }
        }
    }
}

fn wanted(outputs: &[InferRequestedOutputTensor], parameters: &Parameters, classes: usize) -> Result<Vec<Wanted>, ServerError> {
    let k = |value: Option<u64>| usize::try_from(value.filter(|k| *k > 0).unwrap_or(DEFAULT_TOP_K)).unwrap_or(classes).min(classes);
    let top_k = k(number(parameters, "top_k")?);
    if outputs.is_empty() {
        return Ok(vec![Wanted::Logits, Wanted::Classes { name: "labels", top_k }]);
    }
    let each = outputs.iter().enumerate().map(|(i, output)| {
        if outputs[..i].iter().any(|earlier| earlier.name == output.name) {
            return Err(invalid(format!("output {:?} is asked for twice", output.name.chars().take(64).collect::<String>())));
        }
        if output.parameters.contains_key("shared_memory_region") {
            return Err(invalid("shared memory is not offered; take the values"));
        }
        let classification = number(&output.parameters, "classification")?.filter(|k| *k > 0);
        match (output.name.as_str(), classification) {
            ("logits", None) => Ok(Wanted::Logits),
            ("logits", Some(n)) => Ok(Wanted::Classes { name: "logits", top_k: k(Some(n)) }),
            ("labels", n) => Ok(Wanted::Classes { name: "labels", top_k: n.map_or(top_k, |n| k(Some(n))) }),
            (other, _) => {
                let other: String = other.chars().take(64).collect();
                Err(invalid(format!("unexpected inference output {other:?}: logits or labels")))
            }
        }
    });
    each.collect()
}

/// Value, index and name of the best classes, as the classification extension writes them; for `labels` the value is the
/// probability.
fn classes(answer: &Answer, name: &str, top_k: usize) -> Vec<String> {
    let best = isthmus_proto::best(&answer.logits, top_k, &answer.labels);
    let value = |l: &isthmus_proto::offload_v1::Label| if name == "labels" { l.score } else { answer.logits[l.index as usize] };
    best.iter().map(|l| class(value(l), l.index, &l.name)).collect()
}

fn class(value: f32, index: u32, name: &str) -> String {
    format!("{value:.6}:{index}:{name}")
}

/// Longest name of a request, which its answer carries.
const MOST_ID: usize = 4 << 10;
/// Room for what an answer has beside its values: names, shapes, times.
const FRAME: usize = 1 << 10;

/// Answers a request; the places are to be held until the answer has been taken. It counts in the statistics of the model that it names.
///
/// # Errors
/// Why there is no answer; a request of several photos has all answers or none.
pub async fn infer(
    pipeline: &Pipeline,
    request: ModelInferRequest,
    arrived: Instant,
    limit: Option<Duration>,
    tenant: &Tenant,
) -> Result<(ModelInferResponse, Places), ServerError> {
    let asked = pipeline.repository.current().model(&request.model_name, &request.model_version).cloned();
    let answered = attempt(pipeline, request, arrived, limit, tenant).await;
    if let (Ok(entry), Err(_)) = (asked, &answered) {
        entry.statistics.failed(arrived.elapsed());
    }
    answered
}

async fn attempt(
    pipeline: &Pipeline,
    mut request: ModelInferRequest,
    arrived: Instant,
    limit: Option<Duration>,
    tenant: &Tenant,
) -> Result<(ModelInferResponse, Places), ServerError> {
    let (outputs, asks) =
        read(pipeline, &mut request, arrived, limit, tenant).inspect_err(|error| telemetry::refused(error, Some(tenant)))?;
    if let [first, _, ..] = &asks[..] {
        pipeline.would_admit(first, asks.len()).inspect_err(|error| telemetry::refused(error, Some(tenant)))?;
    }
    // places and quotas for all of them at once: one by one, those that got theirs would be computed in vain whenever another did not
    let places = pipeline.enter(tenant, asks.len()).inspect_err(|error| telemetry::refused(error, Some(tenant)))?;
    let numbered = asks.into_iter().enumerate().map(async |(i, ask)| Ok::<_, ServerError>((i, pipeline.infer(ask, Some(&places)).await?)));
    let mut under_way: FuturesUnordered<_> = numbered.collect();
    let mut answers = Vec::with_capacity(under_way.len());
    // whichever fails first ends all at once: the others would be computed in vain
    while let Some(answer) = under_way.try_next().await? {
        answers.push(answer);
    }
    drop(under_way);
    answers.sort_by_key(|(i, _)| *i);
    let answers: Vec<Answer> = answers.into_iter().map(|(_, answer)| answer).collect();
    let slowest = answers.iter().max_by_key(|a| a.times.total);
    slowest.into_iter().for_each(|answer| answer.entry.statistics.answered(&answer.times));
    Ok((response(request.id, &answers, &outputs), places))
}

/// What is asked for each photo, and what of the answers is wanted.
fn read<'a>(
    pipeline: &Pipeline,
    request: &'a mut ModelInferRequest,
    arrived: Instant,
    limit: Option<Duration>,
    tenant: &'a Tenant,
) -> Result<(Vec<Wanted>, Vec<Ask<'a>>), ServerError> {
    if request.id.len() > MOST_ID {
        return Err(invalid(format!("id: at most {MOST_ID} bytes")));
    }
    let registry = pipeline.repository.current();
    // wrong names are told before the input is looked at
    registry.model(&request.model_name, &request.model_version)?;
    if request.parameters.contains_key("sequence_id") {
        let id = number(&request.parameters, "sequence_id").ok().flatten();
        if id != Some(0) {
            return Err(invalid("this model keeps no state: sequence_id has no meaning"));
        }
    }
    let asked = number(&request.parameters, "timeout")?.filter(|us| *us > 0).map(Duration::from_micros);
    let budget = pipeline.budget([asked, limit].into_iter().flatten().min());
    let priority = pipeline.priority(number(&request.parameters, "priority")?.unwrap_or(0), tenant)?;
    let outputs = wanted(&request.outputs, &request.parameters, registry.labels.len())?;
    let photos = Photos::read(request)?;
    let n = photos.payloads.len();
    // all of them are in flight together, or none has an answer
    let most = tenant.at_once().min(pipeline.max_in_flight()).min(pipeline.max_queue);
    if n > most {
        return Err(invalid(format!("{n} photos; {most} at most can be in flight or wait together: send fewer in a request")));
    }
    // before they are computed: an answer that is too large is nobody's
    let size = n * outputs.iter().map(|output| output.bytes(&registry.labels)).sum::<usize>() + request.id.len() + FRAME;
    if size > pipeline.max_response_bytes {
        let most = pipeline.max_response_bytes;
        return Err(invalid(format!(
            "the answer would have some {size} bytes, this server sends at most {most}: ask for fewer photos or classes"
        )));
    }
    let (model, version) = (request.model_name.as_str(), request.model_version.as_str());
    let ask = |payload| Ask { model, version, kind: photos.kind, payload, arrived, budget, priority, tenant };
    Ok((outputs, photos.payloads.into_iter().map(ask).collect()))
}

fn response(id: String, answers: &[Answer], wanted: &[Wanted]) -> ModelInferResponse {
    let n = answers.len() as i64;
    let (mut outputs, mut raw) = (Vec::new(), Vec::new());
    for output in wanted {
        let (name, datatype, width, bytes) = match output {
            Wanted::Logits => {
                let bytes: Vec<u8> = answers.iter().flat_map(|a| &a.logits).flat_map(|l| l.to_le_bytes()).collect();
                ("logits", Datatype::Fp32, answers.first().map_or(0, |a| a.logits.len()), Bytes::from(bytes))
            }
            Wanted::Classes { name, top_k } => {
                let texts: Vec<String> = answers.iter().flat_map(|a| classes(a, name, *top_k)).collect();
                (*name, Datatype::Bytes, *top_k, packed(texts.iter().map(String::as_str)))
            }
        };
        let (name, datatype) = (name.into(), datatype.name().into());
        outputs.push(InferOutputTensor { name, datatype, shape: vec![n, width as i64], ..InferOutputTensor::default() });
        raw.push(bytes);
    }
    let slowest = answers.iter().max_by_key(|a| a.times.total);
    let micros = |d: Duration| InferParameter { parameter_choice: Some(ParameterChoice::Uint64Param(d.as_micros() as u64)) };
    let times = slowest.map(|a| [("decode_us", a.times.decode), ("queue_us", a.times.queue), ("network_us", a.times.network)]);
    ModelInferResponse {
        model_name: answers.first().map_or("", |a| a.entry.name).into(),
        model_version: answers.first().map_or_else(String::new, |a| a.entry.version.to_string()),
        id,
        parameters: times.into_iter().flatten().map(|(name, time)| (name.to_owned(), micros(time))).collect(),
        outputs,
        raw_output_contents: raw,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_no_longer_than_was_foreseen() {
        let labels: Vec<String> = (0..1000).map(|i| "x".repeat(i % 97)).collect();
        for top_k in [1, 5, 1000] {
            let mut longest: Vec<String> = labels.iter().map(|name| class(-123_456.78, 999, name)).collect();
            longest.sort_by_key(|text| std::cmp::Reverse(text.len()));
            let packed = packed(longest[..top_k].iter().map(String::as_str));
            let foreseen = Wanted::Classes { name: "logits", top_k }.bytes(&labels);
            assert!(packed.len() <= foreseen && foreseen <= packed.len() + 4 * top_k, "{} of {foreseen}", packed.len());
        }
    }
}
