//! ratelimit { } in agent.conf: what is read, what is refused and with which words.

use std::{num::NonZeroU32, path::Path, time::Duration};

use durward::{
    config::{Config, DropIns, ExpandEnv, FileError, Input, diff},
    limits::{
        Attestations, ConnectionSettings, Gate, GatePlaces, GatePlan, GateRule, GateRules, LimitSettings,
        Limits, Method, NodeQuota, RejectionStatus, SoftLimits, TableSize,
        bucket::{Per, Quota},
        budget::{MemoryLimit, MemorySteps},
        caller_pattern::CallerPattern,
        id_pattern::IdPattern,
        method::PerMethod,
        pattern::Pattern,
        policy::{Layers, Methods, Override, Overrides, Share},
        processor::ProcessorShare,
        rule::{Costs, Limit, Origin, Rule},
        schedule::{Moment, Schedule, Weekday, Window},
    },
    os::clock::Clock,
    peer::cgroup::{KubeletRoot, KubernetesMode},
    telemetry::registry::Registry,
};

const LEAST: &str = "issuer \"embedded\" { } agent { trust_domain = \"example.org\" }\n";

fn load(text: &str, files: &[(&str, &str)]) -> Result<Config, String> {
    Config::parse(&Input {
        path: Path::new("agent.conf"),
        text,
        base: Path::new("/base"),
        expand_env: ExpandEnv::No,
        given: &[],
        drop_ins: &|_| {
            let files = files.iter().map(|(path, text)| (Path::new(path).to_owned(), Ok((*text).to_owned())));
            Ok(Some(files.collect::<DropIns>()))
        },
        user_id: &|name| Ok((name == "build").then_some(1000)),
        read_file: &|path| Err(FileError::Missing(path.to_owned())),
    })
    .map_err(|errors| errors.to_string())
}

/// What `ratelimit { inner }` says, on the second line.
fn settings(inner: &str) -> Result<LimitSettings, String> {
    load(&format!("{LEAST}ratelimit {{ {inner} }}"), &[]).map(|config| config.ratelimit)
}

/// A cache that a budget which somebody set cannot hold contradicts it. Without one it is the start that looks.
#[test]
fn a_cache_that_alone_passes_the_budget_is_an_error_at_its_key() {
    const X509: &str = "x509_svid_cache_max_size";
    const JWT: &str = "jwt_svid_cache_max_size";
    let limited = "ratelimit { memory { limit = \"24MiB\" } }";
    for (case, key, size, limit, want) in [
        ("as many as fit", X509, 6144, limited, Ok(())),
        (
            "one more",
            X509,
            6145,
            limited,
            Err(
                "takes 25169920 bytes when it is full, and ratelimit.memory.limit is 25165824, which has room for 6144",
            ),
        ),
        ("as many as fit", JWT, 12_288, limited, Ok(())),
        (
            "the most",
            JWT,
            10_000_000,
            limited,
            Err(
                "takes 20480000000 bytes when it is full, and ratelimit.memory.limit is 25165824, which has room for 12288",
            ),
        ),
        ("no limit is set", X509, 10_000_000, "", Ok(())),
        ("the default", X509, 0, "ratelimit { memory { limit = \"8MiB\" } }", Ok(())),
    ] {
        let text = format!(
            "issuer \"embedded\" {{ }}\nagent {{ trust_domain = \"example.org\"\n{key} = {size} }}\n{limit}"
        );
        let want = want.map_err(|why| format!("agent.conf:3:1: agent.{key} {size}: {why}"));
        assert_eq!(load(&text, &[]).map(|_| ()).map_err(|said| said.trim_end().to_owned()), want, "{case}");
    }
}

fn quota(rate: f64, per: Per, burst: u32) -> Limit {
    Limit::Quota(Quota::new(rate, per, burst).unwrap())
}

fn number(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

fn caller(pattern: &str) -> CallerPattern {
    CallerPattern::parse(pattern, |_| Ok(None)).unwrap()
}

/// A rule of callers.
fn rule(limit: Limit) -> Rule {
    Rule::new(limit, Costs::OF_CALLERS, Schedule::default()).unwrap()
}

fn with_window(limit: Limit, window: Window, instead: Limit) -> Rule {
    let schedule = Schedule::new(vec![(window, instead)]).unwrap();
    let rule = Rule::new(limit, Costs::OF_CALLERS, schedule).unwrap();
    if limit == usual() { by_default(rule) } else { rule }
}

/// A rule whose limit nobody wrote.
fn by_default(rule: Rule) -> Rule {
    rule.of_origin(Origin::ByDefault)
}

/// The usual limit of callers.
fn usual() -> Limit {
    LimitSettings::default().caller.default.limit()
}

fn dry(mut rule: Rule) -> Rule {
    rule.dry_run = true;
    rule
}

/// Sets these overrides, for all methods.
fn over<P: Pattern>(layers: &mut Layers<P>, overrides: Vec<(P, Share<Rule>)>) {
    let each = |(pattern, share)| Override::new(pattern, Methods::All, share).unwrap();
    layers.overrides = Overrides::new(overrides.into_iter().map(each).collect()).unwrap();
}

fn hours(start: u8, stop: u8) -> Window {
    let hour = |hour| Moment { hour: Some(hour), ..Moment::default() };
    Window::new(hour(start), hour(stop)).unwrap()
}

#[test]
fn every_setting_is_read() {
    type Change = fn(&mut LimitSettings);
    let table: [(&str, &str, Change); 34] = [
        ("nothing", "", |_| ()),
        ("empty blocks", "gate { caller { } } caller { costs { } } identity { } node { } memory { }", |_| ()),
        ("off", "dry_run = false caller { exempt = false block = false unlimited = false }", |_| ()),
        ("dry run", "dry_run = true", |s| s.dry_run = true),
        ("status", "rejection_status = \"unavailable\"", |s| {
            s.rejection_status = RejectionStatus::Unavailable;
        }),
        ("keys", "keys = 16", |s| s.keys = TableSize::new(16).unwrap()),
        ("soft limits", "soft_limits = [80, \"95\"]", |s| {
            s.soft_limits = SoftLimits::new(&[80, 95]).unwrap()
        }),
        ("gate", "gate { connections = 1000 reserve = 10 admin = 2 }", |s| {
            s.gate.places = GatePlaces::new(Some(1000), Some(10)).unwrap();
            s.gate.admin = 2;
        }),
        (
            "gate, connection",
            "gate { connection { handshake_timeout = \"2000ms\" idle_timeout = \"90s\" stall_timeout = \"1h\" linger = \"0\" streams = 4 header_bytes = 1024 resets = 1024 } }",
            |s| {
                s.gate.connection = ConnectionSettings {
                    handshake_timeout: Duration::from_secs(2),
                    idle_timeout: Some(Duration::from_secs(90)),
                    stall_timeout: Duration::from_secs(3600),
                    streams: 4,
                    header_bytes: 1024,
                    linger: Duration::ZERO,
                    resets: 1024,
                };
            },
        ),
        ("gate, a connection may stay", "gate { connection { idle_timeout = \"0\" } }", |s| {
            s.gate.connection.idle_timeout = None;
        }),
        ("gate, caller", "gate { caller { connections = 9 rate = 0.5 burst = 3 dry_run = true } }", |s| {
            let rate = quota(0.5, Per::Second, 3);
            let rule = GateRule { connections: Some(number(9)), rate: Some(rate), dry_run: true };
            s.gate.rules = GateRules::new(rule, vec![]).unwrap();
        }),
        (
            "gate, overrides",
            "gate { override \"uid:7\" { connections = 9 } override \"pod:*\" { block = true } }",
            |s| {
                let nine = GateRule { connections: Some(number(9)), ..GateRule::default() };
                let block = GateRule { rate: Some(Limit::Block), ..GateRule::default() };
                let overrides = vec![(caller("uid:7"), nine), (caller("pod:*"), block)];
                s.gate.rules = GateRules::new(GateRule::default(), overrides).unwrap();
            },
        ),
        ("caller", "caller { rate = 1.5 per = \"hour\" burst = 7 }", |s| {
            s.caller.default = rule(quota(1.5, Per::Hour, 7));
        }),
        ("quoted numbers", "caller { rate = \"1.5\" per = \"day\" burst = \"7\" }", |s| {
            s.caller.default = rule(quota(1.5, Per::Day, 7));
        }),
        ("unlimited", "caller { unlimited = true }", |s| s.caller.default = rule(Limit::Unlimited)),
        ("costs", "caller { costs { signature = 3 } }", |s| {
            let costs = Costs::new(1, 3, 5).unwrap();
            s.caller.default = by_default(Rule::new(usual(), costs, Schedule::default()).unwrap());
        }),
        ("method", "caller { method \"ValidateJWTSVID\" { exempt = true } }", |s| {
            s.caller.methods.set(Method::ValidateJwtSvid, Some(rule(Limit::Exempt)));
        }),
        (
            "method takes the limit around it",
            "caller { rate = 9 burst = 9 method \"FetchJWTSVID\" { dry_run = true } }",
            |s| {
                s.caller.default = rule(quota(9.0, Per::Second, 9));
                s.caller.methods.set(Method::FetchJwtSvid, Some(dry(s.caller.default.clone())));
            },
        ),
        (
            "costs and dry run go inwards",
            "caller { dry_run = true costs { answer = 2 } override \"uid:7\" { rate = 9 burst = 9 method \"FetchSecrets\" { rate = 8 burst = 8 dry_run = false } } }",
            |s| {
                let costs = Costs::new(2, 2, 5).unwrap();
                let rule = |limit| Rule::new(limit, costs, Schedule::default()).unwrap();
                s.caller.default = dry(by_default(rule(usual())));
                let each =
                    |methods, rule| Override::new(caller("uid:7"), methods, Share::Each(rule)).unwrap();
                let outer = each(Methods::All, dry(rule(quota(9.0, Per::Second, 9))));
                let inner = each(Methods::only(&[Method::FetchSecrets]), rule(quota(8.0, Per::Second, 8)));
                s.caller.overrides = Overrides::new(vec![outer, inner]).unwrap();
            },
        ),
        ("user", "caller { override \"user:build\" { block = true } }", |s| {
            over(&mut s.caller, vec![(caller("uid:1000"), Share::Each(rule(Limit::Block)))]);
        }),
        (
            "the same block twice is one",
            "caller { override \"uid:7\" { rate = 9 } override \"uid:7\" { burst = 9 } }",
            |s| {
                let nine = rule(quota(9.0, Per::Second, 9));
                over(&mut s.caller, vec![(caller("uid:7"), Share::Each(nine))]);
            },
        ),
        ("share", "caller { override \"uid:1-9\" { share = true } }", |s| {
            over(&mut s.caller, vec![(caller("uid:1-9"), Share::Together(None))]);
        }),
        (
            "schedule",
            "caller { schedule \"night\" { start { hour = 22 } stop { hour = 6 } unlimited = true } }",
            |s| {
                s.caller.default = with_window(usual(), hours(22, 6), Limit::Unlimited);
            },
        ),
        (
            "weekdays",
            "caller { schedule \"end\" { start { weekday = \"sat\" } stop { weekday = \"monday\" } rate = 9 burst = 9 } }",
            |s| {
                let day = |weekday| Moment { weekday: Some(weekday), ..Moment::default() };
                let window = Window::new(day(Weekday::Saturday), day(Weekday::Monday)).unwrap();
                s.caller.default = with_window(usual(), window, quota(9.0, Per::Second, 9));
            },
        ),
        (
            "a method's own limit has its own schedule",
            "caller { schedule \"n\" { start { hour = 1 } stop { hour = 2 } block = true } method \"FetchSecrets\" { rate = 9 burst = 9 } method \"StreamSecrets\" { dry_run = true } }",
            |s| {
                s.caller.default = with_window(usual(), hours(1, 2), Limit::Block);
                s.caller.methods.set(Method::FetchSecrets, Some(rule(quota(9.0, Per::Second, 9))));
                s.caller.methods.set(Method::StreamSecrets, Some(dry(s.caller.default.clone())));
            },
        ),
        ("mask", "identity { override \"spiffe://example.org/ns/{ns}/**\" { share = true } }", |s| {
            let mask = IdPattern::parse("spiffe://example.org/ns/{ns}/**").unwrap();
            over(&mut s.identity, vec![(mask, Share::Together(None))]);
        }),
        ("small bursts of identities", "identity { rate = 2 burst = 2 }", |s| {
            let limit = quota(2.0, Per::Second, 2);
            s.identity.default = Rule::new(limit, Costs::OF_IDENTITIES, Schedule::default()).unwrap();
        }),
        (
            "node",
            "node { rate = 9 burst = 9 dry_run = true attestations = 8 attestations_per_caller = 3 method \"FetchSecrets\" { unlimited = true } }",
            |s| {
                s.node.quotas =
                    PerMethod::all(Some(NodeQuota::set(Quota::new(9.0, Per::Second, 9).unwrap())));
                s.node.quotas.set(Method::FetchSecrets, None);
                s.node.dry_run = true;
                s.node.attestations = Attestations::new(Some(number(8)), Some(number(3))).unwrap();
            },
        ),
        ("no more of one than of all", "node { unlimited = true attestations = 2 }", |s| {
            s.node.quotas = PerMethod::all(None);
            s.node.attestations = Attestations::new(Some(number(2)), Some(number(2))).unwrap();
        }),
        (
            "memory",
            "memory { limit = \"1TiB\" shrink_caches_at = 1 refuse_new_at = 2 close_heaviest_at = 100 }",
            |s| {
                s.memory.limit = MemoryLimit::bytes(1 << 40).unwrap();
                s.memory.steps = MemorySteps::new([1, 2, 100]).unwrap();
            },
        ),
        ("a share of the processor", "node { cpu = 0.05 }", |s| {
            s.node.cpu = ProcessorShare::cores(0.05).unwrap();
        }),
        ("memory in bytes", "memory { limit = 25165824 }", |s| {
            s.memory.limit = MemoryLimit::bytes(24 << 20).unwrap();
        }),
        ("spire-agent's keys", "fetch_x509_svid = 1 fetch_secrets = 0", |s| {
            let rule = |limit| Rule::new(limit, Costs::ONE, Schedule::default()).ok();
            s.identity.methods.set(Method::FetchX509Svid, rule(quota(1.0, Per::Second, 1)));
            s.identity.methods.set(Method::FetchSecrets, rule(Limit::Unlimited));
        }),
        (
            "spire-agent's keys beside other methods",
            "fetch_secrets = 0 identity { method \"FetchJWTSVID\" { block = true } }",
            |s| {
                let rule = |limit, costs| Rule::new(limit, costs, Schedule::default()).ok();
                s.identity.methods.set(Method::FetchJwtSvid, rule(Limit::Block, Costs::OF_IDENTITIES));
                s.identity.methods.set(Method::FetchSecrets, rule(Limit::Unlimited, Costs::ONE));
            },
        ),
    ];
    for (case, inner, change) in table {
        let mut want = LimitSettings::default();
        change(&mut want);
        assert_eq!(settings(inner), Ok(want), "{case}");
    }
}

/// Each mistake alone, and the whole of what is said about it.
#[test]
fn mistakes_say_what_would_be_right() {
    for (case, inner, want) in [
        (
            "rate 0",
            "caller { rate = 0 burst = 9 }",
            "22: ratelimit.caller.rate 0: must be above 0 and at most 1000000 a second (block = true for none, unlimited = true for no limit)",
        ),
        (
            "negative",
            "caller { rate = -1 burst = 9 }",
            "22: ratelimit.caller.rate -1: must be above 0 and at most 1000000 a second (block = true for none, unlimited = true for no limit)",
        ),
        (
            "huge",
            "node { rate = 1e300 burst = 9 }",
            "20: ratelimit.node.rate 1e300: must be above 0 and at most 1000000 a second (unlimited = true for no limit)",
        ),
        (
            "NaN",
            "caller { rate = \"NaN\" burst = 9 }",
            "22: ratelimit.caller.rate \"NaN\": must be a number such as 100 or 0.5",
        ),
        (
            "infinite",
            "caller { rate = \"inf\" burst = 9 }",
            "22: ratelimit.caller.rate \"inf\": must be a number such as 100 or 0.5",
        ),
        (
            "no number",
            "caller { rate = true burst = 9 }",
            "22: ratelimit.caller.rate true: must be a number, not a boolean",
        ),
        (
            "unit",
            "caller { rate = 1 per = \"week\" burst = 9 }",
            "31: ratelimit.caller.per \"week\": must be second, minute, hour or day",
        ),
        (
            "burst 0",
            "caller { rate = 1 burst = 0 }",
            "31: ratelimit.caller.burst 0: must be a whole number from 1 to 1000000",
        ),
        (
            "huge burst",
            "caller { rate = 1 burst = 1000001 }",
            "31: ratelimit.caller.burst 1000001: must be a whole number from 1 to 1000000",
        ),
        (
            "handshake",
            "gate { connection { handshake_timeout = \"1ms\" } }",
            "33: ratelimit.gate.connection.handshake_timeout \"1ms\": must be from 100ms to 5m",
        ),
        (
            "idle",
            "gate { connection { idle_timeout = \"999ms\" } }",
            "33: ratelimit.gate.connection.idle_timeout \"999ms\": must be 0 (it may stay for ever), or from 1s to 24h",
        ),
        (
            "no streams",
            "gate { connection { streams = 0 } }",
            "33: ratelimit.gate.connection.streams 0: must be a whole number from 1 to 1024",
        ),
        (
            "nobody",
            "caller { override \"uid:4294967295\" { block = true } }",
            "31: ratelimit.caller.override \"uid:4294967295\": \"uid:4294967295\" cannot match: no process can have the UID 4294967295",
        ),
        (
            "slow",
            "caller { rate = 1 per = \"day\" burst = 400 }",
            "43: ratelimit.caller.burst 400: takes 400 days to come back at this rate; it must be at most 366",
        ),
        (
            "no burst",
            "caller { rate = 1 }",
            "22: ratelimit.caller.rate: must have burst beside it, for example burst = 200",
        ),
        (
            "no rate",
            "caller { burst = 9 }",
            "22: ratelimit.caller.burst: must have rate beside it, for example rate = 100",
        ),
        (
            "unit alone",
            "caller { per = \"day\" }",
            "22: ratelimit.caller.per: must have rate beside it, for example rate = 100",
        ),
        (
            "two limits",
            "caller { override \"uid:7\" { rate = 9 burst = 9 exempt = true } }",
            "60: ratelimit.caller.override \"uid:7\".exempt: contradicts rate, at agent.conf:2:41: a limit is either rate with burst, or one of exempt, block, unlimited",
        ),
        (
            "block and exempt",
            "gate { caller { block = true exempt = true } }",
            "42: ratelimit.gate.caller.exempt: contradicts block, at agent.conf:2:29: a limit is either rate with burst, or one of exempt, block, unlimited",
        ),
        (
            "exempt from the node",
            "node { exempt = true }",
            "20: ratelimit.node.exempt: unknown key; known here: rate, per, burst, unlimited, dry_run, cpu, attestations, attestations_per_caller, method",
        ),
        (
            "failed attestation above burst",
            "caller { rate = 1 burst = 4 }",
            "31: ratelimit.caller.burst 4: must be at least 5, which is what a call can cost (costs.failed_attestation)",
        ),
        (
            "signature above burst",
            "identity { rate = 1 burst = 1 }",
            "33: ratelimit.identity.burst 1: must be at least 2, which is what a call can cost (costs.signature)",
        ),
        (
            "cost above the burst around it",
            "caller { method \"FetchJWTSVID\" { costs { signature = 300 } } }",
            "46: ratelimit.caller.method \"FetchJWTSVID\".costs: signature 300 must be at most the burst, which is 200 (by default)",
        ),
        (
            "burst of a window",
            "caller { schedule \"n\" { start { hour = 1 } stop { hour = 2 } rate = 1 burst = 1 } }",
            "83: ratelimit.caller.schedule \"n\".burst 1: must be at least 5, which is what a call can cost (costs.failed_attestation)",
        ),
        (
            "cost 0",
            "caller { costs { answer = 0 } }",
            "30: ratelimit.caller.costs.answer 0: must be a whole number from 1 to 1000000",
        ),
        (
            "signature below answer",
            "caller { costs { answer = 4 signature = 3 } }",
            "41: ratelimit.caller.costs.signature 3: must be at least answer, which is 4",
        ),
        (
            "answer above signature",
            "identity { costs { answer = 4 } }",
            "32: ratelimit.identity.costs.answer 4: must be at most signature, which is 2 unless it is set too",
        ),
        (
            "identities fail nothing",
            "identity { costs { failed_attestation = 9 } }",
            "32: ratelimit.identity.costs.failed_attestation: unknown key; known here: answer, signature",
        ),
        (
            "method",
            "caller { method \"FetchJwtSvid\" { block = true } }",
            "29: ratelimit.caller.method \"FetchJwtSvid\": unknown method (did you mean FetchJWTSVID?): must be one of FetchX509SVID, FetchX509Bundles, FetchJWTSVID, FetchJWTBundles, ValidateJWTSVID, FetchWITSVID, FetchWITBundles, StreamSecrets, FetchSecrets, Other",
        ),
        (
            "no identity",
            "identity { method \"ValidateJWTSVID\" { block = true } }",
            "31: ratelimit.identity.method \"ValidateJWTSVID\": needs no identity, and is not charged to any: limit it in caller or node",
        ),
        (
            "node method",
            "node { method \"FetchSecrets\" { } }",
            "27: ratelimit.node.method \"FetchSecrets\": must have a limit: rate with burst, or unlimited",
        ),
        (
            "nobody",
            "caller { override \"gid:7\" { block = true } }",
            "31: ratelimit.caller.override \"gid:7\": \"gid:7\" is not a caller: it must be uid:N, uid:N-M, uid:*, user:NAME, pod:UID or pod:*",
        ),
        (
            "unknown user",
            "gate { override \"user:nobuild\" { block = true } }",
            "29: ratelimit.gate.override \"user:nobuild\": there is no user \"nobuild\" on this node, and a limit is for the number that a user has when the file is read: write uid:N, or make the user first",
        ),
        (
            "empty range",
            "caller { override \"uid:9-1\" { block = true } }",
            "31: ratelimit.caller.override \"uid:9-1\": \"uid:9-1\" is the wrong way round: write uid:1-9",
        ),
        (
            "nothing matches",
            "identity { override \"spiffe://other.example/a\" { block = true } }",
            "33: ratelimit.identity.override \"spiffe://other.example/a\": \"spiffe://other.example/a\" matches nothing: the trust domain is example.org",
        ),
        (
            "all of another trust domain",
            "identity { override \"spiffe://other.example/**\" { block = true } }",
            "33: ratelimit.identity.override \"spiffe://other.example/**\": \"spiffe://other.example/**\" matches nothing: the trust domain is example.org",
        ),
        (
            "all match",
            "identity { override \"spiffe://example.org/**\" { block = true } }",
            "33: ratelimit.identity.override \"spiffe://example.org/**\": \"spiffe://example.org/**\" is not a pattern of SPIFFE IDs: it matches every identity: set the default or the method in its place",
        ),
        (
            "mask that shares nothing",
            "identity { override \"spiffe://example.org/{a}\" { block = true } }",
            "33: ratelimit.identity.override \"spiffe://example.org/{a}\": has a {name}, which makes SPIFFE IDs share a bucket: set share = true, or write *",
        ),
        (
            "empty override",
            "caller { override \"uid:7\" { } }",
            "31: ratelimit.caller.override \"uid:7\": changes nothing: it must have a limit (rate with burst, or one of exempt, block, unlimited), share = true, or a method",
        ),
        (
            "override without a limit",
            "caller { override \"uid:7\" { dry_run = true } }",
            "31: ratelimit.caller.override \"uid:7\": must have a limit for all the time: rate with burst, or one of exempt, block, unlimited",
        ),
        (
            "method without a limit",
            "caller { override \"uid:7\" { method \"FetchSecrets\" { dry_run = true } } }",
            "48: ratelimit.caller.override \"uid:7\".method \"FetchSecrets\": must have a limit, here or in the block around it: rate with burst, or one of exempt, block, unlimited",
        ),
        (
            "empty gate override",
            "gate { override \"uid:7\" { } }",
            "29: ratelimit.gate.override \"uid:7\": changes nothing: it must have connections, or a limit: rate with burst, or one of exempt, block, unlimited",
        ),
        (
            "both meant",
            "caller { override \"uid:1-9\" { block = true } override \"uid:2-10\" { block = true } }",
            "67: ratelimit.caller.override \"uid:2-10\": contradicts \"uid:1-9\", at agent.conf:2:31: some callers match both, and neither is more specific",
        ),
        (
            "one user twice",
            "gate { override \"uid:1000\" { block = true } override \"user:build\" { exempt = true } }",
            "66: ratelimit.gate.override \"user:build\": contradicts \"uid:1000\", at agent.conf:2:29: some callers match both, and neither is more specific",
        ),
        (
            "set twice",
            "caller { override \"uid:7\" { block = true } override \"uid:7\" { block = false } }",
            "75: ratelimit.caller.override \"uid:7\".block false: set twice: first at agent.conf:2:41",
        ),
        (
            "31 September",
            "caller { schedule \"s\" { start { month = 9 day = 31 } stop { month = 10 day = 1 } block = true } }",
            "37: ratelimit.caller.schedule \"s\".start: \"month 9 day 31\" never happens",
        ),
        (
            "24:01",
            "caller { schedule \"s\" { start { hour = 1 } stop { hour = 24 minute = 1 } block = true } }",
            "56: ratelimit.caller.schedule \"s\".stop: \"hour 24 minute 1\" never happens",
        ),
        (
            "starts at 24",
            "caller { schedule \"s\" { start { hour = 24 } stop { hour = 1 } block = true } }",
            "45: ratelimit.caller.schedule \"s\".start.hour 24: must be a whole number from 0 to 23",
        ),
        (
            "weekday",
            "caller { schedule \"s\" { start { weekday = \"caturday\" } stop { weekday = \"mon\" } block = true } }",
            "45: ratelimit.caller.schedule \"s\".start.weekday \"caturday\": must be a day such as monday or mon",
        ),
        (
            "no stop",
            "caller { schedule \"s\" { start { hour = 1 } block = true } }",
            "31: ratelimit.caller.schedule \"s\".stop: must be set, in UTC: stop { hour = 22 }",
        ),
        (
            "empty window",
            "caller { schedule \"s\" { start { hour = 1 } stop { hour = 1 } block = true } }",
            "31: ratelimit.caller.schedule \"s\": a window from \"hour 1\" to the same moment is empty; for a limit at all times, set the limit itself",
        ),
        (
            "other periods",
            "caller { schedule \"s\" { start { hour = 1 } stop { minute = 1 } block = true } }",
            "31: ratelimit.caller.schedule \"s\": start \"hour 1\" and stop \"minute 1\" must have the same widest field",
        ),
        (
            "nothing holds",
            "caller { schedule \"s\" { start { hour = 1 } stop { hour = 2 } } }",
            "31: ratelimit.caller.schedule \"s\": must say which limit holds in this window: rate with burst, or one of exempt, block, unlimited",
        ),
        (
            "overlap",
            "caller { schedule \"a\" { start { hour = 1 } stop { hour = 3 } block = true } schedule \"b\" { start { hour = 2 } stop { hour = 4 } block = true } }",
            "98: ratelimit.caller.schedule \"b\": overlaps \"a\", at agent.conf:2:31: one limit must hold at a time",
        ),
        (
            "reserve",
            "gate { connections = 10 reserve = 10 }",
            "37: ratelimit.gate.reserve 10: must be below connections, which is 10",
        ),
        (
            "few connections",
            "gate { connections = 10 }",
            "20: ratelimit.gate.connections 10: must be above reserve, which is 64 by default",
        ),
        (
            "connections of the exempt",
            "gate { caller { connections = 9 exempt = true } }",
            "29: ratelimit.gate.caller.connections 9: has no effect beside exempt or block: take one of them out",
        ),
        (
            "sharing at the gate",
            "gate { override \"uid:1-9\" { share = true connections = 1 } }",
            "41: ratelimit.gate.override \"uid:1-9\".share: unknown key; known here: connections, rate, per, burst, exempt, block, unlimited, dry_run",
        ),
        ("few keys", "keys = 1", "13: ratelimit.keys 1: must be a whole number from 16 to 16777216"),
        (
            "step",
            "soft_limits = [85]",
            "28: ratelimit.soft_limits 85: must be one of 50, 60, 70, 75, 80, 90, 95, 100 (percent of a burst)",
        ),
        (
            "status",
            "rejection_status = 429",
            "13: ratelimit.rejection_status \"429\": must be resource_exhausted or unavailable",
        ),
        (
            "attestations",
            "node { attestations = 4 attestations_per_caller = 5 }",
            "37: ratelimit.node.attestations_per_caller 5: must be at most attestations, which is 4",
        ),
        (
            "little memory",
            "memory { limit = \"1MiB\" }",
            "22: ratelimit.memory.limit \"1MiB\": must be \"auto\", or bytes from 8 MiB to 1 TiB: \"24MiB\" (also KiB, GiB, TiB), or 25165824",
        ),
        (
            "a share of nothing",
            "node { cpu = 0 }",
            "20: ratelimit.node.cpu 0: is a cpu share of nothing: it must be from 0.05 to 4096 cores",
        ),
        (
            "a small share",
            "node { cpu = 0.01 }",
            "20: ratelimit.node.cpu 0.01: must be from 0.05 to 4096 cores",
        ),
        (
            "streams of connections beyond the budget",
            "gate { connections = 100 connection { streams = 100 } } memory { limit = \"24MiB\" }",
            "20: ratelimit.gate.connections 100: holds 64204800 bytes with as many streams as may be open (100), at \
             agent.conf:2:51, and memory.limit is 25165824: streams must be at most 36",
        ),
        (
            "the same with a small reserve",
            "gate { connections = 100 reserve = 8 connection { streams = 100 } } memory { limit = \"24MiB\" }",
            "20: ratelimit.gate.connections 100: holds 64204800 bytes with as many streams as may be open (100), at \
             agent.conf:2:63, and memory.limit is 25165824: it must be at most 39, or streams at most 36",
        ),
        (
            "connections of which none has room for a stream",
            "gate { connections = 1000 connection { streams = 2 } } memory { limit = \"24MiB\" }",
            "20: ratelimit.gate.connections 1000: holds 39936000 bytes with as many streams as may be open (2), at \
             agent.conf:2:52, and memory.limit is 25165824: it must be at most 630",
        ),
        (
            "a reserve beyond the budget",
            "gate { reserve = 1000 } memory { limit = \"24MiB\" }",
            "20: ratelimit.gate.reserve 1000: is memory for 1000 callers of 40960 bytes, and memory.limit is 25165824: it \
             must be at most 614",
        ),
        (
            "connections alone beyond the budget",
            "gate { connections = 1000 } memory { limit = \"24MiB\" }",
            "20: ratelimit.gate.connections 1000: holds 33792000 bytes with one stream each, and memory.limit is 25165824: it \
             must be at most 744",
        ),
        (
            "streams beyond the budget",
            "gate { connection { streams = 1024 } } memory { limit = \"24MiB\" }",
            "33: ratelimit.gate.connection.streams 1024: makes a connection take 17087488 bytes at its worst, and \
             memory.limit is 25165824, too small for two of those in half of it: it must be at most 365",
        ),
        (
            "keys beyond the budget",
            "keys = 16777216 memory { limit = \"24MiB\" }",
            "13: ratelimit.keys 16777216: take 11274289152 bytes when all are known, and memory.limit is 25165824, of which \
             they may have half: it must be at most 18724",
        ),
        (
            "memory that would always be short",
            "memory { limit = \"24MiB\" shrink_caches_at = 1 }",
            "38: ratelimit.memory.shrink_caches_at 1: is 251659 bytes, as memory.limit is 25165824, and the agent itself \
             takes 4194304: memory would always be short; it must be at least 17",
        ),
        (
            "more connections of one caller than of all",
            "gate { connections = 100 caller { connections = 200 } }",
            "47: ratelimit.gate.caller.connections 200: must be at most gate.connections, which is 100 for all callers",
        ),
        (
            "of some callers",
            "gate { connections = 100 override \"uid:7\" { connections = 101 } }",
            "57: ratelimit.gate.override \"uid:7\".connections 101: must be at most gate.connections, which is 100 for all \
             callers",
        ),
        (
            "falling",
            "memory { refuse_new_at = 60 }",
            "22: ratelimit.memory.refuse_new_at 60: must be above shrink_caches_at, which is 70",
        ),
        (
            "below the default",
            "memory { shrink_caches_at = 90 }",
            "22: ratelimit.memory.shrink_caches_at 90: must be below refuse_new_at, which is 85",
        ),
        (
            "negative spire-agent key",
            "fetch_jwt_svid = -1",
            "13: ratelimit.fetch_jwt_svid -1: must be a whole number from 0 to 1000000",
        ),
        (
            "spire-agent key and ours",
            "fetch_jwt_svid = 1 identity { method \"FetchJWTSVID\" { block = true } }",
            "13: ratelimit.fetch_jwt_svid 1: contradicts ratelimit.identity.method \"FetchJWTSVID\", at agent.conf:2:50: both limit FetchJWTSVID, take one of them out",
        ),
        ("unknown", "caler { }", "13: ratelimit.caler: unknown key: did you mean caller?"),
        (
            "mask",
            "identity { mask \"spiffe://example.org/{a}\" { } }",
            "24: ratelimit.identity.mask: unknown key; known here: rate, per, burst, exempt, block, unlimited, schedule, costs, dry_run, method, override",
        ),
    ] {
        assert_eq!(settings(inner).err(), Some(format!("agent.conf:2:{want}")), "{case}");
    }
    // What is named as right is.
    for gate in [
        "connections = 100 connection { streams = 36 }",
        "connections = 39 reserve = 8 connection { streams = 100 }",
        "connections = 630 connection { streams = 2 }",
    ] {
        let told = settings(&format!("gate {{ {gate} }} memory {{ limit = \"24MiB\" }}"));
        assert_eq!(told.err(), None, "{gate}");
    }
}

#[test]
fn all_mistakes_come_at_once() {
    let text = format!(
        "{LEAST}ratelimit {{\n keys = 1\n caller {{\n rate = 0 burst = 1\n method \"x\" {{ rate = 0 burst = 0 }}\n override \"uid:1-9\" {{ block = true }}
 override \"uid:2-10\" {{ block = true }}\n override \"uid:3-11\" {{ block = true }}\n }} }}"
    );
    let errors = load(&text, &[]).unwrap_err();
    let places: Vec<&str> = errors.lines().map(|line| line.split(' ').next().unwrap()).collect();
    let want = ["3:2", "5:2", "5:11", "6:9", "6:15", "6:24", "8:11", "9:11"];
    assert_eq!(places, want.map(|place| format!("agent.conf:{place}:")), "{errors}");
}

#[test]
fn drop_in_files_merge_and_conflicts_name_both_places() {
    let one = ("d/1.conf", "ratelimit { caller { override \"uid:7\" { block = true } } }");
    let two = (
        "d/2.json",
        "{\"ratelimit\": {\"dry_run\": true, \"caller\": {\"override\": {\"uid:8\": {\"exempt\": true}}}}}",
    );
    let text = format!("{LEAST}ratelimit {{ keys = 99 }}");
    let merged = load(&text, &[one, two]).unwrap().ratelimit;
    let keys = TableSize::new(99).unwrap();
    let mut want = LimitSettings { keys, dry_run: true, ..LimitSettings::default() };
    let each = |uid, limit| (caller(uid), Share::Each(rule(limit)));
    over(&mut want.caller, vec![each("uid:7", Limit::Block), each("uid:8", Limit::Exempt)]);
    assert_eq!(merged, want);
    let keys = TableSize::new(16_384).unwrap();
    assert_eq!(load(LEAST, &[one, two]).unwrap().ratelimit, LimitSettings { keys, ..want });

    for (case, file, said) in [
        (
            "key",
            "ratelimit { keys = 98 }",
            "d/3.conf:1:13: ratelimit.keys 98: set twice: first at agent.conf:2:13",
        ),
        (
            "limit",
            "ratelimit { caller { override \"uid:7\" { unlimited = true } } }",
            "d/3.conf:1:41: ratelimit.caller.override \"uid:7\".unlimited: contradicts block, at d/1.conf:1:41: a limit is either rate with burst, or one of exempt, block, unlimited",
        ),
        (
            "pattern",
            "ratelimit { caller { override \"uid:1-3\" { block = true } override \"uid:2-4\" { block = true } } }",
            "d/3.conf:1:67: ratelimit.caller.override \"uid:2-4\": contradicts \"uid:1-3\", at d/3.conf:1:31: some callers match both, and neither is more specific",
        ),
    ] {
        assert_eq!(load(&text, &[one, two, ("d/3.conf", file)]).err().as_deref(), Some(said), "{case}");
    }
}

#[test]
fn spire_agents_own_place_works_and_both_places_are_an_error() {
    let agent = |inner: &str, more: &str| {
        let text = format!(
            "issuer \"embedded\" {{ }}\nagent {{ trust_domain = \"example.org\" experimental {{ ratelimit {{ {inner} }} }} }}\n{more}"
        );
        load(&text, &[]).map(|config| config.ratelimit)
    };
    assert_eq!(agent("fetch_jwt_svid = 7", ""), settings("fetch_jwt_svid = 7"));
    assert_eq!(
        agent("fetch_jwt_svid = 7", "ratelimit { fetch_secrets = 0 }"),
        settings("fetch_jwt_svid = 7 fetch_secrets = 0")
    );
    for (case, inner, more, want) in [
        (
            "both",
            "fetch_jwt_svid = 7",
            "ratelimit { fetch_jwt_svid = 7 }",
            "3:13: ratelimit.fetch_jwt_svid 7: contradicts agent.experimental.ratelimit.fetch_jwt_svid, at agent.conf:2:65: both limit FetchJWTSVID, take one of them out",
        ),
        (
            "ours",
            "fetch_jwt_svid = 7",
            "ratelimit { identity { method \"FetchJWTSVID\" { block = true } } }",
            "2:65: agent.experimental.ratelimit.fetch_jwt_svid 7: contradicts ratelimit.identity.method \"FetchJWTSVID\", at agent.conf:3:31: both limit FetchJWTSVID, take one of them out",
        ),
        (
            "not spire-agent's",
            "dry_run = true",
            "",
            "2:65: agent.experimental.ratelimit.dry_run: unknown key; known here: fetch_x509_svid, fetch_jwt_svid, fetch_x509_bundles, fetch_jwt_bundles, stream_secrets, fetch_secrets",
        ),
    ] {
        assert_eq!(agent(inner, more).err(), Some(format!("agent.conf:{want}")), "{case}");
    }
}

#[test]
fn json_says_the_same_and_a_reload_is_live() {
    let hcl = "dry_run = true soft_limits = [80]
        gate { reserve = 1 caller { connections = 9 } override \"uid:1-9\" { block = true } }
        caller { rate = 0.5 per = \"minute\" burst = 5
            schedule \"n\" { start { hour = 22 minute = 30 } stop { hour = 6 } block = true }
            override \"pod:*\" { share = true method \"FetchJWTSVID\" { rate = 9 burst = 9 } } }
        node { method \"FetchSecrets\" { unlimited = true } } memory { limit = \"1GiB\" }";
    let json = r#"{"issuer": {"embedded": {}}, "agent": {"trust_domain": "example.org"}, "ratelimit": {
        "dry_run": true, "soft_limits": [80],
        "gate": {"reserve": 1, "caller": {"connections": 9}, "override": {"uid:1-9": {"block": true}}},
        "caller": {"rate": 0.5, "per": "minute", "burst": 5,
            "schedule": [{"n": {"start": {"hour": 22, "minute": 30}, "stop": {"hour": 6}, "block": true}}],
            "override": {"pod:*": {"share": true, "method": {"FetchJWTSVID": {"rate": 9, "burst": 9}}}}},
        "node": {"method": {"FetchSecrets": {"unlimited": true}}}, "memory": {"limit": "1GiB"}}}"#;
    let plain = load(LEAST, &[]).unwrap();
    let hcl = load(&format!("{LEAST}ratelimit {{ {hcl} }}"), &[]).unwrap();
    let json = load(json, &[]).unwrap();
    assert_eq!(hcl, json);
    assert!(diff(&hcl, &json).is_empty(), "nor does the place of an override count");
    let changes = diff(&plain, &hcl);
    assert_eq!((changes.live, changes.restart), (vec!["ratelimit"], Vec::new()));
}

/// Where no caller is a pod, a rule for pods would silently do nothing, and one for all users is the default.
#[test]
fn patterns_fit_what_callers_there_can_be() {
    let off =
        "issuer \"embedded\" { } agent { trust_domain = \"example.org\" kubernetes { mode = \"off\" } }\n";
    for (stage, pattern, want) in [
        ("gate", "pod:*", "matches nothing"),
        ("caller", "pod:0f9c2a4e-8d31-4b7a-9c55-01e2d3f4a5b6", "matches nothing"),
        ("caller", "uid:*", "matches every caller"),
        ("caller", "uid:1000", ""),
    ] {
        let block = format!("ratelimit {{ {stage} {{ override \"{pattern}\" {{ block = true }} }} }}");
        let with = |head: &str| load(&format!("{head}{block}"), &[]).map(drop);
        assert_eq!(with(LEAST), Ok(()), "{pattern}, where pods may be looked for");
        match with(off) {
            Ok(()) => assert_eq!(want, "", "{pattern}"),
            Err(said) => {
                let at = format!("agent.conf:2:{}: ratelimit.{stage}.override", 25 + stage.len());
                assert!(said.contains(want) && said.contains(&at), "{pattern}: {said}");
            }
        }
    }
}

#[test]
fn kubernetes_is_found_as_it_is_set() {
    let read = |inner: &str| {
        let text = format!(
            "issuer \"embedded\" {{ }}\nagent {{ trust_domain = \"example.org\"\nkubernetes {{ {inner} }} }}"
        );
        load(&text, &[])
    };
    for (case, inner, mode, root) in [
        ("default", "", KubernetesMode::Auto, None),
        ("auto", "mode = \"auto\"", KubernetesMode::Auto, None),
        ("on", "mode = \"on\" kubelet_cgroup_root = \"/kubepods\"", KubernetesMode::On, Some("/kubepods")),
        ("off", "mode = \"off\"", KubernetesMode::Off, None),
    ] {
        let found = read(inner).unwrap().kubernetes;
        let root = root.map_or_else(KubeletRoot::default, |root| KubeletRoot::parse(root).unwrap());
        assert_eq!((found.mode, found.kubelet_root), (mode, root), "{case}");
    }
    for (case, inner, want) in [
        ("mode", "mode = \"yes\"", "3:14: agent.kubernetes.mode \"yes\": must be auto, on or off"),
        (
            "root",
            "kubelet_cgroup_root = \"kubepods\"",
            "3:14: agent.kubernetes.kubelet_cgroup_root \"kubepods\": kubelet_cgroup_root must be an absolute path below / without empty, . and .. parts, not \"kubepods\"",
        ),
    ] {
        assert_eq!(read(inner).err(), Some(format!("agent.conf:{want}")), "{case}");
    }
    let changes = diff(&read("").unwrap(), &read("mode = \"on\"").unwrap());
    assert_eq!(changes.restart.len(), 1, "pods are looked for from the start, or not");
}

proptest::proptest! {
    /// Whatever is accepted can be put in force: it was made by the constructors in `limits`.
    #[test]
    fn what_is_accepted_can_be_put_in_force(
        block in proptest::sample::select(&["@", "caller { @ }", "identity { @ }", "gate { @ }", "gate { caller { @ } }", "node { @ }", "memory { @ }", "caller { override \"uid:7\" { @ } }", "identity { method \"FetchJWTSVID\" { @ } }", "caller { costs { @ } }", "caller { schedule \"s\" { start { hour = 1 } stop { hour = 2 } @ } }"][..]),
        settings in proptest::collection::vec((
            proptest::sample::select(&["rate", "per", "burst", "exempt", "block", "unlimited", "dry_run", "costs", "answer", "signature", "connections", "reserve", "attestations", "limit", "keys", "share", "fetch_jwt_svid", "method", "override", "start", "shrink_caches_at"][..]),
            proptest::sample::select(&["1", "5", "0", "-1", "1e300", "0.0001", "\"nan\"", "true", "false", "[]", "[{}]", "{}", "\"day\"", "99999999999999999999", "{ \"uid:1\" = {} }"][..]),
        ), 0..4),
    ) {
        let inner: Vec<String> = settings.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        if let Ok(settings) = self::settings(&block.replace('@', &inner.join(" "))) {
            let plan = GatePlan::new(&settings, 1 << 30, 1 << 30);
            proptest::prop_assert!(plan.is_ok(), "{plan:?}");
            let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&metrics::NoopRecorder));
            drop(Gate::new(plan.unwrap(), &limits));
        }
    }
}
