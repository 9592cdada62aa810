#!/usr/bin/env bash
# `accelerate launch --cpu --num_processes 2` starts one process, and says nothing about the other.
#
# Packages: accelerate 1.15.0, torch 2.13.0.
# Input: a script that prints its process count, started by two launchers with the same request.
# Behaviour: with --cpu the launcher takes the route for one process, whatever --num_processes says: exit status 0, and the
#   warning about defaults lists only options that were not given. torchrun starts both.
# Seen:
#   accelerate launch --cpu --num_processes 2: 1 of 1
#   torchrun --nproc_per_node 2: 2 of 2
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HOME="$folder/home" CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$folder/run.py" <<'PY'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print(f"process of {accelerator.num_processes}", flush=True)
accelerator.end_training()
PY
"$folder/venv/bin/accelerate" launch --cpu --num_processes 2 "$folder/run.py" > "$folder/accelerate" 2> "$folder/err"
"$folder/venv/bin/torchrun" --nproc_per_node 2 "$folder/run.py" > "$folder/torchrun" 2>> "$folder/log"
count() { echo "$(grep -c "^process of" "$folder/$1") of $(sed -n 's/^process of //p' "$folder/$1" | head -1)"; }
echo "accelerate launch --cpu --num_processes 2: $(count accelerate)"
echo "torchrun --nproc_per_node 2: $(count torchrun)"
[ "$(count accelerate)" = "1 of 1" ] && [ "$(count torchrun)" = "2 of 2" ]
if grep -iE "num_processes|one process|single process" "$folder/err"; then echo "it is said now"; exit 1; fi
echo "still so"
