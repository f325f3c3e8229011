//! A cluster of real servers, and the administrative requests that tests need.

use crate::address::AddressBlock;
use crate::nbd::NbdConnection;
use crate::program::{Ran, binary, try_run};
use crate::server::Server;
use blockd::admin::{
    AdminError, AdminReply, AdminRequest, HoldsInfo, RouteInfo, SnapshotInfo, SnapshotName,
    VolumeCreate, VolumeInfo,
};
use blockd::client::{Client, ClientError, ClientOptions, Volume};
use blockd::control::snapshot::Procedure;
use blockd::id::{DEFAULT_PAGE_BLOCKS, NodeNo};
use std::future::Future;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};

pub const MIB: u64 = 1 << 20;
const LOG_LINES_SHOWN: usize = 40;

/// How to start a cluster.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    pub servers: u8,
    /// TOML that every server gets as its configuration.
    pub config: String,
}

impl Default for ClusterOptions {
    /// Three servers with small logs, so that checkpoints happen in short tests, too.
    fn default() -> Self {
        Self {
            servers: 3,
            config: format!("log_bytes = {}\n", 64 * MIB),
        }
    }
}

/// Servers that form a cluster, stopped and removed when this is dropped.
pub struct Cluster {
    pub servers: Vec<Server>,
    pub addresses: AddressBlock,
    runtime: Runtime,
    client: Option<Client>,
    directory: tempfile::TempDir,
}

impl Cluster {
    /// Three servers in one cluster.
    #[must_use]
    pub fn three() -> Self {
        Self::start(&ClusterOptions::default())
    }

    /// Starts the servers and defines them as the nodes of one cluster.
    #[must_use]
    pub fn start(options: &ClusterOptions) -> Self {
        let mut cluster = Self::undefined(options);
        cluster.servers.iter_mut().for_each(Server::start);
        cluster.define("test");
        cluster
    }

    /// Servers that are neither started nor defined.
    #[must_use]
    pub fn undefined(options: &ClusterOptions) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("blockd-test")
            .tempdir()
            .unwrap();
        let addresses = AddressBlock::claim();
        let make = |number: u8| {
            let name = directory.path().join(format!("s{number}"));
            let mut server = Server::new(number, addresses.of(number), &name);
            server.config.clone_from(&options.config);
            server
        };
        Self {
            servers: (1..=options.servers).map(make).collect(),
            addresses,
            runtime: Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            client: None,
            directory,
        }
    }

    /// Makes the running servers one cluster.
    pub fn define(&mut self, name: &str) {
        let first = self.client_of(&[0]);
        let define = AdminRequest::ClusterDefine {
            name: name.to_owned(),
        };
        self.block(first.admin(define)).unwrap();
        for server in &self.servers[1..] {
            let define = AdminRequest::NodeDefine {
                address: server.peer_address(),
                name: None,
                online: true,
            };
            self.block(first.admin(define)).unwrap();
        }
        let all: Vec<usize> = (0..self.servers.len()).collect();
        self.client = Some(self.client_of(&all));
    }

    /// The path of a file that goes away with the cluster.
    #[must_use]
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Runs a future of the client library to its end.
    pub fn block<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    #[must_use]
    pub fn handle(&self) -> tokio::runtime::Handle {
        self.runtime.handle().clone()
    }

    /// Peer addresses of the group, as `blockctl --servers` and `fuse-fs --servers` want them.
    #[must_use]
    pub fn server_list(&self) -> String {
        let all: Vec<String> = self.servers.iter().map(Server::peer_address).collect();
        all.join(",")
    }

    /// Runs `blockctl` on the group, for at most a minute; the words are split at spaces.
    #[must_use]
    pub fn try_blockctl(&self, words: &str) -> Ran {
        let servers = ["--servers".to_owned(), self.server_list()];
        let words = words.split_whitespace().map(str::to_owned);
        try_run(60, binary("blockctl"), servers.into_iter().chain(words))
    }

    /// As [`Self::try_blockctl`], and it must succeed; what it printed.
    pub fn blockctl(&self, words: &str) -> String {
        self.try_blockctl(words).ok().stdout
    }

    /// A client that knows these servers (by index) only.
    #[must_use]
    pub fn client_of(&self, indices: &[usize]) -> Client {
        self.client_with(indices, ClientOptions::default())
    }

    #[must_use]
    pub fn client_with(&self, indices: &[usize], options: ClientOptions) -> Client {
        let servers: Vec<String> = indices
            .iter()
            .map(|i| self.servers[*i].peer_address())
            .collect();
        self.block(Client::connect(&servers, options)).unwrap()
    }

    /// The client that knows all servers.
    #[must_use]
    pub fn client(&self) -> &Client {
        self.client.as_ref().expect("the cluster is defined")
    }

    /// One request, through any server.
    pub fn admin(&self, request: AdminRequest) -> Result<AdminReply, ClientError> {
        self.block(self.client().admin(request))
    }

    /// One request through one server.
    pub fn admin_at(&self, index: usize, request: AdminRequest) -> Result<AdminReply, ClientError> {
        let client = self.client_of(&[index]);
        self.block(client.admin(request))
    }

    /// A request that must be refused; the refusal.
    #[must_use]
    pub fn refused(&self, request: AdminRequest) -> AdminError {
        match self.admin(request.clone()) {
            Err(ClientError::Refused(error)) => error,
            other => panic!("{request:?} was not refused: {other:?}"),
        }
    }

    /// A volume over all servers with the default pages.
    pub fn create(&self, name: &str, size_bytes: u64) -> VolumeInfo {
        self.create_on(name, size_bytes, DEFAULT_PAGE_BLOCKS, &[])
    }

    pub fn create_on(
        &self,
        name: &str,
        size_bytes: u64,
        page_blocks: u32,
        servers: &[u16],
    ) -> VolumeInfo {
        let create = AdminRequest::VolumeCreate(VolumeCreate {
            name: name.to_owned(),
            size_bytes,
            servers: servers.iter().map(|number| NodeNo(*number)).collect(),
            page_blocks,
            format: None,
        });
        match self.admin(create).unwrap() {
            AdminReply::Volume(info) => info,
            other => panic!("{other:?}"),
        }
    }

    pub fn show(&self, name: &str) -> VolumeInfo {
        let name = name.to_owned();
        match self.admin(AdminRequest::VolumeShow { name }).unwrap() {
            AdminReply::Volume(info) => info,
            other => panic!("{other:?}"),
        }
    }

    /// The routing table of a volume as one server shows it.
    pub fn route(&self, index: usize, volume: &str) -> RouteInfo {
        let volume = volume.to_owned();
        match self
            .admin_at(index, AdminRequest::RouteShow { volume })
            .unwrap()
        {
            AdminReply::Route(route) => route,
            other => panic!("{other:?}"),
        }
    }

    /// Takes `VOL@SNAP` of all targets as one point in time, through one server.
    pub fn snapshot_at(
        &self,
        index: usize,
        targets: &[&str],
    ) -> Result<Vec<SnapshotInfo>, ClientError> {
        let targets = targets.iter().map(|target| snapshot_name(target)).collect();
        match self.admin_at(index, AdminRequest::SnapshotCreate { targets })? {
            AdminReply::Snapshots(infos) => Ok(infos),
            other => panic!("{other:?}"),
        }
    }

    /// As [`Self::snapshot_at`], by this procedure.
    pub fn snapshot_by(
        &self,
        index: usize,
        targets: &[&str],
        procedure: Procedure,
    ) -> Result<Vec<SnapshotInfo>, ClientError> {
        let targets = targets.iter().map(|target| snapshot_name(target)).collect();
        match self.admin_at(index, AdminRequest::SnapshotCreateBy { targets, procedure })? {
            AdminReply::Snapshots(infos) => Ok(infos),
            other => panic!("{other:?}"),
        }
    }

    /// What keeps requests waiting, asked of one server.
    #[must_use]
    pub fn holds_at(&self, index: usize) -> HoldsInfo {
        match self.admin_at(index, AdminRequest::HoldList).unwrap() {
            AdminReply::Holds(holds) => holds,
            other => panic!("{other:?}"),
        }
    }

    pub fn snapshot(&self, target: &str) -> SnapshotInfo {
        self.snapshot_at(0, &[target]).unwrap().remove(0)
    }

    pub fn delete_snapshot(&self, target: &str) {
        let target = snapshot_name(target);
        self.admin(AdminRequest::SnapshotDelete { target }).unwrap();
    }

    pub fn snapshots(&self, volume: &str) -> Vec<SnapshotInfo> {
        let volume = Some(volume.to_owned());
        match self.admin(AdminRequest::SnapshotList { volume }).unwrap() {
            AdminReply::Snapshots(infos) => infos,
            other => panic!("{other:?}"),
        }
    }

    pub fn open(&self, name: &str) -> Volume {
        self.block(self.client().open(name)).unwrap()
    }

    /// An NBD connection over TCP to one server.
    pub fn nbd(&self, index: usize, export: &str) -> NbdConnection {
        NbdConnection::tcp(&self.servers[index].nbd_address(), export).unwrap()
    }

    /// Waits until every server answers for the cluster with a leader.
    pub fn wait_writable(&self) {
        self.wait_writable_but(usize::MAX);
    }

    /// As [`Self::wait_writable`], without a server (by index) that is down.
    pub fn wait_writable_but(&self, down: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        for index in (0..self.servers.len()).filter(|index| *index != down) {
            loop {
                let status = self.admin_at(index, AdminRequest::ClusterStatus);
                match &status {
                    Ok(AdminReply::Cluster(status)) if status.phase == 2 => break,
                    _ => assert!(Instant::now() < deadline, "no leader: {status:?}"),
                }
                sleep(Duration::from_millis(20));
            }
        }
    }

    /// Bytes that the state directories take on disk.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.servers
            .iter()
            .map(|server| allocated_bytes(&server.state))
            .sum()
    }
}

fn snapshot_name(target: &str) -> SnapshotName {
    let (volume, snapshot) = target.split_once('@').unwrap();
    SnapshotName {
        volume: volume.to_owned(),
        snapshot: snapshot.to_owned(),
    }
}

/// Bytes of blocks that the files of a directory occupy.
fn allocated_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(path).unwrap().map(Result::unwrap);
    let sizes = entries.map(|entry| match entry.file_type().unwrap().is_dir() {
        true => allocated_bytes(&entry.path()),
        false => entry.metadata().unwrap().blocks() * 512,
    });
    sizes.sum()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for server in &self.servers {
            let log = server.log();
            let lines: Vec<&str> = log.lines().collect();
            let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
            eprintln!("--- log of server {}\n{}", server.number, shown.join("\n"));
        }
    }
}
