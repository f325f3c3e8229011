//! Parser of handshake options and builder of their replies: pure functions over bytes.

use std::borrow::Cow;
use std::collections::HashSet;

use crate::export::{ExportInfo, MetaContext};
use crate::limits;
use crate::request::Headers;
use crate::wire::{self, info, reply, transmission};

/// Head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionHead {
    pub(crate) option: u32,
    pub(crate) len_bytes: u32,
}

/// What is wrong with the payload of an option: the reply type and the text of the refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reply: u32,
    pub(crate) text: Cow<'static, str>,
}

impl Refusal {
    pub(crate) fn new(reply: u32, text: impl Into<Cow<'static, str>>) -> Self {
        Self {
            reply,
            text: text.into(),
        }
    }

    fn invalid(text: &'static str) -> Self {
        Self::new(reply::ERR_INVALID, text)
    }
}

/// Payload of INFO and GO.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest<'a> {
    pub(crate) name: &'a str,
    /// Items asked for, two big-endian bytes each.
    items: &'a [u8],
}

impl InfoRequest<'_> {
    /// Whether the client asked for this item.
    pub(crate) fn wants(&self, item: u16) -> bool {
        self.items
            .chunks_exact(2)
            .any(|pair| pair == item.to_be_bytes())
    }
}

/// Payload of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MetaRequest<'a> {
    pub(crate) name: &'a str,
    queries: HashSet<&'a str>,
}

impl MetaRequest<'_> {
    /// Whether SET_META_CONTEXT selects this context: by its exact name.
    pub(crate) fn selects(&self, context: &MetaContext) -> bool {
        self.queries.contains(context.to_string().as_str())
    }

    /// Whether LIST_META_CONTEXT shows this context: by its name or that of its group; no query at all asks for all.
    pub(crate) fn lists(&self, context: &MetaContext) -> bool {
        let groups: &[&str] = match context {
            MetaContext::Allocation => &["base:"],
            MetaContext::AllocationDepth => &["qemu:"],
            MetaContext::DirtyBitmap(_) => &["qemu:", "qemu:dirty-bitmap:"],
        };
        self.queries.is_empty()
            || self.selects(context)
            || groups.iter().any(|group| self.queries.contains(group))
    }
}

/// The head of an option, or `None` when the magic is wrong (the stream is out of sync).
pub(crate) fn parse_head(bytes: &[u8; wire::OPTION_HEADER_BYTES]) -> Option<OptionHead> {
    let (magic, rest) = wire::take_u64(bytes)?;
    let (option, rest) = wire::take_u32(rest)?;
    let (len_bytes, _) = wire::take_u32(rest)?;
    (magic == wire::OPTION_MAGIC).then_some(OptionHead { option, len_bytes })
}

/// An export name as the protocol allows it: UTF-8, no NUL, at most 4096 bytes.
pub(crate) fn parse_name(bytes: &[u8]) -> Result<&str, Refusal> {
    if bytes.len() > limits::NAME_BYTES {
        return Err(Refusal::invalid("the name is longer than 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(Refusal::invalid("the name contains a NUL"));
    }
    std::str::from_utf8(bytes).map_err(|_| Refusal::invalid("the name is not UTF-8"))
}

/// A u32 length, then so many bytes of name, then what follows.
fn take_name(data: &[u8]) -> Result<(&str, &[u8]), Refusal> {
    let short = || Refusal::invalid("the payload ends within a name; check its length");
    let (len_bytes, rest) = wire::take_u32(data).ok_or_else(short)?;
    let (name, rest) = rest
        .split_at_checked(len_bytes as usize)
        .ok_or_else(short)?;
    Ok((parse_name(name)?, rest))
}

/// Payload of INFO and GO.
pub(crate) fn parse_info(data: &[u8]) -> Result<InfoRequest<'_>, Refusal> {
    let (name, rest) = take_name(data)?;
    let (count, items) = wire::take_u16(rest)
        .ok_or_else(|| Refusal::invalid("the payload ends before the number of items"))?;
    if items.len() != usize::from(count) * 2 {
        return Err(Refusal::invalid(
            "the number of items does not fit the length of the payload",
        ));
    }
    Ok(InfoRequest { name, items })
}

/// Payload of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn parse_meta(data: &[u8]) -> Result<MetaRequest<'_>, Refusal> {
    let (name, rest) = take_name(data)?;
    let (count, mut rest) = wire::take_u32(rest)
        .ok_or_else(|| Refusal::invalid("the payload ends before the number of queries"))?;
    let mut queries = HashSet::new();
    for _ in 0..count {
        let (query, after) = take_name(rest)?;
        queries.insert(query);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(Refusal::invalid("bytes follow the last query"));
    }
    Ok(MetaRequest { name, queries })
}

/// Transmission flags of an export, for a client with these headers that selected contexts for it or not.
pub(crate) fn transmission_flags(export: &ExportInfo, headers: Headers, has_contexts: bool) -> u16 {
    use transmission::BLOCK_STATUS_PAYLOAD;
    use transmission::{CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, ROTATIONAL, SEND_CACHE, SEND_DF};
    use transmission::{SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES};
    let optional = [
        (export.read_only, READ_ONLY),
        (!export.read_only, SEND_TRIM | SEND_WRITE_ZEROES),
        (!export.read_only && export.fast_zero, SEND_FAST_ZERO),
        (export.rotational, ROTATIONAL),
        (export.can_multi_conn, CAN_MULTI_CONN),
        (headers.has_chunks(), SEND_DF),
        (
            headers == Headers::Extended && has_contexts,
            BLOCK_STATUS_PAYLOAD,
        ),
    ];
    let always = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_CACHE;
    optional
        .iter()
        .filter(|(set, _)| *set)
        .fold(always, |flags, (_, bit)| flags | bit)
}

/// Appends an option reply with its payload in parts. Payloads are bounded by the callers far below 4 GiB.
pub(crate) fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[&[u8]]) {
    let len_bytes: usize = payload.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(len_bytes as u32).to_be_bytes());
    payload.iter().for_each(|part| out.extend_from_slice(part));
}

/// Appends the replies to INFO or GO, without the final ACK.
pub(crate) fn put_info(
    out: &mut Vec<u8>,
    option: u32,
    asked: &InfoRequest<'_>,
    export: &ExportInfo,
    description: &str,
    flags: u16,
) {
    let size = export.size_bytes.to_be_bytes();
    put_reply(
        out,
        option,
        reply::INFO,
        &[&info::EXPORT.to_be_bytes(), &size, &flags.to_be_bytes()],
    );
    if asked.wants(info::NAME) {
        put_reply(
            out,
            option,
            reply::INFO,
            &[&info::NAME.to_be_bytes(), asked.name.as_bytes()],
        );
    }
    if asked.wants(info::DESCRIPTION) && !description.is_empty() {
        let text = cut_text(description, limits::NAME_BYTES);
        put_reply(
            out,
            option,
            reply::INFO,
            &[&info::DESCRIPTION.to_be_bytes(), text.as_bytes()],
        );
    }
    let preferred = preferred_block_bytes(export);
    let sizes = [
        limits::MIN_BLOCK_BYTES,
        preferred,
        limits::ADVERTISED_PAYLOAD_BYTES,
    ]
    .map(u32::to_be_bytes);
    put_reply(
        out,
        option,
        reply::INFO,
        &[
            &info::BLOCK_SIZE.to_be_bytes(),
            &sizes[0],
            &sizes[1],
            &sizes[2],
        ],
    );
}

/// The preferred block size made legal: a power of 2 from 512 to the advertised maximum.
fn preferred_block_bytes(export: &ExportInfo) -> u32 {
    export
        .preferred_block_bytes
        .clamp(512, limits::ADVERTISED_PAYLOAD_BYTES / 2)
        .next_power_of_two()
}

/// Appends the answer to EXPORT_NAME.
pub(crate) fn put_export_name(out: &mut Vec<u8>, export: &ExportInfo, flags: u16, no_zeroes: bool) {
    out.extend_from_slice(&export.size_bytes.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    if !no_zeroes {
        out.extend_from_slice(&[0; wire::EXPORT_NAME_PADDING_BYTES]);
    }
}

/// The longest prefix of whole characters within `max_bytes`.
pub(crate) fn cut_text(text: &str, max_bytes: usize) -> &str {
    let end = (0..=max_bytes.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn info_payload(name: &[u8], items: &[u16]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&(items.len() as u16).to_be_bytes());
        items
            .iter()
            .for_each(|item| data.extend_from_slice(&item.to_be_bytes()));
        data
    }

    #[test]
    fn golden_go_payload_and_replies() {
        let data = b"\0\0\0\x04vol1\0\x02\0\x01\0\x03";
        assert_eq!(info_payload(b"vol1", &[1, 3]), data);
        let asked = parse_info(data).unwrap();
        assert_eq!(asked.name, "vol1");
        assert!(
            asked.wants(info::NAME)
                && asked.wants(info::BLOCK_SIZE)
                && !asked.wants(info::DESCRIPTION)
        );
        let mut out = Vec::new();
        let export = ExportInfo::new(0x1_0000_0000);
        let flags = transmission_flags(&export, Headers::Structured, true);
        put_info(&mut out, 7, &asked, &export, "", flags);
        let head = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03";
        let mut golden = Vec::new();
        golden
            .extend_from_slice(&[&head[..], b"\0\0\0\x0c\0\0\0\0\0\x01\0\0\0\0\x05\xed"].concat());
        golden.extend_from_slice(&[&head[..], b"\0\0\0\x06\0\x01vol1"].concat());
        golden.extend_from_slice(
            &[&head[..], b"\0\0\0\x0e\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"].concat(),
        );
        assert_eq!(out, golden);
    }

    #[test]
    fn export_name_has_its_padding_unless_declined() {
        let (mut padded, mut bare) = (Vec::new(), Vec::new());
        let export = ExportInfo::new(512);
        let flags = transmission_flags(&export, Headers::Simple, false);
        put_export_name(&mut padded, &export, flags, false);
        put_export_name(&mut bare, &export, flags, true);
        assert_eq!(bare, b"\0\0\0\0\0\0\x02\0\x05\x6d");
        assert_eq!(padded, [&bare[..], &[0; 124]].concat());
    }

    #[test]
    fn malformed_info_is_refused_as_invalid() {
        let good = info_payload(b"vol1", &[3]);
        let cases: [&[u8]; 6] = [
            b"",
            &good[..good.len() - 1],
            &[&good[..], b"x"].concat(),
            b"\xff\xff\xff\xffvol1\0\0",
            &info_payload(b"a\0b", &[]),
            &info_payload(b"\xff\xfe", &[]),
        ];
        for case in cases {
            assert_eq!(
                parse_info(case).unwrap_err().reply,
                reply::ERR_INVALID,
                "{case:?}"
            );
        }
        assert!(parse_info(&info_payload(&[b'a'; 4096], &[])).is_ok());
        assert!(parse_info(&info_payload(&[b'a'; 4097], &[])).is_err());
    }

    #[test]
    fn queries_list_groups_and_select_only_what_they_name() {
        use MetaContext::{Allocation, AllocationDepth, DirtyBitmap};
        let all = [Allocation, AllocationDepth, DirtyBitmap("a:b".into())];
        let rows: [(&[&str], [bool; 3], [bool; 3]); 8] = [
            (&[], [true; 3], [false; 3]),
            (&["base:"], [true, false, false], [false; 3]),
            (&["qemu:"], [false, true, true], [false; 3]),
            (&["qemu:dirty-bitmap:"], [false, false, true], [false; 3]),
            (&["allocation", "base", "", "qemu"], [false; 3], [false; 3]),
            (
                &["x", "base:allocation"],
                [true, false, false],
                [true, false, false],
            ),
            (
                &["qemu:allocation-depth", "qemu:dirty-bitmap:a"],
                [false, true, false],
                [false, true, false],
            ),
            (
                &["qemu:dirty-bitmap:a:b", "qemu:dirty-bitmap:a:b"],
                [false, false, true],
                [false, false, true],
            ),
        ];
        for (queries, listed, selected) in rows {
            let asked = MetaRequest {
                name: "",
                queries: queries.iter().copied().collect(),
            };
            assert_eq!(
                all.each_ref().map(|c| asked.lists(c)),
                listed,
                "{queries:?}"
            );
            let selects = all.each_ref().map(|c| asked.selects(c));
            assert_eq!(selects, selected, "{queries:?}");
        }
    }

    #[test]
    fn flags_follow_the_export_and_the_headers() {
        use transmission::{BLOCK_STATUS_PAYLOAD, SEND_DF, SEND_FAST_ZERO};
        let mut export = ExportInfo::new(0);
        let flags = |export: &ExportInfo, headers| transmission_flags(export, headers, true);
        assert_eq!(flags(&export, Headers::Simple), 0x56d);
        assert_eq!(flags(&export, Headers::Structured), 0x56d | SEND_DF);
        let extended = 0x56d | SEND_DF | BLOCK_STATUS_PAYLOAD;
        assert_eq!(flags(&export, Headers::Extended), extended);
        let bare = transmission_flags(&export, Headers::Extended, false);
        assert_eq!(bare, 0x56d | SEND_DF);
        export.fast_zero = true;
        assert_eq!(flags(&export, Headers::Simple), 0x56d | SEND_FAST_ZERO);
        export.read_only = true;
        assert_eq!(flags(&export, Headers::Simple), 0x50f);
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(cut_text("a\u{e9}", 2), "a");
        assert_eq!(cut_text("a\u{e9}", 3), "a\u{e9}");
        assert_eq!(cut_text("", 0), "");
    }

    proptest! {
        #[test]
        fn arbitrary_payloads_never_panic(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_info(&data);
            let _ = parse_meta(&data);
            let _ = parse_name(&data);
        }

        #[test]
        fn preferred_block_size_is_always_legal(bytes in any::<u32>()) {
            let export = ExportInfo { preferred_block_bytes: bytes, ..ExportInfo::new(0) };
            let preferred = preferred_block_bytes(&export);
            prop_assert!(preferred.is_power_of_two() && (512..=limits::ADVERTISED_PAYLOAD_BYTES).contains(&preferred));
        }

        #[test]
        fn meta_round_trip(name in "[a-z]{0,20}", queries in proptest::collection::vec("[a-z:]{0,30}", 0..10)) {
            let mut data = (name.len() as u32).to_be_bytes().to_vec();
            data.extend_from_slice(name.as_bytes());
            data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
            for query in &queries {
                data.extend_from_slice(&(query.len() as u32).to_be_bytes());
                data.extend_from_slice(query.as_bytes());
            }
            let parsed = parse_meta(&data).unwrap();
            prop_assert_eq!(parsed.name, name.as_str());
            prop_assert_eq!(parsed.queries, queries.iter().map(String::as_str).collect());
            for cut in 0..data.len() {
                prop_assert!(parse_meta(&data[..cut]).is_err());
            }
        }
    }
}
