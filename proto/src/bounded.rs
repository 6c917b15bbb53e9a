//! A codec that counts before it decodes. The fields of a request may take two bytes each on the wire and hundreds in memory, and most numbers are smaller
//! on the wire than in memory: a limit of a message's size says little of what it costs.

use std::any::TypeId;
use std::marker::PhantomData;

use prost::Message;
use prost::bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::inference::ModelInferRequest;

/// Fields of a request with all that it holds.
pub const MAX_FIELDS: usize = 4096;
/// Bytes of numbers in typed contents, which take up to eight times as many once decoded; raw contents take what they are.
pub const MAX_NUMBER_BYTES: usize = 2 << 20;

/// [`ProstCodec`], but for requests with more than [`MAX_FIELDS`] or [`MAX_NUMBER_BYTES`], which are INVALID_ARGUMENT.
#[derive(Debug, Clone)]
pub struct Bounded<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Bounded<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + Send + 'static, U: Message + Default + Send + 'static> Codec for Bounded<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(ProstCodec::<T, U>::default().decoder())
    }
}

/// See [`Bounded`].
#[derive(Debug, Clone)]
pub struct BoundedDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default + 'static> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        if TypeId::of::<U>() == TypeId::of::<ModelInferRequest>() {
            let mut cost = Cost::default();
            // a buffer in pieces would be counted in part; there is one piece
            cost.request(&source.chunk()[..source.remaining().min(source.chunk().len())]);
            cost.check()?;
        }
        self.0.decode(source)
    }
}

/// What decoding a request takes beside its bytes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Cost {
    fields: usize,
    numbers: usize,
}

impl Cost {
    fn check(&self) -> Result<(), Status> {
        if self.fields > MAX_FIELDS {
            return Err(Status::invalid_argument(format!("the request has more than {MAX_FIELDS} fields")));
        }
        if self.numbers > MAX_NUMBER_BYTES {
            let why = format!("{} bytes of numbers in typed contents, at most {MAX_NUMBER_BYTES}: send raw_input_contents", self.numbers);
            return Err(Status::invalid_argument(why));
        }
        Ok(())
    }

    /// Calls `each` with number and content of the fields that have a length, until there are too many. What is malformed is for the decoder to refuse.
    fn each(&mut self, mut message: &[u8], mut each: impl FnMut(&mut Self, u32, &[u8])) {
        while !message.is_empty() && self.fields <= MAX_FIELDS {
            self.fields += 1;
            let Ok((number, kind)) = decode_key(&mut message) else { return };
            let len = match kind {
                WireType::Varint => match decode_varint(&mut message) {
                    Ok(_) => 0,
                    Err(_) => return,
                },
                WireType::SixtyFourBit => 8,
                WireType::ThirtyTwoBit => 4,
                // a group's fields are fields like any other here
                WireType::StartGroup | WireType::EndGroup => 0,
                WireType::LengthDelimited => {
                    let Some((content, rest)) = decode_varint(&mut message)
                        .ok()
                        .and_then(|len| usize::try_from(len).ok())
                        .and_then(|len| message.split_at_checked(len))
                    else {
                        return;
                    };
                    each(self, number, content);
                    message = rest;
                    0
                }
            };
            let Some(rest) = message.get(len..) else { return };
            message = rest;
        }
    }

    /// A [`ModelInferRequest`].
    fn request(&mut self, message: &[u8]) {
        self.each(message, |cost, number, content| match number {
            // inputs, outputs
            5 => cost.input(content),
            6 => cost.each(content, |_, _, _| {}),
            _ => {}
        });
    }

    fn input(&mut self, message: &[u8]) {
        self.each(message, |cost, number, content| match number {
            // shape
            3 => cost.numbers += content.len(),
            // contents: packed numbers of all kinds but those that have their size on the wire
            5 => cost.each(content, |cost, number, content| {
                if (1..=5).contains(&number) {
                    cost.numbers += content.len();
                }
            }),
            _ => {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
    use crate::inference::{InferParameter, InferTensorContents};

    fn cost(request: &ModelInferRequest) -> Cost {
        let mut cost = Cost::default();
        cost.request(&request.encode_to_vec());
        cost
    }

    fn input(contents: InferTensorContents) -> InferInputTensor {
        InferInputTensor {
            name: "pixels".into(),
            datatype: "UINT8".into(),
            shape: vec![1, 2, 3],
            contents: Some(contents),
            ..InferInputTensor::default()
        }
    }

    #[test]
    fn fields_and_numbers_are_counted_wherever_they_are() {
        let uints = InferTensorContents { uint_contents: vec![7; 1000], ..InferTensorContents::default() };
        let parameters = (0..5).map(|i| (i.to_string(), InferParameter::default())).collect();
        let request = ModelInferRequest {
            model_name: "m".into(),
            parameters,
            inputs: vec![input(uints)],
            outputs: vec![InferRequestedOutputTensor { name: "labels".into(), ..InferRequestedOutputTensor::default() }],
            raw_input_contents: vec![vec![0; 1 << 20].into(); 2],
            ..ModelInferRequest::default()
        };
        // the name, parameters, the input with name, datatype, shape and contents with one field, the output and its name, raw contents
        assert_eq!(cost(&request), Cost { fields: 1 + 5 + (1 + 4 + 1) + (1 + 1) + 2, numbers: 1000 + 3 });
        assert!(cost(&request).check().is_ok());
    }

    #[test]
    fn threat_exhaustion_what_would_take_much_memory_is_refused() {
        let many = |n: usize| -> [ModelInferRequest; 4] {
            let empty = ModelInferRequest::default;
            let elements = InferTensorContents { bytes_contents: vec![Default::default(); n], ..InferTensorContents::default() };
            [
                ModelInferRequest { inputs: vec![InferInputTensor::default(); n], ..empty() },
                ModelInferRequest { outputs: vec![InferRequestedOutputTensor::default(); n], ..empty() },
                ModelInferRequest { raw_input_contents: vec![Default::default(); n], ..empty() },
                ModelInferRequest { inputs: vec![input(elements)], ..empty() },
            ]
        };
        assert!(many(64).iter().all(|request| cost(request).check().is_ok()), "as many photos as a request may have");
        for request in many(MAX_FIELDS + 1) {
            let cost = cost(&request);
            assert!(cost.check().is_err() && cost.fields <= MAX_FIELDS + 4, "counting ends there: {cost:?}");
        }
        let numbers = |n| InferTensorContents { int64_contents: vec![1; n], ..InferTensorContents::default() };
        let request = |n| ModelInferRequest { inputs: vec![input(numbers(n))], ..ModelInferRequest::default() };
        assert!(cost(&request(1 << 20)).check().is_ok());
        assert!(cost(&request(MAX_NUMBER_BYTES + 1)).check().unwrap_err().message().contains("raw_input_contents"));
        // what is cut short or senseless ends the count
        let whole = request(100).encode_to_vec();
        for end in 0..whole.len() {
            Cost::default().request(&whole[..end]);
        }
        Cost::default().request(&[0xff; 64]);
        Cost::default().request(&[0x2a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]);
    }
}
