#!/usr/bin/env python
"""Run llama.cpp's own converter on a densified checkpoint, past two things that stop it short of the model.

    svdconvert densify FACTORED --out DENSE
    python examples/gguf/to_gguf.py LLAMA_CPP DENSE --outtype f16 --outfile model.gguf

LLAMA_CPP is a source tree of llama.cpp with ``convert_hf_to_gguf.py`` and ``conversion/``; whatever follows DENSE is
the converter's. What it would stumble over:

* It knows tokenizers by a digest of what they make of a sample, and refuses those that it has not met, polyglot-ko's
  among them. Such a one gets the splitting rule that ``--pre`` names: by default gpt-2's, which is that of
  polyglot-ko, of Pythia, and of any byte-level BPE that follows GPT-2's regular expression.
* It reads the config through transformers, which from version 5 on drops ``rotary_pct``, a field that the converter
  needs. It gets the fields of config.json back that the loaded config lacks.

The converter needs ``sentencepiece`` for some families.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Patch the converter in memory, and run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path, help="source tree of llama.cpp")
    parser.add_argument("model", type=Path, help="what svdconvert densify wrote")
    parser.add_argument("--pre", default="gpt-2", help="splitting rule of a tokenizer that the converter does not know")
    options, rest = parser.parse_known_args()
    converter = options.llama_cpp / "convert_hf_to_gguf.py"
    for file in (converter, options.model / "config.json"):
        if not file.is_file():
            parser.error(f"{file} is not there")
    config = json.loads((options.model / "config.json").read_text("utf-8"))
    if "svd_ranks" in config:
        parser.error(f"{options.model} is factored; run `svdconvert densify {options.model} --out DENSE` first")
    sys.path[:0] = [str(options.llama_cpp), str(options.llama_cpp / "gguf-py")]
    from conversion.base import ModelBase, TextModel

    load, known = ModelBase.load_hparams, TextModel.get_vocab_base_pre

    def load_hparams(folder: Path, *args: Any, **keywords: Any) -> dict[str, Any]:
        return config | load(folder, *args, **keywords)

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            print(f"the converter does not know this tokenizer; written as {options.pre}", file=sys.stderr)
            return str(options.pre)

    ModelBase.load_hparams = staticmethod(load_hparams)
    TextModel.get_vocab_base_pre = get_vocab_base_pre
    sys.argv = [str(converter), str(options.model), *rest]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main()
