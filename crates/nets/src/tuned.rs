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
