//! LINK_DEAD: the kernel tells which device lost a socket.

use std::collections::VecDeque;

use tokio::io::unix::AsyncFd;

use super::error::KernelError;
use super::netlink::{self, Family, NetlinkError, Socket, command};

/// What is heard of the links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// A socket of this device died. Sent for every socket, and for a planned `shutdown` as well.
    Dead(u32),
    /// Events were lost because nobody fetched them in time: any device may have dead sockets.
    Missed,
}

/// A subscription to dead links.
pub struct LinkDeadEvents {
    socket: AsyncFd<Socket>,
    pending: VecDeque<LinkEvent>,
}

impl LinkDeadEvents {
    pub(super) fn subscribe(family: Family) -> Result<Self, KernelError> {
        let socket = Socket::subscribe(family.multicast_group).map_err(listening)?;
        // SAFETY: the socket gives the same descriptor as long as it lives, and closes it only at its end.
        let socket = unsafe { AsyncFd::register(socket) };
        let socket = socket.map_err(|error| listening(std::io::Error::from(error).into()))?;
        Ok(Self {
            socket,
            pending: VecDeque::new(),
        })
    }

    /// The next event; cancel-safe.
    pub async fn next(&mut self) -> Result<LinkEvent, KernelError> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(event);
            }
            let mut ready = self
                .socket
                .readable()
                .await
                .map_err(|error| listening(error.into()))?;
            match events(ready.get_inner()) {
                Ok(events) => self.pending.extend(events),
                Err(error) if error.errno() == Some(libc::EAGAIN) => ready.clear_ready(),
                Err(error) if error.errno() == Some(libc::ENOBUFS) => {
                    self.pending.push_back(LinkEvent::Missed);
                }
                Err(error) => return Err(listening(error)),
            }
        }
    }
}

fn events(socket: &Socket) -> Result<Vec<LinkEvent>, NetlinkError> {
    let packets = socket.receive()?;
    let messages = packets.iter().filter_map(|packet| packet.get_payload());
    messages
        .filter(|message| *message.cmd() == command::LINK_DEAD)
        .map(|message| netlink::index_of(message).map(LinkEvent::Dead))
        .collect()
}

fn listening(error: NetlinkError) -> KernelError {
    const ACTION: &str = "listen to dead links of NBD devices";
    match error {
        NetlinkError::Io(source) => KernelError::Refused {
            action: ACTION,
            source,
        },
        NetlinkError::Codec(reason) => KernelError::BadAnswer {
            action: ACTION,
            reason,
        },
    }
}
