//! One run in a process of its own: nothing of an earlier run is left in it, and what it does to its
//! process hurts nobody.

use crate::machine::Medium;
use crate::run::{self, Options};
use crate::trace::{self, Summary};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Seconds of real time after which a run counts as hanging.
const ALARM_S: u32 = 300;

/// A run that goes on.
pub(crate) struct Child {
    pub options: Options,
    pid: libc::pid_t,
    pipe: File,
    output: Vec<u8>,
}

/// What became of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub hash: u64,
    pub counts: BTreeMap<String, u64>,
    pub problems: Vec<String>,
    pub log: Vec<String>,
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends: [RawFd; 2] = [0; 2];
    // SAFETY: room for two descriptors, which nobody else owns.
    unsafe {
        match libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) {
            0 => Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Child {
    /// Starts a run.
    ///
    /// # Errors
    /// The system has no process or pipe left.
    pub(crate) fn start(template: &[Medium], options: Options) -> io::Result<Self> {
        let (reader, writer) = pipe()?;
        // SAFETY: this process has one thread only.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(reader);
                // SAFETY: no handler is installed; the signal ends this process.
                unsafe { libc::alarm(ALARM_S) };
                let mut writer = File::from(writer);
                if let Ok(mut writer) = writer.try_clone() {
                    trace::on_fatal(move || tell(&mut writer, &trace::end()));
                }
                let summary = run::seed(template, options);
                tell(&mut writer, &summary)
            }
            pid => Ok(Self {
                options,
                pid,
                pipe: File::from(reader),
                output: Vec::new(),
            }),
        }
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }

    /// Takes what has come; true at the end.
    pub(crate) fn take(&mut self) -> bool {
        let mut buffer = [0; 65536];
        match self.pipe.read(&mut buffer) {
            Ok(0) | Err(_) => true,
            Ok(count) => {
                self.output.extend_from_slice(&buffer[..count]);
                false
            }
        }
    }

    /// What the run gave, after its end.
    pub(crate) fn outcome(self) -> Outcome {
        let mut status = 0;
        // SAFETY: a child of this process that nobody else waits for.
        unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        let mut outcome = decode(&self.output);
        if status != 0 {
            let text = match libc::WIFSIGNALED(status) {
                true if libc::WTERMSIG(status) == libc::SIGALRM => "the run hangs".to_owned(),
                _ => format!("the process of the run died (status {status:#x})"),
            };
            outcome.problems.push(text);
        }
        outcome
    }

    /// Waits for the end.
    pub(crate) fn wait(mut self) -> Outcome {
        while !self.take() {}
        self.outcome()
    }
}

/// Hands the result to the parent and ends the process, without running what belongs to the parent.
fn tell(writer: &mut File, summary: &Summary) -> ! {
    let _ = writer.write_all(&encode(summary));
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

fn encode(summary: &Summary) -> Vec<u8> {
    let mut text = format!("H {}\n", summary.hash);
    for (what, count) in &summary.counts {
        text.push_str(&format!("C {count} {}\n", what.replace('\n', " ")));
    }
    for problem in &summary.problems {
        text.push_str(&format!("P {}\n", problem.replace('\n', " ")));
    }
    for line in &summary.log {
        text.push_str(&format!("L {}\n", line.replace('\n', " ")));
    }
    text.into_bytes()
}

fn decode(bytes: &[u8]) -> Outcome {
    let mut outcome = Outcome::default();
    for line in String::from_utf8_lossy(bytes).lines() {
        match line.split_at_checked(2) {
            Some(("H ", rest)) => outcome.hash = rest.parse().unwrap_or_default(),
            Some(("P ", rest)) => outcome.problems.push(rest.to_owned()),
            Some(("L ", rest)) => outcome.log.push(rest.to_owned()),
            Some(("C ", rest)) => {
                if let Some((count, what)) = rest.split_once(' ') {
                    let count = count.parse().unwrap_or_default();
                    outcome.counts.insert(what.to_owned(), count);
                }
            }
            _ => {}
        }
    }
    outcome
}

/// Panics of tasks are violations, too; the runtime would swallow them.
pub(crate) fn watch_panics() {
    std::panic::set_hook(Box::new(|info| {
        trace::problem(format!("panic: {info}"));
    }));
}
