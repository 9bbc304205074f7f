#!/usr/bin/env bash
# SFT with FSDP on this machine: bash examples/run_sft_fsdp.sh [arguments of train_sft_fsdp.py]
# RANKS=2 sets the number of processes (default 4, one a GPU); RANKS=2 also works on a CPU alone.
set -euo pipefail
exec torchrun --standalone --nproc_per_node="${RANKS:-4}" "$(dirname "$0")/train_sft_fsdp.py" "$@"
