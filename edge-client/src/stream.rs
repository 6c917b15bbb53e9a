//! A bidirectional stream with a bounded window: at most so many photos are under way at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use isthmus_proto::offload_v1::infer_stream_response::Result as Outcome;
use isthmus_proto::offload_v1::{InferRequest, InferResponse, InferStreamResponse};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::balance::Retries;
use crate::{Client, ClientError, InferOptions, Payload};

/// Photos under way: when they were sent, and their place in the window.
type Pending = Arc<Mutex<HashMap<u64, (Instant, OwnedSemaphorePermit)>>>;

/// Largest window.
pub const MAX_WINDOW: usize = 1024;

/// Sending half.
pub struct Sender {
    requests: mpsc::Sender<InferRequest>,
    window: Arc<Semaphore>,
    pending: Pending,
    options: InferOptions,
    next: u64,
    /// Every photo lets a few be asked again.
    retries: Option<Retries>,
}

/// Receiving half.
pub struct Receiver {
    answers: Streaming<InferStreamResponse>,
    pending: Pending,
    deadline: Duration,
}

/// One answer of the stream.
#[derive(Debug)]
pub struct Answer {
    /// Id given by [`Sender::send`].
    pub id: u64,
    /// Time since the photo was sent.
    pub elapsed: Duration,
    /// The answer, or why there is none.
    pub result: Result<InferResponse, Status>,
}

/// Opens a stream with at most `window` photos under way.
///
/// # Errors
/// [`ClientError::Server`] if the server refuses, [`ClientError::Deadline`] if it does not answer.
pub async fn open(client: &mut Client, window: usize, options: InferOptions) -> Result<(Sender, Receiver), ClientError> {
    let window = window.clamp(1, MAX_WINDOW);
    let (requests, outgoing) = mpsc::channel(window);
    let deadline = options.deadline;
    let opening = client.raw().infer_stream(ReceiverStream::new(outgoing));
    let answers = tokio::time::timeout(deadline, opening).await.map_err(|_| ClientError::Deadline(deadline))??.into_inner();
    let pending = Pending::default();
    let sender = Sender {
        requests,
        window: Arc::new(Semaphore::new(window)),
        pending: pending.clone(),
        options,
        next: 1,
        retries: client.retries(),
    };
    Ok((sender, Receiver { answers, pending, deadline }))
}

fn ended() -> ClientError {
    Status::unavailable("the stream has ended").into()
}

impl Sender {
    /// Waits for a free place in the window, then sends. Returns the id of the answer to come.
    ///
    /// # Errors
    /// [`ClientError::Deadline`] if no answer frees a place in time, [`ClientError::Server`] if the
    /// stream has ended.
    pub async fn send(&mut self, payload: Payload) -> Result<u64, ClientError> {
        let id = self.next;
        self.next += 1;
        self.request(id, None, payload).await?;
        Ok(id)
    }

    /// As [`Self::send`] a photo whose time limit began at `since`.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_since(&mut self, since: Instant, payload: Payload) -> Result<u64, ClientError> {
        let id = self.next;
        self.next += 1;
        self.request(id, Some(since), payload).await?;
        Ok(id)
    }

    /// Sends the next refinement of the progressive bitstream whose answer, of this id, wanted more, and whose time limit began at `since`. The answer to come has
    /// the same id.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn refine(&mut self, id: u64, since: Instant, refinement: Bytes) -> Result<(), ClientError> {
        self.request(id, Some(since), Payload::Refinement(refinement)).await
    }

    async fn request(&mut self, id: u64, since: Option<Instant>, payload: Payload) -> Result<(), ClientError> {
        let deadline = self.options.deadline;
        let place = tokio::time::timeout(deadline, self.window.clone().acquire_owned());
        let place = place.await.map_err(|_| ClientError::Deadline(deadline))?.map_err(|_| ended())?;
        let passed = since.map_or(Duration::ZERO, |since| since.elapsed());
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (since.unwrap_or_else(Instant::now), place));
        if let Some(retries) = &self.retries {
            retries.first();
        }
        // no limit at all would be the server's
        let left = InferOptions { deadline: deadline.saturating_sub(passed).max(Duration::from_millis(1)), ..self.options.clone() };
        self.requests.send(left.request(id, payload)).await.map_err(|_| ended())
    }
}

impl Receiver {
    /// Photos still under way.
    pub fn pending(&self) -> usize {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The next answer, or `None` when the stream has ended and nothing is under way. A photo whose deadline
    /// passes unanswered gives an answer with DEADLINE_EXCEEDED.
    ///
    /// # Errors
    /// [`ClientError::Server`] if the stream breaks.
    pub async fn next(&mut self) -> Result<Option<Answer>, ClientError> {
        loop {
            let message = match self.oldest() {
                None => self.answers.message().await?,
                Some((id, sent)) => match tokio::time::timeout_at((sent + self.deadline).into(), self.answers.message()).await {
                    Ok(message) => message?,
                    Err(_) => {
                        self.take(id);
                        let late = Status::deadline_exceeded(format!("no answer within {:?}", self.deadline));
                        return Ok(Some(Answer { id, elapsed: sent.elapsed(), result: Err(late) }));
                    }
                },
            };
            let Some(message) = message else {
                if self.pending() > 0 {
                    return Err(Status::unavailable("the stream ended with photos unanswered").into());
                }
                return Ok(None);
            };
            let (id, result) = match message.result {
                Some(Outcome::Response(response)) => (response.id, Ok(response)),
                Some(Outcome::Error(error)) => {
                    let mut status = Status::new(Code::from(error.code), error.message);
                    if error.retry_pushback_ms > 0 {
                        status.metadata_mut().insert("grpc-retry-pushback-ms", error.retry_pushback_ms.into());
                    }
                    (error.id, Err(status))
                }
                None => return Err(Status::internal("the server sent an empty answer").into()),
            };
            // an answer to a photo that was given up comes too late
            if let Some(sent) = self.take(id) {
                return Ok(Some(Answer { id, elapsed: sent.elapsed(), result }));
            }
        }
    }

    fn take(&self, id: u64) -> Option<Instant> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id).map(|(sent, _)| sent)
    }

    fn oldest(&self) -> Option<(u64, Instant)> {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.iter().map(|(&id, (sent, _))| (id, *sent)).min_by_key(|(_, sent)| *sent)
    }
}
