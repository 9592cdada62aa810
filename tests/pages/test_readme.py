"""README.md and docs/convert.md: the plans that they show are those made, and the bundled model's figures are found."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import CONFIG
from support.pages import ROOT

from svdconvert.cli.app import main
from svdconvert.families.table import ARCHITECTURES

PAGE = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    call
    for call in re.findall(r"^ {4}svdconvert (.*)$", re.sub(r" *\\\n +", " ", PAGE), re.MULTILINE)
    if "examples/" in call or "out/" in call
]
(TRAINING,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "peft" in block)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def rows(text: str) -> list[tuple[str, list[float]]]:
    """Lines of a result: the words, and the numbers."""
    found = [" ".join(line.split()) for line in text.splitlines()]
    return [(_NUMBER.sub("#", line), [float(number) for number in _NUMBER.findall(line)]) for line in found]


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, as a reader would."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(call: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(shlex.split(call))
        assert not end.value.code
        return capsys.readouterr().out

    convert, evaluate, fold = COMMANDS
    run(convert)
    printed = dict(rows(run(evaluate)))
    shown = rows(PAGE.partition("--against examples/tiny_polyglot/model\n\n")[2].partition("\n\n")[0])
    assert len(shown) == 4
    for words, numbers in shown:
        # Other versions and processors round otherwise.
        assert printed[words] == pytest.approx(numbers, rel=0.05)
    names: dict[str, Any] = {}
    exec(compile(TRAINING, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    run(fold)
    assert (tmp_path / "out" / "folded" / "config.json").is_file()


@pytest.mark.parametrize(
    ("page", "hidden", "layers", "heads", "rank"),
    [("README.md", 3072, 32, 24, 768), ("docs/convert.md", 2048, 24, 16, 512)],
)
def test_the_plan_is_the_one_made(
    page: str, hidden: int, layers: int, heads: int, rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From config.json alone, but for the disk's free room, and the source's files, whose buffers it does not know."""
    geometry = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    geometry |= {"num_attention_heads": heads, "vocab_size": 30080, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(dict(CONFIG) | geometry | {"rotary_pct": 0.5}))
    with pytest.raises(SystemExit) as end:
        main(["plan", str(tmp_path), "--rank", str(rank)])
    assert not end.value.code
    printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    text = (ROOT / page).read_text("utf-8")
    (block,) = re.findall(r"^ {4}target +shape.*\n(?: {4}.*\n)+", text, re.MULTILINE)
    shown = [" ".join(line.split()) for line in block.splitlines()]
    compared = [line for line in shown if not re.match(r"(disk|note:|factored layers|weight files)", line)]
    assert len(compared) > 6
    assert set(compared) <= printed


@pytest.mark.parametrize(
    ("page", "title"), [("README.md", "## Supported models"), ("README.ko.md", "## 지원하는 모델")]
)
def test_every_family_is_named(page: str, title: str) -> None:
    text = (ROOT / page).read_text("utf-8").partition(title)[2].partition("\n## ")[0]
    named = re.sub(r"[^a-z]", "", text.lower())
    assert [kind for kind in ARCHITECTURES if re.sub(r"[^a-z]", "", kind) not in named] == []
