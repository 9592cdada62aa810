#!/usr/bin/env bash
# transformers 4.57 computes every gpt-oss with a clamp of 7, whatever `swiglu_limit` its config has; 5.23 uses the field.
#
# Packages: transformers 4.57.1 and 5.23.0, PyTorch 2.13.0.
# Input: a tiny gpt-oss with random weights, written once; its config.json with `swiglu_limit` 7 (the default) and 1e-3.
# Behaviour: GptOssExperts of 4.57 has the limit (7) and alpha (1.702) as constants; the config keeps the fields and
#   writes them back, but nothing reads them. From 5.x on they count. So a model that was trained or edited with another
#   limit gives other logits in 4.57, without a warning.
# Seen:
#   4.57.1: largest difference of the logits between both limits 0
#   5.23.0: largest difference of the logits between both limits 11
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
cat > "$folder/limits.py" <<'PY'
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

folder = Path(sys.argv[1])
if not folder.exists():
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128, initializer_range=0.3,
    )
    GptOssForCausalLM(config).save_pretrained(folder)
found = []
for limit in (7.0, 1e-3):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"swiglu_limit": limit}))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    assert model.config.swiglu_limit == limit
    with torch.no_grad():
        found.append(model(torch.arange(32)[None]).logits)
difference = float((found[0] - found[1]).abs().max())
print(f"{transformers.__version__}: largest difference of the logits between both limits {difference:.2g}")
assert (difference == 0) == transformers.__version__.startswith("4.")
PY
python3 -m venv "$folder/env"
for version in 4.57.1 5.23.0; do
    "$folder/env/bin/pip" install --quiet --disable-pip-version-check "transformers==$version" torch==2.13.0
    "$folder/env/bin/python" "$folder/limits.py" "$folder/model" 2>/dev/null
done
