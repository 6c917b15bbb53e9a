//! Packet level: two network namespaces, joined by a router in user space that runs the core. Needs root.
//!
//! Real kernels' TCP, with real congestion control, loss and reordering. Each namespace has one TUN device; one thread
//! per device reads packets and offers them to the core, one per direction waits for the next deadline and writes
//! what has arrived to the other device.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thread_priority::ThreadPriority;
use thread_priority::unix::{RealtimeThreadSchedulePolicy, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id};
use tun_rs::{DeviceBuilder, SyncDevice};

use super::namespace::Namespace;
use crate::config::LinkConfig;
use crate::direction::{Direction, Stats};
use crate::lateness::Lateness;

/// How results made with this driver are marked.
pub const EMULATION: &str = "packet";
/// The device's address.
pub const EDGE: Ipv4Addr = Ipv4Addr::new(10, 213, 1, 2);
/// The server's address.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 213, 2, 2);
const DEVICE: &str = "link0";
const MTU: u16 = 1500;
/// Among real-time threads the emulator's are as good as others.
const PRIORITY: u8 = 10;
/// Longest wait without a look at whether the link is to end.
const NAP: Duration = Duration::from_millis(200);

struct Lane {
    state: Mutex<State>,
    changed: Condvar,
    start: Instant,
    lateness: Lateness,
}

struct State {
    direction: Direction<Vec<u8>>,
    ended: bool,
}

/// A running link between two namespaces; dropping it removes both.
pub struct PacketLink {
    edge: Namespace,
    server: Namespace,
    lanes: [Arc<Lane>; 2],
    threads: Vec<JoinHandle<()>>,
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Reads packets until the device is gone.
    fn take(&self, device: &SyncDevice) {
        let mut packet = vec![0; usize::from(MTU)];
        while let Ok(n) = device.recv(&mut packet) {
            let mut state = self.lock();
            if state.ended {
                return;
            }
            let before = state.direction.next_deadline();
            // dropped packets are the link's doing
            let _ = state.direction.offer(self.now(), packet[..n].to_vec(), n as u32);
            let sooner = state.direction.next_deadline() != before;
            drop(state);
            if sooner {
                self.changed.notify_one();
            }
        }
    }

    /// Writes packets when they are due.
    fn give(&self, device: &SyncDevice) {
        let mut state = self.lock();
        while !state.ended {
            let now = self.now();
            let arrived = state.direction.poll(now);
            if arrived.is_empty() {
                let nap = state.direction.next_deadline().map_or(NAP, |d| d.saturating_sub(now).min(NAP));
                state = self.changed.wait_timeout(state, nap).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(state);
            for (due, packet) in arrived {
                // a device that is down refuses; to its peer the packet is lost
                let _ = device.send(&packet);
                self.lateness.record(due, self.now());
            }
            state = self.lock();
        }
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

fn device(namespace: &Namespace, address: Ipv4Addr, congestion_control: &str) -> io::Result<Arc<SyncDevice>> {
    let device = namespace.within(|| DeviceBuilder::new().name(DEVICE).build_sync())??;
    let (mtu, cidr) = (MTU.to_string(), format!("{address}/32"));
    namespace.ip(&["addr", "add", &cidr, "dev", DEVICE])?;
    // long enough to lose nothing before the emulated queue sees it
    namespace.ip(&["link", "set", DEVICE, "mtu", &mtu, "txqueuelen", "10000", "up"])?;
    // by route: the namespace's own setting takes just those that the host allows to everybody
    let route = namespace.ip(&["route", "add", "default", "dev", DEVICE, "congctl", congestion_control]);
    route.map_err(|e| {
        let why = "is the congestion control in /proc/sys/net/ipv4/tcp_available_congestion_control?";
        io::Error::new(e.kind(), format!("{e}; {why}"))
    })?;
    Ok(Arc::new(device))
}

/// Gives this thread the processor whenever it wants it.
fn first_in_first_out() -> Result<(), thread_priority::Error> {
    let priority = ThreadPriority::Crossplatform(PRIORITY.try_into().map_err(|_| thread_priority::Error::Priority("1 to 99"))?);
    set_thread_priority_and_policy(thread_native_id(), priority, ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::Fifo))
}

impl PacketLink {
    /// A link that starts now: steps, traces and outages count from here. `folder` is where trace files are;
    /// `congestion_control` is pinned in both namespaces.
    ///
    /// # Errors
    /// Names what is wrong or missing; what was made until then is removed.
    pub fn start(config: &LinkConfig, folder: &Path, seed: u64, congestion_control: &str) -> io::Result<Self> {
        config.check(folder).map_err(io::Error::other)?;
        let (edge, server) = (Namespace::new("edge")?, Namespace::new("server")?);
        let (near, far) = (device(&edge, EDGE, congestion_control)?, device(&server, SERVER, congestion_control)?);
        let (start, lateness) = (Instant::now(), Lateness::new().map_err(io::Error::other)?);
        let lane = |direction, seed| {
            let direction = Direction::new(direction, folder, seed).map_err(io::Error::other)?;
            let state = Mutex::new(State { direction, ended: false });
            io::Result::Ok(Arc::new(Lane { state, changed: Condvar::new(), start, lateness: lateness.clone() }))
        };
        let lanes = [lane(&config.up, seed)?, lane(&config.down, !seed)?];
        let mut link = Self { edge, server, lanes, threads: Vec::new() };
        for (lane, from, to) in [(0, &near, &far), (1, &far, &near)] {
            let (reader, writer) = (link.lanes[lane].clone(), link.lanes[lane].clone());
            let (from, to) = (from.clone(), to.clone());
            link.spawn(move || reader.take(&from))?;
            link.spawn(move || writer.give(&to))?;
        }
        Ok(link)
    }

    fn spawn(&mut self, f: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name("linkem".into());
        self.threads.push(thread.spawn(move || {
            // the scheduler lets whoever computes on the same cores end a slice of 3 ms, however urgent others are, except real-time
            // threads; where that is refused, the lateness shows it
            let _ = first_in_first_out();
            f();
        })?);
        Ok(())
    }

    /// The device's namespace. Its address is [`EDGE`].
    pub fn edge(&self) -> &Namespace {
        &self.edge
    }

    /// The server's namespace. Its address is [`SERVER`].
    pub fn server(&self) -> &Namespace {
        &self.server
    }

    /// How late the emulator was, both directions together.
    pub fn lateness(&self) -> &Lateness {
        &self.lanes[0].lateness
    }

    /// Counters of (up, down).
    pub fn stats(&self) -> (Stats, Stats) {
        (self.lanes[0].lock().direction.stats(), self.lanes[1].lock().direction.stats())
    }
}

impl Drop for PacketLink {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.end();
        }
        // taking the devices down wakes the readers: a read of a device that is down fails
        for namespace in [&self.edge, &self.server] {
            let _ = namespace.ip(&["link", "del", DEVICE]);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
