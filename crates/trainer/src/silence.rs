//! Latent channels that are empty on all training crops: they are left out of the coding order, so that neither side spends time on them. Between two levels they come back with the step that
//! they have at the upper one.

use isthmus_codec::{LatentShape, LevelTables, Quality, Tables};

use crate::error::TrainError;

/// Silences, level by level, the channels without a symbol other than zero in all of `latents` (one after the other), at the level's own quality and at the
/// finest that is coded with its tables.
///
/// # Errors
/// If the latents do not fit the tables.
pub fn silence(tables: Tables, latents: &[f32], shape: LatentShape) -> Result<Tables, TrainError> {
    let mut silent = Vec::new();
    for level in (1u8..).take(tables.levels.len()) {
        let finest = Quality { level, fraction: 127 };
        let qualities = [Some(tables.level(level)?), tables.level(finest).ok()];
        let mut alive = vec![false; usize::from(shape.channels)];
        for latent in latents.chunks_exact(shape.symbols()) {
            for quality in qualities.iter().flatten() {
                let symbols = quality.quantise(latent, shape)?;
                for (alive, plane) in alive.iter_mut().zip(symbols.chunks_exact(shape.positions())) {
                    *alive |= plane.iter().any(|&s| s != 0);
                }
            }
        }
        silent.push((0u16..).zip(alive).filter(|(_, alive)| !alive).map(|(c, _)| c).collect::<Vec<_>>());
    }
    let levels = tables.levels.into_iter().zip(silent).map(|(level, silent)| level.silenced(&silent));
    Ok(with_next_steps(Tables { levels: levels.collect::<Result<_, _>>()? }))
}

/// Gives channels that are silent at a level, but not at the next one, the step of that, and leaves what they stand for as it is: gains between two levels are interpolated,
/// and from one that says nothing a channel would come back in the last moment, while the others have nearly all their bytes already (docs/decisions/0035).
fn with_next_steps(mut tables: Tables) -> Tables {
    for l in 1..tables.levels.len() {
        let (below, above) = tables.levels.split_at_mut(l);
        let (Some(level), Some(next)) = (below.last_mut(), above.first()) else { continue };
        let returning: Vec<u16> = level.silent().filter(|&c| next.is_coded(c)).collect();
        for c in returning.into_iter().map(usize::from) {
            let (table, next) = (&mut level.channels[c], &next.channels[c]);
            let median = table.median * table.inverse / next.inverse;
            // others tell the decoder the level: they come back as their constants do
            if LevelTables::is_still(median) {
                (table.gain, table.inverse, table.median) = (next.gain, next.inverse, median);
            }
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_codec::{ChannelTable, pmf};

    const SHAPE: LatentShape = LatentShape { channels: 3, height: 1, width: 3 };

    /// Symbols -2 to 2, all else escapes.
    fn channel(gain: f32, inverse: f32, median: f32) -> ChannelTable {
        let each = pmf::TOTAL / 8;
        ChannelTable::new(gain, inverse, median, -2, vec![each, each, each, each, each, pmf::TOTAL - 5 * each]).unwrap()
    }

    #[test]
    fn a_silent_channel_comes_back_halfway_to_the_level_that_has_it() {
        let level = |channels| LevelTables::new(channels).unwrap();
        let levels = vec![
            level(vec![channel(0.5, 2.0, 0.0), channel(1e-4, 0.02, 0.25), channel(0.1, 1.0, 2.0)]),
            level(vec![channel(1.0, 1.0, 0.0), channel(2.0, 0.5, 0.0), channel(0.1, 0.5, 2.75)]),
        ];
        let tables = Tables { levels };
        // the last channel is silent too, but stands for something
        let latent = [1.0, -2.0, 3.0, 0.6, -1.1, 0.9, 19.0, 20.0, 21.0];
        let decoded = |tables: &Tables, quality: f64| {
            let level = tables.level(Quality::nearest(quality)).unwrap();
            let mut out = Vec::new();
            level.dequantise_into(&level.quantise(&latent, SHAPE).unwrap(), SHAPE, &mut out).unwrap();
            out
        };
        let silenced = silence(tables.clone(), &latent, SHAPE).unwrap();
        assert_eq!(silenced.levels[0].order(), [0]);
        // the levels themselves mean what they meant
        for quality in [1.0, 2.0] {
            let (before, after) = (decoded(&tables, quality), decoded(&silenced, quality));
            assert!(before.iter().zip(&after).all(|(a, b)| (a - b).abs() < 1e-6), "{before:?} {after:?}");
        }
        // interpolated, the step was too coarse for anything to be said
        assert!(decoded(&tables, 1.75)[3..6].iter().all(|v| v.abs() < 0.1));
        for (got, wanted) in decoded(&silenced, 1.5)[3..6].iter().zip(&latent[3..6]) {
            assert!((got - wanted).abs() <= 0.26, "{got} for {wanted}");
        }
        // below the half the lower level's tables code, without that channel
        assert!(decoded(&silenced, 1.25)[3..6].iter().all(|v| v.abs() < 0.1));
        // a network that rounds all channels leaves it empty too
        let gains = silenced.levels[0].gains();
        assert_eq!((gains[0], gains[2]), (0.5, 0.1));
        assert_eq!(silenced.levels[0].channels[2].inverse, 1.0);
        assert!(latent[3..6].iter().all(|y| (y * gains[1]).abs() < 0.01));
    }
}
