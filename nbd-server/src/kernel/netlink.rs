//! The generic netlink family `nbd` on the wire (linux/nbd-netlink.h, version 1): a socket, its questions and their answers.
//!
//! ```text
//! attribute              of            type
//!  1 INDEX               all           u32
//!  2 SIZE_BYTES          CONNECT, RECONFIGURE   u64
//!  3 BLOCK_SIZE_BYTES    CONNECT       u64
//!  5 SERVER_FLAGS        CONNECT       u64, transmission flags
//!  7 SOCKETS             CONNECT, RECONFIGURE   list of { 1 ITEM: { 1 FD: u32 } }
//!  8 DEAD_CONN_TIMEOUT   CONNECT       u64, seconds
//!  9 DEVICE_LIST         STATUS answer list of { 1 ITEM: { 1 INDEX: u32, 2 CONNECTED: u8 } }
//! 10 BACKEND_IDENTIFIER  CONNECT, RECONFIGURE   string; since Linux 5.14
//! ```
//!
//! 4 TIMEOUT is left out on purpose: without it a request waits for its answer as long as its connection lives, and the queue's
//! `io_timeout` only decides when requests of a dead connection are sent again (notes/nbd.md, finding 4).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use neli::consts::nl::{GenlId, NlmF};
use neli::consts::socket::NlFamily;
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::synchronous::NlSocketHandle;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use neli::{Size, ToBytes};
use thiserror::Error;

pub(super) const FAMILY_NAME: &str = "nbd";
pub(super) const MULTICAST_GROUP: &str = "nbd_mc_group";
pub(super) const FAMILY_VERSION: u8 = 1;

pub(super) mod command {
    //! Commands of the family.
    pub(crate) const CONNECT: u8 = 1;
    pub(crate) const DISCONNECT: u8 = 2;
    pub(crate) const RECONFIGURE: u8 = 3;
    pub(crate) const LINK_DEAD: u8 = 4;
    pub(crate) const STATUS: u8 = 5;
}

pub(super) mod attribute {
    //! Attributes of the family, and the ones nested in them.
    pub(crate) const INDEX: u16 = 1;
    pub(crate) const SIZE_BYTES: u16 = 2;
    pub(crate) const BLOCK_SIZE_BYTES: u16 = 3;
    pub(crate) const SERVER_FLAGS: u16 = 5;
    pub(crate) const SOCKETS: u16 = 7;
    pub(crate) const DEAD_CONN_TIMEOUT: u16 = 8;
    pub(crate) const DEVICE_LIST: u16 = 9;
    pub(crate) const BACKEND_IDENTIFIER: u16 = 10;
    pub(crate) const ITEM: u16 = 1;
    pub(crate) const ITEM_FD: u16 = 1;
    pub(crate) const ITEM_INDEX: u16 = 1;
    pub(crate) const ITEM_CONNECTED: u16 = 2;
}

mod control {
    //! The family `nlctrl`, which knows the others (linux/genetlink.h).
    pub(super) const VERSION: u8 = 2;
    pub(super) const GET_FAMILY: u8 = 3;
    pub(super) const FAMILY_ID: u16 = 1;
    pub(super) const FAMILY_NAME: u16 = 2;
    pub(super) const MAX_ATTRIBUTE: u16 = 5;
    pub(super) const MULTICAST_GROUPS: u16 = 7;
    pub(super) const GROUP_NAME: u16 = 1;
    pub(super) const GROUP_ID: u16 = 2;
}

/// A command or answer of a generic netlink family.
pub(super) type Message = Genlmsghdr<u8, u16>;
type Attr = Nlattr<u16, Buffer>;

/// Why a question has no answer.
#[derive(Debug, Error)]
pub(super) enum NetlinkError {
    /// The kernel's error number, or the socket's.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What came back is no answer.
    #[error("{0}")]
    Codec(String),
}

impl NetlinkError {
    fn codec(error: impl ToString) -> Self {
        Self::Codec(error.to_string())
    }

    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Io(error) => error.raw_os_error(),
            Self::Codec(_) => None,
        }
    }
}

impl From<neli::err::SocketError> for NetlinkError {
    fn from(error: neli::err::SocketError) -> Self {
        match error {
            neli::err::SocketError::Io(error) => match error.raw_os_error() {
                Some(errno) => Self::Io(io::Error::from_raw_os_error(errno)),
                None => Self::codec(error),
            },
            other => Self::codec(other),
        }
    }
}

/// Attributes of a question, in the order they were added.
#[derive(Default)]
pub(super) struct Attributes(GenlBuffer<u16, Buffer>);

impl Attributes {
    /// Adds one with an integer or a string (which gets its NUL) as payload.
    pub(super) fn with(
        mut self,
        kind: u16,
        payload: impl Size + ToBytes,
    ) -> Result<Self, NetlinkError> {
        self.0.push(attribute(kind, payload)?);
        Ok(self)
    }

    /// Adds the list of sockets.
    pub(super) fn with_sockets(mut self, sockets: &[BorrowedFd<'_>]) -> Result<Self, NetlinkError> {
        let mut list = attribute(attribute::SOCKETS, Buffer::new())?;
        for socket in sockets {
            let fd = u32::try_from(socket.as_raw_fd()).map_err(NetlinkError::codec)?;
            let item = attribute(attribute::ITEM, Buffer::new())?
                .nest(&attribute(attribute::ITEM_FD, fd)?)
                .map_err(NetlinkError::codec)?;
            list = list.nest(&item).map_err(NetlinkError::codec)?;
        }
        self.0.push(list);
        Ok(self)
    }
}

fn attribute(kind: u16, payload: impl Size + ToBytes) -> Result<Attr, NetlinkError> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build();
    NlattrBuilder::default()
        .nla_type(kind.map_err(NetlinkError::codec)?)
        .nla_payload(payload)
        .build()
        .map_err(NetlinkError::codec)
}

/// What the kernel says of the family `nbd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Family {
    /// Type of its messages, given out when the module is loaded.
    pub(super) id: u16,
    /// The highest attribute it knows.
    pub(super) max_attribute: u32,
    /// The group that LINK_DEAD is sent to.
    pub(super) multicast_group: u32,
}

impl Family {
    /// Asks for the family; `None` if no module offers it.
    pub(super) fn find() -> Result<Option<Self>, NetlinkError> {
        let attributes = Attributes::default().with(control::FAMILY_NAME, FAMILY_NAME)?;
        let socket = Socket::open()?;
        let controller = u16::from(GenlId::Ctrl);
        let answer = socket.ask(
            controller,
            control::VERSION,
            control::GET_FAMILY,
            attributes,
        );
        match answer {
            Ok(answer) => Self::parse(&answer.ok_or_else(no_answer)?).map(Some),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parse(answer: &Message) -> Result<Self, NetlinkError> {
        let handle = answer.attrs().get_attr_handle();
        let mut multicast_group = None;
        let groups = handle.get_nested_attributes::<u16>(control::MULTICAST_GROUPS);
        for group in groups.map_err(NetlinkError::codec)?.iter() {
            let group = group
                .get_attr_handle::<u16>()
                .map_err(NetlinkError::codec)?;
            let name: String = group
                .get_attr_payload_as_with_len(control::GROUP_NAME)
                .map_err(NetlinkError::codec)?;
            if name == MULTICAST_GROUP {
                let id = group.get_attr_payload_as::<u32>(control::GROUP_ID);
                multicast_group = Some(id.map_err(NetlinkError::codec)?);
            }
        }
        Ok(Self {
            id: handle
                .get_attr_payload_as(control::FAMILY_ID)
                .map_err(NetlinkError::codec)?,
            max_attribute: handle
                .get_attr_payload_as(control::MAX_ATTRIBUTE)
                .map_err(NetlinkError::codec)?,
            multicast_group: multicast_group
                .ok_or_else(|| NetlinkError::codec("the family has no multicast group"))?,
        })
    }
}

pub(super) fn no_answer() -> NetlinkError {
    NetlinkError::codec("an acknowledgement without an answer")
}

/// A netlink socket for one question at a time.
pub(super) struct Socket(NlSocketHandle);

impl Socket {
    /// A socket that hears its own answers only.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        Ok(Self(NlSocketHandle::connect(
            NlFamily::Generic,
            None,
            Groups::empty(),
        )?))
    }

    /// A socket that hears the family's multicast group and does not block.
    pub(super) fn subscribe(group: u32) -> Result<Self, NetlinkError> {
        let socket = Self::open()?;
        socket
            .0
            .add_mcast_membership(Groups::new_groups(&[group]))?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(io::Error::from)?;
        Ok(socket)
    }

    /// Sends a command and waits for its acknowledgement; the answer that came before it, if the command has one.
    pub(super) fn ask(
        &self,
        family: u16,
        version: u8,
        command: u8,
        attributes: Attributes,
    ) -> Result<Option<Message>, NetlinkError> {
        let message = GenlmsghdrBuilder::default()
            .cmd(command)
            .version(version)
            .attrs(attributes.0)
            .build()
            .map_err(NetlinkError::codec)?;
        let packet = NlmsghdrBuilder::default()
            .nl_type(family)
            .nl_flags(NlmF::REQUEST | NlmF::ACK)
            .nl_payload(NlPayload::Payload(message))
            .build()
            .map_err(NetlinkError::codec)?;
        self.0.send(&packet)?;
        self.answer()
    }

    fn answer(&self) -> Result<Option<Message>, NetlinkError> {
        let mut answer = None;
        loop {
            for packet in self.receive()? {
                match packet.nl_payload() {
                    NlPayload::Payload(message) => answer = Some(message.clone()),
                    NlPayload::Ack(_) => return Ok(answer),
                    NlPayload::Err(error) => {
                        return Err(io::Error::from_raw_os_error(-error.error()).into());
                    }
                    NlPayload::DumpExtAck(_) | NlPayload::Empty => {}
                }
            }
        }
    }

    /// The messages of the next datagram. `WouldBlock` on a subscribed socket without one.
    pub(super) fn receive(&self) -> Result<Vec<Nlmsghdr<u16, Message>>, NetlinkError> {
        let (packets, _) = self.0.recv_all::<u16, Message>()?;
        Ok(packets.into_iter().collect())
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the handle owns the descriptor, and closes it only when it is dropped.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// INDEX of an answer or event.
pub(super) fn index_of(message: &Message) -> Result<u32, NetlinkError> {
    let handle = message.attrs().get_attr_handle();
    handle
        .get_attr_payload_as(attribute::INDEX)
        .map_err(NetlinkError::codec)
}

/// (index, connected) of each device in an answer to STATUS.
pub(super) fn devices_of(message: &Message) -> Result<Vec<(u32, bool)>, NetlinkError> {
    let handle = message.attrs().get_attr_handle();
    let list = handle
        .get_nested_attributes::<u16>(attribute::DEVICE_LIST)
        .map_err(NetlinkError::codec)?;
    let device = |item: &Attr| {
        let item = item.get_attr_handle::<u16>().map_err(NetlinkError::codec)?;
        let index = item.get_attr_payload_as::<u32>(attribute::ITEM_INDEX);
        let connected = item.get_attr_payload_as::<u8>(attribute::ITEM_CONNECTED);
        Ok((
            index.map_err(NetlinkError::codec)?,
            connected.map_err(NetlinkError::codec)? != 0,
        ))
    };
    list.iter().map(device).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use neli::FromBytesWithInput;

    use super::*;

    fn bytes_of(attributes: &Attributes) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        attributes.0.to_bytes(&mut bytes).unwrap();
        bytes.into_inner()
    }

    fn message(command: u8, attributes: &[u8]) -> Message {
        let bytes = [&[command, 1, 0, 0], attributes].concat();
        Genlmsghdr::from_bytes_with_input(&mut Cursor::new(bytes.as_slice()), bytes.len()).unwrap()
    }

    #[test]
    fn integers_and_strings_are_laid_out_as_the_kernel_reads_them() {
        let attributes = Attributes::default()
            .with(attribute::INDEX, 3_u32)
            .unwrap()
            .with(attribute::SIZE_BYTES, 0x1_0000_u64)
            .unwrap()
            .with(attribute::BACKEND_IDENTIFIER, "vol")
            .unwrap();
        let golden = [
            &[8, 0, 1, 0, 3, 0, 0, 0][..],
            &[12, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0],
            &[8, 0, 10, 0, b'v', b'o', b'l', 0],
        ];
        assert_eq!(bytes_of(&attributes), golden.concat());
    }

    #[test]
    fn sockets_are_a_list_of_items_of_one_descriptor() {
        // SAFETY: the numbers are written down and never used as descriptors.
        let fds = [5, 6].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
        let attributes = Attributes::default().with_sockets(&fds).unwrap();
        let golden = [
            &[28, 0, 7, 0x80][..],
            &[12, 0, 1, 0x80, 8, 0, 1, 0, 5, 0, 0, 0],
            &[12, 0, 1, 0x80, 8, 0, 1, 0, 6, 0, 0, 0],
        ];
        assert_eq!(bytes_of(&attributes), golden.concat());
    }

    #[test]
    fn the_list_of_devices_is_read() {
        let item = |index: u8, connected: u8| {
            let fields = [8, 0, 1, 0, index, 0, 0, 0, 5, 0, 2, 0, connected, 0, 0, 0];
            [&[20, 0, 1, 0x80][..], &fields].concat()
        };
        let list = [&[44, 0, 9, 0x80][..], &item(0, 1), &item(1, 0)].concat();
        let answer = message(command::STATUS, &list);
        assert_eq!(devices_of(&answer).unwrap(), [(0, true), (1, false)]);
        assert!(devices_of(&message(command::STATUS, &[])).is_err());
    }

    #[test]
    fn the_family_of_a_loaded_module_is_read() {
        let answer = [
            &[6, 0, 1, 0, 30, 0, 0, 0][..],
            &[8, 0, 5, 0, 10, 0, 0, 0],
            &[36, 0, 7, 0, 32, 0, 1, 0, 8, 0, 2, 0, 9, 0, 0, 0],
            &[17, 0, 1, 0],
            b"nbd_mc_group\0\0\0\0",
        ];
        let family = Family::parse(&message(1, &answer.concat())).unwrap();
        let golden = Family {
            id: 30,
            max_attribute: 10,
            multicast_group: 9,
        };
        assert_eq!(family, golden);
        assert!(Family::parse(&message(1, &answer[..2].concat())).is_err());
    }
}
