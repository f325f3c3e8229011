//! The names in a client's certificate.
//!
//! ```text
//! Name   SEQUENCE { SET { SEQUENCE { OBJECT IDENTIFIER, string } ... } ... }      DER (X.690), RFC 5280, 4.1.2.4
//! ```
//! Called only with certificates that were verified.

use tokio_rustls::rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
/// 2.5.4.3, id-at-commonName.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// Common names, then DNS names in lower case, each once.
pub(super) fn of_certificate(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else {
        return Vec::new();
    };
    let mut names = common_names(certificate.subject());
    for name in certificate.valid_dns_names() {
        let name = name.to_ascii_lowercase();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The common names in the contents of a `Name`; what is malformed or of a rare string type is passed over.
fn common_names(mut name: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    while let Some((SET, mut set, rest)) = take_element(name) {
        name = rest;
        while let Some((SEQUENCE, attribute, rest)) = take_element(set) {
            set = rest;
            names.extend(common_name(attribute));
        }
    }
    names
}

fn common_name(attribute: &[u8]) -> Option<String> {
    let (OBJECT_IDENTIFIER, COMMON_NAME, value) = take_element(attribute)? else {
        return None;
    };
    let (UTF8_STRING | PRINTABLE_STRING | IA5_STRING, text, _) = take_element(value)? else {
        return None;
    };
    String::from_utf8(text.to_vec()).ok()
}

/// Tag and contents of the element at the front, and what follows.
fn take_element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len_bytes, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => rest
            .split_first()
            .map(|(len, rest)| (usize::from(*len), rest))?,
        0x82 => rest
            .split_first_chunk::<2>()
            .map(|(len, rest)| (usize::from(u16::from_be_bytes(*len)), rest))?,
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(len_bytes)?;
    Some((tag, contents, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_name() {
        let country = b"\x31\x0b\x30\x09\x06\x03\x55\x04\x06\x13\x02DE";
        let alice = b"\x31\x0e\x30\x0c\x06\x03\x55\x04\x03\x0c\x05alice";
        let name = [&country[..], alice].concat();
        assert_eq!(common_names(&name), ["alice"]);
        assert_eq!(common_names(&name[..name.len() - 1]), [""; 0]);
        let two =
            b"\x31\x16\x30\x09\x06\x03\x55\x04\x03\x13\x02ab\x30\x09\x06\x03\x55\x04\x03\x16\x02cd";
        assert_eq!(common_names(two), ["ab", "cd"]);
    }

    #[test]
    fn long_lengths_are_read() {
        let text = "x".repeat(300);
        let element = [
            &[UTF8_STRING, 0x82, 0x01, 0x2c][..],
            text.as_bytes(),
            b"rest",
        ]
        .concat();
        let (tag, contents, rest) = take_element(&element).unwrap();
        assert_eq!(
            (tag, contents, rest),
            (UTF8_STRING, text.as_bytes(), &b"rest"[..])
        );
        assert_eq!(take_element(b"\x0c\x81\x80x"), None);
        assert_eq!(take_element(b"\x0c\x84\x00\x00\x00\x01x"), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = common_names(&bytes);
            let _ = of_certificate(&CertificateDer::from(bytes));
        }
    }
}
