//! The k8s attestor against a kubelet of the test's own, which answers as each test has it.
//!
//! The caller is this process, over a real socket; which pod it is in says a `/proc` of the test's own.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use durward::{
    attest::{
        AttestError, AttestFault, AttestSettings, Attestor, Blame, Questions, Subject, k8s::K8sSettings,
    },
    identity::EntryIndex,
    limits::{Limits, Method, Patience},
    peer::{
        Peer,
        cgroup::{KubeletRoot, KubernetesMode, PodOrUid},
    },
    telemetry::metrics::Metrics,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    attest::{Process, entry_for},
    kubelet::{FakeKubelet, HANGS_UP, HTML, JSON, Reply, container_id, listed, pod, pod_uid, usual_pod},
};

/// More than anything here takes on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

impl FakeKubelet {
    /// An attestor that asks it, with the settings as `change` leaves them.
    fn attestor(&self, change: impl FnOnce(&mut K8sSettings)) -> Attestor {
        Attestor::new(self.settings(change))
    }

    fn settings(&self, change: impl FnOnce(&mut K8sSettings)) -> AttestSettings {
        let mut settings = AttestSettings::default();
        settings.k8s.enabled = true;
        settings.k8s.settings = K8sSettings {
            kubelet_secure_port: Some(self.port),
            kubelet_ca_path: self.ca.clone(),
            token_path: self.token.clone(),
            max_poll_attempts: 2,
            node_name_env: "DURWARD_TEST_NO_SUCH_VARIABLE".to_owned(),
            ..K8sSettings::default()
        };
        change(&mut settings.k8s.settings);
        settings
    }
}

/// A peer that is in this container of this pod, as far as its `/proc` says.
fn caller(pod: u32, container: u32) -> Arc<Peer> {
    in_cgroup(&cgroup(pod, container))
}

fn in_cgroup(path: &str) -> Arc<Peer> {
    let root = TempDir::new().unwrap();
    let keys = keys_of(&root, std::process::id(), path);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Peer::from_stream(&ours, &keys).unwrap();
    drop(theirs);
    Arc::new(peer)
}

/// Keys that find one process in this cgroup.
fn keys_of(root: &TempDir, pid: u32, cgroup: &str) -> PodOrUid {
    let dir = root.path().join(pid.to_string());
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("cgroup"), format!("0::{cgroup}\n")).unwrap();
    PodOrUid::reading(root.path(), KubernetesMode::On, false, KubeletRoot::default())
}

/// The cgroup of a container of a pod.
fn cgroup(pod: u32, container: u32) -> String {
    format!("/kubepods/burstable/pod{}/{}", pod_uid(pod), container_id(container))
}

/// The questions of entries that ask for these selectors; those of one are separated by blanks.
fn asking(attestor: &Attestor, entries: &[&str]) -> Arc<Questions> {
    attestor.prepare_for(&Arc::new(EntryIndex::new(entries.iter().map(|selectors| entry_for(selectors)))))
}

async fn attest(attestor: &Attestor, peer: &Arc<Peer>, entries: &[&str]) -> Result<Subject, AttestError> {
    let limits = Limits::default();
    let admitted = limits.admit(Arc::clone(peer), Method::FetchX509Svid, Patience::USUAL).await.unwrap();
    let questions = asking(attestor, entries);
    let attested = tokio::time::timeout(PATIENCE, attestor.attest(admitted, &questions)).await.unwrap();
    Ok(attested?.into_parts().1)
}

/// What was found of pods, one after the other.
fn of_pod(subject: &Subject) -> Vec<String> {
    subject.iter().filter(|it| it.kind() == "k8s").map(|it| it.value().to_owned()).collect()
}

fn whole(error: &AttestError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

#[tokio::test]
async fn a_container_has_the_selectors_of_its_pod_and_its_own() {
    let kubelet = FakeKubelet::start(listed(&[pod(1), pod(2)]));
    let attestor = kubelet.attestor(|_| {});
    for (container, own) in [
        (
            1,
            [
                "container-image:registry/web:1",
                "container-image:registry/web@sha256:1",
                "container-name:main",
            ],
        ),
        (
            1001,
            [
                "container-image:registry/init:1",
                "container-image:registry/init@sha256:2",
                "container-name:init",
            ],
        ),
        (2001, ["container-image:busybox", "container-image:busybox@sha256:3", "container-name:debug"]),
    ] {
        let subject = attest(&attestor, &caller(1, container), &["k8s:ns:ns1"]).await.unwrap();
        let mut want: Vec<String> = own.map(str::to_owned).to_vec();
        want.extend(
            [
                "node-name:node1",
                "ns:ns1",
                "pod-image-count:1",
                "pod-image:registry/web:1",
                "pod-image:registry/web@sha256:1",
                "pod-init-image-count:1",
                "pod-init-image:registry/init:1",
                "pod-init-image:registry/init@sha256:2",
                "pod-label:app:web",
                "pod-label:tier/of:front",
                "pod-name:pod-1",
                "pod-owner-uid:ReplicaSet:owner-uid",
                "pod-owner:ReplicaSet:web",
                "pod-uid:00000000-0000-0000-0000-000000000001",
                "sa:sa1",
            ]
            .map(str::to_owned),
        );
        assert_eq!(of_pod(&subject), want, "{container}");
    }
    assert_eq!(kubelet.requests(), 1, "one list is for all");
}

#[tokio::test]
async fn who_is_in_no_pod_or_asks_for_none_costs_no_request() {
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let attestor = kubelet.attestor(|_| {});
    for (case, peer, entry) in [
        ("no pod", in_cgroup("/system.slice/sshd.service"), "k8s:ns:ns1"),
        ("a container that is no pod's", in_cgroup(&format!("/docker/{}", container_id(1))), "k8s:ns:ns1"),
        (
            "a user's invention",
            in_cgroup(&format!("/user.slice/user-1000.slice/kubepods/pod{}/{}", pod_uid(1), container_id(1))),
            "k8s:ns:ns1",
        ),
        ("in the pod and in no container", in_cgroup(&format!("/kubepods/pod{}", pod_uid(1))), "k8s:ns:ns1"),
        ("nobody asks", caller(1, 1), "unix:uid:0"),
    ] {
        let subject = attest(&attestor, &peer, &[entry]).await.unwrap();
        assert_eq!(of_pod(&subject), [""; 0], "{case}");
        assert!(!subject.is_empty(), "{case}: the other attestor");
    }
    assert_eq!(kubelet.requests(), 0);
}

#[tokio::test]
async fn what_the_kubelet_cannot_say_is_unavailable_and_says_what_to_do() {
    let mut twice = pod(2);
    twice["status"]["containerStatuses"][0]["containerID"] =
        json!(format!("containerd://{}", container_id(1)));
    let mut huge = pod(1);
    huge["metadata"]["labels"]["app"] = json!("x".repeat(1024 * 1024));
    let refusal = "Forbidden (user=system:serviceaccount:durward:durward, verb=get, resource=nodes)\u{1b}[2J";
    for (case, reply, want, fault) in [
        (
            "401",
            Reply::With(401, "", "Unauthorized".into()),
            "does not accept the token of ",
            AttestFault::Unreadable,
        ),
        (
            "403",
            Reply::With(403, "", refusal.into()),
            "allow its service account get on nodes/pods (before Kubernetes 1.33 on nodes/proxy)",
            AttestFault::Unreadable,
        ),
        (
            "403, in its own words",
            Reply::With(403, "", refusal.into()),
            "verb=get, resource=nodes) [2J",
            AttestFault::Unreadable,
        ),
        (
            "HTML",
            Reply::With(200, HTML, "<html>".into()),
            "is \"text/html\" and no list of pods",
            AttestFault::Unreadable,
        ),
        (
            "HTML that says it is JSON",
            Reply::With(200, JSON, "<html>".into()),
            "cannot understand",
            AttestFault::Unreadable,
        ),
        (
            "a redirect",
            Reply::With(302, "Location: https://127.0.0.1:1/\r\n", String::new()),
            "answers with a redirect (302), which is not followed",
            AttestFault::Unreadable,
        ),
        (
            "404",
            Reply::With(404, "", "404 page not found".into()),
            "404: 404 page not found",
            AttestFault::Unreadable,
        ),
        (
            "500",
            Reply::With(500, "", "no".into()),
            "unexpected status code on pods response",
            AttestFault::Unreadable,
        ),
        ("100 MB", Reply::Bytes(100_000_000), "it is larger than 33554432 bytes", AttestFault::Unreadable),
        ("cut", Reply::Bytes(100_000), "the kubelet at 127.0.0.1", AttestFault::Unreadable),
        ("nothing", Reply::Nothing, "has not said which pods there are", AttestFault::Unreadable),
        ("slowly", Reply::Slowly, "has not said which pods there are", AttestFault::Unreadable),
        ("another pod alone", listed(&[pod(3)]), "does not list container", AttestFault::Unlisted),
        (
            "two pods of one container",
            listed(&[pod(1), twice]),
            "twice, so its owner is not known",
            AttestFault::Untrusted,
        ),
        ("two pods of one UID", listed(&[pod(1), pod(1)]), "two pods of UID pod:", AttestFault::Untrusted),
        (
            "a label of a megabyte",
            listed(&[huge]),
            "a name, label or image of more than",
            AttestFault::Unreadable,
        ),
    ] {
        // As many as take as long as three requests may: a build for tests reads slowly.
        let attempts = if matches!(reply, Reply::Bytes(100_000_000)) { 60 } else { 2 };
        let kubelet = FakeKubelet::start(reply);
        let attestor = kubelet.attestor(|it| it.max_poll_attempts = attempts);
        let error = attest(&attestor, &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap_err();
        assert!(whole(&error).contains(want), "{case}: {}", whole(&error));
        assert!(!whole(&error).contains(['\u{1b}', '\n']), "{case}: {error:?}");
        assert_eq!((error.fault(), error.blame()), (fault, Blame::Fault), "{case}");
        // No entry that asks for a pod could be this one's.
        let other = attest(&attestor, &caller(1, 1), &["k8s:ns:ns1 unix:uid:4294967294"]).await.unwrap();
        assert_eq!(of_pod(&other), [""; 0], "{case}");
    }
}

#[tokio::test]
async fn the_kubelet_is_known_by_its_certificate() {
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let (other, gone) = (kubelet.other_ca.clone(), PathBuf::from("/nonexistent/ca.crt"));
    let entries = ["k8s:ns:ns1"];
    let as_it_is: Box<dyn FnOnce(&mut K8sSettings)> = Box::new(|_| {});
    for (case, change, want) in [
        ("its CA", as_it_is, None),
        ("its name", Box::new(|it| it.node_name = Some("127.0.0.1".to_owned())), None),
        (
            "another name",
            Box::new(|it| it.node_name = Some("localhost".to_owned())),
            Some("set node_name to a name"),
        ),
        (
            "another CA",
            Box::new(|it| it.kubelet_ca_path = other),
            Some("name the kubelet's CA in kubelet_ca_path"),
        ),
        (
            "another name, unverified",
            Box::new(|it| {
                it.node_name = Some("localhost".to_owned());
                it.skip_kubelet_verification = true;
            }),
            None,
        ),
        (
            "no CA",
            Box::new(|it| it.kubelet_ca_path = gone),
            Some(
                "unable to load kubelet CA: cannot read /nonexistent/ca.crt, which kubelet_ca_path names: No such",
            ),
        ),
        (
            "no CA is needed",
            Box::new(|it| {
                it.kubelet_ca_path = "/nonexistent/ca.crt".into();
                it.skip_kubelet_verification = true;
            }),
            None,
        ),
        (
            "a directory as token",
            Box::new(|it| it.token_path = "/".into()),
            Some("unable to load token: / must be a regular file (token_path)"),
        ),
        (
            "nobody is there",
            Box::new(|it| it.kubelet_secure_port = Some(1)),
            Some("cannot reach the kubelet at 127.0.0.1:1"),
        ),
        ("not asked", Box::new(|it| it.disable_kubelet_client = true), Some("kubelet client is disabled")),
    ] {
        let attestor = kubelet.attestor(change);
        let got = attest(&attestor, &caller(1, 1), &entries).await;
        match (got, want) {
            (Ok(subject), None) => assert!(of_pod(&subject).contains(&"sa:sa1".to_owned()), "{case}"),
            (Err(error), Some(want)) => assert!(whole(&error).contains(want), "{case}: {}", whole(&error)),
            (got, want) => panic!("{case}: {got:?}, not {want:?}"),
        }
    }
}

#[tokio::test]
async fn a_pod_of_another_node_is_nobodys() {
    let of = |n, node: &str| {
        let mut pod = pod(n);
        pod["spec"]["nodeName"] = json!(node);
        pod
    };
    let here = || vec![of(1, "node1"), of(2, "node1")];
    let two = || vec![of(1, "node1"), of(2, "node2")];
    for (case, asked, pods, want) in [
        ("an address", Some("127.0.0.1"), here(), None),
        ("an address, and pods of two", Some("127.0.0.1"), two(), Some("and another pod for \"node2\"")),
        ("localhost", Some("localhost"), here(), None),
        ("localhost, and pods of two", Some("localhost"), two(), Some("and another pod for \"node2\"")),
        ("nothing", None, here(), None),
        ("nothing, and pods of two", None, two(), Some("for node \"node1\" and another pod")),
        ("a pod that says none", None, vec![of(1, ""), of(2, "")], None),
    ] {
        let kubelet = FakeKubelet::start(listed(&pods));
        let attestor = kubelet.attestor(|it| {
            it.skip_kubelet_verification = true;
            it.node_name = asked.map(str::to_owned);
        });
        match (attest(&attestor, &caller(1, 1), &["k8s:ns:ns1"]).await, want) {
            (Ok(subject), None) => assert!(of_pod(&subject).contains(&"sa:sa1".to_owned()), "{case}"),
            (Err(error), Some(want)) => assert!(whole(&error).contains(want), "{case}: {}", whole(&error)),
            (got, want) => panic!("{case}: {got:?}, not {want:?}"),
        }
    }
}

#[tokio::test]
async fn a_container_is_served_as_soon_as_it_is_listed() {
    let kubelet = FakeKubelet::start(listed(&[pod(2)]));
    let attestor = kubelet.attestor(|it| it.max_poll_attempts = 120);
    let (peer, entries) = (caller(1, 1), ["k8s:ns:ns1"]);
    let both = async {
        tokio::join!(attest(&attestor, &peer, &entries), async {
            while kubelet.requests() < 3 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            kubelet.says(Reply::With(503, "", "restarting".into()));
            while kubelet.requests() < 5 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            kubelet.says(listed(&[pod(2), pod(1)]));
        })
    };
    let (served, ()) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert!(of_pod(&served.unwrap()).contains(&"sa:sa1".to_owned()));
}

#[tokio::test]
async fn one_connection_takes_all_requests_and_one_that_ended_costs_no_call() {
    for (headers, most) in [(JSON, 1), (HANGS_UP, usize::MAX)] {
        let list = json!({"kind": "PodList", "items": [pod(1)]}).to_string();
        let kubelet = FakeKubelet::start(Reply::With(200, headers, list));
        let attestor = kubelet.attestor(|it| it.max_poll_attempts = 4);
        let entries = ["k8s:ns:ns1"];
        // The second is not listed: the kubelet is asked again and again.
        attest(&attestor, &caller(1, 1), &entries).await.unwrap();
        let error = attest(&attestor, &caller(2, 2), &entries).await.unwrap_err();
        assert_eq!(error.fault(), AttestFault::Unlisted, "{headers}: {}", whole(&error));
        let (requests, connections) = (kubelet.requests(), kubelet.connections.load(Ordering::Relaxed));
        assert!(requests >= 3, "{headers}: {requests} requests");
        assert!(connections <= most && connections >= requests.min(most), "{headers}: {connections}");
        // What was read anew is shown on a connection of its own.
        attestor.reload(kubelet.settings(|it| it.reload_interval = Duration::from_secs(1)));
        attest(&attestor, &caller(1, 1), &entries).await.unwrap();
        assert_eq!(kubelet.connections.load(Ordering::Relaxed), connections + 1, "{headers}");
    }
}

#[tokio::test]
async fn requests_are_counted_by_what_came_of_them() {
    let kubelet = FakeKubelet::start(listed(&[pod(1), pod(2)]));
    let metrics = Metrics::default();
    let attestor = Attestor::new(kubelet.settings(|_| {})).counted_by(metrics.registry());
    assert_eq!(attestor.kept_bytes(), 0);
    attest(&attestor, &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap();
    assert!((500..5000).contains(&attestor.kept_bytes()), "{} bytes of two pods", attestor.kept_bytes());
    kubelet.says(Reply::With(403, "", String::new()));
    attest(&attestor, &caller(3, 3), &["k8s:ns:ns1"]).await.unwrap_err();
    let text = metrics.render();
    for line in [
        "durward_kubelet_requests_total{result=\"ok\"} 1",
        "durward_kubelet_requests_total{result=\"refused\"} 1",
        "durward_kubelet_requests_total{result=\"late\"} 0",
        "durward_kubelet_pods 2",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[tokio::test]
async fn what_is_missing_is_told_before_anybody_calls() {
    type Gone = fn(&mut K8sSettings, PathBuf);
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let api = FakeKubelet::start_api_server(namespace(&json!({})));
    let all = kubelet.settings(with_namespaces(&api));
    assert_eq!(all.missing(), [""; 0]);
    let gone = || PathBuf::from("/nonexistent/file");
    let cases: [(&str, Gone, &str); 5] = [
        (
            "the kubelet's CA",
            |it, gone| it.kubelet_ca_path = gone,
            "unable to load kubelet CA: cannot read /nonexistent/file, which kubelet_ca_path names",
        ),
        (
            "its token",
            |it, gone| it.token_path = gone,
            "unable to load token: cannot read /nonexistent/file, which token_path names",
        ),
        (
            "a certificate in its place",
            |it, gone| (it.certificate_path, it.private_key_path) = (Some(gone.clone()), Some(gone)),
            "unable to load certificate: cannot read /nonexistent/file, which certificate_path names",
        ),
        (
            "the API server's CA",
            |it, gone| it.api_server_ca_path = gone,
            "unable to load API server CA: cannot read /nonexistent/file, which api_server_ca_path names",
        ),
        (
            "its token",
            |it, gone| it.api_server_token_path = gone,
            "unable to load API server token: cannot read /nonexistent/file, which api_server_token_path names",
        ),
    ];
    for (case, change, want) in cases {
        let mut settings = all.clone();
        change(&mut settings.k8s.settings, gone());
        let missing = settings.missing();
        assert!(matches!(&missing[..], [only] if only.starts_with(want)), "{case}: {missing:?}");
        // And by an agent that has these settings, of which the log was told at once.
        let attestor = Attestor::new(settings);
        let began = Instant::now();
        while attestor.troubles().is_empty() {
            assert!(began.elapsed() < PATIENCE, "{case}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let troubles = attestor.troubles();
        assert!(matches!(&troubles[..], [only] if only.contains(want)), "{case}: {troubles:?}");
    }
    // What was wrong is not told any more once it is right.
    kubelet.says(Reply::With(403, "", String::new()));
    let attestor = Attestor::new(all);
    attest(&attestor, &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap_err();
    assert!(
        matches!(&attestor.troubles()[..], [only] if only.contains("(403)")),
        "{:?}",
        attestor.troubles()
    );
    kubelet.says(listed(&[pod(1)]));
    attest(&attestor, &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap();
    assert_eq!(attestor.troubles(), [""; 0]);
    // Nothing is missing of what is not used.
    let unused = kubelet.settings(|it| {
        (it.kubelet_ca_path, it.token_path) = (gone(), gone());
        it.skip_kubelet_verification = true;
        it.use_anonymous_authentication = true;
    });
    assert_eq!(unused.missing(), [""; 0]);
}

/// What stands at the path is no file, or not what it should be.
#[tokio::test]
async fn a_file_that_is_not_what_it_should_be_is_named() {
    let dir = TempDir::new().unwrap();
    let (pipe, text) = (dir.path().join("pipe"), dir.path().join("text"));
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    type Change = fn(&mut K8sSettings, PathBuf);
    let (token, ca): (Change, Change) =
        (|it, path| it.token_path = path, |it, path| it.kubelet_ca_path = path);
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    for (case, change, path, holds, want) in [
        ("a pipe for a token", token, &pipe, "", "must be a regular file (token_path)"),
        ("a directory for a CA", ca, &dir.path().to_owned(), "", "must be a regular file (kubelet_ca_path)"),
        ("an empty token", token, &text, " \n", "holds no token (token_path)"),
        ("a token of two lines", token, &text, "one\ntwo", "holds no token (token_path)"),
        (
            "a CA that is none",
            ca,
            &text,
            "-----BEGIN CERTIFICATE-----",
            "holds no certificates in PEM (kubelet_ca_path)",
        ),
        ("a token without end", token, &text, &"x".repeat(65_537), "is larger than 65536 bytes (token_path)"),
    ] {
        if *path == text {
            fs::write(path, holds).unwrap();
        }
        let settings = kubelet.settings(|it| change(it, path.clone()));
        let missing = settings.missing();
        assert!(matches!(&missing[..], [only] if only.contains(want)), "{case}: {missing:?}");
        let error = attest(&Attestor::new(settings), &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap_err();
        assert!(whole(&error).contains(want), "{case}: {}", whole(&error));
        assert!(!whole(&error).contains("two"), "{case}: no token is told");
    }
    assert_eq!(kubelet.requests(), 0, "nobody is asked without what is shown");
}

#[tokio::test]
async fn a_token_that_changes_is_read_again() {
    let reply = |token| {
        let list = json!({"kind": "PodList", "items": [pod(1)]}).to_string();
        Reply::ToToken(token, list)
    };
    let kubelet = FakeKubelet::start(reply("first"));
    let attestor = kubelet.attestor(|_| {});
    let entries = ["k8s:ns:ns1"];
    attest(&attestor, &caller(1, 1), &entries).await.unwrap();

    // It is not read for each request, and read anew when it is not taken any more.
    kubelet.says(reply("second"));
    fs::write(&kubelet.token, "second").unwrap();
    let error = attest(&attestor, &caller(2, 2), &entries).await.unwrap_err();
    assert!(whole(&error).contains("(401)"), "{}", whole(&error));
    assert!(!whole(&error).contains("first"), "no token is told: {}", whole(&error));
    let error = attest(&attestor, &caller(2, 2), &entries).await.unwrap_err();
    assert!(whole(&error).contains("does not list"), "{}", whole(&error));

    // One that is gone leaves the last one in use.
    fs::remove_file(&kubelet.token).unwrap();
    let attestor_with = kubelet.settings(|_| {});
    attestor.reload(attestor_with);
    let error = attest(&attestor, &caller(3, 3), &entries).await.unwrap_err();
    assert!(whole(&error).contains("does not list"), "{}", whole(&error));
}

#[tokio::test]
async fn a_ca_that_changes_is_read_again() {
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let (right, wrong) = (fs::read(&kubelet.ca).unwrap(), fs::read(&kubelet.other_ca).unwrap());
    fs::write(&kubelet.ca, &wrong).unwrap();
    let attestor = kubelet.attestor(|_| {});
    let entries = ["k8s:ns:ns1"];
    let unknown = |error: &AttestError| assert!(whole(error).contains("no CA of"), "{}", whole(error));
    unknown(&attest(&attestor, &caller(1, 1), &entries).await.unwrap_err());

    // The next request takes what is there by then.
    fs::write(&kubelet.ca, &right).unwrap();
    let subject = attest(&attestor, &caller(1, 1), &entries).await.unwrap();
    assert!(of_pod(&subject).contains(&"sa:sa1".to_owned()));

    // Whoever was known by the old one is not for ever: the interval makes a connection of its own, by what is there.
    let attestor = kubelet.attestor(|it| it.reload_interval = Duration::ZERO);
    attest(&attestor, &caller(1, 1), &entries).await.unwrap();
    fs::write(&kubelet.ca, &wrong).unwrap();
    unknown(&attest(&attestor, &caller(2, 2), &entries).await.unwrap_err());

    // One that is half written leaves the last one in use.
    for (pod, text) in [(2, &right[..]), (3, &right[..right.len() / 2])] {
        fs::write(&kubelet.ca, text).unwrap();
        let error = attest(&attestor, &caller(pod, pod), &entries).await.unwrap_err();
        assert!(whole(&error).contains("does not list"), "{pod}: {}", whole(&error));
    }
}

#[tokio::test]
async fn who_ends_while_the_kubelet_is_asked_is_nobody() {
    let kubelet = FakeKubelet::start(listed(&[pod(2)]));
    let attestor = kubelet.attestor(|it| it.max_poll_attempts = 120);
    let (dir, root) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut process = Process::start(&dir);
    let peer = process.peer_by(&keys_of(&root, process.child.id(), &cgroup(1, 1)));
    let both = async {
        tokio::join!(attest(&attestor, &peer, &["k8s:ns:ns1"]), async {
            while kubelet.requests() < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // A child of it has the socket from now on.
            process.order("bequeath socket");
            peer.exited().await;
            kubelet.says(listed(&[pod(2), pod(1)]));
        })
    };
    let (got, ()) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert!(matches!(got, Err(AttestError::Gone)), "{got:?}");
}

#[tokio::test]
async fn a_crowd_that_is_never_listed_keeps_nobody_waiting() {
    const CALLS: u32 = 6;
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let attestor = Arc::new(kubelet.attestor(|it| it.max_poll_attempts = 6));
    let limits = Limits::default();
    let questions = asking(&attestor, &["k8s:ns:ns1"]);
    let call = |peer: &Arc<Peer>, patience: Patience| {
        let (attestor, limits, questions) = (Arc::clone(&attestor), limits.clone(), Arc::clone(&questions));
        let peer = Arc::clone(peer);
        async move {
            let admitted = limits.admit(peer, Method::FetchX509Svid, patience).await.unwrap();
            attestor.attest(admitted, &questions).await
        }
    };
    let began = Instant::now();
    let polite = caller(1, 1);
    call(&polite, Patience::USUAL).await.unwrap();
    let mut crowd = tokio::task::JoinSet::new();
    for n in 0..20 {
        let peer = caller(100 + n, 100 + n);
        for _ in 0..CALLS {
            crowd.spawn(call(&peer, Patience::USUAL));
            tokio::task::yield_now().await;
        }
    }
    // All of them wait, more than may be attested at once, and a polite one is served meanwhile, over and over.
    let (mut served, mut unlisted) = (0, 0);
    while !crowd.is_empty() {
        // Without any patience: there is a place among the attestations, and a view.
        call(&polite, Patience::NONE).await.unwrap();
        served += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
        while let Some(done) = crowd.try_join_next() {
            assert_eq!(done.unwrap().unwrap_err().fault(), AttestFault::Unlisted);
            unlisted += 1;
        }
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(served > 10, "{served}");
    assert_eq!(unlisted, 20 * CALLS);
    let most = began.elapsed().as_secs_f64() * 4.0 + 5.0;
    assert!(f64::from(u32::try_from(kubelet.requests()).unwrap()) <= most, "{} requests", kubelet.requests());
}

#[tokio::test]
async fn those_who_wait_are_bounded_and_so_is_one_pod() {
    let kubelet = FakeKubelet::start(listed(&[]));
    let attestor = Arc::new(kubelet.attestor(|it| it.max_poll_attempts = 3));
    let limits = Limits::default();
    let questions = asking(&attestor, &["k8s:ns:ns1"]);
    let peer = caller(1, 1);
    let mut crowd = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let admitted = limits.admit(Arc::clone(&peer), Method::FetchX509Svid, Patience::USUAL).await.unwrap();
        let (attestor, questions) = (Arc::clone(&attestor), Arc::clone(&questions));
        crowd.spawn(async move { attestor.attest(admitted, &questions).await });
        tokio::task::yield_now().await;
    }
    let mut faults: Vec<AttestFault> = Vec::new();
    while let Some(done) = crowd.join_next().await {
        faults.push(done.unwrap().unwrap_err().fault());
    }
    let busy = faults.iter().filter(|fault| **fault == AttestFault::Busy).count();
    assert_eq!(busy, 36, "64 of one pod wait");
}

#[tokio::test]
async fn an_optional_attestor_that_cannot_tell_costs_identities_and_no_call() {
    let kubelet = FakeKubelet::start(Reply::With(403, "", String::new()));
    let mut settings = kubelet.settings(|_| {});
    settings.k8s.optional = true;
    let subject = attest(&Attestor::new(settings), &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap();
    assert_eq!(of_pod(&subject), [""; 0]);
    assert!(!subject.is_empty(), "the other attestor");
}

#[tokio::test]
async fn what_two_attestors_find_belongs_to_one_entry() {
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let mut settings = kubelet.settings(|_| {});
    settings.unix.settings.discover_workload_path = true;
    let attestor = Attestor::new(settings);
    let path = format!("unix:path:{}", std::env::current_exe().unwrap().display());
    let uid = format!("unix:uid:{}", nix::unistd::geteuid());
    for entry in [format!("k8s:ns:ns1 {path}"), format!("k8s:ns:ns1 {uid} {path}"), format!("{path} {uid}")] {
        let found = attest(&attestor, &caller(1, 1), &[&entry]).await.unwrap();
        assert!(found.iter().any(|it| it.to_string() == path), "{entry}: {found:?}");
    }
    let found = attest(&attestor, &caller(1, 1), &["k8s:ns:ns1", &format!("unix:uid:4294967294 {path}")])
        .await
        .unwrap();
    assert!(!found.iter().any(|it| it.to_string() == path), "nobody needs it: {found:?}");
}

fn namespace(labels: &Value) -> Reply {
    let body = json!({"kind": "Namespace", "metadata": {"name": "ns1", "labels": labels}});
    Reply::With(200, JSON, body.to_string())
}

/// Has the labels of namespaces be asked for at `api`.
fn with_namespaces(api: &FakeKubelet) -> impl FnOnce(&mut K8sSettings) {
    let (address, ca, token) = (format!("127.0.0.1:{}", api.port), api.ca.clone(), api.token.clone());
    move |it| {
        it.enable_namespace_labels = true;
        it.api_server_address = Some(address);
        it.api_server_ca_path = ca;
        it.api_server_token_path = token;
    }
}

#[tokio::test]
async fn the_labels_of_a_namespace_are_found_where_an_entry_asks_for_one() {
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let api = FakeKubelet::start_api_server(namespace(
        &json!({"team": "blue", "kubernetes.io/metadata.name": "ns1"}),
    ));
    let metrics = Metrics::default();
    let attestor = kubelet.attestor(with_namespaces(&api)).counted_by(metrics.registry());
    let asks = ["k8s:ns-label:team:blue"];
    let found = of_pod(&attest(&attestor, &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap());
    assert!(!found.iter().any(|it| it.starts_with("ns-label:")), "nobody asks: {found:?}");
    assert_eq!(api.requests(), 0);
    for _ in 0..3 {
        let found = of_pod(&attest(&attestor, &caller(1, 1), &asks).await.unwrap());
        for label in ["ns-label:team:blue", "ns-label:kubernetes.io/metadata.name:ns1", "sa:sa1"] {
            assert!(found.contains(&label.to_owned()), "{label}: {found:?}");
        }
    }
    assert_eq!(api.requests(), 1, "one answer serves all");
    let counted = "durward_api_server_requests_total{result=\"ok\"} 1";
    assert!(metrics.render().contains(counted), "{}", metrics.render());

    let off = kubelet.attestor(|_| {});
    let found = of_pod(&attest(&off, &caller(1, 1), &asks).await.unwrap());
    assert!(!found.iter().any(|it| it.starts_with("ns-label:")), "{found:?}");
}

#[tokio::test]
async fn what_the_api_server_cannot_say_costs_those_alone_who_may_need_it() {
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let labels: serde_json::Map<String, Value> = (0..1100).map(|n| (n.to_string(), json!(""))).collect();
    for (case, reply, want) in [
        (
            "401",
            Reply::With(401, "", "no".into()),
            "it must be the token of a service account of this cluster",
        ),
        ("403", Reply::With(403, "", "no".into()), "allow its service account get on namespaces: no"),
        ("404", Reply::With(404, "", "gone".into()), "on namespaces response of 127.0.0.1:"),
        ("HTML", Reply::With(200, HTML, "<html>".into()), "is \"text/html\" and no namespace"),
        (
            "another",
            Reply::With(200, JSON, r#"{"kind":"Namespace"}"#.into()),
            "not the Namespace that was asked for",
        ),
        ("100 MB", Reply::Bytes(100_000_000), "it is larger than"),
        ("nothing", Reply::Nothing, "has not said which labels namespace \"ns1\" has"),
        ("too many labels", namespace(&json!(labels)), "more than 1024 labels"),
    ] {
        let api = FakeKubelet::start_api_server(reply.clone());
        let large = matches!(reply, Reply::Bytes(..));
        let with = with_namespaces(&api);
        let attestor = kubelet.attestor(|it| {
            with(it);
            it.max_poll_attempts = if large { 100 } else { 2 };
        });
        let error = attest(&attestor, &caller(1, 1), &["k8s:ns-label:team:blue"]).await.unwrap_err();
        assert!(whole(&error).contains(want), "{case}: {}", whole(&error));
        assert_eq!((error.fault(), error.blame()), (AttestFault::Unreadable, Blame::Fault), "{case}");
        // An entry that cannot be this one's for another reason costs nothing, not even a request.
        let requests = api.requests();
        let others =
            ["k8s:ns-label:team:blue k8s:ns:other", "k8s:ns:ns1", "unix:uid:1 k8s:ns-label:a:b k8s:sa:other"];
        let found = attest(&attestor, &caller(1, 1), &others).await.unwrap();
        assert!(of_pod(&found).contains(&"ns:ns1".to_owned()), "{case}");
        assert_eq!(api.requests(), requests, "{case}");
    }
    let mut nowhere = kubelet.settings(|_| {});
    nowhere.k8s.settings.enable_namespace_labels = true;
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
        let error = attest(&Attestor::new(nowhere), &caller(1, 1), &["k8s:ns-label:a:b"]).await.unwrap_err();
        assert!(whole(&error).contains("set api_server_address"), "{}", whole(&error));
    }
}

#[tokio::test]
async fn without_containers_the_pod_is_enough() {
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let attestor = kubelet.attestor(|it| it.disable_container_selectors = true);
    for container in [1, 77] {
        let found = of_pod(&attest(&attestor, &caller(1, container), &["k8s:ns:ns1"]).await.unwrap());
        assert!(found.contains(&"sa:sa1".to_owned()), "{container}");
        assert!(!found.iter().any(|it| it.starts_with("container-")), "{container}: {found:?}");
    }
}

/// Set for a process that asks the kubelet: its port, and the files with its CA and the token.
const ASKS: &str = "DURWARD_TEST_ASKS_KUBELET";

/// A line of this process's status, in KiB.
fn of_status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Not a test of its own: a process that asks once, and then again as soon as it is told, and says how much memory that took.
#[tokio::test]
async fn as_one_who_asks() {
    let Some(place) = std::env::var_os(ASKS) else { return };
    let place = place.into_string().unwrap();
    let [port, ca, token] = place.split('|').collect::<Vec<_>>().try_into().unwrap();
    let mut settings = AttestSettings::default();
    settings.k8s.enabled = true;
    settings.k8s.settings = K8sSettings {
        kubelet_secure_port: Some(port.parse().unwrap()),
        kubelet_ca_path: ca.into(),
        token_path: token.into(),
        node_name_env: "DURWARD_TEST_NO_SUCH_VARIABLE".to_owned(),
        max_poll_attempts: 60,
        ..K8sSettings::default()
    };
    let attestor = Attestor::new(settings);
    attest(&attestor, &caller(1, 1), &["k8s:ns:ns1"]).await.unwrap();
    println!("\nthere");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let _some = durward::os::heap::trim();
    // The most is counted anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, program) = (of_status("VmRSS"), of_status("RssFile"));
    let found = attest(&attestor, &caller(7, 7), &["k8s:ns:bench"]).await;
    // Not the pages of the program that it took to read the list.
    let more = of_status("RssFile").saturating_sub(program);
    let took = of_status("VmHWM").saturating_sub(before + more);
    println!("\ntook {took} {} {}", attestor.kept_bytes(), found.is_ok());
}

#[test]
fn a_list_is_read_in_little_memory_whatever_it_holds() {
    let usual = |pods: u32| listed(&(0..pods).map(usual_pod).collect::<Vec<_>>());
    let changed = |change: fn(&mut Value)| {
        let mut pods: Vec<Value> = (0..250).map(usual_pod).collect();
        change(&mut pods[100]);
        listed(&pods)
    };
    let string = |bytes: usize| Reply::With(200, JSON, format!("{{\"kind\": \"{}\"}}", "x".repeat(bytes)));
    let of_all = |annotation: usize| {
        let mut pods: Vec<Value> = (0..110).map(usual_pod).collect();
        pods.iter_mut().for_each(|it| it["metadata"]["annotations"]["a"] = json!("x".repeat(annotation)));
        listed(&pods)
    };
    for (case, reply, kib, is_found) in [
        ("250 usual pods", usual(250), 1024, true),
        ("500 usual pods", usual(500), 4096, true),
        (
            "a label of a megabyte",
            changed(|it| it["metadata"]["labels"]["app"] = json!("x".repeat(1_000_000))),
            4096,
            true,
        ),
        (
            "a megabyte of labels",
            changed(|it| {
                let labels = (0..10_000).map(|n| (format!("label-{n}"), json!("x".repeat(90))));
                it["metadata"]["labels"] = labels.collect::<serde_json::Map<_, _>>().into();
            }),
            2048,
            true,
        ),
        ("110 annotations of 256 KB", of_all(256 * 1024), 2048, true),
        ("a string of 30 MB", string(30_000_000), 6144, false),
        ("100 MB", Reply::Bytes(100_000_000), 1024, false),
    ] {
        let kubelet = FakeKubelet::start(listed(&[pod(1)]));
        let place = format!("{}|{}|{}", kubelet.port, kubelet.ca.display(), kubelet.token.display());
        let mut asks = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kubernetes::as_one_who_asks", "--nocapture"])
            .env(ASKS, place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(asks.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|line| line == "there"), "{case}");
        kubelet.says(reply);
        writeln!(asks.stdin.take().unwrap()).unwrap();
        let took = lines.find_map(|line| Some(line.strip_prefix("took ")?.to_owned())).expect(case);
        assert!(asks.wait().unwrap().success(), "{case}");
        let [took, kept, found] = took.split(' ').collect::<Vec<_>>().try_into().unwrap();
        println!("{case}: {took} KiB, of which {kept} bytes are kept");
        assert_eq!(found.parse(), Ok(is_found), "{case}");
        assert!(took.parse::<u64>().unwrap() < kib, "{case}: {took} KiB");
    }
}
