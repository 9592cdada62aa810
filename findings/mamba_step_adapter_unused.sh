#!/usr/bin/env bash
# A LoRA on the step projection (dt_proj) of Mamba or Jamba is ignored by transformers 5.23 until it is merged; 4.57 uses it.
#
# Packages: transformers 4.57.1 (makes the adapter) and 5.23.0, PEFT 0.21.2, accelerate 1.15.0, PyTorch 2.13.0.
# Input: a tiny Mamba and a tiny Jamba with random weights, each with an adapter on in_proj and dt_proj as LoRA makes it.
# Behaviour: 5.23 multiplies with `dt_proj.weight` and does not call the layer, so PEFT's part of it is passed by, on
#   processors without kernels too, and gets no gradient if it is trained. Merging writes it into the weight, and from
#   there it counts. PEFT knows of Mamba's layers that are not called and refuses out_proj and conv1d; dt_proj it takes,
#   and of Jamba every layer, as "all-linear" asks for. Nothing is said, the adapter's other layers work.
# Seen: largest difference of the logits, without dt_proj's part of the adapter, and after merging the whole adapter
#   mamba, 4.57.1: without it 2.8, merged 4.8e-06
#   mamba, 5.23.0: without it 0, merged 2.8
#   jamba, 4.57.1: without it 3.5, merged 5.8e-06
#   jamba, 5.23.0: without it 0, merged 3.5
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
cat > "$folder/step.py" <<'PY'
import sys

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

folder, kind = sys.argv[1:]
if not transformers.__version__.startswith("5."):
    torch.manual_seed(0)
    fields = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    if kind == "jamba":
        fields |= dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_experts=1, use_mamba_kernels=False)
        fields |= dict(num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    model.save_pretrained(f"{folder}/{kind}")
    # Both factors random, as if trained.
    lora = LoraConfig(target_modules=["in_proj", "dt_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(f"{folder}/{kind}-adapter")

base = AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}")
model = PeftModel.from_pretrained(base, f"{folder}/{kind}-adapter").eval()


def logits():
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits


steps = [module for name, module in model.named_modules() if name.endswith("dt_proj")]
assert steps
whole = logits()
for step in steps:
    step.enable_adapters(False)
without = float((whole - logits()).abs().max())
for step in steps:
    step.enable_adapters(True)
model = model.merge_and_unload()
merged = float((whole - logits()).abs().max())
print(f"{kind}, {transformers.__version__}: without it {without:.2g}, merged {merged:.2g}")
if transformers.__version__.startswith("5."):
    assert without == 0 and merged > 0.1
else:
    assert without > 0.1 and merged < 1e-3
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
for version in 4.57.1 5.23.0; do
    "$folder/env/bin/pip" install --quiet "transformers==$version" peft==0.21.2 accelerate==1.15.0
    for kind in mamba jamba; do
        "$folder/env/bin/python" "$folder/step.py" "$folder" $kind 2> "$folder/err" || { cat "$folder/err"; exit 1; }
        if grep -i "dt_proj" "$folder/err"; then echo "it is said now"; exit 1; fi
    done
done
echo "still so"
