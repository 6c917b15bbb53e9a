//! One device, one connection, one photo at a time.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use edge_client::auto::{self, AutoClient};
use edge_client::policy::Goal;
use edge_client::{Client, ClientError, Encoder, InferOptions, Payload, open_bundle};

use crate::error::HarnessError;
use crate::photos::Photo;
use crate::run::config::Prepared;
use crate::run::emulation::{Emulation, ServerProcess};
use crate::run::strategy::{AutoConfig, Device, Prepared as Made, Strategy};

/// What all parts of a run share.
pub struct Bench<'a> {
    /// The description.
    pub prepared: &'a Prepared,
    /// The server's binary.
    pub server: &'a Path,
    /// The device's networks.
    pub device: Device,
    /// The photos.
    pub photos: Vec<Photo>,
    /// The network's answer to each photo as it is.
    pub reference: Vec<u32>,
}

/// Indices of `some` of `all` photos, evenly spread: neighbours may be crops of one photo.
pub fn spread(all: usize, some: usize) -> impl Iterator<Item = usize> {
    (0..some.min(all)).map(move |i| i * all / some.min(all))
}

/// One answered request. Milliseconds.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Photo in memory to answer in memory.
    pub latency: f64,
    /// Of the device.
    pub encode: f64,
    /// Of the server.
    pub server: f64,
    /// Payload bytes.
    pub bytes: usize,
    /// As the lossless photo.
    pub agrees: bool,
    /// How it was sent or computed, if the client chose, and how often that is believed to agree.
    pub choice: Option<(String, f64)>,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// A link with a server behind it.
pub struct Site {
    /// The link.
    pub emulation: Emulation,
    /// The server; it ends with this value.
    pub process: ServerProcess,
}

impl Bench<'_> {
    /// A link from its beginning, and a server behind it.
    ///
    /// # Errors
    /// If either does not start.
    pub fn site(&self, link: &linkem::LinkConfig, seed: u64) -> Result<Site, HarnessError> {
        let config = &self.prepared.config;
        let emulation = Emulation::start(config.emulation, link, &self.prepared.folder, seed, &config.congestion_control)?;
        let process = ServerProcess::start(self.server, &config.bundle, &config.backbones, Some(&emulation))?;
        Ok(Site { emulation, process })
    }

    /// A client that chooses by itself.
    ///
    /// # Errors
    /// If its networks cannot be loaded.
    pub async fn auto(&self, site: &Site, auto: AutoConfig, deadline: Duration) -> Result<AutoClient, HarnessError> {
        let config = &self.prepared.config;
        let encoder = Encoder::new(open_bundle(&config.bundle)?, 1)?;
        let local = Device::local(&config.backbones, &encoder)?;
        let goal = Goal { deadline, aim: auto.aim, least_agreement: auto.least_agreement, local: auto.local };
        let (emulation, address) = (site.emulation.clone(), site.process.address);
        let connector = Arc::new(move || {
            let emulation = emulation.clone();
            Box::pin(async move { emulation.connect(address).await }) as _
        });
        let options = InferOptions { top_k: 1, ..InferOptions::default() };
        Ok(AutoClient::new(encoder, Some(local), connector, goal, options, config.device_slowdown).await?)
    }
}

/// A client with one fixed strategy at a time. A connection that answers late or not is given up and made anew, as
/// [`AutoClient`] does.
pub struct Session {
    emulation: Emulation,
    address: SocketAddr,
    client: Option<Client>,
    slowdown: f64,
    deadline: Duration,
}

impl Session {
    /// Connects with the first request.
    pub fn new(site: &Site, slowdown: f64, deadline: Duration) -> Self {
        Self { emulation: site.emulation.clone(), address: site.process.address, client: None, slowdown, deadline }
    }

    /// One photo with a strategy other than [`Strategy::Auto`].
    ///
    /// # Errors
    /// If the photo cannot be encoded, or is not answered within the deadline.
    pub async fn one(&mut self, device: &mut Device, strategy: Strategy, photo: &Photo, wanted: u32) -> Result<Sample, HarnessError> {
        let began = Instant::now();
        let made = device.prepare(strategy, &photo.pixels)?;
        tokio::time::sleep(began.elapsed().mul_f64(self.slowdown - 1.0)).await;
        let encode = ms(began.elapsed());
        match made {
            Made::Answer(best) => {
                let late = began.elapsed() > self.deadline;
                let sample = Sample { latency: encode, encode, server: 0.0, bytes: 0, agrees: best == wanted, choice: None };
                if late { Err(ClientError::Deadline(self.deadline).into()) } else { Ok(sample) }
            }
            Made::Send(payload) => {
                let bytes = payload.len();
                let left = self.deadline.saturating_sub(began.elapsed());
                let answer = tokio::time::timeout(left, self.send(payload, left)).await;
                let answer = answer.unwrap_or(Err(ClientError::Deadline(left))).inspect_err(|_| self.client = None)?;
                let latency = ms(began.elapsed());
                let server = answer.timing.unwrap_or_default().total_us as f64 / 1e3;
                let agrees = answer.labels.first().is_some_and(|l| l.index == wanted);
                Ok(Sample { latency, encode, server, bytes, agrees, choice: None })
            }
        }
    }

    async fn send(&mut self, payload: Payload, left: Duration) -> Result<isthmus_proto::offload_v1::InferResponse, ClientError> {
        let options = InferOptions { top_k: 1, deadline: left, ..InferOptions::default() };
        let mut client = match &self.client {
            Some(client) => client.clone(),
            None => self.client.insert(self.emulation.connect(self.address).await?).clone(),
        };
        client.infer(payload, &options).await
    }
}

/// One photo by a client that chooses.
///
/// # Errors
/// If it is not answered within the deadline.
pub async fn choose(client: &mut AutoClient, photo: &Photo, wanted: u32) -> Result<Sample, HarnessError> {
    let photo = auto::Photo { pixels: photo.pixels.clone(), file: None };
    let answer = client.classify(&photo).await?;
    let agrees = answer.labels.first().is_some_and(|l| l.index == wanted);
    let believed = client.policy().agreement(answer.choice).unwrap_or_default();
    let choice = Some((answer.choice.to_string(), believed));
    let (latency, encode, server) = (ms(answer.elapsed), ms(answer.device), ms(answer.server));
    Ok(Sample { latency, encode, server, bytes: answer.bytes, agrees, choice })
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn photos_are_spread_over_all() {
        assert_eq!(spread(10, 3).collect::<Vec<_>>(), [0, 3, 6]);
        assert_eq!(spread(2, 5).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(spread(0, 5).count(), 0);
    }
}
