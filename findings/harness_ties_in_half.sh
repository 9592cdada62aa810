#!/usr/bin/env bash
# lm-evaluation-harness gives a random model in bfloat16 66 % of a task of pairs, where one half is chance: ties count as right.
#
# Packages: lm-eval 0.4.13, transformers 5.23.0, datasets 5.2.0, accelerate 1.15.0, PyTorch 2.13.0 (CPU).
# Input: a tiny LLaMA with random weights, saved in bfloat16 as most models are, and a task of the form of BLiMP's 67: pairs of
#   sentences that differ in one word, the right one first (`doc_to_target: 0`); and the same pairs with the right one last.
# Behaviour: the harness takes log_softmax in the type of the logits and adds up the tokens in it, so a sentence's
#   log-likelihood is a bfloat16: near -127 a multiple of 0.5. Pairs closer than that tie, and of equal choices argmax takes
#   the first. So the score depends on where the right one stands: right in each tie if first, wrong if last. With
#   `softmax_dtype=float32` and the same model in bfloat16, or the model in float32, it is chance in both orders. Nothing is said.
# Seen: accuracy with the right one first and last, ties among 300 pairs
#   bfloat16: 0.66 and 0.35, 92 ties
#   bfloat16, softmax_dtype=float32: 0.51 and 0.50, 1 ties
#   float32: 0.51 and 0.51, 1 ties
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home" CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
cat > "$folder/pairs.py" <<'PY'
import json
import random
import sys
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
words = [f"w{number}" for number in range(500)]
tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<end>", *words])}, unk_token="<end>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")
tokenizer.save_pretrained(folder / "model")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=501, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.05,
)
LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")

choose = random.Random(0)
with open(folder / "pairs.jsonl", "w") as file:
    for _ in range(300):
        good = choose.choices(words, k=20)
        bad = list(good)
        bad[choose.randrange(20)] = choose.choice(words)
        print(json.dumps({"good": " ".join(good), "bad": " ".join(bad)}), file=file)
(folder / "tasks").mkdir()
for name, target, order in (("first", 0, "[good, bad]"), ("last", 1, "[bad, good]")):
    (folder / "tasks" / f"{name}.yaml").write_text(f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pairs.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: {target}
doc_to_choice: "{{{{{order}}}}}"
metric_list: [{{metric: acc}}]
""")
for name, settings in {
    "bfloat16": {}, "bfloat16, softmax_dtype=float32": {"softmax_dtype": "float32"}, "float32": {"dtype": "float32"},
}.items():
    found = simple_evaluate(
        model="hf", model_args={"pretrained": str(folder / "model"), "device": "cpu"} | settings, batch_size=50,
        tasks=["first", "last"], task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        log_samples=True, bootstrap_iters=0,
    )
    ties = sum(len({value for value, _ in each["filtered_resps"]}) == 1 for each in found["samples"]["first"])
    first, last = (found["results"][task]["acc,none"] for task in ("first", "last"))
    print(f"{name}: {first:.2f} and {last:.2f}, {ties} ties")
    assert first - last > 0.2 and ties > 60 if name == "bfloat16" else abs(first - last) < 0.02 and ties < 5
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 lm-eval==0.4.13 datasets==5.2.0 accelerate==1.15.0
"$folder/env/bin/python" "$folder/pairs.py" "$folder" 2> "$folder/err" || { tail -5 "$folder/err"; exit 1; }
if grep -iE "softmax|half|bfloat16|precision" "$folder/err"; then echo "it is said now"; exit 1; fi
echo "still so"
