//! Places at which a test lets this process die, as by kill -9. Debug builds only.

/// Dies here if `BLOCKD_CRASH_AT` names the place.
pub(super) fn point(name: &str) {
    if cfg!(debug_assertions) && std::env::var("BLOCKD_CRASH_AT").is_ok_and(|at| at == name) {
        tracing::error!(name, "dying at a fault point");
        std::process::abort();
    }
}
