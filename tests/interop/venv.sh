#!/bin/sh
# Makes the virtualenv with the real oslo.messaging, once, and prints its python.
# usage: venv.sh DIRECTORY
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
directory=$(cd "$1" && pwd)
# Tests and benchmarks may ask at the same time.
exec 9>"$directory/.lock"
flock 9
if ! cmp -s "$here/requirements.txt" "$directory/.installed"; then
    # The release's own: another one on the PATH may be built against libraries that a test's environment hides.
    rm -rf "$directory/bin" "$directory/lib"
    /usr/bin/python3 -m venv "$directory" >&2
    "$directory/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt" >&2
    cp "$here/requirements.txt" "$directory/.installed"
fi
echo "$directory/bin/python"
