//! Mounts that end with the test.

use crate::program::{Ran, binary, run, try_run};
use std::path::{Path, PathBuf};

/// A small file system in memory, for a disk that is full.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one of `size_bytes` on a directory that is made for it.
    #[must_use]
    pub fn mount(path: &Path, size_bytes: u64) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let options = format!("size={size_bytes}");
        run(
            20,
            "mount",
            [
                "-t",
                "tmpfs",
                "-o",
                &options,
                "blockd-test",
                path.to_str().unwrap(),
            ],
        );
        Self(path.to_owned())
    }

    /// Changes what may be done with it: `ro`, `rw` or a new size.
    pub fn remount(&self, option: &str) {
        let options = format!("remount,{option}");
        run(20, "mount", ["-o", &options, self.0.to_str().unwrap()]);
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a server that still runs in a failed test ends right after.
        try_run(20, "umount", ["--lazy", self.0.to_str().unwrap()]);
    }
}

/// A mount made by `fuse-fs`.
#[derive(Debug)]
pub struct FuseMount {
    pub path: PathBuf,
    runtime_dir: PathBuf,
    servers: String,
    mounted: bool,
}

impl FuseMount {
    /// `fuse-fs volumes`: every volume and snapshot as a file.
    #[must_use]
    pub fn volumes(servers: &str, directory: &Path, name: &str) -> Self {
        let mount = Self::new(servers, directory, name);
        let log = directory.join(format!("{name}.log"));
        mount
            .fuse_fs(&["volumes"], &["--log", log.to_str().unwrap()])
            .ok()
            .code
            .unwrap();
        mount
    }

    /// `fuse-fs mount --kernel`: the file system in a volume or snapshot.
    #[must_use]
    pub fn kernel(servers: &str, directory: &Path, name: &str, target: &str) -> Self {
        let mount = Self::new(servers, directory, name);
        mount
            .fuse_fs(&["mount", "--kernel", target], &[])
            .ok()
            .code
            .unwrap();
        mount
    }

    /// `fuse-fs mount`: the file system in a volume or snapshot, by our own code; waits for another holder.
    #[must_use]
    pub fn own(servers: &str, directory: &Path, name: &str, target: &str) -> Self {
        let mount = Self::new(servers, directory, name);
        let ran = mount.fuse_fs(&["mount", target], &["--wait", "50"]);
        ran.ok().code.unwrap();
        mount
    }

    /// Kills the process that serves it, as a crash does, and takes what is left out of the tree.
    pub fn kill(mut self) {
        let pid = self.daemon().unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        try_run(20, "umount", ["--lazy", self.path.to_str().unwrap()]);
        self.mounted = false;
    }

    /// As the state file of the mount has it.
    fn daemon(&self) -> Option<rustix::process::Pid> {
        let files = std::fs::read_dir(&self.runtime_dir).ok()?;
        let texts = files.filter_map(|file| std::fs::read_to_string(file.ok()?.path()).ok());
        let path = format!("\"{}\"", self.path.to_str()?);
        let own = texts.into_iter().find(|text| text.contains(&path))?;
        let (_, rest) = own.split_once("\"pid\":")?;
        let digits = rest
            .trim_start()
            .split(|c: char| !c.is_ascii_digit())
            .next()?;
        rustix::process::Pid::from_raw(digits.parse().ok()?)
    }

    fn new(servers: &str, directory: &Path, name: &str) -> Self {
        let path = directory.join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self {
            path,
            runtime_dir: directory.join("run"),
            servers: servers.to_owned(),
            mounted: true,
        }
    }

    fn fuse_fs(&self, verb: &[&str], more: &[&str]) -> Ran {
        let mut arguments = verb.to_vec();
        arguments.push(self.path.to_str().unwrap());
        arguments.extend(["--servers", &self.servers, "--io-deadline", "20"]);
        arguments.extend(["--runtime-dir", self.runtime_dir.to_str().unwrap()]);
        arguments.extend(more);
        try_run(60, binary("fuse-fs"), arguments)
    }

    /// `fuse-fs umount`, with more of its options.
    pub fn umount(&mut self, more: &[&str]) -> Ran {
        let mut arguments = vec!["umount", self.path.to_str().unwrap()];
        arguments.extend(["--runtime-dir", self.runtime_dir.to_str().unwrap()]);
        arguments.extend(more);
        let ran = try_run(100, binary("fuse-fs"), arguments);
        self.mounted = ran.code != Some(0);
        ran
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if self.mounted {
            self.umount(&["--force", "--timeout", "0"]);
        }
    }
}
