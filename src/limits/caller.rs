//! Whom the limits charge.

use std::fmt;

/// Whom a call is charged to: the pod on Kubernetes, else the user. Resolved once per connection, at accept.
/// Never the PID: every retry of a forking caller has a new one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallerKey {
    /// The UID of a pod, as the kubelet's cgroup path names it.
    Pod([u8; 16]),
    /// The effective UID of the process when it connected.
    Uid(u32),
}

impl fmt::Display for CallerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(b) => {
                f.write_str("pod:")?;
                for (at, byte) in b.iter().enumerate() {
                    if matches!(at, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
            Self::Uid(uid) => write!(f, "uid:{uid}"),
        }
    }
}

impl fmt::Debug for CallerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A process at the socket, as far as the limits care.
pub trait Caller {
    /// Whom to charge.
    fn caller_key(&self) -> CallerKey;
}

impl<C: Caller> Caller for std::sync::Arc<C> {
    fn caller_key(&self) -> CallerKey {
        (**self).caller_key()
    }
}
