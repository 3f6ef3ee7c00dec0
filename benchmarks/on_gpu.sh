#!/usr/bin/env bash
# Training, a training step and a summary on an accelerator, in at most ten minutes:
#
#   bash benchmarks/on_gpu.sh OUTPUT [NETWORKS OF benchmarks.cost]
#
# writes on_gpu.json, which contains all numbers, the tables as ladder.md, cost.md and
# summary.md, machine.txt and the log of the engines' tests to OUTPUT. Each part has a
# limit, and the others go on without it.
#
#   DATA=FOLDER  the files of Fashion-MNIST, where Debian's package is not installed
#   SCALE=16     divides the widths of the networks of the ladder and of the summary, and
#   DIVIDE=50    the numbers of steps of the ladder (5 by default), for a quick look
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

rungs=(gpt_scan_gpu resnet18_gpu)
ladder=(--clock wall --rates 1 --seeds 1 --scale "${SCALE:-1}" --divide "${DIVIDE:-5}"
    --optimizers partition_newton adamw_cosine muon_cosine total_steps
    --output "$output/ladder" ${DATA:+--data-dir "$DATA"})
for rung in "${rungs[@]}"; do
    timeout 170 python3 -m benchmarks.ladder --rungs "$rung" --minutes 2.3 "${ladder[@]}" > "$output/$rung.log" 2>&1
done
timeout 25 python3 -m benchmarks.ladder --rungs "${rungs[@]}" --report "${ladder[@]}" > "$output/ladder.log" 2>&1
timeout 110 python3 -m benchmarks.cost --networks "${networks[@]}" \
    --optimizers adamw muon partition_newton --turns 1 --seconds 2 --max-seconds 8 \
    --output "$output/cost" > "$output/cost.log" 2>&1
timeout 65 python3 -m benchmarks.summary --model mlp cnn transformer lstm resnet18 \
    --engine adjoint --scale "${SCALE:-1}" --repeats 3 --output "$output/summary" > "$output/summary.log" 2>&1
timeout 45 python3 -m pytest -q -p no:cacheprovider --tb=short --maxfail=3 tests/test_engines.py \
    > "$output/tests.log" 2>&1
python3 - "$output" << 'END'
import json
import pathlib
import shutil
import sys

output = pathlib.Path(sys.argv[1])
found = {"machine": (output / "machine.txt").read_text()}
for part in ("ladder", "cost", "summary"):
    if (output / part / f"{part}.json").exists():
        found[part] = json.loads((output / part / f"{part}.json").read_text())
        shutil.copy(output / part / f"{part}.md", output)
(output / "on_gpu.json").write_text(json.dumps(found, indent=1))
print(output / "on_gpu.json", "contains", ", ".join(found))
END
tail -n 3 "$output/tests.log"
