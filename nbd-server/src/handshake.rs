//! The handshake: options and their replies until an export is opened or the client leaves.
//!
//! Exactly the bytes of the handshake are read, so that nothing of what follows is taken in early.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use std::sync::Arc;

use crate::connection::ConnectionError;
use crate::error::OpenError;
use crate::export::{Export, ExportEntry, Exports, MetaContext};
use crate::limits;
use crate::option::{self, OptionHead, Refusal};
use crate::peer::Peer;
use crate::request::{Agreement, Headers};
use crate::shutdown::Shutdown;
use crate::wire::{self, reply};

/// Reply bytes that are gathered before they are sent.
const GATHER_BYTES: usize = 64 << 10;

const GOING_DOWN: &str = "this server is going down; connect to another one";
const NOT_SUPPORTED: &str = "this option is not supported";

/// What the handshake ended with.
pub(crate) struct Opened<E> {
    pub(crate) export: E,
    pub(crate) agreed: Agreement,
}

/// How the options before GO end.
pub(crate) enum Negotiated<E> {
    Opened(Opened<E>),
    /// The client leaves politely.
    Left,
    /// The next byte of either side is one of TLS.
    StartTls,
}

/// What STARTTLS means now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsStage {
    Off,
    Offered,
    Required,
    /// The connection is inside TLS.
    Inside,
}

/// Who negotiates, and under which conditions.
pub(crate) struct Situation<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) tls: TlsStage,
    pub(crate) shutdown: &'a Shutdown,
}

/// Negotiates, with nothing agreed yet but the flags of `greet`; so what was agreed before STARTTLS is forgotten inside TLS. Nothing
/// is opened any more once the shutdown signal is given.
pub(crate) async fn negotiate<S, P>(
    stream: &mut S,
    flags: u16,
    exports: &P,
    situation: Situation<'_>,
) -> Result<Negotiated<P::Export>, ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Exports,
{
    let mut handshake = Handshake {
        stream,
        exports,
        situation,
        out: Vec::new(),
        fixed: flags & wire::FIXED_NEWSTYLE != 0,
        no_zeroes: flags & wire::NO_ZEROES != 0,
        headers: Headers::Simple,
        selected: None,
    };
    for _ in 0..limits::OPTIONS_MAX {
        match handshake.one_option().await? {
            Next::Option => handshake.send().await?,
            Next::Open(opened) => {
                handshake.send().await?;
                return Ok(Negotiated::Opened(opened));
            }
            Next::StartTls => {
                handshake.send().await?;
                return Ok(Negotiated::StartTls);
            }
            Next::Leave => {
                // The client may be gone already: it need not wait for the answer.
                let _ = handshake.send().await;
                return Ok(Negotiated::Left);
            }
        }
    }
    Err(ConnectionError::TooManyOptions)
}

/// Sends the greeting and returns the client's flags.
pub(crate) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
) -> Result<u16, ConnectionError> {
    let offered = wire::FIXED_NEWSTYLE | wire::NO_ZEROES;
    let mut greeting = wire::GREETING_MAGIC.to_be_bytes().to_vec();
    greeting.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&offered.to_be_bytes());
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    let flags = stream.read_u32().await?;
    match u16::try_from(flags) {
        Ok(known) if known & !offered == 0 => Ok(known),
        _ => Err(ConnectionError::ClientFlags(flags)),
    }
}

/// What SET_META_CONTEXT selected.
struct Selected {
    export_name: String,
    contexts: Arc<[MetaContext]>,
}

enum Next<E> {
    Option,
    Open(Opened<E>),
    StartTls,
    Leave,
}

struct Handshake<'a, S, P> {
    stream: &'a mut S,
    exports: &'a P,
    situation: Situation<'a>,
    out: Vec<u8>,
    fixed: bool,
    no_zeroes: bool,
    headers: Headers,
    selected: Option<Selected>,
}

impl<S, P> Handshake<'_, S, P>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Exports,
{
    async fn send(&mut self) -> Result<(), ConnectionError> {
        self.stream.write_all(&self.out).await?;
        self.stream.flush().await?;
        self.out.clear();
        Ok(())
    }

    /// Reads an option and gathers the replies to it.
    async fn one_option(&mut self) -> Result<Next<P::Export>, ConnectionError> {
        let mut head = [0; wire::OPTION_HEADER_BYTES];
        self.stream.read_exact(&mut head).await?;
        let head = option::parse_head(&head).ok_or(ConnectionError::OptionMagic)?;
        if !self.fixed && head.option != wire::option::EXPORT_NAME {
            return Err(ConnectionError::NotFixed(head.option));
        }
        let data = self.read_data(head).await?;
        if self.needs_tls_first(head.option) {
            return self.refuse_without_tls(head.option);
        }
        let Some(data) = data else {
            return self.too_large(head.option);
        };
        match head.option {
            wire::option::STARTTLS => Ok(self.start_tls(&data)),
            wire::option::EXPORT_NAME => self.export_name(&data).await,
            wire::option::GO => Ok(self.go(&data).await),
            wire::option::ABORT => {
                self.reply(head.option, reply::ACK, &[]);
                Ok(Next::Leave)
            }
            _ => {
                if let Err(refusal) = self.query(head.option, &data).await? {
                    self.refuse(head.option, refusal);
                }
                Ok(Next::Option)
            }
        }
    }

    /// Whether this client must ask for STARTTLS before it may send this option.
    fn needs_tls_first(&self, option: u32) -> bool {
        let always = [wire::option::STARTTLS, wire::option::ABORT];
        self.situation.tls == TlsStage::Required && !always.contains(&option)
    }

    fn refuse_without_tls(&mut self, option: u32) -> Result<Next<P::Export>, ConnectionError> {
        if option == wire::option::EXPORT_NAME {
            return Err(ConnectionError::TlsRequired);
        }
        let text = "this server requires TLS; send STARTTLS first";
        self.refuse(option, Refusal::new(reply::ERR_TLS_REQD, text));
        Ok(Next::Option)
    }

    fn start_tls(&mut self, data: &[u8]) -> Next<P::Export> {
        let refusal = match self.situation.tls {
            _ if !data.is_empty() => (reply::ERR_INVALID, "STARTTLS has no payload"),
            TlsStage::Off => (reply::ERR_UNSUP, "this server offers no TLS"),
            TlsStage::Inside => (reply::ERR_INVALID, "this connection is inside TLS already"),
            TlsStage::Offered | TlsStage::Required => {
                self.reply(wire::option::STARTTLS, reply::ACK, &[]);
                return Next::StartTls;
            }
        };
        self.refuse(wire::option::STARTTLS, Refusal::new(refusal.0, refusal.1));
        Next::Option
    }

    /// The payload of an option; `None` when it was skipped because it is too large to look at.
    async fn read_data(&mut self, head: OptionHead) -> Result<Option<Vec<u8>>, ConnectionError> {
        if head.len_bytes > limits::OPTION_DRAIN_BYTES {
            return Err(ConnectionError::OptionTooLarge(head.len_bytes));
        }
        let mut data = Vec::new();
        let mut left_bytes = head.len_bytes as usize;
        while left_bytes > 0 {
            if data.len() >= limits::OPTION_BYTES as usize {
                data.clear();
            }
            let received = (&mut *self.stream)
                .take(left_bytes.min(GATHER_BYTES) as u64)
                .read_buf(&mut data)
                .await?;
            if received == 0 {
                return Err(ConnectionError::Io(
                    std::io::ErrorKind::UnexpectedEof.into(),
                ));
            }
            left_bytes -= received;
        }
        Ok((head.len_bytes <= limits::OPTION_BYTES).then_some(data))
    }

    /// Answers an option whose payload was skipped.
    fn too_large(&mut self, option: u32) -> Result<Next<P::Export>, ConnectionError> {
        let refusal = match option {
            wire::option::EXPORT_NAME => {
                return Err(ConnectionError::ExportName(
                    "the name is too long".to_owned(),
                ));
            }
            wire::option::ABORT | wire::option::LIST | wire::option::STARTTLS => {
                Refusal::new(reply::ERR_INVALID, "unexpected payload")
            }
            wire::option::INFO..=wire::option::EXTENDED_HEADERS => {
                if option == wire::option::SET_META_CONTEXT {
                    self.selected = None;
                }
                Refusal::new(reply::ERR_TOO_BIG, "the payload is too large")
            }
            _ => Refusal::new(reply::ERR_UNSUP, NOT_SUPPORTED),
        };
        self.refuse(option, refusal);
        Ok(Next::Option)
    }

    fn reply(&mut self, option: u32, kind: u32, payload: &[&[u8]]) {
        option::put_reply(&mut self.out, option, kind, payload);
    }

    fn refuse(&mut self, option: u32, refusal: Refusal) {
        let text = option::cut_text(&refusal.text, limits::ERROR_TEXT_BYTES);
        option::put_reply(&mut self.out, option, refusal.reply, &[text.as_bytes()]);
    }

    /// Options that open nothing.
    async fn query(
        &mut self,
        option: u32,
        data: &[u8],
    ) -> Result<Result<(), Refusal>, ConnectionError> {
        match option {
            wire::option::LIST => self.list(data).await,
            wire::option::INFO => Ok(self.info(option, data).await.map(drop)),
            wire::option::STRUCTURED_REPLY => Ok(self.structured_reply(data)),
            wire::option::EXTENDED_HEADERS => Ok(self.extended_headers(data)),
            wire::option::LIST_META_CONTEXT => Ok(self.list_meta(data).await),
            wire::option::SET_META_CONTEXT => Ok(self.set_meta(data).await),
            _ => Ok(Err(Refusal::new(reply::ERR_UNSUP, NOT_SUPPORTED))),
        }
    }

    async fn list(&mut self, data: &[u8]) -> Result<Result<(), Refusal>, ConnectionError> {
        if !data.is_empty() {
            return Ok(Err(Refusal::new(reply::ERR_INVALID, "LIST has no payload")));
        }
        let entries = match self.exports.list(self.situation.peer).await {
            Ok(entries) => entries,
            Err(error) => return Ok(Err(open_refusal(&error))),
        };
        for ExportEntry { name, description } in &entries {
            let name = option::cut_text(name, limits::NAME_BYTES).as_bytes();
            let description = option::cut_text(description, limits::NAME_BYTES).as_bytes();
            let len_bytes = (name.len() as u32).to_be_bytes();
            self.reply(
                wire::option::LIST,
                reply::SERVER,
                &[&len_bytes, name, description],
            );
            if self.out.len() > GATHER_BYTES {
                self.send().await?;
            }
        }
        self.reply(wire::option::LIST, reply::ACK, &[]);
        Ok(Ok(()))
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err(Refusal::new(
                reply::ERR_INVALID,
                "STRUCTURED_REPLY has no payload",
            ));
        }
        if self.headers == Headers::Extended {
            return Err(Refusal::new(
                reply::ERR_EXT_HEADER_REQD,
                "extended headers were negotiated, which include structured replies",
            ));
        }
        self.headers = Headers::Structured;
        self.reply(wire::option::STRUCTURED_REPLY, reply::ACK, &[]);
        Ok(())
    }

    fn extended_headers(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err(Refusal::new(
                reply::ERR_INVALID,
                "EXTENDED_HEADERS has no payload",
            ));
        }
        self.headers = Headers::Extended;
        self.reply(wire::option::EXTENDED_HEADERS, reply::ACK, &[]);
        Ok(())
    }

    async fn list_meta(&mut self, data: &[u8]) -> Result<(), Refusal> {
        const LIST: u32 = wire::option::LIST_META_CONTEXT;
        self.need_chunks()?;
        let asked = option::parse_meta(data)?;
        let contexts = self.open(asked.name).await?.contexts();
        for context in contexts.iter().filter(|context| asked.lists(context)) {
            self.put_context(LIST, 0, context);
        }
        self.reply(LIST, reply::ACK, &[]);
        Ok(())
    }

    /// Replaces what was selected before, with nothing if it fails.
    async fn set_meta(&mut self, data: &[u8]) -> Result<(), Refusal> {
        const SET: u32 = wire::option::SET_META_CONTEXT;
        self.selected = None;
        self.need_chunks()?;
        let asked = option::parse_meta(data)?;
        let mut contexts = self.open(asked.name).await?.contexts();
        contexts.retain(|context| asked.selects(context));
        if contexts.len() > limits::CONTEXTS_MAX {
            return Err(Refusal::new(
                reply::ERR_TOO_BIG,
                format!(
                    "at most {} metadata contexts may be selected",
                    limits::CONTEXTS_MAX
                ),
            ));
        }
        for (index, context) in contexts.iter().enumerate() {
            self.put_context(SET, index as u32 + 1, context);
        }
        self.reply(SET, reply::ACK, &[]);
        self.selected = Some(Selected {
            export_name: asked.name.to_owned(),
            contexts: contexts.into(),
        });
        Ok(())
    }

    fn need_chunks(&self) -> Result<(), Refusal> {
        match self.headers.has_chunks() {
            true => Ok(()),
            false => Err(Refusal::new(
                reply::ERR_INVALID,
                "metadata contexts need STRUCTURED_REPLY or EXTENDED_HEADERS first",
            )),
        }
    }

    fn put_context(&mut self, option: u32, id: u32, context: &MetaContext) {
        let name = context.to_string();
        let payload = [&id.to_be_bytes()[..], name.as_bytes()];
        self.reply(option, reply::META_CONTEXT, &payload);
    }

    async fn open(&self, name: &str) -> Result<P::Export, Refusal> {
        let opened = self.exports.open(name, self.situation.peer).await;
        if self.situation.shutdown.is_given() {
            return Err(Refusal::new(reply::ERR_SHUTDOWN, GOING_DOWN));
        }
        opened.map_err(|error| open_refusal(&error))
    }

    /// Opens the export of an INFO or GO and gathers the replies, without the ACK for GO.
    async fn info(&mut self, option: u32, data: &[u8]) -> Result<Opened<P::Export>, Refusal> {
        let asked = option::parse_info(data)?;
        let export = self.open(asked.name).await?;
        let agreed = self.agreement(asked.name);
        let (info, description) = (export.info(), export.description());
        let has_contexts = !agreed.contexts.is_empty();
        let flags = option::transmission_flags(&info, self.headers, has_contexts);
        option::put_info(&mut self.out, option, &asked, &info, &description, flags);
        self.reply(option, reply::ACK, &[]);
        Ok(Opened { export, agreed })
    }

    /// What holds for the export of this name: contexts that were selected for another one do not.
    fn agreement(&self, name: &str) -> Agreement {
        let selected = self.selected.as_ref();
        let contexts = selected
            .filter(|selected| selected.export_name == name)
            .map(|selected| Arc::clone(&selected.contexts));
        Agreement {
            headers: self.headers,
            contexts: contexts.unwrap_or_default(),
        }
    }

    async fn go(&mut self, data: &[u8]) -> Next<P::Export> {
        match self.info(wire::option::GO, data).await {
            Ok(opened) => Next::Open(opened),
            Err(refusal) => {
                self.refuse(wire::option::GO, refusal);
                Next::Option
            }
        }
    }

    async fn export_name(&mut self, data: &[u8]) -> Result<Next<P::Export>, ConnectionError> {
        let failed = |refusal: Refusal| ConnectionError::ExportName(refusal.text.into_owned());
        if self.headers == Headers::Extended {
            let text = "after EXTENDED_HEADERS only GO may open an export";
            return Err(ConnectionError::ExportName(text.to_owned()));
        }
        let name = option::parse_name(data).map_err(failed)?;
        let export = self.open(name).await.map_err(failed)?;
        let agreed = self.agreement(name);
        let info = export.info();
        let flags = option::transmission_flags(&info, self.headers, false);
        option::put_export_name(&mut self.out, &info, flags, self.no_zeroes);
        Ok(Next::Open(Opened { export, agreed }))
    }
}

fn open_refusal(error: &OpenError) -> Refusal {
    match error {
        OpenError::Unknown(text) => Refusal::new(reply::ERR_UNKNOWN, text.clone()),
        OpenError::Policy(text) => Refusal::new(reply::ERR_POLICY, text.clone()),
        OpenError::Shutdown(text) => Refusal::new(reply::ERR_SHUTDOWN, text.clone()),
    }
}
