//! Values in the registry file and in its messages: one version byte, then postcard.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of every value and message written by this program.
const VERSION: u8 = 1;

/// Why bytes are no value.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CodecError {
    /// Written by a newer program.
    #[error("has version {0}, this program knows up to {VERSION}: update blockd on this node")]
    Newer(u8),
    /// Damaged, or not a value of this kind.
    #[error("is damaged: {0}")]
    Damaged(String),
}

/// The bytes of a value.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = postcard::to_extend(value, vec![VERSION]);
    bytes.map_err(|e| CodecError::Damaged(e.to_string()))
}

/// The value of bytes; all of them have to be used.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            Ok((_, left)) => Err(CodecError::Damaged(format!(
                "{} bytes too many",
                left.len()
            ))),
            Err(e) => Err(CodecError::Damaged(e.to_string())),
        },
        Some((&version, _)) if version > VERSION => Err(CodecError::Newer(version)),
        _ => Err(CodecError::Damaged("no version".to_owned())),
    }
}
