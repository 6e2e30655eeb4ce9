//! The settings of what the agent knows and hands out.

use std::time::Duration;

use crate::{
    hcl::settings::settings,
    limits::{
        beyond_budget::BeyondBudget,
        budget::{CACHED_JWT_SVID, CACHED_X509_SVID},
    },
};

const MIN_AVAILABILITY_TARGET: Duration = Duration::from_secs(24 * 3600);

settings! {
    /// What an admin decides about answers, and may change while streams are open.
    pub struct Policy in "agent" {
        /// Whether a caller without any identity receives the own bundle.
        "allow_unauthenticated_verifiers" allow_unauthenticated_verifiers: bool = false, boolean(), reloads;
        /// Claims of foreign tokens that ValidateJWTSVID hands on, beside sub, exp and aud.
        "allowed_foreign_jwt_claims" allowed_foreign_jwt_claims: Vec<String> = Vec::new(), texts(), reloads;
        /// Beginnings of selectors (`k8s:ns`) that may stand in the log line of a caller without an identity.
        "log_selectors" log_selectors: Vec<String> = Vec::new(), texts(), reloads;
    }
}

settings! {
    /// How many SVIDs are kept, and when they are renewed.
    pub struct CacheSettings in "agent" {
        /// For how long X.509-SVIDs should stay valid should the issuer fail; at least 24 h.
        "availability_target" availability_target: Option<Duration> = None,
            duration(MIN_AVAILABILITY_TARGET..=Duration::MAX), reloads;
        /// X.509-SVIDs that no stream holds open.
        "x509_svid_cache_max_size" x509_svids: CacheSize = CacheSize::DEFAULT, integer(0..=CacheSize::MAX), reloads;
        /// JWT-SVIDs.
        "jwt_svid_cache_max_size" jwt_svids: CacheSize = CacheSize::DEFAULT, integer(0..=CacheSize::MAX), reloads;
    }
}

impl CacheSettings {
    /// Which caches take more than a budget of so many bytes when they are full: `whose` is what sets it, and `set_at` where a
    /// key is set.
    pub fn beyond(
        &self,
        budget: u64,
        whose: &str,
        set_at: impl Fn(&'static str) -> Option<String>,
    ) -> Vec<BeyondBudget> {
        let sizes = [
            ("agent.x509_svid_cache_max_size", self.x509_svids, CACHED_X509_SVID),
            ("agent.jwt_svid_cache_max_size", self.jwt_svids, CACHED_JWT_SVID),
        ];
        let beyond = sizes.into_iter().filter_map(|(key, size, each)| {
            let value = u64::try_from(size.count()).unwrap_or(u64::MAX);
            let (takes, fit) = (value.saturating_mul(each), budget / each);
            let why = || {
                format!(
                    "takes {takes} bytes when it is full, and {whose} is {budget}, which has room for {fit}"
                )
            };
            (takes > budget && set_at(key).is_some()).then(|| BeyondBudget { key, value, why: why() })
        });
        beyond.collect()
    }
}

/// The most SVIDs that a cache keeps; at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize(usize);

impl CacheSize {
    const DEFAULT: Self = Self(1000);
    const MAX: usize = 10_000_000;

    /// The number; never 0.
    pub fn count(self) -> usize {
        self.0
    }
}

impl From<usize> for CacheSize {
    /// 0 is the default, as in spire-agent.
    fn from(count: usize) -> Self {
        if count == 0 { Self::DEFAULT } else { Self(count) }
    }
}
