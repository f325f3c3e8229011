//! The feature bits of a superblock: their names, and which of them this code can honour.
//!
//! A filesystem with an incompatible feature outside [`READABLE`] must not even be read.

/// Compatible features that this code names.
pub mod compat {
    pub const HAS_JOURNAL: u32 = 0x4;
    pub const EXT_ATTR: u32 = 0x8;
    pub const RESIZE_INODE: u32 = 0x10;
    pub const DIR_INDEX: u32 = 0x20;
    pub const SPARSE_SUPER2: u32 = 0x200;
    pub const FAST_COMMIT: u32 = 0x400;
    pub const ORPHAN_FILE: u32 = 0x1000;
}

/// Incompatible features that this code names.
pub mod incompat {
    pub const FILETYPE: u32 = 0x2;
    pub const NEEDS_RECOVERY: u32 = 0x4;
    pub const META_BG: u32 = 0x10;
    pub const EXTENT: u32 = 0x40;
    pub const BIT64: u32 = 0x80;
    pub const MMP: u32 = 0x100;
    pub const FLEX_BG: u32 = 0x200;
    pub const METADATA_CSUM_SEED: u32 = 0x2000;
    pub const LARGE_DIR: u32 = 0x4000;
}

/// Features that forbid writing by who does not know them, as far as this code names them.
pub mod ro_compat {
    pub const SPARSE_SUPER: u32 = 0x1;
    pub const LARGE_FILE: u32 = 0x2;
    pub const HUGE_FILE: u32 = 0x8;
    pub const GDT_CSUM: u32 = 0x10;
    pub const DIR_NLINK: u32 = 0x20;
    pub const EXTRA_ISIZE: u32 = 0x40;
    pub const QUOTA: u32 = 0x100;
    pub const METADATA_CSUM: u32 = 0x400;
    pub const READ_ONLY: u32 = 0x1000;
    pub const PROJECT: u32 = 0x2000;
    pub const VERITY: u32 = 0x8000;
    pub const ORPHAN_PRESENT: u32 = 0x1_0000;
}

/// Incompatible features whose filesystems can be read.
pub const READABLE: u32 = incompat::FILETYPE
    | incompat::NEEDS_RECOVERY
    | incompat::META_BG
    | incompat::EXTENT
    | incompat::BIT64
    | incompat::MMP
    | incompat::FLEX_BG
    | incompat::METADATA_CSUM_SEED
    | incompat::LARGE_DIR;

/// Features of `ro_compat` that leave the meaning of blocks, inodes and bitmaps as it is checked.
pub const CHECKED: u32 = ro_compat::SPARSE_SUPER
    | ro_compat::LARGE_FILE
    | ro_compat::HUGE_FILE
    | ro_compat::GDT_CSUM
    | ro_compat::DIR_NLINK
    | ro_compat::EXTRA_ISIZE
    | ro_compat::QUOTA
    | ro_compat::METADATA_CSUM
    | ro_compat::READ_ONLY
    | ro_compat::PROJECT
    | ro_compat::VERITY
    | ro_compat::ORPHAN_PRESENT;

/// Features of `ro_compat` whose filesystems can be written.
pub const WRITABLE: u32 = ro_compat::SPARSE_SUPER
    | ro_compat::LARGE_FILE
    | ro_compat::HUGE_FILE
    | ro_compat::GDT_CSUM
    | ro_compat::DIR_NLINK
    | ro_compat::EXTRA_ISIZE
    | ro_compat::METADATA_CSUM
    | ro_compat::ORPHAN_PRESENT;

const INCOMPAT_NAMES: [(u32, &str); 16] = [
    (0x1, "compression"),
    (0x2, "filetype"),
    (0x4, "needs_recovery"),
    (0x8, "journal_dev"),
    (0x10, "meta_bg"),
    (0x40, "extent"),
    (0x80, "64bit"),
    (0x100, "mmp"),
    (0x200, "flex_bg"),
    (0x400, "ea_inode"),
    (0x1000, "dirdata"),
    (0x2000, "metadata_csum_seed"),
    (0x4000, "large_dir"),
    (0x8000, "inline_data"),
    (0x1_0000, "encrypt"),
    (0x2_0000, "casefold"),
];

const RO_COMPAT_NAMES: [(u32, &str); 17] = [
    (0x1, "sparse_super"),
    (0x2, "large_file"),
    (0x4, "btree_dir"),
    (0x8, "huge_file"),
    (0x10, "uninit_bg"),
    (0x20, "dir_nlink"),
    (0x40, "extra_isize"),
    (0x80, "has_snapshot"),
    (0x100, "quota"),
    (0x200, "bigalloc"),
    (0x400, "metadata_csum"),
    (0x800, "replica"),
    (0x1000, "read-only"),
    (0x2000, "project"),
    (0x4000, "shared_blocks"),
    (0x8000, "verity"),
    (0x1_0000, "orphan_present"),
];

/// The three words of a superblock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    pub compat: u32,
    pub incompat: u32,
    pub ro_compat: u32,
}

impl Features {
    #[must_use]
    pub fn has_compat(&self, bits: u32) -> bool {
        self.compat & bits != 0
    }

    #[must_use]
    pub fn has_incompat(&self, bits: u32) -> bool {
        self.incompat & bits != 0
    }

    #[must_use]
    pub fn has_ro_compat(&self, bits: u32) -> bool {
        self.ro_compat & bits != 0
    }

    /// Descriptors carry checksums, so their flags and counts of unused inodes mean something.
    #[must_use]
    pub fn has_group_checksums(&self) -> bool {
        self.has_ro_compat(ro_compat::GDT_CSUM | ro_compat::METADATA_CSUM)
    }

    /// Names of the features for which nothing of the filesystem can be read.
    #[must_use]
    pub fn unreadable(&self) -> Vec<String> {
        names(self.incompat & !READABLE, &INCOMPAT_NAMES, "incompat")
    }

    /// Names of the features for which nothing may be written; a missing one is named, too.
    #[must_use]
    pub fn unwritable(&self) -> Vec<String> {
        let mut found = names(self.ro_compat & !WRITABLE, &RO_COMPAT_NAMES, "ro_compat");
        found.extend(names(self.incompat & incompat::MMP, &INCOMPAT_NAMES, ""));
        if !self.has_compat(compat::HAS_JOURNAL) {
            found.push("no has_journal".to_owned());
        }
        if !self.has_incompat(incompat::EXTENT) {
            found.push("no extent".to_owned());
        }
        found
    }

    /// Names of the features for which a check would be wrong.
    #[must_use]
    pub fn unchecked(&self) -> Vec<String> {
        names(self.ro_compat & !CHECKED, &RO_COMPAT_NAMES, "ro_compat")
    }
}

/// One name a bit; a bit without a name is shown as e2fsprogs does not: by word and value.
fn names(bits: u32, table: &[(u32, &str)], word: &str) -> Vec<String> {
    let set = (0..u32::BITS)
        .map(|shift| 1 << shift)
        .filter(|bit| bits & bit != 0);
    let name = |bit: u32| match table.iter().find(|(known, _)| *known == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("{word} {bit:#x}"),
    };
    set.map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_honoured_is_named() {
        let features = Features {
            compat: 0,
            incompat: incompat::EXTENT | 0x8000 | 0x8000_0000,
            ro_compat: ro_compat::METADATA_CSUM | 0x200,
        };
        assert_eq!(
            features.unreadable(),
            ["inline_data", "incompat 0x80000000"]
        );
        assert_eq!(features.unchecked(), ["bigalloc"]);
    }
}
