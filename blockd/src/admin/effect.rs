//! What a request does to the cluster: who may ask for it, and whether it is audited, rests on that.

use super::AdminRequest;

/// From harmless to harmful; each right includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// Only tells.
    Reads,
    /// Goes on with what somebody else began, again and again: a heartbeat, a step.
    GoesOn,
    /// Changes something, and could be undone.
    Changes,
    /// Takes away what nobody gives back, or decides to which cluster a server belongs.
    Destroys,
}

impl AdminRequest {
    /// What it does at the most.
    #[must_use]
    pub fn effect(&self) -> Effect {
        match self {
            Self::ClusterStatus
            | Self::NodeList
            | Self::VolumeList
            | Self::VolumeShow { .. }
            | Self::SnapshotList { .. }
            | Self::RouteShow { .. }
            | Self::Version
            | Self::Open { .. }
            | Self::Identify
            | Self::LeaseList
            | Self::LeaseShow { .. }
            | Self::VolumeGet { .. }
            | Self::ScrubShow { .. }
            | Self::HoldList
            | Self::MoveList { .. }
            | Self::DrainList
            | Self::MoveGiven { .. }
            | Self::VolumeDetails { .. }
            | Self::SnapshotDetails { .. }
            | Self::NetworkList
            | Self::ServiceOrder { .. } => Effect::Reads,
            Self::LeaseRenew { .. } | Self::ScrubStep { .. } => Effect::GoesOn,
            Self::VolumeResize { allow_shrink, .. } if *allow_shrink => Effect::Destroys,
            Self::NodeDefine { .. }
            | Self::VolumeCreate(_)
            | Self::VolumeResize { .. }
            | Self::VolumeRename { .. }
            | Self::SnapshotCreate { .. }
            | Self::SnapshotCreateBy { .. }
            | Self::LeaseAcquire { .. }
            | Self::LeaseRelease { .. }
            | Self::VolumeSet { .. }
            | Self::ScrubKeep(_)
            | Self::PageMove { .. }
            | Self::VolumeRebalance { .. }
            | Self::MoveWish { .. }
            | Self::NodeDrain { .. }
            | Self::SnapshotRename { .. }
            | Self::SnapshotProtect { .. }
            | Self::SetOffline { .. }
            | Self::VolumeClone(_)
            | Self::VolumeFlatten { .. }
            | Self::NetworkDefine { .. }
            | Self::NetworkModify { .. }
            | Self::NetworkUndefine { .. }
            | Self::SubnetworkDefine { .. }
            | Self::SubnetworkModify { .. }
            | Self::SubnetworkUndefine { .. } => Effect::Changes,
            Self::ClusterDefine { .. }
            | Self::Join(_)
            | Self::VolumeDelete { .. }
            | Self::SnapshotDelete { .. }
            | Self::SnapshotRollback { .. }
            | Self::LeaseBreak { .. }
            | Self::NodeForget { .. } => Effect::Destroys,
        }
    }
}
