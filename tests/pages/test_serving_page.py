"""docs/serving.md: its Python runs, on a model made by the commands that it shows."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from svdconvert.cli.app import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NEEDS = (("onnx", "onnxruntime"), ("onnx", "onnxscript"))
COMMANDS = re.findall(r"^    svdconvert (.*)$", PAGE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="the page is for transformers 5")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks in order, in one namespace, as a reader would; those whose package is not there are left out."""
    assert (len(COMMANDS), len(BLOCKS)) == (2, 4)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main(command.split())
        assert not end.value.code
    names: dict[str, Any] = {}
    for block in BLOCKS:
        needed = [package for word, package in NEEDS if word in block]
        if all(importlib.util.find_spec(name) for name in needed):
            exec(compile(block, "docs/serving.md", "exec"), names)
    assert "이 영화는" in capsys.readouterr().out
    assert Path("out/serving/model.pt2").is_file()
