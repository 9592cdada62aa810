#!/usr/bin/env bash
# The step limit of a Mamba 2 saved by transformers 5.23 is an object in its JSON, which 4.57 hands to the model as it is.
#
# Packages: transformers 5.23.0 (writes) and 4.57.1 (reads); PyTorch is not needed, the two only meet in config.json.
# Input: the default Mamba 2 config, whose `time_step_limit` is from 0 to infinity.
# Behaviour: 4.57.1 wrote the bare word Infinity, which JSON does not have; 5.23 writes {"__float__": "Infinity"} and reads
#   that back. 4.57.1 reads it without a word, as a dict in the place of a number, and its model uses that as the upper
#   end of a clamp. Files of 4.57.1 are read right by 5.23.
# Seen:
#   5.23.0 wrote [0.0, {'__float__': 'Infinity'}] and reads inf
#   4.57.1 reads dict, no warning
#   4.57.1 wrote Infinity, 5.23.0 reads inf
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
for version in 5.23.0 4.57.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
"$folder/5.23.0/bin/python" - "$folder" <<'PY'
import json, math, sys
from pathlib import Path
from transformers import AutoConfig, Mamba2Config

folder = Path(sys.argv[1]) / "new"
Mamba2Config().save_pretrained(folder)
written = json.loads((folder / "config.json").read_text())["time_step_limit"]
read = AutoConfig.from_pretrained(folder).time_step_limit[1]
print("5.23.0 wrote", written, "and reads", read)
assert written[1] == {"__float__": "Infinity"} and read == math.inf
PY
"$folder/4.57.1/bin/python" - "$folder" <<'PY' 2> "$folder/err"
import sys
from pathlib import Path
from transformers import AutoConfig, Mamba2Config

folder = Path(sys.argv[1])
limit = AutoConfig.from_pretrained(folder / "new").time_step_limit[1]
print("4.57.1 reads", type(limit).__name__)
assert isinstance(limit, dict), limit
Mamba2Config().save_pretrained(folder / "old")
assert "Infinity" in (folder / "old" / "config.json").read_text()
PY
if grep -i -E "time_step|float" "$folder/err"; then echo "4.57.1 says something now"; exit 1; fi
"$folder/5.23.0/bin/python" - "$folder" <<'PY'
import math, sys
from pathlib import Path
from transformers import AutoConfig

limit = AutoConfig.from_pretrained(Path(sys.argv[1]) / "old").time_step_limit[1]
print("4.57.1 wrote Infinity, 5.23.0 reads", limit)
assert limit == math.inf
PY
echo "still so"
