//! All randomness of the process by one seed: libc's `getrandom` is replaced, and its system call.

use libc::c_long;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static STATE: AtomicU64 = AtomicU64::new(1);

/// Sets what the kernel's randomness gives from now on.
pub(crate) fn seed_kernel(seed: u64) {
    STATE.store(seed ^ 0x5eed_0000_0000_0000, Ordering::Relaxed);
}

fn next(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What std, `getrandom` and `rand` call instead of libc's.
///
/// # Safety
/// As getrandom(2): `buf` has room for `len` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buf: *mut u8, len: usize, _flags: u32) -> isize {
    // SAFETY: the caller gives a buffer of this length.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buf, len) };
    for chunk in bytes.chunks_mut(8) {
        let state = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        chunk.copy_from_slice(&next(state).to_le_bytes()[..chunk.len()]);
    }
    isize::try_from(len).unwrap_or(isize::MAX)
}

type Syscall = unsafe extern "C" fn(c_long, ...) -> c_long;

/// libc's own.
fn libc_syscall() -> Syscall {
    static FOUND: OnceLock<Syscall> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: the name ends with 0, and what libc has under it is a function of this type.
        unsafe {
            let found = libc::dlsym(libc::RTLD_NEXT, c"syscall".as_ptr());
            assert!(!found.is_null(), "libc has no syscall");
            std::mem::transmute::<*mut libc::c_void, Syscall>(found)
        }
    })
}

/// getrandom 0.2, from which openraft has its election timeouts, asks the kernel past libc.
///
/// # Safety
/// As syscall(2).
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    // SAFETY: the caller's arguments, as they are; a call with fewer leaves the others unused.
    unsafe {
        if number == libc::SYS_getrandom {
            let len = usize::try_from(b).unwrap_or_default();
            return getrandom(a as *mut u8, len, 0) as c_long;
        }
        libc_syscall()(number, a, b, c, d, e, f)
    }
}

/// Random numbers of one part of the simulation: parts do not disturb each other.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream of a part.
    #[must_use]
    pub(crate) fn new(seed: u64, part: u64) -> Self {
        Self(next(seed ^ next(part.wrapping_add(0x1234_5678))))
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        next(self.0)
    }

    /// A number below `n`; 0 if `n` is 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n.max(1)
    }

    /// A number from `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
