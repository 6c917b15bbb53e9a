//! Counting a sealed set under shares: [`inbox`] takes the next party's messages, [`engine`] runs the circuits block by block,
//! [`attempt`] joins the two to the round's state.

pub mod attempt;
pub mod engine;
pub mod inbox;

/// Blocks under way at once. A protocol constant: a party may be so many blocks ahead of its neighbour.
pub const WINDOW: usize = 8;
/// Words of a block's shares, over all clients: 2 MiB for each of the two shares.
pub const BLOCK_SHARES: usize = 1 << 18;
/// Widest block: a chunk of the store.
pub const MAX_WIDTH: usize = crate::store::CHUNK_BYTES / 8;

/// Words of a block of `clients` rows: a power of two, so that blocks do not straddle chunks.
pub fn block_width(clients: usize) -> usize {
    let fits = (BLOCK_SHARES / clients.max(1)).max(1);
    let power = if fits.is_power_of_two() { fits } else { fits.next_power_of_two() / 2 };
    power.min(MAX_WIDTH)
}
