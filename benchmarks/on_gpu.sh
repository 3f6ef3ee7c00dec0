#!/usr/bin/env bash
# Training of large networks on an accelerator, a summary, and the engines' tests, in ten minutes:
#
#   bash benchmarks/on_gpu.sh OUTPUT
#
# writes on_gpu.json, which contains all numbers, the tables as compiled.md, ladder.md and
# summary.md, machine.txt and the log of the engines' tests to OUTPUT. Each part has a
# limit, and the others go on without it.
#
# All programs of the ladder are compiled first, at the same time, and kept: compiled.md has
# the seconds of that, in which the later optimizers of a rung find what XLA has tuned for
# the earlier ones. The runs that are compared find all of it, so that "with compiling" in
# ladder.md says nothing. XLA does not time algorithms for matrix products on transformers,
# and takes them from a library, which is faster to compile. For convolutions it does: without,
# a gradient of ResNet-18 took more than a second.
#
#   DATA=FOLDER  the files of Fashion-MNIST, where Debian's package is not installed
#   SCALE=16     divides the widths of the networks, and
#   DIVIDE=50    the numbers of steps of the ladder (3 by default), for a quick look
#   COMPILE=200  seconds at most for compiling, and
#   TRAIN=105    for the runs of each rung
#   RUNGS="..."  of the ladder
set -uo pipefail
cd "$(dirname "$0")/.."
output=$(realpath -m "$1")
mkdir -p "$output"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR="$output/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
read -ra rungs <<< "${RUNGS:-gpt_scan_gpu resnet18_gpu gpt_gpu}"

{
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    python3 -c "import sys, jax, optax, flax; print(sys.version.split()[0], jax.__version__, optax.__version__, flax.__version__, jax.devices())"
} > "$output/machine.txt" 2>&1

flags() { [[ $1 == gpt* ]] && echo "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"; }
ladder=(python3 -m benchmarks.ladder --clock wall --seeds 1 --carried 1 --scale "${SCALE:-1}"
    --optimizers partition_newton adamw_cosine muon_cosine total_steps
    ${DATA:+--data-dir "$DATA"} --output "$output/ladder")
compiling=(--rates 1 --steps-only --divide 1000000) # twenty steps of each optimizer
for rung in "${rungs[@]}"; do
    XLA_FLAGS=$(flags "$rung") timeout "${COMPILE:-200}" "${ladder[@]}" --rungs "$rung" "${compiling[@]}" \
        > "$output/$rung.compiling.log" 2>&1 &
done
workers=$(python3 -c "import xdist; print('-n 4')" 2> /dev/null)
# shellcheck disable=SC2086
XLA_FLAGS=$(flags gpt) timeout "${COMPILE:-200}" \
    python3 -m pytest -q $workers -p no:benchmark -p no:cacheprovider --tb=short tests/test_engines.py tests/test_presets.py tests/test_subspace.py > "$output/tests.log" 2>&1 &
wait
"${ladder[@]}" --rungs "${rungs[@]}" "${compiling[@]}" --report > /dev/null 2>&1
mv "$output/ladder/ladder.md" "$output/compiled.md"
mv "$output/ladder/ladder.json" "$output/compiled.json"

comparing=(--rates 3 --divide "${DIVIDE:-3}")
for rung in "${rungs[@]}"; do
    XLA_FLAGS=$(flags "$rung") timeout "${TRAIN:-105}" "${ladder[@]}" --rungs "$rung" "${comparing[@]}" > "$output/$rung.log" 2>&1
done
"${ladder[@]}" --rungs "${rungs[@]}" "${comparing[@]}" --report > /dev/null 2>&1
mv "$output/ladder/ladder.md" "$output/ladder/ladder.json" "$output"

timeout 50 python3 -m benchmarks.summary --model mlp cnn transformer lstm resnet18 \
    --engine adjoint --scale "${SCALE:-1}" --repeats 3 --output "$output/summary" > "$output/summary.log" 2>&1
mv "$output"/summary/summary.md "$output"/summary/summary.json "$output"
python3 - "$output" << 'END'
import json
import pathlib
import sys

output = pathlib.Path(sys.argv[1])
found = {"machine": (output / "machine.txt").read_text()}
for part in ("compiled", "ladder", "summary"):
    if (output / f"{part}.json").exists():
        found[part] = json.loads((output / f"{part}.json").read_text())
(output / "on_gpu.json").write_text(json.dumps(found, indent=1))
print(output / "on_gpu.json", "contains", ", ".join(found))
END
tail -n 3 "$output/tests.log"
