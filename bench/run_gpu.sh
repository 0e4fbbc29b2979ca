#!/usr/bin/env bash
# For a machine with an NVIDIA GPU: all tests that need one, none skipped, then the benches of its
# memory: bench/gpu.py and bench/files.py --gpu.
#
#     bench/run_gpu.sh RESULTS [options of both benches]
#
# Leaves in the folder RESULTS, which it makes: machine.txt, tests.txt, gpu.jsonl, bench.txt. The
# benches run even if tests fail; the exit status is 0 only if all went well. Blocks go below
# RESULTS unless --root says otherwise: name a folder on the disk that is to be measured.
# PYTHON names an interpreter that has torch with CUDA and CuPy; .venv/bin/python otherwise.
set -uo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
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
# The longest last: of a run that is cut off the others are there.
for bench in gpu.py "files.py --gpu 0 --only models,depths" "files.py --gpu 0 --only sizes"; do
    # shellcheck disable=SC2086 # a script and its options
    "${python}" bench/${bench} --root "${results}" --out "${results}/gpu.jsonl" "$@" 2>&1 |
        tee -a "${results}/bench.txt" || status=1
done
echo "results are in ${results}"
exit "${status}"
