#!/usr/bin/env bash
# The exact settings of these runs. Usage: ./launch.sh [SEED] [+OVERLAY], for example ./launch.sh +tiny
# The text is looked for in DATA_PATH, then where the runs had it; +tiny is content with smoke/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
seed=42 overlay=
for word in "$@"; do case "$word" in +*) overlay=$word ;; *) seed=$word ;; esac; done
export PRESET="turbo_engram+cpu$overlay" SEED="$seed"
export CHECKPOINT_EVERY=0.0
export MUON=muoneq_r
export MATRIX_LR=0.08
export EVAL=doc
export TTT=lora
export TTT_LORA_LR=0.001
if [ -z "$overlay" ]; then
  export DEVICE=cpu
  export TRAIN_BATCH_TOKENS=4096
  export ITERATIONS=60
  export MAX_WALLCLOCK_SECONDS=0.0
  export NUMERICS=bf16
  export ATTENTION=blocked
  export COMPILE=on
  export MICRO_BATCH_TOKENS=4096
  export THREADS=1
fi
if [ -z "${DATA_PATH:-}" ]; then
  if [ "$overlay" = +tiny ] && [ -d smoke ]; then export DATA_PATH=smoke
  elif [ -f ../../../data/datasets/sample_sp1024/../../build_sample.py ]; then
    "${PYTHON:-python}" ../../../data/datasets/sample_sp1024/../../build_sample.py > /dev/null
    export DATA_PATH=../../../data/datasets/sample_sp1024
  else echo "error: set DATA_PATH to the folder of the shards" >&2; exit 2; fi
fi
if [ -n "$overlay" ]; then exec "${PYTHON:-python}" train_gpt.py; fi
exec "${PYTHON:-python}" train_gpt.py
