//! The registry: agreed facts as typed objects, changed by compare-and-set transactions.
//!
//! Pure and deterministic: every registry server applies the same transactions in the same order
//! and has the same state. `crate::io::raft` agrees on the order, `crate::node::registry` is the
//! handle that a program uses.

pub mod change;
pub mod lease;
pub mod lineage;
mod machine;
pub mod marks;
pub mod moves;
mod name;
pub mod networks;
pub mod nodes;
mod object;
pub mod routes;
pub mod schedule;
pub mod scrub;
pub mod settings;
mod state;
mod transaction;

pub use change::{ChangeError, VolumeSpec};
pub use lease::{LeaseEnd, LeaseHolder, LeaseRecord, LeaseState};
pub use lineage::{OriginRecord, RollbackRecord};
pub use machine::{Command, Machine};
pub use moves::{Duty, MoveBatch, MovePhase, MoveRecord, MoveWish};
pub use name::{NameError, check_name, split_volume_name};
pub use networks::{AddressRecord, NetworkRecord, PriorityChange, SubnetworkRecord};
pub use nodes::DrainRecord;
pub use object::{
    ClusterRecord, Key, Mark, NodeRecord, Object, SnapshotRecord, SnapshotState, UniqueId,
    VolumeRecord,
};
pub use routes::{RouteError, RouteRun};
pub use scrub::ScrubRecord;
pub use settings::{Procedure, Setting, SettingError, VolumeSettings};
pub use state::RegistryState;
pub use transaction::{Outcome, Refusal, Transaction};
