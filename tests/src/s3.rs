//! A small S3-compatible server for tests: PUT, GET, HEAD and LIST (v2) of one bucket, in memory.
//!
//! It lists two keys a page, refuses requests that are not signed with its key, checks the SHA-256
//! that a request names, stores a body only when all of it has come, and can be slow or refuse every
//! Nth PUT.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

const ACCESS_KEY: &str = "blockdtestkey";
const KEYS_A_PAGE: usize = 2;

/// A running server; its thread lives until the test ends.
pub struct S3Server {
    address: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Keys in the order in which they were stored; one that was stored twice is there twice.
    puts: Mutex<Vec<String>>,
    put_delay_ms: AtomicU64,
    /// Every Nth PUT is answered 503; 0: none.
    refuse_put: AtomicU64,
    put_requests: AtomicU64,
}

struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl S3Server {
    #[must_use]
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared::default());
        let served = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&served);
                std::thread::spawn(move || serve(&stream, &shared));
            }
        });
        Self { address, shared }
    }

    /// The environment with which a program reaches it.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT", format!("http://{}", self.address)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
    }

    pub fn slow_puts(&self, delay_ms: u64) {
        self.shared.put_delay_ms.store(delay_ms, Ordering::Relaxed);
    }

    pub fn refuse_every_put(&self, nth: u64) {
        self.shared.refuse_put.store(nth, Ordering::Relaxed);
    }

    #[must_use]
    pub fn puts(&self) -> Vec<String> {
        self.shared.puts.lock().unwrap().clone()
    }

    /// The objects, `BUCKET/KEY`, to look at or to damage.
    pub fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.shared.objects.lock().unwrap()
    }
}

fn serve(stream: &TcpStream, shared: &Shared) {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(request) = read_request(&mut reader) {
        let (status, headers, body) = answer(&request, shared);
        let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
        headers.iter().for_each(|(name, value)| {
            let _ = write!(head, "{name}: {value}\r\n");
        });
        let body = if request.method == "HEAD" {
            &[]
        } else {
            body.as_slice()
        };
        let sent = writer.write_all(format!("{head}\r\n").as_bytes());
        if sent.and_then(|()| writer.write_all(body)).is_err() {
            return;
        }
    }
}

fn read_request(reader: &mut BufReader<&TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|len| *len > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|len| *len > 0)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned())
            }
            None => break,
        };
    }
    let len = headers
        .get("content-length")
        .map_or(0, |len| len.parse().unwrap());
    let mut body = vec![0; len];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    });
    Some(Request {
        method,
        path: decode(path.trim_start_matches('/')),
        query: query.collect(),
        headers,
        body,
    })
}

fn decode(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next().unwrap()).to_digit(16).unwrap();
        out.push(match byte {
            b'%' => u8::try_from(digit() << 4 | digit()).unwrap(),
            byte => byte,
        });
    }
    String::from_utf8(out).unwrap()
}

type Reply = (&'static str, Vec<(&'static str, String)>, Vec<u8>);

fn error(status: &'static str, code: &str) -> Reply {
    let body = format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>");
    (status, Vec::new(), body.into_bytes())
}

fn answer(request: &Request, shared: &Shared) -> Reply {
    let signed = format!("AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/");
    let header = |name: &str| request.headers.get(name).map_or("", String::as_str);
    if !header("authorization").starts_with(&signed) {
        return error("403 Forbidden", "AccessDenied");
    }
    match request.method.as_str() {
        "PUT" => put(request, shared),
        "GET" if request.query.contains_key("list-type") => list(request, shared),
        "GET" | "HEAD" => match shared.objects.lock().unwrap().get(&request.path) {
            None => error("404 Not Found", "NoSuchKey"),
            Some(object) => ("200 OK", about(), object.clone()),
        },
        _ => error("405 Method Not Allowed", "MethodNotAllowed"),
    }
}

fn about() -> Vec<(&'static str, String)> {
    let modified = "Sun, 29 Nov 2026 18:00:00 GMT".to_owned();
    vec![("ETag", "\"1\"".to_owned()), ("Last-Modified", modified)]
}

fn put(request: &Request, shared: &Shared) -> Reply {
    let number = shared.put_requests.fetch_add(1, Ordering::Relaxed) + 1;
    let refuse = shared.refuse_put.load(Ordering::Relaxed);
    if refuse > 0 && number.is_multiple_of(refuse) {
        return error("503 Slow Down", "SlowDown");
    }
    std::thread::sleep(Duration::from_millis(
        shared.put_delay_ms.load(Ordering::Relaxed),
    ));
    let named = request.headers.get("x-amz-content-sha256");
    let named = named.filter(|named| named.len() == 64);
    if named.is_some_and(|named| *named != sha256_hex(&request.body)) {
        return error("400 Bad Request", "XAmzContentSHA256Mismatch");
    }
    let path = request.path.clone();
    shared
        .objects
        .lock()
        .unwrap()
        .insert(path.clone(), request.body.clone());
    shared.puts.lock().unwrap().push(path);
    ("200 OK", about(), Vec::new())
}

fn sha256_hex(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest
        .as_ref()
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

fn list(request: &Request, shared: &Shared) -> Reply {
    let of = |name: &str| request.query.get(name).map_or("", String::as_str);
    let bucket = request.path.trim_end_matches('/');
    let (prefix, after) = (of("prefix"), of("continuation-token"));
    let objects = shared.objects.lock().unwrap();
    let keys = objects.iter().filter_map(|(path, object)| {
        let key = path.strip_prefix(bucket)?.strip_prefix('/')?;
        (key.starts_with(prefix) && key > after).then_some((key, object.len()))
    });
    let keys: Vec<_> = keys.take(KEYS_A_PAGE + 1).collect();
    let page = &keys[..keys.len().min(KEYS_A_PAGE)];
    let mut body = format!(
        "<ListBucketResult><Name>{bucket}</Name><KeyCount>{}</KeyCount><IsTruncated>{}</IsTruncated>",
        page.len(),
        keys.len() > page.len()
    );
    if keys.len() > page.len() {
        let token = page.last().unwrap().0;
        let _ = write!(
            body,
            "<NextContinuationToken>{token}</NextContinuationToken>"
        );
    }
    for (key, size) in page {
        let _ = write!(
            body,
            "<Contents><Key>{key}</Key><LastModified>2026-11-29T18:00:00.000Z</LastModified>\
             <ETag>\"1\"</ETag><Size>{size}</Size></Contents>"
        );
    }
    body.push_str("</ListBucketResult>");
    ("200 OK", Vec::new(), body.into_bytes())
}
