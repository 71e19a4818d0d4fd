//! See `drover_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| drover_tests::fuzz::report(data));
