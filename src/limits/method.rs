//! The methods that limits are set for.

use crate::telemetry::registry::{Label, labels};

labels! {
    /// A method that the limits tell apart.
    Method, "method" {
        /// `/SpiffeWorkloadAPI/FetchX509SVID`
        FetchX509Svid = "FetchX509SVID",
        /// `/SpiffeWorkloadAPI/FetchX509Bundles`
        FetchX509Bundles = "FetchX509Bundles",
        /// `/SpiffeWorkloadAPI/FetchJWTSVID`
        FetchJwtSvid = "FetchJWTSVID",
        /// `/SpiffeWorkloadAPI/FetchJWTBundles`
        FetchJwtBundles = "FetchJWTBundles",
        /// `/SpiffeWorkloadAPI/ValidateJWTSVID`
        ValidateJwtSvid = "ValidateJWTSVID",
        /// `/SpiffeWorkloadAPI/FetchWITSVID`
        FetchWitSvid = "FetchWITSVID",
        /// `/SpiffeWorkloadAPI/FetchWITBundles`
        FetchWitBundles = "FetchWITBundles",
        /// `/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets`
        StreamSecrets = "StreamSecrets",
        /// `/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets`
        FetchSecrets = "FetchSecrets",
        /// What is no Workload API and no SDS: health, reflection, services that are not there.
        Other = "Other",
    }
}

impl Method {
    /// Every method.
    pub const ALL: [Self; Self::VALUES.len()] = *Self::VALUES.first_chunk().expect("it is as long as it is");

    /// The name of the RPC: `FetchX509SVID`. Also the metric label.
    pub fn rpc(self) -> &'static str {
        self.text()
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
}

/// A value for each method.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerMethod<T>([T; Method::ALL.len()]);

impl<T> PerMethod<T> {
    /// The same for all.
    pub fn all(value: T) -> Self
    where
        T: Copy,
    {
        Self([value; Method::ALL.len()])
    }

    /// The one of a method.
    pub fn get(&self, method: Method) -> &T {
        self.0.get(method.at()).expect("there is one for each method")
    }

    /// Puts another in the place of a method's.
    pub fn set(&mut self, method: Method, value: T) {
        if let Some(of_method) = self.0.get_mut(method.at()) {
            *of_method = value;
        }
    }
}
