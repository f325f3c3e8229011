//! Keys that the server shares with its clients, in a file of `psktool`; by OpenSSL, since rustls has no external keys.
//!
//! ```text
//! USER:KEY      USER up to the first colon; a name that starts with # is in hexadecimal digits
//!               KEY 16 to 64 bytes in hexadecimal digits                         (GnuTLS manual, psktool)
//! ```
//! TLS 1.3 only, with a Diffie-Hellman exchange. A user that is not in the file gets a key that nobody knows, so that the answer is
//! the one to a wrong key.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::OnceLock;

use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::rand::rand_bytes;
use openssl::ssl::{
    Ssl, SslAcceptor, SslContext, SslMethod, SslOptions, SslRef, SslSessionCacheMode,
};
use tokio::io::{AsyncRead, AsyncWrite, BufStream};
use tokio_openssl::SslStream;

use super::reload::Reloaded;
use super::{TlsError, bad};

/// OpenSSL ties a key to SHA-256 unless it is told more than the file has.
const CIPHERS: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
/// Bytes of a key.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 16..=64;
/// Ciphertext that is received or sent at once.
const BUFFER_BYTES: usize = 64 << 10;

/// The file, and what was made of it.
pub(super) struct Keys {
    context: Reloaded<SslContext>,
}

impl Keys {
    pub(super) fn load(path: &Path) -> Result<Self, TlsError> {
        let files: Vec<PathBuf> = vec![path.to_owned()];
        let path = path.to_owned();
        let context = Reloaded::new(files, move || load(&path))?;
        Ok(Self { context })
    }

    /// The TLS handshake; the stream inside TLS, and the user whose key the client has.
    pub(super) async fn accept<S>(
        &self,
        stream: S,
    ) -> io::Result<(SslStream<BufStream<S>>, Vec<String>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = BufStream::with_capacity(BUFFER_BYTES, BUFFER_BYTES, stream);
        let mut stream = SslStream::new(Ssl::new(&self.context.get())?, stream)?;
        let accepted = Pin::new(&mut stream).accept().await;
        accepted.map_err(|error| error.into_io_error().unwrap_or_else(io::Error::other))?;
        let user = stream.ssl().ex_data(user_index()?).cloned();
        Ok((stream, user.into_iter().collect()))
    }
}

type Users = HashMap<String, Vec<u8>>;

fn load(path: &Path) -> Result<SslContext, TlsError> {
    let text = std::fs::read_to_string(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let users = parse(&text).map_err(|reason| bad(path, reason))?;
    context(users).map_err(|error| bad(path, error))
}

/// Users and their keys. An error tells the line and nothing of what is in it.
fn parse(text: &str) -> Result<Users, String> {
    let mut users = Users::new();
    for (index, line) in text.lines().enumerate() {
        if line.is_empty() {
            continue;
        }
        let wrong = |what: &str| format!("line {}: {what}", index + 1);
        let (user, key) = line
            .split_once(':')
            .ok_or_else(|| wrong("USER:KEY is expected"))?;
        let user = parse_user(user).ok_or_else(|| wrong("this is no user name"))?;
        let key = parse_hex(key).filter(|key| KEY_BYTES.contains(&key.len()));
        let key =
            key.ok_or_else(|| wrong("the key is not 16 to 64 bytes in hexadecimal digits"))?;
        if users.insert(user, key).is_some() {
            return Err(wrong("this user has a key already"));
        }
    }
    match users.is_empty() {
        true => Err("it holds no key; psktool makes some".to_owned()),
        false => Ok(users),
    }
}

fn parse_user(user: &str) -> Option<String> {
    let user = match user.strip_prefix('#') {
        None => user.to_owned(),
        Some(digits) => String::from_utf8(parse_hex(digits)?).ok()?,
    };
    (!user.is_empty()).then_some(user)
}

fn parse_hex(digits: &str) -> Option<Vec<u8>> {
    let (pairs, []) = digits.as_bytes().as_chunks::<2>() else {
        return None;
    };
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |pair: &[u8; 2]| u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok();
    pairs.iter().map(byte).collect()
}

fn context(users: Users) -> Result<SslContext, ErrorStack> {
    let user_index = user_index()?;
    let mut nobodys_key = [0; 32];
    rand_bytes(&mut nobodys_key)?;
    let mut builder = SslAcceptor::mozilla_modern_v5(SslMethod::tls_server())?;
    builder.set_ciphersuites(CIPHERS)?;
    // No session is resumed: every connection proves its key as the file is now.
    builder.set_num_tickets(0)?;
    builder.set_options(SslOptions::NO_TICKET);
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_psk_server_callback(move |ssl: &mut SslRef, user, out| {
        let user = user.and_then(|user| std::str::from_utf8(user).ok());
        let found = user.and_then(|user| users.get_key_value(user));
        let key = match found {
            Some((user, key)) => {
                ssl.set_ex_data(user_index, user.clone());
                key.as_slice()
            }
            None => &nobodys_key,
        };
        out[..key.len()].copy_from_slice(key);
        Ok(key.len())
    });
    Ok(builder.build().into_context())
}

/// Where a connection keeps the user that it is for.
fn user_index() -> Result<Index<Ssl, String>, ErrorStack> {
    static INDEX: OnceLock<Index<Ssl, String>> = OnceLock::new();
    match INDEX.get() {
        Some(index) => Ok(*index),
        None => {
            let index = Ssl::new_ex_index()?;
            Ok(*INDEX.get_or_init(|| index))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_file() {
        let text =
            "alice:000102030405060708090a0b0c0d0e0F\n\n#c3a9:ffffffffffffffffffffffffffffffff\n";
        let users = parse(text).unwrap();
        assert_eq!(users["alice"], (0..16).collect::<Vec<u8>>());
        assert_eq!(users["\u{e9}"], [0xff; 16]);
        assert_eq!(users.len(), 2);
    }

    #[test]
    fn wrong_lines_are_named_and_not_repeated() {
        let key = "00".repeat(16);
        for (text, complaint) in [
            (String::new(), "it holds no key"),
            (format!("a:{key}\nb"), "line 2: USER:KEY"),
            (format!(":{key}"), "line 1: this is no user"),
            (format!("#zz:{key}"), "line 1: this is no user"),
            ("a:secret".to_owned(), "line 1: the key"),
            ("a:00".to_owned(), "line 1: the key"),
            (format!("a:{}", "00".repeat(65)), "line 1: the key"),
            (format!("a:{key}0"), "line 1: the key"),
            (format!("a:{key}\na:{key}"), "line 2: this user"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(
                error.contains(complaint) && !error.contains("secret"),
                "{error}"
            );
        }
    }
}
