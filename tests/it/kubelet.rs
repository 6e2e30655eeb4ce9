//! A kubelet or an API server of a test's own, by TLS, and pods for it to list.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What the kubelet does with a request.
#[derive(Clone)]
pub(crate) enum Reply {
    /// Answers with this status, these headers and this body.
    With(u16, &'static str, String),
    /// The same, and the token must be this one.
    ToToken(&'static str, String),
    /// Takes the request and says nothing.
    Nothing,
    /// Sends so many bytes.
    Bytes(usize),
    /// Sends a byte now and then, and never all.
    Slowly,
}

/// A kubelet on a port of its own, by TLS.
pub(crate) struct FakeKubelet {
    pub(crate) port: u16,
    pub(crate) ca: PathBuf,
    pub(crate) other_ca: PathBuf,
    pub(crate) token: PathBuf,
    reply: Arc<Mutex<Reply>>,
    requests: Arc<Mutex<Vec<Instant>>>,
    /// How often somebody connected.
    pub(crate) connections: Arc<AtomicUsize>,
    _dir: TempDir,
}

/// A CA, and its certificate for `name`.
fn certificate(name: &str) -> (String, rustls::pki_types::CertificateDer<'static>, KeyPair) {
    let mut of_ca = CertificateParams::default();
    of_ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(of_ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    (ca.pem(), leaf.der().clone(), key)
}

impl FakeKubelet {
    pub(crate) fn start(reply: Reply) -> Self {
        Self::start_at("/pods", reply)
    }

    /// An API server, as far as one is asked for the namespace of pod 1.
    pub(crate) fn start_api_server(reply: Reply) -> Self {
        Self::start_at("/api/v1/namespaces/ns1", reply)
    }

    fn start_at(path: &'static str, reply: Reply) -> Self {
        let dir = TempDir::new().unwrap();
        let (ca, leaf, key) = certificate("127.0.0.1");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf], key)
            .unwrap();
        let at = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let kubelet = Self {
            port: listener.local_addr().unwrap().port(),
            ca: at("ca.crt", &ca),
            other_ca: at("other-ca.crt", &certificate("127.0.0.1").0),
            token: at("token", "first\n"),
            reply: Arc::new(Mutex::new(reply)),
            requests: Arc::default(),
            connections: Arc::default(),
            _dir: dir,
        };
        let (tls, reply, requests) =
            (Arc::new(tls), Arc::clone(&kubelet.reply), Arc::clone(&kubelet.requests));
        let connections = Arc::clone(&kubelet.connections);
        thread::spawn(move || {
            for stream in listener.incoming() {
                connections.fetch_add(1, Ordering::Relaxed);
                let (tls, reply, requests) = (Arc::clone(&tls), Arc::clone(&reply), Arc::clone(&requests));
                thread::spawn(move || drop(answer(stream.unwrap(), tls, path, &reply, &requests)));
            }
        });
        kubelet
    }

    /// The block of an attestor that asks it.
    pub(crate) fn block(&self) -> String {
        format!(
            "WorkloadAttestor \"k8s\" {{\n plugin_data {{ kubelet_secure_port = {} kubelet_ca_path = \"{}\" \
             token_path = \"{}\" node_name_env = \"DURWARD_TEST_NO_SUCH_VARIABLE\" }} }}\n",
            self.port,
            self.ca.display(),
            self.token.display()
        )
    }

    pub(crate) fn says(&self, reply: Reply) {
        *self.reply.lock().unwrap() = reply;
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

/// Answers what is asked on one connection.
fn answer(
    stream: TcpStream,
    tls: Arc<ServerConfig>,
    path: &str,
    reply: &Mutex<Reply>,
    requests: &Mutex<Vec<Instant>>,
) -> std::io::Result<()> {
    let connection = ServerConnection::new(tls).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    while answer_once(&mut stream, path, reply, requests)? {}
    stream.conn.send_close_notify();
    stream.flush()
}

/// Returns whether the connection stays open.
fn answer_once(
    stream: &mut StreamOwned<ServerConnection, TcpStream>,
    path: &str,
    reply: &Mutex<Reply>,
    requests: &Mutex<Vec<Instant>>,
) -> std::io::Result<bool> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let request = String::from_utf8(request).unwrap();
    assert!(request.starts_with(&format!("GET {path} HTTP/1.1\r\n")), "{request}");
    requests.lock().unwrap().push(Instant::now());
    let reply = reply.lock().unwrap().clone();
    let (status, headers, body) = match reply {
        Reply::With(status, headers, body) => (status, headers, body),
        Reply::ToToken(token, body) if request.contains(&format!("authorization: Bearer {token}\r\n")) => {
            (200, JSON, body)
        }
        Reply::ToToken(..) => (401, "", "Unauthorized".to_owned()),
        Reply::Nothing => {
            stream.read_exact(&mut [0])?;
            return Ok(false);
        }
        Reply::Slowly => {
            write!(stream, "HTTP/1.1 200 OK\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n")?;
            loop {
                write!(stream, "1\r\n \r\n")?;
                stream.flush()?;
                thread::park_timeout(Duration::from_millis(50));
            }
        }
        Reply::Bytes(most) => {
            write!(stream, "HTTP/1.1 200 OK\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n")?;
            let chunk = " ".repeat(0x10000);
            for _ in 0..most / chunk.len() {
                write!(stream, "10000\r\n{chunk}\r\n")?;
            }
            return Ok(false);
        }
    };
    write!(stream, "HTTP/1.1 {status} X\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())?;
    stream.flush()?;
    Ok(headers != HANGS_UP)
}

/// The headers of an answer after which the connection ends, without a word of that in it.
pub(crate) const HANGS_UP: &str = "Content-Type: application/json; charset=utf-8\r\n";

pub(crate) const JSON: &str = "Content-Type: application/json\r\n";
pub(crate) const HTML: &str = "Content-Type: text/html\r\n";

/// The UID of the n-th pod, and the ID of its container.
pub(crate) fn pod_uid(n: u32) -> String {
    format!("00000000-0000-0000-0000-{n:012}")
}

pub(crate) fn container_id(n: u32) -> String {
    format!("{n:064}")
}

/// The n-th pod, of the service account `saN` in the namespace `nsN`.
pub(crate) fn pod(n: u32) -> Value {
    json!({
        "metadata": {"name": format!("pod-{n}"), "namespace": format!("ns{n}"), "uid": pod_uid(n),
            "labels": {"app": "web", "tier/of": "front"},
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web", "uid": "owner-uid"}]},
        "spec": {"serviceAccountName": format!("sa{n}"), "nodeName": "node1"},
        "status": {
            "containerStatuses": [{"name": "main", "containerID": format!("containerd://{}", container_id(n)),
                "image": "registry/web:1", "imageID": "registry/web@sha256:1"}],
            "initContainerStatuses": [{"name": "init", "containerID": format!("containerd://{}", container_id(n + 1000)),
                "image": "registry/init:1", "imageID": "registry/init@sha256:2"}],
            "ephemeralContainerStatuses": [{"name": "debug", "containerID": format!("containerd://{}", container_id(n + 2000)),
                "image": "busybox", "imageID": "busybox@sha256:3"}],
        },
    })
}

/// The n-th pod, as long as real ones are, which is 4 to 5 KB: one of ten service accounts in the namespace `bench`.
pub(crate) fn usual_pod(n: u32) -> Value {
    let mounts = json!([
        {"name": "config", "mountPath": "/etc/web", "readOnly": true},
        {"name": "spiffe", "mountPath": "/spiffe", "readOnly": true},
        {"name": "kube-api-access-x7k2p", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true},
    ]);
    let env: Vec<Value> =
        (0..12).map(|n| json!({"name": format!("SETTING_{n}"), "value": format!("https://service-{n}.shop.svc.cluster.local:8443")})).collect();
    let probe = json!({"httpGet": {"path": "/healthz", "port": "http", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 10,
        "successThreshold": 1, "failureThreshold": 3});
    let conditions: Vec<Value> = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
        .map(|kind| json!({"type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": "2026-01-01T00:00:00Z"}))
        .to_vec();
    json!({
        "metadata": {"name": format!("web-5d4f7c9b6d-{n:05}"), "generateName": "web-5d4f7c9b6d-", "namespace": "bench", "uid": pod_uid(n),
            "resourceVersion": "123456", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/name": "web", "app.kubernetes.io/instance": "web", "app.kubernetes.io/version": "1.2.3",
                "app.kubernetes.io/component": "front", "app.kubernetes.io/part-of": "shop", "pod-template-hash": "5d4f7c9b6d"},
            "annotations": {"kubernetes.io/config.seen": "2026-01-01T00:00:00.000000000Z", "kubernetes.io/config.source": "api",
                "prometheus.io/scrape": "true", "checksum/config": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d4f7c9b6d",
                "uid": "7f1c1c1e-8f0e-4f4e-9f7a-0d0d0d0d0d0d", "controller": true, "blockOwnerDeletion": true}]},
        "spec": {"serviceAccountName": format!("sa{}", n % 10), "nodeName": "node1", "restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
            "priority": 0, "enableServiceLinks": true, "preemptionPolicy": "PreemptLowerPriority", "schedulerName": "default-scheduler",
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
            "volumes": [{"name": "config", "configMap": {"name": "web", "defaultMode": 420}},
                {"name": "spiffe", "hostPath": {"path": "/run/durward/public", "type": "Directory"}},
                {"name": "kube-api-access-x7k2p", "projected": {"defaultMode": 420, "sources": [
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                    {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}}]}}],
            "containers": [{"name": "web", "image": "registry.example.org/shop/web:1.2.3", "imagePullPolicy": "IfNotPresent", "env": env,
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}], "volumeMounts": mounts,
                "livenessProbe": probe, "readinessProbe": probe,
                "resources": {"limits": {"memory": "256Mi"}, "requests": {"cpu": "100m", "memory": "128Mi"}}}]},
        "status": {"phase": "Running", "conditions": conditions, "hostIP": "192.0.2.10", "podIP": "198.51.100.7",
            "podIPs": [{"ip": "198.51.100.7"}], "startTime": "2026-01-01T00:00:00Z", "qosClass": "Burstable",
            "containerStatuses": [{"name": "web", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "lastState": {}, "ready": true,
                "restartCount": 0, "started": true, "image": "registry.example.org/shop/web:1.2.3",
                "imageID": "registry.example.org/shop/web@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "containerID": format!("containerd://{}", container_id(n))}]},
    })
}

pub(crate) fn listed(pods: &[Value]) -> Reply {
    Reply::With(200, JSON, json!({"kind": "PodList", "apiVersion": "v1", "items": pods}).to_string())
}
