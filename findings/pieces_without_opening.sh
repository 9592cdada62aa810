#!/usr/bin/env bash
# transformers 5 reads a LLaMA's `tokenizer.model` without its opening token, and for Mistral's type without the first space.
#
# Packages: transformers 5.23.0 and 4.46.3, sentencepiece 0.2.3, protobuf 7.36.2; no PyTorch.
# Input: a SentencePiece model as LLaMA's are (BPE, bytes for unknown letters, a space before a text), trained on the spot,
#   beside a tokenizer_config.json that says `"tokenizer_class": "LlamaTokenizer"` and a config.json of type llama or mistral.
#   There is no tokenizer.json, as in many older folders.
# Behaviour: `LlamaTokenizer` documents `add_bos_token` as True by default. transformers 4 puts `<s>` before a text, 5 does not
#   unless tokenizer_config.json has the field. For a config of type mistral, 5 takes another class than the named one, which
#   puts no space before the first word, though the model says `add_dummy_prefix`: the word becomes other tokens. Saved anew,
#   both stay so. Nothing is said.
# Seen: tokens of "won times"
#   sentencepiece: ▁won ▁times
#   5.23.0 llama: ▁won ▁times
#   5.23.0 llama, "add_bos_token": true: <s> ▁won ▁times
#   5.23.0 mistral: w on ▁times
#   4.46.3 llama: <s> ▁won ▁times
#   4.46.3 mistral: <s> ▁won ▁times
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
cat > "$folder/train.py" <<'PY'
import sys

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

SentencePieceTrainer.train(
    sentence_iterator=(f"won no way now {number} times" for number in range(50)),
    model_prefix=f"{sys.argv[1]}/tokenizer",
    model_type="bpe",
    vocab_size=300,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
)
print("sentencepiece:", *SentencePieceProcessor(f"{sys.argv[1]}/tokenizer.model").encode("won times", out_type=str))
PY
cat > "$folder/read.py" <<'PY'
import json
import shutil
import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()
folder = Path(sys.argv[1])
for kind, settings in (("llama", {}), ("llama", {"add_bos_token": True}), ("mistral", {})):
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    shutil.copy(folder / "tokenizer.model", model)
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("won times")["input_ids"])
    tokenizer.save_pretrained(model / "saved")
    again = AutoTokenizer.from_pretrained(model / "saved")
    assert again.convert_ids_to_tokens(again("won times")["input_ids"]) == tokens
    said = "".join(f", {json.dumps(settings)[1:-1]}" for _ in settings)
    print(f"{transformers.__version__} {kind}{said}:", *tokens)
PY
for version in 5.23.0 4.46.3; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "transformers==$version" sentencepiece==0.2.3 protobuf==7.36.2
done
"$folder/5.23.0/bin/python" "$folder/train.py" "$folder" | tee "$folder/seen"
for version in 5.23.0 4.46.3; do
    "$folder/$version/bin/python" "$folder/read.py" "$folder" 2> "$folder/errors" | tee -a "$folder/seen" || { cat "$folder/errors"; exit 1; }
done
diff "$folder/seen" - <<'SEEN'
sentencepiece: ▁won ▁times
5.23.0 llama: ▁won ▁times
5.23.0 llama, "add_bos_token": true: <s> ▁won ▁times
5.23.0 mistral: w on ▁times
4.46.3 llama: <s> ▁won ▁times
4.46.3 llama, "add_bos_token": true: <s> ▁won ▁times
4.46.3 mistral: <s> ▁won ▁times
SEEN
