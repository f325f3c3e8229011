//! Operations on names and attributes, as data; long random lists of them from a seed.

use crate::data::Random;

/// One operation; paths are relative to the root of the filesystem.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Make {
        path: String,
        mode: u32,
    },
    Device {
        path: String,
        mode: u32,
        major: u32,
        minor: u32,
    },
    Symlink {
        path: String,
        target: String,
    },
    Link {
        path: String,
        new: String,
    },
    Unlink {
        path: String,
    },
    RemoveDirectory {
        path: String,
    },
    Rename {
        path: String,
        new: String,
        how: How,
    },
    Mode {
        path: String,
        mode: u32,
    },
    Owner {
        path: String,
        uid: u32,
        gid: u32,
    },
    Times {
        path: String,
        atime: (i64, u32),
        mtime: (i64, u32),
    },
    SetXattr {
        path: String,
        name: String,
        value: Vec<u8>,
        flags: u32,
    },
    RemoveXattr {
        path: String,
        name: String,
    },
    Flags {
        path: String,
        flags: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Replace,
    NoReplace,
    Exchange,
    Whiteout,
}

pub(crate) const DIRECTORY: u32 = libc::S_IFDIR;
pub(crate) const REGULAR: u32 = libc::S_IFREG;
const IMMUTABLE: u32 = 0x10;
const APPEND: u32 = 0x20;
const NO_DUMP: u32 = 0x40;
const NO_ATIME: u32 = 0x80;
const XATTR_CREATE: u32 = 1;
const XATTR_REPLACE: u32 = 2;

impl Random {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A path of up to four names, of few: most exist now and then, as files and as directories.
fn path(random: &mut Random) -> String {
    let depth = random.pick(&[1, 1, 2, 2, 2, 3, 4]);
    let names: Vec<String> = (0..depth).map(|_| name(random)).collect();
    names.join("/")
}

fn name(random: &mut Random) -> String {
    match random.below(40) {
        0 => "n".repeat(255),
        1 => "n".repeat(256),
        2..=9 => format!("{}-{}", "long".repeat(20), random.below(60)),
        _ => format!("d{}", random.below(7)),
    }
}

fn mode(random: &mut Random) -> u32 {
    random.pick(&[0o644, 0o755, 0o700, 0o2775, 0o4711, 0o1777, 0o2640, 0o6755])
}

/// An access control list as programs exchange it, mostly a right one.
fn acl(random: &mut Random) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    let named = random.below(3) > 0;
    let mut entries = vec![(0x01_u16, u32::MAX)];
    if named {
        entries.extend([(0x02, 1000), (0x02, 70_000)]);
    }
    entries.push((0x04, u32::MAX));
    if named {
        entries.extend([(0x08, 33), (0x10, u32::MAX)]);
    }
    entries.push((0x20, u32::MAX));
    if random.below(12) == 0 {
        entries.pop();
    }
    for (tag, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend((random.below(8) as u16).to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn xattr_name(random: &mut Random) -> String {
    match random.below(10) {
        0 => "system.posix_acl_access".to_owned(),
        1 | 2 => "system.posix_acl_default".to_owned(),
        3 => format!("trusted.t{}", random.below(3)),
        4 => "security.selinux".to_owned(),
        5 => "nothing.of.the.kind".to_owned(),
        _ => format!(
            "user.{}{}",
            "u".repeat(random.below(3) as usize * 20 + 1),
            random.below(4)
        ),
    }
}

fn set_xattr(random: &mut Random) -> Operation {
    let name = xattr_name(random);
    let value = match name.starts_with("system.") {
        true => acl(random),
        false => {
            let length = random.pick(&[0, 1, 7, 40, 90, 300, 900, 2000]);
            vec![random.below(256) as u8; length]
        }
    };
    Operation::SetXattr {
        path: path(random),
        name,
        value,
        flags: random.pick(&[0, 0, 0, XATTR_CREATE, XATTR_REPLACE]),
    }
}

fn make(random: &mut Random) -> Operation {
    let mode = mode(random);
    let kind = random.pick(&[
        REGULAR,
        REGULAR,
        REGULAR,
        DIRECTORY,
        DIRECTORY,
        libc::S_IFIFO,
        libc::S_IFSOCK,
    ]);
    Operation::Make {
        path: path(random),
        mode: kind | mode,
    }
}

fn device(random: &mut Random) -> Operation {
    Operation::Device {
        path: path(random),
        mode: random.pick(&[libc::S_IFCHR, libc::S_IFBLK]) | 0o600,
        major: random.pick(&[1, 8, 300]),
        minor: random.pick(&[0, 3, 70_000]),
    }
}

/// The times that inodes keep, at their ends, too.
fn times(random: &mut Random) -> Operation {
    let time = |random: &mut Random| {
        let seconds = random.pick(&[
            0,
            -1,
            -2_147_483_647,
            1_700_000_000,
            2_147_483_648,
            5_000_000_000,
            15_032_385_534,
        ]);
        (seconds, random.below(1_000_000_000) as u32)
    };
    Operation::Times {
        path: path(random),
        atime: time(random),
        mtime: time(random),
    }
}

/// The operation that comes next.
pub(crate) fn operation(random: &mut Random) -> Operation {
    match random.below(100) {
        0..=29 => make(random),
        30..=32 => device(random),
        33..=37 => Operation::Symlink {
            path: path(random),
            target: "t".repeat(random.pick(&[1, 59, 60, 61, 700, 4095])),
        },
        38..=43 => Operation::Link {
            path: path(random),
            new: path(random),
        },
        44..=51 => Operation::Unlink { path: path(random) },
        52..=56 => Operation::RemoveDirectory { path: path(random) },
        57..=74 => Operation::Rename {
            path: path(random),
            new: path(random),
            how: random.pick(&[
                How::Replace,
                How::Replace,
                How::Replace,
                How::NoReplace,
                How::Exchange,
                How::Whiteout,
            ]),
        },
        75..=78 => Operation::Mode {
            path: path(random),
            mode: mode(random),
        },
        79..=81 => Operation::Owner {
            path: path(random),
            uid: random.pick(&[0, 1000, 70_000]),
            gid: random.pick(&[0, 33, 100_000]),
        },
        82..=84 => times(random),
        85..=94 => set_xattr(random),
        95..=96 => Operation::RemoveXattr {
            path: path(random),
            name: xattr_name(random),
        },
        _ => Operation::Flags {
            path: path(random),
            flags: random.pick(&[0, 0, 0, NO_DUMP, NO_ATIME, IMMUTABLE, APPEND]),
        },
    }
}
