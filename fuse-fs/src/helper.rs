//! The forms in which mount(8) and umount(8) call the helpers of a filesystem type.
//!
//! ```text
//! mount.fuse.blockd SOURCE DIR [-sfnv] [-N namespace] [-o options] [-t type]
//! umount.fuse.blockd DIR [-flnrv] [-N namespace] [-t type]
//! ```
//! The helpers are links to `fuse-fs`; here their arguments become its own.

use std::ffi::{OsStr, OsString};
use std::path::Path;

const MOUNT: &str = "mount.fuse.blockd";
const UMOUNT: &str = "umount.fuse.blockd";

/// What to do for an invocation.
#[derive(Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Run with these arguments, the program's name first.
    Run(Vec<OsString>),
    /// `mount --fake`: everything but the mount.
    Nothing,
}

/// The arguments of `fuse-fs` for those of this process.
#[must_use]
pub fn translate(arguments: Vec<OsString>) -> Invocation {
    let program = arguments.first().map(Path::new).and_then(Path::file_name);
    let words = || arguments.iter().skip(1);
    match program.and_then(OsStr::to_str) {
        Some(MOUNT) => mount(words()),
        Some(UMOUNT) => Invocation::Run(umount(words())),
        _ => Invocation::Run(arguments),
    }
}

fn own(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn mount<'a>(mut words: impl Iterator<Item = &'a OsString>) -> Invocation {
    let mut run = own(&["fuse-fs", "mount"]);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("-o") => run.extend([word.clone(), words.next().cloned().unwrap_or_default()]),
            Some("-t" | "-N") => drop(words.next()),
            Some(flags) if is_flags(flags) && flags.contains('f') => return Invocation::Nothing,
            Some(flags) if is_flags(flags) => {}
            _ => run.push(word.clone()),
        }
    }
    Invocation::Run(run)
}

fn umount<'a>(mut words: impl Iterator<Item = &'a OsString>) -> Vec<OsString> {
    let mut run = own(&["fuse-fs", "umount"]);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("-t" | "-N") => drop(words.next()),
            Some(flags) if is_flags(flags) && flags.contains('f') => run.push("--force".into()),
            Some(flags) if is_flags(flags) => {}
            _ => run.push(word.clone()),
        }
    }
    run
}

fn is_flags(word: &str) -> bool {
    word.len() > 1 && word.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Invocation {
        translate(line.split(' ').map(OsString::from).collect())
    }

    #[test]
    fn the_forms_of_mount_and_umount_are_ours() {
        for (line, ours) in [
            (
                "/sbin/mount.fuse.blockd vol /mnt -n -v -o rw,noatime -t fuse.blockd",
                "fuse-fs mount vol /mnt -o rw,noatime",
            ),
            (
                "mount.fuse.blockd vol /mnt -N 7 -s",
                "fuse-fs mount vol /mnt",
            ),
            ("/sbin/umount.fuse.blockd /mnt -n", "fuse-fs umount /mnt"),
            (
                "umount.fuse.blockd /mnt -fl -t x",
                "fuse-fs umount /mnt --force",
            ),
            ("fuse-fs mount vol /mnt -f", "fuse-fs mount vol /mnt -f"),
        ] {
            let ours: Vec<OsString> = ours.split(' ').map(OsString::from).collect();
            assert_eq!(run(line), Invocation::Run(ours), "{line}");
        }
        assert_eq!(run("mount.fuse.blockd vol /mnt -fn"), Invocation::Nothing);
    }
}
