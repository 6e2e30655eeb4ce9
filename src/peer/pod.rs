//! The place of a process in Kubernetes: its pod, and the container in that.

use std::fmt;

/// The UID of a pod.
pub type PodUid = [u8; 16];

/// The ID that a container runtime gave to a container.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContainerId([u8; 32]);

/// The place that the kubelet and the container runtime gave to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PodPlace {
    pub pod: PodUid,
    /// `None` for a process that stands in the pod and in no container of it, as the runtime's own do.
    pub container: Option<ContainerId>,
}

impl ContainerId {
    /// An ID as runtimes write it: 64 hexadecimal digits.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (digits, []) = text.as_chunks::<2>() else { return None };
        let mut id = [0; 32];
        if digits.len() != id.len() {
            return None;
        }
        let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        for (byte, [high, low]) in id.iter_mut().zip(digits) {
            *byte = nibble(*high)? << 4 | nibble(*low)?;
        }
        Some(Self(id))
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
