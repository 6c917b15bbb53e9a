//! Streams of requests: a bounded window of them under way, answers as they are ready.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::ServerError;
use crate::error::of_transport;
use crate::pipeline::{Pipeline, Places};
use crate::telemetry::{self, StreamEnd};
use crate::tenants::Tenant;

/// The answers of a stream, and the status that ends it.
pub type Answers<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// Answers every request of a stream with `answer`; the places beside an answer are held until the transport has taken it.
///
/// # Errors
/// [`ServerError::Busy`] if too many streams are open.
pub fn serve<Q, A, F>(
    (pipeline, tenant): (&Arc<Pipeline>, &Tenant),
    requests: Streaming<Q>,
    answer: impl Fn(Q) -> F + Send + Sync + 'static,
) -> Result<Answers<A>, ServerError>
where
    Q: Send + 'static,
    A: Send + 'static,
    F: Future<Output = (A, Option<Places>)> + Send + 'static,
{
    let place = tenant.stream()?;
    let (answers, outgoing) = mpsc::channel(pipeline.window);
    let pipeline = pipeline.clone();
    // a place of its own for the status that ends the stream: the channel may be full
    let (last, ending) = oneshot::channel();
    tokio::spawn(async move {
        let (by, status) = pump(&pipeline, requests, answer, answers).await;
        telemetry::stream_ended(by);
        if let Some(status) = status {
            let _ = last.send(Err(status));
        }
        drop(place);
    });
    let ending = futures_util::stream::once(ending).filter_map(|last| std::future::ready(last.ok()));
    Ok(Box::pin(ReceiverStream::new(outgoing).map(|(answer, _places)| answer).chain(ending)))
}

/// Reads requests while the window has room and answers each as it is ready. The stream ends with the client's
/// half-close; with DEADLINE_EXCEEDED if nothing moves for too long, UNAVAILABLE when the server drains or the stream is old, or the
/// transport's status for an unreadable message, after what is under way has been answered; with DEADLINE_EXCEEDED
/// if the client does not read its answers. Dropping the set of tasks cancels what is under way. Gives what ended it.
async fn pump<Q, A, F>(
    pipeline: &Pipeline,
    mut requests: Streaming<Q>,
    answer: impl Fn(Q) -> F,
    answers: mpsc::Sender<(Result<A, Status>, Option<Places>)>,
) -> (StreamEnd, Option<Status>)
where
    A: Send + 'static,
    F: Future<Output = (A, Option<Places>)> + Send + 'static,
{
    let mut tasks: JoinSet<Result<(), ()>> = JoinSet::new();
    let mut ending: Option<(StreamEnd, Option<Status>)> = None;
    let refused = |by, error: ServerError| Some((by, Some(error.into())));
    let idle = pipeline.stream_idle;
    let mut aged = std::pin::pin!(async {
        match pipeline.next_stream_age() {
            Some(age) => tokio::time::sleep(age).await,
            None => std::future::pending().await,
        }
    });
    while ending.is_none() || !tasks.is_empty() {
        let open = ending.is_none();
        let room = open && tasks.len() < pipeline.window;
        tokio::select! {
            () = answers.closed() => return (StreamEnd::Left, None),
            () = pipeline.draining.cancelled(), if open => ending = refused(StreamEnd::Draining, ServerError::Draining),
            () = &mut aged, if open => ending = refused(StreamEnd::Age, ServerError::Aged),
            done = tasks.join_next(), if !tasks.is_empty() => {
                if matches!(done, Some(Err(_))) {
                    return (StreamEnd::Failed, Some(ServerError::Network("an answer failed".into()).into()));
                }
                if !matches!(done, Some(Ok(Ok(())))) {
                    return (StreamEnd::Unread, Some(ServerError::Deadline("waiting to be read by the client").into()));
                }
            }
            message = tokio::time::timeout(idle, requests.message()), if room => match message {
                Ok(Ok(Some(request))) => {
                    let (answered, answers) = (answer(request), answers.clone());
                    tasks.spawn(async move {
                        let (answer, places) = answered.await;
                        let sent = tokio::time::timeout(idle, answers.send((Ok(answer), places))).await;
                        sent.map_err(|_| ())?.map_err(|_| ())
                    });
                }
                Ok(Ok(None)) => ending = Some((StreamEnd::Done, None)),
                Ok(Err(status)) => ending = Some((StreamEnd::Failed, Some(of_transport(status)))),
                Err(_) if tasks.is_empty() => ending = refused(StreamEnd::Idle, ServerError::Deadline("awaited: the stream was idle")),
                Err(_) => {}
            },
        }
    }
    ending.unwrap_or((StreamEnd::Done, None))
}
