//! What a person is told of a process beyond what entries ask for: all its groups, and what they are called here.
//!
//! Its groups are the process's own choice, and each name is a lookup that may hang: few are looked up, on a thread
//! that is not of the runtime, and within moments. A name that an entry asks for is not added here, so that nobody
//! reads of a match that a call would not have.

use std::time::{Duration, Instant};

use super::questions::UnixQuestions;
use crate::{
    attest::status::ProcStatus,
    identity::selector::{Selector, Selectors},
    os::accounts::{self, AccountNumber},
};

/// Names of so many numbers are looked up: of the user, the group, and the first supplementary groups.
const MOST: usize = 32;

/// How long all lookups together may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Adds to what was `found` of a process what nobody asks for.
pub(super) async fn add(status: &ProcStatus, questions: &UnixQuestions, found: &mut Selectors) {
    let selector = |value: String| Selector::new(super::NAME, value);
    found.extend(status.groups.iter().map(|gid| selector(format!("supplementary_gid:{gid}"))));
    let supplementary = status.groups.iter().map(|gid| ("supplementary_group", AccountNumber::Group(*gid)));
    let of_process = [("user", AccountNumber::User(status.uid)), ("group", AccountNumber::Group(status.gid))];
    let numbers: Vec<_> = of_process.into_iter().chain(supplementary).take(MOST).collect();
    let deadline = Instant::now() + PATIENCE;
    let look_up = move || {
        let in_time = numbers.into_iter().take_while(|_| Instant::now() < deadline);
        in_time.filter_map(|(word, number)| Some((word, number.name().ok()??))).collect::<Vec<_>>()
    };
    let names = accounts::awaited_by(deadline, look_up).await.unwrap_or_default();
    let values = names.into_iter().map(|(word, name)| format!("{word}:{name}"));
    found.extend(values.filter(|value| !questions.ask_for_name(value)).map(selector));
}
