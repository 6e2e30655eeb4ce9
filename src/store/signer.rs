//! The issuer as the request path sees it: where a signature is made, and what it costs.
//!
//! An ECDSA signature takes some tens of microseconds and is made on the thread of the request; a hop to another
//! thread would cost as much. RSA takes up to a tenth of a second (a new key) and goes to the blocking pool, with a
//! bound on how many are under way.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Semaphore, time::Instant};

use crate::{
    identity::{Entry, JwtSvid, KeyType, SpiffeId, X509Svid},
    issuer::embedded::{Embedded, IssuerError},
    os::clock::Clock,
    telemetry::metrics::{Metrics, SvidKind},
};

/// How many RSA operations are under way at once; the others wait their turn, each in its own call.
const HEAVY_AT_ONCE: usize = 2;

/// Signs, and measures.
#[derive(Debug)]
pub struct Signer {
    issuer: Arc<Embedded>,
    clock: Clock,
    metrics: Arc<Metrics>,
    x509_is_heavy: bool,
    jwt_is_heavy: bool,
    heavy: Arc<Semaphore>,
    /// Of X.509-SVIDs and JWT-SVIDs whose entry says none.
    default_ttls: Mutex<[Duration; 2]>,
}

impl Signer {
    /// `x509` are the key types of the CA and of the SVIDs, `jwt` that of the tokens, as the issuer was opened with;
    /// `default_ttls` are those of X.509-SVIDs and JWT-SVIDs.
    pub fn new(
        issuer: Arc<Embedded>,
        clock: Clock,
        metrics: Arc<Metrics>,
        x509: [KeyType; 2],
        jwt: KeyType,
        default_ttls: [Duration; 2],
    ) -> Self {
        Self {
            default_ttls: Mutex::new(default_ttls),
            issuer,
            clock,
            metrics,
            x509_is_heavy: x509.contains(&KeyType::Rsa2048),
            jwt_is_heavy: jwt == KeyType::Rsa2048,
            heavy: Arc::new(Semaphore::new(HEAVY_AT_ONCE)),
        }
    }

    /// Takes new default lifetimes, for what is signed from now on.
    pub fn reconfigure(&self, x509_ttl: Duration, jwt_ttl: Duration) {
        *self.default_ttls.lock().unwrap_or_else(PoisonError::into_inner) = [x509_ttl, jwt_ttl];
    }

    fn default_ttls(&self) -> [Duration; 2] {
        *self.default_ttls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// The issuer.
    pub fn issuer(&self) -> &Arc<Embedded> {
        &self.issuer
    }

    /// Makes an X.509-SVID with a new key.
    ///
    /// # Errors
    /// What the issuer says.
    pub async fn x509(&self, mut entry: Arc<Entry>) -> Result<X509Svid, IssuerError> {
        if entry.x509_svid_ttl.is_none() {
            let [ttl, _] = self.default_ttls();
            entry = Arc::new(Entry { x509_svid_ttl: Some(ttl), ..Entry::clone(&entry) });
        }
        let now = self.clock.now();
        let started = Instant::now();
        let made = if self.x509_is_heavy {
            let issuer = Arc::clone(&self.issuer);
            self.on_blocking_pool(move || issuer.mint_x509(&entry, now)).await
        } else {
            self.issuer.mint_x509(&entry, now)
        };
        self.count(SvidKind::X509, started, made.is_ok());
        made
    }

    /// Makes a JWT-SVID.
    ///
    /// # Errors
    /// What the issuer says.
    pub async fn jwt(
        &self,
        id: &SpiffeId,
        ttl: Option<Duration>,
        audience: &[String],
    ) -> Result<JwtSvid, IssuerError> {
        let now = self.clock.now();
        let started = Instant::now();
        let [_, default] = self.default_ttls();
        let ttl = ttl.or(Some(default));
        let made = if self.jwt_is_heavy {
            let (issuer, id, audience) = (Arc::clone(&self.issuer), id.clone(), audience.to_vec());
            self.on_blocking_pool(move || issuer.mint_jwt(&id, ttl, &audience, now)).await
        } else {
            self.issuer.mint_jwt(id, ttl, audience, now)
        };
        self.count(SvidKind::Jwt, started, made.is_ok());
        made
    }

    fn count(&self, kind: SvidKind, started: Instant, made: bool) {
        if made {
            self.metrics.signed(kind, started.elapsed());
        } else {
            self.metrics.signing_failed(kind);
        }
    }

    async fn on_blocking_pool<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, IssuerError> + Send + 'static,
    ) -> Result<T, IssuerError> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.heavy).acquire_owned().await;
        let (answer, done) = tokio::sync::oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            // A caller that went away needs no answer.
            drop(answer.send(work()));
        });
        // Without an answer the work panicked, and so does its call, which is one caller's.
        done.await.expect("the work sends its answer unless it panics")
    }
}
