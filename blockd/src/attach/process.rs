//! What the process of an attachment asks of the system: to be neither paged out nor killed, and to be waited for.

use super::error::AttachError;
use super::status::Status;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::net::UnixDatagram;

/// Who waits until the attachment works.
#[derive(Debug)]
pub enum Ready {
    /// The command that started this process reads one line of JSON from our standard output.
    Pipe,
    /// systemd, if it said where (`Type=notify`).
    Notify,
}

impl Ready {
    /// Says that the attachment works, or why it does not.
    ///
    /// # Errors
    /// Nobody can be told.
    pub fn tell(&self, outcome: &Result<Status, AttachError>) -> io::Result<()> {
        match (self, outcome) {
            (Self::Pipe, _) => {
                let mut line = serde_json::to_vec(outcome)?;
                line.push(b'\n');
                let mut stdout = io::stdout().lock();
                stdout.write_all(&line)?;
                stdout.flush()?;
                leave_stdout()
            }
            (Self::Notify, Ok(_)) => notify("READY=1"),
            (Self::Notify, Err(error)) => notify(&format!("STATUS={error}")),
        }
    }
}

/// Whoever reads our standard output sees its end now.
fn leave_stdout() -> io::Result<()> {
    let null = fs::File::options().write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdout(&null)?)
}

/// sd_notify(3): one datagram to `$NOTIFY_SOCKET`.
pub(super) fn notify(state: &str) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => std::os::unix::net::SocketAddr::from_abstract_name(name)?,
        None => std::os::unix::net::SocketAddr::from_pathname(&path)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

/// Under memory pressure the kernel writes dirty pages through this process: neither its
/// allocations nor its page faults may wait for those writes, and it must not be the one to be
/// killed. Each needs privileges that a user or a container may lack.
pub(super) fn harden() {
    let steps = [
        ("never chosen when memory runs out (oom_score_adj)", oom()),
        (
            "allocations that wait for no write (PR_SET_IO_FLUSHER)",
            io_flusher(),
        ),
        ("memory that is not paged out (mlockall)", lock_memory()),
    ];
    for (what, done) in steps {
        if let Err(error) = done {
            tracing::warn!("goes on without {what}: {error}");
        }
    }
}

fn oom() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")
}

fn io_flusher() -> io::Result<()> {
    Ok(rustix::process::configure_io_flusher_behavior(true)?)
}

fn lock_memory() -> io::Result<()> {
    // With a limit, a later allocation beyond it would fail and end the process.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    if limit.current.is_some() && !may_lock_without_limit()? {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: only changes how this process's pages are treated.
    match unsafe { libc::mlockall(flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// CAP_IPC_LOCK, bit 14 of the effective capabilities (capabilities(7)).
fn may_lock_without_limit() -> io::Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = bits.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    Ok(bits.unwrap_or(0) & (1 << 14) != 0)
}
