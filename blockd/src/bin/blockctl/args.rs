//! The command line of `blockctl`.

use crate::archive::{Archive, Restore};
use crate::attach::{Attach, AttachmentVerb, Detach};
use crate::backup::{Diff, Export, Import};
use crate::moves::{Drain, MoveVerb, PageVerb, Rebalance};
use crate::network::{NetworkVerb, SubnetVerb};
use crate::size::{parse_duration, parse_volume_size};
use blockd::admin::SnapshotName;
use blockd::control::snapshot::Procedure;
use blockd::id::{DEFAULT_PAGE_BLOCKS, NodeNo};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused or failed
  2  wrong usage
  3  no server reached, or no majority of them

With --json a result is one JSON value on stdout, and an error is
{\"error\":{\"kind\":...,\"message\":...}} on stderr.";

/// Controls a group of blockd servers.
#[derive(Debug, Parser)]
#[command(name = "blockctl", version, after_help = EXIT_CODES)]
#[command(arg_required_else_help = true, subcommand_required = true)]
pub(crate) struct Cli {
    /// Servers to ask, each HOST or HOST:PORT; the first that answers is used
    #[arg(
        long,
        env = "BLOCKD_SERVERS",
        value_name = "A,B,C",
        value_delimiter = ','
    )]
    #[arg(default_value = "127.0.0.1", value_parser = parse_server)]
    pub(crate) servers: Vec<String>,
    /// Print the result as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// How long to wait for an answer: 500ms, 30s, 2m
    #[arg(long, global = true, value_name = "TIME", default_value = "30s")]
    #[arg(value_parser = parse_duration)]
    pub(crate) timeout: Duration,
    #[command(subcommand)]
    pub(crate) noun: Noun,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Noun {
    /// The cluster as a whole
    #[command(subcommand)]
    Cluster(ClusterVerb),
    /// The servers of the cluster
    #[command(subcommand)]
    Node(NodeVerb),
    /// Volumes
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Snapshots of volumes, VOL@SNAP
    #[command(subcommand)]
    Snapshot(SnapshotVerb),
    /// Who alone may write a volume
    #[command(subcommand)]
    Lease(LeaseVerb),
    /// Pages of volumes
    #[command(subcommand)]
    Page(PageVerb),
    /// Moves of pages between servers
    #[command(subcommand)]
    Move(MoveVerb),
    /// Which server owns which pages
    #[command(subcommand)]
    Route(RouteVerb),
    /// Networks, and which traffic between servers takes which
    #[command(subcommand, visible_alias = "net")]
    Network(NetworkVerb),
    /// Subnetworks, and the networks that they belong to
    #[command(subcommand)]
    Subnet(SubnetVerb),
    /// A volume as a block device of this host, or as a unix socket for QEMU
    Attach(Attach),
    /// Give the device or socket of a volume back
    Detach(Detach),
    /// What keeps requests of clients waiting at the moment
    #[command(subcommand)]
    Io(IoVerb),
    /// What is attached on this host
    #[command(subcommand)]
    Attachment(AttachmentVerb),
    /// Mount the filesystem in a volume or snapshot (runs fuse-fs)
    Mount(Mount),
    /// Let a mounted filesystem fill its volume after `volume resize` (runs fuse-fs)
    Grow { dir: PathBuf },
    /// Unmount what `blockctl mount` mounted (runs fuse-fs)
    Umount {
        dir: PathBuf,
        /// Options of `fuse-fs umount`: --timeout SECONDS, --force
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<OsString>,
    },
    /// The versions of this command and of the server that answers
    Version,
    /// Print a completion script for a shell
    Completion { shell: clap_complete::Shell },
    /// Write the man pages into a directory
    Man { dir: PathBuf },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterVerb {
    /// Make the server that answers the first node of a new cluster
    Define { name: String },
    /// Nodes, registry and counts
    Status,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeVerb {
    /// Define the server at ADDR as a node of the cluster
    Define {
        /// Its peer address, HOST or HOST:PORT
        #[arg(value_name = "ADDR")]
        address: String,
        /// A name for people; the servers choose one otherwise
        #[arg(long)]
        name: Option<String>,
        /// Bring it online at once
        #[arg(long)]
        online: bool,
    },
    /// All nodes
    List,
    /// Move all pages away from a node, and give it none any more
    Drain(Drain),
    /// Let a drained node own pages again
    Undrain {
        #[arg(value_name = "NODE", value_parser = parse_node)]
        node: NodeNo,
    },
    /// Take a drained node that is gone for good out of the cluster
    Forget {
        #[arg(value_name = "NODE", value_parser = parse_node)]
        node: NodeNo,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeVerb {
    /// Create a volume; nothing is allocated until it is written
    Create(VolumeCreateArgs),
    /// All volumes
    List,
    /// One volume in full
    Show { name: String },
    /// Grow a volume, or shrink it with --allow-shrink
    Resize {
        name: String,
        /// The new size: 8GiB, 512MiB, 10G, 1.5TiB, plain bytes
        #[arg(value_parser = parse_volume_size, value_name = "SIZE", allow_hyphen_values = true)]
        size: u64,
        /// Give up what lies behind the new end
        #[arg(long)]
        allow_shrink: bool,
    },
    /// Even space, then load, out over the servers, moving the fewest pages
    Rebalance(Rebalance),
    /// Give a volume another name
    Rename { name: String, new_name: String },
    /// Change a setting of a volume
    ///
    /// `procedure`: how its snapshots are taken: barrier, hold or stamp.
    ///
    /// `snapshots`: when they are taken by themselves, and how many are kept: `every 1h keep 24, daily
    /// at 02:30 keep 7`; the periods are every N and s, m, h or d, hourly, daily, weekly (Mondays) and
    /// monthly (the first), in UTC; `none` ends it.
    Set {
        name: String,
        /// procedure or snapshots
        key: String,
        value: String,
    },
    /// Verify every checksum of volumes and their snapshots, on all servers
    Scrub(Scrub),
    /// The settings of a volume, or one of them
    Get { name: String, key: Option<String> },
    /// Create a volume that is what a snapshot is; nothing is copied until it is written
    Clone {
        #[arg(value_name = "VOL@SNAP", value_parser = parse_snapshot)]
        source: SnapshotName,
        #[arg(value_name = "NEW")]
        name: String,
        /// Create it off-line
        #[arg(long)]
        offline: bool,
    },
    /// Copy what a clone still has in its parent, until it needs that no more
    Flatten {
        name: String,
        /// Do not wait until it is done
        #[arg(long)]
        no_wait: bool,
    },
    /// Take VOL or VOL@SNAP off-line: nobody opens, attaches or mounts it
    Offline {
        #[arg(value_name = "VOL[@SNAP]")]
        target: String,
    },
    /// Bring VOL or VOL@SNAP back
    Online {
        #[arg(value_name = "VOL[@SNAP]")]
        target: String,
    },
    /// Delete a volume and its data
    Delete {
        name: String,
        /// Delete its snapshots first
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Scrub {
    #[arg(required_unless_present = "all", value_name = "VOL")]
    pub(crate) volumes: Vec<String>,
    /// All volumes
    #[arg(long, conflicts_with = "volumes")]
    pub(crate) all: bool,
    /// Bytes a second that each server reads at the most: 200MiB, 1GiB
    #[arg(long, value_parser = parse_volume_size, value_name = "BYTES", default_value = "200MiB")]
    pub(crate) rate: u64,
    /// Go on where ctrl-c or a lost server paused the last one
    #[arg(long)]
    pub(crate) resume: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VolumeCreateArgs {
    pub(crate) name: String,
    /// 4GiB, 512MiB, 10G, 1.5TiB, plain bytes
    #[arg(long, value_parser = parse_volume_size, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) size: u64,
    /// Numbers of the nodes that share its pages; all nodes if not given
    #[arg(
        long = "servers",
        id = "on_servers",
        value_name = "1,2",
        value_delimiter = ','
    )]
    #[arg(value_parser = parse_node)]
    pub(crate) servers: Vec<NodeNo>,
    /// Blocks of 512 bytes in a page, a power of two
    #[arg(long, value_name = "BLOCKS", default_value_t = DEFAULT_PAGE_BLOCKS)]
    pub(crate) page_blocks: u32,
    /// Make a filesystem on it
    #[arg(long, value_name = "FS")]
    pub(crate) format: Option<Format>,
}

/// The filesystems that the kernel mounts and that `--format` can make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Ext4,
    Xfs,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Take one point in time of one or more volumes
    Create {
        #[arg(required = true, value_name = "VOL@SNAP", value_parser = parse_snapshot)]
        targets: Vec<SnapshotName>,
        /// How the point in time is made: barrier, hold or stamp; the setting of the volumes, if
        /// not given
        #[arg(long)]
        procedure: Option<Procedure>,
        /// Keep no snapshot: write its page map, with checksums, into this file (- for stdout)
        #[arg(long, value_name = "FILE")]
        metadata_only: Option<PathBuf>,
        /// Take the snapshots off-line afterwards
        #[arg(long)]
        offline: bool,
    },
    /// All snapshots, or those of one volume
    List {
        #[arg(value_name = "VOL")]
        volume: Option<String>,
    },
    /// What changed between two snapshots, or from one to the volume; of one, what has data
    Diff(Diff),
    /// Write a snapshot, or what changed since another, as an RBD diff
    Export(Export),
    /// Read an RBD diff into the volume that has what it rests on, or into a new one
    Import(Import),
    /// Add a snapshot to an archive in a directory or an S3 bucket; goes on where it broke off
    Archive(Archive),
    /// Make a volume of an archived snapshot
    Restore(Restore),
    /// The snapshots in an archive
    Archives { url: String },
    /// Read all of an archive and check it
    ArchiveVerify { url: String },
    /// Make the volume what a snapshot is; what it was is kept in a new snapshot
    Rollback {
        #[arg(value_name = "VOL@SNAP", value_parser = parse_snapshot)]
        target: SnapshotName,
    },
    /// Give a snapshot another name
    Rename {
        #[arg(value_name = "VOL@OLD", value_parser = parse_snapshot)]
        target: SnapshotName,
        #[arg(value_name = "NEW")]
        new_name: String,
    },
    /// Refuse to delete a snapshot
    Protect {
        #[arg(value_name = "VOL@SNAP", value_parser = parse_snapshot)]
        target: SnapshotName,
    },
    /// Let a protected snapshot be deleted again
    Unprotect {
        #[arg(value_name = "VOL@SNAP", value_parser = parse_snapshot)]
        target: SnapshotName,
    },
    /// Delete a snapshot and free what only it holds
    Delete {
        #[arg(value_name = "VOL@SNAP", value_parser = parse_snapshot)]
        target: SnapshotName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum IoVerb {
    /// Every hold on every server, with its owner, reason and deadline
    Holds {
        #[command(subcommand)]
        verb: Option<HoldsVerb>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum HoldsVerb {
    /// The same
    List,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LeaseVerb {
    /// All volumes that are leased
    List,
    /// The lease of one volume
    Show {
        #[arg(value_name = "VOL")]
        volume: String,
    },
    /// Take the lease from a holder that is gone; its later writes fail
    Break {
        #[arg(value_name = "VOL")]
        volume: String,
        /// Do it; without this it says what it would do
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum RouteVerb {
    /// The routing table of a volume, run-length encoded
    Show {
        #[arg(value_name = "VOL")]
        volume: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Mount {
    /// VOL, or VOL@SNAP for read-only; `stats` tells what the mount on DIR has done
    #[arg(value_name = "VOL[@SNAP]")]
    pub(crate) target: String,
    pub(crate) dir: PathBuf,
    /// Passed on to `fuse-fs mount`: -o OPTIONS, -f, --wait SECONDS, --kernel
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "OPTION"
    )]
    pub(crate) options: Vec<OsString>,
}

fn parse_server(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("a server is HOST[:PORT], and servers are separated by commas".to_owned()),
        server => Ok(server.to_owned()),
    }
}

fn parse_node(text: &str) -> Result<NodeNo, String> {
    match text.trim().parse::<u16>() {
        Ok(number) if number > 0 => Ok(NodeNo(number)),
        _ => Err("a node number is a whole number from 1 on; see `blockctl node list`".to_owned()),
    }
}

/// Splits `VOL@SNAP`; what makes a good name is for the server to say.
pub(crate) fn parse_snapshot(text: &str) -> Result<SnapshotName, String> {
    match text.split_once('@') {
        Some((volume, snapshot))
            if !volume.is_empty() && !snapshot.is_empty() && !snapshot.contains('@') =>
        {
            Ok(SnapshotName {
                volume: volume.to_owned(),
                snapshot: snapshot.to_owned(),
            })
        }
        _ => Err("a snapshot is written VOL@SNAP, like demo@first".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("blockctl").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn servers_of_the_group_and_of_a_volume_are_told_apart() {
        let line = "--servers 10.0.0.1,10.0.0.2:99 volume create v --size 4GiB --servers 1,3";
        let cli = parse(line).unwrap();
        assert_eq!(cli.servers, ["10.0.0.1", "10.0.0.2:99"]);
        let Noun::Volume(VolumeVerb::Create(create)) = cli.noun else {
            panic!("not a create: {:?}", cli.noun);
        };
        assert_eq!(create.servers, [NodeNo(1), NodeNo(3)]);
        assert_eq!(create.size, 4 << 30);
        assert_eq!(create.page_blocks, 8192);
        assert_eq!(create.format, None);
    }

    #[test]
    fn json_and_timeout_may_stand_behind_the_verb() {
        let cli = parse("volume list --json --timeout 500ms").unwrap();
        assert!(cli.json);
        assert_eq!(cli.timeout, Duration::from_millis(500));
    }

    #[test]
    fn a_negative_size_is_called_negative() {
        for line in ["volume create v --size -4GiB", "volume resize v -4GiB"] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{line}");
            assert!(error.to_string().contains("negative"), "{error}");
        }
    }

    #[test]
    fn shrinking_may_be_allowed_before_or_behind_the_size() {
        for line in [
            "volume resize v 1GiB --allow-shrink",
            "volume resize --allow-shrink v 1GiB",
            "volume resize v --allow-shrink 1GiB",
        ] {
            let cli = parse(line).unwrap();
            assert!(
                matches!(
                    &cli.noun,
                    Noun::Volume(VolumeVerb::Resize { size, allow_shrink: true, .. })
                        if *size == 1 << 30
                ),
                "{line}: {:?}",
                cli.noun
            );
        }
    }

    #[test]
    fn snapshot_names_have_one_at_sign_and_two_sides() {
        for line in ["demo", "@first", "demo@", "demo@a@b", "@"] {
            let error = parse(&format!("snapshot create {line}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{line}");
        }
        let cli = parse("snapshot create demo@first other@first").unwrap();
        let Noun::Snapshot(SnapshotVerb::Create {
            targets, procedure, ..
        }) = cli.noun
        else {
            panic!("not a create: {:?}", cli.noun);
        };
        assert_eq!(procedure, None);
        assert_eq!(targets.len(), 2);
        assert_eq!(targets[1].volume, "other");
        assert_eq!(targets[1].snapshot, "first");
    }

    #[test]
    fn bad_nodes_and_servers_are_refused() {
        for line in [
            "volume create v --size 1G --servers 0",
            "volume create v --size 1G --servers 1,x",
            "volume create v --size 1G --servers 65536",
            "--servers , volume list",
            "volume create v --size 1G --format btrfs",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(parse("snapshot create").is_err());
        assert!(parse("volume create v").is_err());
    }

    #[test]
    fn what_follows_the_directory_goes_to_fuse_fs() {
        let cli = parse("mount demo@first /mnt --allow-other -f").unwrap();
        let Noun::Mount(mount) = cli.noun else {
            panic!("not a mount: {:?}", cli.noun);
        };
        assert_eq!(mount.target, "demo@first");
        assert_eq!(mount.options, ["--allow-other", "-f"]);
    }
}
