#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| durward_fuzz::pods(data));
