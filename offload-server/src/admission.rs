//! Refuses at the door, before it is decoded, what could not be answered in time.
//!
//! Under more load than a server can carry, first-in-first-out queues answer every request late: all work is in vain. So a request's cost
//! is predicted before anything is spent on it: its layers on the roofline times the factor that the last batches took of that
//! (`crate::batcher`), behind what waits in the network's queue and behind what was let in and is still being decoded, which is kept here.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What was let in and has not reached the network's queue.
#[derive(Default)]
pub struct Admission {
    ahead: Mutex<Duration>,
}

/// A request between the door and the queue.
pub struct Admitted<'a> {
    admission: &'a Admission,
    cost: Duration,
}

impl Admission {
    /// Lets a request in that the network will take `cost` for, if `fits` says so of the predicted work ahead of it.
    ///
    /// # Errors
    /// What `fits` says.
    pub fn enter<E>(&self, cost: Duration, fits: impl FnOnce(Duration) -> Result<(), E>) -> Result<Admitted<'_>, E> {
        // held over both steps: of two that come at once, the second sees the first
        let mut ahead = self.ahead();
        fits(*ahead)?;
        *ahead += cost;
        Ok(Admitted { admission: self, cost })
    }

    fn ahead(&self) -> MutexGuard<'_, Duration> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let mut ahead = self.admission.ahead();
        *ahead = ahead.saturating_sub(self.cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn those_being_decoded_count_until_they_are_queued() {
        let admission = Admission::default();
        let enter = |most: Duration| admission.enter(10 * MS, |ahead| if ahead <= most { Ok(()) } else { Err(ahead) });
        let (first, second) = (enter(Duration::ZERO).unwrap(), enter(10 * MS).unwrap());
        assert_eq!(enter(15 * MS).err(), Some(20 * MS));
        drop(first);
        assert!(enter(15 * MS).is_ok());
        drop(second);
        assert!(enter(Duration::ZERO).is_ok());
    }
}
