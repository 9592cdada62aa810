"""Every family, saved and loaded again, here and by the other end of the supported versions."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_config
from support.families import (
    FAMILIES,
    write_family,
)
from support.family_contract import assert_sound
from support.running import IDS, distance, load, logits

from svdconvert import convert, densify
from svdconvert.families.table import ARCHITECTURES

ELSEWHERE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
for job in json.loads(sys.argv[1]):
    stock = AutoModelForCausalLM.from_pretrained(job["densified"]).eval()
    model, info = AutoModelForCausalLM.from_pretrained(job["here"], trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.load(job["ids"])
    with torch.no_grad():
        torch.save([m(ids).logits for m in (model.eval(), stock)], job["logits"])
    model.save_pretrained(job["there"])
"""
# Those that the newest and the oldest supported version have.
EVERYWHERE = [name for name in FAMILIES if ARCHITECTURES[name].since <= (4, 46)]


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, str]]], None]:
    """Runs ELSEWHERE on a list of checkpoints in the environment with the other transformers."""
    python = os.environ.get("SVDCONVERT_OTHER_PYTHON")
    if not python:
        pytest.skip("SVDCONVERT_OTHER_PYTHON: no interpreter of another environment")

    def call(jobs: list[dict[str, str]]) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
        done = subprocess.run(
            [python, "-c", ELSEWHERE, json.dumps(jobs)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return call


def test_saved_here_loaded_there_and_back(elsewhere: Any, tmp_path: Path) -> None:
    """All families in one process over there: importing transformers is what takes time."""
    torch.save(IDS, tmp_path / "ids.pt")
    jobs, expected = [], {}
    families = {name: name for name in EVERYWHERE}
    families |= {f"{name}-split": name for name in families if ARCHITECTURES[name].fused}
    for name, family in families.items():
        folder = tmp_path / name
        options: dict[str, Any] = {"keep": 0.6, "split_fused": name != family, "device": "cpu", "check": False}
        convert(write_family(folder / "dense", family), folder / "made", **options)
        densify(folder / "made", folder / "densified", device="cpu", check=False)
        model = load(folder / "made")
        model.save_pretrained(folder / "here")
        expected[name] = logits(model)
        paths = {key: str(folder / key) for key in ("densified", "here", "there", "logits")}
        jobs.append(paths | {"ids": str(tmp_path / "ids.pt")})
    elsewhere(jobs)
    for name, before in expected.items():
        folder = tmp_path / name
        ours, stock = torch.load(folder / "logits")
        assert distance(ours, before) < 1e-4, name
        assert distance(stock, before) < 1e-4, name
        assert_sound(folder / "there", ARCHITECTURES[families[name]], folder / "made")
        versions = {read_config(folder / side)["transformers_version"] for side in ("here", "there")}
        assert len(versions) == 2
        assert distance(logits(load(folder / "there")), before) < 1e-4, name
