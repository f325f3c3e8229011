//! `blockctl attach` on this host, with state of its own.

use crate::cluster::Cluster;
use crate::program::{Ran, binary, run, try_run};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::PathBuf;

/// Seconds that any command of blockctl may take.
const LIMIT_S: u32 = 60;

/// The attachments of one test; what is left is detached when this is dropped.
pub struct Attachments {
    directory: PathBuf,
    servers: String,
}

impl Attachments {
    #[must_use]
    pub fn new(cluster: &Cluster) -> Self {
        Self::elsewhere(cluster, "run")
    }

    /// As on another host: with a directory of this name.
    #[must_use]
    pub fn elsewhere(cluster: &Cluster, name: &str) -> Self {
        Self {
            directory: cluster.path(name),
            servers: cluster.server_list(),
        }
    }

    /// A command of blockctl that may fail.
    pub fn try_blockctl<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Ran {
        let mut arguments: Vec<std::ffi::OsString> = vec![
            format!("BLOCKD_RUNTIME_DIR={}", self.directory.display()).into(),
            binary("blockctl").into(),
            "--servers".into(),
            self.servers.clone().into(),
        ];
        arguments.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
        try_run(LIMIT_S, "env", arguments)
    }

    /// A command of blockctl that must succeed; what it printed.
    pub fn blockctl<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> String {
        let ran = self.try_blockctl(words).ok();
        ran.stdout.trim_end().to_owned()
    }

    /// `attach VOL --socket` at a path of its own; the path.
    pub fn socket(&self, target: &str) -> PathBuf {
        let path = self.directory.join(format!("{target}.sock"));
        let place = self.blockctl([
            OsStr::new("attach"),
            target.as_ref(),
            "--socket".as_ref(),
            path.as_ref(),
        ]);
        assert_eq!(place, path.to_str().unwrap());
        path
    }

    /// `attachment status --json`.
    pub fn status(&self, name: &str) -> Value {
        serde_json::from_str(&self.blockctl(["attachment", "status", name, "--json"])).unwrap()
    }

    /// `attachment list --json`.
    pub fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.blockctl(["attachment", "list", "--json"])).unwrap()
    }

    /// SIGKILL to the daemon of an attachment.
    pub fn kill_daemon(&self, name: &str) {
        let pid = self.status(name)["pid"].to_string();
        run(LIMIT_S, "kill", ["-9", &pid]);
    }
}

impl Drop for Attachments {
    fn drop(&mut self) {
        let listed = self.try_blockctl(["attachment", "list", "--json"]);
        let listed: Vec<Value> = serde_json::from_str(&listed.stdout).unwrap_or_default();
        for status in listed {
            if let Some(place) = status["socket"].as_str() {
                self.try_blockctl(["detach", place]);
            }
        }
    }
}
