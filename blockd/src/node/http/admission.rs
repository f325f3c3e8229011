//! What stands before every request: who asks is found out first, then the body is read, which is
//! short and comes in time.

use super::Shared;
use super::failure::Failure;
use super::sockets::Origin;
use crate::limits::{HTTP_BODY_BYTES_MAX, HTTP_REQUEST_MS};
use crate::node::access::{Caller, Role, Tokens};
use axum::Extension;
use axum::body::{Body, Bytes, HttpBody, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::timeout;

/// Lets a request in, with its [`Caller`] and its body as a whole.
pub(super) async fn admit(
    State(face): State<Shared>,
    Extension(origin): Extension<Origin>,
    request: Request,
    next: Next,
) -> Response {
    match prepare(&face.tokens, &origin, request).await {
        Ok(request) => next.run(request).await,
        Err(failure) => failure.into_response(),
    }
}

async fn prepare(tokens: &Tokens, origin: &Origin, request: Request) -> Result<Request, Failure> {
    let caller = caller(tokens, origin, request.headers())?;
    if request.method() == Method::POST && !is_json(request.headers()) {
        return Err(Failure::not_json());
    }
    let (mut parts, body) = request.into_parts();
    let body = read(body).await?;
    parts.extensions.insert(caller);
    Ok(Request::from_parts(parts, Body::from(body)))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn caller(tokens: &Tokens, origin: &Origin, headers: &HeaderMap) -> Result<Caller, Failure> {
    let from = match origin {
        Origin::Unix => return Ok(Caller::admin("unix")),
        Origin::Tcp(from) => from,
    };
    if tokens.is_empty() {
        let is_ours = text(headers, HOST).is_some_and(is_this_machine);
        return is_ours
            .then(|| Caller::admin(from))
            .ok_or_else(Failure::foreign_host);
    }
    let (name, role) = bearer(tokens, headers)?;
    Ok(Caller {
        name: Some(name.to_owned()),
        from: from.to_string(),
        role,
    })
}

fn bearer<'a>(tokens: &'a Tokens, headers: &HeaderMap) -> Result<(&'a str, Role), Failure> {
    let needed = "this needs the header `authorization: Bearer TOKEN`";
    let given = text(headers, AUTHORIZATION).and_then(|text| text.split_once(' '));
    let token = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let (_, token) = token.ok_or_else(|| Failure::unauthorized(needed))?;
    let known = tokens.find(token.trim());
    known.ok_or_else(|| Failure::unauthorized("this token is not known"))
}

fn is_this_machine(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let host = authority.host();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

fn is_json(headers: &HeaderMap) -> bool {
    let given = text(headers, CONTENT_TYPE).unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default();
    essence.trim().eq_ignore_ascii_case("application/json")
}

async fn read(body: Body) -> Result<Bytes, Failure> {
    if body.size_hint().lower() > HTTP_BODY_BYTES_MAX as u64 {
        return Err(Failure::too_long());
    }
    let limit = Duration::from_millis(HTTP_REQUEST_MS);
    let read = timeout(limit, to_bytes(body, HTTP_BODY_BYTES_MAX)).await;
    let read = read.map_err(|_| Failure::too_slow())?;
    read.map_err(|_| Failure::too_long())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_others_are_not_this_machine() {
        for ours in [
            "127.0.0.1",
            "127.0.0.1:10810",
            "[::1]:10810",
            "localhost:80",
        ] {
            assert!(is_this_machine(ours), "{ours}");
        }
        for other in ["", "evil.example", "127.0.0.1.evil.example:10810", "a b"] {
            assert!(!is_this_machine(other), "{other}");
        }
    }

    #[test]
    fn json_is_said_with_or_without_a_character_set() {
        let said = |value: &str| {
            let headers = [(CONTENT_TYPE, value.parse().unwrap())];
            is_json(&headers.into_iter().collect())
        };
        assert!(said("application/json") && said("Application/JSON; charset=utf-8"));
        assert!(!said("text/plain") && !said("application/x-www-form-urlencoded"));
    }
}
