//! A server behind an emulated link, at either level.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use edge_client::{Client, ClientError, Endpoint};
use linkem::LinkConfig;
use linkem::driver::namespace::missing;
use linkem::driver::packet::{self, PacketLink};
use linkem::driver::stream::{self, StreamLink};
use tokio::net::TcpStream;

use crate::error::HarnessError;
use crate::run::config::EmulationKind;
use crate::run::results::Emulator;

/// Handshake and first request may take this long beside the link's round trips.
const CONNECT: Duration = Duration::from_secs(20);

/// A server that does not say where it listens within this time has not started.
const START: Duration = Duration::from_secs(60);

/// A link between this process and servers; clones share it.
#[derive(Clone)]
pub enum Emulation {
    /// Two namespaces; the server runs in one, connections start in the other.
    Packet(Arc<PacketLink>),
    /// Shaped streams to a server on loopback.
    Stream(Arc<StreamLink>),
}

/// An offload-server that ends with this value.
pub struct ServerProcess {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ServerProcess {
    /// Starts `binary` with a bundle; in the link's server namespace if it has one, without a link on loopback.
    ///
    /// # Errors
    /// If it does not start; its own message is on standard error.
    pub fn start(binary: &Path, bundle: &Path, backbones: &Path, emulation: Option<&Emulation>) -> Result<Self, HarnessError> {
        let (mut command, host) = match emulation {
            Some(Emulation::Packet(link)) => (link.server().command(binary), packet::SERVER),
            Some(Emulation::Stream(_)) | None => (Command::new(binary), Ipv4Addr::LOCALHOST),
        };
        command.args(["--listen", &format!("{host}:0"), "--admin-listen", "127.0.0.1:0", "--insecure", "--bundle"]).arg(bundle);
        command.arg("--backbones").arg(backbones);
        // the pipe ends with this process, however that ends
        command.arg("--while-stdin").env("RUST_LOG", "warn").stdin(Stdio::piped()).stdout(Stdio::piped());
        let name = binary.display().to_string();
        let mut child =
            command.spawn().map_err(|e| HarnessError::data(name.clone(), format!("{e}; build it, or name it with --server")))?;
        let (send, line) = std::sync::mpsc::channel();
        let output = child.stdout.take();
        // a thread of its own: reading has no limit; it ends with the server
        std::thread::spawn(move || send.send(output.and_then(|out| BufReader::new(out).lines().next()?.ok())));
        let line = line.recv_timeout(START).ok().flatten();
        let address = line.as_deref().and_then(|l| l.strip_prefix("listening on ")).and_then(|a| a.parse().ok());
        match address {
            Some(address) => Ok(Self { child, address }),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                Err(HarnessError::data(name, "the server did not start; its message is above"))
            }
        }
    }
}

impl Emulation {
    /// A running link.
    ///
    /// # Errors
    /// If packet level is asked for and impossible, or the link's description is wrong.
    pub fn start(kind: EmulationKind, link: &LinkConfig, folder: &Path, seed: u64, congestion_control: &str) -> Result<Self, HarnessError> {
        let impossible = if kind == EmulationKind::Stream { Some("stream level was asked for".into()) } else { missing() };
        match (kind, impossible) {
            (EmulationKind::Packet, Some(why)) => Err(HarnessError::data("emulation = \"packet\"", why)),
            (_, Some(_)) => {
                let link = StreamLink::start(link, folder, seed).map_err(|e| HarnessError::data(e.key, e.why))?;
                Ok(Self::Stream(Arc::new(link)))
            }
            (_, None) => {
                let link =
                    PacketLink::start(link, folder, seed, congestion_control).map_err(|e| HarnessError::data("link", e.to_string()))?;
                Ok(Self::Packet(Arc::new(link)))
            }
        }
    }

    /// True if kernels' TCP runs over the link.
    pub fn is_packet_level(&self) -> bool {
        matches!(self, Self::Packet(_))
    }

    /// How results are marked, and how late the emulator was so far.
    pub fn report(&self, link: &LinkConfig, congestion_control: &str) -> Emulator {
        match self {
            Self::Packet(l) => Emulator::new(packet::EMULATION, Some(congestion_control.into()), l.lateness().summary(), link),
            Self::Stream(l) => {
                Emulator { ignored: stream::ignored(link), ..Emulator::new(stream::EMULATION, None, l.lateness().summary(), link) }
            }
        }
    }

    /// A client whose connection runs over the link.
    ///
    /// # Errors
    /// If the server cannot be reached.
    pub async fn connect(&self, server: SocketAddr) -> Result<Client, ClientError> {
        let endpoint = Endpoint::new(&format!("http://{server}"))?.allow_insecure(true).with_connect_timeout(CONNECT);
        match self {
            Self::Packet(link) => {
                let link = link.clone();
                Client::connect_through(&endpoint, move |_| {
                    let link = link.clone();
                    async move {
                        // made inside the namespace, on a thread that may block; it stays there
                        let connecting = tokio::task::spawn_blocking(move || {
                            link.edge().within(|| {
                                let stream = std::net::TcpStream::connect_timeout(&server, CONNECT)?;
                                stream.set_nodelay(true)?;
                                stream.set_nonblocking(true)?;
                                std::io::Result::Ok(stream)
                            })
                        });
                        TcpStream::from_std(connecting.await.map_err(std::io::Error::other)???)
                    }
                })
                .await
            }
            Self::Stream(link) => {
                let link = link.clone();
                Client::connect_through(&endpoint, move |_| {
                    let link = link.clone();
                    async move {
                        link.connect(async {
                            let stream = TcpStream::connect(server).await?;
                            stream.set_nodelay(true)?;
                            Ok(stream)
                        })
                        .await
                    }
                })
                .await
            }
        }
    }
}
