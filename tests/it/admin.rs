//! The admin socket of a real agent: what it tells its owner, and that it tells nobody else.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use durward::{
    agent::Running,
    api::proto::{
        admin::{self as pb, admin_client::AdminClient},
        workload::JwtsvidRequest,
    },
    os::clock::Clock,
};
use tempfile::TempDir;
use tonic::{Code, transport::Channel};

use crate::support::{TRUST_DOMAIN, TestAgent, channel, entry, load, request, write_config};

/// An agent with an admin socket, which cannot be in the directory of the public one.
struct Agent {
    private: TempDir,
    agent: TestAgent,
}

impl Agent {
    fn start(blocks: &str) -> Self {
        let private = tempfile::tempdir().unwrap();
        let agent = TestAgent::start(&with_admin(&private, blocks));
        Self { private, agent }
    }

    fn admin_socket(&self) -> PathBuf {
        self.private.path().join("admin/admin.sock")
    }

    async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(channel(&self.admin_socket()).await)
    }
}

fn with_admin(private: &TempDir, blocks: &str) -> String {
    let at = private.path().display();
    format!("agent {{\n  admin_socket_path = \"{at}/admin/admin.sock\"\n}}\n{blocks}")
}

fn own_pid() -> i32 {
    nix::unistd::Pid::this().as_raw()
}

fn jwt_request() -> JwtsvidRequest {
    JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_show_who_called() {
    let agent = Agent::start(&entry("/web", ""));
    let mut admin = agent.admin().await;
    let before = admin.limits(pb::LimitsRequest { top: 0 }).await.unwrap().into_inner();
    assert_eq!((before.heaviest, before.connections, before.node_connections), (vec![], vec![], 0));

    let mut client = agent.agent.client().await;
    for _ in 0..3 {
        client.fetch_jwtsvid(request(jwt_request())).await.unwrap();
    }
    let now = admin.limits(pb::LimitsRequest { top: 0 }).await.unwrap().into_inner();
    let caller = format!("uid:{}", nix::unistd::geteuid());
    let find = |stage: &str, key: &str, method: &str| {
        let same =
            |bucket: &pb::Bucket| (&*bucket.stage, &*bucket.key, &*bucket.method) == (stage, key, method);
        let found = now.heaviest.iter().find(|heavy| heavy.bucket.as_ref().is_some_and(same));
        let found = found.unwrap_or_else(|| panic!("{stage} {key} {method}: {now:?}"));
        let bucket = found.bucket.as_ref().unwrap();
        assert_eq!(bucket.limit(), pb::Limit::Tokens);
        (found.used, found.refused)
    };
    assert_eq!(find("caller", &caller, "FetchJWTSVID"), (3, 0));
    assert_eq!(find("identity", "spiffe://example.org/web", "FetchJWTSVID"), (3, 0));
    assert_eq!(find("gate", &caller, "connections"), (1, 0));
    assert_eq!(now.connections, [pb::Connections { caller, open: 1 }], "the admin's own is not counted");
    assert_eq!((now.node_connections, now.attestations_in_flight), (1, 0));
    assert_eq!(now.keys, Some(pb::Keys { gate: 1, caller: 1, identity: 1 }));
    let memory = now.memory.unwrap();
    assert!(memory.resident.is_some_and(|bytes| bytes > 1 << 20), "{memory:?}");

    let one = admin.limits(pb::LimitsRequest { top: 1 }).await.unwrap().into_inner();
    assert_eq!(one.heaviest.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_shows_what_fits_and_what_nearly_does() {
    let uid = nix::unistd::geteuid();
    let own = format!("unix:uid:{uid}");
    let other = |path: &str, selectors: &[&str]| {
        format!("entry \"spiffe://{TRUST_DOMAIN}{path}\" {{\n  selectors = {selectors:?}\n}}\n")
    };
    let blocks = [
        entry("/web", "id = \"b\"\n  hint = \"public\""),
        entry("/old", "id = \"a\"\n  hint = \"public\""),
        other("/two-missing", &[&own, "unix:gid:4000000001", "unix:user:no-such-user"]),
        other("/one-missing", &[&own, "unix:user:no-such-user"]),
        other("/stranger", &["unix:uid:4000000001"]),
    ];
    let agent = Agent::start(&blocks.concat());
    let mut admin = agent.admin().await;
    let got = admin.explain(pb::ExplainRequest { pid: own_pid() }).await.unwrap().into_inner();

    assert_eq!((got.pid, got.uid), (own_pid(), uid.as_raw()));
    let caller = got.caller.unwrap();
    assert_eq!((caller.key, caller.cgroup_line), (format!("uid:{uid}"), String::new()));
    assert!(caller.why.starts_with("its user, as pods are not looked for"), "{}", caller.why);
    assert!(got.selectors.contains(&own), "{:?}", got.selectors);
    let matches: Vec<_> = got.matches.iter().map(|it| (&*it.entry_id, &*it.hint, &*it.withheld)).collect();
    assert_eq!(
        matches,
        [("a", "public", "an older entry, b, has the same hint"), ("b", "public", "")],
        "b is written first, and so it is older"
    );
    let nearest: Vec<_> = got
        .nearest
        .iter()
        .map(|near| (near.entry.as_ref().unwrap().spiffe_id.clone(), near.missing.join(" "), near.found))
        .collect();
    let id = |path: &str| format!("spiffe://{TRUST_DOMAIN}{path}");
    assert_eq!(
        nearest,
        [
            (id("/one-missing"), "unix:user:no-such-user".to_owned(), 1),
            (id("/two-missing"), "unix:gid:4000000001 unix:user:no-such-user".to_owned(), 1),
        ]
    );
    let of = |stage: &str| got.buckets.iter().filter(|bucket| bucket.stage == stage).count();
    assert_eq!((of("gate"), of("caller"), of("identity")), (1, 9, 8));
    assert!(got.buckets.iter().all(|it| it.limit() == pb::Limit::Tokens && it.left == it.burst));

    for pid in [0, -1, i32::MAX] {
        let status = admin.explain(pb::ExplainRequest { pid }).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::NotFound, &*format!("there is no process {pid}"))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_its_owners_and_goes_with_the_agent() {
    let first = Agent::start("");
    let socket = first.admin_socket();
    let directory = socket.parent().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&socket), mode(directory)), (0o600, 0o700));
    let Agent { private, agent } = first;
    agent.running.shutdown().await;
    assert!(!socket.exists());

    // The next agent is bound at the same place.
    let agent = TestAgent::start(&with_admin(&private, ""));
    let mut admin = AdminClient::new(channel(&socket).await);
    admin.limits(pb::LimitsRequest { top: 1 }).await.unwrap();
    drop(admin);
    agent.running.shutdown().await;

    // Where others may write, somebody could put another socket in its place.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &with_admin(&private, ""));
    let started = Running::start(load(dir.path()).unwrap(), None, Clock::SYSTEM);
    let error = format!("{:#}", started.unwrap_err());
    assert!(error.contains("must belong to user"), "{error}");
    assert!(!socket.exists() && !dir.path().join("api.sock").exists(), "nothing is left behind");
}
