# A PostgreSQL server for tests: its data in a directory that goes with it, reached by a socket there alone.
# shellcheck shell=bash

POSTGRESQL_DIR=
POSTGRESQL_URL=

# Runs one of the server's programs, which refuse to be run by root.
postgresql_run() {
    local program
    program=$(printf '%s\n' /usr/lib/postgresql/*/bin/"$1" | sort -V | tail -n 1); shift
    runuser -u postgres -- "$program" "$@"
}

postgresql_start() {
    POSTGRESQL_DIR=$(mktemp -d)
    chown postgres "$POSTGRESQL_DIR"
    (
        cd "$POSTGRESQL_DIR"
        postgresql_run initdb -D data -A trust --no-sync
        postgresql_run pg_ctl -D data -l log -w -o "-k $POSTGRESQL_DIR -c listen_addresses= -F" start
    ) >"$POSTGRESQL_DIR/start.log" 2>&1 || { cat "$POSTGRESQL_DIR"/*log >&2; die "PostgreSQL does not start"; }
    POSTGRESQL_URL=postgresql://postgres@${POSTGRESQL_DIR//\//%2F}/postgres
}

postgresql_stop() {
    [ -n "$POSTGRESQL_DIR" ] || return 0
    (cd "$POSTGRESQL_DIR" && postgresql_run pg_ctl -D data -m immediate stop) >/dev/null 2>&1 || true
    rm -rf "$POSTGRESQL_DIR"
    POSTGRESQL_DIR=
}
