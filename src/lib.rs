//! Durward is a per-node workload-identity agent. It serves the SPIFFE Workload API on a Unix domain socket: a
//! process connects, the kernel says who it is, and Durward hands it the X.509-SVIDs and JWT-SVIDs it is entitled to.
//!
//! This page is the architecture document: the map of the crate, the way of a call, and what must always hold. What a
//! user meets (commands, settings, metrics) is in `README.md` and `conf/agent.conf`.
//!
//! # The map
//!
//! A room is a module of this crate, and uses only rooms below it in this list. No two files of a room use
//! each other. A test reads both off the imports (`tests/it/house.rs`).
//!
//! | room | what it is for | what it trusts |
//! |---|---|---|
//! | [`cli`] | what a person types: `run`, `quickstart`, `api`, `healthcheck`, `status`, `explain`, `limits`, `entry`, `bundle`, `reload`, `validate` | its user |
//! | [`agent`] | builds every part from [`config::Config`], binds everything, says ready, reloads, drains | the configuration |
//! | [`config`] | `agent.conf`: the file as written, then checked in full; what a reload changes | its files, where only root and the agent's user can have put them |
//! | [`api`] | the gRPC services: the typed way of a call, and the one map of errors to codes | nothing a request says but what it asks for |
//! | [`store`] | the [`Snapshot`](store::Snapshot) a request sees, its only writer, who is entitled to what, and the caches of SVIDs | the issuer and the configuration |
//! | [`attest`] | from an [`Admitted`](limits::Admitted) caller to its selectors | the kernel, through the socket, and through `/proc` where an entry asks for what is told there alone, while the process lives; the kubelet, once its certificate was verified |
//! | [`peer`] | accept, park, HTTP/2, drain; who is at the other end, and who writes | SO_PEERCRED, SO_PEERPIDFD and SCM_CREDENTIALS, not a byte that is sent |
//! | [`issuer`] | who signs, and where entries and bundles come from: the embedded CA | its own files, once their owner and mode were checked, and who owns the directories above |
//! | [`limits`] | who may connect and call how often | the caller key that was resolved at accept |
//! | [`identity`] | words and rules without I/O: SPIFFE IDs, selectors, entries and which of them match, SVIDs, bundles | nothing |
//! | [`telemetry`] | what people see of an agent: the registry of metrics, the log, HTTP for probes | nothing that a caller chose |
//! | [`hcl`] | the language of `agent.conf`, for every room to read its own settings with | nothing |
//! | [`os`] | the operating system: clock, memory, descriptors, paths, systemd and its journal; the only place where `unsafe` may stand | the kernel |
//!
//! # The way of one FetchJWTSVID
//!
//! ```text
//! peer/listener   accept -> SO_PEERCRED, caller key (/proc on Kubernetes)       unreadable, or ended: close, count
//! limits/gate     room, share and rate of this caller                   no room: wait a moment; refused: count, tell or close
//! peer/listener   pidfd: the process is held on to; a task of its own    gone: close, count
//! peer/connection parked until the first byte: no HTTP/2 state before it  no memory for it: refused, as at the gate
//! peer/wire       each byte is written by who connected           another's: GOAWAY; with a descriptor: close
//!                 :authority, which h2 would judge, is written over; the budget of frames between requests
//! (hyper, tonic)  HTTP/2, decode; the connection carries its Peer
//! peer/service    what answers it fits what the connection may leave unread                waits
//! api/call        1 security header -> Call                              InvalidArgument
//!                 2 call.admit(limits).await -> Admitted                 ResourceExhausted, Unavailable
//! api/workload    3 query: audience, SPIFFE ID                           InvalidArgument
//! attest          4 attestor.attest(admitted, questions).await -> Attested   Unavailable
//! store           5 authorize(snapshot, attested) -> Entitled            PermissionDenied
//!                 6 entitled.charge(limits).await -> Charged             ResourceExhausted, Unavailable
//!                 7 jwt.fetch(charged, audience).await                   Unavailable
//! ```
//!
//! One function reads top to bottom ([`api::workload`]). Each state is made in one place, of the state before it
//! ([`api::call`]), so the compiler keeps the order: nothing is read about a peer that was not admitted, and no SVID is
//! made for a call whose identities were not charged. The snapshot is taken before 4: attestors find out what its
//! entries ask for ([`attest::Questions`]). Streams run 1 to 7, then wait for a new snapshot or the death of
//! their process, and send only when what they would send has changed. Before they do, they run 4 and 5 once more, for
//! what their process is by then ([`api::updates`]).
//!
//! # Where things are
//!
//! | to find or add | look at |
//! |---|---|
//! | why a connection or a call is refused | [`limits::refusal`]; the gRPC code is chosen in [`api::status`] |
//! | a setting | the `settings!` of the room that acts on it, and its paragraph in `conf/agent.conf` |
//! | an attestor | a file in `attest`, and its line in the list of [`attest`] |
//! | a kind of selector | the file of its attestor, as [`attest::unix`]: its name, what it must look like, how it is found |
//! | how the next agent takes the place of this one | `agent/handover.rs`: what they say; `agent/successor.rs`, `agent/predecessor.rs`, `agent/standby.rs`, `agent/place.rs`; whether it could serve: `agent/candidate.rs` |
//! | why an agent is not ready although it serves | `agent/verdict.rs`: what certainly keeps everybody from an entry; `agent/judge.rs`: where that is known from |
//! | why a file or directory is refused | [`os::trusted`]; the places that are looked at before the start, `config/places.rs` |
//! | an issuer | a folder beside [`issuer::embedded`], its line in [`issuer::choice`], and its block in `config/issuer.rs` |
//! | a service | a handler in `api` that starts with a [`Call`](api::call::Call); its paths in [`api::services`] |
//! | how a request is charged and counted that never becomes a call | `api/heads.rs`; where HTTP/2 refuses it by itself, `peer/head_count.rs` |
//! | a series | the `metrics` of the room whose events it counts |
//!
//! # Invariants
//!
//! 1. No map, queue or cache grows without a bound, and the bound is in `conf/agent.conf` or at the top of
//!    its module.
//! 2. Forgetting a key never gives tokens back: only a bucket that is full again may be dropped.
//! 3. Narrow before wide: the caller's own bucket is charged first, shared buckets last; a refusal refunds what the
//!    call took before it.
//! 4. The CA key never leaves [`issuer::embedded`]. Private keys are zeroised, and never in `Debug`, logs or errors.
//! 5. The agent never serves an expired SVID, and never stops serving a valid one because a renewal fails.
//! 6. A reload parses, checks, compares and then swaps; any error keeps everything as it was and says so.
//! 7. A transient state (starting, throttled, attestation that failed) is never PermissionDenied.
//! 8. A caller's PID is only trusted while its pidfd says the process lives; a child that inherits the socket is not
//!    its parent. In each call and before each update the process is looked at again: one that is of another effective
//!    user or group than when it connected gets nothing, on any kernel.
//! 9. Kubernetes code runs only where Kubernetes was detected or configured.
//! 10. Prometheus labels come from closed sets: method, code, reason, kind. Never a SPIFFE ID, UID or selector.
//!
//! # Decisions
//!
//! **X.509-SVIDs on demand.** spire-agent makes the SVID of every entry ahead, since its server is far away.
//! The embedded issuer makes one in about 75 microseconds, so an entry that nobody asks for costs no key and
//! no memory, and 100,000 entries start as fast as one.
//!
//! **What controls an agent does not run where callers are served.** Signals, the watchdog and the HTTP endpoints are on
//! the main thread, on a runtime of their own that waits for nobody; it asks the other one for a sign of life. What may wait
//! (files, the user database, opening the log) is an errand of one thread ([`agent`]). Every thread is there from the start: one
//! that is made when it is needed may be one that the node has not any more.
//!
//! **An agent hands its sockets on, not its state.** The next one reads the disk when the first writes no more, so nothing is kept in
//! two places, and versions need agree on a line of JSON alone ([`agent`]). Who is at the socket by then waits in its queue for
//! the calls that are under way. The other way, to pass connections too, would need every buffer of HTTP/2.
//!
//! **No actor.** Requests read a snapshot behind an atomic pointer; one writer publishes the next. A slow stream
//! skips to the newest and never queues.
//!
//! **What nobody set refuses only where there is no room.** A default that always holds cannot tell fifty services that
//! start together from one that loops, and refuses the first on an idle node. So defaults are charged, to know who took
//! more than its share, and bind where memory, descriptors or the processor are short ([`limits::room`]): tokens for the
//! processor, and what is held for the others, as no rate of calls says how much memory they hold. Then whoever has
//! tokens or its share passes; the others wait, then hear `Unavailable`: it is the node that is short. What an admin wrote is
//! `ResourceExhausted` at once, exact to the bucket, and never waits: it is to be relied on.
//!
//! **No queue without a bound, and none past the caller's deadline.** A call waits 250 ms for tokens or room, two seconds
//! to be attested, and never beyond its `grpc-timeout`; it has one of 1,024 places, which are shared as attestations
//! are, and without one it is refused at once ([`limits::patience`]). To refuse at once is cheaper, and makes of a hundred
//! clients that start together a hundred that back off for a second, and come back together.
//!
//! **Of refused connections the first few are answered, the crowd is closed.** An answer (a status to the first request)
//! says which limit it was and when to come back; but it takes half as much processor time again as a close
//! (`cargo bench --bench refusal`), and a client that never asks holds its place. So two of a family are answered in two
//! seconds, further ones once none of the family's is being answered, 64 of the node in that time and 16 at the same moment;
//! the others are closed, which a gRPC client takes for `UNAVAILABLE` and backs off from, and which limit it was stands in the
//! log and in `durward limits`.
//!
//! **Who finds no room waits a moment, unread.** A crowd after a restart is over in less than that. A connection that is
//! refused for want of room alone keeps its descriptor for up to 250 ms, and is asked for again when there is room, families
//! in turns; where others have all places it waits two seconds, and whoever leaves leaves it to who waits. One that was let
//! in while it was silent, and finds no memory when it speaks, waits as long and is refused as at the gate. What an admin set
//! as a limit refuses at once.
//!
//! **Places are kept for those who hold little, in parts that take nothing from each other.** By its share of a crowd larger
//! than the gate nobody has more than one connection, and one that had eight before it came would lose seven. So it keeps
//! them, and for its next a small part is kept beside that for newcomers. A kept place is lent for two seconds, since whoever
//! is closed comes back: closed at once, a crowd gets no call through, and takes more than it gave.
//!
//! **What the kernel keeps of closed connections is counted in grace periods.** It shows in no sum of the agent's, and
//! grows faster than a look four times a second could see. The accept loop reads what the cgroup has left, and lets no more
//! in between two ends of a grace period than fits ([`peer`]); with more left than that, nobody is held up.
//!
//! **Where pods are looked for, a process that has ended is closed and charged to nobody.** Its cgroup is not
//! to be believed any more, and nothing may be answered to it. Charged to its user, a pod whose processes
//! connect and exit would spend what root has on the node.
//!
//! **Nothing a caller passes in is taken.** Where descriptors cannot be barred, the queue is looked at before it is read,
//! for a system call more (0.9 of some 50 microseconds). The other way is to take them and to close them elsewhere: then
//! they count against the agent's own, and a file of FUSE is flushed by that close, which nothing ends, not even the end
//! of the process. One that was never taken is released without that, unless its user has mapped it and keeps pages of it
//! unwritten: then a closing thread, and the end of the process, wait for that user's server. Only a kernel that bars
//! descriptors (6.16) is safe from it.
//!
//! **Whom its own limits refuse is closed a tenth of a second later.** Connections wait in one queue of the
//! kernel's, first come, first served. With 1,200 processes that connect again as soon as they are closed, a
//! neighbour waited behind all of them: 34 ms in the middle. Kept a moment, each a descriptor and no more,
//! spread so that they do not come back together, it is half a millisecond, and the crowd takes less than
//! half of the processor time from the node (`cargo bench --bench abuse storm`).
//!
//! **Who has closed already is asked nothing.** A loop that connects and closes fills the one queue that all wait in, and all
//! that is done for each of its connections everybody behind them waits for. So it is first looked whether anybody is
//! there; who is not is closed, counted as one that left, and charged to nobody.
//!
//! **Who is let in begins in turns.** To accept and to decide takes a few microseconds, to begin a connection and answer its
//! first call twenty times that. With room a crowd that starts together is all let in, and whoever came then waited for all of
//! it: 25 ms behind 1,200 processes. So it is decided about all at once, and then a few go in at a time, a caller's
//! connection after another's, up to their first answer (`peer/entrance.rs`). The pidfd of who connected can be had that much later;
//! where the kernel gives only that of a number (before 6.5), it is taken at once. So that the first answer is one turn, a new
//! socket is read and written before the runtime has heard of it; and a worker asks the kernel who else can be served after
//! eight tasks, and not after 61 (`agent/runtime.rs`).
//!
//! **No kernel state for whom the gate refuses.** Whom to charge needs no pidfd, so the gate is asked first, and a refused connection
//! is never registered with the runtime: both were most of what a refusal cost. Where pods are looked for, `/proc/PID/cgroup` is
//! read before; that it was of the process that connected is seen once that is held on to (`peer/credentials.rs`).
//!
//! **What others can pin is asked for.** The kernel keeps the name of a process that the agent held on to for as long as anybody else
//! has it open, and charges it to the agent. Whose it is was first told by when the kernel's part grew: then it changed hands with
//! each swing of that number. Now the socket of an ended connection is asked once more (`peer/pins.rs`).
//!
//! **Answers wait for room, and not the connection for their readers.** A peer that asks and never reads may pin 64 KiB of
//! answers, or one that is larger; who asks on waits in the order of arrival. The other way is to read no more from its
//! socket: then one that reads slowly could not say so (WINDOW_UPDATE), and both sides would wait for ever. A request that
//! waits for its own rest gives way, and the end of an answer need not fit, for the same reason ([`peer`]).
//!
//! **A request is answered on the task of its connection,** and what a connection has to say leaves in one system call when its
//! task has nothing more to do. A task for each request, and a call for each of its three frames, were a third of what a
//! cached answer cost. Sixteen go on so before others run (`peer/streams.rs`, `peer/outbox.rs`).
//!
//! **Refusals and mistakes are paced by reading.** They are answered, 5,000 a second to one caller and 20,000 to all, since a
//! client has to know; beyond that its connections are read no more for a moment. To answer later would keep what was
//! asked. Frames that ask for nothing are paced with them: HTTP/2 answers those, and no limit sees them.
//!
//! **Attestation is reused for at most a second, on one connection.** What could change unseen is only a process's
//! supplementary groups; that it lives, its user and its group are looked at in every call and update ([`attest`]).
//!
//! **Names are looked up for entries, not for callers.** A caller may bring a thousand groups, and each lookup may ask a
//! server that hangs. Names that entries ask for are few and an admin's; what is known of them stands in the snapshot
//! ([`attest::unix`]). While nothing was ever answered for a name, an entry that asks for it may be anybody's whom
//! everything else of it fits: these callers are `Unavailable`, since a smaller set of identities would be a wrong one.
//!
//! **A stream keeps no selectors.** Each update attests anew, so they would be of no use: what one stream of a process
//! with 1,000 groups would keep is 157 KB. It keeps its entries, which are shared, and the bytes that it sent last.
//!
//! **A process is attested for what is to be sent, not for each change.** The renewal of any SVID wakes every stream,
//! on a large node several times a second. Where the entries and the policy are the same, and so is what would be sent,
//! the process is not looked at.
//!
//! **Streams make their updates a few at a time.** Ten thousand that learn of a change at the same moment would be one
//! queue in front of every call. The turn of one ends where it has to wait, and attestations that wait have places as
//! those of calls have, but others; who finds none, or cannot be attested for a while, is sent nothing and tried again.

pub mod agent;
pub mod api;
pub mod attest;
pub mod cli;
pub mod config;
pub mod hcl;
pub mod identity;
pub mod issuer;
pub mod limits;
pub mod os;
pub mod peer;
pub mod store;
pub mod telemetry;
