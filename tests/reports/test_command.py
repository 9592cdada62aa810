"""`svdconvert report`, and `--report` of a conversion: whose file it is, and where it goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.html_pages import parse
from support.hub_server import WRITE_TOKEN, HubServer, use_hub

from svdconvert import convert, densify, verify
from svdconvert.commands.verify import failed
from svdconvert.jobs.output import held_result
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.version import __version__

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def plain(results: dict[str, Path], tmp_path: Path) -> Path:
    """A result without a page."""
    return Path(shutil.copytree(results["plain"], tmp_path / "somewhere"))


def files_of(folder: Path) -> list[str]:
    """Those that the record names."""
    return json.loads((folder / "svdconvert.json").read_text())["files"]


def test_the_command(plain: Path, run: Run, tmp_path: Path) -> None:
    before = (plain / "svdconvert.json").read_bytes()
    assert "report.html" not in files_of(plain)
    elsewhere = tmp_path / "page.html"
    result = run("report", plain, "--out", elsewhere)
    assert (result.code, result.out) == (0, f"{elsewhere}\n")
    assert (plain / "svdconvert.json").read_bytes() == before, "a page elsewhere is nobody's"
    assert run("report", plain, "--out", elsewhere).code == 0, "over an earlier page"
    result = run("report", plain)
    assert (result.code, result.out) == (0, f"{plain / 'report.html'}\n")
    assert (plain / "report.html").read_bytes() == elsewhere.read_bytes()
    assert files_of(plain) == sorted([*json.loads(before)["files"], "report.html"])
    assert run("report", plain).code == 0
    assert not failed(verify(plain))
    assert "somewhere" not in parse(elsewhere.read_bytes()).text, "where the folder is does not matter"


def test_a_job_is_at_the_folder(plain: Path, run: Run, tmp_path: Path) -> None:
    """The record is not written while another command replaces the result; a page elsewhere only reads it."""
    before = (plain / "svdconvert.json").read_bytes()
    with held_result(plain):
        result = run("report", plain)
        assert result.code == 2
        assert "in use by another svdconvert" in result.err.replace("\n", " ")
        assert run("report", plain, "--out", tmp_path / "page.html").code == 0
    assert (plain / "svdconvert.json").read_bytes() == before
    assert run("report", plain).code == 0
    assert not (plain / JOB_FOLDER).exists()


def test_the_page_of_a_conversion(dense: Path, run: Run, tmp_path: Path) -> None:
    """By the real command line; then it belongs to the result, and goes with it."""
    out, words = tmp_path / "out", ("--rank", 16, "--device", "cpu", "--no-check", "--out", tmp_path / "out")
    result = run(dense, *words, "--report")
    assert result.code == 0, result.err
    assert str(out / "report.html") in result.out.replace("\n", "")
    assert "report.html" in files_of(out)
    made = (out / "report.html").read_bytes()
    # The same again makes nothing but a page that is missing.
    (out / "report.html").unlink()
    weights = (out / "model.safetensors").stat().st_mtime_ns
    assert run(dense, *words, "--report").code == 0
    assert (out / "report.html").read_bytes() == made
    assert (out / "model.safetensors").stat().st_mtime_ns == weights
    assert run(dense, *words, "--overwrite").code == 0
    assert not (out / "report.html").exists(), "of another run"
    assert "report.html" not in (out / "README.md").read_text()


def test_a_page_of_somebody_else(dense: Path, plain: Path, run: Run, tmp_path: Path) -> None:
    theirs = plain / "report.html"
    theirs.write_text("mine")
    result = run("report", plain)
    assert result.code == 2
    assert "report.html, which svdconvert did not write; move it away, or give --out" in result.err
    result = run(dense, "--rank", 16, "--device", "cpu", "--report", "--overwrite", "--out", plain)
    assert result.code == 2
    assert "report.html" in result.err
    assert theirs.read_text() == "mine"
    assert (plain / "model.safetensors").exists(), "nothing was removed"


def test_only_a_page_of_ours_is_replaced(plain: Path, run: Run, tmp_path: Path) -> None:
    """Another HTML page stays, also one that tells of svdconvert; a page of an earlier version does not."""
    out = tmp_path / "page.html"
    said = '<meta name="generator" content="svdconvert 1">'
    for theirs in ("<!DOCTYPE html>", f'<!DOCTYPE html>\n<html lang="en"><head><title>t</title>{said}</head></html>'):
        out.write_text(theirs)
        result = run("report", plain, "--out", out)
        assert result.code == 2
        assert f"--out {out} is there and is no page that svdconvert wrote; move it away" in " ".join(
            result.err.split()
        )
        assert out.read_text() == theirs
    (tmp_path / "first.html").write_bytes(b"")
    assert run("report", plain, "--out", tmp_path / "first.html").code == 0, "of a file that is empty nothing is lost"
    ours = (tmp_path / "first.html").read_bytes()
    out.write_bytes(ours.replace(f"svdconvert {__version__}".encode(), b"svdconvert 0.1"))
    assert run("report", plain, "--out", out).code == 0
    assert out.read_bytes() == ours


def test_what_has_no_page(run: Run, dense: Path, tmp_path: Path, plain: Path) -> None:
    for folder, words in ((tmp_path / "nothing", "no folder"), (dense, "no finished result")):
        result = run("report", folder)
        assert (result.code, words in result.err) == (2, True)
    config = (plain / "config.json").read_bytes()
    for out in (tmp_path, tmp_path / "no" / "page.html", plain / "config.json"):
        result = run("report", plain, "--out", out)
        assert result.code == 2
        assert f"--out {out} is" in result.err
    assert (plain / "config.json").read_bytes() == config
    (plain / "svdconvert.json").write_text('{"command": "convert"}')
    result = run("report", plain)
    assert result.code == 2
    assert "svdconvert.json is damaged: it has no 'source'" in result.err
    assert not (plain / "report.html").exists()


def test_what_is_made_of_a_result_has_a_page_of_its_own(results: dict[str, Path], run: Run, tmp_path: Path) -> None:
    """That of the source would tell of another model."""
    densify(results["shared"], tmp_path / "dense", device="cpu", check=False)
    assert not (tmp_path / "dense" / "report.html").exists()
    assert run("report", tmp_path / "dense").code == 0
    page = parse((tmp_path / "dense" / "report.html").read_bytes())
    assert "svdconvert densify" in next(page.all("pre")).text


def test_the_weights_do_not_depend_on_it(dense: Path, results: dict[str, Path], tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu", check=False, report=True)
    ours, theirs = tmp_path / "out", results["plain"]
    for name in ("model.safetensors", "config.json", "modeling_polyglot_svd.py"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_it_is_pushed_with_the_model(
    results: dict[str, Path], monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    with HubServer() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home", token=WRITE_TOKEN)
        result = run("push", results["shared"], "owner/result")
        assert result.code == 0, result.err
        assert hub.files("owner/result")["report.html"] == (results["shared"] / "report.html").read_bytes()
