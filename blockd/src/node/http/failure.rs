//! Errors as JSON with their status.
//!
//! | status | kinds |
//! | --- | --- |
//! | 400 | `invalid` |
//! | 401 | `unauthorized`: no token, or one that is not known |
//! | 403 | `forbidden`: the role is too small |
//! | 404 | `not_found` |
//! | 405, 408, 413, 415 | `invalid`: not this method; too slow; too long; no JSON |
//! | 409 | `exists`, `conflict` |
//! | 500 | `internal` |
//! | 503 | `unavailable` |

use crate::admin::{AdminError, AdminErrorKind};
use crate::limits::HTTP_BODY_BYTES_MAX;
use axum::Json;
use axum::http::header::WWW_AUTHENTICATE;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    kind: &'static str,
    message: String,
}

impl Failure {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            status,
            kind,
            message,
        }
    }

    fn invalid(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, AdminErrorKind::Invalid.name(), message)
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::invalid(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn no_path() -> Self {
        let text =
            "there is no such path; the README lists them, POST /v1/admin takes every request";
        Self::new(StatusCode::NOT_FOUND, AdminErrorKind::NotFound.name(), text)
    }

    pub(super) fn no_method(method: &Method) -> Self {
        let text = format!("this path has no {method}; the header `allow` says what it has");
        Self::invalid(StatusCode::METHOD_NOT_ALLOWED, text)
    }

    pub(super) fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    pub(super) fn foreign_host() -> Self {
        let text = "the header Host is neither an address nor localhost: without tokens only those are \
                    answered, so that no web page reaches this server by a name of its own";
        Self::new(
            StatusCode::FORBIDDEN,
            AdminErrorKind::Forbidden.name(),
            text,
        )
    }

    pub(super) fn not_json() -> Self {
        let text = "a POST needs the header `content-type: application/json`; without fields its body is {}";
        Self::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, text)
    }

    pub(super) fn too_long() -> Self {
        let text = format!("the body is longer than {HTTP_BODY_BYTES_MAX} bytes");
        Self::invalid(StatusCode::PAYLOAD_TOO_LARGE, text)
    }

    pub(super) fn too_slow() -> Self {
        Self::invalid(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")
    }

    pub(super) fn stopping() -> Self {
        let text = "the server is stopping";
        let kind = AdminErrorKind::Unavailable.name();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, text)
    }
}

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        let status = match error.kind {
            AdminErrorKind::Invalid => StatusCode::BAD_REQUEST,
            AdminErrorKind::Forbidden => StatusCode::FORBIDDEN,
            AdminErrorKind::NotFound => StatusCode::NOT_FOUND,
            AdminErrorKind::Exists | AdminErrorKind::Conflict => StatusCode::CONFLICT,
            AdminErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            AdminErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.kind.name(), error.message)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = Json(json!({"error": {"kind": self.kind, "message": self.message}}));
        match self.status {
            StatusCode::UNAUTHORIZED => {
                (self.status, [(WWW_AUTHENTICATE, "Bearer")], body).into_response()
            }
            status => (status, body).into_response(),
        }
    }
}
