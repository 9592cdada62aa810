#!/usr/bin/env bash
# transformers reads a GGUF file of LLaMA 3.1's kind without its rotary scaling, and one of StarCoder 2 without its base.
#
# Packages: transformers 5.23.0, gguf 0.19.0 (llama.cpp's own package, which writes the files), PyTorch.
# Input: tiny random models in float32, written as llama.cpp's convert_hf_to_gguf.py does: LLaMA 3.1's scaling is a tensor
#   `rope_freqs.weight` of one factor for two channels; StarCoder 2's base is the entry `starcoder2.rope.freq_base`.
# Behaviour: from_pretrained(..., gguf_file=...) loads every weight bit by bit. The table of factors is no weight of the
#   model and is dropped, so the rotation is LLaMA 2's; the mapping of StarCoder 2's settings has no row for the base, so
#   it is 10000. There is no warning, and short inputs hardly show it. llama.cpp itself computes both as trained.
#   A setting beside them, the base of the same LLaMA file, is read.
# Seen:
#   llama: rope_type default, rope_theta 500000.0; the file has factors from 1.0 to 8.0
#   starcoder2: rope_theta 10000.0; the file says 999999.0
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 gguf==0.19.0 torch==2.13.0 accelerate==1.15.0
"$folder/env/bin/python" - "$folder" <<'PY' 2> "$folder/err"
import math, pathlib, sys
import gguf, numpy, torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=16384, tie_word_embeddings=False, pad_token_id=None)
torch.manual_seed(0)
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
llama = LlamaForCausalLM(LlamaConfig(rope_parameters=ROPE, **SIZES))
starcoder = Starcoder2ForCausalLM(Starcoder2Config(rope_parameters={"rope_type": "default", "rope_theta": 999999.0}, **SIZES))

def factors():  # as LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py
    for channel in range(0, 32, 2):
        wavelength = 2 * math.pi * 500000.0 ** (channel / 32)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        yield 1.0 if wavelength < 2048 else 8.0 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth)

def write(model, name, base, norm, tables=()):
    place = pathlib.Path(sys.argv[1], name)
    place.mkdir()
    writer = gguf.GGUFWriter(place / "model.gguf", name)
    writer.add_name("tiny"), writer.add_context_length(16384), writer.add_embedding_length(64), writer.add_block_count(1)
    writer.add_feed_forward_length(128), writer.add_head_count(2), writer.add_head_count_kv(2), writer.add_vocab_size(64)
    writer.add_rope_dimension_count(32), writer.add_rope_freq_base(base), norm(writer)(1e-5)
    writer.add_token_list([str(n) for n in range(64)])
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(kind, 1)
    for key, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            values = values.reshape(2, 2, 16, 64).swapaxes(1, 2).reshape(64, 64)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), numpy.ascontiguousarray(values))
    for key, values in tables:
        writer.add_tensor(key, values)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32,
                                                quantization_config=GgufConfig(dequantize=True))
    same = model.state_dict()
    assert all(torch.equal(tensor, same[key]) for key, tensor in read.state_dict().items())
    return read.config.rope_parameters

table = numpy.array(list(factors()), numpy.float32)
rope = write(llama, "llama", 500000.0, lambda w: w.add_layer_norm_rms_eps, [("rope_freqs.weight", table)])
print("llama: rope_type", rope["rope_type"] + ", rope_theta", str(rope["rope_theta"]) + "; the file has factors from",
      table.min(), "to", table.max())
assert rope["rope_type"] == "default" and rope["rope_theta"] == 500000.0 and table.max() == 8.0
rope = write(starcoder, "starcoder2", 999999.0, lambda w: w.add_layer_norm_eps)
print("starcoder2: rope_theta", str(rope["rope_theta"]) + "; the file says 999999.0")
assert rope["rope_theta"] == 10000.0
PY
if grep -i "rope\|rotary" "$folder/err"; then echo "transformers says something now"; exit 1; fi
echo "still so"
