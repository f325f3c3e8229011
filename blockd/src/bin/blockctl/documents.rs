//! What is generated from the command line's definition: shell completion and man pages.

use crate::args::Cli;
use crate::failure::Failure;
use crate::output::print;
use clap::CommandFactory as _;
use clap_complete::Shell;
use std::fs;
use std::path::Path;

pub(crate) fn completion(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "blockctl", &mut script);
    print(String::from_utf8_lossy(&script).trim_end())
}

/// One page for the command and one for each noun and verb: `blockctl-volume-create.1`.
pub(crate) fn man_pages(dir: &Path) -> Result<(), Failure> {
    let written =
        fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir));
    written.map_err(|source| Failure::File {
        what: "writing man pages into",
        path: dir.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        man_pages(dir.path()).unwrap();
        for page in ["blockctl.1", "blockctl-volume-create.1", "blockctl-man.1"] {
            let text = fs::read_to_string(dir.path().join(page)).unwrap();
            assert!(text.contains(".SH NAME"), "{page}: {text}");
        }
    }
}
