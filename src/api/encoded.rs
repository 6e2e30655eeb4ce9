//! Messages encoded once and sent to many.
//!
//! Ten thousand streams of one workload are sent the same bytes. [`Encoded`] stands in the generated server where a
//! response message would: it holds the encoded form, shared, and writes it as it is. It is never decoded.

use bytes::{Buf, BufMut, Bytes};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType},
};
use zeroize::Zeroizing;

/// A message in its encoded form. Two are equal when their bytes are: that is how a stream knows that nothing it
/// would send has changed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Encoded(Bytes);

/// An encoded [`super::proto::workload::X509svidResponse`].
pub type X509svidResponse = Encoded;
/// An encoded [`super::proto::workload::X509BundlesResponse`].
pub type X509BundlesResponse = Encoded;
/// An encoded [`super::proto::workload::JwtBundlesResponse`].
pub type JwtBundlesResponse = Encoded;

impl Encoded {
    /// Encodes `message`. The bytes may hold private keys: they are zeroised when the last holder lets go.
    pub fn new(message: &impl Message) -> Self {
        Self(Bytes::from_owner(Zeroizing::new(message.encode_to_vec())))
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, shared.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

// The bytes hold private keys.
impl std::fmt::Debug for Encoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Encoded({} bytes)", self.0.len())
    }
}

impl From<Bytes> for Encoded {
    /// Takes the bytes of a message that was encoded before.
    fn from(bytes: Bytes) -> Self {
        Self(bytes)
    }
}

impl Message for Encoded {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        prost::encoding::skip_field(wire_type, tag, buf, ctx)
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{super::proto::workload as pb, *};

    #[test]
    fn encodes_to_the_same_bytes_and_keeps_silent() {
        let message = pb::X509svidResponse {
            svids: vec![pb::X509svid { x509_svid_key: b"secret".to_vec(), ..Default::default() }],
            ..Default::default()
        };
        let encoded = Encoded::new(&message);
        assert_eq!(encoded.encode_to_vec(), message.encode_to_vec());
        assert_eq!(encoded.encoded_len(), message.encoded_len());
        assert!(!format!("{encoded:?}").contains("secret"));
        let mut copy = encoded.clone();
        copy.clear();
        assert_eq!(copy, Encoded::default());
        assert_ne!(encoded, copy);
    }
}
