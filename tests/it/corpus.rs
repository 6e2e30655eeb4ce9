//! Every file of the fuzz corpus through the function that its fuzz target calls, on the stable compiler.

use std::{collections::BTreeSet, fs, path::Path};

use proptest::{collection::vec, prelude::*};

#[path = "../fuzz/bodies.rs"]
#[expect(unreachable_pub, reason = "public in the fuzz package")]
mod bodies;

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn every_corpus_file_keeps_the_invariants_of_its_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let targets: BTreeSet<String> = bodies::TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&fuzz.join("targets")), targets, "a target has a file");
    assert_eq!(names(&fuzz.join("corpus")), targets, "a target has seeds");

    for (name, body) in bodies::TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} stands in the manifest");
        let mut seeds = 0;
        for seed in fs::read_dir(fuzz.join("corpus").join(name)).unwrap() {
            let path = seed.unwrap().path();
            let data = fs::read(&path).unwrap();
            let kept = std::panic::catch_unwind(|| body(&data));
            assert!(kept.is_ok(), "{} breaks an invariant", path.display());
            seeds += 1;
        }
        assert!(seeds > 0, "{name} has seeds");
    }
}

proptest! {
    /// What no fuzzer has to find first: frames, and noise behind them.
    #[test]
    fn any_frames_keep_the_invariants_of_the_wire(
        frames in vec((0u8..12, any::<u8>(), 0u8..5, vec(prop_oneof![any::<u8>(), Just(0), Just(1), Just(0x81)], 0..80)), 0..12),
        noise in vec(any::<u8>(), 0..600),
    ) {
        let frames = frames.iter().map(|(kind, flags, stream, payload)| {
            crate::frames::frame(*kind, *flags, u32::from(*stream), payload)
        });
        bodies::wire(&[frames.collect::<Vec<_>>().concat(), noise].concat());
    }
}
