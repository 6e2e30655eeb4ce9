//! What the fuzz targets do with their input: one function per target, each with the invariants that no input may
//! break. libFuzzer calls them through `targets/`, and `cargo test` with every file of `corpus/`.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    encoding::AsDer as _,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use durward::{
    api::claims::claims_to_struct,
    attest::{
        k8s::pods::{MOST_PODS, PodList},
        status,
        unix::mounts::{self, ServedBy},
    },
    config::{Config, ExpandEnv, FileError, Input, diff},
    identity::{
        Bundle, Selector, SpiffeId, TrustDomain,
        bundle::{JwtAuthority, JwtPublicKey, MAX_KEYS},
        jwt,
        spiffe_id::{MAX_LEN, MAX_TRUST_DOMAIN_LEN},
    },
    limits::{CallerKey, GatePlan},
    peer::{
        cgroup::{self, KubeletRoot},
        frames::{Flood, FrameBudget},
        passage::Passage,
        pod::ContainerId,
    },
};
use serde_json::{Map, Value};
use tokio::{io::ReadBuf, time::Instant};

/// A target: panics when its input breaks an invariant.
pub type Target = fn(&[u8]);

/// Every target by its name: the name of its file in `targets/` and of its folder in `corpus/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("bundle", bundle),
    ("cgroup", cgroup),
    ("config", config),
    ("jwt", jwt),
    ("mounts", mounts),
    ("pods", pods),
    ("selector", selector),
    ("spiffe_id", spiffe_id),
    ("status", status),
    ("wire", wire),
];

/// A SPIFFE ID is what the grammar of the standard says, no more and no less, and its parts make up its text.
pub fn spiffe_id(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = SpiffeId::parse(text);
    assert_eq!(parsed.is_ok(), is_spiffe_id(text), "{text:?}: {parsed:?}");
    if let Ok(id) = parsed {
        assert_eq!(id.as_str(), text);
        assert_eq!(format!("{}{}", id.trust_domain().id_string(), id.path()), text);
        assert!(id.is_member_of(&id.trust_domain()));
        assert_eq!(SpiffeId::parse_workload(text).is_ok(), !id.path().is_empty());
        assert_eq!(TrustDomain::parse(text).as_ref(), Ok(&id.trust_domain()));
    }
    if let Ok(trust_domain) = TrustDomain::parse(text) {
        assert!(is_spiffe_id(&trust_domain.id_string()));
        assert_eq!(TrustDomain::parse(trust_domain.name()), Ok(trust_domain));
    }
}

/// The grammar of SPIFFE-ID, section 2, spelt another way than in the parser.
fn is_spiffe_id(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let mut parts = rest.split('/');
    let name = parts.next().unwrap_or_default();
    let in_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
    let in_path = |c: char| in_name(c) || c.is_ascii_uppercase();
    text.len() <= MAX_LEN
        && (1..=MAX_TRUST_DOMAIN_LEN).contains(&name.len())
        && name.chars().all(in_name)
        && parts.all(|part| !["", ".", ".."].contains(&part) && part.chars().all(in_path))
}

/// A selector is split at its first colon and put together again.
pub fn selector(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Selector::parse(text) {
        Ok(selector) => {
            assert_eq!(selector.to_string(), text);
            assert_eq!(format!("{}:{}", selector.kind(), selector.value()), text);
            assert!(
                !selector.kind().is_empty() && !selector.kind().contains(':') && !selector.value().is_empty()
            );
        }
        Err(_) => {
            assert!(!text.contains(':') || text.starts_with(':') || text.find(':') == Some(text.len() - 1))
        }
    }
}

/// When the tokens of [`jwt`] are validated, in seconds since 1970.
const NOW: u64 = 1_700_000_000;

/// A token whose private key nobody has any more, and the bundle that verifies it.
const GOOD_TOKEN: &str = include_str!("corpus/jwt/good.jwt");
const GOOD_BUNDLE: &str = include_str!("corpus/bundle/good.json");

/// Verifies [`GOOD_TOKEN`] as `good` and what is signed here as `signer`.
static JWT_BUNDLE: LazyLock<Bundle> = LazyLock::new(|| {
    let trust_domain = TrustDomain::parse("example.org").expect("a trust domain");
    let mut bundle = Bundle::parse_spiffe(&trust_domain, GOOD_BUNDLE.as_bytes()).expect("a bundle");
    let public = SIGNER.public_key().as_der().expect("a public key");
    let key = JwtPublicKey::from_spki(public.as_ref()).expect("a P-256 key");
    bundle.jwt_authorities.push(JwtAuthority { kid: "signer".into(), key, not_after: None });
    bundle
});

static SIGNER: LazyLock<EcdsaKeyPair> =
    LazyLock::new(|| EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key"));

/// No text validates but the one that was signed; and whatever is signed, as header or as claims, validates only as
/// what it is.
pub fn jwt(data: &[u8]) {
    if let Ok(token) = std::str::from_utf8(data) {
        assert_eq!(validate(token).is_ok(), token == GOOD_TOKEN, "{token:?}");
    }

    if let Ok(valid) = validate(&signed(br#"{"alg":"ES256","kid":"signer"}"#, data)) {
        let claims: Map<String, Value> = serde_json::from_slice(data).expect("claims that validate are JSON");
        assert_eq!(claims, valid.claims);
        assert_eq!(claims.get("sub").and_then(Value::as_str), Some(valid.spiffe_id.as_str()));
        assert_eq!(valid.spiffe_id.trust_domain_name(), "example.org");
        let aud = claims.get("aud").expect("an audience");
        assert!(
            aud == "api" || aud.as_array().is_some_and(|aud| aud.iter().any(|aud| aud == "api")),
            "{aud}"
        );
        let seconds = |claim| claims.get(claim).and_then(Value::as_f64);
        assert!(seconds("exp").is_some_and(|exp| exp >= 1_699_999_940.0), "{claims:?}");
        assert!(seconds("nbf").is_none_or(|nbf| nbf < 1_700_000_061.0), "{claims:?}");
        assert!(seconds("iat").is_none_or(|iat| iat < 1_700_000_061.0), "{claims:?}");
        let mut restricted = valid.claims;
        jwt::restrict_foreign(&mut restricted, &["role".to_owned()]);
        assert!(restricted.keys().all(|claim| ["sub", "exp", "aud", "role"].contains(&claim.as_str())));
        assert_eq!(claims_to_struct(claims.clone()).fields.len(), claims.len());
    }

    let claims = format!(r#"{{"sub":"spiffe://example.org/web","aud":"api","exp":{NOW}}}"#);
    if validate(&signed(data, claims.as_bytes())).is_ok() {
        let header: Map<String, Value> =
            serde_json::from_slice(data).expect("a header that validates is JSON");
        assert_eq!(header.get("alg").and_then(Value::as_str), Some("ES256"));
        assert_eq!(header.get("kid").and_then(Value::as_str), Some("signer"));
        assert!(header.get("crit").is_none_or(Value::is_null));
    }
}

fn validate(token: &str) -> Result<jwt::Validated, jwt::JwtError> {
    let own = |trust_domain: &TrustDomain| (JWT_BUNDLE.trust_domain == *trust_domain).then_some(&*JWT_BUNDLE);
    let now: SystemTime = UNIX_EPOCH + Duration::from_secs(NOW);
    jwt::validate(token, "api", own, now)
}

fn signed(header: &[u8], claims: &[u8]) -> String {
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = SIGNER.sign(&SystemRandom::new(), message.as_bytes()).expect("a signature");
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// A bundle that parses is within its bounds and the same after it was written and parsed again.
pub fn bundle(data: &[u8]) {
    let trust_domain = TrustDomain::parse("example.org").expect("a trust domain");
    let pem = Bundle::parse_pem(&trust_domain, data);
    if let Ok(bundle) = &pem {
        assert!(!bundle.x509_authorities.is_empty() && bundle.jwt_authorities.is_empty());
    }
    let spiffe = Bundle::parse_spiffe(&trust_domain, data);
    let spki = JwtPublicKey::from_spki(data).map(|key| Bundle {
        trust_domain: trust_domain.clone(),
        x509_authorities: Vec::new(),
        jwt_authorities: vec![JwtAuthority { kid: "spki".into(), key, not_after: None }],
    });
    for bundle in [pem.ok(), spiffe.ok(), spki.ok()].into_iter().flatten() {
        assert!(bundle.x509_authorities.len() + bundle.jwt_authorities.len() <= MAX_KEYS);
        assert!(bundle.jwt_authorities.is_sorted_by(|a, b| a.kid < b.kid), "{bundle:?}");
        assert_eq!(bundle.x509_der().len(), bundle.x509_authorities.iter().map(Vec::len).sum::<usize>());
        // An authority may have a key that a JWK of this agent does not show (Ed25519).
        if let Ok(json) = bundle.to_spiffe_json(None) {
            assert_eq!(
                Bundle::parse_spiffe(&trust_domain, json.as_bytes()).expect("what was written"),
                bundle
            );
        }
        let jwks: Value = serde_json::from_str(&bundle.jwks()).expect("JSON");
        let kids = bundle.jwt_authorities.iter().map(|authority| Value::from(&*authority.kid));
        let keys = jwks.get("keys").and_then(Value::as_array).expect("keys");
        assert!(keys.iter().map(|key| key.get("kid").cloned().unwrap_or_default()).eq(kids), "{jwks}");
    }
}

/// A configuration is checked whole, and the same each time: either every promise of [`Config`] holds, or there are
/// mistakes, each with a place that exists. What follows a NUL is the text of a drop-in file.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (text, drop_in) = text.split_once('\0').unwrap_or((text, ""));
    check_config(text, drop_in, ExpandEnv::No);
    if text.contains('$') || drop_in.contains('$') {
        check_config(text, drop_in, ExpandEnv::With(&|name| name.chars().next().map(|c| c.to_string())));
    }
}

fn check_config(text: &str, drop_in: &str, expand_env: ExpandEnv<'_>) {
    let path = Path::new("/etc/durward/agent.conf");
    let drop_ins = |folder: &Path| Ok(Some(vec![(folder.join("one.conf"), Ok(drop_in.to_owned()))]));
    let read_file = |path: &Path| match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => Ok(GOOD_BUNDLE.as_bytes().to_vec()),
        Some("pem") => Ok(include_bytes!("corpus/bundle/ca.pem").to_vec()),
        _ => Err(FileError::Missing(path.to_owned())),
    };
    let input = Input {
        path,
        text,
        base: Path::new("/srv"),
        expand_env,
        given: &[],
        drop_ins: &drop_ins,
        user_id: &|name| Ok((name == "build").then_some(1000)),
        read_file: &read_file,
    };
    let parsed = Config::parse(&input);
    match &parsed {
        Ok(config) => {
            let own = &config.trust_domain;
            let ids: BTreeSet<&str> = config.entries.iter().map(|entry| entry.id.as_str()).collect();
            assert_eq!(ids.len(), config.entries.len(), "entries have their own IDs");
            for entry in &config.entries {
                assert!(entry.spiffe_id.is_member_of(own) && !entry.spiffe_id.is_reserved(), "{entry:?}");
                assert!(!entry.spiffe_id.path().is_empty() && !entry.selectors.is_empty(), "{entry:?}");
            }
            assert!(
                config.federated.iter().all(|(name, bundle)| name != own && bundle.trust_domain == *name)
            );
            let paths: [Option<&PathBuf>; 4] = [
                Some(&config.agent.socket_path),
                Some(&config.agent.data_dir),
                config.agent.admin_socket_path.as_ref(),
                config.log.file.as_ref(),
            ];
            assert!(paths.into_iter().flatten().all(|path| path.is_absolute()));
            assert!(diff(config, config).is_empty());
            let plan = GatePlan::new(&config.ratelimit, 1 << 30, 1 << 30);
            assert!(plan.is_ok(), "what is read can be put in force: {plan:?}");
            let mut patterns = config.ratelimit.identity.overrides.patterns();
            assert!(patterns.all(|pattern| pattern.trust_domain() == own), "all can match");
        }
        Err(errors) => {
            assert!(!errors.list().is_empty());
            // Only without variables is the text that was read the text that is here.
            let lines = |text: &str| match expand_env {
                ExpandEnv::No => text.split('\n').count(),
                ExpandEnv::With(_) => usize::MAX,
            };
            for error in errors.list() {
                let most = lines(if error.file == path { text } else { drop_in });
                assert!(usize::try_from(error.line).is_ok_and(|line| line <= most), "{error:?}");
                assert_eq!(error.line == 0, error.column == 0, "{error:?}");
                assert!(!error.message.is_empty() && !error.message.ends_with('.'), "{error:?}");
            }
        }
    }
    assert_eq!(Config::parse(&input), parsed, "the same text means the same");
}

/// What the kubelet lists: an answer that is cut or changed is an error or a list, and the same text means the same.
pub fn pods(data: &[u8]) {
    let (read, again) = (PodList::read(data), PodList::read(data));
    assert_eq!(read.is_ok(), again.is_ok());
    let (Ok(read), Ok(again)) = (read, again) else { return };
    assert_eq!(read.len(), again.len());
    assert!(read.len() <= MOST_PODS);
    let Some(CallerKey::Pod(pod)) = CallerKey::parse_pod("2c48913c-b29f-11e7-9350-020968147796") else {
        return;
    };
    let Some(container) = ContainerId::parse(&[b'a'; 64]) else { return };
    let found = read.find(pod, container).map(|found| found.map(|found| found.is_listed()));
    assert_eq!(found, again.find(pod, container).map(|found| found.map(|found| found.is_listed())));
}

/// A pod that is found stands in the text, whatever is below it; below a user's cgroup there is none, and a second
/// one is a doubt. What stands before a NUL is the kubelet's root.
pub fn cgroup(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let (first, second) = (parts.next().unwrap_or_default(), parts.next());
    let named = second.and_then(|_| KubeletRoot::parse(std::str::from_utf8(first).ok()?).ok());
    if let Some(root) = &named {
        assert_eq!(root.to_string().as_bytes(), first);
    }
    let text = second.unwrap_or(first);
    // As who is in the same containers sees it.
    let usual = KubeletRoot::default().seen_from(text);
    for root in [Some(usual.clone()), named].into_iter().flatten() {
        let pod = cgroup::pod_uid(text, &root);
        let found = cgroup::find(text, &root);
        assert_eq!(found.map(|found| found.place.pod), pod);

        let mut lines = text.strip_suffix(b"\n").unwrap_or(text).split(|byte| *byte == b'\n');
        let of_user: Vec<u8> = lines.clone().flat_map(below_user).collect();
        assert_eq!(cgroup::pod_uid(&of_user, &root), None, "{}", String::from_utf8_lossy(&of_user));

        let Some(found) = found else { continue };
        assert!(lines.any(|line| line == found.line));
        assert_eq!(cgroup::pod_uid(found.line, &root), pod);
        let deeper = [found.line, b"/../../kubepods/pod00000000-0000-0000-0000-000000000000"].concat();
        assert_eq!(cgroup::pod_uid(&deeper, &root), pod, "below a pod");
        let text = [text.strip_suffix(b"\n").unwrap_or(text), b"\n"].concat();
        assert_eq!(cgroup::pod_uid(&[&text[..], b"0::/init.scope\n"].concat(), &root), pod);
        assert_eq!(cgroup::pod_uid(&[&text[..], b"half a line"].concat(), &root), None);
        if root == usual && pod != Some([0; 16]) {
            let other: &[u8] = b"1:cpu:/kubepods/pod00000000-0000-0000-0000-000000000000\n";
            assert_eq!(cgroup::pod_uid(&[&text[..], other].concat(), &root), None, "two pods");
        }
    }
}

/// A line whose path stands where every user may make cgroups.
fn below_user(line: &[u8]) -> Vec<u8> {
    let mut fields = line.splitn(3, |byte| *byte == b':');
    let mut field = || fields.next().unwrap_or_default();
    [field(), b":", field(), b":/user.slice/user-1000.slice", field(), b"\n"].concat()
}

/// A status that parses is the one that the kernel writes for it, whatever its process is called; a line that stands
/// twice is refused wherever it stands; only a status that is not whole may become another one with more to read.
pub fn status(data: &[u8]) {
    let parsed = status::parse(data);
    if let Ok(status) = &parsed {
        let status::ProcStatus { uid, gid, groups } = status;
        assert!(groups.len() <= status::MAX_GROUPS);
        let groups: String = groups.iter().map(|group| format!("{group} ")).collect();
        let text = format!("Uid:\t1\t{uid}\t2\t3\nGid:\t4\t{gid}\t5\t6\nGroups:\t{groups}\n");
        assert_eq!(status::parse(text.as_bytes()).as_ref(), Ok(status));
        let twice = Err(status::StatusError::Twice("Uid"));
        assert_eq!(status::parse(&[b"Uid:\t0\t0\t0\t0\n", data].concat()), twice);
        if data.ends_with(b"\n") {
            assert_eq!(status::parse(&[data, b"Uid:\t0\t0\t0\t0\n"].concat()), twice);
        }
    }
    assert_eq!(status::parse(&[b"Name:\tUid:\\n\n", data].concat()), parsed);
    if !matches!(parsed, Ok(_) | Err(status::StatusError::Missing(_))) {
        assert_eq!(status::parse(&[data, b"\nUid:\t0\t0\t0\t0\nGid:\t0\nGroups:\t0 \n"].concat()), parsed);
    }
    if data.ends_with(b"\n") {
        assert_eq!(status::parse(&[data, b"Uid:\t0\t0\t0\t0"].concat()), parsed, "half a line");
    }
}

/// However the bytes of a connection arrive, the same ones pass; none is changed but to what an authority is written over
/// with, and none is added but the value of an empty one; what has passed once passes unchanged.
pub fn wire(data: &[u8]) {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    if !data.starts_with(PREFACE) {
        assert_eq!(pass(data, usize::MAX), Ok(data.to_vec()), "what is not HTTP/2 passes as it is");
    }
    let connection = [PREFACE, data].concat();
    let passed = pass(&connection, usize::MAX);
    for chunk in [1, 7, 64] {
        assert_eq!(pass(&connection, chunk), passed, "in chunks of {chunk}");
    }
    let Ok(passed) = passed else { return };
    assert_eq!(pass(&passed, usize::MAX).as_ref(), Ok(&passed), "a second time");
    let (before, after) = (frames(&connection[PREFACE.len()..]), frames(&passed[PREFACE.len()..]));
    // The beginning of the last may be kept back.
    assert!(before.len() == after.len() || before.len() == after.len() + 1);
    let mut streams = 0;
    for ((head, length, was), (same_head, _, is)) in before.iter().zip(&after) {
        // Fields behind a body are refused for having no end.
        let [kind, _, number @ ..] = *head;
        let stream = u32::from_be_bytes(number) & 0x7fff_ffff;
        let mut expected = *head;
        if kind == 1 && (1..=streams).contains(&stream) && (*length > 0 || head[1] & 4 == 0) {
            expected[1] &= !1;
        }
        streams = if kind == 1 { streams.max(stream) } else { streams };
        assert_eq!(expected, *same_head);
        // So many bytes were added before this one, in one of the ways there are.
        let mut added = BTreeSet::from([0]);
        for (at, byte) in was.iter().enumerate().take(if is.len() < was.len() { is.len() } else { was.len() })
        {
            let mut then = BTreeSet::new();
            for before in added {
                let rest = is.get(at + before..).unwrap_or_default();
                // Zeros, plain or coded, of whose last byte some bits are padding.
                let written = |it: &u8| it == byte || matches!(*it, b'0' | 0 | 1 | 3 | 7 | 15);
                if rest.first().is_some_and(written) {
                    then.insert(before);
                }
                if matches!(*byte, 0 | 0x80) && rest.starts_with(&[1, b'0']) {
                    then.insert(before + 1);
                }
                if *byte == 0x81 && rest.starts_with(&[1, 1, b'0']) {
                    then.insert(before + 2);
                }
            }
            added = then;
        }
        assert!(is.len() < was.len() || added.contains(&(is.len() - was.len())), "{was:x?} became {is:x?}");
    }
}

/// The frames: of each its head without the length, that, and as much of its payload as is there.
fn frames(mut bytes: &[u8]) -> Vec<([u8; 6], usize, &[u8])> {
    let mut frames = Vec::new();
    while let Some(([l0, l1, l2, head @ ..], rest)) = bytes.split_first_chunk::<9>() {
        let length = usize::try_from(u32::from_be_bytes([0, *l0, *l1, *l2])).expect("64 bits");
        let (payload, next) = rest.split_at(length.min(rest.len()));
        frames.push((*head, length, payload));
        bytes = next;
    }
    frames
}

/// What passes of `bytes` when they arrive in chunks of this length. Time stands still.
fn pass(bytes: &[u8], chunk: usize) -> Result<Vec<u8>, Flood> {
    let now = Instant::now();
    let mut passage = Passage::new(FrameBudget::DEFAULT, now);
    let mut out = Vec::new();
    let mut space = vec![0; bytes.len().min(chunk)];
    for chunk in bytes.chunks(chunk) {
        let mut buf = ReadBuf::new(&mut space);
        buf.put_slice(chunk);
        passage.pass(&mut buf, 0, || now)?;
        out.extend_from_slice(buf.filled());
        while passage.waits() {
            buf.clear();
            passage.take(&mut buf);
            out.extend_from_slice(buf.filled());
        }
    }
    Ok(out)
}

/// The first line with a mount's number and the fields that the kernel writes says what it shows; how the text is cut into
/// pieces makes no difference.
pub fn mounts(data: &[u8]) {
    const LONG: usize = 16 * 1024;
    let Some((number, text)) = data.split_first() else { return };
    if text.split(|b| *b == b'\n').any(|line| line.len() > LONG) {
        return;
    }
    let id = u64::from(*number);
    let found = mounts::find(text, id).expect("no error of its own");
    let whole_lines = text.split_inclusive(|b| *b == b'\n').filter_map(|line| line.strip_suffix(b"\n"));
    let expected = whole_lines.filter_map(|line| shows(line)).find(|(it, _)| *it == id);
    assert_eq!(found.is_some(), expected.is_some(), "{}", String::from_utf8_lossy(text));
    if let (Some(found), Some((_, fs_type))) = (found, expected) {
        let fuse = fs_type.strip_prefix(b"fuse".as_slice());
        let fuse = fuse.map(|rest| rest.strip_prefix(b"blk".as_slice()).unwrap_or(rest));
        let is_fuse = fuse.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"."));
        assert_eq!(found.served_by == ServedBy::Program, is_fuse);
    }
    let halves = text.split_at(text.len() / 2);
    assert_eq!(mounts::find(std::io::Read::chain(halves.0, halves.1), id).ok(), Some(found));
}

/// The number and the type of a line of mountinfo, by proc_pid_mountinfo(5).
fn shows(line: &[u8]) -> Option<(u64, &[u8])> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u64>().ok();
    let (id, _parent) = (number(fields.first()?)?, number(fields.get(1)?)?);
    let (major, minor) = std::str::from_utf8(fields.get(2)?).ok()?.split_once(':')?;
    let _device = (number(major.as_bytes())?, number(minor.as_bytes())?);
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    let fs_type = fields.get(dash + 1).filter(|name| !name.is_empty())?;
    Some((id, fs_type))
}
