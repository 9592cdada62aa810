#!/usr/bin/env bash
# Of model.safetensors.index.json, transformers reads which files there are; where it says a tensor lies is not looked at.
#
# Packages: transformers 4.46.3 and 5.23.0, torch 2.13.0.
# Input: a LLaMA in shards, and the same with one line less in the index's weight_map (that of model.norm.weight), which
#   still names every file.
# Behaviour: both versions load the tensor all the same, since they take whatever the named files hold. 4.46 says in its
#   loading info and in a warning that the tensor is missing and "newly initialized", which it is not; 5.23 says nothing.
#   A reader that goes by the index, or refuses one that is not exact, and transformers disagree about the checkpoint.
# Seen:
#   4.46.3: reported missing ['model.norm.weight'], loaded from the file True
#   5.23.0: reported missing [], loaded from the file True
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
layer new transformers==5.23.0
layer old transformers==4.46.3
cat > "$folder/run.py" <<'PY'
import json, os, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

model, name = sys.argv[1] + "/model", "model.norm.weight"
index = model + "/model.safetensors.index.json"
if not os.path.exists(model):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2))
    torch.nn.init.normal_(made.model.norm.weight)
    made.save_pretrained(model, max_shard_size="20kB")
    with open(index) as handle:
        content = json.load(handle)
    with open(model + "/file", "w") as handle:
        handle.write(content["weight_map"].pop(name))
    assert open(model + "/file").read() in content["weight_map"].values()
    with open(index, "w") as handle:
        json.dump(content, handle)
stored = load_file(model + "/" + open(model + "/file").read())[name]
loaded, info = LlamaForCausalLM.from_pretrained(model, torch_dtype=torch.float32, output_loading_info=True)
missing, same = sorted(info["missing_keys"]), torch.equal(loaded.model.norm.weight.detach(), stored)
print(f"{transformers.__version__}: reported missing {missing}, loaded from the file {same}")
assert same
assert missing == ([name] if transformers.__version__.startswith("4.") else [])
PY
for version in old new; do "$folder/$version/bin/python" "$folder/run.py" "$folder" 2> "$folder/err" || { cat "$folder/err"; exit 1; }; done
echo "still so"
