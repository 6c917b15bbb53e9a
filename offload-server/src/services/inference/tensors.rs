//! Tensors of the Open Inference Protocol: datatypes, typed and raw contents.

use bytes::Bytes;
use isthmus_proto::inference::InferTensorContents;
use isthmus_proto::inference::model_infer_request::InferInputTensor;

use crate::ServerError;

/// More dimensions than anybody has.
const MOST_DIMENSIONS: usize = 8;

/// The protocol's datatypes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    Bytes,
}

impl Datatype {
    const NAMES: [(&'static str, Self); 14] = [
        ("BOOL", Self::Bool),
        ("UINT8", Self::Uint8),
        ("UINT16", Self::Uint16),
        ("UINT32", Self::Uint32),
        ("UINT64", Self::Uint64),
        ("INT8", Self::Int8),
        ("INT16", Self::Int16),
        ("INT32", Self::Int32),
        ("INT64", Self::Int64),
        ("FP16", Self::Fp16),
        ("BF16", Self::Bf16),
        ("FP32", Self::Fp32),
        ("FP64", Self::Fp64),
        ("BYTES", Self::Bytes),
    ];

    fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|(_, d)| *d)
    }

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, d)| *d == self).map_or("", |(n, _)| n)
    }

    /// Bytes of a value; none for BYTES.
    fn size(self) -> Option<usize> {
        match self {
            Self::Bool | Self::Uint8 | Self::Int8 => Some(1),
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => Some(2),
            Self::Uint32 | Self::Int32 | Self::Fp32 => Some(4),
            Self::Uint64 | Self::Int64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }
}

/// A checked tensor.
#[derive(Debug)]
pub struct Tensor {
    /// Name of the input.
    pub name: String,
    /// Datatype.
    pub datatype: Datatype,
    /// Shape; no dimension is negative.
    pub shape: Vec<usize>,
    /// The values.
    pub values: Values,
}

/// Values of a tensor.
#[derive(Debug)]
pub enum Values {
    /// Little-endian, row by row.
    Raw(Bytes),
    /// The elements of a BYTES tensor.
    Elements(Vec<Bytes>),
}

fn invalid(name: &str, why: impl std::fmt::Display) -> ServerError {
    let name: String = name.chars().take(64).collect();
    ServerError::Invalid(format!("input {name:?}: {why}"))
}

impl Tensor {
    /// Reads an input; `raw` are its raw contents, if the request has such. Memory is bounded by the message, whatever the shape says.
    ///
    /// # Errors
    /// [`ServerError::Invalid`] if datatype, shape and contents do not fit together.
    pub fn read(input: InferInputTensor, raw: Option<Bytes>) -> Result<Self, ServerError> {
        let InferInputTensor { name, datatype, shape, contents, parameters } = input;
        if parameters.contains_key("shared_memory_region") {
            return Err(invalid(&name, "shared memory is not offered; send the values"));
        }
        let known = Datatype::from_name(&datatype).ok_or_else(|| {
            let names = Datatype::NAMES.map(|(n, _)| n).join(", ");
            invalid(&name, format!("datatype {:?} is none of {names}", datatype.chars().take(16).collect::<String>()))
        })?;
        if shape.is_empty() || shape.len() > MOST_DIMENSIONS || shape.iter().any(|d| *d < 0) {
            return Err(invalid(&name, format!("a shape of 1 to {MOST_DIMENSIONS} dimensions, none negative, is wanted")));
        }
        let shape: Vec<usize> = shape.into_iter().map(|d| d as usize).collect();
        let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(|| invalid(&name, "the shape is too large"))?;
        let values = match raw {
            Some(_) if contents.as_ref().is_some_and(|c| !is_empty(c)) => {
                return Err(invalid(&name, "it has both contents and raw_input_contents"));
            }
            Some(raw) => from_raw(known, count, raw).map_err(|why| invalid(&name, why))?,
            None => typed(known, count, contents.unwrap_or_default()).map_err(|why| invalid(&name, why))?,
        };
        Ok(Self { name, datatype: known, shape, values })
    }

    /// The values as single precision, if they are numbers of some floating-point type.
    pub fn floats(&self) -> Option<Bytes> {
        let Values::Raw(raw) = &self.values else { return None };
        let wide = |floats: Vec<f32>| floats.iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<u8>>().into();
        let halves = raw.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.datatype {
            Datatype::Fp32 => Some(raw.clone()),
            Datatype::Bf16 => Some(wide(halves.map(|h| f32::from_bits(u32::from(h) << 16)).collect())),
            Datatype::Fp16 => Some(wide(halves.map(half).collect())),
            Datatype::Fp64 => {
                let doubles = raw.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32);
                Some(wide(doubles.collect()))
            }
            _ => None,
        }
    }
}

/// IEEE 754 half precision.
fn half(bits: u16) -> f32 {
    let (sign, exponent, fraction) = (f32::from(1 - 2 * (bits >> 15 & 1) as i8), bits >> 10 & 0x1F, f32::from(bits & 0x3FF));
    match exponent {
        0 => sign * fraction * 2f32.powi(-24),
        0x1F if fraction == 0.0 => sign * f32::INFINITY,
        0x1F => f32::NAN,
        e => sign * (1.0 + fraction / 1024.0) * 2f32.powi(i32::from(e) - 15),
    }
}

fn is_empty(c: &InferTensorContents) -> bool {
    c.bool_contents.is_empty()
        && c.int_contents.is_empty()
        && c.int64_contents.is_empty()
        && c.uint_contents.is_empty()
        && c.uint64_contents.is_empty()
        && c.fp32_contents.is_empty()
        && c.fp64_contents.is_empty()
        && c.bytes_contents.is_empty()
}

fn from_raw(datatype: Datatype, count: usize, raw: Bytes) -> Result<Values, String> {
    let Some(size) = datatype.size() else { return elements(count, raw) };
    if count.checked_mul(size) != Some(raw.len()) {
        return Err(format!("{} raw bytes for {count} values of {}", raw.len(), datatype.name()));
    }
    Ok(Values::Raw(raw))
}

/// Elements of BYTES: four bytes of length before each.
fn elements(count: usize, mut raw: Bytes) -> Result<Values, String> {
    let mut found = Vec::with_capacity(count.min(raw.len() / 4));
    while !raw.is_empty() {
        let Some(head) = raw.first_chunk::<4>() else { return Err("a length of an element is cut off".into()) };
        let length = u32::from_le_bytes(*head) as usize;
        if raw.len() - 4 < length {
            return Err(format!("element {} should have {length} bytes, {} are there", found.len(), raw.len() - 4));
        }
        let _ = raw.split_to(4);
        found.push(raw.split_to(length));
    }
    if found.len() != count {
        return Err(format!("{} elements, the shape has {count}", found.len()));
    }
    Ok(Values::Elements(found))
}

fn typed(datatype: Datatype, count: usize, c: InferTensorContents) -> Result<Values, String> {
    fn pack<T, const N: usize>(values: Vec<T>, bytes: impl Fn(T) -> Option<[u8; N]>) -> Result<(usize, Vec<u8>), String> {
        let (count, mut raw) = (values.len(), Vec::with_capacity(values.len() * N));
        for value in values {
            raw.extend(bytes(value).ok_or("a value is out of the datatype's range")?);
        }
        Ok((count, raw))
    }
    let (found, raw) = match datatype {
        Datatype::Bool => pack(c.bool_contents, |v| Some([u8::from(v)])),
        Datatype::Uint8 => pack(c.uint_contents, |v| u8::try_from(v).ok().map(u8::to_le_bytes)),
        Datatype::Uint16 => pack(c.uint_contents, |v| u16::try_from(v).ok().map(u16::to_le_bytes)),
        Datatype::Uint32 => pack(c.uint_contents, |v| Some(v.to_le_bytes())),
        Datatype::Uint64 => pack(c.uint64_contents, |v| Some(v.to_le_bytes())),
        Datatype::Int8 => pack(c.int_contents, |v| i8::try_from(v).ok().map(i8::to_le_bytes)),
        Datatype::Int16 => pack(c.int_contents, |v| i16::try_from(v).ok().map(i16::to_le_bytes)),
        Datatype::Int32 => pack(c.int_contents, |v| Some(v.to_le_bytes())),
        Datatype::Int64 => pack(c.int64_contents, |v| Some(v.to_le_bytes())),
        Datatype::Fp32 => pack(c.fp32_contents, |v| Some(v.to_le_bytes())),
        Datatype::Fp64 => pack(c.fp64_contents, |v| Some(v.to_le_bytes())),
        Datatype::Fp16 | Datatype::Bf16 => return Err(format!("{} travels as raw_input_contents only", datatype.name())),
        Datatype::Bytes => {
            let found = c.bytes_contents;
            if found.len() != count {
                return Err(format!("{} elements, the shape has {count}", found.len()));
            }
            return Ok(Values::Elements(found));
        }
    }?;
    if found != count {
        return Err(format!("{found} values of {}, the shape has {count}", datatype.name()));
    }
    Ok(Values::Raw(raw.into()))
}

/// BYTES as raw output contents.
pub fn packed<'a>(elements: impl Iterator<Item = &'a str>) -> Bytes {
    let mut raw = Vec::new();
    for element in elements {
        raw.extend((element.len() as u32).to_le_bytes());
        raw.extend(element.as_bytes());
    }
    raw.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(datatype: &str, shape: &[i64]) -> InferInputTensor {
        InferInputTensor { name: "x".into(), datatype: datatype.into(), shape: shape.into(), ..InferInputTensor::default() }
    }

    fn raw_of(tensor: Tensor) -> Vec<u8> {
        match tensor.values {
            Values::Raw(raw) => raw.to_vec(),
            Values::Elements(e) => e.concat(),
        }
    }

    #[test]
    fn typed_contents_of_every_datatype_equal_the_raw_ones() {
        let c = InferTensorContents::default;
        let all = [
            ("BOOL", InferTensorContents { bool_contents: vec![true, false], ..c() }, vec![1, 0]),
            ("UINT8", InferTensorContents { uint_contents: vec![1, 255], ..c() }, vec![1, 255]),
            ("UINT16", InferTensorContents { uint_contents: vec![1, 65535], ..c() }, vec![1, 0, 255, 255]),
            ("UINT32", InferTensorContents { uint_contents: vec![1, 2], ..c() }, vec![1, 0, 0, 0, 2, 0, 0, 0]),
            (
                "UINT64",
                InferTensorContents { uint64_contents: vec![1, 2], ..c() },
                [1u64, 2].iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
            ("INT8", InferTensorContents { int_contents: vec![-1, 127], ..c() }, vec![255, 127]),
            ("INT16", InferTensorContents { int_contents: vec![-1, 2], ..c() }, vec![255, 255, 2, 0]),
            ("INT32", InferTensorContents { int_contents: vec![-1, 2], ..c() }, vec![255, 255, 255, 255, 2, 0, 0, 0]),
            (
                "INT64",
                InferTensorContents { int64_contents: vec![-1, 2], ..c() },
                [-1i64, 2].iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
            (
                "FP32",
                InferTensorContents { fp32_contents: vec![1.5, -2.0], ..c() },
                [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
            (
                "FP64",
                InferTensorContents { fp64_contents: vec![1.5, -2.0], ..c() },
                [1.5f64, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
        ];
        for (name, contents, raw) in all {
            let typed = Tensor::read(InferInputTensor { contents: Some(contents.clone()), ..input(name, &[2]) }, None).unwrap();
            let direct = Tensor::read(input(name, &[2, 1]), Some(raw.clone().into())).unwrap();
            assert_eq!((raw_of(typed), raw_of(direct)), (raw.clone(), raw.clone()), "{name}");
            let wrong = |input, raw: Option<Vec<u8>>| Tensor::read(input, raw.map(Bytes::from)).unwrap_err().to_string();
            assert!(wrong(InferInputTensor { contents: Some(contents.clone()), ..input(name, &[3]) }, None).contains("the shape has 3"));
            assert!(wrong(input(name, &[3]), Some(raw.clone())).contains("raw bytes for 3"));
            assert!(wrong(InferInputTensor { contents: Some(contents), ..input(name, &[2]) }, Some(raw)).contains("both"));
        }
    }

    #[test]
    fn elements_are_cut_by_their_lengths() {
        let raw: Vec<u8> = [&2u32.to_le_bytes()[..], b"ab", &0u32.to_le_bytes(), &1u32.to_le_bytes(), b"c"].concat();
        let tensor = Tensor::read(input("BYTES", &[3]), Some(raw.clone().into())).unwrap();
        let Values::Elements(found) = tensor.values else { panic!("elements") };
        assert_eq!(found, [&b"ab"[..], b"", b"c"]);
        for cut in 1..raw.len() {
            assert!(Tensor::read(input("BYTES", &[3]), Some(raw[..cut].to_vec().into())).is_err(), "{cut}");
        }
        assert!(Tensor::read(input("BYTES", &[1]), Some(u32::MAX.to_le_bytes().to_vec().into())).is_err());
    }

    #[test]
    fn senseless_tensors_are_refused() {
        let wrong = |datatype, shape: &[i64]| Tensor::read(input(datatype, shape), Some(Bytes::new())).unwrap_err().to_string();
        assert!(wrong("FLOAT", &[1]).contains("BF16"));
        assert!(wrong("FP32", &[]).contains("dimensions"));
        assert!(wrong("FP32", &[-1]).contains("negative"));
        assert!(wrong("FP32", &[i64::MAX, 4]).contains("too large"));
        assert!(wrong("FP64", &[i64::MAX]).contains("raw bytes"));
        assert!(wrong("FP32", &[1; 9]).contains("dimensions"));
        let half = InferInputTensor { contents: Some(InferTensorContents::default()), ..input("FP16", &[1]) };
        assert!(Tensor::read(half, None).unwrap_err().to_string().contains("raw_input_contents only"));
    }

    #[test]
    fn narrow_floats_become_single_precision() {
        let floats = |datatype, raw: Vec<u8>, n| {
            let tensor = Tensor::read(input(datatype, &[n]), Some(raw.into())).unwrap();
            tensor.floats().unwrap().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>()
        };
        let halves: Vec<u8> = [0x3C00u16, 0xC000, 0x0001, 0x7BFF, 0xFC00].iter().flat_map(|h| h.to_le_bytes()).collect();
        assert_eq!(floats("FP16", halves, 5), [1.0, -2.0, 2f32.powi(-24), 65504.0, f32::NEG_INFINITY]);
        assert_eq!(floats("BF16", vec![0x80, 0x3F, 0x00, 0xC0], 2), [1.0, -2.0]);
        assert_eq!(floats("FP64", 0.5f64.to_le_bytes().to_vec(), 1), [0.5]);
    }
}
