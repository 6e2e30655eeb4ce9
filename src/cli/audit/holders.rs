//! Who held an identity, of many lines: one for each process and SVID, whatever the number of its connections.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{BuildHasher as _, RandomState},
};

use nix::unistd::{Uid, User};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime, UtcOffset, macros::format_description};

use super::line::AuditLine;
use crate::{cli::terminal::clean, store::audit::message};

/// Holders that are kept at a time; further ones are told apart from these.
const MOST_HELD: usize = 100_000;
/// `svid given again` may begin as much before the line about the first time: older agents wrote whole seconds, and a line has
/// its time a moment after it was given.
const ROUNDED: Duration = Duration::SECOND;
/// Lines that are known again, when another file has them too.
const MOST_KNOWN: usize = 1_000_000;

/// Who it is, as far as the lines say.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Receiver {
    caller: Option<String>,
    uid: Option<u64>,
    gid: Option<u64>,
    pid: Option<u64>,
    kind: Option<String>,
}

/// Which SVID it was. Of counts nothing is known of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct SvidName {
    serial: Option<String>,
    kid: Option<String>,
    token_sha256: Option<String>,
}

/// When it was given.
#[derive(Clone, Copy, Debug)]
struct TimesGiven {
    /// For the first time, and for the last.
    since: OffsetDateTime,
    at: OffsetDateTime,
    /// Until when the last is valid, if that is known of all.
    until: Option<OffsetDateTime>,
    times: u64,
    /// Whether all lines about it say that it was given before.
    is_again: bool,
}

impl TimesGiven {
    fn join(&mut self, more: Self) {
        self.since = self.since.min(more.since);
        self.at = self.at.max(more.at);
        self.until = self.until.zip(more.until).map(|(one, other)| one.max(other));
        self.times = self.times.saturating_add(more.times);
        self.is_again &= more.is_again;
    }

    /// Whether `other`, which was given again, was given for the first time in what is known here.
    fn has_first_of(&self, other: &Self) -> bool {
        self.since.checked_sub(ROUNDED).unwrap_or(self.since) <= other.since
    }

    /// Whether all of `other` lies within this.
    fn spans(&self, other: &Self) -> bool {
        let lasts = self.until.is_none_or(|end| other.until.is_some_and(|until| until <= end));
        self.has_first_of(other) && lasts
    }
}

/// Those who were found.
#[derive(Debug, Default)]
pub(super) struct Holders {
    held: BTreeMap<(Receiver, SvidName), TimesGiven>,
    known: HashSet<u64>,
    hasher: RandomState,
    names: BTreeMap<u64, Option<String>>,
}

impl Holders {
    /// Whether this line was read before. One without a time may look like another.
    pub(super) fn has_read(&mut self, line: &AuditLine) -> bool {
        if line.at.is_none() {
            return false;
        }
        if self.known.len() >= MOST_KNOWN {
            self.known.clear();
        }
        !self.known.insert(self.hasher.hash_one(line))
    }

    pub(super) fn is_full(&self) -> bool {
        self.held.len() >= MOST_HELD
    }

    /// Takes a line about one who was given an SVID, if that was valid in the span.
    pub(super) fn take(
        &mut self,
        line: &AuditLine,
        from: Option<OffsetDateTime>,
        to: Option<OffsetDateTime>,
    ) {
        let (Some(at), Some(since)) = (line.at, line.since()) else { return };
        let until = line.until();
        let begins = to.is_none_or(|to| since < to);
        // Of one whose end nobody wrote down, it is not known that it had ended.
        let ends = from.is_none_or(|from| until.is_none_or(|until| until > from));
        if !(begins && ends) {
            return;
        }
        let text = |key: &str| line.text(key).map(str::to_owned);
        let receiver = Receiver {
            caller: text("caller"),
            uid: line.number("uid"),
            gid: line.number("gid"),
            pid: line.number("pid"),
            kind: text("kind"),
        };
        let svid = SvidName { serial: text("serial"), kid: text("kid"), token_sha256: text("token_sha256") };
        let is_again = line.message == message::SVID_GIVEN_AGAIN;
        let given = TimesGiven { since, at, until, times: line.times(), is_again };
        self.held.entry((receiver, svid)).and_modify(|held| held.join(given)).or_insert(given);
    }

    /// All of them, by time; they are forgotten. What a process was given again is left out where it is told when it was
    /// given first.
    pub(super) fn drain(&mut self) -> Vec<Holder> {
        let held = std::mem::take(&mut self.held);
        let mut first: BTreeMap<&Receiver, TimesGiven> = BTreeMap::new();
        for ((receiver, _), given) in held.iter().filter(|(_, given)| !given.is_again) {
            first.entry(receiver).and_modify(|known| known.join(*given)).or_insert(*given);
        }
        let is_news = |receiver: &Receiver, given: &TimesGiven| {
            !given.is_again || !first.get(receiver).is_some_and(|first| first.spans(given))
        };
        let mut found = Vec::new();
        for ((receiver, svid), given) in held.iter().filter(|((receiver, _), given)| is_news(receiver, given))
        {
            let user = receiver.uid.and_then(|uid| {
                let lookup = || User::from_uid(Uid::from_raw(u32::try_from(uid).ok()?)).ok().flatten();
                self.names.entry(uid).or_insert_with(|| lookup().map(|user| user.name)).clone()
            });
            let has_first =
                !given.is_again || first.get(receiver).is_some_and(|first| first.has_first_of(given));
            found.push(Holder {
                receiver: receiver.clone(),
                svid: svid.clone(),
                given: *given,
                has_first,
                user,
            });
        }
        found.sort_by_key(|holder| holder.given.since);
        found
    }
}

/// One who held the identity.
#[derive(Debug)]
pub(super) struct Holder {
    receiver: Receiver,
    svid: SvidName,
    given: TimesGiven,
    /// Whether a line tells when it was given something for the first time.
    has_first: bool,
    /// Whose UID it is on this machine now.
    user: Option<String>,
}

impl Holder {
    pub(super) fn pretty(&self) -> String {
        let Receiver { caller, uid, pid, kind, .. } = &self.receiver;
        let text = |of: &Option<String>| of.as_deref().map(clean).unwrap_or_default();
        let TimesGiven { since, at, until, times, is_again } = self.given;
        let has_first = self.has_first;
        let until = until.map_or_else(|| "an unknown end".to_owned(), shown);
        let user = self.user.as_deref().map(|name| format!(" ({})", clean(name))).unwrap_or_default();
        let process = match (pid, uid) {
            (Some(pid), Some(uid)) => format!("pid {pid}, uid {uid}{user}, "),
            _ => "no process named, ".to_owned(),
        };
        let name = match &self.svid {
            SvidName { serial: Some(serial), .. } => format!("X.509-SVID, serial {}", clean(serial)),
            SvidName { kid: kid @ Some(_), token_sha256, .. } => {
                format!("JWT-SVID, kid {}, token_sha256 {}", text(kid), text(token_sha256))
            }
            _ if kind.as_deref() == Some("x509") => "X.509-SVID".to_owned(),
            _ => "JWT-SVID".to_owned(),
        };
        let before = if has_first { "" } else { ", and before that in no line" };
        let many = if times == 1 && !is_again {
            String::new()
        } else {
            let times = if times == 1 { "once".to_owned() } else { format!("{times} times") };
            format!("\n  given {times}, the last by {}{before}", shown(at))
        };
        format!("{} to {until}\n  {process}caller {}\n  {name}{many}\n", shown(since), text(caller))
    }

    pub(super) fn json(&self) -> Value {
        let Receiver { caller, uid, gid, pid, kind } = &self.receiver;
        let SvidName { serial, kid, token_sha256 } = &self.svid;
        json!({
            "given": shown(self.given.since),
            "given_by": shown(self.given.at),
            "until": self.given.until.map(shown),
            "times": self.given.times,
            "caller": caller,
            "uid": uid,
            "user": self.user,
            "gid": gid,
            "pid": pid,
            "kind": kind,
            "serial": serial,
            "kid": kid,
            "token_sha256": token_sha256,
        })
    }
}

/// To the second, in UTC.
pub(super) fn shown(at: OffsetDateTime) -> String {
    let at = at.to_offset(UtcOffset::UTC);
    at.format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use time::{Duration, macros::datetime};

    use super::*;

    const SINCE: OffsetDateTime = datetime!(2026-11-23 23:30:00.5 UTC);

    fn line(message: &str, more: &str) -> AuditLine {
        let text = format!(
            "2026-11-23T23:30:00.5Z  INFO audit: {message} caller=uid:4000000007 {more} spiffe_id=spiffe://td/web"
        );
        AuditLine::parse(&text).unwrap()
    }

    fn found(lines: &[AuditLine]) -> Vec<String> {
        let mut holders = Holders::default();
        for line in lines {
            if !holders.has_read(line) {
                holders.take(line, None, None);
            }
        }
        holders.drain().iter().map(Holder::pretty).collect()
    }

    const PROCESS: &str = "uid=4000000007 gid=8 pid=9 kind=x509";

    #[test]
    fn a_holder_is_found_by_when_its_svid_was_valid() {
        let utc = |text: &str| (!text.is_empty()).then(|| crate::cli::audit::moment(text).unwrap());
        for (from, to, is_found) in [
            ("", "", true),
            ("2026-11-24", "2026-11-25", true),
            ("2026-11-23", "2026-11-24", true),
            ("2026-11-22", "2026-11-23", false),
            ("2026-11-24 00:30", "", false),
            ("2026-11-24T01:29:59+01:00", "", true),
            ("", "2026-11-23 23:30", false),
        ] {
            let line = line("svid given", &format!("{PROCESS} serial=0a expires=2026-11-24T00:30:00Z"));
            let mut holders = Holders::default();
            holders.take(&line, utc(from), utc(to));
            assert_eq!(holders.drain().len() == 1, is_found, "{from} {to}");
        }
    }

    #[test]
    fn holders_are_processes_with_an_svid_each() {
        let given = |serial: &str, at: i64| {
            let end = SINCE + Duration::hours(1);
            let mut line = line("svid given", &format!("{PROCESS} serial={serial} expires={}", shown(end)));
            line.at = Some(SINCE + Duration::minutes(at));
            line
        };
        let again = |process: &str, since: &str| {
            let more = format!("{process} times=3 since={since} expires=2026-11-24T00:30:00Z");
            let mut line = line("svid given again", &more);
            line.at = Some(SINCE + Duration::minutes(20));
            line
        };
        let who = "pid 9, uid 4000000007, caller uid:4000000007";
        let once = |serial: &str, since: &str| {
            format!("{since} to 2026-11-24T00:30:00Z\n  {who}\n  X.509-SVID, serial {serial}\n")
        };
        let (early, late) = ("2026-11-23T23:30:00Z", "2026-11-23T23:50:00Z");
        let thrice = format!("  given 3 times, the last by {late}, and before that in no line\n");
        for (case, lines, want) in [
            ("one", vec![given("0a", 0)], vec![once("0a", early)]),
            ("the same line twice", vec![given("0a", 0), given("0a", 0)], vec![once("0a", early)]),
            (
                "two connections",
                vec![given("0a", 20), given("0a", 0)],
                vec![format!("{}  given 2 times, the last by {late}\n", once("0a", early))],
            ),
            ("by time", vec![given("0a", 20), given("0b", 0)], vec![once("0b", early), once("0a", late)]),
            (
                "again, and the first is there",
                vec![given("0a", 0), again(PROCESS, late)],
                vec![once("0a", early)],
            ),
            (
                "again, and the first is not there",
                vec![again(PROCESS, early)],
                vec![format!("{early} to 2026-11-24T00:30:00Z\n  {who}\n  X.509-SVID\n{thrice}")],
            ),
            (
                "again, of more than one process",
                vec![given("0a", 0), again("kind=x509", late)],
                vec![
                    once("0a", early),
                    format!(
                        "{late} to 2026-11-24T00:30:00Z\n  no process named, caller uid:4000000007\n  X.509-SVID\n{thrice}"
                    ),
                ],
            ),
        ] {
            assert_eq!(found(&lines), want, "{case}");
        }
    }
}
