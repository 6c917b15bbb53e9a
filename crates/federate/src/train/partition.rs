//! Dealing training examples out to clients.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use rand_distr::{Distribution, Gamma};
use serde::{Deserialize, Serialize};

use super::Examples;
use crate::error::FederateError;

/// How clients' data differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Not at all: every client has a random sample of the same size.
    #[default]
    Iid,
    /// Each client's shares of the classes are drawn from a Dirichlet distribution with this concentration: 0.1 gives a client
    /// little more than one or two classes (Hsu et al. 2019).
    Dirichlet(f64),
    /// As the data came: by speaker, or in runs of consecutive photos.
    Natural,
}

impl std::str::FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: write iid, natural, or dirichlet:CONCENTRATION, for example dirichlet:0.5");
        match text.split_once(':') {
            None if text == "iid" => Ok(Self::Iid),
            None if text == "natural" => Ok(Self::Natural),
            Some(("dirichlet", alpha)) => {
                let alpha: f64 = alpha.parse().map_err(|_| wrong())?;
                if alpha.is_finite() && alpha > 0.0 { Ok(Self::Dirichlet(alpha)) } else { Err(wrong()) }
            }
            _ => Err(wrong()),
        }
    }
}

/// Parts of the examples with these labels for `clients` clients: every example goes to at most one, all get as many (rounded down).
///
/// # Errors
/// If there are fewer examples than clients, or the split makes no sense.
pub fn deal(labels: &[u8], clients: usize, split: Split, seed: u64) -> Result<Vec<Examples>, FederateError> {
    let each = labels.len() / clients.max(1);
    if each == 0 {
        return Err(FederateError::Invalid(format!("{} examples for {clients} clients", labels.len())));
    }
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..labels.len()).collect();
    order.shuffle(&mut rng);
    let alpha = match split {
        Split::Iid => return Ok(order.chunks_exact(each).take(clients).map(|c| Examples { places: c.to_vec(), flipped: false }).collect()),
        Split::Natural => return Err(FederateError::Invalid("split: these data belong to nobody; use iid or dirichlet".into())),
        Split::Dirichlet(alpha) => alpha,
    };
    let gamma = Gamma::new(alpha, 1.0).map_err(|e| FederateError::Invalid(format!("split: {e}")))?;
    let classes = labels.iter().max().map_or(0, |m| usize::from(*m) + 1);
    let mut left: Vec<Vec<usize>> = vec![Vec::new(); classes];
    order.iter().for_each(|place| left[usize::from(labels[*place])].push(*place));
    let mut parts = Vec::with_capacity(clients);
    for _ in 0..clients {
        let weights: Vec<f64> = (0..classes).map(|_| gamma.sample(&mut rng).max(1e-12)).collect();
        let mut places = Vec::with_capacity(each);
        while places.len() < each {
            // classes that are used up are passed over
            let total: f64 = weights.iter().zip(&left).filter(|(_, l)| !l.is_empty()).map(|(w, _)| w).sum();
            let mut at = rand::Rng::random::<f64>(&mut rng) * total;
            let drawn = (0..classes).filter(|c| !left[*c].is_empty()).find(|c| {
                at -= weights[*c];
                at <= 0.0
            });
            let class = drawn.or_else(|| (0..classes).rev().find(|c| !left[*c].is_empty()));
            places.extend(class.and_then(|c| left[c].pop()));
        }
        parts.push(Examples { places, flipped: false });
    }
    Ok(parts)
}

/// `examples` in runs of neighbours, one for each client, as long as each other.
///
/// # Errors
/// If there are fewer examples than clients.
pub fn in_runs(examples: usize, clients: usize) -> Result<Vec<Examples>, FederateError> {
    let each = examples / clients.max(1);
    if each == 0 {
        return Err(FederateError::Invalid(format!("{examples} examples for {clients} clients")));
    }
    Ok((0..clients).map(|c| Examples { places: (c * each..(c + 1) * each).collect(), flipped: false }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_dealt_once_and_the_concentration_says_how_unevenly() {
        let labels: Vec<u8> = (0..6000).map(|i| (i % 10) as u8).collect();
        let largest_class = |split| {
            let parts = deal(&labels, 50, split, 3).unwrap();
            let mut all: Vec<usize> = parts.iter().flat_map(|p| p.places.clone()).collect();
            assert!(parts.iter().all(|p| p.places.len() == 120));
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), 6000);
            let share = |p: &Examples| (0..10).map(|c| p.places.iter().filter(|i| labels[**i] == c).count()).max().unwrap() as f64 / 120.0;
            parts.iter().map(share).sum::<f64>() / 50.0
        };
        let (even, some, strong) = (largest_class(Split::Iid), largest_class(Split::Dirichlet(0.5)), largest_class(Split::Dirichlet(0.1)));
        assert!(even < 0.2 && some > 0.3 && strong > 0.55 && strong > some, "{even} {some} {strong}");
        assert_eq!(deal(&labels, 50, Split::Dirichlet(0.5), 3).unwrap(), deal(&labels, 50, Split::Dirichlet(0.5), 3).unwrap());
        assert!(deal(&labels[..3], 4, Split::Iid, 1).is_err() && in_runs(3, 4).is_err() && deal(&labels, 4, Split::Natural, 1).is_err());
        assert_eq!(in_runs(7, 3).unwrap()[2].places, [4, 5]);
    }

    #[test]
    fn splits_are_read_as_people_write_them() {
        assert_eq!("iid".parse(), Ok(Split::Iid));
        assert_eq!("dirichlet:0.1".parse(), Ok(Split::Dirichlet(0.1)));
        assert_eq!("natural".parse(), Ok(Split::Natural));
        for wrong in ["", "uneven", "dirichlet", "dirichlet:", "dirichlet:-1", "dirichlet:nan", "iid:3"] {
            assert!(wrong.parse::<Split>().is_err(), "{wrong}");
        }
    }
}
