#!/usr/bin/env bash
# One quantiser's skip list leaves three different sets of layers as they are in three releases of transformers.
#
# Packages: transformers 4.57.6, 5.10.4 and 5.23.0 with bitsandbytes 0.50.2, torch 2.13.0, accelerate 1.15.0.
# Input: a LLaMA of 12 layers with random weights, loaded in 8 bits on the CPU with llm_int8_skip_modules=
#   ["lm_head", "model.layers.1", "self_attn.q_proj"]: one whole layer, and one projection of all layers.
# Behaviour (none says anything):
#   4.57.6 takes an entry that is followed by a dot anywhere in the path, or that is the whole path or its last part:
#     layer 1 is skipped, and "self_attn.q_proj" (the end of twelve paths) is not known.
#   5.10.4 takes an entry as a regular expression that the path begins with, at no boundary, or as the path's end:
#     "model.layers.1" is layers 1, 10 and 11, and q_proj is skipped everywhere.
#   5.23.0 keeps the boundary: layer 1, and q_proj everywhere.
# Seen: linear layers left in full precision, of 84 and the head
#   4.57.6: 7 (layers 1)
#   5.10.4: 30 (layers 1 10 11 and every q_proj)
#   5.23.0: 18 (layers 1 and every q_proj)
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$folder/base"
"$folder/base/bin/pip" install --quiet torch==2.13.0 numpy
site=$("$folder/base/bin/python" -c 'import site; print(site.getsitepackages()[0])')
layer() { # NAME PACKAGE...: an environment on top of the one that has torch
    python3 -m venv --without-pip "$folder/$1"
    echo "$site" > "$(echo "$folder/$1"/lib/python3*/site-packages)/base.pth"
    "$folder/base/bin/pip" --python "$folder/$1/bin/python" install --quiet "${@:2}"
}
cat > "$folder/run.py" <<'PY'
import re, sys
import torch, transformers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

folder, expected, others = sys.argv[1], sys.argv[2].split(","), sys.argv[3] == "q_proj"
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=2)
LlamaForCausalLM(config).save_pretrained(folder + "/model")
skip = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "model.layers.1", "self_attn.q_proj"])
model = LlamaForCausalLM.from_pretrained(folder + "/model", quantization_config=skip, device_map="cpu")
left = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]
whole = sorted({re.search(r"layers\.(\d+)", name)[1] for name in left if not name.endswith("q_proj")}, key=int)
queries = sum(name.endswith("q_proj") for name in left)
print(f"{transformers.__version__}: {len(left)} (layers {' '.join(whole)}{' and every q_proj' if queries == 12 else ''})")
assert whole == expected and (queries == 12) == others, left
PY
while read -r version layers others; do
    layer "$version" "transformers==$version" bitsandbytes==0.50.2 accelerate==1.15.0 < /dev/null
    "$folder/$version/bin/python" "$folder/run.py" "$folder" "$layers" "$others" < /dev/null 2> "$folder/err" || { tail -5 "$folder/err"; exit 1; }
done <<'VERSIONS'
4.57.6 1 none
5.10.4 1,10,11 q_proj
5.23.0 1 q_proj
VERSIONS
echo "still so"
