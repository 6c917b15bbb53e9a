//! Making and checking reports.

use isthmus_proto::aggregator_v1::{Mode, ReportHeader};
use isthmus_secagg::boolean3::share::Upload;
use isthmus_secagg::report::{Credential, ReportId, SignKey, hash};
use isthmus_secagg::{Bits, ReportContext, SecAggError, additive2};
use rand::CryptoRng;

use crate::error::FederateError;
use crate::round::{RoundPlan, fixed};

/// A client's identity: its key, and the authority's word for it.
pub struct Identity {
    /// Signs reports.
    pub key: SignKey,
    /// For the key's public half.
    pub credential: Credential,
}

/// A report that can be sent, as often as needed: sending the same again counts once.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Goes to every party.
    pub header: ReportHeader,
    /// Goes to the parties that hold bodies; uniform by itself.
    pub body: Vec<u8>,
}

/// Splits, seals and signs the bits of a client.
///
/// # Errors
/// If the bits are not as many as the round's, or a party's key is unusable.
pub fn make(plan: &RoundPlan, bits: &Bits, identity: &Identity, rng: &mut impl CryptoRng) -> Result<Report, FederateError> {
    if bits.len() != plan.bits() {
        return Err(SecAggError::Size { what: "bits of a report", expected: plan.bits(), found: bits.len() }.into());
    }
    let mut report = [0; 16];
    rng.fill_bytes(&mut report);
    let context = ReportContext { task: plan.task(), round: plan.round(), report };
    let (body, seeds) = match plan.config().mode() {
        Mode::Additive2 => {
            let upload = additive2::split(bits, plan.config().max_clients, &context, rng)?;
            (upload.residues, vec![vec![], vec![upload.k0]])
        }
        _ => {
            let Upload { s0, k1, k2 } = Upload::split(bits, &context, rng);
            (s0.to_bytes(), vec![vec![k1.clone()], vec![k1, k2.clone()], vec![k2]])
        }
    };
    let id = ReportId { config: plan.hash(), round: plan.round(), client: identity.key.public(), report, body: hash(&[&body]) };
    let mut envelopes = Vec::new();
    for (party, seeds) in (0..).zip(&seeds) {
        let key = plan.envelope_key(party).ok_or_else(|| FederateError::Invalid(format!("party {party} has no key")))?;
        envelopes.push(id.seal(party, key, &seeds.iter().collect::<Vec<_>>(), rng)?);
    }
    let header = ReportHeader {
        config_hash: id.config.to_vec().into(),
        round: id.round,
        report: report.to_vec().into(),
        client: id.client.to_vec().into(),
        credential_expires: identity.credential.expires,
        credential: identity.credential.signature.to_vec().into(),
        body_hash: id.body.to_vec().into(),
        signature: id.sign(&identity.key, &envelopes).to_vec().into(),
        envelopes: envelopes.into_iter().map(Into::into).collect(),
    };
    Ok(Report { header, body })
}

/// Checks a header at `now` (seconds since 1970): round, client and signature, and the sizes of the envelopes.
///
/// # Errors
/// Says what is wrong.
pub fn check(plan: &RoundPlan, header: &ReportHeader, now: u64) -> Result<ReportId, FederateError> {
    let id = ReportId {
        config: fixed("config_hash", &header.config_hash)?,
        round: header.round,
        client: fixed("client", &header.client)?,
        report: fixed("report", &header.report)?,
        body: fixed("body_hash", &header.body_hash)?,
    };
    let (credential, signature) = (fixed("credential", &header.credential)?, fixed("signature", &header.signature)?);
    if id.config != plan.hash() || id.round != plan.round() {
        return Err(FederateError::OtherConfig(plan.round()));
    }
    if header.envelopes.len() != usize::from(plan.parties()) {
        return Err(FederateError::Invalid(format!("{} envelopes instead of {}", header.envelopes.len(), plan.parties())));
    }
    for (party, envelope) in (0..).zip(&header.envelopes) {
        if envelope.len() != plan.envelope_bytes(party) {
            let expected = plan.envelope_bytes(party);
            return Err(FederateError::Invalid(format!("envelope {party}: {} bytes instead of {expected}", envelope.len())));
        }
    }
    Credential { client: id.client, expires: header.credential_expires, signature: credential }.check(plan.authorities(), now)?;
    let envelopes: Vec<Vec<u8>> = header.envelopes.iter().map(|e| e.to_vec()).collect();
    id.check(&envelopes, &signature)?;
    if !plan.admits(&id.client) {
        return Err(SecAggError::Authentication("the client was not drawn for this round").into());
    }
    Ok(id)
}

/// Checks a body against its header and the round.
///
/// # Errors
/// If its size, its hash or the bits after its last are wrong.
pub fn check_body(plan: &RoundPlan, id: &ReportId, body: &[u8]) -> Result<(), FederateError> {
    if body.len() != plan.body_bytes() {
        return Err(SecAggError::Size { what: "bytes of the body", expected: plan.body_bytes(), found: body.len() }.into());
    }
    if hash(&[body]) != id.body {
        return Err(SecAggError::Authentication("the body is not the one that the report was signed for").into());
    }
    match plan.config().mode() {
        Mode::Additive2 => additive2::Sum::new(plan.bits(), plan.config().max_clients)?.add_residues(body)?,
        _ => drop(Bits::from_bytes(plan.bits(), body)?),
    }
    Ok(())
}
