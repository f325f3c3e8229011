//! The options of a mount, as mount(8) and fstab(5) write them.

use std::time::Duration;

/// Units of sizes.
const UNITS: [(char, u32); 3] = [('k', 10), ('m', 20), ('g', 30)];
/// Options for mount(8) and systemd themselves.
const FOR_OTHERS: [&str; 9] = [
    "defaults",
    "auto",
    "noauto",
    "_netdev",
    "nofail",
    "user",
    "users",
    "async",
    "default_permissions",
];
const PREFIXES_FOR_OTHERS: [&str; 3] = ["x-", "comment=", "X-"];

/// When reading a file changes its atime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Atime {
    Never,
    /// Once a day, and when it is older than the last change.
    Relative,
    Always,
}

/// How a filesystem is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    pub read_only: bool,
    pub atime: Atime,
    pub directory_atime: bool,
    /// `None`: yes for root, no for others.
    pub devices: Option<bool>,
    pub suid: Option<bool>,
    pub exec: bool,
    pub sync: bool,
    pub dirsync: bool,
    /// Time until a change is durable without fsync.
    pub commit: Duration,
    pub discard: bool,
    pub acl: bool,
    pub writeback: bool,
    pub direct_io: bool,
    /// Idle processors wait awake while the mount is busy.
    pub low_latency: bool,
    pub allow_other: Option<bool>,
    /// Bytes of data that may wait to be written.
    pub cache_bytes: Option<u64>,
    /// How long to wait for another holder of the volume.
    pub wait: Duration,
    /// Servers that fstab names, as it has no other place for them.
    pub servers: Vec<String>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            atime: Atime::Relative,
            directory_atime: true,
            devices: None,
            suid: None,
            exec: true,
            sync: false,
            dirsync: false,
            commit: Duration::from_secs(1),
            discard: true,
            acl: true,
            writeback: true,
            direct_io: false,
            low_latency: false,
            allow_other: None,
            cache_bytes: None,
            wait: Duration::ZERO,
            servers: Vec::new(),
        }
    }
}

impl MountOptions {
    /// Reads a list of options; the last of several that contradict each other counts.
    ///
    /// # Errors
    /// The option that is not known, or whose value cannot be used, as a phrase.
    pub fn parse<'a>(list: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut options = Self::default();
        let list = list.into_iter().flat_map(|words| words.split(','));
        for option in list.map(str::trim).filter(|option| !option.is_empty()) {
            options.apply(option)?;
        }
        Ok(options)
    }

    fn apply(&mut self, option: &str) -> Result<(), String> {
        let foreign = |prefix: &&str| option.starts_with(*prefix);
        if FOR_OTHERS.contains(&option) || PREFIXES_FOR_OTHERS.iter().any(foreign) {
            return Ok(());
        }
        match option.split_once('=') {
            Some((name, value)) => self.set(name, value),
            None => self.switch(option),
        }
    }

    fn switch(&mut self, name: &str) -> Result<(), String> {
        match name {
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "noatime" => self.atime = Atime::Never,
            "relatime" | "atime" => self.atime = Atime::Relative,
            "strictatime" => self.atime = Atime::Always,
            "nodiratime" => self.directory_atime = false,
            "diratime" => self.directory_atime = true,
            "dev" => self.devices = Some(true),
            "nodev" => self.devices = Some(false),
            "suid" => self.suid = Some(true),
            "nosuid" => self.suid = Some(false),
            "exec" => self.exec = true,
            "noexec" => self.exec = false,
            "sync" => self.sync = true,
            "dirsync" => self.dirsync = true,
            "discard" => self.discard = true,
            "nodiscard" => self.discard = false,
            "acl" | "user_xattr" => self.acl = true,
            "noacl" => self.acl = false,
            "writeback" => self.writeback = true,
            "nowriteback" => self.writeback = false,
            "direct_io" => self.direct_io = true,
            "low_latency" => self.low_latency = true,
            "allow_other" => self.allow_other = Some(true),
            _ => return Err(format!("{name}: no such mount option")),
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{name}={value}: {what}"));
        match name {
            "commit" => match value.parse() {
                Ok(seconds @ 1..=300) => self.commit = Duration::from_secs(seconds),
                _ => return wrong("from 1 to 300 seconds"),
            },
            "wait" => match value.parse() {
                Ok(seconds @ 0..=86_400) => self.wait = Duration::from_secs(seconds),
                _ => return wrong("from 0 to 86400 seconds"),
            },
            "cache" => match parse_size(value) {
                Some(bytes) if bytes >= 1 << 20 => self.cache_bytes = Some(bytes),
                _ => return wrong("a size of at least 1M, such as 256M"),
            },
            "servers" => {
                let servers = value.split('+').filter(|server| !server.is_empty());
                self.servers = servers.map(str::to_owned).collect();
            }
            "data" if value == "ordered" => {}
            "data" => return wrong("only ordered, which is the default"),
            "errors" if value == "remount-ro" => {}
            "errors" => return wrong("only remount-ro, which is the default"),
            _ => return Err(format!("{name}: no such mount option")),
        }
        Ok(())
    }
}

/// A number with `K`, `M` or `G` for powers of 1024.
fn parse_size(text: &str) -> Option<u64> {
    let last = text.chars().last()?.to_ascii_lowercase();
    let (digits, shift) = match UNITS.iter().find(|(unit, _)| *unit == last) {
        Some((_, shift)) => (&text[..text.len() - 1], *shift),
        None => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_fstab_are_understood() {
        let line = "rw,_netdev,nofail,x-systemd.automount,noatime,commit=5,cache=64M,servers=a:1+b";
        let options = MountOptions::parse([line, "ro"]).unwrap();
        assert!(options.read_only);
        assert_eq!(options.atime, Atime::Never);
        assert_eq!(options.commit, Duration::from_secs(5));
        assert_eq!(options.cache_bytes, Some(64 << 20));
        assert_eq!(options.servers, ["a:1", "b"]);
        assert_eq!(
            MountOptions::parse(["defaults", ""]),
            Ok(MountOptions::default())
        );
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (option, said) in [
            ("norelatime2", "norelatime2: no such mount option"),
            ("commit=0", "from 1 to 300 seconds"),
            ("cache=1K", "at least 1M"),
            ("cache=99999999999999G", "at least 1M"),
            ("data=writeback", "only ordered"),
            ("errors=panic", "only remount-ro"),
            ("uid=7", "uid: no such mount option"),
            ("norecovery", "norecovery: no such mount option"),
        ] {
            let error = MountOptions::parse([option]).unwrap_err();
            assert!(error.contains(said), "{option}: {error}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("5"), Some(5));
        assert_eq!(parse_size("2k"), Some(2048));
        assert_eq!(parse_size("3G"), Some(3 << 30));
        assert_eq!(parse_size(""), None);
        assert_eq!(parse_size("k"), None);
    }
}
