# Finding a Rust toolchain that is new enough.
# shellcheck shell=bash

RUST_WANTED=1.94

need_cargo() {
    # A CI job may come without a login's environment.
    export HOME=${HOME:-/root}
    [ ! -d "$HOME/.cargo/bin" ] || PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || die "there is no cargo on the PATH" \
        "install the stable Rust toolchain, $RUST_WANTED or later, with rustfmt and clippy"
    local found
    found=$(cargo --version | awk '{print $2}')
    [ "$(printf '%s\n' "$RUST_WANTED" "$found" | sort -V | head -n 1)" = "$RUST_WANTED" ] ||
        die "cargo is $found, Drover needs $RUST_WANTED or later" "update the Rust toolchain"
}
