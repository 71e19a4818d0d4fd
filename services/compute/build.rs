//! How the agent is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Relocations packed: they are read at start, and would stay in memory, 0.8 MiB of them.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
