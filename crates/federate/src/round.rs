//! A round's configuration, checked, and what follows from it: sizes, who may take part, how updates are coded.

use isthmus_proto::aggregator_v1::{Filter, Mode, RoundConfig, Transform as WireTransform};
use isthmus_secagg::additive2::residue_bits;
use isthmus_secagg::quantise::Blocks;
use isthmus_secagg::report::{KEY_BYTES, SEAL_BYTES, hash};
use isthmus_secagg::{Quantiser, Scale, Seed, Transform};
use prost::Message;

use crate::error::FederateError;

/// Version of the protocol.
pub const VERSION: u32 = 1;
/// Most clients of a round: a level's message of one word a client stays within 1 MiB.
pub const MAX_CLIENTS: u32 = 1 << 17;
/// Most bits after the coded coordinates.
pub const MAX_EXTRA_BITS: u32 = 1 << 16;
/// Largest encoded configuration.
pub const MAX_CONFIG_BYTES: usize = 64 << 10;

/// A configuration and its hash.
#[derive(Debug, Clone)]
pub struct RoundPlan {
    config: RoundConfig,
    bytes: Vec<u8>,
    hash: [u8; 32],
    task: [u8; 32],
    rotation: [u8; 32],
    authorities: Vec<[u8; KEY_BYTES]>,
    envelope_keys: Vec<[u8; KEY_BYTES]>,
    coded: usize,
}

fn invalid<T>(why: impl Into<String>) -> Result<T, FederateError> {
    Err(FederateError::Invalid(why.into()))
}

/// A field of fixed size.
///
/// # Errors
/// If it has another size.
pub fn fixed<const N: usize>(what: &str, bytes: &[u8]) -> Result<[u8; N], FederateError> {
    bytes.try_into().or_else(|_| invalid(format!("{what}: {} bytes instead of {N}", bytes.len())))
}

/// The task with this name.
pub fn task_id(name: &str) -> [u8; 32] {
    hash(&[b"isthmus/v1/task", name.as_bytes()])
}

impl RoundPlan {
    /// From the bytes that party 0 encoded.
    ///
    /// # Errors
    /// Says which field makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, FederateError> {
        if bytes.len() > MAX_CONFIG_BYTES {
            return invalid(format!("a round's configuration has at most {MAX_CONFIG_BYTES} bytes, not {}", bytes.len()));
        }
        let config = RoundConfig::decode(bytes).or_else(|e| invalid(format!("round configuration: {e}")))?;
        if config.version != VERSION {
            return invalid(format!("protocol version {} is not known here ({VERSION} is)", config.version));
        }
        let task = fixed("task", &config.task)?;
        let rotation = fixed("rotation", &config.rotation)?;
        let parties = match config.mode() {
            Mode::Boolean3 => 3,
            Mode::Additive2 => 2,
            Mode::Unspecified => return invalid("mode: MODE_BOOLEAN_3 or MODE_ADDITIVE_2"),
        };
        let transform = transform(config.transform())?;
        Scale::public(config.norm, transform)?;
        let coded = Blocks::new(config.dim as usize, transform)?.coded();
        if config.extra_bits > MAX_EXTRA_BITS {
            return invalid(format!("extra_bits: at most {MAX_EXTRA_BITS}, not {}", config.extra_bits));
        }
        if config.min_clients < 2 || config.min_clients > config.max_clients || config.max_clients > MAX_CLIENTS {
            return invalid(format!(
                "2 <= min_clients <= max_clients <= {MAX_CLIENTS}, not {} and {}",
                config.min_clients, config.max_clients
            ));
        }
        if config.upload_until_ms > config.compute_until_ms {
            return invalid("compute_until_ms is before upload_until_ms");
        }
        let keys = |what: &str, keys: &[Vec<u8>]| keys.iter().map(|k| fixed(what, k)).collect::<Result<Vec<_>, _>>();
        let keys_of = |what: &str, list: &[prost::bytes::Bytes]| keys(what, &list.iter().map(|k| k.to_vec()).collect::<Vec<_>>());
        let envelope_keys = keys_of("envelope_keys", &config.envelope_keys)?;
        if envelope_keys.len() != parties {
            return invalid(format!("envelope_keys: {} instead of {parties}", envelope_keys.len()));
        }
        let authorities = keys_of("authorities", &config.authorities)?;
        if authorities.is_empty() || authorities.len() > 16 {
            return invalid(format!("authorities: 1 to 16, not {}", authorities.len()));
        }
        if let Some(filter) = &config.filter {
            if parties != 3 {
                return invalid("filter: only in mode MODE_BOOLEAN_3");
            }
            if filter.drop == 0 || filter.drop >= config.min_clients {
                return invalid(format!("filter.drop: 1 to min_clients - 1, not {}", filter.drop));
            }
            fixed::<32>("filter.direction_hash", &filter.direction_hash)?;
        }
        if let Some(model) = &config.model {
            fixed::<32>("model.sha256", &model.sha256)?;
        }
        let hash = hash(&[b"isthmus/v1/config", bytes]);
        Ok(Self { config, bytes: bytes.to_vec(), hash, task, rotation, authorities, envelope_keys, coded })
    }

    /// Encodes a configuration and checks it.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn encode(config: &RoundConfig) -> Result<Self, FederateError> {
        Self::decode(&config.encode_to_vec())
    }

    /// The fields.
    pub fn config(&self) -> &RoundConfig {
        &self.config
    }

    /// As encoded.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Hash of the encoded bytes.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// The training task.
    pub fn task(&self) -> [u8; 32] {
        self.task
    }

    /// The round.
    pub fn round(&self) -> u64 {
        self.config.round
    }

    /// Authorities whose credentials count.
    pub fn authorities(&self) -> &[[u8; KEY_BYTES]] {
        &self.authorities
    }

    /// Public key of a party's envelopes.
    pub fn envelope_key(&self, party: u8) -> Option<&[u8; KEY_BYTES]> {
        self.envelope_keys.get(usize::from(party))
    }

    /// Parties that take part.
    pub fn parties(&self) -> u8 {
        self.envelope_keys.len() as u8
    }

    /// Coded coordinates.
    pub fn coded(&self) -> usize {
        self.coded
    }

    /// Bits of a report.
    pub fn bits(&self) -> usize {
        self.coded + self.config.extra_bits as usize
    }

    /// Bytes of a report's body.
    pub fn body_bytes(&self) -> usize {
        match self.config.mode() {
            Mode::Additive2 => (self.bits() * residue_bits(self.config.max_clients) as usize).div_ceil(8),
            _ => self.bits().div_ceil(8),
        }
    }

    /// Whether a party stores bodies.
    pub fn holds_body(&self, party: u8) -> bool {
        party == 0 || (party == 2 && self.parties() == 3)
    }

    /// Seeds in a party's envelope.
    pub fn seeds(&self, party: u8) -> usize {
        match (self.config.mode(), party) {
            (Mode::Boolean3, 1) => 2,
            (Mode::Boolean3, _) | (_, 1) => 1,
            _ => 0,
        }
    }

    /// Bytes of a party's envelope.
    pub fn envelope_bytes(&self, party: u8) -> usize {
        SEAL_BYTES + 32 * self.seeds(party)
    }

    /// Whether a client was drawn for this round.
    pub fn admits(&self, client: &[u8; KEY_BYTES]) -> bool {
        let drawn = hash(&[b"isthmus/v1/sampling", &self.rotation, client]);
        let below = self.config.sampling_below;
        below == 0 || u32::from_le_bytes([drawn[0], drawn[1], drawn[2], drawn[3]]) < below
    }

    /// The filter, if there is one.
    pub fn filter(&self) -> Option<&Filter> {
        self.config.filter.as_ref()
    }

    /// How updates are coded: allocates a bit for each coded coordinate.
    ///
    /// # Errors
    /// None for a checked configuration.
    pub fn quantiser(&self) -> Result<Quantiser, FederateError> {
        Ok(Quantiser::new(self.config.dim as usize, transform(self.config.transform())?, &Seed::from_bytes(self.rotation))?)
    }

    /// Values of the bits.
    ///
    /// # Errors
    /// None for a checked configuration.
    pub fn scale(&self) -> Result<Scale, FederateError> {
        Ok(Scale::public(self.config.norm, transform(self.config.transform())?)?)
    }

    /// The mean of the clients' updates from a result's counts, of which the first [`Self::coded`] are used.
    ///
    /// # Errors
    /// If there are too few counts, or one is above the number of clients.
    pub fn mean(&self, counts: &[u32], clients: u32) -> Result<Vec<f64>, FederateError> {
        let Some(counts) = counts.get(..self.coded) else {
            return invalid(format!("a result of this round has {} counts, not {}", self.bits(), counts.len()));
        };
        Ok(self.quantiser()?.mean(counts, clients, &self.scale()?)?)
    }

    /// Signs of `update` in this round's coded coordinates, in words: the direction of a filter.
    ///
    /// # Errors
    /// If it has another dimension.
    pub fn direction(&self, update: &[f64]) -> Result<Vec<u64>, FederateError> {
        let update: Vec<f32> = update.iter().map(|v| *v as f32).collect();
        let coded = self.quantiser()?.forward(&update)?;
        let word = |chunk: &[f32]| chunk.iter().enumerate().fold(0, |w, (j, v)| w | u64::from(*v > 0.0) << j);
        Ok(coded.chunks(64).map(word).collect())
    }
}

/// Hash of a filter's direction.
pub fn direction_hash(direction: &[u64]) -> [u8; 32] {
    let bytes: Vec<u8> = direction.iter().flat_map(|w| w.to_le_bytes()).collect();
    hash(&[b"isthmus/v1/direction", &bytes])
}

fn transform(wire: WireTransform) -> Result<Transform, FederateError> {
    match wire {
        WireTransform::Hadamard => Ok(Transform::Hadamard),
        WireTransform::Kashin => Ok(Transform::Kashin),
        WireTransform::Unspecified => invalid("transform: TRANSFORM_HADAMARD or TRANSFORM_KASHIN"),
    }
}
