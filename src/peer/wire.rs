//! What passes before HTTP/2 sees it.

/// What a peer may send that is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes at once.
    pub burst: u32,
    /// Bytes per second after that.
    pub per_second: u32,
}

impl Budget {
    /// 32 KiB, and 1 KiB each second.
    pub const DEFAULT: Self = Self { burst: 32 * 1024, per_second: 1024 };
}

pub struct Wire;
