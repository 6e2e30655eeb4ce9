//! What one request sees, and how streams learn that there is something newer.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use hashbrown::HashMap;
use tokio::sync::watch;

use super::settings::Policy;
use crate::{
    attest::Questions,
    identity::{Bundles, Entry, EntryId, EntryIndex, Tainted, TrustDomain},
    issuer::World,
};

/// One state of the world. Never edited.
#[derive(Debug)]
pub struct Snapshot {
    /// Grows by one with each snapshot.
    pub generation: u64,
    /// The generation since which the entries, what is known of what they ask for, and the policy are these: a process
    /// that is the same has had the same entries since then.
    pub entitled_since: u64,
    pub index: Arc<EntryIndex>,
    /// What these entries ask of a caller: whoever is attested for this snapshot is asked this.
    pub questions: Arc<Questions>,
    /// Who is verified with what.
    pub bundles: Bundles,
    /// What signed SVIDs that are to be made anew.
    pub tainted: Arc<Tainted>,
    /// What the admin decided.
    pub policy: Arc<Policy>,
    /// Messages encoded for this snapshot.
    pub(crate) answers: Answers,
}

impl Snapshot {
    fn new(generation: u64, world: &World, questions: Arc<Questions>, policy: Arc<Policy>) -> Self {
        let (index, bundles) = (Arc::clone(&world.index), world.bundles.clone());
        Self {
            generation,
            entitled_since: generation,
            index,
            questions,
            bundles,
            tainted: Arc::clone(&world.tainted),
            policy,
            answers: Answers::default(),
        }
    }

    /// Whether it is known what there is. Before, nobody can be told that they have no identity.
    pub fn is_known(&self) -> bool {
        !self.bundles.own.x509_authorities.is_empty()
    }

    /// The one that follows.
    fn next(&self, world: &World, questions: Arc<Questions>, policy: Arc<Policy>) -> Self {
        let next = Self::new(self.generation + 1, world, questions, policy);
        let same = Arc::ptr_eq(&self.index, &next.index)
            && Arc::ptr_eq(&self.questions, &next.questions)
            && Arc::ptr_eq(&self.policy, &next.policy);
        Self { entitled_since: if same { self.entitled_since } else { next.generation }, ..next }
    }
}

/// Which message of which content, within one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum AnswerKey {
    /// X.509-SVIDs of these entries, in this order.
    X509Svids(Vec<EntryId>),
    /// Bundles of the own and these trust domains.
    Bundles(BundleForm, Vec<TrustDomain>),
}

impl AnswerKey {
    /// The answer to FetchX509SVID for these entries.
    pub(crate) fn x509_svids(entries: &[Arc<Entry>]) -> Self {
        Self::X509Svids(entries.iter().map(|entry| entry.id.clone()).collect())
    }
}

/// Which half of a bundle, in the form in which workloads receive it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BundleForm {
    /// X.509 authorities, as DER.
    X509,
    /// JWT authorities, as a JWK set.
    Jwt,
}

/// Encoded messages, each made once per snapshot and shared by all its callers and streams.
#[derive(Debug, Default)]
pub(crate) struct Answers(Mutex<KeptAnswers>);

#[derive(Debug, Default)]
struct KeptAnswers {
    by_key: HashMap<AnswerKey, KeptAnswer, ahash::RandomState>,
    /// What their messages take.
    bytes: usize,
}

#[derive(Debug)]
struct KeptAnswer {
    message: Bytes,
    /// From when all in it is valid until something in it is due to be renewed; `None` for always. The clock may be
    /// set back to before it began.
    fresh: Option<Range<SystemTime>>,
}

impl KeptAnswer {
    fn is_fresh(&self, now: SystemTime) -> bool {
        self.fresh.as_ref().is_none_or(|fresh| fresh.contains(&now))
    }
}

impl Answers {
    /// At most this many are kept, of so many bytes together; when there are more kinds of callers, or larger messages, they
    /// are made again.
    const MAX: usize = 1024;
    const MOST_BYTES: usize = 1 << 20;

    pub(crate) fn find(&self, key: &AnswerKey, now: SystemTime) -> Option<Bytes> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.by_key.get(key).filter(|answer| answer.is_fresh(now)).map(|answer| answer.message.clone())
    }

    /// Keeps `message`, or returns what somebody else kept meanwhile, so that all send the same bytes.
    pub(crate) fn keep(
        &self,
        key: AnswerKey,
        message: Bytes,
        fresh: Option<Range<SystemTime>>,
        now: SystemTime,
    ) -> Bytes {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = kept.by_key.get(&key).filter(|answer| answer.is_fresh(now)) {
            return answer.message.clone();
        }
        if message.len() > Self::MOST_BYTES {
            return message;
        }
        if kept.by_key.len() >= Self::MAX || kept.bytes + message.len() > Self::MOST_BYTES {
            *kept = KeptAnswers::default();
        }
        kept.bytes += message.len();
        if let Some(old) = kept.by_key.insert(key, KeptAnswer { message: message.clone(), fresh }) {
            kept.bytes -= old.message.len();
        }
        message
    }

    /// Forgets all: memory is short.
    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = KeptAnswers::default();
    }
}

/// What open streams are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// There is a snapshot of this generation.
    Generation(u64),
    /// The agent stops: streams end, and their clients reconnect to the next one.
    Draining,
}

/// The current snapshot.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
    /// Carries only the generation: a slow stream skips to the newest, it never queues.
    changed: watch::Sender<Change>,
}

impl Store {
    /// Starts with this content, as generation 1.
    pub(super) fn new(world: &World, questions: Arc<Questions>, policy: Arc<Policy>) -> Self {
        let first = Snapshot::new(1, world, questions, policy);
        Self { current: ArcSwap::from_pointee(first), changed: watch::Sender::new(Change::Generation(1)) }
    }

    /// The request path: no lock, and an `Arc` that may be kept across awaits.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Forgets the messages that are kept: memory is short.
    pub fn forget_answers(&self) {
        self.current.load().answers.clear();
    }

    /// Subscribe first and take the snapshot second, or a publish in between is missed.
    pub fn subscribe(&self) -> watch::Receiver<Change> {
        self.changed.subscribe()
    }

    /// Tells streams to end. Snapshots published later tell them nothing any more.
    pub fn drain(&self) {
        self.changed.send_replace(Change::Draining);
    }

    /// Makes `world`, with the `questions` of its entries, and `policy` the present, and returns that. Only
    /// [`super::Writer`] calls this, one call at a time, hence no compare-and-swap loop.
    pub(super) fn publish(
        &self,
        world: &World,
        questions: Arc<Questions>,
        policy: Arc<Policy>,
    ) -> Arc<Snapshot> {
        let snapshot = Arc::new(self.current.load().next(world, questions, policy));
        let generation = snapshot.generation;
        // Store before notify: a stream that wakes finds it.
        self.current.store(Arc::clone(&snapshot));
        self.changed.send_if_modified(|change| match change {
            Change::Generation(at) => {
                *at = generation;
                true
            }
            Change::Draining => false,
        });
        snapshot
    }
}
