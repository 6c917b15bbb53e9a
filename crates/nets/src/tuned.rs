//! Blocks of the backbone that belong to a decoder: copies of those behind the rebuilt layer, tuned together with it, because what it rebuilds is never quite
//! what they were made for. The backbone itself stays frozen and shared; answers from a bitstream pass the copies in place of its own blocks.

use serde::{Deserialize, Serialize};
use tch::nn;

use crate::backbone::Block;
use crate::{Backbone, BackboneKind, Layer, NetError};

/// Which blocks are tuned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunedSpec {
    /// Of which backbone.
    pub backbone: BackboneKind,
    /// The first block.
    pub first: usize,
    /// The last one.
    pub last: usize,
}

impl TunedSpec {
    /// The blocks behind `split` up to `last`.
    ///
    /// # Errors
    /// [`NetError::Format`] if there are none, or the backbone has fewer.
    pub fn new(backbone: BackboneKind, split: Layer, last: usize) -> Result<Self, NetError> {
        let first = split.next_block();
        if first == 0 || last < first || last >= backbone.block_count() {
            let why = format!("a decoder behind {split:?} of {} cannot have tuned blocks up to {last}", backbone.name());
            return Err(NetError::format("tuned_to", why));
        }
        Ok(Self { backbone, first, last })
    }

    /// Trainable parameters.
    pub fn parameters(&self) -> i64 {
        self.backbone.blocks()[self.first..=self.last].iter().map(|b| b.parameters()).sum()
    }
}

/// The copies, with weights in a `VarStore`; batch norms are folded in.
pub(crate) struct TunedBlocks {
    first: usize,
    blocks: Vec<Block>,
}

impl TunedBlocks {
    /// Creates the variables under `path`, all of them zero.
    pub fn new(path: &nn::Path, spec: &TunedSpec) -> Self {
        let all = spec.backbone.blocks();
        let blocks = (spec.first..=spec.last).map(|i| Block::variables(&(path / format!("block{i}")), all[i]));
        Self { first: spec.first, blocks: blocks.collect() }
    }

    /// Takes the weights of the backbone's own blocks.
    pub fn copy_from(&self, backbone: &Backbone) {
        self.blocks.iter().zip(&backbone.blocks()[self.first..]).for_each(|(to, from)| to.copy_from(from));
    }

    /// The backbone with these blocks in place of its own, in the type of its weights.
    #[must_use]
    pub fn within(&self, backbone: &Backbone) -> Backbone {
        backbone.with_blocks(self.first, &self.blocks)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_variables_and_blocks_that_are_not_there_are_refused() {
        for (backbone, last) in [(BackboneKind::Lite0, 10), (BackboneKind::Lite2, 14)] {
            let spec = TunedSpec::new(backbone, Layer::Block(0), last).unwrap();
            let vs = nn::VarStore::new(tch::Device::Cpu);
            let _blocks = TunedBlocks::new(&vs.root(), &spec);
            let numbers: usize = vs.variables().values().map(tch::Tensor::numel).sum();
            assert_eq!(numbers as i64, spec.parameters());
        }
        for (split, last) in [(Layer::Input, 3), (Layer::Block(4), 4), (Layer::Block(4), 16)] {
            assert!(TunedSpec::new(BackboneKind::Lite0, split, last).is_err(), "{split:?} to {last}");
        }
    }
}
