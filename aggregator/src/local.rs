//! Everything for a trial on one machine: keys of three parties, their configurations, an operator, clients.
//!
//! One person holds all keys here, so nothing is secret from anybody: for trials and tests only.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use isthmus_secagg::report::Credential;
use tokio::net::TcpSocket;

use crate::config::Config;
use crate::error::AggregatorError;
use crate::keys;

const PORTS: std::ops::Range<u16> = 20_000..32_000;
const PORT_TRIES: usize = 100;
const DAYS: u64 = 30 * 24 * 3600;

/// Where things are.
pub struct Trial {
    /// Configurations of the three parties.
    pub configs: Vec<PathBuf>,
    /// Where clients and operators go.
    pub url: String,
    /// Certificate to trust.
    pub certificate: PathBuf,
    /// The operator's token.
    pub token: PathBuf,
    /// Folder with N.key and N.credential for each client.
    pub clients: PathBuf,
    /// The authority's key.
    pub authority: PathBuf,
    /// Party 0's status page.
    pub status: SocketAddr,
    /// Ports that were chosen just now.
    _ports: Vec<TcpSocket>,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> AggregatorError + '_ {
    move |cause| AggregatorError::Io { path: path.into(), cause }
}

/// A loopback port that nobody else gets while the socket is held, and on which a party can listen meanwhile and again; below
/// those that the system gives to outgoing connections.
fn reserve_port() -> Result<(TcpSocket, u16), AggregatorError> {
    for _ in 0..PORT_TRIES {
        let seed = keys::random_seed()?;
        let port = PORTS.start + u16::from_le_bytes([seed[0], seed[1]]) % (PORTS.end - PORTS.start);
        let failed = |e: std::io::Error| AggregatorError::Transport(format!("cannot reserve port {port}: {e}"));
        let socket = TcpSocket::new_v4().map_err(failed)?;
        // bound without sharing, so that two who reserve never get the same; shared afterwards with whoever listens
        if socket.bind((Ipv4Addr::LOCALHOST, port).into()).is_ok() {
            socket.set_reuseaddr(true).map_err(failed)?;
            return Ok((socket, port));
        }
    }
    Err(AggregatorError::Transport(format!("no free port between {} and {} on loopback", PORTS.start, PORTS.end)))
}

fn open(folder: &Path) -> Result<Trial, AggregatorError> {
    let configs: Vec<PathBuf> = (0..3).map(|p| folder.join(format!("party{p}.toml"))).collect();
    let first = Config::open(&configs[0])?;
    let status = first.admin_listen.ok_or_else(|| AggregatorError::Config(format!("{}: admin_listen is missing", configs[0].display())))?;
    Ok(Trial {
        configs,
        url: format!("https://localhost:{}", first.listen.port()),
        certificate: folder.join("party0/identity.pem"),
        token: folder.join("operator.token"),
        clients: folder.join("clients"),
        authority: folder.join("authority.key"),
        status,
        _ports: Vec::new(),
    })
}

/// Enrols client number `number` of the trial in `folder`, unless it is enrolled already.
///
/// # Errors
/// If a file cannot be written.
pub fn enrol(folder: &Path, number: usize) -> Result<(), AggregatorError> {
    let clients = folder.join("clients");
    let (key, credential) = (clients.join(format!("{number}.key")), clients.join(format!("{number}.credential")));
    if credential.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(&clients).map_err(io(&clients))?;
    let public = if key.exists() { keys::open_signer(&key)?.public() } else { keys::make_signer(&key)? };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let issued = Credential::issue(&keys::open_signer(&folder.join("authority.key"))?, public, now + DAYS);
    Ok(keys::write_credential(&credential, &issued)?)
}

/// Makes what is missing in `folder`: nine ports from `port` on (0: free ones, kept from others as long as the [`Trial`] lives),
/// `clients` clients.
///
/// # Errors
/// If a file cannot be written.
pub fn set_up(folder: &Path, port: u16, clients: usize, min_clients: u32) -> Result<Trial, AggregatorError> {
    let mut ports = Vec::new();
    if !folder.join("party2.toml").exists() {
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        let authority = hex::encode(keys::make_signer(&folder.join("authority.key"))?);
        let operator = keys::make_token(&folder.join("operator.token"))?;
        let mut port = |place: u16| {
            if port != 0 {
                return Ok(port + place);
            }
            let (socket, port) = reserve_port()?;
            ports.push(socket);
            Ok::<_, AggregatorError>(port)
        };
        let address = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        for party in 0..3u8 {
            let (listen, peers, admin) = (port(u16::from(party))?, port(3 + u16::from(party))?, port(6 + u16::from(party))?);
            let own = PathBuf::from(format!("party{party}"));
            keys::make_party(&folder.join(&own), party, &format!("https://127.0.0.1:{peers}"), &["localhost".into(), "127.0.0.1".into()])?;
            let config = Config {
                task: "trial".into(),
                party,
                listen: address(listen),
                peer_listen: address(peers),
                admin_listen: Some(address(admin)),
                data: format!("party{party}.redb").into(),
                keys: own,
                parties: (0..3).map(|p| format!("party{p}/{}", keys::PUBLIC).into()).collect(),
                authorities: vec![authority.clone()],
                operators: if party == 0 { vec![operator.clone()] } else { vec![] },
                min_clients,
                uploads_per_minute: 600,
                ..Config::default()
            };
            let path = folder.join(format!("party{party}.toml"));
            let text = toml::to_string(&config).map_err(|e| AggregatorError::Config(e.to_string()))?;
            std::fs::write(&path, text).map_err(io(&path))?;
        }
    }
    for client in 0..clients {
        enrol(folder, client)?;
    }
    Ok(Trial { _ports: ports, ..open(folder)? })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_reserved_port_is_listened_on_again_and_again_but_not_reserved_twice() {
        let (_held, port) = reserve_port().unwrap();
        for _ in 0..2 {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
            assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err(), "somebody listens");
            drop(listener);
        }
        assert!(TcpSocket::new_v4().unwrap().bind((Ipv4Addr::LOCALHOST, port).into()).is_err());
    }
}
