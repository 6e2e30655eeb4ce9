//! What patterns of callers and of SPIFFE IDs have in common.

use std::{cmp::Ordering, fmt};

use crate::identity::TrustDomain;

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PatternError {
    /// Not one of the forms of [`CallerPattern`](super::caller_pattern::CallerPattern).
    #[error("\"{0}\" is not a caller: it must be uid:N, uid:N-M, uid:*, user:NAME, pod:UID or pod:*")]
    Caller(Box<str>),
    /// The range begins above its end.
    #[error("\"{text}\" is the wrong way round: write uid:{from}-{to}")]
    Falling { text: Box<str>, from: u32, to: u32 },
    /// The range holds every UID.
    #[error("\"{0}\" is every UID: write uid:*")]
    Range(Box<str>),
    /// (uid_t)-1: the number that the kernel says "no user" with.
    #[error("\"{0}\" cannot match: no process can have the UID 4294967295")]
    Nobody(Box<str>),
    /// Pods are not looked for.
    #[error("\"{0}\" matches nothing: agent.kubernetes has mode = \"off\", so no caller is a pod")]
    NoPods(Box<str>),
    /// Pods are not looked for.
    #[error(
        "\"{0}\" matches every caller, as agent.kubernetes has mode = \"off\": set the limit in the block around it"
    )]
    Everybody(Box<str>),
    /// The node has no such user.
    #[error(
        "there is no user \"{0}\" on this node, and a limit is for the number that a user has when the file is read: write \
         uid:N, or make the user first"
    )]
    User(Box<str>),
    /// Whether the node has such a user is not known.
    #[error("the user database of this node does not say who the user \"{0}\" is: try again, or write uid:N")]
    UserUnknown(Box<str>),
    /// Not one of the forms of [`IdPattern`](super::id_pattern::IdPattern).
    #[error("\"{pattern}\" is not a pattern of SPIFFE IDs: {why}")]
    Id {
        pattern: Box<str>,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The pattern is of another trust domain than the agent's.
    #[error("\"{pattern}\" matches nothing: the trust domain is {trust_domain}")]
    Foreign {
        pattern: Box<str>,
        /// The trust domain of the agent.
        trust_domain: TrustDomain,
    },
}

/// The user database did not say who a user is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAnswer;

/// Matches the subjects of a stage: callers, or SPIFFE IDs.
pub trait Pattern: Clone + fmt::Display {
    /// What it matches.
    type Subject: ?Sized;
    /// Whether this one is meant.
    fn matches(&self, subject: &Self::Subject) -> bool;
    /// Whether some subject is meant by both.
    fn meets(&self, other: &Self) -> bool;
    /// Sorts the pattern that says more before the one that says less.
    fn compare(&self, other: &Self) -> Ordering;
    /// Whether it has places that part a shared bucket.
    fn has_names(&self) -> bool {
        false
    }
}
