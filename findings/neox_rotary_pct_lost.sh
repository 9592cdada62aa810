#!/usr/bin/env bash
# transformers 5 saves a GPT-NeoX config that transformers 4 reads with other rotary dimensions, without a word.
#
# Packages: transformers 5.23.0 (writes) and 4.46.3 (reads); PyTorch is not needed, the two only meet in config.json.
# Input: a GPT-NeoX config of polyglot-ko-1.3b's kind, rotary_pct 0.5 (half of each head's dimensions are turned).
# Behaviour: 5.23 keeps the setting in rope_parameters.partial_rotary_factor and writes no `rotary_pct` any more; 4.46
#   knows `rotary_pct` alone and takes its default of 0.25. The weights load, and half of the rotary dimensions are off.
#   Other readers of the older field are left without it too (not run here: the converters of llama.cpp and CTranslate2).
#   A setting that is the same in both versions (hidden_size) travels, so nothing looks wrong.
# Seen:
#   5.23.0 wrote: rotary_pct absent, partial_rotary_factor 0.5
#   4.46.3 reads: rotary_pct 0.25, hidden_size 2048, no warning
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
for version in 5.23.0 4.46.3; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
mkdir "$folder/source"
cat > "$folder/source/config.json" <<'JSON'
{"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 30080, "hidden_size": 2048,
 "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192, "rotary_pct": 0.5,
 "rotary_emb_base": 10000, "tie_word_embeddings": false, "transformers_version": "4.27.1"}
JSON
"$folder/5.23.0/bin/python" - "$folder" <<'PY' 2> "$folder/err"
import json, sys
from transformers import AutoConfig
folder = sys.argv[1]
AutoConfig.from_pretrained(folder + "/source").save_pretrained(folder + "/saved")
saved = json.load(open(folder + "/saved/config.json"))
factor = saved["rope_parameters"]["partial_rotary_factor"]
print("5.23.0 wrote: rotary_pct", saved.get("rotary_pct", "absent") , "and partial_rotary_factor", factor)
assert "rotary_pct" not in saved and factor == 0.5
PY
"$folder/4.46.3/bin/python" - "$folder" <<'PY' 2> "$folder/err"
import sys
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1] + "/saved")
print("4.46.3 reads: rotary_pct", config.rotary_pct, "and hidden_size", config.hidden_size)
assert config.rotary_pct == 0.25 and config.hidden_size == 2048
PY
if grep -i rotary "$folder/err"; then echo "4.46.3 says something now"; exit 1; fi
echo "still so"
