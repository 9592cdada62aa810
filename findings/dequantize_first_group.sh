#!/usr/bin/env bash
# Asked to dequantise, transformers unpacks every layer of a compressed-tensors checkpoint by its first group's width.
#
# Packages: transformers 5.23.0, compressed-tensors 0.20.1, PyTorch.
# Input: a tiny random LLaMA in float32, rounded with a scale for each row: layer 0 to 4 bits, layer 1 to 8 bits, in two
#   groups of `pack-quantized`.
# Behaviour: from_pretrained(path) has the right logits. With CompressedTensorsConfig(dequantize=True) the weights of
#   layer 1 are unpacked as 4 bits, as the first group has it, and there is no error: nothing tells that the weights are wrong.
#   (Groups whose scales have other shapes stop with an error.)
# Seen:
#   packed: difference 0; dequantised: relative error of layer 0 0, of layer 1 1
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 compressed-tensors==0.20.1 torch==2.13.0 accelerate==1.15.0
"$folder/env/bin/python" - "$folder" <<'PY' 2> "$folder/err"
import json, pathlib, sys
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

folder = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=2, pad_token_id=None))
model.save_pretrained(folder / "model")
tensors, rounded = load_file(folder / "model" / "model.safetensors"), {}
for name in [name for name in tensors if name.endswith("_proj.weight")]:
    weight, bits = tensors.pop(name), 4 if ".layers.0." in name else 8
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = (weight / scale).round()
    rounded[name] = codes * scale
    stem = name.removesuffix("weight")
    tensors |= {stem + "weight_packed": pack_to_int32(codes.to(torch.int8), bits), stem + "weight_scale": scale,
                stem + "weight_shape": torch.tensor(weight.shape)}
save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
config = json.loads((folder / "model" / "config.json").read_text())
config["quantization_config"] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {f"group_{i}": {"targets": [rf"re:.*layers\.{i}\..*_proj$"], "weights": {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}} for i, bits in enumerate((4, 8))},
}
(folder / "model" / "config.json").write_text(json.dumps(config))
model.load_state_dict({**model.state_dict(), **rounded})
ids = torch.arange(16)[None]
expected = model(ids).logits
packed = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
off = float((packed(ids).logits - expected).abs().max())
plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32,
                                             quantization_config=CompressedTensorsConfig(dequantize=True))
errors = [max(float((value - rounded[name]).norm() / rounded[name].norm()) for name, value in plain.state_dict().items()
              if f"layers.{i}." in name and name in rounded) for i in (0, 1)]
print(f"packed: difference {off:.2g}; dequantised: relative error of layer 0 {errors[0]:.2g}, of layer 1 {errors[1]:.2g}")
assert off < 1e-5 and errors[0] < 1e-5 and errors[1] > 0.5
PY
