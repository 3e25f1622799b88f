#!/usr/bin/env bash
# What is to be measured on a machine with an NVIDIA GPU, most telling first; each part has its own time limit.
# Writes one log per part into the folder given, by default ./gpu_session:  bash benchmarks/gpu_session.sh [folder]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_session}
mkdir -p "$out"
export PATH="$PWD/.uv/bin:$PATH"  # where `make` puts uv
run="uv run --locked --extra cuda"

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    echo "exit $?, last lines:"
    tail -n 12 "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/machine.txt" 2>&1
lscpu >>"$out/machine.txt"
$run python -c "import jax, mujoco, warp; print(jax.__version__, mujoco.__version__, warp.__version__, jax.devices())" >>"$out/machine.txt" 2>&1

mjx="--engine mjx --impl warp --renderer warp"
warmup="benchmarks.throughput $mjx --size 64 --steps 1 --repeats 1 --worlds 64 --measure physics pixels"
part warmup 900 $run -m $warmup  # compiles Warp's kernels, once for this machine
part fidelity 300 $run -m benchmarks.fidelity --engines mjx-warp mjx-warp-exact --mjx-seeds 40 --pictures "$out/fidelity.png"
part physics 300 $run -m benchmarks.throughput $mjx --measure physics state --worlds 256 1024 4096 8192
for mode in WARP WARP_STAGED WARP_STAGED_EX NONE; do
    part "graphs_$mode" 200 env ALOHA_JAX_GRAPH_MODE=$mode $run -m benchmarks.throughput $mjx --size 64 --measure state pixels --worlds 1024
done
part render_64 300 $run -m benchmarks.throughput $mjx --size 64 --measure render pixels --worlds 256 1024 4096
part render_84 300 $run -m benchmarks.throughput $mjx --size 84 --measure render pixels --worlds 1024 4096
part shadows_64 300 $run -m benchmarks.throughput $mjx --size 64 --quality shadows --measure render pixels --worlds 1024
part ppo_64 500 $run -m benchmarks.throughput $mjx --size 64 --measure state-policy state-ppo pixel-policy pixel-ppo --worlds 1024 4096
part c_egl 400 $run -m benchmarks.throughput --engine c --renderer egl --size 64 --worlds 1024
part c_egl_single 300 $run -m benchmarks.throughput --engine c --renderer egl --size 64 --worlds 1024 --measure render pixel-policy --no-double-buffer
part c_warp 300 $run -m benchmarks.throughput --engine c --renderer warp --size 64 --measure pixels pixel-ppo --worlds 1024
part jax 400 $run -m benchmarks.throughput --engine mjx --impl jax --measure physics state --worlds 1024
train="train.py --preset gpu --engine mjx --renderer warp --final-eval-episodes 0 --overwrite"
part train_cold 300 $run $train --total-timesteps 1000000 --log-dir "$out/run"
part train_warm 300 $run $train --total-timesteps 1000000 --log-dir "$out/run"
part profile 300 $run $train --total-timesteps 400000 --log-dir "$out/run" --profile "$out/profile"
part guide 400 $run train.py --preset guide --engine mjx --renderer warp --total-timesteps 16384 --final-eval-episodes 0 \
    --overwrite --log-dir "$out/guide"
# The C engine and OpenGL call back through JAX's CPU backend.
part tests 600 env JAX_PLATFORMS=cuda,cpu $run pytest -m "not slow" tests/test_mjx.py tests/test_ray_tracing.py -q
