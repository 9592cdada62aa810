"""What goes along with the weights: everything of the tokenizer, nothing from outside, no code that is run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from support.checkpoints import content, read_config, read_weights, tree, write_checkpoint
from support.families import VERSION
from support.hub_server import HubServer, use_hub
from support.refusals import assert_refused, edit_json
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from svdconvert import convert, densify, fold, plan
from svdconvert.storage.side_files import choose_side_files, is_side_file
from svdconvert.storage.source import LocalSource

Run = Callable[..., SimpleNamespace]
OURS = {"config.json", "README.md", "svdconvert.json", "modeling_polyglot_svd.py"}

CODE = """
from __future__ import annotations
open(%r, "w").close()
from transformers import PreTrainedTokenizer
from .words import split
from .absent import nothing
VOCAB_FILES_NAMES = {"vocab_file": "assets/words.pkl", "other": "model.safetensors", "code": "modeling_mine.py"}
class MyTokenizer(PreTrainedTokenizer):
    pass
"""


def others(folder: Path) -> dict[str, object]:
    """What is in a folder beside weights and what is written anew."""
    return {name: data for name, data in tree(folder).items() if name not in OURS and not name.endswith(".safetensors")}


def classes(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from classes(part)


def vocabularies() -> set[str]:
    """The files of every tokenizer of the installed version that can be imported here."""
    found: set[str] = set()
    for name in {name for value in TOKENIZER_MAPPING_NAMES.values() for name in classes(value)}:
        try:
            files = getattr(transformers, name).vocab_files_names
        except (ImportError, AttributeError):  # its package is not here
            continue
        found |= {file for file in files.values() if isinstance(file, str)}
    return found


def test_every_vocabulary_of_the_installed_transformers() -> None:
    names = vocabularies()
    assert {"vocab.json", "merges.txt", "tokenizer.json", "vocab.txt"} <= names
    assert [name for name in names if not is_side_file(name)] == []


def test_vocabularies_of_other_tokenizers() -> None:
    for name in ("qwen.tiktoken", "tekken.json", "sentencepiece.bpe.model", "bpe.codes", "vocab.pkl", "vocab.bin"):
        assert is_side_file(name)


def many_templates(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)


def word_pieces(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


class Letters(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer without any class of the library behind it."""

    vocab_files_names = {"vocab_file": "letters.data"}  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.letters = {letter: i for i, letter in enumerate(Path(vocab_file).read_text(encoding="utf-8").splitlines())}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.letters)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.letters)[index]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / "letters.data"
        path.write_text("\n".join(self.letters), encoding="utf-8")
        return (str(path),)


def of_its_own(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    letters = folder / "letters.data"
    letters.write_text("\n".join(["?", *"abcdefghijklmnopqrstuvwxyz"]))
    Letters(str(letters), unk_token="?").save_pretrained(folder)


SAVED = {"templates": many_templates, "word pieces": word_pieces, "a class of its own": of_its_own}


@pytest.mark.parametrize("case", SAVED)
def test_all_that_save_pretrained_writes(case: str, tmp_path: Path) -> None:
    """Through conversion, and from there through densify and fold."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    source = write_checkpoint(tmp_path / "source")
    SAVED[case](source)
    expected = {name: data for name, data in tree(source).items() if name not in OURS and "model." not in name}
    if case == "templates" and VERSION >= (5, 0):
        assert {"additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"} <= expected.keys()
    convert(source, tmp_path / "out", rank=16, device="cpu")
    assert others(tmp_path / "out") == expected
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    assert others(tmp_path / "densified") == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    get_peft_model(model, LoraConfig(r=2, target_modules=["dense"])).save_pretrained(tmp_path / "adapter")
    fold(tmp_path / "out", tmp_path / "adapter", tmp_path / "folded", device="cpu")
    assert others(tmp_path / "folded") == expected
    if case == "templates":
        ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", source))
        assert ours.chat_template == theirs.chat_template
        assert ours.get_vocab() == theirs.get_vocab()


def write_code(folder: Path, trace: Path) -> Path:
    """A model with a tokenizer of its own and a modeling file of its own, both of which leave a trace when run."""
    source = write_checkpoint(folder)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]})
    (source / "tokenization_mine.py").write_text(CODE % str(trace))
    (source / "words.py").write_text(f"open({str(trace)!r}, 'w').close()\nfrom .letters import a\nsplit = str.split\n")
    (source / "letters.py").write_text("a = 1\n")
    (source / "modeling_mine.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    (source / "unrelated.py").write_text("")
    (source / "assets").mkdir()
    (source / "assets" / "words.pkl").write_bytes(b"words")
    (source / "assets" / "other.txt").write_bytes(b"no words")
    (source / "optimizer.pt").write_bytes(b"state")
    return source


TAKEN = {"tokenization_mine.py", "words.py", "letters.py", "assets/words.pkl"}


def test_code_of_the_tokenizer_goes_along_and_is_not_run(run: Run, tmp_path: Path) -> None:
    source, trace = write_code(tmp_path / "source", tmp_path / "it-ran"), tmp_path / "it-ran"
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine", "AutoTokenizer": ["x.Y"]})
    result = run(source, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    for name in TAKEN:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    left = {"modeling_mine.py", "unrelated.py", "optimizer.pt", "assets/other.txt"}
    assert not left & tree(tmp_path / "out").keys()
    notes = plan(source, rank=16).notes
    assert "files that are left out: modeling_mine.py, unrelated.py, assets/ and 1 more" in notes
    (absent,) = (note for note in notes if "absent.py" in note)
    assert "tokenization_mine.py names absent.py, which is not there" in absent
    assert [note for note in notes if "config.json names x.py" in note]
    config = read_config(tmp_path / "out")
    assert config["auto_map"]["AutoTokenizer"] == ["x.Y"]
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_polyglot_svd.")
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    assert tree(tmp_path / "densified").keys() >= TAKEN
    assert read_config(tmp_path / "densified")["auto_map"] == {"AutoTokenizer": ["x.Y"]}
    assert not trace.exists()


def test_the_result_has_a_tokenizer_that_loads(tmp_path: Path) -> None:
    """By its own code, in the result's folder, as it does in the source's."""
    source = write_checkpoint(tmp_path / "source")
    of_its_own(source)
    text = Path(__file__).read_text(encoding="utf-8")
    body = text[text.index("class Letters") : text.index("def of_its_own")]
    head = "from pathlib import Path\nfrom typing import Any\nfrom transformers import PreTrainedTokenizer\n"
    (source / "tokenization_letters.py").write_text(f"from __future__ import annotations\n{head}\n{body}")
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_letters.Letters", None]})
    convert(source, tmp_path / "out", rank=16, device="cpu")
    ours, theirs = (AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (tmp_path / "out", source))
    assert type(ours).__name__ == "Letters"
    assert ours("hello")["input_ids"] == theirs("hello")["input_ids"] == [8, 5, 12, 12, 15]


def test_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a repository, also without a connection."""
    source = write_code(tmp_path / "source", tmp_path / "it-ran")
    many_templates(source)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]})
    files = {name: (source / name).read_bytes() for name in tree(source)}
    convert(source, tmp_path / "local", rank=16, device="cpu")
    with HubServer() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        hub.add("owner/name", files)
        report = convert("owner/name", tmp_path / "out", rank=16, device="cpu")
    assert others(tmp_path / "out") == others(tmp_path / "local")
    assert others(tmp_path / "out").keys() >= TAKEN
    assert [note for note in report.plan.notes if "left out" in note] == [
        note for note in plan(source, rank=16).notes if "left out" in note
    ]
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("reference", ["../outside.Class", "..outside.Class", "/etc/outside.Class", ".hidden.Class"])
def test_no_path_out_of_the_folder(reference: str, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("")
    source = write_checkpoint(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": [reference, None]}, extra="../outside.py")
    assert all("outside" not in name and not name.startswith(".") for name in LocalSource(source).side_files)


def test_names_on_the_hub_that_lead_out_of_the_folder() -> None:
    """A Hub may list what it likes."""
    names = ("additional_chat_templates/../../x.jinja", "../x.txt", "a/../../y.txt", "/z.txt", "..\\w.txt", ".hidden")
    names += ("additional_chat_templates/a/b.jinja", "additional_chat_templates/.x.jinja")
    settings = {"texts": list(names)}
    sizes = {"tokenizer_config.json": 9, **dict.fromkeys(names, 1)}
    found = choose_side_files(sizes, lambda name: settings, lambda name: "", {}, ())
    assert not [name for name in found.taken if ".." in name or name.startswith(("/", ".")) or "\\" in name]


# --- links and what is no file


def link_outside(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parent / f"outside-{name.replace('/', '-')}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def dangling(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("nowhere")

    return change


def device(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def circle(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return change


def linked_templates(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "a.jinja").write_text("")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")


WRONG: dict[str, tuple[Callable[[Path], None], str, str]] = {
    f"{what} {name}": (make(name), name, words)
    for make, what, words in (
        (link_outside, "link outside of", "outside of the model's folder"),
        (dangling, "dangling", "does not exist"),
        (device, "device", "outside of the model's folder"),
        (pipe, "pipe", "is not a regular file"),
        (circle, "circle", "does not exist"),
    )
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE", "README.md")
    if not (what in ("dangling", "circle", "pipe", "device") and name in ("LICENSE", "chat_template.jinja"))
} | {"linked folder": (linked_templates, "additional_chat_templates", "put what it leads to in its place")}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_file_of_the_folder(case: str, dense: Path, run: Run, tmp_path: Path) -> None:
    damage, name, words = WRONG[case]
    model = shutil.copytree(dense, tmp_path / "model")
    damage(model)
    for command in (["plan"], ["convert", "--out", tmp_path / "out"]):
        assert_refused(run(command[0], model, "--rank", 8, *command[1:]), model / name, words)
    assert not (tmp_path / "out").exists()


def test_links_inside_of_the_folder(dense: Path, tmp_path: Path) -> None:
    model = shutil.copytree(dense, tmp_path / "model")
    (model / "weights").mkdir()
    (model / "model.safetensors").rename(model / "weights" / "a.safetensors")
    (model / "model.safetensors").symlink_to("weights/a.safetensors")
    (tmp_path / "linked").symlink_to(model)
    assert plan(tmp_path / "linked", rank=8).params_after == plan(dense, rank=8).params_after


def test_files_that_do_not_count_may_be_anything(dense: Path, tmp_path: Path) -> None:
    model = shutil.copytree(dense, tmp_path / "model")
    (model / "optimizer.pt").symlink_to("nowhere")
    os.mkfifo(model / "rng_state.pth")
    (model / ".cache").mkdir()
    assert [note for note in plan(model, rank=8).notes if "optimizer.pt, rng_state.pth" in note]


# --- the Hub cache


@pytest.fixture
def snapshot(dense: Path, tmp_path: Path) -> Path:
    """The model as the Hub cache holds it."""
    root = tmp_path / "hub" / "models--owner--tiny-ko"
    folder = root / "snapshots" / "8f2c6f3c"
    folder.mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, path in enumerate(sorted(dense.iterdir())):
        shutil.copy(path, root / "blobs" / f"blob{i}")
        (folder / path.name).symlink_to(f"../../blobs/blob{i}")
    (folder / "additional_chat_templates").mkdir()
    (root / "blobs" / "template").write_text("{{ tools }}")
    (folder / "additional_chat_templates" / "tool_use.jinja").symlink_to("../../../blobs/template")
    return folder


def test_a_snapshot_of_the_hub_cache(snapshot: Path, dense: Path, tmp_path: Path) -> None:
    """Its links are followed, and the card names the model and the commit."""
    convert(snapshot, tmp_path / "out", rank=16, device="cpu")
    convert(dense, tmp_path / "plain", rank=16, device="cpu")
    template = "additional_chat_templates/tool_use.jinja"
    assert others(tmp_path / "out") == others(tmp_path / "plain") | {template: content(snapshot / template)}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert read_weights(tmp_path / "out").keys() == read_weights(tmp_path / "plain").keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny-ko, factored" in card
    assert "[owner/tiny-ko](https://huggingface.co/owner/tiny-ko)" in card
    assert "svdconvert owner/tiny-ko --revision 8f2c6f3c" in card
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    assert record["source"] == {"name": "owner/tiny-ko", "repo": "owner/tiny-ko", "commit": "8f2c6f3c"}


@pytest.mark.parametrize("target", ["../../../models--owner--other/blobs/secret", "../../refs/main", "../../../secret"])
def test_other_links_of_a_snapshot(target: str, snapshot: Path, run: Run) -> None:
    (snapshot / "tokenizer.json").unlink()
    outside = snapshot / target
    outside.parent.mkdir(parents=True, exist_ok=True)
    outside.write_text("secret")
    (snapshot / "tokenizer.json").symlink_to(target)
    assert_refused(run("plan", snapshot, "--rank", 8), "tokenizer.json is a link to", "outside of the model's folder")


def test_a_name_like_a_snapshots(dense: Path, tmp_path: Path) -> None:
    """Only the cache's own form is read as a name."""
    model = shutil.copytree(dense, tmp_path / "snapshots" / "abc")
    source = LocalSource(model)
    assert (source.name, source.repo, source.commit) == ("abc", None, None)


def test_a_calibration_says_what_it_left_out(fresh: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = [{"text": "a tiger lived on a mountain " * 9}, {"text": None}] * 30
    text.write_text("\n".join(json.dumps(row) for row in rows))
    options = ["--calib", text, "--calib-samples", 8, "--calib-length", 16, "--device", "cpu"]
    for command in (["--keep", 0.5, "--method", "whiten"], ["calibrate", "--method", "whiten"]):
        name, *others = command if command[0] == "calibrate" else ["convert", *command]
        result = run(name, fresh(), *others, *options, "--out", tmp_path / name)
        assert result.code == 0, result.err
        words = " ".join((result.out + result.err).split())
        assert "30 rows have no text (null) and are left out of the calibration" in words
