//! `blockctl`: the command that controls a group of `blockd` servers.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod archive;
mod args;
mod attach;
mod backup;
mod command;
mod details;
mod documents;
mod failure;
mod format;
mod holds;
mod interrupt;
mod lease;
mod lineage;
mod mount;
mod moves;
mod network;
mod output;
mod page_map;
mod progress;
mod scrub;
mod session;
mod settings;
mod size;

use crate::args::Cli;
use crate::failure::Failure;
use clap::Parser as _;
use serde_json::json;
use std::process::ExitCode;

const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain_usage(&error),
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            complain(cli.json, failure.kind(), &failure.to_string());
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Tool {
            tool: "starting the runtime".to_owned(),
            reason: error.to_string(),
        })?;
    runtime.block_on(command::run(cli))
}

/// `--help` and `--version` arrive here too; they are no errors.
fn explain_usage(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args_os().any(|arg| arg == "--json");
    if error.use_stderr() && wants_json {
        complain(true, "usage", &usage_message(error));
    } else if error.print().is_err() {
        return ExitCode::from(EXIT_USAGE);
    }
    if error.use_stderr() {
        ExitCode::from(EXIT_USAGE)
    } else {
        ExitCode::SUCCESS
    }
}

/// Without clap's own prefix, and without the usage and the pointer to `--help` behind it.
fn usage_message(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let reason = text.split("\n\n").next().unwrap_or(text);
    reason.trim_end().to_owned()
}

fn complain(as_json: bool, kind: &str, message: &str) {
    if as_json {
        eprintln!("{}", json!({"error": {"kind": kind, "message": message}}));
    } else {
        eprintln!("blockctl: {message}");
    }
}
