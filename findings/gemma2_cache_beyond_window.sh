#!/usr/bin/env bash
# Gemma 2 generates other text with its cache than without, once a sequence is longer than its sliding window.
#
# Packages: transformers 4.46.3 and 5.23.0, torch 2.13.0.
# Input: a small Gemma 2 with random weights in float32 and a window of 7 tokens; greedy generation of 29 tokens from 1,
#   with use_cache=True (for 4.46, the "hybrid" cache of the model's own config) and use_cache=False.
# Behaviour: with 4.46 the logits agree to rounding up to the end of the window, and from there on they are others; with
#   5.23 they agree throughout. Whoever takes the cache for a matter of speed gets another model's text, without a
#   warning. (Gemma 2's own window is 4,096.)
# Seen:
#   4.46.3: largest difference of logits within the window 0.000, beyond it 1.563
#   5.23.0: largest difference of logits within the window 0.000, beyond it 0.000
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
import torch, transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

WINDOW = 7
torch.manual_seed(0)
model = Gemma2ForCausalLM(
    Gemma2Config(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
                 initializer_range=0.3, max_position_embeddings=64, eos_token_id=None)).eval()
first = torch.tensor([[5]])
made = model.generate(first, attention_mask=torch.ones_like(first), do_sample=False, max_new_tokens=29,
                      pad_token_id=0, use_cache=True, output_logits=True,
                      return_dict_in_generate=True)
with torch.no_grad():
    plain = torch.stack([model(input_ids=made.sequences[:, :end], use_cache=False).logits[:, -1]
                         for end in range(1, made.sequences.shape[1])])
apart = (torch.stack(made.logits) - plain).abs().amax((1, 2))
within, beyond = float(apart[: WINDOW - 1].max()), float(apart[WINDOW - 1 :].max())
print(f"{transformers.__version__}: largest difference of logits within the window {within:.3f}, beyond it {beyond:.3f}")
assert within < 1e-3
assert (beyond > 0.05) == transformers.__version__.startswith("4.")
PY
for version in old new; do "$folder/$version/bin/python" "$folder/run.py" 2> "$folder/err" || { cat "$folder/err"; exit 1; }; done
echo "still so"
