//! The system tests: real `blockd` processes under real clients. One binary, a module a subject.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "system/archives.rs"]
mod archives;
#[path = "system/attach_guest.rs"]
mod attach_guest;
#[path = "system/attach_qemu.rs"]
mod attach_qemu;
#[path = "system/attach_socket.rs"]
mod attach_socket;
#[path = "system/bad_requests.rs"]
mod bad_requests;
#[path = "system/bad_state.rs"]
mod bad_state;
#[path = "system/chains.rs"]
mod chains;
#[path = "system/crash.rs"]
mod crash;
#[path = "system/dirty_bitmaps.rs"]
mod dirty_bitmaps;
#[path = "system/exports.rs"]
mod exports;
#[path = "system/family_moves.rs"]
mod family_moves;
#[path = "system/files_view.rs"]
mod files_view;
#[path = "system/flushes.rs"]
mod flushes;
#[path = "system/full_disk.rs"]
mod full_disk;
#[path = "system/holds.rs"]
mod holds;
#[path = "system/hostile_clients.rs"]
mod hostile_clients;
#[path = "system/hostile_peers.rs"]
mod hostile_peers;
#[path = "system/http.rs"]
mod http;
#[path = "system/http_access.rs"]
mod http_access;
#[path = "system/kernel.rs"]
mod kernel;
#[path = "system/leases.rs"]
mod leases;
#[path = "system/lineage.rs"]
mod lineage;
#[path = "system/lost_owners.rs"]
mod lost_owners;
#[path = "system/move_kills.rs"]
mod move_kills;
#[path = "system/move_rates.rs"]
mod move_rates;
#[path = "system/moves.rs"]
mod moves;
#[path = "system/nbd_clients.rs"]
mod nbd_clients;
#[path = "system/nbd_oracle.rs"]
mod nbd_oracle;
#[path = "system/nbd_restarts.rs"]
mod nbd_restarts;
#[path = "system/nbd_tls.rs"]
mod nbd_tls;
#[path = "system/networks.rs"]
mod networks;
#[path = "system/offline_check.rs"]
mod offline_check;
#[path = "system/orders.rs"]
mod orders;
#[path = "system/own_ext4.rs"]
mod own_ext4;
#[path = "system/paths.rs"]
mod paths;
#[path = "system/procedures.rs"]
mod procedures;
#[path = "system/readme.rs"]
mod readme;
#[path = "system/rebalance_load.rs"]
mod rebalance_load;
#[path = "system/recoveries.rs"]
mod recoveries;
#[path = "system/resizes.rs"]
mod resizes;
#[path = "system/restart.rs"]
mod restart;
#[path = "system/routing.rs"]
mod routing;
#[path = "system/scrubs.rs"]
mod scrubs;
#[path = "system/settings.rs"]
mod settings;
#[path = "system/shared_blocks.rs"]
mod shared_blocks;
#[path = "system/slow_disk.rs"]
mod slow_disk;
#[path = "system/snapshot_kills.rs"]
mod snapshot_kills;
#[path = "system/snapshot_steps.rs"]
mod snapshot_steps;
#[path = "system/snapshot_verbs.rs"]
mod snapshot_verbs;
#[path = "system/snapshots.rs"]
mod snapshots;
#[path = "system/spans.rs"]
mod spans;
#[path = "system/stale_messages.rs"]
mod stale_messages;
