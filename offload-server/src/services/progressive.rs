//! Progressive bitstreams on a stream of requests: what has come of each is kept until it is refined.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use isthmus_codec::Progressive;

use crate::ServerError;
use crate::registry::Registry;

/// Bytes that are kept for one stream; what came first is given up for what comes last.
const MOST: usize = 256 << 10;

/// Beginnings of progressive bitstreams whose answers said that they want more, by the id of their requests.
#[derive(Default)]
pub struct Beginnings(Mutex<VecDeque<(u64, Vec<u8>)>>);

impl Beginnings {
    /// Keeps a bitstream that may be refined; false if it is too long for that.
    pub fn keep(&self, id: u64, bitstream: &[u8]) -> bool {
        if bitstream.len() > MOST {
            return false;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(of, _)| *of != id);
        // a copy: what was received is a part of its whole message, which may be long
        kept.push_back((id, bitstream.to_vec()));
        while kept.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() > MOST {
            kept.pop_front();
        }
        true
    }

    /// The bitstream of this id with its next refinement.
    ///
    /// # Errors
    /// [`ServerError::NothingToRefine`] if it is not kept.
    pub fn refined(&self, id: u64, refinement: &[u8]) -> Result<Bytes, ServerError> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(of, _)| *of == id);
        let (_, begun) = at.and_then(|at| kept.remove(at)).ok_or(ServerError::NothingToRefine(id))?;
        Ok([&begun, refinement].concat().into())
    }
}

/// True if the bundle knows a refinement of what has come of a bitstream.
pub fn can_be_refined(registry: &Registry, bitstream: &[u8]) -> bool {
    let Ok(parsed) = Progressive::parse(bitstream) else { return false };
    let header = &parsed.container.header;
    let steps = registry.bundle(&header.bundle).ok().and_then(|b| b.refinements.as_ref().map(|r| r.steps().len()));
    header.quality == isthmus_codec::progressive::BASE.into() && steps.is_some_and(|steps| parsed.refinements() < steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_given_once() {
        let kept = Beginnings::default();
        assert!(kept.keep(1, &[1; 10]) && kept.keep(1, &[2; 3]));
        assert_eq!(kept.refined(1, &[9]).unwrap(), [2, 2, 2, 9].as_slice());
        assert!(matches!(kept.refined(1, &[9]), Err(ServerError::NothingToRefine(1))));
        for id in 0..20 {
            assert!(kept.keep(id, &[0; MOST / 8]));
        }
        assert!(!kept.keep(20, &[0; MOST + 1]), "and nothing was given up for it");
        assert!(kept.refined(11, &[]).is_err(), "given up");
        assert!(kept.refined(12, &[]).is_ok());
        assert!(kept.refined(19, &[]).is_ok());
    }
}
