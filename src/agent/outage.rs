//! Whether any entry can be given to anybody. Where all of them ask an attestor that can tell nothing, as while the kubelet
//! refuses the agent, every caller is refused: that is no ready agent, and it is known before a caller comes.

use std::sync::Arc;

use crate::{
    attest::{Attestor, Outage},
    store::Store,
    telemetry::health::HealthState,
};

/// Looks whether attestors can tell what entries ask them for.
pub(super) struct OutageWatch {
    health: Arc<HealthState>,
    attestor: Arc<Attestor>,
    store: Arc<Store>,
    /// The log says that nothing can be given.
    is_said: bool,
}

impl OutageWatch {
    /// Looks for the first time.
    pub(super) fn begin(health: Arc<HealthState>, attestor: Arc<Attestor>, store: Arc<Store>) -> Self {
        let mut watch = Self { health, attestor, store, is_said: false };
        watch.look();
        watch
    }

    fn look(&mut self) {
        let snapshot = self.store.snapshot();
        self.attestor.ask_ahead(&snapshot.questions);
        let outage = self.attestor.outage(snapshot.index.entries(), &snapshot.questions);
        let why = outage.as_ref().map(|(attestor, why)| {
            format!("nobody is served, since every entry asks for a {attestor} selector: {why}")
        });
        match (&outage, &why) {
            (Some((_, Outage::Failing(_))), Some(why)) if !self.is_said => {
                self.is_said = true;
                tracing::error!("{why}");
            }
            (None, _) if self.is_said => {
                self.is_said = false;
                tracing::warn!("callers can be told by what entries ask for again");
            }
            _ => {}
        }
        self.health.gives_nothing(why);
    }

    /// Looks again with each snapshot, and whenever an attestor has tried, for ever.
    pub(super) async fn run(mut self) {
        let (mut snapshots, mut tries) = (self.store.subscribe(), self.attestor.tries());
        loop {
            self.look();
            let goes_on = tokio::select! {
                changed = snapshots.changed() => changed.is_ok(),
                changed = tries.changed() => changed.is_ok(),
            };
            if !goes_on {
                return;
            }
        }
    }
}
