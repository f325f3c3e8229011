//! The README's table of JSON values, against what `blockctl` prints.

use blockd_tests::{Cluster, MIB};
use serde_json::Value;
use std::collections::BTreeSet;

const README: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"));

/// The rows of the table: commands, and what is said of their value.
fn rows() -> Vec<(&'static str, &'static str)> {
    let table = README.split("| command | value |").nth(1).unwrap();
    let lines = table.lines().skip(2);
    let rows = lines.take_while(|line| line.starts_with('|'));
    let cells = rows.map(|row| row.trim_matches(['|', ' ']).split_once(" | ").unwrap());
    cells.collect()
}

/// The keys that the first braces behind these words name.
fn keys(text: &str, behind: &str) -> BTreeSet<String> {
    let rest = text.split_once(behind).unwrap().1;
    let list = rest.split(['`', '{', '}']).find(|part| part.contains(','));
    let names = list.unwrap().split(',').map(|name| name.trim().to_owned());
    names.collect()
}

/// What the one row of a command says.
fn value_of(command: &str) -> &'static str {
    let quoted = format!("`{command}`");
    let all = rows();
    let mut found = all
        .iter()
        .filter(|(commands, _)| commands.contains(&quoted));
    let (_, value) = found
        .next()
        .unwrap_or_else(|| panic!("no row of {command}"));
    assert_eq!(found.next(), None, "{command} stands twice");
    value
}

fn printed(cluster: &Cluster, words: &str) -> BTreeSet<String> {
    let json = cluster.blockctl(&format!("{words} --json"));
    let value: Value = serde_json::from_str(&json).unwrap();
    let one = value.get(0).unwrap_or(&value);
    one.as_object().unwrap().keys().cloned().collect()
}

/// Each of these commands stands in the table once, with exactly the keys that it prints.
#[test]
fn the_json_table_of_the_readme_is_true() {
    let cluster = Cluster::three();
    let volume = keys(value_of("volume list"), "a list of ");
    let created = printed(&cluster, "volume create v --size 8MiB");
    assert_eq!(created, volume, "volume create");
    cluster.snapshot("v@s");
    assert_eq!(printed(&cluster, "volume resize v 12MiB"), volume);
    let mut details = keys(value_of("volume show"), "and ");
    details.extend(volume.iter().cloned());
    assert_eq!(printed(&cluster, "volume clone v@s c"), details);
    details.extend(["move", "scrub"].map(str::to_owned));
    assert_eq!(printed(&cluster, "volume show v"), details);
    for (command, words) in [
        ("volume list", "volume list"),
        ("volume set", "volume get v"),
        ("snapshot list", "snapshot list v"),
        ("route show", "route show v"),
        ("io holds", "io holds"),
        ("node list", "node list"),
        ("version", "version"),
    ] {
        let wanted = keys(value_of(command), "");
        assert_eq!(printed(&cluster, words), wanted, "{words}");
    }
    let moved = cluster.create_on("m", 8 * MIB, 8192, &[1]);
    assert_eq!(moved.name, "m");
    cluster.blockctl("page move m all --to 2");
    assert_eq!(
        printed(&cluster, "move list m"),
        keys(value_of("page move"), "a list of ")
    );
}
