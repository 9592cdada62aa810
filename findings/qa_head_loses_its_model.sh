#!/usr/bin/env bash
# A Qwen2ForQuestionAnswering saved by transformers 4.46 loads in 5.23 with every weight but the head made up at random.
#
# Packages: transformers 4.46.3 and 5.23.0, torch 2.13.0.
# Input: a Qwen2 with random weights and a head for question answering, saved by each of the two versions.
# Behaviour: 4.46 calls the model below the head `model.`, 5.23 `transformer.`, as both do for LLaMA. 5.23 finds none of
#   the old names, fills the model with random numbers and goes on with a warning. 4.46 refuses what 5.23 saved, as
#   corrupted.
# Seen:
#   4.46.3 wrote names like model.embed_tokens.weight
#   5.23.0 wrote names like transformer.embed_tokens.weight
#   4.46.3 reads that of 5.23.0: ValueError
#   5.23.0 reads that of 4.46.3: 14 missing, 14 unexpected, same logits False
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
import sys
import torch, transformers
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForQuestionAnswering

task, folder = sys.argv[1:]
version, ids = transformers.__version__, torch.arange(16)[None]
own, theirs = (f"{folder}/{name}" for name in (version, "5.23.0" if version == "4.46.3" else "4.46.3"))
if task == "save":
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2)
    model = Qwen2ForQuestionAnswering(config).eval()
    model.save_pretrained(own)
    torch.save(model(ids).start_logits.detach(), own + ".pt")
    with safe_open(own + "/model.safetensors", "pt") as file:
        (name,) = (key for key in file.keys() if "embed_tokens" in key)
    print(f"{version} wrote names like {name}")
    assert name.startswith("model." if version == "4.46.3" else "transformer.")
else:
    try:
        model, info = Qwen2ForQuestionAnswering.from_pretrained(theirs, output_loading_info=True)
    except ValueError:
        print(f"{version} reads that of 5.23.0: ValueError")
        assert version == "4.46.3"
    else:
        same = torch.allclose(model.eval()(ids).start_logits, torch.load(theirs + ".pt"), atol=1e-4)
        missing, unexpected = len(info["missing_keys"]), len(info["unexpected_keys"])
        print(f"{version} reads that of 4.46.3: {missing} missing, {unexpected} unexpected, same logits {same}")
        assert version == "5.23.0" and missing == unexpected > 10 and not same
PY
for task in save load; do
    for version in old new; do "$folder/$version/bin/python" "$folder/run.py" "$task" "$folder" 2> "$folder/err"; done
done
echo "still so"
