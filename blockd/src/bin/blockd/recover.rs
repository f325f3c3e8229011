//! `blockd recover`: a cluster whose registry is lost, from the stores of its servers.

use crate::outcome::{Outcome, print};
use anyhow::{Context, bail};
use blockd::control::recovery::{Plan, ServerExport, VolumePlan};
use blockd::node::recover::{
    Applied, apply, export, export_text, make_plan, plan_text, read_export, read_plan,
};
use clap::Subcommand;
use serde_json::json;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub(crate) enum Recover {
    /// Prints what the stopped server of a state directory knows. Changes nothing.
    Export(Export),
    /// Says what would be built from all servers, and writes it as a plan. Changes nothing.
    Plan(MakePlan),
    /// Makes a plan true in the state directories of stopped servers.
    Apply(Apply),
}

#[derive(clap::Args)]
pub(crate) struct Export {
    /// State directory of a server that is stopped.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Write here instead of stdout.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct MakePlan {
    /// Exports of servers.
    #[arg(value_name = "EXPORT")]
    exports: Vec<PathBuf>,
    /// State directories on this machine, instead of their exports; may be repeated.
    #[arg(long, value_name = "DIR")]
    state: Vec<PathBuf>,
    /// Write the plan here, for `blockd recover apply`.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// One JSON value on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct Apply {
    /// What `blockd recover plan --output` wrote; the same on all servers.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// State directories on this machine; may be repeated.
    #[arg(long, value_name = "DIR", required = true)]
    state: Vec<PathBuf>,
    /// Says that no server of the cluster runs, on any machine.
    #[arg(long)]
    i_have_stopped_all_servers: bool,
    /// Apply a plan that has doubts, as it was decided.
    #[arg(long)]
    accept_doubts: bool,
    /// One JSON value on stdout.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Recover) -> anyhow::Result<Outcome> {
    match command {
        Recover::Export(arguments) => run_export(arguments),
        Recover::Plan(arguments) => run_plan(arguments),
        Recover::Apply(arguments) => run_apply(arguments),
    }
}

fn run_export(arguments: &Export) -> anyhow::Result<Outcome> {
    let text = export_text(&export(&arguments.state)?);
    match &arguments.output {
        Some(path) => write_file(path, &text)?,
        None => print(&text)?,
    }
    Ok(Outcome::Done)
}

fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn run_plan(arguments: &MakePlan) -> anyhow::Result<Outcome> {
    let files = arguments.exports.iter().map(|path| read_export(path));
    let states = arguments.state.iter().map(|state| export(state));
    let servers: Vec<ServerExport> = files.chain(states).collect::<Result<_, _>>()?;
    let plan = make_plan(&servers)?;
    if let Some(path) = &arguments.output {
        write_file(path, &plan_text(&plan))?;
    }
    print(&match arguments.json {
        true => format!(
            "{}
",
            plan_json(&plan)
        ),
        false => plan_words(&plan),
    })?;
    Ok(doubts(&plan))
}

fn doubts(plan: &Plan) -> Outcome {
    match plan.doubts() {
        0 => Outcome::Done,
        _ => Outcome::Damage,
    }
}

fn plan_json(plan: &Plan) -> serde_json::Value {
    json!({
        "cluster": plan.cluster_name,
        "cluster_id": plan.cluster_id,
        "old_cluster_id": plan.old_cluster_id,
        "nodes": plan.nodes,
        "volumes": plan.volumes,
        "remarks": plan.remarks,
        "doubts": plan.doubts(),
    })
}

fn plan_words(plan: &Plan) -> String {
    let mut text = format!(
        "cluster {} begins anew as {} (was {})\n",
        plan.cluster_name, plan.cluster_id, plan.old_cluster_id
    );
    for node in &plan.nodes {
        let _ = writeln!(
            text,
            "node {} ({}) at {}",
            node.number, node.name, node.peer_address
        );
    }
    plan.volumes
        .iter()
        .for_each(|volume| text += &volume_words(volume));
    let (doubts, notes): (Vec<_>, Vec<_>) = plan.remarks.iter().partition(|remark| remark.doubt);
    for (word, remarks) in [("note", notes), ("DOUBT", doubts)] {
        for remark in remarks {
            let _ = writeln!(text, "{word}: {}", remark.text);
        }
    }
    text
}

fn volume_words(volume: &VolumePlan) -> String {
    let owners = volume.owners.iter();
    let owners: Vec<String> = owners
        .map(|(node, pages)| format!("node {node}: {pages}"))
        .collect();
    let mut text = format!(
        "volume {} (id {}): {} bytes, pages of {} blocks, epoch {}, owned by {}; {} pages stored",
        volume.name,
        volume.id,
        volume.size_bytes,
        volume.page_blocks,
        volume.epoch,
        owners.join(", "),
        volume.stored_pages
    );
    if volume.unavailable_pages > 0 {
        let _ = write!(text, ", {} NOT AVAILABLE", volume.unavailable_pages);
    }
    if !volume.snapshots.is_empty() {
        let _ = write!(text, "; snapshots {}", volume.snapshots.join(", "));
    }
    text + "\n"
}

fn run_apply(arguments: &Apply) -> anyhow::Result<Outcome> {
    let plan = read_plan(&arguments.plan)?;
    if !arguments.i_have_stopped_all_servers {
        bail!(
            "this gives the cluster a new registry: stop every server of it, on all machines, then \
             say --i-have-stopped-all-servers"
        );
    }
    if plan.doubts() > 0 && !arguments.accept_doubts {
        bail!(
            "the plan has {} doubts (`blockd recover plan` says which): give more servers, or say \
             --accept-doubts to have it as it was decided",
            plan.doubts()
        );
    }
    let mut applied = Vec::new();
    for state in &arguments.state {
        let done = apply(state, &plan).with_context(|| format!("{}", state.display()))?;
        if !arguments.json {
            print(&applied_words(state, &done, &plan))?;
        }
        applied.push(json!({
            "state": state,
            "node": done.node,
            "former_registry": done.former_registry,
        }));
    }
    if arguments.json {
        print(&format!("{}\n", json!(applied)))?;
    }
    Ok(Outcome::Done)
}

fn applied_words(state: &Path, done: &Applied, plan: &Plan) -> String {
    let (state, node, id) = (state.display(), done.node, plan.cluster_id);
    let former = done.former_registry.iter();
    let former = former.map(|path| format!("  the former registry is at {}\n", path.display()));
    format!("{state}: node {node} of cluster {id}\n") + &former.collect::<String>()
}
