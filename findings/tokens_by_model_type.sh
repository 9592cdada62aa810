#!/usr/bin/env bash
# transformers 5.23 splits a text by the model type in config.json: the same tokenizer files give other tokens beside another one.
#
# Packages: transformers 4.57.1 and 5.23.0, tokenizers. No PyTorch.
# Input: two tokenizers, trained here on a few sentences, with the settings of published ones: OLMo 2's (and Granite
#   4's), which calls itself GPT2Tokenizer and whose tokenizer.json splits by an expression of its own, and Phi-3's, a
#   LlamaTokenizer whose tokenizer.json puts a space before every piece of text. Each lies beside a config.json
#   with the model's own type, beside one with a type that is not transformers' own, as models with their own code have,
#   and alone, as a repository of a tokenizer.
# Behaviour: the classes of 5 take the vocabulary from tokenizer.json and make normaliser and pre-tokeniser themselves, without
#   reading those in the file. transformers has a table of model types for which the file is read whole; of any other type
#   the class in tokenizer_config.json decides. The vocabulary is the same, decoding gives the text back, and nothing is said.
#   4.57.1 reads the file whole in every place. With `tokenizer_class` PreTrainedTokenizerFast 5.23 does, too.
# Seen: tokens of one sentence, and of a turn of a chat, beside "olmo2" or "phi3", an own type, no config
#   4.57.1 GPT2Tokenizer: 28, 28, 28
#   5.23.0 GPT2Tokenizer: 28, 32, 32
#   5.23.0 PreTrainedTokenizerFast: 28, 28, 28
#   4.57.1 LlamaTokenizer: 4, 4, 4
#   5.23.0 LlamaTokenizer: 4, 5, 5
#   5.23.0 PreTrainedTokenizerFast: 4, 4, 4
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
cat > "$folder/kinds.py" <<'PY'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = ["On 12 March 1998 some 305 people (of 2041) wrote to example.com/path for 1200 won.", "self.x[0]+1234", "hello there"]
SENTENCES *= 50


def by_bytes():
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def by_pieces():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([word for text in SENTENCES for word in text.split()], trainer)
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, normalized=False) for name in ("<|user|>", "<|end|>")])
    return tokenizer


def count(tokenizer, settings, kind, text):
    place = folder / str(kind)
    place.mkdir(exist_ok=True)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "config.json").unlink(missing_ok=True)
    if kind:
        (place / "config.json").write_text(json.dumps({"model_type": kind}))
    read = AutoTokenizer.from_pretrained(place)
    assert read.get_vocab() == tokenizer.get_vocab()
    tokens = read.encode(text, add_special_tokens=False)
    return len(tokens), tokens == tokenizer.encode(text, add_special_tokens=False).ids


five = transformers.__version__.startswith("5.")
end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
llama = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=False, add_eos_token=False, legacy=False)
for tokenizer, name, settings, own, text in (
    (by_bytes(), "GPT2Tokenizer", end, "olmo2", SENTENCES[0]),
    (by_pieces(), "LlamaTokenizer", llama, "phi3", "<|user|>\nhello there<|end|>\n"),
):
    for kind in (name, "PreTrainedTokenizerFast") if five else (name,):
        counts = [count(tokenizer, settings | {"tokenizer_class": kind}, place, text) for place in (own, "own", None)]
        print(transformers.__version__, f"{kind}:", ", ".join(str(number) for number, _ in counts))
        whole = not five or kind != name
        assert [same for _, same in counts] == [True, whole, whole], counts
PY
python3 -m venv "$folder/env"
for version in 4.57.1 5.23.0; do
    "$folder/env/bin/pip" install --quiet "transformers==$version"
    "$folder/env/bin/python" "$folder/kinds.py" "$folder" 2> "$folder/err" || { tail -5 "$folder/err"; exit 1; }
    if grep -v "PyTorch" "$folder/err" | grep -iE "tokeni[sz]er|pre.tokeni"; then echo "it is said now"; exit 1; fi
done
echo "still so"
