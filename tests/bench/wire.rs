//! What benches write and read by hand: long requests, and the gRPC status of an answer, read off the bytes of its headers.

use super::frames::message;

/// The gRPC status in a block of headers, if one is there: the name in Huffman's code (RFC 7541) or plain, as the agent writes it
/// to whom its gate refuses, and the value as h2 writes it, in that code, or as grpc-go does, in plain digits.
pub(crate) fn status(block: &[u8]) -> Option<u8> {
    const PLAIN: &[u8] = b"grpc-status";
    const CODED: &[u8] = &[0x9a, 0xca, 0xc8, 0xb2, 0x12, 0x34, 0xda, 0x8f];
    let behind = |name: &[u8]| {
        let at = block.windows(name.len()).position(|it| it == name)?;
        block.get(at + name.len()..)
    };
    let [length, value @ ..] = behind(CODED).or_else(|| behind(PLAIN))? else { return None };
    let value = value.get(..usize::from(length & 0x7f))?;
    let written =
        |status: u8| if length & 0x80 == 0 { status.to_string().into_bytes() } else { coded(status) };
    (0..=16).find(|status: &u8| written(*status) == value)
}

/// A number as Huffman's code has it: digits take five bits up to 2, and six from 3 on; ones fill the last byte.
fn coded(number: u8) -> Vec<u8> {
    let (mut bits, mut count) = (0_u32, 0);
    for digit in number.to_string().bytes().map(|digit| u32::from(digit - b'0')) {
        let (code, length) = if digit < 3 { (digit, 5) } else { (0x16 + digit, 6) };
        (bits, count) = (bits << length | code, count + length);
    }
    let fill = (8 - count % 8) % 8;
    let bits = bits << fill | ((1 << fill) - 1);
    bits.to_be_bytes()[4 - usize::try_from((count + fill) / 8).expect("few")..].to_vec()
}

/// A `JWTSVIDRequest` with one long audience.
pub(crate) fn jwt_request_of(audience: &str) -> Vec<u8> {
    let (mut length, mut rest) = (Vec::new(), audience.len());
    while rest > 127 {
        length.push(u8::try_from(rest & 127).expect("seven bits") | 128);
        rest >>= 7;
    }
    length.push(u8::try_from(rest).expect("seven bits"));
    message(&[&[0x0a][..], &length, audience.as_bytes()].concat())
}
