//! A device whose operations end: a server that does not answer within the deadline is an error.

use crate::backend::BackendError;
use crate::ext4::device::{Device, Pending};
use bytes::Bytes;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// A device with a deadline for each operation.
pub struct TimelyDevice {
    device: Arc<dyn Device>,
    deadline: Duration,
}

impl TimelyDevice {
    #[must_use]
    pub fn new(device: Arc<dyn Device>, deadline: Duration) -> Self {
        Self { device, deadline }
    }

    async fn within<T>(
        &self,
        what: &str,
        work: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let late = |_| {
            let text = format!("{what}: no answer within {} s", self.deadline.as_secs());
            io::Error::other(BackendError::new(libc::EIO, text))
        };
        timeout(self.deadline, work).await.map_err(late)?
    }
}

impl Device for TimelyDevice {
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes> {
        Box::pin(self.within("read", self.device.read(offset_bytes, len_bytes)))
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()> {
        Box::pin(self.within("write", self.device.write(offset_bytes, data)))
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()> {
        Box::pin(self.within("discard", self.device.zero(offset_bytes, len_bytes)))
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(self.within("flush", self.device.flush()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never answers.
    struct Silent;

    impl Device for Silent {
        fn size_bytes(&self) -> u64 {
            1
        }

        fn read(&self, _: u64, _: u32) -> Pending<'_, Bytes> {
            Box::pin(std::future::pending())
        }

        fn write(&self, _: u64, _: Bytes) -> Pending<'_, ()> {
            Box::pin(std::future::pending())
        }

        fn zero(&self, _: u64, _: u64) -> Pending<'_, ()> {
            Box::pin(std::future::pending())
        }

        fn flush(&self) -> Pending<'_, ()> {
            Box::pin(std::future::pending())
        }
    }

    #[test]
    fn silence_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let device = TimelyDevice::new(Arc::new(Silent), Duration::from_millis(5));
            let error = device.flush().await.unwrap_err();
            assert_eq!(error.to_string(), "flush: no answer within 0 s");
            assert!(device.read(0, 1).await.is_err());
            assert!(device.write(0, Bytes::new()).await.is_err());
            assert!(device.zero(0, 1).await.is_err());
        });
    }
}
