"""Settings files: inheritance, paths, and every mistake named; the recipe in steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.dialogue.experiment import read_experiment
from examples.dialogue.schedule import schedule
from examples.dialogue.settings import TrainingSettings, read_settings
from examples.dialogue.train import parse_changes
from svdconvert.errors import InputError

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "dialogue" / "settings"
RUN = 'name = "a"\noutput = "out"\n[model]\npath = "m"\n[data]\ntrain = "t.jsonl"\nvalidation = "v.jsonl"\n'


def write(folder: Path, text: str, name: str = "a.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_recipe_of_the_paper():
    """13,737 rows, batch 64, 3 epochs: 13737 * 3 / 64 = 643.9; 0.3 epoch = 64.4 steps, 0.5 epoch = 107.3."""
    planned = schedule(13_737, TrainingSettings())
    assert (planned.steps, planned.warmup, planned.evaluation) == (644, 64, 107)
    assert planned.accumulation == 8
    assert schedule(13_737, TrainingSettings(), devices=4).accumulation == 2


def test_the_paper_file_says_the_defaults():
    """The file echoes the recipe; the class has the same, so a file that leaves something out is the paper's too."""
    settings = read_settings(FILES / "1.3b.toml")
    stated = ("epochs", "batch_size", "clip", "learning_rate", "schedule", "warmup_epochs", "weight_decay")
    values = [getattr(settings.training, name) for name in (*stated, "evaluation_epochs")]
    assert values == [3.0, 64, 1.0, 3e-4, "linear", 0.3, 0.02, 0.5]
    assert values == [getattr(TrainingSettings(), name) for name in (*stated, "evaluation_epochs")]
    adapter = read_settings(FILES / "3.8b-s-l.toml").adapter
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.dropout) == ("lora", 32, 32.0, 0.1)
    assert read_settings(FILES / "1.3b-s.toml").convert.rank == 512
    assert read_settings(FILES / "3.8b-s.toml").convert.rank == 768


@pytest.mark.parametrize("path", sorted(FILES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_file_is_valid(path, tmp_path):
    if path.stem.startswith("table1"):
        text = path.read_text(encoding="utf-8").replace('"../../../out', f'"{tmp_path}')
        copy = FILES / f".{path.stem}-test.toml"
        copy.write_text(text, encoding="utf-8")
        try:
            assert len(read_experiment(copy).rows) > 8
        finally:
            copy.unlink()
    elif path.stem != "paper":
        assert read_settings(path).name


@given(st.integers(1, 10**6), st.floats(0.1, 20), st.integers(0, 6))
def test_steps_cover_the_epochs(rows, epochs, power):
    training = TrainingSettings(epochs=epochs, batch_size=64, micro_batch=2**power)
    planned = schedule(rows, training)
    assert (planned.steps - 1) * 64 < epochs * rows * (1 + 1e-9)
    assert planned.steps * 64 >= epochs * rows * (1 - 1e-9)
    assert 0 <= planned.warmup <= planned.steps
    assert 1 <= planned.evaluation <= planned.steps
    assert planned.accumulation * 2**power == 64
    assert planned.steps == max(math.ceil(epochs * rows / 64 - 1e-9), 1)


def test_a_batch_that_devices_cannot_share():
    with pytest.raises(InputError, match="is not a multiple of 3 devices times"):
        schedule(100, TrainingSettings(), devices=3)


def test_inheritance_and_paths(tmp_path):
    (tmp_path / "m").mkdir()
    write(tmp_path, RUN + "[training]\nseed = 1\nepochs = 2\n", "base.toml")
    (tmp_path / "deeper").mkdir()
    child = write(tmp_path / "deeper", 'inherit = "../base.toml"\nname = "b"\n[training]\nseed = 7\n')
    settings = read_settings(child)
    assert (settings.name, settings.training.seed, settings.training.epochs) == ("b", 7, 2.0)
    assert settings.model.path == str(tmp_path / "m")
    assert settings.output == str(tmp_path / "out")
    assert settings.data.train == str(tmp_path / "t.jsonl")
    hub = read_settings(write(tmp_path, RUN.replace('"m"', '"EleutherAI/polyglot-ko-1.3b"')))
    assert hub.model.path == "EleutherAI/polyglot-ko-1.3b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RUN + "[training]\nepoch = 3\n", "unknown setting training.epoch; did you mean epochs?"),
        (RUN + "[trainin]\nepochs = 3\n", "unknown setting trainin; did you mean training?"),
        (RUN + "[training]\nepochs = '3'\n", "training.epochs must be a number, not '3'"),
        (RUN + "[training]\nbatch_size = 2.5\n", "training.batch_size must be a whole number"),
        (RUN + "[training]\nbatch_size = true\n", "training.batch_size must be a whole number"),
        (RUN + "[training]\nepochs = 0\n", "training.epochs must be above zero"),
        (RUN + "[training]\nbatch_size = 65\n", "must be a multiple of training.micro_batch"),
        (RUN + "[adapter]\nkind = 'prefix'\n", "adapter.kind must be one of"),
        (RUN + "[adapter]\ntargets = 'dense'\n", "adapter.targets must be a list of strings"),
        (RUN + "[convert]\nrank = 8\nkeep = 0.5\n", "only one of convert.rank"),
        (RUN + "[quantization]\nbits = 4\n", "quantised weights cannot be trained themselves"),
        (RUN + "[distillation]\nteacher = 'a'\nteacher_trained_by = 'b.toml'\n", "either distillation.teacher"),
        (RUN.replace('path = "m"', "weights = 'float32'"), "either model.path or model.trained_by"),
        (RUN.replace('name = "a"', ""), "lacks the setting name"),
        (RUN.replace('train = "t.jsonl"', ""), "give data.train and data.validation"),
        ("training = 3\n" + RUN, "training must be a section"),
        ("inherit = 3\n" + RUN, "inherit must be the name"),
        ('inherit = "a.toml"\n' + RUN, "inherits from itself"),
        ("name = \n", "is not valid"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        read_settings(write(tmp_path, text))
    assert message in str(error.value)
    assert "a.toml" in str(error.value)


@pytest.mark.parametrize("autocast", ["fp16", "bf16", "no"])
def test_float16_weights_do_not_train(tmp_path, autocast):
    text = RUN.replace('path = "m"', "path = 'm'\nweights = 'float16'") + f"[training]\nautocast = '{autocast}'\n"
    with pytest.raises(InputError, match="Attempting to unscale FP16 gradients"):
        read_settings(write(tmp_path, text))
    assert read_settings(write(tmp_path, text + "[adapter]\nkind = 'lora'\n")).model.weights == "float16"


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml cannot be read"):
        read_settings(tmp_path / "none.toml")


def test_changes_on_the_command_line():
    words = ("training.seed=3", "training.learning_rate=1e-4", "model.path=a/b", "name='x'", "training.seed=4")
    table = {"training": {"seed": 4, "learning_rate": 1e-4}, "model": {"path": "a/b"}, "name": "x"}
    assert parse_changes(words) == table
    with pytest.raises(InputError, match="must be KEY=VALUE"):
        parse_changes(("seed",))
