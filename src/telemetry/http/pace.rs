//! How often a client is answered whom nobody is charged for.
//!
//! Over TCP the kernel does not say who asks, and any process of the node may, in a loop. So connections are taken in at a
//! pace, and of what is long (the metrics) each client is given so much: who asks more often waits its turn, and who would
//! wait too long is closed. Pure: times are arguments.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use tokio::time::Instant;

/// Connections over TCP are taken in so often, after [`TAKEN_AT_ONCE`]: what they cost is a few hundredths of a core.
const TAKEN_EACH: Duration = Duration::from_millis(1);
const TAKEN_AT_ONCE: u32 = 200;
/// A client is given the metrics so often, after [`GIVEN_AT_ONCE`].
const GIVEN_EACH: Duration = Duration::from_millis(5);
const GIVEN_AT_ONCE: u32 = 20;
/// Nobody waits longer for that: behind as many connections as one user usually may have. A scraper waits for ten seconds,
/// unless it is told otherwise.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// The most clients that are told apart; the others are one.
const MOST_CLIENTS: usize = 1024;

/// Turns, each so long after another, and so many at once after a while without any.
#[derive(Clone, Copy, Debug)]
struct TurnBucket {
    each: Duration,
    at_once: u32,
    /// When as many are to be had at once as ever.
    full_at: Instant,
}

impl TurnBucket {
    fn new(each: Duration, at_once: u32, now: Instant) -> Self {
        Self { each, at_once, full_at: now }
    }

    /// How long whoever comes now waits for its turn.
    fn wait(&self, now: Instant) -> Duration {
        let at_once = self.each * self.at_once.saturating_sub(1);
        self.full_at.saturating_duration_since(now).saturating_sub(at_once)
    }

    /// Takes the next turn. Returns how long it is until then.
    fn take(&mut self, now: Instant) -> Duration {
        let wait = self.wait(now);
        self.full_at = self.full_at.max(now) + self.each;
        wait
    }
}

/// When connections are taken in.
#[derive(Debug)]
pub(super) struct Intake(TurnBucket);

impl Intake {
    pub(super) fn new(now: Instant) -> Self {
        Self(TurnBucket::new(TAKEN_EACH, TAKEN_AT_ONCE, now))
    }

    /// One was taken in. Returns how long it is until the next one may be.
    pub(super) fn took(&mut self, now: Instant) -> Duration {
        let _due = self.0.take(now);
        self.0.wait(now)
    }
}

/// Who asks, as far as it can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Scraper {
    User(u32),
    /// From another address, or from this machine: there anybody has all addresses of loopback.
    Address(IpAddr),
    Others,
}

impl Scraper {
    pub(super) fn at(address: IpAddr) -> Self {
        let address = address.to_canonical();
        Self::Address(match address {
            _ if address.is_loopback() => Ipv4Addr::LOCALHOST.into(),
            // Whoever has one has the 2^64 of its network.
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
            IpAddr::V4(_) => address,
        })
    }
}

/// When clients are given what is long.
#[derive(Debug, Default)]
pub(super) struct ScraperTurns(HashMap<Scraper, TurnBucket>);

impl ScraperTurns {
    /// Takes the client's next turn. Returns how long it waits for it; `None` where that is too long.
    pub(super) fn take(&mut self, client: Scraper, now: Instant) -> Option<Duration> {
        if self.0.len() >= MOST_CLIENTS {
            self.0.retain(|_, turns| turns.full_at > now);
        }
        let is_known = self.0.len() < MOST_CLIENTS || self.0.contains_key(&client);
        let client = if is_known { client } else { Scraper::Others };
        let turns = self.0.entry(client).or_insert_with(|| TurnBucket::new(GIVEN_EACH, GIVEN_AT_ONCE, now));
        (turns.wait(now) <= LONGEST_WAIT).then(|| turns.take(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(n: u32) -> Scraper {
        Scraper::at(Ipv4Addr::from_bits(0x0a00_0000 + n).into())
    }

    #[test]
    fn a_client_has_its_pace_and_others_wait_for_nothing() {
        let (mut it, now) = (ScraperTurns::default(), Instant::now());
        let waits: Vec<_> = std::iter::from_fn(|| it.take(remote(1), now)).collect();
        let (at_once, then) = waits.split_at(20);
        assert!(at_once.iter().all(Duration::is_zero), "{at_once:?}");
        assert!(then.iter().zip(1..).all(|(wait, n)| *wait == GIVEN_EACH * n), "{then:?}");
        assert_eq!(then.len(), 1000, "until it would be too long");
        assert_eq!(it.take(remote(2), now), Some(Duration::ZERO));
        assert_eq!(it.take(remote(1), now + GIVEN_EACH), Some(LONGEST_WAIT), "who was closed took no turn");
        assert_eq!(it.take(remote(1), now + Duration::from_secs(60)), Some(Duration::ZERO));
    }

    #[test]
    fn clients_are_told_apart_as_far_as_addresses_can_be_had() {
        let at = |address: &str| Scraper::at(address.parse().unwrap());
        for (one, other, same) in [
            ("127.0.0.1", "127.9.8.7", true),
            ("127.0.0.1", "::1", true),
            ("127.0.0.1", "::ffff:127.0.0.2", true),
            ("10.0.0.1", "::ffff:10.0.0.1", true),
            ("10.0.0.1", "10.0.0.2", false),
            ("10.0.0.1", "127.0.0.1", false),
            ("2001:db8::1", "2001:db8::2:3", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
        ] {
            assert_eq!(at(one) == at(other), same, "{one} and {other}");
        }
    }

    #[test]
    fn no_more_clients_are_told_apart_than_fit() {
        let (mut it, now) = (ScraperTurns::default(), Instant::now());
        for n in 0..3000 {
            let _wait = it.take(remote(n), now);
        }
        assert_eq!(it.0.len(), MOST_CLIENTS + 1);
        assert!(it.take(remote(0), now).is_some_and(|wait| wait.is_zero()), "who is known keeps its turns");
        assert!(it.take(remote(2999), now).is_none(), "those beyond are one");
        let _wait = it.take(remote(1), now + Duration::from_secs(60));
        assert_eq!(it.0.len(), 1, "who has all turns again is forgotten");
    }

    #[test]
    fn connections_are_taken_in_at_a_pace() {
        let began = Instant::now();
        let (mut it, mut now) = (Intake::new(began), began);
        for _ in 0..2_200 {
            now += it.took(now);
        }
        assert_eq!(now - began, Duration::from_secs(2) + TAKEN_EACH);
        assert_eq!(it.took(now + Duration::from_secs(1)), Duration::ZERO);
    }
}
