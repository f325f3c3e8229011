//! HTTP: administration as JSON, metrics and health. The bottom of this page has every path.
//!
//! It runs on the control thread, which parses, encodes and waits for slow clients; the reactor gets
//! each request as one message and answers with a value, so the data path does what `blockctl` asks
//! of it and nothing more. A connection is one request.
//!
//! The unix socket `STATE/http.sock` is for who may read the state directory, as an administrator.
//! TCP without tokens is for everybody on the machine, but not for web pages: the `Host` must be an
//! address or `localhost`, and a POST says that it is JSON, which no foreign page can say.
//!
//! | path | what it answers |
//! | --- | --- |
//! | `POST /v1/admin` | any request of [`AdminRequest`](crate::admin::AdminRequest), as `{"volume_show": {"name": "data"}}` or `"node_list"` |
//! | the paths of [`routes::ROUTES`] | each is one of these requests |
//! | `GET /metrics` | Prometheus text |
//! | `GET /healthz`, `GET /readyz` | 200 or 503, and `{"ok", "reason"}` |
//!
//! An answer is the value that `blockctl --json` prints for the same; an error is
//! `{"error": {"kind", "message"}}` with the status of [`failure`].

mod admission;
mod commands;
mod failure;
mod health;
mod look;
mod metrics;
mod reactor;
mod routes;
mod sockets;
mod text;

pub(super) use sockets::listen;

use super::Node;
use super::access::Tokens;
use axum::Router;
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use metrics::Requests;
use reactor::Reactor;
use std::rc::Rc;
use std::sync::Arc;

/// What every request needs.
struct Face {
    reactor: Reactor,
    tokens: Tokens,
    requests: Requests,
}

type Shared = Arc<Face>;

/// Serves HTTP for as long as the control thread lives. Needs a tokio `LocalSet`.
pub(super) fn start(node: &Rc<Node>, tcp: Option<std::net::TcpListener>) {
    let face = Arc::new(Face {
        reactor: Reactor::start(node),
        tokens: node.config.http_access.clone(),
        requests: Requests::default(),
    });
    sockets::serve(node, tcp, &router(&face));
}

fn router(face: &Shared) -> Router {
    let mut router = Router::new()
        .route("/metrics", get(metrics::answer))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/v1/admin", post(commands::any));
    for route in routes::ROUTES {
        router = router.route(route.path, commands::of(route));
    }
    router
        .fallback(async || failure::Failure::no_path())
        .method_not_allowed_fallback(async |method: Method| failure::Failure::no_method(&method))
        .layer(from_fn_with_state(Arc::clone(face), admission::admit))
        .layer(from_fn_with_state(Arc::clone(face), metrics::count))
        .with_state(Arc::clone(face))
}
