//! The tables of the gate and of the caller stage, and so many callers one after the other.

use std::{
    fs,
    time::{Duration, Instant},
};

use durward::limits::{CallerKey, Gate, GatePlan, LimitSettings, Limits, Method, caller::Caller};

use super::polite::RATE;

/// A caller that is a key and no more.
struct Key(CallerKey);

impl Caller for Key {
    fn caller_key(&self) -> CallerKey {
        self.0
    }
}

/// The tables of the gate and of the caller stage, and so many callers one after the other, while a polite one asks twenty times a
/// second.
pub(crate) fn table(callers: u64) {
    let limits = Limits::default();
    let plan = GatePlan::new(&LimitSettings::default(), 20_000, 1 << 30).expect("a plan");
    let gate = Gate::new(plan, &limits);
    let resident = || {
        let text = fs::read_to_string("/proc/self/statm").expect("its memory");
        text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4
    };
    let call = |uid| {
        let Ok(_permit) = gate.open(CallerKey::Uid(uid)) else { return false };
        limits.admit_caller(Key(CallerKey::Uid(uid)), Method::FetchJwtSvid).is_ok()
    };
    let (mut admitted, mut polite, mut asked) = (0_u64, 0_u64, 0_u64);
    // It called before the flood began, as who is known has.
    assert!(call(1_000) && call(1_000));
    let (began, before) = (Instant::now(), resident());
    let mut most = before;
    let mut due = began;
    for nth in 0..callers {
        // Spread over all the users there can be, as pods would be.
        admitted += u64::from(call((nth as u32).wrapping_mul(2_654_435_761) | 1 << 16));
        if Instant::now() >= due {
            due += Duration::from_secs(1) / RATE;
            asked += 1;
            polite += u64::from(call(1_000));
            most = most.max(resident());
        }
    }
    println!(
        "\n{callers} distinct callers on the tables alone: {admitted} admitted in {:.2} s, {:.1} MiB more at most, the polite \
         caller {polite}/{asked}",
        began.elapsed().as_secs_f64(),
        (most - before) as f64 / 1024.0
    );
}
