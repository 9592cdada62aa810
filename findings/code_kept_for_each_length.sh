#!/usr/bin/env bash
# A bfloat16 model of 2 million parameters takes 0.9 GB more memory on a CPU after 600 prompts of as many lengths.
#
# Packages: transformers 5.23.0, PyTorch 2.13.0 (CPU), whose oneDNN is 3.12.0.
# Input: a tiny LLaMA with random weights, two layers, hidden size 256; each of its passes is of one prompt, of 1 to 600
#   tokens, without gradients.
# Behaviour: for bfloat16 PyTorch calls oneDNN, which writes the code of a product at run time, for each number of rows
#   another. It keeps the last 1,024, and some of each for ever: with ONEDNN_PRIMITIVE_CACHE_CAPACITY=8 half of the memory is
#   still taken. The same lengths again take no more, as do lengths filled up to multiples of 64, and float32, which goes
#   to MKL. Nothing in Python holds it, so nothing shows it. It is so on processors with AVX-512, where bfloat16 has it.
# Seen: memory that is not a file's (RssAnon) after the 600 prompts, over that after the longest one, on an AMD EPYC (Zen 4)
#   bfloat16: 915 MB, 929 MB after a part of them again, 4 MB after 60 prompts of 600; 461 MB with a capacity of 8; 22 MB filled up
#   float32: 3 MB
# Exit status: 0 as long as it is so; 2 on a processor without AVX-512, where nothing can be said.
set -euo pipefail
if ! grep -qw avx512bw /proc/cpuinfo; then
    echo "this processor has no AVX-512, for which alone it was seen" >&2
    exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
unset ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA ONEDNN_PRIMITIVE_CACHE_CAPACITY DNNL_PRIMITIVE_CACHE_CAPACITY
cat > "$folder/lengths.py" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e3


torch.manual_seed(0)
dtype, multiple = sys.argv[1], int(sys.argv[2])
config = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
)
model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


@torch.no_grad()
def prompts(lengths):
    for length in lengths:
        model(torch.ones(1, -(-length // multiple) * multiple, dtype=torch.int64))
    return megabytes()


before = prompts([1, 600])
print(round(prompts([600] * 60) - before), round(prompts(range(1, 601)) - before), round(prompts(range(1, 601, 4)) - before))
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0
run() { "$folder/env/bin/python" "$folder/lengths.py" "$@" 2> "$folder/err" || { tail -5 "$folder/err" >&2; exit 1; }; }
read -r same lengths again <<< "$(run bfloat16 1)"
read -r _ few _ <<< "$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=8 run bfloat16 1)"
read -r _ filled _ <<< "$(run bfloat16 64)"
read -r _ single _ <<< "$(run float32 1)"
echo "bfloat16: $lengths MB, $again MB after a part of them again, $same MB after 60 prompts of 600; $few MB with a capacity of 8; $filled MB filled up"
echo "float32: $single MB"
((lengths > 400 && again < lengths * 5 / 4 && same < 50 && few > 150 && few < lengths && filled < 100 && single < 100))
echo "still so"
