//! The generated Rust under `src/api/proto` and `src/issuer/server/proto` is in git, so that a build needs neither protoc nor a build script.
//! This test makes it again from `proto/` and compares. `DURWARD_BLESS=1 cargo test generated_code` writes it.

use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::FileDescriptorSet;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The messages that the server sends as bytes encoded once and shared (`src/api/encoded.rs`).
const SHARED: [&str; 3] = ["X509SVIDResponse", "X509BundlesResponse", "JWTBundlesResponse"];

fn generate(out: &Path) {
    let files =
        protox::compile([Path::new(ROOT).join("proto/workload.proto")], [Path::new(ROOT).join("proto")])
            .expect("proto/ compiles");
    let plain = |dir: &Path| {
        std::fs::create_dir_all(dir).unwrap();
        // Ordered maps: the same content must give the same bytes.
        tonic_prost_build::configure()
            .out_dir(dir)
            .btree_map(".")
            .build_transport(false)
            .emit_rerun_if_changed(false)
    };

    let messages = out.join("messages");
    plain(&messages).build_server(false).compile_fds(files.clone()).expect("messages and client");

    let server = out.join("server");
    let mut build = plain(&server).build_client(false).codec_path("crate::api::codec::SmallCodec");
    for file in &files.file {
        if file.package().is_empty() {
            for message in &file.message_type {
                let rust = rust_name(message.name());
                let path = if SHARED.contains(&message.name()) {
                    format!("crate::api::encoded::{rust}")
                } else {
                    format!("crate::api::proto::workload::{rust}")
                };
                build = build.extern_path(format!(".{}", message.name()), path);
            }
        }
    }
    build.compile_fds(files.clone()).expect("server");
    std::fs::write(out.join("workload.fds"), files.encode_to_vec()).unwrap();

    let files = protox::compile([Path::new(ROOT).join("proto/admin.proto")], [Path::new(ROOT).join("proto")])
        .expect("proto/ compiles");
    plain(&out.join("admin")).compile_fds(files).expect("admin");

    let packages = SPIRE.map(|package| format!("proto/spire/api/server/{package}/v1/{package}.proto"));
    let files =
        protox::compile(packages.map(|file| Path::new(ROOT).join(file)), [Path::new(ROOT).join("proto")])
            .expect("proto/ compiles");
    let types = ".spire.api.types";
    let place = "issuer::server::proto";
    plain(&out.join("spire"))
        .build_server(false)
        .compile_fds(of_package(&files, "spire.api.types"))
        .expect("types");
    plain(&out.join("spire"))
        .build_server(false)
        .extern_path(types, format!("crate::{place}::types"))
        .compile_fds(files.clone())
        .expect("clients");
    // The server that the tests put in the SPIRE Server's place.
    let mut build = plain(&out.join("spire_server"))
        .build_client(false)
        .extern_path(types, format!("::durward::{place}::types"));
    for file in &files.file {
        for message in &file.message_type {
            if let Some(package) =
                SPIRE.iter().find(|it| file.package() == format!("spire.api.server.{it}.v1"))
            {
                let rust = rust_name(message.name());
                let path = format!("::durward::{place}::{package}::{rust}");
                build = build.extern_path(format!(".{}.{}", file.package(), message.name()), path);
            }
        }
    }
    build.compile_fds(files).expect("servers");
}

/// The packages of the SPIRE Server's API, by their folder.
const SPIRE: [&str; 4] = ["agent", "bundle", "entry", "svid"];

fn of_package(files: &FileDescriptorSet, package: &str) -> FileDescriptorSet {
    FileDescriptorSet { file: files.file.iter().filter(|it| it.package() == package).cloned().collect() }
}

/// `X509SVIDResponse` as prost spells it: a run of capitals or digits is one word.
fn rust_name(proto: &str) -> String {
    let mut rust = String::new();
    let mut previous_lower = true;
    let chars: Vec<char> = proto.chars().collect();
    for (i, c) in chars.iter().enumerate() {
        let next_lower = chars.get(i + 1).is_some_and(char::is_ascii_lowercase);
        if c.is_ascii_uppercase() && (previous_lower || next_lower) {
            rust.push(*c);
        } else {
            rust.push(c.to_ascii_lowercase());
        }
        previous_lower = c.is_ascii_lowercase();
    }
    rust
}

#[test]
fn generated_code_is_what_proto_says() {
    let out = tempfile::tempdir().unwrap();
    generate(out.path());
    let tree = Path::new(ROOT).join("src/api/proto");
    let mut pairs: Vec<(PathBuf, PathBuf)> = vec![
        (out.path().join("messages/_.rs"), tree.join("workload.rs")),
        (out.path().join("server/_.rs"), tree.join("workload_server.rs")),
        (out.path().join("workload.fds"), tree.join("workload.fds")),
        (out.path().join("admin/durward.admin.v1.rs"), tree.join("admin.rs")),
    ];
    let spire = Path::new(ROOT).join("src/issuer/server/proto");
    pairs.push((out.path().join("spire/spire.api.types.rs"), spire.join("types.rs")));
    for package in SPIRE {
        let made = format!("spire.api.server.{package}.v1.rs");
        let kept = format!("{package}.rs");
        pairs.push((out.path().join("spire").join(&made), spire.join(&kept)));
        pairs.push((
            out.path().join("spire_server").join(&made),
            Path::new(ROOT).join("tests/it/spire_api").join(&kept),
        ));
    }
    #[expect(clippy::disallowed_methods, reason = "how a developer asks for the files to be written")]
    let bless = std::env::var("DURWARD_BLESS").is_ok();
    for (made, kept) in pairs {
        let made = std::fs::read(&made).unwrap();
        if bless {
            std::fs::write(&kept, &made).unwrap();
        }
        assert!(
            std::fs::read(&kept).unwrap_or_default() == made,
            "{} differs from what proto/ gives: run DURWARD_BLESS=1 cargo test generated_code",
            kept.display()
        );
    }
}
