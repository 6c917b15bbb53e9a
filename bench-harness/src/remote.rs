//! A server as backend.

use std::time::Duration;

use edge_client::{Client, InferOptions, Payload};

use crate::compare::Backend;
use crate::error::HarnessError;

/// A connection that asks for all logits.
pub struct Remote {
    client: Client,
    options: InferOptions,
}

impl Remote {
    /// Uses `client`, with `deadline` per request.
    pub fn new(client: Client, deadline: Duration) -> Self {
        Self { client, options: InferOptions { logits: true, top_k: 1, deadline, ..InferOptions::default() } }
    }
}

impl Backend for Remote {
    async fn logits(&mut self, payload: Payload) -> Result<Vec<f32>, HarnessError> {
        let answer = self.client.infer(payload, &self.options).await?;
        if answer.logits.is_empty() {
            return Err(HarnessError::Backend("the server sent no logits".into()));
        }
        Ok(answer.logits)
    }
}
