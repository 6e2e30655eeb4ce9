//! Numbers that spread work over time. Nothing secret may depend on them.

use std::hash::{BuildHasher as _, Hasher as _};

/// A series of numbers in 0..1, another one each time.
pub fn fractions() -> impl FnMut() -> f64 {
    let state = ahash::RandomState::new();
    let mut at = 0_u64;
    move || {
        at += 1;
        let mut hasher = state.build_hasher();
        hasher.write_u64(at);
        // 32 bits are plenty, and convert without loss.
        let bits = u32::try_from(hasher.finish() >> 32).unwrap_or(u32::MAX);
        f64::from(bits) / (f64::from(u32::MAX) + 1.0)
    }
}

/// One such number.
pub fn fraction() -> f64 {
    fractions()()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_are_in_range() {
        for _ in 0..8 {
            let mut next = fractions();
            for _ in 0..100 {
                assert!((0.0..1.0).contains(&next()));
            }
        }
    }
}
