#!/usr/bin/env bash
# Offloading to disk in bfloat16 rounds a model's integer buffers: of 1,001 indices, 507 values are left, silently.
#
# Packages: transformers 4.46.3, accelerate 1.1.1, torch 2.13.0, numpy 2.4.6.
# Input: a small PreTrainedModel with an int64 buffer (a permutation of 0 to 1,000) beside its bfloat16 weights, saved as
#   safetensors, loaded on the CPU, and loaded with that module offloaded to disk (offload_buffers=True).
# Behaviour: from_pretrained enters every offloaded tensor into its index with the dtype of the model, and accelerate
#   casts to it what it reads, integers too; put back into the int64 buffer, 257 has become 256. transformers 5.23 keeps
#   integers.
# Seen:
#   cpu: int64, 0 of 1001 wrong, 1001 values, output off by 0.00
#   disk: int64, 494 of 1001 wrong, 507 values, output off by 0.85
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.46.3 accelerate==1.1.1 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import sys

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

folder = sys.argv[1]
SIZE = 1001


class Config(PretrainedConfig):
    model_type = "shuffle"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, SIZE)
        self.register_buffer("order", torch.arange(SIZE))

    def forward(self, x):
        return self.linear(x).index_select(-1, self.order)


class Shuffle(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = Block(), nn.Linear(SIZE, 4)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x):
        return self.second(self.first(x))


torch.manual_seed(0)
model = Shuffle(Config()).to(torch.bfloat16)
model.first.order.copy_(torch.randperm(SIZE))
model.save_pretrained(folder + "/model")
x = torch.randn(2, 4, dtype=torch.bfloat16)
for place in ("cpu", "disk"):
    loaded = Shuffle.from_pretrained(folder + "/model", torch_dtype=torch.bfloat16, offload_buffers=True,
                                     device_map={"first": place, "second": "cpu"}, offload_folder=folder + "/offload")
    seen = []
    loaded.first.linear.register_forward_hook(lambda *_: seen.append(loaded.first.order.clone()))
    with torch.no_grad():
        off = (loaded(x) - model(x)).abs().max().item()
    wrong, values = int((seen[0] != model.first.order).sum()), len(seen[0].unique())
    kind = str(seen[0].dtype).removeprefix("torch.")
    print(f"{place}: {kind}, {wrong} of {SIZE} wrong, {values} values, output off by {off:.2f}")
    assert (wrong == 0) == (place == "cpu")
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/err" | grep -E "^(cpu|disk)"
echo "still so"
