#!/bin/sh
# Builds a wheel for each architecture with zig as the C compiler, from a copy: the tree keeps the libraries of this machine.
set -eu
python=$1
output=$2
mkdir -p "$output"
output=$(cd "$output" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m hatchling build -t sdist -d "$work"
tar -xzf "$work"/*.tar.gz -C "$work"
cd "$work"/*/
for machine in x86_64 aarch64; do
  # The oldest libc that zig links for both; manylinux names it.
  CC="$python -m ziglang cc -target $machine-linux-gnu.2.17" CFLAGS="-s" \
    WHEEL_PLATFORM="manylinux_2_17_$machine" "$python" -m hatchling build -t wheel -d "$output"
done
