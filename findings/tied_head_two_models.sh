#!/usr/bin/env bash
# One checkpoint, two models: a head beside `tie_word_embeddings: true` is dropped by transformers 4 and used by 5.
#
# Packages: transformers 4.46.3 and 5.23.0, torch 2.13.0.
# Input: a LLaMA with random weights and a tied head, saved by 4.46.3, with an `lm_head.weight` of other values added to
#   its model.safetensors, as fine-tunes that untied the head and kept the config have it.
# Behaviour: 4.46 ties as the config says; the file's head is not used and nothing is printed. 5.23 compares the two
#   tensors, does not tie, and computes with the file's head (one log line; no error).
# Seen:
#   4.46.3: head of the file used False, tied True
#   5.23.0: head of the file used True, tied False
#   largest difference of the logits: 5.9 at a standard deviation of 0.1 (4.46.3) and 1.7 (5.23.0)
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
import os, sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
if not os.path.exists(folder + "/model"):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder + "/model")
    tensors = load_file(folder + "/model/model.safetensors")
    tensors["lm_head.weight"] = 0.3 * torch.randn(64, 32)
    save_file(tensors, folder + "/model/model.safetensors", {"format": "pt"})
head = load_file(folder + "/model/model.safetensors")["lm_head.weight"]
model = LlamaForCausalLM.from_pretrained(folder + "/model", torch_dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.arange(16)[None]).logits
used, tied = torch.equal(model.lm_head.weight, head), model.lm_head.weight is model.model.embed_tokens.weight
print(f"{transformers.__version__}: head of the file used {used}, tied {tied}")
older = transformers.__version__.startswith("4.")
assert (used, tied) == (not older, older)
if older:
    torch.save(logits, folder + "/logits.pt")
else:
    other = torch.load(folder + "/logits.pt")
    distance = float((logits - other).abs().max())
    print(f"largest difference of the logits: {distance:.1f} at a standard deviation of "
          f"{float(other.std()):.1f} (4.46.3) and {float(logits.std()):.1f} (5.23.0)")
    assert distance > float(other.std())
PY
for version in old new; do "$folder/$version/bin/python" "$folder/run.py" "$folder" 2> "$folder/err"; done
echo "still so"
