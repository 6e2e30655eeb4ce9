//! JWT-SVIDs by a SPIRE Server: one call for each, since it signs one at a time.
//!
//! A workload that asks for another audience each time needs a signature each time, and the server signs so many a second for
//! the whole node. So there is a number of places, one for each call under way, that is kept for a while however fast the
//! server is; and callers take turns for them. Who finds none in time is told so, and nobody else is.

use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tonic::Code;
use zeroize::Zeroizing;

use super::{
    calls::{CallFault, Calls},
    entries::spiffe_id_of,
    faults::{ServerFaults, ServerUse},
    proto::types::Jwtsvid,
    upstream::Faulty as _,
};
use crate::{
    identity::{Entry, JwtSvid},
    issuer::MintError,
    limits::{AttestationSlot, Attestations, Slots},
    os::clock::Clock,
    telemetry::chain,
};

/// How many calls are under way at once.
const PLACES: NonZeroU32 = NonZeroU32::new(64).unwrap();
/// How many of one caller, however idle the node is.
const PLACES_PER_CALLER: NonZeroU32 = NonZeroU32::new(32).unwrap();
/// How long a place is taken at least: so 64 of them are 426 calls a second, and the server signs 500.
const KEPT: Duration = Duration::from_millis(150);
/// How many calls wait for a place, shared as the places are.
const WAITING: NonZeroU32 = NonZeroU32::new(512).unwrap();
/// How long a call waits for a place.
const PLACE_WITHIN: Duration = Duration::from_secs(2);
/// How long the server may take.
const WITHIN: Duration = Duration::from_secs(10);
/// After how long a call that failed is tried again; half as long again each time.
const AGAIN: Duration = Duration::from_millis(500);
/// The longest token, in bytes: what is asked for has a quarter of it at most.
const LONGEST_TOKEN: usize = 64 << 10;
/// When a caller without a place may come again.
const COME_AGAIN: Duration = Duration::from_secs(1);

/// There are too many calls to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this caller has too many calls to the server under way")]
struct NoPlace;

/// Has JWT-SVIDs signed.
#[derive(Debug)]
pub(super) struct JwtSigning {
    calls: Arc<dyn Calls>,
    clock: Clock,
    places: Arc<Slots>,
    waiting: Arc<Slots>,
    faults: Arc<ServerFaults>,
}

impl JwtSigning {
    pub(super) fn new(calls: Arc<dyn Calls>, clock: Clock, faults: Arc<ServerFaults>) -> Self {
        let slots = |all, of_one| {
            Arc::new(Slots::new(Attestations::new(Some(all), Some(of_one)).unwrap_or_default()))
        };
        Self {
            calls,
            clock,
            places: slots(PLACES, PLACES_PER_CALLER),
            waiting: slots(WAITING, WAITING),
            faults,
        }
    }

    /// Has one signed, of the share of `family`.
    pub(super) async fn sign(
        &self,
        entry: &Entry,
        audience: &[String],
        family: u64,
        deadline: Instant,
    ) -> Result<JwtSvid, MintError> {
        let place = self.place(family, deadline).await?;
        let began = Instant::now();
        let signed = self.tried(entry, audience, deadline.min(began + WITHIN)).await;
        // However it ends, and also if the caller has gone by then: see `Kept`.
        drop(place);
        match &signed {
            Ok(_) => self.faults.works(ServerUse::JwtSvids),
            Err(error) if is_of_entry(error) => {}
            Err(error) => self.faults.failed(ServerUse::JwtSvids, chain(error)),
        }
        match signed {
            Ok(told) => accept(told, entry, audience, self.clock.now()).map_err(issuers),
            Err(error) => Err(issuers(error)),
        }
    }

    async fn place(&self, family: u64, deadline: Instant) -> Result<KeptPlace, MintError> {
        let none = || MintError::Issuer { retry_after: Some(COME_AGAIN), source: Box::new(NoPlace) };
        let _waits = self.waiting.take(family).map_err(|_full| none())?;
        let until = deadline.min(Instant::now() + PLACE_WITHIN);
        let slot = timeout_at(until, self.places.wait(family)).await.map_err(|_late| none())?;
        Ok(KeptPlace { slot: Some(slot), until: Instant::now() + KEPT })
    }

    async fn tried(
        &self,
        entry: &Entry,
        audience: &[String],
        deadline: Instant,
    ) -> Result<Jwtsvid, CallFault> {
        let mut again = AGAIN;
        loop {
            let answer = self.calls.sign_jwt(&entry.id, audience, deadline).await;
            match answer {
                Err(error) if error.is_passing() && Instant::now() + again < deadline => {
                    sleep(again).await;
                    again = again * 3 / 2;
                }
                answer => return answer,
            }
        }
    }
}

/// A place that is given back no sooner than then.
#[derive(Debug)]
struct KeptPlace {
    slot: Option<AttestationSlot>,
    until: Instant,
}

impl Drop for KeptPlace {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        let until = self.until;
        if until > Instant::now()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            // There are no more of these than places.
            drop(runtime.spawn(async move {
                sleep_until(until).await;
                drop(slot);
            }));
        }
    }
}

/// Whether the server signs, and not for this entry.
fn is_of_entry(error: &CallFault) -> bool {
    matches!(error.code(), Code::NotFound | Code::InvalidArgument | Code::PermissionDenied)
}

fn issuers(error: CallFault) -> MintError {
    MintError::Issuer { retry_after: None, source: Box::new(error) }
}

/// The SVID, if it is one of the entry, for nobody but `audience`.
fn accept(told: Jwtsvid, entry: &Entry, audience: &[String], now: SystemTime) -> Result<JwtSvid, CallFault> {
    let Jwtsvid { token, id, issued_at, expires_at, .. } = told;
    let token = Zeroizing::new(token);
    if token.len() > LONGEST_TOKEN {
        return Err(CallFault::Svid("the jwt-svid is too long"));
    }
    let claims = claims(&token).ok_or(CallFault::Svid("the jwt-svid is not a token"))?;
    let of_entry = id.as_ref().and_then(spiffe_id_of).is_some_and(|id| id == entry.spiffe_id)
        && claims.sub == entry.spiffe_id.as_str();
    if !of_entry {
        return Err(CallFault::Svid("the jwt-svid is of another spiffe id"));
    }
    if !claims.aud.each().iter().all(|one| audience.contains(one)) {
        return Err(CallFault::Svid("the jwt-svid is for another audience"));
    }
    // Whoever validates it goes by what stands in it.
    let expires_at = claims.exp.min(expires_at);
    let at = |seconds: i64| {
        let seconds = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0)?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    };
    let (Some(issued_at), Some(expires_at)) = (at(issued_at), at(expires_at)) else {
        return Err(CallFault::Svid("the jwt-svid does not say from when until when it is valid"));
    };
    if expires_at <= issued_at || expires_at <= now {
        return Err(CallFault::Svid("the jwt-svid has expired"));
    }
    Ok(JwtSvid { spiffe_id: entry.spiffe_id.clone(), token, issued_at, expires_at })
}

/// What a token claims, as far as that matters here.
#[derive(Deserialize)]
struct TokenClaims {
    sub: String,
    aud: ClaimedAudience,
    exp: i64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ClaimedAudience {
    One(String),
    Several(Vec<String>),
}

impl ClaimedAudience {
    fn each(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(several) => several,
        }
    }
}

fn claims(token: &str) -> Option<TokenClaims> {
    let mut parts = token.split('.');
    let (_, claims, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else {
        return None;
    };
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_what_was_asked_for_or_none() {
        let entry = Entry::asking("unix:uid:1");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let asked = ["x".to_owned(), "y".to_owned()];
        let padding =
            format!(r#"{{"sub":"spiffe://td/x","aud":"x","exp":1300,"p":"{}"}}"#, "p".repeat(LONGEST_TOKEN));
        for (claims, want) in [
            (r#"{"sub":"spiffe://td/x","aud":["x","y"],"exp":1300}"#, Ok(1300)),
            (r#"{"sub":"spiffe://td/x","aud":"x","exp":1300}"#, Ok(1300)),
            // It ends sooner than the server says.
            (r#"{"sub":"spiffe://td/x","aud":"x","exp":1100}"#, Ok(1100)),
            (r#"{"sub":"spiffe://td/x","aud":"x","exp":9000}"#, Ok(1300)),
            (r#"{"sub":"spiffe://td/x","aud":"x","exp":999}"#, Err("expired")),
            (r#"{"sub":"spiffe://td/b","aud":"x","exp":1300}"#, Err("another spiffe id")),
            (r#"{"sub":"spiffe://td/x","aud":["x","z"],"exp":1300}"#, Err("another audience")),
            (r#"{"sub":"spiffe://td/x","aud":"x"}"#, Err("not a token")),
            (r#"{"sub":"spiffe://td/x","exp":1300}"#, Err("not a token")),
            ("[]", Err("not a token")),
            (&padding, Err("too long")),
        ] {
            let told = Jwtsvid {
                token: format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims)),
                id: Some(crate::issuer::server::proto::types::Spiffeid {
                    trust_domain: "td".to_owned(),
                    path: "/x".to_owned(),
                }),
                issued_at: 900,
                expires_at: 1300,
                hint: String::new(),
            };
            let got = accept(told, &entry, &asked, now);
            match want {
                Ok(seconds) => {
                    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
                    assert_eq!(got.unwrap().expires_at, at, "{claims}");
                }
                Err(why) => {
                    let got = got.unwrap_err().to_string();
                    assert!(got.contains(why), "{:.60}: {got}", claims);
                }
            }
        }
    }
}
