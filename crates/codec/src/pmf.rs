//! From probability masses to 16-bit integer widths (the quantiser of CompressAI's entropy bottleneck:
//! scale, renormalise in integers, let the rounding slack fall on the escape symbol, and give every
//! symbol at least one count by taking it from the narrowest wider one).

use crate::CodecError;

/// Bits of precision of every table.
pub const PRECISION: usize = 16;
/// Sum of the widths of one table.
pub const TOTAL: u32 = 1 << PRECISION;

/// Widths of the symbols with masses `pmf` and of the escape symbol with mass `tail` (last entry).
/// They are all at least 1 and sum to [`TOTAL`].
///
/// # Errors
/// [`CodecError::BadTables`] for negative or non-finite masses, an empty table or one too long.
pub fn quantise(pmf: &[f64], tail: f64) -> Result<Vec<u32>, CodecError> {
    let masses = || pmf.iter().chain(std::iter::once(&tail));
    if pmf.is_empty() || pmf.len() >= TOTAL as usize / 2 {
        return Err(CodecError::tables(format!("{} symbols in one table", pmf.len())));
    }
    if masses().any(|p| !p.is_finite() || *p < 0.0 || *p > 1.5) {
        return Err(CodecError::tables("a probability is negative, above one or not finite"));
    }
    let scaled: Vec<u64> = masses().map(|p| (p * f64::from(TOTAL)).round() as u64).collect();
    let total: u64 = scaled.iter().sum();
    if total == 0 {
        return Err(CodecError::tables("all probabilities are zero"));
    }
    let mut widths: Vec<u32> = scaled.iter().map(|f| (u64::from(TOTAL) * f / total) as u32).collect();
    let assigned: u32 = widths.iter().sum();
    if let Some(escape) = widths.last_mut() {
        *escape += TOTAL - assigned;
    }
    for i in 0..widths.len() {
        if widths[i] > 0 {
            continue;
        }
        let donor = (0..widths.len()).filter(|&j| widths[j] > 1).min_by_key(|&j| widths[j]);
        let donor = donor.ok_or_else(|| CodecError::tables("more symbols than counts"))?;
        widths[donor] -= 1;
        widths[i] = 1;
    }
    Ok(widths)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slack_goes_to_the_escape_symbol() {
        let widths = quantise(&[1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0], 0.0).unwrap();
        assert_eq!(widths, [21845, 21845, 21845, 1]);
    }

    #[test]
    fn rejects_what_is_no_distribution() {
        for (pmf, tail) in [(vec![], 0.1), (vec![f64::NAN], 0.0), (vec![-0.1], 0.0), (vec![0.5], f64::INFINITY), (vec![0.0], 0.0)] {
            assert!(quantise(&pmf, tail).is_err(), "{pmf:?} {tail}");
        }
    }

    proptest! {
        #[test]
        fn widths_are_positive_and_complete(raw in prop::collection::vec(0.0f64..1.0, 1..400), tail in 0.0f64..1e-3) {
            let sum: f64 = raw.iter().sum::<f64>() + tail + 1e-12;
            let pmf: Vec<f64> = raw.iter().map(|p| p / sum).collect();
            if let Ok(widths) = quantise(&pmf, tail / sum) {
                prop_assert!(widths.iter().all(|&w| w >= 1));
                prop_assert_eq!(widths.iter().sum::<u32>(), TOTAL);
            }
        }
    }
}
