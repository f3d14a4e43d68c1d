#!/bin/bash
# Run tests/ (without the notebooks) on a machine with several GPUs in minutes: tests/on_gpus.sh FOLDER
#
# `make test` does the same one test after the other. Here three groups run side by side, each on its share of the
# cores: files whose tests use GPUs, the judges of the exercises, whose ranks use the CPU, and all others. The tests
# that read how much of a GPU is in use follow alone. Only the exercises are split among workers: in other files tests
# share launches. FOLDER gets the logs, and each failure when it happens. Use the Python that has the packages, as
# PYTHON=.venv/bin/python.
set -u
OUT=${1:?name a folder for the logs}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
rm -f "$OUT"/*.failures
CORES=$(nproc)  # before OMP_NUM_THREADS, which nproc obeys
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONFAULTHANDLER=1 TEST_TIME_FACTOR=${TEST_TIME_FACTOR:-0.4}
export PYTHONPATH=$PWD/tests${PYTHONPATH:+:$PYTHONPATH}  # the plugin is there
TOGETHER="not campaign and not gpu_memory"
BY_FILE="--dist loadfile --no-loadscope-reorder"
MARK=ON_GPUS_RUN=run-$$-

run_tests() {  # NAME, SECONDS, first and last core, options: pytest ends with its summary when the time is over
  env "$MARK" FAILURES="$OUT/$1.failures" taskset -c "$3-$4" timeout --foreground -s INT -k 20 "$2" \
    "$PYTHON" -m pytest -p failures_at_once -p no:benchmark -p no:cacheprovider -vv -ra --tb=long --durations=60 \
    -o faulthandler_timeout=150 --disable-warnings "${@:5}" > "$OUT/$1.log" 2>&1
}

end_leftovers() {  # ranks have sessions of their own, but the environment of their test
  for found in $(grep -lsa "$MARK" /proc/[0-9]*/environ); do kill -9 "${found//[^0-9]/}" 2> /dev/null; done
}

files() { for name in "$@"; do echo "tests/test_$name.py"; done; }
ON_GPUS=$(files launch zero tensor_parallel pipeline data_parallel mesh offload offload_configs libraries_deepspeed \
  quantization link traffic activations packing nvml)
EXERCISES=$(files exercises)
LONGEST=$(files train predict_validation errors watchdog predict resume torchrun)
OTHERS="$LONGEST $(ls tests/test_*.py | grep -v -x -F "$(printf '%s\n' $ON_GPUS $EXERCISES $LONGEST)")"
A=$((CORES / 3)) B=$((CORES * 3 / 4))
# More than three launches on a GPU at once: each gets a slice of its time, and a collective waits for its peer's slice.
run_tests gpus 400 0 $((A - 1)) -n 3 $BY_FILE -m "$TOGETHER" $ON_GPUS &
FIRST=$!
run_tests others 400 $A $((B - 1)) -n $(((B - A) * 3 / 5 + 1)) $BY_FILE -m "$TOGETHER" $OTHERS &
SECOND=$!
run_tests exercises 400 $B $((CORES - 1)) -n $(((CORES - B) * 3 / 4 + 1)) --dist load -m "$TOGETHER" $EXERCISES &
THIRD=$!
status=0
for group in $FIRST $SECOND $THIRD; do wait $group || status=$?; done
end_leftovers
run_tests memory 80 0 $((CORES - 1)) -m gpu_memory tests/test_launch.py tests/test_nvml.py || status=$?
end_leftovers
cat "$OUT"/*.failures 2> /dev/null | awk '  # the last lines of each
  function show() { for (i = n > 9 ? n - 9 : 1; i <= n; i++) print line[i]; n = 0 }
  /^=== / { show(); print; next } { line[++n] = $0 } END { show() }' | cut -c1-300
grep -hE "^(FAILED|ERROR)|worker .* crashed|=.* (passed|failed|error)" "$OUT"/{gpus,others,exercises,memory}.log | cut -c1-300
exit $status
