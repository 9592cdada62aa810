#!/usr/bin/env bash
# AutoRound given a folder packs every layer of a model; given the same model, loaded, it packs none, and both succeed.
#
# Packages: auto-round 0.16.1, transformers 5.23.0, torch 2.13.0.
# Input: a LLaMA with random weights and hidden size 72, scheme W4A16 with groups of 24 (which divide 72 and 144), plain
#   rounding (iters=0, disable_opt_rtn=True), no calibration data.
# Behaviour: a loaded model goes through a resolver that sets every layer with a side that 32 does not divide to 16 bits
#   (one WARNING line, "some layers are skipped quantization"); here all of them. The result is a checkpoint of plain
#   weights with a quantization_config of 4 bits, and the exit status is 0. A path goes through another route
#   ("model-free"), which does not have that rule and packs them.
# Seen:
#   path: 14 packed, 0 plain
#   model: 0 packed, 14 plain, config says 4 bits
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 auto-round==0.16.1
cat > "$folder/run.py" <<'PY'
import glob, json, sys
import torch
from auto_round import AutoRound
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main(kind, folder):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=72, intermediate_size=144, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder + "/model")
    words = Tokenizer(models.WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")
    tokenizer.save_pretrained(folder + "/model")
    source = (folder + "/model",) if kind == "path" else (LlamaForCausalLM.from_pretrained(folder + "/model"), tokenizer)
    rounder = AutoRound(*source, scheme="W4A16", group_size=24, iters=0, disable_opt_rtn=True, device_map="cpu")
    rounder.quantize_and_save(f"{folder}/from_{kind}", format="auto_round")
    files = glob.glob(f"{folder}/from_{kind}/**/*.safetensors", recursive=True)
    names = [name for file in files for name in safe_open(file, "pt").keys()]
    packed, plain = (sum(name.endswith("_proj." + end) for name in names) for end in ("qweight", "weight"))
    (config,) = glob.glob(f"{folder}/from_{kind}/**/config.json", recursive=True)
    bits = json.load(open(config))["quantization_config"]["bits"]
    print(f"{kind}: {packed} packed, {plain} plain, config says {bits} bits")
    assert (packed, plain, bits) == ((14, 0, 4) if kind == "path" else (0, 14, 4))


if __name__ == "__main__":
    main(*sys.argv[1:])
PY
cd "$folder" # it makes a work folder where it is started
for kind in path model; do
    "$folder/venv/bin/python" "$folder/run.py" "$kind" "$folder" > "$folder/log" 2>&1 || { tail -5 "$folder/log"; exit 1; }
    grep "^$kind:" "$folder/log"
done
echo "still so"
