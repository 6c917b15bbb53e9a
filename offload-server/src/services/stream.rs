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
use crate::pipeline::Pipeline;
use crate::tenants::Tenant;

/// The answers of a stream, and the status that ends it.
pub type Answers<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// Answers every request of a stream with `answer`.
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
    F: Future<Output = A> + Send + 'static,
{
    let (place, open) = (tenant.stream()?, pipeline.open.enter());
    let (answers, outgoing) = mpsc::channel(pipeline.window);
    let pipeline = pipeline.clone();
    // a place of its own for the status that ends the stream: the channel may be full
    let (last, ending) = oneshot::channel();
    tokio::spawn(async move {
        if let Some(status) = pump(&pipeline, requests, answer, answers).await {
            let _ = last.send(Err(status));
        }
        drop(place);
    });
    let ending = futures_util::stream::once(ending).filter_map(|last| std::future::ready(last.ok()));
    // open until the client has taken its last answer
    Ok(Box::pin(ReceiverStream::new(outgoing).chain(ending).inspect(move |_| _ = &open)))
}

/// Reads requests while the window has room and answers each as it is ready. The stream ends with the client's
/// half-close; with DEADLINE_EXCEEDED if nothing moves for too long, UNAVAILABLE when the server drains or the stream is old, or the
/// transport's status for an unreadable message, after what is under way has been answered; with DEADLINE_EXCEEDED
/// if the client does not read its answers. Dropping the set of tasks cancels what is under way.
async fn pump<Q, A, F>(
    pipeline: &Pipeline,
    mut requests: Streaming<Q>,
    answer: impl Fn(Q) -> F,
    answers: mpsc::Sender<Result<A, Status>>,
) -> Option<Status>
where
    A: Send + 'static,
    F: Future<Output = A> + Send + 'static,
{
    let mut tasks: JoinSet<Result<(), ()>> = JoinSet::new();
    let mut ending: Option<Result<(), Status>> = None;
    let idle = pipeline.stream_idle;
    let mut aged = std::pin::pin!(async {
        if pipeline.stream_age.is_zero() {
            return std::future::pending().await;
        }
        tokio::time::sleep(pipeline.stream_age).await;
    });
    while ending.is_none() || !tasks.is_empty() {
        let open = ending.is_none();
        let room = open && tasks.len() < pipeline.window;
        tokio::select! {
            () = answers.closed() => return None,
            () = pipeline.draining.cancelled(), if open => ending = Some(Err(ServerError::Draining.into())),
            () = &mut aged, if open => ending = Some(Err(ServerError::Aged.into())),
            done = tasks.join_next(), if !tasks.is_empty() => {
                if matches!(done, Some(Err(_))) {
                    return Some(ServerError::Network("an answer failed".into()).into());
                }
                if !matches!(done, Some(Ok(Ok(())))) {
                    return Some(ServerError::Deadline("waiting to be read by the client").into());
                }
            }
            message = tokio::time::timeout(idle, requests.message()), if room => match message {
                Ok(Ok(Some(request))) => {
                    let (answered, answers) = (answer(request), answers.clone());
                    tasks.spawn(async move {
                        let answered = answered.await;
                        let sent = tokio::time::timeout(idle, answers.send(Ok(answered))).await;
                        sent.map_err(|_| ())?.map_err(|_| ())
                    });
                }
                Ok(Ok(None)) => ending = Some(Ok(())),
                Ok(Err(status)) => ending = Some(Err(of_transport(status))),
                Err(_) if tasks.is_empty() => ending = Some(Err(ServerError::Deadline("awaited: the stream was idle").into())),
                Err(_) => {}
            },
        }
    }
    ending.and_then(Result::err)
}
