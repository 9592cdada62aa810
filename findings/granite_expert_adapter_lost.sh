#!/usr/bin/env bash
# A LoRA on the experts and the router of a Granite 4, made with transformers 5.12, loses both in 5.23; the rest of it works.
#
# Packages: transformers 5.12.0 (makes the adapter) and 5.23.0 (reads it), PEFT 0.21.2 with both, PyTorch 2.13.0.
# Input: a tiny granitemoehybrid with experts and random weights, saved by 5.12.0, and an adapter on q_proj, on the
#   router's layer and on the two parameters of the experts, both factors random, as if trained.
# Behaviour: 5.13 renamed the router and the experts' parameters in memory. The base checkpoint is renamed as it is read. PEFT
#   renames an adapter's tensors likewise, but not its lists of targets, except for families that it knows by name (Mixtral
#   and Qwen 2 MoE). The lists find q_proj alone, so no layer is made for the others, and the tensors for them, most of
#   the file, are passed over. A warning says that no parameter was matched; of the router and of the tensors that are
#   left over nothing is said.
# Seen: layers with an adapter, and the largest difference of the logits from those of 5.12.0
#   5.12.0: 7 of 7, 0
#   5.23.0: 1 of 7, 2.2 (the base model alone: 7e-06)
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
cat > "$folder/experts.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

folder = Path(sys.argv[1])


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(32)[None]).logits


made = transformers.__version__ == "5.12.0"
if made:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "granitemoehybrid", vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        mamba_n_heads=8, mamba_d_head=16, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32,
        shared_intermediate_size=128, layer_types=["mamba", "attention"], initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(
        target_modules=["q_proj", "router.layer"],
        target_parameters=["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"],
        init_lora_weights=False,
    )
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
model = AutoModelForCausalLM.from_pretrained(folder / "base")
plain = logits(model)
model = PeftModel.from_pretrained(model, folder / "adapter")
adapted = logits(model)
if made:
    torch.save((plain, adapted), folder / "logits.pt")
saved = sum("lora_B" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
layers = sum("lora_B" in name for name, _ in model.named_parameters())
base, other = (float((a - b).abs().max()) for a, b in zip((plain, adapted), torch.load(folder / "logits.pt")))
print(f"{transformers.__version__}: {layers} of {saved}, {other:.2g} (the base model alone: {base:.1g})")
assert base < 1e-4 and (layers == saved and other < 1e-4 if made else 0 < layers < saved and other > 0.1)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy psutil pyyaml
"$folder/env/bin/pip" install --quiet --no-deps peft==0.21.2 accelerate==1.15.0
for version in 5.12.0 5.23.0; do
    "$folder/env/bin/pip" install --quiet --target "$folder/$version" "transformers==$version"
    PYTHONPATH="$folder/$version" "$folder/env/bin/python" "$folder/experts.py" "$folder" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
    if grep -iE "missing|unexpected|router" "$folder/err"; then echo "it is said now"; exit 1; fi
done
grep -q "no parameter was matched" "$folder/err"
echo "still so"
