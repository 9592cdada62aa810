#!/usr/bin/env bash
# transformers 5.3.0 loads a model of remote code with a tied head and leaves the head without its weight.
#
# Packages: transformers 5.3.0 and 5.23.0, torch 2.13.0.
# Input: a tiny LLaMA with a tied head, saved by 5.3.0, so that the file has the embedding alone; and the same folder whose
#   config.json names a class of its own, which inherits all from LlamaForCausalLM.
# Behaviour: 5.3.0 loads the stock one as it was. Of the other one it says that the head is in the checkpoint too, which it is not,
#   and so does not tie it: no key is missing, and the logits are others, and others again in the next process. 5.23.0 ties both.
# Seen:
#   in the file: 20 tensors, head: False
#   5.3.0 stock: missing 0, head tied: True, logits as saved: True
#   5.3.0 own code: missing 0, head tied: False, logits as saved: False
#   5.23.0 stock: missing 0, head tied: True, logits as saved: True
#   5.23.0 own code: missing 0, head tied: True, logits as saved: True
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HOME="$folder/home" CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
for version in 5.3.0 5.23.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet torch==2.13.0 transformers==$version
done
cat > "$folder/modeling_own.py" <<'PY'
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
PY
cat > "$folder/save.py" <<'PY'
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=True)).eval()
model.save_pretrained(folder / "stock")
with torch.no_grad():
    torch.save(model(torch.arange(1, 9)[None]).logits, folder / "logits.pt")
shutil.copytree(folder / "stock", folder / "own code")
shutil.copy(folder / "modeling_own.py", folder / "own code")
config = json.loads((folder / "own code/config.json").read_text())
config["model_type"], config["architectures"] = "own_llama", ["OwnForCausalLM"]
config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
(folder / "own code/config.json").write_text(json.dumps(config))
names = load_file(folder / "own code/model.safetensors")
print(f"in the file: {len(names)} tensors, head: {'lm_head.weight' in names}")
PY
cat > "$folder/load.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

folder = Path(sys.argv[1])
for name in ("stock", "own code"):
    model, info = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True, output_loading_info=True)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        same = torch.allclose(model.eval()(torch.arange(1, 9)[None]).logits, torch.load(folder / "logits.pt"), atol=1e-5)
    missing = len(info["missing_keys"])
    print(f"{transformers.__version__} {name}: missing {missing}, head tied: {tied}, logits as saved: {same}")
PY
"$folder/5.3.0/bin/python" "$folder/save.py" "$folder" 2> /dev/null | tee "$folder/out"
"$folder/5.3.0/bin/python" "$folder/load.py" "$folder" 2> "$folder/err" | tee -a "$folder/out"
"$folder/5.23.0/bin/python" "$folder/load.py" "$folder" 2> /dev/null | tee -a "$folder/out"
grep -qx "in the file: 20 tensors, head: False" "$folder/out"
grep -qx "5.3.0 stock: missing 0, head tied: True, logits as saved: True" "$folder/out"
grep -qx "5.3.0 own code: missing 0, head tied: False, logits as saved: False" "$folder/out"
grep -qx "5.23.0 stock: missing 0, head tied: True, logits as saved: True" "$folder/out"
grep -qx "5.23.0 own code: missing 0, head tied: True, logits as saved: True" "$folder/out"
grep -q "both are present in the checkpoints" "$folder/err"
echo "still so"
