//! `/etc/blockdtab`: what `attach --all` and `attach --tab VOL` attach, a volume a line.
//!
//! ```text
//! # VOL[@SNAP]  SERVERS (or -)                OPTIONS (or -)
//! data          10.0.0.1,10.0.0.2,10.0.0.3    exclusive,dead-timeout=2h
//! data@monday   -                             device=/dev/nbd7,noauto
//! ```
//!
//! An option is one of `attach` without its dashes, so both are checked by the same parser;
//! `noauto` leaves the line out of `--all`.

use crate::args::Cli;
use clap::Parser as _;
use std::io;
use std::path::{Path, PathBuf};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TabLine {
    pub(super) target: String,
    pub(super) auto: bool,
    /// The command line that it stands for.
    words: Vec<String>,
    at: String,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TabError {
    #[error("{file}: {source}", file = file.display())]
    Unreadable { file: PathBuf, source: io::Error },
    #[error("{at}: a line is VOL SERVERS OPTIONS, with - for what is not given")]
    Columns { at: String },
    #[error("{at}: {reason}")]
    Option { at: String, reason: String },
    #[error("{file} has no line for {target}", file = file.display())]
    NoLine { file: PathBuf, target: String },
}

impl TabLine {
    /// The command that this line stands for; JSON and patience are those of `cli`.
    pub(super) fn command(&self, cli: &Cli) -> Result<Cli, TabError> {
        let mut command = Cli::try_parse_from(&self.words).map_err(|error| {
            let text = error.to_string();
            let reason = text.lines().next().unwrap_or_default();
            TabError::Option {
                at: self.at.clone(),
                reason: reason.trim_start_matches("error: ").to_owned(),
            }
        })?;
        command.json = cli.json;
        command.timeout = cli.timeout;
        Ok(command)
    }
}

/// Reads the file.
pub(super) fn read(file: &Path) -> Result<Vec<TabLine>, TabError> {
    let text = std::fs::read_to_string(file).map_err(|source| TabError::Unreadable {
        file: file.to_owned(),
        source,
    })?;
    let numbered = text.lines().zip(1..);
    let lines = numbered.filter_map(|(line, number)| {
        let line = line.split('#').next().unwrap_or_default().trim();
        let at = format!("{} line {number}", file.display());
        (!line.is_empty()).then(|| parse(line, at))
    });
    lines.collect()
}

/// The line of one volume.
pub(super) fn line_of(file: &Path, target: &str) -> Result<TabLine, TabError> {
    let found = read(file)?.into_iter().find(|line| line.target == target);
    found.ok_or_else(|| TabError::NoLine {
        file: file.to_owned(),
        target: target.to_owned(),
    })
}

fn parse(line: &str, at: String) -> Result<TabLine, TabError> {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let &[target, servers, options] = columns.as_slice() else {
        return Err(TabError::Columns { at });
    };
    let mut words = vec!["blockctl".to_owned()];
    if servers != "-" {
        words.extend(["--servers".to_owned(), servers.to_owned()]);
    }
    words.extend(["attach".to_owned(), target.to_owned()]);
    let given = options.split(',').filter(|option| *option != "-");
    let (auto, given): (Vec<&str>, Vec<&str>) = given.partition(|option| *option == "noauto");
    words.extend(given.iter().map(|option| format!("--{option}")));
    Ok(TabLine {
        target: target.to_owned(),
        auto: auto.is_empty(),
        words,
        at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Noun;
    use std::time::Duration;

    fn tab(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("blockdtab");
        std::fs::write(&file, text).unwrap();
        (dir, file)
    }

    fn outer() -> Cli {
        Cli::try_parse_from(["blockctl", "--json", "--timeout", "7s", "attach", "--all"]).unwrap()
    }

    #[test]
    fn a_line_is_the_command_that_it_stands_for() {
        let (_dir, file) = tab("# all of them\n\n data a,b  exclusive,dead-timeout=2h # why\n");
        let line = line_of(&file, "data").unwrap();
        assert!(line.auto);
        let command = line.command(&outer()).unwrap();
        assert_eq!(command.servers, ["a", "b"]);
        assert_eq!(
            (command.json, command.timeout),
            (true, Duration::from_secs(7))
        );
        let Noun::Attach(attach) = command.noun else {
            panic!("no attach: {:?}", command.noun);
        };
        assert!(attach.exclusive && !attach.read_only);
        assert_eq!(attach.target.as_deref(), Some("data"));
        assert_eq!(attach.dead_timeout, Duration::from_secs(7200));
    }

    #[test]
    fn a_dash_is_the_default_and_noauto_is_for_all_only() {
        let (_dir, file) = tab("v@s - noauto\nw - -\n");
        let lines = read(&file).unwrap();
        assert_eq!((lines[0].auto, lines[1].auto), (false, true));
        assert!(lines.iter().all(|line| line.command(&outer()).is_ok()));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let (_dir, file) = tab("v - -\nw - color=red\n");
        let error = line_of(&file, "w").unwrap().command(&outer()).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        assert!(error.to_string().contains("--color"), "{error}");
        let missing = line_of(&file, "x").unwrap_err();
        assert!(missing.to_string().contains("no line for x"), "{missing}");
        let (_dir, file) = tab("v\n");
        assert!(matches!(read(&file), Err(TabError::Columns { .. })));
        assert!(matches!(
            read(Path::new("/nowhere")),
            Err(TabError::Unreadable { .. })
        ));
    }
}
