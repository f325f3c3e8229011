//! A small blocking NBD client of our own: every error visible, writes pipelined on demand.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const FLAG_FUA: u16 = 1;
/// A server that answers nothing for so long has hung.
const SILENCE: Duration = Duration::from_secs(45);

/// How a request failed.
#[derive(Debug)]
pub enum NbdError {
    /// The server answered this errno.
    Errno(u32),
    /// The connection is unusable.
    Lost(io::Error),
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

pub type Reply<T> = Result<T, NbdError>;

trait Stream: Read + Write + Send + Debug {}
impl<T: Read + Write + Send + Debug> Stream for T {}

/// A connection in transmission with simple replies.
#[derive(Debug)]
pub struct NbdConnection {
    stream: Box<dyn Stream>,
    size_bytes: u64,
    cookie: u64,
}

impl NbdConnection {
    /// Connects to `HOST:PORT` and opens an export.
    ///
    /// # Errors
    /// No connection, or the export was refused (with NBD's reply type as the errno).
    pub fn tcp(address: &str, export: &str) -> Reply<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        Self::open(Box::new(stream), export)
    }

    /// Connects to a unix socket and opens an export.
    ///
    /// # Errors
    /// As [`Self::tcp`].
    pub fn unix(path: &Path, export: &str) -> Reply<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        Self::open(Box::new(stream), export)
    }

    fn open(mut stream: Box<dyn Stream>, export: &str) -> Reply<Self> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        check(&greeting[..16] == b"NBDMAGICIHAVEOPT", "greeting")?;
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC);
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend(u32::try_from(export.len() + 6).unwrap().to_be_bytes());
        hello.extend(u32::try_from(export.len()).unwrap().to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend([0, 0]);
        stream.write_all(&hello)?;
        let mut size_bytes = 0;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            check(be64(&head[..8]) == OPTION_REPLY_MAGIC, "option reply")?;
            let mut data = vec![0; be32(&head[16..20]) as usize];
            stream.read_exact(&mut data)?;
            match be32(&head[12..16]) {
                REP_ACK => break,
                REP_INFO if data[..2] == [0, 0] => size_bytes = be64(&data[2..10]),
                REP_INFO => {}
                refused => return Err(NbdError::Errno(refused)),
            }
        }
        Ok(Self {
            stream,
            size_bytes,
            cookie: 0,
        })
    }

    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads a range.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn read(&mut self, offset: u64, len: u32) -> Reply<Vec<u8>> {
        self.request(CMD_READ, 0, offset, len, &[])?;
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Writes a range.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Reply<()> {
        let len = u32::try_from(data.len()).unwrap();
        self.request(CMD_WRITE, 0, offset, len, data)
    }

    /// Writes a range that is durable when this returns.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> Reply<()> {
        let len = u32::try_from(data.len()).unwrap();
        self.request(CMD_WRITE, FLAG_FUA, offset, len, data)
    }

    /// Makes all acknowledged writes durable.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn flush(&mut self) -> Reply<()> {
        self.request(CMD_FLUSH, 0, 0, 0, &[])
    }

    /// Gives a range back; it reads as zeros afterwards.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn trim(&mut self, offset: u64, len: u32) -> Reply<()> {
        self.request(CMD_TRIM, 0, offset, len, &[])
    }

    /// Sends a write whose reply [`Self::next_reply`] takes, and says its cookie.
    ///
    /// # Errors
    /// [`NbdError::Lost`].
    pub fn send_write(&mut self, offset: u64, data: &[u8]) -> Reply<u64> {
        let len = u32::try_from(data.len()).unwrap();
        self.send(CMD_WRITE, 0, offset, len, data)
    }

    /// The cookie of the next request that was carried out; only for requests without data in
    /// their replies.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn next_reply(&mut self) -> Reply<u64> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        check(be32(&reply[..4]) == REPLY_MAGIC, "reply magic")?;
        match be32(&reply[4..8]) {
            0 => Ok(be64(&reply[8..])),
            errno => Err(NbdError::Errno(errno)),
        }
    }

    fn send(&mut self, kind: u16, flags: u16, at: u64, len: u32, data: &[u8]) -> Reply<u64> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(at.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        Ok(self.cookie)
    }

    fn request(&mut self, kind: u16, flags: u16, at: u64, len: u32, data: &[u8]) -> Reply<()> {
        let cookie = self.send(kind, flags, at, len, data)?;
        Ok(check(self.next_reply()? == cookie, "reply cookie")?)
    }
}

fn check(right: bool, what: &str) -> io::Result<()> {
    match right {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned())),
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().unwrap())
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().unwrap())
}
