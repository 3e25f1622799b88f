#!/usr/bin/env bash
# What is to be measured on a machine with an NVIDIA GPU; docs/benchmarks.md has what was. Each part has a time limit, in seconds, and
# a log in the folder given, by default ./gpu_session.
#
#   bash benchmarks/gpu_session.sh                                         # everything: hours
#   bash benchmarks/gpu_session.sh out train_state train_pixels fidelity   # only these
#   bash benchmarks/gpu_session.sh list                                    # their names and limits
#   PYTHON=python3 bash benchmarks/gpu_session.sh                          # with that Python instead of uv's environment
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_session}
[ $# -gt 0 ] && shift
export PATH="$PWD/.uv/bin:$PATH"  # where `make` puts uv
python=${PYTHON:-uv run --locked --extra cuda python}
export PYTHONUNBUFFERED=1
failed=0

list() {  # list NAME SECONDS COMMAND...
    printf '%s %s %s\n' "$1" "$2" "${*:3}"
}

run() {  # run NAME SECONDS COMMAND...
    local name=$1 limit=$2 status i
    shift 2
    [[ -z $chosen || " $chosen " == *" $name "* ]] || return
    echo "== $name: $*"
    for ((i = 1; i < $#; i++)); do  # what it is to write: if it fails, no later part is to take an earlier session's for it
        [[ ${!i} == --log-dir || ${!i} == --json ]] && rm -rf "${@:i+1:1}"
    done
    timeout -k 60 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "exit $status, last lines:"
    tail -n 12 "$out/$name.log"
    [ $status -eq 0 ] || failed=1
}

parts() {
    local part=$1  # what to do with each
    # The recipes as they are: C MuJoCo on the machine's cores, OpenGL on its GPU, which also learns.
    train="$python train.py --final-eval-episodes 0 --no-final-video --overwrite"
    teacher="--teacher pretrained/insertion-scratch"
    "$part" train_state 240 $train --preset state --log-dir "$out/state"
    "$part" train_polish 200 $train --preset polish --init-from "$out/state/final_model" --log-dir "$out/polish"
    "$part" judge_polish 200 $python eval.py --model-path "$out/polish/final_model" --n-episodes 200 --seed 5000000 --num-workers 8 \
        --json "$out/polish.json"
    "$part" train_pixels 500 $train --preset pixels $teacher --log-dir "$out/pixels"
    "$part" judge_pixels 300 $python eval.py --model-path "$out/pixels/final_model" --n-episodes 200 --seed 5000000 --num-workers 8 \
        --json "$out/pixels.json"
    "$part" c_egl 400 $python -m benchmarks.throughput --engine c --renderer egl --size 64 --worlds 1024
    single="--measure render pixel-policy --no-double-buffer"
    "$part" c_egl_single 300 $python -m benchmarks.throughput --engine c --renderer egl --size 64 --worlds 1024 $single

    # Everything on the GPU.
    mjx="--engine mjx --impl warp --renderer warp"
    throughput="$python -m benchmarks.throughput $mjx"
    # Compiles Warp's kernels, once for this machine.
    "$part" warmup 900 $throughput --size 64 --steps 1 --repeats 1 --worlds 64 --measure physics pixels
    "$part" fidelity 300 $python -m benchmarks.fidelity --engines mjx-warp mjx-warp-exact --mjx-seeds 40 --pictures "$out/fidelity.png"
    "$part" physics 400 $throughput --measure testspeed physics state --worlds 256 1024 4096 8192
    for mode in WARP WARP_STAGED WARP_STAGED_EX NONE; do
        "$part" "graphs_$mode" 200 env ALOHA_JAX_GRAPH_MODE=$mode $throughput --size 64 --measure state pixels --worlds 1024
    done
    "$part" render_64 300 $throughput --size 64 --measure render pixels --worlds 256 1024 4096
    "$part" render_84 300 $throughput --size 84 --measure render pixels --worlds 1024 4096
    "$part" shadows_64 300 $throughput --size 64 --quality shadows --measure render pixels --worlds 1024
    "$part" ppo_64 500 $throughput --size 64 --measure state-policy state-ppo pixel-policy pixel-ppo --worlds 1024 4096
    "$part" c_warp 300 $python -m benchmarks.throughput --engine c --renderer warp --size 64 --measure pixels pixel-ppo --worlds 1024
    "$part" jax 400 $python -m benchmarks.throughput --engine mjx --impl jax --measure physics state --worlds 1024
    gpu="$train --preset gpu"
    "$part" train_gpu 300 $gpu --log-dir "$out/gpu"
    # With shadows from the start: twice the rays, and pictures that the second stage need not get used to.
    "$part" train_gpu_shadows 300 $gpu --render-quality shadows --log-dir "$out/gpu-shadows"
    # `pixels` with everything on the GPU: the judge's physics by MJX-Warp, pictures by rays.
    "$part" train_pixels_mjx 500 $train --preset pixels $teacher --engine mjx --log-dir "$out/pixels-mjx"
    # More scenes in every update, and the state to predict: what makes a student several times as good in its first minutes (experiment 51).
    wide="--state-coef 1 --n-steps 4"
    "$part" train_gpu_wide 400 $gpu $wide --n-envs 4096 --log-dir "$out/gpu-wide"
    "$part" train_gpu_wide_egl 500 $train --preset gpu-polish $wide --n-envs 1024 --init-from "$out/gpu-wide/final_model" \
        --log-dir "$out/gpu-wide-egl"
    # Nothing but the task: PPO from pixels, without a teacher, by the reward of `scratch`.
    "$part" train_gpu_ppo 400 $train --preset pixels-ppo --engine mjx --n-envs 256 --batch-size 1024 --n-epochs 4 \
        --total-timesteps 2097152 --eval-freq 262144 --eval-episodes 128 --checkpoint-freq 524288 --log-dir "$out/gpu-ppo"
    # Its second stage, in which C MuJoCo simulates on the cores and OpenGL draws on the card what the judge sees.
    "$part" train_gpu_ppo_egl 240 $train --preset pixels-ppo-polish --engine c --n-envs 256 --batch-size 1024 --total-timesteps 491520 \
        --eval-freq 98304 --checkpoint-freq 98304 --init-from "$out/gpu-ppo/final_model" --log-dir "$out/gpu-ppo-egl"
    # The second stage of `gpu`, with pictures by OpenGL, which are the judge's, and all on the GPU.
    exact="$train --preset pixels-polish $teacher --state-coef 0 --n-steps 16 --init-from $out/gpu/final_model"
    judge="$python eval.py --n-episodes 200 --seed 5000000 --num-workers 8"
    "$part" train_gpu_egl 500 $train --preset gpu-polish --init-from "$out/gpu/final_model" --log-dir "$out/gpu-egl"
    "$part" train_gpu_warp 300 $exact --engine mjx --n-envs 1024 --batch-size 512 --total-timesteps 655360 --eval-freq 327680 \
        --checkpoint-freq 655360 --log-dir "$out/gpu-warp"
    "$part" judge_gpu_egl 300 $judge --model-path "$out/gpu-egl/final_model" --json "$out/gpu-egl.json"
    "$part" judge_gpu_wide_egl 300 $judge --model-path "$out/gpu-wide-egl/final_model" --json "$out/gpu-wide-egl.json"
    "$part" judge_gpu_ppo_egl 300 $judge --model-path "$out/gpu-ppo-egl/final_model" --json "$out/gpu-ppo-egl.json"
    "$part" judge_pixels_mjx 300 $judge --model-path "$out/pixels-mjx/final_model" --json "$out/pixels-mjx.json"
    "$part" judge_gpu_warp 300 $judge --model-path "$out/gpu-warp/final_model" --json "$out/gpu-warp.json"
    # What a second start saves: the same, with what the first compiled.
    "$part" train_again 300 $gpu --total-timesteps 262144 --log-dir "$out/run"
    "$part" profile 300 $gpu --total-timesteps 400000 --log-dir "$out/run" --profile "$out/profile"
    "$part" guide 400 $train --preset guide --engine mjx --total-timesteps 16384 --log-dir "$out/guide"
    # The C engine and OpenGL call back through JAX's CPU backend.
    "$part" tests 600 env JAX_PLATFORMS=cuda,cpu $python -m pytest -m "not slow" tests/test_mjx.py tests/test_ray_tracing.py -q
}

if [ "$out" = list ]; then
    out=gpu_session
    parts list
    exit
fi
if parts list | grep "^$out " >/dev/null; then
    echo "error: $out is a part: name a folder first, as in bash benchmarks/gpu_session.sh out $out" >&2
    exit 2
fi
chosen=$*
for name in $chosen; do
    if ! parts list | grep "^$name " >/dev/null; then  # not -q: it leaves early, and whoever writes to it dies of that
        echo "error: there is no part $name; bash benchmarks/gpu_session.sh list names them" >&2
        exit 2
    fi
done
mkdir -p "$out" || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/machine.txt" 2>&1
lscpu >>"$out/machine.txt"
$python -c "import jax, mujoco; print(jax.__version__, mujoco.__version__, jax.devices())" >>"$out/machine.txt" 2>&1
parts run
exit $failed
