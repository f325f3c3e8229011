//! `mkfs`: looks what is on the volume, makes an ext4, prints what was made.

use crate::backend::Connect;
use crate::daemon;
use crate::error::FuseFsError;
use crate::ext4::device::Device;
use crate::ext4::mkfs::{self, Made, plan::Identity};
use crate::ext4_source::Source;
use crate::superblock::{self, PROBE_BYTES};
use serde_json::json;
use std::fs::File;
use std::io::{self, Read, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of a label.
pub const MAX_LABEL_BYTES: usize = 16;

/// The arguments of `mkfs`.
pub struct MkfsCommand {
    pub source: Source,
    /// At most [`MAX_LABEL_BYTES`].
    pub label: String,
    /// What is there is overwritten.
    pub force: bool,
    pub json: bool,
}

/// Makes the filesystem and prints what it is.
///
/// # Errors
/// There is a filesystem, or what the device reports.
pub fn run(connect: Connect, command: &MkfsCommand) -> Result<(), FuseFsError> {
    let system = |source| FuseFsError::System {
        what: "starting mkfs",
        source,
    };
    let identity = identity(&command.label).map_err(system)?;
    let target = command.source.to_string();
    let failed = |source| FuseFsError::Ext4 {
        target: target.clone(),
        source,
    };
    let runtime = daemon::runtime().map_err(system)?;
    let made = runtime.block_on(async {
        let device = command.source.open(connect, true).await?;
        if !command.force {
            refuse_to_overwrite(device.as_ref(), &target).await?;
        }
        mkfs::make(device.as_ref(), &identity).await.map_err(failed)
    })?;
    let text = if command.json {
        as_json(&target, &identity, &made)
    } else {
        as_text(&target, &identity, &made)
    };
    io::stdout().write_all(text.as_bytes()).map_err(system)
}

async fn refuse_to_overwrite(device: &dyn Device, target: &str) -> Result<(), FuseFsError> {
    let length = device.size_bytes().min(PROBE_BYTES as u64) as u32;
    let head = device
        .read(0, length)
        .await
        .map_err(|error| FuseFsError::Open {
            target: target.to_owned(),
            reason: error.to_string(),
        })?;
    match superblock::detect(&head) {
        Some(found) => Err(FuseFsError::Overwrite {
            target: target.to_owned(),
            filesystem: found.filesystem,
        }),
        None => Ok(()),
    }
}

fn identity(label: &str) -> io::Result<Identity> {
    let mut random = [[0; 16]; 2];
    let mut source = File::open("/dev/urandom")?;
    for uuid in &mut random {
        source.read_exact(uuid)?;
        // Random, as of RFC 4122.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Identity {
        uuid: random[0],
        hash_seed: random[1],
        label: label.as_bytes().to_vec(),
        now: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
    })
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

fn as_text(target: &str, identity: &Identity, made: &Made) -> String {
    format!(
        "{target}: ext4 of {} blocks of {} bytes, {} inodes, a journal of {} blocks, UUID {}; wrote {} KiB\n",
        made.blocks,
        made.block_bytes,
        made.inodes,
        made.journal_blocks,
        uuid_text(&identity.uuid),
        made.written_bytes.div_ceil(1024)
    )
}

fn as_json(target: &str, identity: &Identity, made: &Made) -> String {
    let value = json!({
        "target": target,
        "uuid": uuid_text(&identity.uuid),
        "blocks": made.blocks,
        "block_bytes": made.block_bytes,
        "inodes": made.inodes,
        "journal_blocks": made.journal_blocks,
        "written_bytes": made.written_bytes,
    });
    value.to_string() + "\n"
}
