#!/usr/bin/env bash
# A PEFT adapter that trained the head of a GPT-NeoX loses it, without a word, where transformers calls the head otherwise.
#
# Packages: torch 2.13.0; transformers 4.46.3 with peft 0.13.2 (trains and saves), 5.23.0 with peft 0.21.2 (loads).
# Input: a GPT-NeoX with random weights, saved by 4.46.3, and LoRA on query_key_value with modules_to_save=["embed_out"].
# Behaviour: transformers 5.15 and later call the head `lm_head` and rename the base checkpoint's while loading. PEFT does not:
#   no module is called embed_out there, an entry of modules_to_save that names none is skipped, and so is the trained
#   head in adapter_model.safetensors. No error and no warning; the LoRA part is loaded.
# Seen: loss of the adapted model on its training text
#   4.46.3 + 0.13.2: 0.46 (reloaded there: 0.46)
#   5.23.0 + 0.21.2: 4.14, with nothing about the head on stderr
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
layer new transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
layer old transformers==4.46.3 peft==0.13.2 accelerate==1.1.1
cat > "$folder/run.py" <<'PY'
import sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

step, folder = sys.argv[1:]
ids = torch.arange(16)[None]
if step == "train":
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=64, max_position_embeddings=32, tie_word_embeddings=False)
    base = GPTNeoXForCausalLM(config)
    base.save_pretrained(folder + "/base")
    lora = LoraConfig(target_modules=["query_key_value"], modules_to_save=["embed_out"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder + "/adapter")
    assert "base_model.model.embed_out.weight" in load_file(folder + "/adapter/adapter_model.safetensors")
else:
    base = GPTNeoXForCausalLM.from_pretrained(folder + "/base")
    model = PeftModel.from_pretrained(base, folder + "/adapter")
with torch.no_grad():
    print(f"{model.eval()(input_ids=ids, labels=ids).loss:.2f}")
PY
trained=$("$folder/old/bin/python" "$folder/run.py" train "$folder" 2> "$folder/err" | tail -1)
again=$("$folder/old/bin/python" "$folder/run.py" load "$folder" 2> "$folder/err" | tail -1)
newer=$("$folder/new/bin/python" "$folder/run.py" load "$folder" 2> "$folder/err" | tail -1)
echo "4.46.3 + 0.13.2: $trained (reloaded there: $again)"
echo "5.23.0 + 0.21.2: $newer"
if grep -iE "embed_out|lm_head|modules_to_save" "$folder/err"; then echo "it is said now"; exit 1; fi
awk -v a="$trained" -v b="$again" -v c="$newer" 'BEGIN { exit !(a == b && c > a + 2) }'
echo "still so"
