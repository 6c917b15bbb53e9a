//! Refuses at the door what could not be answered in time.
//!
//! Under more load than a server can carry, first-in-first-out queues answer every request late: all work is in vain. So each
//! request's wait is predicted from how many are before it and how fast requests have been leaving with an answer, whatever it is
//! that they wait for. Whoever was let in and had no answer in time makes the prediction longer, so that fewer are let in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{ServerError, telemetry};

/// Answers that the average spans: several batches, whose members leave together.
const SPAN: f64 = 64.0;
/// Answers that the first guess is worth.
const GUESS: f64 = 16.0;

/// Counts requests in and out.
pub struct Admission {
    max_batch: u32,
    flow: Mutex<Flow>,
}

#[derive(Default)]
struct Flow {
    inside: u32,
    /// Average seconds between answers while there was something to do.
    interval: f64,
    /// Answers in it, up to the span.
    answers: f64,
    /// The later of the last answer and the last time that there was nothing to do.
    since: Option<Instant>,
}

/// A request inside; leaves when dropped.
pub struct Admitted(Arc<Admission>);

impl Admission {
    /// For requests that are computed at most `max_batch` together; `alone` is what one takes by itself, the first guess.
    pub fn new(max_batch: usize, alone: Duration) -> Arc<Self> {
        let flow = Flow { interval: alone.as_secs_f64(), answers: GUESS, ..Flow::default() };
        Arc::new(Self { max_batch: u32::try_from(max_batch).unwrap_or(u32::MAX), flow: Mutex::new(flow) })
    }

    /// Lets a request in that has `budget` left; if there is no other, always.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if its answer would come too late.
    pub fn enter(self: &Arc<Self>, budget: Duration) -> Result<Admitted, ServerError> {
        self.enter_at(budget, Instant::now())
    }

    fn enter_at(self: &Arc<Self>, budget: Duration, now: Instant) -> Result<Admitted, ServerError> {
        let mut flow = self.flow();
        // its batch ends for all of its members at once, and those that come later fill it
        let until = flow.inside.saturating_add(flow.inside.min(self.max_batch));
        if f64::from(until) * flow.interval > budget.as_secs_f64() {
            telemetry::dropped("overload");
            return Err(ServerError::Busy("those before it take longer than its deadline allows"));
        }
        if flow.inside == 0 {
            flow.since = Some(now);
        }
        flow.inside += 1;
        Ok(Admitted(self.clone()))
    }

    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One has its answer. A late one tells that an answer takes at least as long as it has been awaited, no more.
    fn leave_at(&self, in_time: bool, now: Instant) {
        let mut flow = self.flow();
        let passed = flow.since.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64());
        if in_time {
            flow.since = Some(now);
        } else if passed <= flow.interval {
            return;
        }
        flow.answers = (flow.answers + 1.0).min(SPAN);
        flow.interval += (passed - flow.interval) / flow.answers;
    }
}

impl Admitted {
    /// Its answer is ready, be it that the request was wrong; or its deadline has passed.
    pub fn leave(self, in_time: bool) {
        self.0.leave_at(in_time, Instant::now());
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.flow().inside -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// `n` requests that come one after the other and take `each`.
    fn carry(admission: &Arc<Admission>, mut now: Instant, n: u32, each: Duration) -> Instant {
        for _ in 0..n {
            let one = admission.enter_at(Duration::ZERO, now).unwrap();
            now += each;
            admission.leave_at(true, now);
            drop(one);
        }
        now
    }

    #[test]
    fn who_would_be_late_is_refused() {
        let admission = Admission::new(4, 30 * MS);
        let now = carry(&admission, Instant::now(), 1000, 10 * MS);
        let enter = |budget| admission.enter_at(budget, now);
        let inside: Vec<_> = (0..8).map(|_| enter(1000 * MS).unwrap()).collect();
        assert!(matches!(enter(115 * MS), Err(ServerError::Busy(_))), "8 before it and a batch of 4, 10 ms each");
        let one_more = enter(125 * MS).unwrap();
        drop((inside, one_more));
        assert!(enter(Duration::ZERO).is_ok(), "an idle server takes any");
    }

    #[test]
    fn answers_that_come_together_count_as_many() {
        let admission = Admission::new(16, MS);
        let mut now = Instant::now();
        for _ in 0..40 {
            let batch: Vec<_> = (0..16).map(|_| admission.enter_at(Duration::MAX, now).unwrap()).collect();
            now += 160 * MS;
            batch.iter().for_each(|_| admission.leave_at(true, now));
        }
        let interval = admission.flow().interval;
        assert!((0.008..0.012).contains(&interval), "{interval}");
    }

    #[test]
    fn late_answers_let_fewer_in() {
        let admission = Admission::new(16, MS);
        let mut now = Instant::now();
        let enter = |now| admission.enter_at(500 * MS, now).ok();
        let burst = |now| std::iter::from_fn(move || enter(now)).take(1000).collect::<Vec<_>>();
        assert!(burst(now).len() > 400, "the guess was far too good");
        for _ in 0..3 {
            let inside = burst(now);
            now += 500 * MS;
            inside.iter().for_each(|_| admission.leave_at(false, now));
        }
        assert!(burst(now).len() < 4);
        drop(burst(now));
        // whoever asks for the impossible learns nothing about others
        let hasty = admission.enter_at(MS, now).unwrap();
        let before = admission.flow().interval;
        admission.leave_at(false, now + MS);
        drop(hasty);
        assert_eq!(admission.flow().interval, before);
    }

    #[test]
    fn a_stall_is_forgotten() {
        let admission = Admission::new(1, MS);
        let now = carry(&admission, Instant::now(), 100, 10 * MS);
        let now = carry(&admission, now, 1, Duration::from_secs(10));
        let first = admission.enter_at(Duration::ZERO, now).unwrap();
        assert!(admission.enter_at(200 * MS, now).is_err());
        drop(first);
        let now = carry(&admission, now, 300, 10 * MS);
        let _first = admission.enter_at(Duration::ZERO, now).unwrap();
        assert!(admission.enter_at(100 * MS, now).is_ok());
    }
}
