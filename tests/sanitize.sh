#!/usr/bin/env bash
# The quick parity list under each tool of compute-sanitizer: wrong addresses, races in shared memory, memory that is
# read before it is written, wrong barriers. Needs a GPU, CuPy, and the tool from the CUDA toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

command -v compute-sanitizer >/dev/null || {
  echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit, in its bin folder" >&2
  exit 2
}
for tool in memcheck racecheck initcheck synccheck; do
  printf '\n=== %s\n' "$tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m cuconv parity --quick
done
