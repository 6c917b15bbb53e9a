//! A timer finer than the runtime's millisecond: a kernel timer as a file descriptor.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// Waits to within some tens of microseconds.
#[derive(Debug)]
pub struct Timer {
    descriptor: AsyncFd<OwnedFd>,
}

impl Timer {
    /// A timer that is not set. Must be made inside a tokio runtime.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let descriptor = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        #[allow(deprecated, reason = "unsound for types that may change their descriptor; an OwnedFd does not")]
        let descriptor = AsyncFd::new(descriptor)?;
        Ok(Self { descriptor })
    }

    /// Waits until `when`; at once if that has passed. Dropping the future leaves the timer usable.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn until(&self, when: Instant) -> io::Result<()> {
        let left = when.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        set(&self.descriptor, left)?;
        loop {
            let mut ready = self.descriptor.readable().await?;
            let mut expirations = [0; 8];
            match rustix::io::read(self.descriptor.get_ref(), &mut expirations) {
                Ok(_) => {
                    // what was set before, by a future that was dropped, may still fire
                    if Instant::now() >= when {
                        return Ok(());
                    }
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn set(descriptor: &AsyncFd<OwnedFd>, left: Duration) -> io::Result<()> {
    let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
    timerfd_settime(descriptor.get_ref(), TimerfdTimerFlags::empty(), &once)?;
    Ok(())
}
