//! Batching with deadlines, priorities and fair shares.
//!
//! [`Queue`] decides: what may wait, what runs next and together with what, when an incomplete batch is closed. It has no clock and no
//! threads: every call is told the time. [`Pool`] runs it with worker threads on the system's clock.
//!
//! * **Bounded**: by requests and by predicted cost. What does not fit is refused at once, never queued.
//! * **Deadlines**: an entry that by prediction cannot be done in time is refused at once; one that expired while it waited is
//!   handed back, never computed; a batch is closed early where waiting for company would cost a member its deadline.
//! * **Order**: by priority, then by weighted fair shares of the tenants (start-time fair queueing, Goyal et al. 1996), then first come.
//! * **Batches** hold entries of one key (networks that can run together), up to the largest size; preferred sizes and a longest delay say
//!   how long company is waited for.

#![forbid(unsafe_code)]

mod pool;
mod queue;

pub use pool::{Pool, Work};
pub use queue::{Asked, Batch, Closed, Entry, Limits, Load, Next, Queue, Refused, Ticket};
