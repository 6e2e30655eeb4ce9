//! How the agent's SVID is replaced: the exchange with the server, and what of its answer is believed.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use tokio::time::Instant;

use super::{AgentSvid, LONGEST_CALL, OwnSvid, Way, kept_roots, key_fault};
use crate::issuer::{
    keys::KeyPair,
    server::{
        agent_keys::{NewKeyError, csr},
        attestation::{AttestedAgent, attest},
        bootstrap::{self, Circumstances},
        bundles,
        data::{AgentData, BootstrapUse},
        error::ServerError,
        metrics::ServerCall,
        proto::{
            agent::{AgentX509svidParams, RenewAgentRequest, agent_client::AgentClient},
            bundle::{GetBundleRequest, bundle_client::BundleClient},
        },
        tls::{ServerTrust, verify_chain},
        upstream::ServerConnection,
    },
};

/// The most certificates of the agent's chain, and the most bytes: more could not be read again.
const LONGEST_CHAIN: usize = 16;
const LARGEST_CHAIN: usize = 64 << 10;

/// The most roots that are named in one line.
const MOST_NAMED: usize = 4;

/// The SHA-256 fingerprints of certificates, in hexadecimal: of the first few, and how many more there are.
fn fingerprints(roots: &[Vec<u8>]) -> String {
    let hex =
        |der: &Vec<u8>| digest(&SHA256, der).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut named: Vec<String> = roots.iter().take(MOST_NAMED).map(hex).collect();
    let more = roots.len().saturating_sub(MOST_NAMED);
    named.extend((more > 0).then(|| format!("and {more} more")));
    named.join(" ")
}

impl OwnSvid {
    /// Has another SVID.
    pub(super) async fn renew(&self, way: Way) -> Result<(), ServerError> {
        match way {
            Way::Renew => self.renew_as_agent().await,
            Way::Attest | Way::AttestAnew => {
                let done = self.attest(way).await;
                // How often it was tried is kept; not in the room of a key for which there was none.
                if !matches!(done, Ok(()) | Err(ServerError::Disk(_)))
                    && let Err(error) = self.keep(|_as_it_is| ()).await
                {
                    tracing::debug!(%error, "cannot save that it was tried");
                }
                done
            }
        }
    }

    async fn renew_as_agent(&self) -> Result<(), ServerError> {
        const CALL: &str = "RenewAgent";
        let key = self.next_key().await?;
        let csr = csr(&key).map_err(|error| key_fault(error.to_string()))?;
        let connection = self.upstream.agent(self.renewal_deadline()).await?;
        let mut client = AgentClient::new(connection.clone());
        let request = RenewAgentRequest { params: Some(AgentX509svidParams { csr }) };
        let answer =
            connection.answer(ServerCall::RenewAgent, client.renew_agent(request)).await?.into_inner();
        let chain = answer.svid.map(|svid| svid.cert_chain).unwrap_or_default();
        let ServerTrust::Roots(roots) = self.upstream.trusted() else { return Err(ServerError::NoSvid) };
        self.check(CALL, &chain, &key)?;
        self.verify(CALL, &chain, &roots)?;
        let kept = chain.clone();
        // The server takes the old one until it sees the new one: what the disk has not is not used, while there is time.
        let unwritten = self.keep(move |data| (data.svid, data.reattestable) = (kept, false)).await;
        if let Err(error) = unwritten {
            if self.current().is_some_and(|old| !self.is_late(&old)) {
                return Err(error);
            }
            let kept = chain.clone();
            let insisted = self.insist(move |data| (data.svid, data.reattestable) = (kept, false)).await;
            return self.taken(chain, false, insisted);
        }
        self.taken(chain, false, Ok(()))
    }

    async fn attest(&self, way: Way) -> Result<(), ServerError> {
        const CALL: &str = "AttestAgent";
        let deadline = Instant::now() + LONGEST_CALL;
        let unproven = if way == Way::Attest { self.unproven() } else { None };
        let before = self.data.known().bundle;
        let counts = if way == Way::Attest && !before.is_empty() {
            kept_roots(&self.settings)
        } else {
            "what the trust_bundle setting gives does not verify it"
        };
        let trust = self.trust_for(way).await?;
        let connection = self.upstream.stranger(trust.clone(), counts, deadline).await?;
        let attested = match unproven {
            // A token was used up for it.
            Some(AgentSvid { chain, reattestable, .. }) => AttestedAgent { chain, reattestable },
            None => {
                let key = self.next_key().await?;
                let csr = csr(&key).map_err(|error| key_fault(error.to_string()))?;
                let attested = attest(&connection, self.live().attestor.as_ref(), &self.slow, csr).await?;
                self.check(CALL, &attested.chain, &key)?;
                self.keep_first(&attested, &trust).await?;
                attested
            }
        };
        let roots = self.roots(&connection).await?;
        let AttestedAgent { chain, reattestable } = attested;
        self.verify(CALL, &chain, &roots)?;
        let (svid, bundle) = (chain.clone(), roots.clone());
        let written = self.insist(move |data| {
            *data = AgentData { svid, bundle, reattestable, ..AgentData::default() };
        });
        let written = written.await;
        if way == Way::AttestAnew {
            tracing::warn!(
                from = %self.settings.join.trust_source(),
                old_roots = fingerprints(&before),
                new_roots = fingerprints(&roots),
                "trust in the server is begun anew: it has shown an authority that was not known for rebootstrap_delay, and the \
                 trust bundle verifies it"
            );
        }
        self.upstream.believe(ServerTrust::Roots(roots.into()));
        self.taken(chain, reattestable, written)
    }

    /// What the server says that the trust domain's authorities are.
    async fn roots(&self, connection: &ServerConnection) -> Result<Vec<Vec<u8>>, ServerError> {
        const CALL: &str = "GetBundle";
        let mut client = BundleClient::new(connection.clone());
        let request = GetBundleRequest { output_mask: Some(bundles::BUNDLE_MASK) };
        let told = connection.answer(ServerCall::GetBundle, client.get_bundle(request)).await?.into_inner();
        let told = bundles::read(told, &self.settings.trust_domain);
        let told = told.map_err(|fault| ServerError::Senseless { call: CALL, fault: fault.to_string() })?;
        Ok(told.bundle.x509_authorities)
    }

    /// A join token is used up by now: the SVID that it brought is kept before anything else can fail, and shown if it is
    /// known what verifies it. Of a server that is believed unseen that is not known before it has told.
    async fn keep_first(&self, attested: &AttestedAgent, trust: &ServerTrust) -> Result<(), ServerError> {
        if self.current().is_some() {
            return Ok(());
        }
        let AttestedAgent { chain, reattestable } = attested.clone();
        let bundle = match trust {
            ServerTrust::Roots(roots) if self.verify("AttestAgent", &chain, roots).is_err() => return Ok(()),
            ServerTrust::Roots(roots) => roots.to_vec(),
            ServerTrust::Anyone => Vec::new(),
        };
        let (svid, proven) = (chain.clone(), !bundle.is_empty());
        let written = self.insist(move |data| {
            *data = AgentData { svid, bundle, reattestable, ..AgentData::default() };
        });
        let written = written.await;
        if !proven {
            return Ok(());
        }
        self.upstream.believe(trust.clone());
        self.taken(chain, reattestable, written)
    }

    /// Shows an SVID from now on, and says so where it is not kept.
    fn taken(
        &self,
        chain: Vec<Vec<u8>>,
        reattestable: bool,
        written: Result<(), ServerError>,
    ) -> Result<(), ServerError> {
        if let Some(svid) = self.read(chain, reattestable) {
            self.show(&svid);
        }
        if let Err(error) = written {
            tracing::error!(%error, "the agent's SVID is in use, and not saved for the next start; trying again");
            self.trouble(Some(error.to_string()));
        }
        Ok(())
    }

    /// Whether an SVID has less than a quarter of its life left.
    fn is_late(&self, svid: &AgentSvid) -> bool {
        let life = svid.not_after.duration_since(svid.not_before).unwrap_or_default();
        svid.not_after.duration_since(self.clock.now()).unwrap_or_default() < life / 4
    }

    /// By what a server is known to which this node attests.
    async fn trust_for(&self, way: Way) -> Result<ServerTrust, ServerError> {
        let bundle = self.data.known().bundle;
        if way == Way::Attest && !bundle.is_empty() {
            return Ok(ServerTrust::Roots(bundle.into()));
        }
        let asked_for = if way == Way::Attest { BootstrapUse::Bootstrap } else { BootstrapUse::Rebootstrap };
        self.data.note(|data| data.count_attempt(asked_for, self.clock.now()));
        let data = self.data.known();
        let join = &self.settings.join;
        let told = Circumstances {
            mode: asked_for.text(),
            attempts: data.connection_attempts,
            since: data.bootstrap_start_time,
            server_address: join.address.clone(),
            server_port: join.port,
        };
        bootstrap::trust(join.trust_source(), &self.settings.trust_domain, &told, &self.slow).await
    }

    /// What came is for the key that was asked for, of an agent of this trust domain, and valid.
    fn check(&self, call: &'static str, chain: &[Vec<u8>], key: &KeyPair) -> Result<(), ServerError> {
        let senseless = |fault: String| ServerError::Senseless { call, fault };
        if chain.len() > LONGEST_CHAIN || chain.iter().map(Vec::len).sum::<usize>() > LARGEST_CHAIN {
            return Err(senseless("the chain is too long".to_owned()));
        }
        let svid = self.read(chain.to_vec(), false);
        let svid =
            svid.ok_or_else(|| senseless("the SVID is not valid, names nobody, or has expired".to_owned()))?;
        let leaf = svid.chain.first().map(Vec::as_slice).unwrap_or_default();
        let of_key = x509_parser::parse_x509_certificate(leaf)
            .is_ok_and(|(_, leaf)| leaf.public_key().subject_public_key.data == key.public_key());
        if !of_key {
            return Err(senseless("the SVID is for another key".to_owned()));
        }
        if svid.id.trust_domain_name() != self.settings.trust_domain.name()
            || !svid.id.path().starts_with("/spire/agent/")
        {
            return Err(senseless(format!("{} is not the ID of an agent of this trust domain", svid.id)));
        }
        Ok(())
    }

    fn verify(&self, call: &'static str, chain: &[Vec<u8>], roots: &[Vec<u8>]) -> Result<(), ServerError> {
        let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let Some((leaf, rest)) = chain.split_first() else {
            return Err(ServerError::Senseless { call, fault: "there is no SVID".to_owned() });
        };
        // Its first seconds lie in the past, unless this node's clock is behind.
        let now = self.clock.now() + Duration::from_secs(10);
        verify_chain(leaf, rest, roots, now)
            .map_err(|fault| ServerError::Senseless { call, fault: format!("of the SVID, {fault}") })
    }

    async fn next_key(&self) -> Result<KeyPair, ServerError> {
        let keys = Arc::clone(&self.keys);
        let leaf = self.data.known().svid.into_iter().next();
        let made = tokio::task::spawn_blocking(move || keys.make_next(leaf.as_deref())).await;
        match made {
            Ok(Ok(key)) => Ok(key),
            Ok(Err(NewKeyError::Disk(fault))) => Err(ServerError::Disk(Arc::new(fault))),
            Ok(Err(error @ NewKeyError::Crypto(_))) => Err(key_fault(error.to_string())),
            Err(_panicked) => Err(key_fault("making a key failed".to_owned())),
        }
    }
}
