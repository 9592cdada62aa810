#!/usr/bin/env bash
# compressed-tensors 0.18 packs integers of 3, 5, 6 and 7 bits otherwise than 0.17, under the same format name.
#
# Packages: compressed-tensors 0.17.0 and 0.18.0, transformers 5.23.0, PyTorch.
# Input: int8 matrices of 2 to 8 bits, 16 columns, packed as `pack-quantized` checkpoints have them.
# Behaviour: up to 0.17 a word of 32 bits holds 32 // bits integers and the rest of it is empty; from 0.18 on the bits
#   follow each other, and an integer may lie in two words. Neither a config nor a file says which one it is, and
#   transformers 5.23 asks for 0.15 or newer. Where both need the same number of words, the other version unpacks other
#   numbers without a word.
# Seen:
#   2 bits: same; 3 bits: other numbers; 4 bits: same; 5 bits: other numbers; 6 bits: other shape; 7 bits: other numbers; 8 bits: same
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 pydantic loguru psutil
for version in 0.17.0 0.18.0; do
    "$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/$version" "compressed-tensors==$version"
done
cat > "$folder/pack.py" <<'PY'
import sys
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

def codes(bits):
    return torch.arange(64).mul(7).remainder(2**bits).sub(2 ** (bits - 1)).to(torch.int8).view(4, 16)

if sys.argv[2] == "pack":
    torch.save({bits: pack_to_int32(codes(bits), bits) for bits in range(2, 9)}, sys.argv[1])
else:
    told = {}
    for bits, words in torch.load(sys.argv[1]).items():
        if words.shape != pack_to_int32(codes(bits), bits).shape:
            told[bits] = "other shape"
        else:
            same = torch.equal(unpack_from_int32(words, bits, torch.Size([4, 16])), codes(bits))
            told[bits] = "same" if same else "other numbers"
    print("; ".join(f"{bits} bits: {what}" for bits, what in told.items()))
    assert all((told[bits] == "same") == (32 % bits == 0) for bits in told)
    assert "other numbers" in told.values()
PY
PYTHONPATH="$folder/0.17.0" "$folder/env/bin/python" "$folder/pack.py" "$folder/words.pt" pack
PYTHONPATH="$folder/0.18.0" "$folder/env/bin/python" "$folder/pack.py" "$folder/words.pt" unpack
