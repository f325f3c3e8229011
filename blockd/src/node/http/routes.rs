//! The paths of administration: each is an [`AdminRequest`], put together from path and body.

use super::failure::Failure;
use crate::admin::AdminRequest;
use axum::routing::MethodFilter;
use serde_json::{Map, Value, json};

/// A path, and the request for which it stands.
pub(super) struct Route {
    pub(super) method: MethodFilter,
    pub(super) path: &'static str,
    /// The name of the request in JSON.
    pub(super) request: &'static str,
    /// The fields that the variables of the path are, in their order; behind a dot a field of a field.
    /// All other fields come from the body.
    pub(super) fields: &'static [&'static str],
}

const fn route(
    method: MethodFilter,
    path: &'static str,
    request: &'static str,
    fields: &'static [&'static str],
) -> Route {
    Route {
        method,
        path,
        request,
        fields,
    }
}

const GET: MethodFilter = MethodFilter::GET;
const POST: MethodFilter = MethodFilter::POST;
const DELETE: MethodFilter = MethodFilter::DELETE;
const TARGET: &[&str] = &["target.volume", "target.snapshot"];
const SOURCE: &[&str] = &["source.volume", "source.snapshot"];

/// All paths.
#[rustfmt::skip]
pub(super) const ROUTES: &[Route] = &[
    route(GET,    "/v1/version", "version", &[]),
    route(GET,    "/v1/cluster", "cluster_status", &[]),
    route(POST,   "/v1/cluster", "cluster_define", &[]),
    route(GET,    "/v1/nodes", "node_list", &[]),
    route(POST,   "/v1/nodes", "node_define", &[]),
    route(DELETE, "/v1/nodes/{node}", "node_forget", &["node"]),
    route(POST,   "/v1/nodes/{node}/drain", "node_drain", &["node"]),
    route(GET,    "/v1/drains", "drain_list", &[]),
    route(GET,    "/v1/moves", "move_list", &[]),
    route(GET,    "/v1/holds", "hold_list", &[]),
    route(GET,    "/v1/leases", "lease_list", &[]),
    route(POST,   "/v1/rebalance", "volume_rebalance", &[]),
    route(GET,    "/v1/volumes", "volume_list", &[]),
    route(POST,   "/v1/volumes", "volume_create", &[]),
    route(GET,    "/v1/volumes/{volume}", "volume_details", &["name"]),
    route(DELETE, "/v1/volumes/{volume}", "volume_delete", &["name"]),
    route(POST,   "/v1/volumes/{volume}/resize", "volume_resize", &["name"]),
    route(POST,   "/v1/volumes/{volume}/rename", "volume_rename", &["name"]),
    route(POST,   "/v1/volumes/{volume}/flatten", "volume_flatten", &["name"]),
    route(POST,   "/v1/volumes/{volume}/offline", "set_offline", &["target"]),
    route(GET,    "/v1/volumes/{volume}/settings", "volume_get", &["name"]),
    route(POST,   "/v1/volumes/{volume}/settings", "volume_set", &["name"]),
    route(GET,    "/v1/volumes/{volume}/route", "route_show", &["volume"]),
    route(POST,   "/v1/volumes/{volume}/pages", "page_move", &["volume"]),
    route(POST,   "/v1/volumes/{volume}/rebalance", "volume_rebalance", &["volume"]),
    route(GET,    "/v1/volumes/{volume}/move", "move_list", &["volume"]),
    route(POST,   "/v1/volumes/{volume}/move", "move_wish", &["volume"]),
    route(GET,    "/v1/volumes/{volume}/lease", "lease_show", &["volume"]),
    route(DELETE, "/v1/volumes/{volume}/lease", "lease_break", &["volume"]),
    route(GET,    "/v1/snapshots", "snapshot_details", &[]),
    route(POST,   "/v1/snapshots", "snapshot_create", &[]),
    route(GET,    "/v1/volumes/{volume}/snapshots", "snapshot_details", &["volume"]),
    route(DELETE, "/v1/volumes/{volume}/snapshots/{snapshot}", "snapshot_delete", TARGET),
    route(POST,   "/v1/volumes/{volume}/snapshots/{snapshot}/rename", "snapshot_rename", TARGET),
    route(POST,   "/v1/volumes/{volume}/snapshots/{snapshot}/protect", "snapshot_protect", TARGET),
    route(POST,   "/v1/volumes/{volume}/snapshots/{snapshot}/rollback", "snapshot_rollback", TARGET),
    route(POST,   "/v1/volumes/{volume}/snapshots/{snapshot}/clone", "volume_clone", SOURCE),
];

impl Route {
    /// The request of a path with these variables and a body, which may be empty.
    pub(super) fn request<'a>(
        &self,
        variables: impl Iterator<Item = &'a str>,
        body: &[u8],
    ) -> Result<AdminRequest, Failure> {
        let mut fields = fields_of(body)?;
        for (field, text) in self.fields.iter().zip(variables) {
            put(&mut fields, field, text)?;
        }
        let name = self.request;
        if fields.is_empty()
            && let Ok(request) = serde_json::from_value(json!(name))
        {
            return Ok(request);
        }
        serde_json::from_value(json!({ name: fields }))
            .map_err(|error| Failure::bad_request(format!("{name}: {error}")))
    }
}

fn fields_of(body: &[u8]) -> Result<Map<String, Value>, Failure> {
    if body.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_slice(body)
        .map_err(|error| Failure::bad_request(format!("the body is no JSON object: {error}")))
}

/// Makes a variable of the path a field; those that are called `node` are numbers.
fn put(fields: &mut Map<String, Value>, field: &str, text: &str) -> Result<(), Failure> {
    if let Some((outer, inner)) = field.split_once('.') {
        let within = fields.entry(outer).or_insert_with(|| json!({}));
        return match within {
            Value::Object(within) => put(within, inner, text),
            _ => Err(Failure::bad_request(format!("{outer}: the path says it"))),
        };
    }
    let value = match field {
        "node" => json!(text.parse::<u16>().map_err(|_| no_number(text))?),
        _ => json!(text),
    };
    match fields.insert(field.to_owned(), value) {
        None => Ok(()),
        Some(_) => Err(Failure::bad_request(format!("{field}: the path says it"))),
    }
}

fn no_number(text: &str) -> Failure {
    Failure::bad_request(format!(
        "node: {text:?} is no number; GET /v1/nodes has them"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::SnapshotName;
    use crate::id::{DEFAULT_PAGE_BLOCKS, NodeNo};

    /// What a body must have beside the variables of the path.
    fn body_of(request: &str) -> &'static str {
        match request {
            "cluster_define" => r#"{"name": "c"}"#,
            "node_define" => r#"{"address": "10.0.0.1"}"#,
            "node_drain" => r#"{"drain": true}"#,
            "volume_create" => r#"{"name": "v", "size_bytes": 1024}"#,
            "volume_resize" => r#"{"size_bytes": 1024}"#,
            "volume_rename" | "snapshot_rename" => r#"{"new_name": "w"}"#,
            "set_offline" => r#"{"offline": true}"#,
            "volume_set" => r#"{"key": "procedure", "value": "hold"}"#,
            "page_move" => r#"{"pages": [0, 9], "to": 2}"#,
            "move_wish" => r#"{"wish": "pause"}"#,
            "snapshot_create" => r#"{"targets": [{"volume": "v", "snapshot": "s"}]}"#,
            "snapshot_protect" => r#"{"protected": true}"#,
            "volume_clone" => r#"{"name": "w"}"#,
            _ => "",
        }
    }

    #[test]
    fn every_route_is_a_request() {
        for route in ROUTES {
            let body = body_of(route.request).as_bytes();
            let made = route.request(["7", "8"].into_iter(), body);
            let made = made.unwrap_or_else(|error| panic!("{}: {error:?}", route.path));
            let name = serde_json::to_value(&made).unwrap();
            let name = match &name {
                Value::Object(named) => named.keys().next().unwrap(),
                name => name.as_str().unwrap(),
            };
            assert_eq!(name, route.request);
            assert_eq!(
                route.fields.len(),
                route.path.matches('{').count(),
                "{}",
                route.path
            );
        }
    }

    fn find(path: &str, method: MethodFilter) -> &'static Route {
        let mut routes = ROUTES.iter();
        let found = routes.find(|route| route.path == path && route.method == method);
        found.unwrap()
    }

    #[test]
    fn path_and_body_are_one_request() {
        let create = find("/v1/volumes", POST);
        let made = create.request([].into_iter(), br#"{"name": "v", "size_bytes": 512}"#);
        let AdminRequest::VolumeCreate(made) = made.unwrap() else {
            panic!("another request");
        };
        assert_eq!(
            (made.page_blocks, made.servers.len()),
            (DEFAULT_PAGE_BLOCKS, 0)
        );
        let delete = find("/v1/volumes/{volume}/snapshots/{snapshot}", DELETE);
        let target = SnapshotName {
            volume: "v".to_owned(),
            snapshot: "s".to_owned(),
        };
        assert_eq!(
            delete.request(["v", "s"].into_iter(), b""),
            Ok(AdminRequest::SnapshotDelete { target })
        );
        let forget = find("/v1/nodes/{node}", DELETE);
        assert_eq!(
            forget.request(["3"].into_iter(), b""),
            Ok(AdminRequest::NodeForget { node: NodeNo(3) })
        );
    }

    #[test]
    fn what_is_wrong_with_a_request_is_said() {
        let resize = find("/v1/volumes/{volume}/resize", POST);
        let forget = find("/v1/nodes/{node}", DELETE);
        for (route, variable, body, said) in [
            (resize, "v", "", "missing field `size_bytes`"),
            (resize, "v", r#"{"size": 1}"#, "unknown field `size`"),
            (
                resize,
                "v",
                r#"{"name": "w", "size_bytes": 1}"#,
                "name: the path says it",
            ),
            (resize, "v", "[]", "the body is no JSON object"),
            (resize, "v", "{", "the body is no JSON object"),
            (forget, "three", "", "node: \"three\" is no number"),
        ] {
            let refused = route.request([variable].into_iter(), body.as_bytes());
            let text = format!("{:?}", refused.unwrap_err()).replace('\\', "");
            assert!(text.contains(said), "{text}");
        }
    }
}
