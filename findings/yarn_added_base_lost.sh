#!/usr/bin/env bash
# Long contexts switched on by hand, as model cards say it, in a config that transformers 5 saved: the rotary base is lost.
#
# Packages: transformers 5.23.0; PyTorch is not needed, only config.json is read.
# Input: a Qwen 2 config with rope_theta 1000000, saved by transformers 5.23 itself, to which `rope_scaling` of kind "yarn"
#   is added, the lines that cards of Qwen 2 to 3 have for longer texts.
# Behaviour: 5.x saves the base in `rope_parameters`. Where there is a `rope_scaling` too, it is taken in place of
#   `rope_parameters`, and not beside it: the base in the latter is not looked at, and the default of 10000 is used. The
#   same lines in the config that was published (a base of its own, no rope_parameters) keep the base.
# Seen:
#   published, with yarn: base 1e+06
#   saved, with yarn: base 10000 (nothing on standard error about it)
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.23.0"
mkdir "$folder/published"
cat > "$folder/published/config.json" <<'JSON'
{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896,
 "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
 "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": true}
JSON
"$folder/venv/bin/python" - "$folder" <<'PY' 2> "$folder/err"
import json, sys
from pathlib import Path
from transformers import AutoConfig

folder = Path(sys.argv[1])
AutoConfig.from_pretrained(folder / "published").save_pretrained(folder / "saved")
bases = {}
for name in ("published", "saved"):
    file = folder / name / "config.json"
    config = json.loads(file.read_text())
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    file.write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(folder / name).rope_parameters
    assert read["rope_type"] == "yarn" and read["factor"] == 4.0, read
    bases[name] = read["rope_theta"]
    print(f"{name}, with yarn: base {read['rope_theta']:g}")
assert bases == {"published": 1000000.0, "saved": 10000.0}, bases
PY
if grep -i -E "rope|theta" "$folder/err"; then echo "something is said now"; exit 1; fi
echo "still so"
