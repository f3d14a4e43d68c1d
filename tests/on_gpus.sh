#!/bin/bash
# Run tests/ (without the notebooks) on a machine with several GPUs in minutes: tests/on_gpus.sh FOLDER
#
# `make test` does the same one test after the other. Here files whose tests use GPUs and all others run side by side,
# each half of the cores for one of the two, then those that read how much of a GPU is in use, alone. No file is split: a
# file shares its launches. FOLDER gets the logs. Use the Python that has the packages, as PYTHON=.venv/bin/python.
set -u
OUT=${1:?name a folder for the logs}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
CORES=$(nproc)  # before OMP_NUM_THREADS, which nproc obeys
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONFAULTHANDLER=1 TEST_TIME_FACTOR=${TEST_TIME_FACTOR:-0.4}
ALWAYS="-p no:benchmark -p no:cacheprovider -vv -ra --tb=long --durations=30 -o faulthandler_timeout=150 --disable-warnings"
SPREAD="--dist loadfile --no-loadscope-reorder"
ON_GPUS=""
for name in launch zero tensor_parallel pipeline data_parallel mesh offload offload_configs libraries_deepspeed \
  quantization link traffic activations packing nvml; do ON_GPUS="$ON_GPUS tests/test_$name.py"; done
OTHERS=$(ls tests/test_*.py | grep -v -x -F "$(printf '%s\n' $ON_GPUS)")
TOGETHER="not campaign and not gpu_memory"
# More than three launches on a GPU at once: each gets a slice of its time, and a collective waits for its peer's slice.
taskset -c $((CORES / 2))-$((CORES - 1)) timeout 420 "$PYTHON" -m pytest $ALWAYS -n 3 $SPREAD -m "$TOGETHER" $ON_GPUS \
  > "$OUT/gpus.log" 2>&1 &
FIRST=$!
taskset -c 0-$((CORES / 2 - 1)) timeout 420 "$PYTHON" -m pytest $ALWAYS -n 6 $SPREAD -m "$TOGETHER" $OTHERS \
  > "$OUT/others.log" 2>&1 &
SECOND=$!
status=0
wait $FIRST || status=$?
wait $SECOND || status=$?
timeout 150 "$PYTHON" -m pytest $ALWAYS -m gpu_memory tests/test_launch.py tests/test_nvml.py > "$OUT/memory.log" 2>&1 || status=$?
grep -hE "^(FAILED|ERROR)|worker .* crashed|=.* (passed|failed)" "$OUT"/{gpus,others,memory}.log | cut -c1-300
exit $status
