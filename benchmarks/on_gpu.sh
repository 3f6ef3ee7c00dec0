#!/usr/bin/env bash
# What a training step and a summary cost on an accelerator, in at most nine minutes:
#
#   bash benchmarks/on_gpu.sh OUTPUT [NETWORKS OF benchmarks.cost]
#
# writes machine.txt, cost.json and cost.md, summary.json and summary.md, and the log of
# the engines' tests to OUTPUT. Each part has a limit, and the others go on without it.
# SCALE=16 divides the widths of the networks of benchmarks.summary, for a quick look.
set -uo pipefail
cd "$(dirname "$0")/.."
output=$1
shift
networks=("$@")
[[ ${#networks[@]} -gt 0 ]] || networks=(spirals digits_cnn transformer transformer_6 resnet18)
mkdir -p "$output"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false

{
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    python3 -c "import sys, jax, optax, flax; print(sys.version.split()[0], jax.__version__, optax.__version__, flax.__version__, jax.devices())"
} > "$output/machine.txt" 2>&1

timeout 240 python3 -m benchmarks.cost --networks "${networks[@]}" \
    --optimizers adamw muon partition_newton --turns 2 --seconds 3 --max-seconds 12 \
    --output "$output/cost" > "$output/cost.log" 2>&1
timeout 150 python3 -m benchmarks.summary --model mlp cnn transformer lstm resnet18 \
    --engine adjoint --scale "${SCALE:-1}" --repeats 3 --output "$output/summary" > "$output/summary.log" 2>&1
timeout 90 python3 -m pytest -q -p no:cacheprovider --tb=short --maxfail=3 tests/test_engines.py \
    > "$output/tests.log" 2>&1
for part in cost summary; do
    cp "$output/$part/$part".{json,md} "$output"/ 2>/dev/null || true
done
tail -n 3 "$output/tests.log"
