//! Raw features as a payload: the values of a layer, plain or as bytes.

use isthmus_proto::offload_v1::features::Encoding;

use crate::ServerError;

/// Which layer the values are of, and how they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureMap {
    /// Index of the block whose output they are.
    pub block: u32,
    /// As in the request; not checked yet.
    pub encoding: i32,
}

impl FeatureMap {
    /// The `wanted` values in `data`. Memory is bounded by `wanted`, whatever the data claims.
    ///
    /// # Errors
    /// [`ServerError::Invalid`] for an unknown encoding, another number of values, or values that are not finite.
    pub fn decode(self, data: &[u8], wanted: usize) -> Result<Vec<f32>, ServerError> {
        let invalid = |why: String| ServerError::Invalid(format!("features: {why}"));
        let float = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let values: Vec<f32> = match Encoding::try_from(self.encoding) {
            Ok(Encoding::F32) => {
                if data.len() != wanted * 4 {
                    return Err(invalid(format!("{} bytes for {wanted} values of single precision", data.len())));
                }
                data.chunks_exact(4).map(float).collect()
            }
            Ok(Encoding::U8Zstd) => {
                let (range, frame) = data.split_at_checked(8).ok_or_else(|| invalid("shorter than its range".into()))?;
                let (low, high) = (float(&range[..4]), float(&range[4..]));
                let bytes = zstd::bulk::decompress(frame, wanted).map_err(|e| invalid(format!("zstd: {e}")))?;
                if bytes.len() != wanted {
                    return Err(invalid(format!("{} values, {wanted} are needed", bytes.len())));
                }
                bytes.into_iter().map(|b| low + (high - low) * f32::from(b) / 255.0).collect()
            }
            _ => return Err(invalid(format!("encoding {} is unknown", self.encoding))),
        };
        if values.iter().any(|v| !v.is_finite()) {
            return Err(invalid("values must be finite".into()));
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(encoding: Encoding) -> FeatureMap {
        FeatureMap { block: 0, encoding: encoding as i32 }
    }

    #[test]
    fn both_encodings_give_the_values_back() {
        let values = [0.0f32, -1.5, 4.0];
        let plain: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(map(Encoding::F32).decode(&plain, 3).unwrap(), values);
        let mut packed: Vec<u8> = [-1.5f32, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        packed.extend(zstd::bulk::compress(&[70, 0, 255], 3).unwrap());
        let back = map(Encoding::U8Zstd).decode(&packed, 3).unwrap();
        assert!(values.iter().zip(&back).all(|(a, b)| (a - b).abs() < 0.02), "{back:?}");
    }

    #[test]
    fn wrong_features_are_refused_with_the_reason() {
        let error = |encoding, data: &[u8], wanted| map(encoding).decode(data, wanted).unwrap_err().to_string();
        assert!(error(Encoding::F32, &[0; 11], 3).contains("11 bytes for 3 values"));
        assert!(error(Encoding::F32, &f32::NAN.to_le_bytes(), 1).contains("finite"));
        assert!(error(Encoding::U8Zstd, &[0; 5], 3).contains("range"));
        assert!(error(Encoding::U8Zstd, &[0; 20], 3).contains("zstd"));
        assert!(error(Encoding::Unspecified, &[], 3).contains("encoding 0"));
        // a frame that unpacks to more than is needed stops there
        let mut bomb = vec![0; 8];
        bomb.extend(zstd::bulk::compress(&vec![0; 1 << 24], 3).unwrap());
        assert!(error(Encoding::U8Zstd, &bomb, 1000).contains("zstd"));
        let mut short = vec![0; 8];
        short.extend(zstd::bulk::compress(&[1, 2], 3).unwrap());
        assert!(error(Encoding::U8Zstd, &short, 3).contains("2 values, 3 are needed"));
    }
}
