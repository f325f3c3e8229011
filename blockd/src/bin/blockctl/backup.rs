//! `blockctl snapshot diff`, `export` and `import`: changes, to a stream and back.

use crate::args::{Cli, parse_snapshot};
use crate::command::connect;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::output::{facts, print};
use crate::size::human_bytes;
use crate::{page_map, progress};
use blockd::admin::{AdminErrorKind, SnapshotName};
use blockd::backup::{self, Changed, Changes, DiffFormat, ImportTarget};
use blockd::client::{Since, Volume};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, StdoutLock, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// The older view, or the only one
    #[arg(value_name = "VOL@SNAP")]
    first: String,
    /// The newer view: a snapshot of the same volume, or the volume itself
    #[arg(value_name = "VOL[@SNAP]")]
    second: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    #[arg(value_name = "VOL@SNAP", value_parser = parse_snapshot)]
    target: SnapshotName,
    /// Only what changed since this snapshot of the volume
    #[arg(long, value_name = "SNAP")]
    from: Option<String>,
    /// Version of the RBD diff format; `rbd merge-diff` reads the first only
    #[arg(long, value_enum, default_value_t = StreamFormat::RbdV1)]
    format: StreamFormat,
    /// Only its page map, with checksums, in place of its data
    #[arg(long, conflicts_with_all = ["from", "format"])]
    metadata_only: bool,
    /// A file that is not there yet, or - for the standard output
    file: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StreamFormat {
    RbdV1,
    RbdV2,
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// The volume that gets the changes
    #[arg(value_name = "VOL")]
    volume: String,
    /// A file of `snapshot export` or `rbd export-diff`, or - for the standard input
    file: PathBuf,
    /// Make the volume, for a full stream
    #[arg(long)]
    create: bool,
    /// Give up what lies behind the end that the stream wants
    #[arg(long, conflicts_with = "create")]
    allow_shrink: bool,
}

/// Prints the ranges as they are found.
pub(crate) async fn diff(cli: &Cli, args: &Diff) -> Result<(), Failure> {
    let (view, since) = match &args.second {
        None => (&args.first, None),
        Some(second) => (second, Some(&args.first)),
    };
    let session = connect(cli).await?;
    let volume = session.client().open(view).await?;
    let since = match since {
        None => None,
        Some(name) => Some(base_of(&volume, name).await?),
    };
    let mut changes = Changes::new(&volume, since);
    let mut out = Ranges::begin(cli.json, args)?;
    while let Some(range) = changes.next().await? {
        if !out.put(range)? {
            return Ok(());
        }
    }
    out.end()
}

async fn base_of(volume: &Volume, name: &str) -> Result<Since, Failure> {
    let of = volume.name().split('@').next().unwrap_or_default();
    let refused = |message| Failure::Refused {
        kind: AdminErrorKind::Invalid,
        message,
    };
    let first = parse_snapshot(name).map_err(refused)?;
    if first.volume != of {
        return Err(refused(format!(
            "{name} is no snapshot of volume {of}: name two views of one volume"
        )));
    }
    if name == volume.name() {
        return Err(refused(format!("{name} is named twice")));
    }
    Ok(volume.since(&first.snapshot).await?)
}

/// The ranges on stdout, without keeping them: JSON piece by piece, or lines.
struct Ranges {
    out: BufWriter<StdoutLock<'static>>,
    json: bool,
    count: u64,
    data_bytes: u64,
    zero_bytes: u64,
}

impl Ranges {
    fn begin(json: bool, args: &Diff) -> Result<Self, Failure> {
        let mut ranges = Self {
            out: BufWriter::new(io::stdout().lock()),
            json,
            count: 0,
            data_bytes: 0,
            zero_bytes: 0,
        };
        let (from, to) = match &args.second {
            None => (None, &args.first),
            Some(second) => (Some(&args.first), second),
        };
        let begin = match json {
            true => format!(
                "{{\"from\":{},\"to\":{},\"ranges\":[",
                json!(from),
                json!(to)
            ),
            false => format!("{:>20}  {:>20}  TYPE\n", "OFFSET", "LENGTH"),
        };
        ranges.write(&begin)?;
        Ok(ranges)
    }

    /// False once nobody reads any more.
    fn put(&mut self, range: Changed) -> Result<bool, Failure> {
        let (offset, len) = (range.offset_bytes, range.len_bytes);
        let kind = if range.zero { "zero" } else { "data" };
        *(if range.zero {
            &mut self.zero_bytes
        } else {
            &mut self.data_bytes
        }) += len;
        let text = match self.json {
            false => format!("{offset:>20}  {len:>20}  {kind}\n"),
            true => {
                let comma = if self.count > 0 { "," } else { "" };
                let range = json!({"offset_bytes": offset, "length_bytes": len, "type": kind});
                format!("{comma}{range}")
            }
        };
        self.count += 1;
        self.write(&text)
    }

    fn end(mut self) -> Result<(), Failure> {
        let (count, data, zero) = (self.count, self.data_bytes, self.zero_bytes);
        let end = match self.json {
            true => {
                format!("],\"range_count\":{count},\"data_bytes\":{data},\"zero_bytes\":{zero}}}\n")
            }
            false => format!(
                "{count} ranges: {} ({data} bytes) of data, {} ({zero} bytes) of zeros\n",
                human_bytes(data),
                human_bytes(zero)
            ),
        };
        if self.write(&end)? {
            self.written(BufWriter::flush)?;
        }
        Ok(())
    }

    fn write(&mut self, text: &str) -> Result<bool, Failure> {
        self.written(|out| out.write_all(text.as_bytes()))
    }

    fn written(
        &mut self,
        write: impl FnOnce(&mut BufWriter<StdoutLock<'static>>) -> io::Result<()>,
    ) -> Result<bool, Failure> {
        match write(&mut self.out) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(source) => Err(file_failed("writing", Path::new("stdout"), source)),
        }
    }
}

pub(crate) async fn export(cli: &Cli, args: &Export) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let SnapshotName { volume, snapshot } = &args.target;
    let opened = session
        .client()
        .open(&format!("{volume}@{snapshot}"))
        .await?;
    let format = match args.format {
        StreamFormat::RbdV1 => DiffFormat::V1,
        StreamFormat::RbdV2 => DiffFormat::V2,
    };
    let out = Out::create(&args.file)?;
    if args.metadata_only {
        let map = page_map::write(&opened, &out).await?;
        out.keep()?;
        return page_map::show(cli, &args.file, &[(&args.target, map)]);
    }
    let bar = progress::bytes("exporting");
    bar.set_length(opened.size_bytes());
    let from = args.from.as_deref();
    let (writer, progress) = (out.writer()?, |done| bar.set_position(done));
    let export = backup::export(&opened, from, format, writer, progress);
    let exported = unless_interrupted(async { Ok(export.await?) }).await?;
    bar.finish_and_clear();
    if out.keep()? {
        return Ok(());
    }
    let facts_json = json!({
        "volume": volume,
        "snapshot": snapshot,
        "from": from,
        "data_bytes": exported.data_bytes,
        "zero_bytes": exported.zero_bytes,
        "stream_bytes": exported.stream_bytes,
    });
    match cli.json {
        true => print(&facts_json.to_string()),
        false => print(&facts(&[
            ("snapshot", format!("{volume}@{snapshot}")),
            ("from", from.unwrap_or("-").to_owned()),
            ("data", human_bytes(exported.data_bytes)),
            ("zeros", human_bytes(exported.zero_bytes)),
            ("written", human_bytes(exported.stream_bytes)),
        ])),
    }
}

pub(crate) async fn import(cli: &Cli, args: &Import) -> Result<(), Failure> {
    let bar = progress::bytes("importing");
    let input: Box<dyn Read + Send> = match args.file.as_os_str() == "-" {
        true => Box::new(io::stdin()),
        false => {
            let failed = |source| file_failed("reading", &args.file, source);
            let mut file = File::open(&args.file).map_err(failed)?;
            let about = file.metadata().map_err(failed)?;
            if about.is_file() {
                bar.set_length(about.len());
                backup::check_file(&mut file).map_err(|error| {
                    let path = args.file.display();
                    Failure::Stream(format!("{path}: {error}; nothing was changed"))
                })?;
            }
            Box::new(BufReader::with_capacity(1 << 20, file))
        }
    };
    let session = connect(cli).await?;
    let target = match args.create {
        true => ImportTarget::New(args.volume.clone()),
        false => ImportTarget::Existing {
            volume: args.volume.clone(),
            allow_shrink: args.allow_shrink,
        },
    };
    let progress = |done| bar.set_position(done);
    let import = backup::import(session.client(), &target, input, progress);
    let imported = unless_interrupted(async { Ok(import.await?) }).await;
    let imported = imported.map_err(|failure| half_done(&args.volume, failure))?;
    bar.finish_and_clear();
    let facts_json = json!({
        "volume": args.volume,
        "snapshot": imported.head.to,
        "from": imported.head.from,
        "size_bytes": imported.size_bytes,
        "data_bytes": imported.data_bytes,
        "zero_bytes": imported.zero_bytes,
    });
    let or_none = |name: Option<String>| name.unwrap_or_else(|| "-".to_owned());
    match cli.json {
        true => print(&facts_json.to_string()),
        false => print(&facts(&[
            ("volume", args.volume.clone()),
            ("snapshot", or_none(imported.head.to)),
            ("from", or_none(imported.head.from)),
            ("size", human_bytes(imported.size_bytes)),
            ("data", human_bytes(imported.data_bytes)),
            ("zeros", human_bytes(imported.zero_bytes)),
        ])),
    }
}

/// SIGINT and SIGTERM end the work as an error does, so that it is tidied up.
pub(crate) async fn unless_interrupted<T>(
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let mut interrupt = Interrupt::listen()?;
    tokio::select! {
        done = work => done,
        () = interrupt.wait() => Err(Failure::Interrupted),
    }
}

/// What an interrupt leaves of a volume that was being filled.
pub(crate) fn half_done(volume: &str, failure: Failure) -> Failure {
    match failure {
        Failure::Interrupted => Failure::Partly {
            source: Box::new(failure),
            aftermath: format!("volume {volume} may have a part of it"),
        },
        other => other,
    }
}

/// Where a stream goes: a file that is removed again unless it was written to its end, or stdout.
pub(crate) struct Out<'a> {
    path: &'a Path,
    file: File,
    is_stdout: bool,
    whole: bool,
}

impl<'a> Out<'a> {
    /// A file that was not there, or stdout for `-`.
    pub(crate) fn create(path: &'a Path) -> Result<Self, Failure> {
        let is_stdout = path.as_os_str() == "-";
        let file = match is_stdout {
            true => io::stdout().as_fd().try_clone_to_owned().map(File::from),
            false => File::create_new(path),
        };
        Ok(Self {
            path,
            file: file.map_err(|source| file_failed("creating", path, source))?,
            is_stdout,
            whole: false,
        })
    }

    pub(crate) fn writer(&self) -> Result<File, Failure> {
        let file = self.file.try_clone();
        file.map_err(|source| file_failed("writing", self.path, source))
    }

    /// All is written; whether it went to stdout, where nothing else belongs then.
    pub(crate) fn keep(mut self) -> Result<bool, Failure> {
        if !self.is_stdout {
            let synced = self.file.sync_all();
            synced.map_err(|source| file_failed("writing", self.path, source))?;
        }
        self.whole = true;
        Ok(self.is_stdout)
    }
}

impl Drop for Out<'_> {
    fn drop(&mut self) {
        if !self.whole && !self.is_stdout {
            let _gone = fs::remove_file(self.path);
        }
    }
}

fn file_failed(what: &'static str, path: &Path, source: io::Error) -> Failure {
    Failure::File {
        what,
        path: path.to_owned(),
        source,
    }
}
