//! The methods that limits are set for.

use crate::telemetry::registry::Label;

/// A method that the limits tell apart. A closed set, since it labels metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// `/SpiffeWorkloadAPI/FetchX509SVID`
    FetchX509Svid,
    /// `/SpiffeWorkloadAPI/FetchX509Bundles`
    FetchX509Bundles,
    /// `/SpiffeWorkloadAPI/FetchJWTSVID`
    FetchJwtSvid,
    /// `/SpiffeWorkloadAPI/FetchJWTBundles`
    FetchJwtBundles,
    /// `/SpiffeWorkloadAPI/ValidateJWTSVID`
    ValidateJwtSvid,
    /// `/SpiffeWorkloadAPI/FetchWITSVID`
    FetchWitSvid,
    /// `/SpiffeWorkloadAPI/FetchWITBundles`
    FetchWitBundles,
    /// `/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets`
    StreamSecrets,
    /// `/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets`
    FetchSecrets,
    /// What is no Workload API and no SDS: health, reflection, services that are not there.
    Other,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 10] = [
        Self::FetchX509Svid,
        Self::FetchX509Bundles,
        Self::FetchJwtSvid,
        Self::FetchJwtBundles,
        Self::ValidateJwtSvid,
        Self::FetchWitSvid,
        Self::FetchWitBundles,
        Self::StreamSecrets,
        Self::FetchSecrets,
        Self::Other,
    ];

    /// The name of the RPC: `FetchX509SVID`. Also the metric label.
    pub fn rpc(self) -> &'static str {
        match self {
            Self::FetchX509Svid => "FetchX509SVID",
            Self::FetchX509Bundles => "FetchX509Bundles",
            Self::FetchJwtSvid => "FetchJWTSVID",
            Self::FetchJwtBundles => "FetchJWTBundles",
            Self::ValidateJwtSvid => "ValidateJWTSVID",
            Self::FetchWitSvid => "FetchWITSVID",
            Self::FetchWitBundles => "FetchWITBundles",
            Self::StreamSecrets => "StreamSecrets",
            Self::FetchSecrets => "FetchSecrets",
            Self::Other => "Other",
        }
    }

    /// The name of its service.
    pub fn service(self) -> &'static str {
        match self {
            Self::FetchX509Svid
            | Self::FetchX509Bundles
            | Self::FetchJwtSvid
            | Self::FetchJwtBundles
            | Self::ValidateJwtSvid
            | Self::FetchWitSvid
            | Self::FetchWitBundles => "SpiffeWorkloadAPI",
            Self::StreamSecrets | Self::FetchSecrets => "envoy.service.secret.v3.SecretDiscoveryService",
            Self::Other => "grpc",
        }
    }

    /// Whether it is charged to identities too. ValidateJWTSVID needs none, and what is no Workload API has none.
    pub fn has_identity(self) -> bool {
        !matches!(self, Self::ValidateJwtSvid | Self::Other)
    }

    /// Whether it is answered with bundles: then the caller's default identity alone is charged.
    pub(super) fn is_bundles(self) -> bool {
        matches!(self, Self::FetchX509Bundles | Self::FetchJwtBundles | Self::FetchWitBundles)
    }

    /// Its place in [`Method::ALL`].
    pub(super) fn index(self) -> usize {
        match self {
            Self::FetchX509Svid => 0,
            Self::FetchX509Bundles => 1,
            Self::FetchJwtSvid => 2,
            Self::FetchJwtBundles => 3,
            Self::ValidateJwtSvid => 4,
            Self::FetchWitSvid => 5,
            Self::FetchWitBundles => 6,
            Self::StreamSecrets => 7,
            Self::FetchSecrets => 8,
            Self::Other => 9,
        }
    }
}

impl Label for Method {
    const KEY: &'static str = "method";
    const VALUES: &'static [Self] = &Self::ALL;

    fn text(self) -> &'static str {
        self.rpc()
    }

    fn at(self) -> usize {
        self.index()
    }
}
