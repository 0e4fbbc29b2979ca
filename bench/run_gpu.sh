#!/usr/bin/env bash
# For a machine with an NVIDIA GPU: all tests that need one, none skipped, then bench/gpu.py.
#
#     bench/run_gpu.sh RESULTS [options of bench/gpu.py]
#
# Leaves in the folder RESULTS, which it makes: machine.txt, tests.txt, gpu.jsonl, bench.txt. The
# bench runs even if tests fail; the exit status is 0 only if both went well. Blocks go below
# RESULTS unless --root says otherwise: name a folder on the disk that is to be measured.
# PYTHON names an interpreter that has torch with CUDA and CuPy; .venv/bin/python otherwise.
set -uo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
results=$(cd "$1" && pwd) || exit 2
shift
if [[ -e ${results}/gpu.jsonl ]]; then
    echo "${results} holds results already; name another folder" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "${here}" || exit 2
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="${here}/src${PYTHONPATH:+:${PYTHONPATH}}"
status=0

{ nvidia-smi; "${python}" -m kvgds doctor; } >"${results}/machine.txt" 2>&1
KVGDS_REQUIRE_GPU=1 "${python}" -m pytest -m gpu 2>&1 | tee "${results}/tests.txt" || status=1
"${python}" bench/gpu.py --root "${results}" --out "${results}/gpu.jsonl" "$@" 2>&1 |
    tee "${results}/bench.txt" || status=1
echo "results are in ${results}"
exit "${status}"
