#!/usr/bin/env bash
# A Granite 4 config saved by transformers 5.23 is refused by 4.57: the names of its kinds of blocks were changed.
#
# Packages: transformers 5.23.0 (writes) and 4.57.1 (reads); PyTorch is not needed, the two only meet in config.json.
# Input: a granitemoehybrid config with `layer_types` as published, "mamba" and "attention".
# Behaviour: 5.23 takes these names and writes "linear_attention" and "full_attention" in their place, by which other
#   hybrids are told. 4.57.1 knows the published names alone. So fine-tuning with 5.23 and serving with 4.57 do not go
#   together, though nothing in the weights changed.
# Seen:
#   published, read by 4.57.1: mamba mamba attention mamba
#   written by 5.23.0: linear_attention linear_attention full_attention linear_attention
#   that, read by 4.57.1: ValueError
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
for version in 5.23.0 4.57.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
mkdir "$folder/published"
cat > "$folder/published/config.json" <<'JSON'
{"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"], "vocab_size": 256,
 "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8,
 "mamba_d_head": 16, "num_local_experts": 0, "shared_intermediate_size": 128,
 "layer_types": ["mamba", "mamba", "attention", "mamba"]}
JSON
"$folder/5.23.0/bin/python" - "$folder" <<'PY'
import json, sys
from pathlib import Path
from transformers import AutoConfig

folder = Path(sys.argv[1])
AutoConfig.from_pretrained(folder / "published").save_pretrained(folder / "saved")
names = json.loads((folder / "saved" / "config.json").read_text())["layer_types"]
print("written by 5.23.0:", *names)
assert names == ["linear_attention", "linear_attention", "full_attention", "linear_attention"], names
PY
"$folder/4.57.1/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path
from transformers import AutoConfig

folder = Path(sys.argv[1])
print("published, read by 4.57.1:", *AutoConfig.from_pretrained(folder / "published").layer_types)
try:
    AutoConfig.from_pretrained(folder / "saved")
except ValueError as error:
    print("that, read by 4.57.1: ValueError,", error)
else:
    raise SystemExit("4.57.1 reads it now")
PY
echo "still so"
