"""GPTQ by llm-compressor on given tokens, for ``peers.py``: run by a Python that has it, outside of this package.

    python -I peer_llm_compressor.py MODEL TOKENS OUT --bits 4 --group 64

OUT is a file with the target matrices as they were rounded, in float32, and, as its metadata, versions.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", help="file with ids [sequences, length]")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    options = parser.parse_args()
    ids = load_file(options.tokens)["ids"]
    told = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=options.bits, group_size=options.group, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(told),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    found = {
        f"{name}.weight": module.weight.detach().float().cpu().contiguous()
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    save_file(found, options.out, metadata={name: version(name) for name in packages})


if __name__ == "__main__":
    main()
