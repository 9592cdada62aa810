"""Which files of a model are copied into a result: its tokenizer, chat templates, settings, licence.

No list names all files of all tokenizers, so the rule is the other way round. Every file at the top is copied unless it
is known to be something else: weights of any format, training state, an adapter, code, or a file that is written again.
The only folder copied is ``additional_chat_templates``, which ``save_pretrained`` writes. Two kinds of files are copied
because they are named: code in the settings of a tokenizer or processor (``auto_map``) with the files that it imports,
and files whose names occur in those settings or that code. Code is copied, never run; the model's code is replaced by
svdconvert's modeling file. Notes tell which files are left out, and which are named but missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from svdconvert.families.table import FACTORED
from svdconvert.families.towers import FACTORED_TOWERS
from svdconvert.storage.other_formats import ADAPTER_CONFIG

TEMPLATES = "additional_chat_templates/"

# Weights in any format, training state, caches, code.
_OTHER_SUFFIXES = tuple(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .onnx_data .gguf .ggml .npz .npy .tflite .ot .mlmodel .distcp "
    ".nemo .pkl .pickle .index.json .py .pyc .lock .tmp .partial".split()
)
# Vocabularies whose ending looks like weights (TransfoXL).
_VOCABULARIES = frozenset({"vocab.pkl", "vocab.bin"})
# Files that are written again, or whose absence needs no note.
_WRITTEN = frozenset({"config.json", "README.md", "svdconvert.json", "report.html"})
_OTHER_NAMES = _WRITTEN | {"trainer_state.json", ADAPTER_CONFIG, "model_index.json", "latest"}
_EVENTS = "events.out.tfevents."

# No tokenizer file is larger; settings and code are far smaller.
MAX_BYTES, MAX_CODE_BYTES = 500_000_000, 2_000_000

# Settings that may name code, and those of their classes that are not the model's.
_SETTINGS = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
CODE_CLASSES = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")

# As transformers finds the files that code needs: `from .name import`, `import .name`.
_IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+\.([A-Za-z_][\w.]*)", re.MULTILINE)
_LITERAL = re.compile(r"""["']([\w./-]{1,200})["']""")


@dataclass(frozen=True)
class SideFiles:
    """Which files of a model, weights aside, are copied.

    Attributes:
        taken: paths of the files to copy.
        left_out: names of files and folders that are not copied, code first.
        absent: missing file -> the file that names it.
    """

    taken: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


def is_side_file(name: str) -> bool:
    """Whether a file is copied without being named: any file at the top that is not known to be something else.

    >>> [is_side_file(name) for name in ("qwen.tiktoken", "optimizer.pt", "additional_chat_templates/tool_use.jinja")]
    [True, False, True]
    """
    if name.startswith(TEMPLATES):
        return re.fullmatch(r"[^./\\][^/\\]*\.jinja", name.removeprefix(TEMPLATES)) is not None
    if "/" in name or "\\" in name or name.startswith((".", _EVENTS)) or name in _OTHER_NAMES:
        return False
    return name in _VOCABULARIES or not name.endswith(_OTHER_SUFFIXES)


def choose_side_files(
    sizes: Mapping[str, int],
    settings: Callable[[str], Mapping[str, Any]],
    code: Callable[[str], str],
    config: Mapping[str, Any],
    weights: Collection[str],
) -> SideFiles:
    """Choose among the files of a model.

    Args:
        sizes: path in the model's folder -> bytes.
        settings: reads a JSON file.
        code: reads a file of code as text.
        config: parsed ``config.json``.
        weights: the weight files, and their index.
    """
    own = {kind: row.modeling for kind, row in FACTORED.items()}
    own |= {kind: tower.modeling for kind, tower in FACTORED_TOWERS.items()}
    replaced = {f"{name}.py" for kind, name in own.items() if kind == config.get("model_type")}
    by_rule = {name for name, size in sizes.items() if is_side_file(name) and size <= MAX_BYTES}
    known = {name: settings(name) for name in _SETTINGS if name in sizes}
    todo = [(module, "config.json") for module in _modules(config)]
    todo += [(module, name) for name, found in known.items() for module in _modules(found)]
    named = {text for found in known.values() for text in _texts(found)}
    programs: set[str] = set()
    absent: dict[str, str] = {}
    while todo:
        file, by = todo.pop()
        if file in programs or file in absent:
            continue
        if not 0 <= sizes.get(file, -1) <= MAX_CODE_BYTES:
            absent[file] = by
            continue
        programs.add(file)
        text = code(file)
        folder = file.rpartition("/")[0]
        todo += [(f"{folder}/{_file_of(name)}".lstrip("/"), file) for name in _IMPORT.findall(text)]
        named |= set(_LITERAL.findall(text))
    passed = {*weights, *_WRITTEN, *replaced}
    by_name = {
        name
        for name in named & sizes.keys()
        if name not in passed and not name.endswith(".py") and _is_inside(name) and sizes[name] <= MAX_BYTES
    }
    taken = by_rule | programs | by_name
    return SideFiles(tuple(sorted(taken)), tuple(_left(sizes, taken | passed)), absent)


def code_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The classes in a config's ``auto_map`` that are not the model's."""
    classes = config.get("auto_map")
    return {key: classes[key] for key in CODE_CLASSES if key in classes} if isinstance(classes, Mapping) else {}


def side_notes(files: SideFiles, listing: Callable[[list[str]], str]) -> list[str]:
    """Notes for the user, one sentence each."""
    notes = []
    if files.left_out:
        notes.append(f"files that are left out: {listing(list(files.left_out))}")
    notes += [
        f"{by} names {file}, which is not there; what needs it will not load from the result either"
        for file, by in sorted(files.absent.items())
    ]
    return notes


def _modules(settings: Mapping[str, Any]) -> Iterator[str]:
    """Code files that settings name; those in another repository, `owner/name--module.Class`, are left there."""
    for value in code_classes(settings).values():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "--" not in reference and "." in reference:
                file = _file_of(reference.rpartition(".")[0])
                if _is_inside(file):
                    yield file


def _file_of(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def _is_inside(name: str) -> bool:
    """Whether a path stays inside the folder and is not hidden."""
    return "\\" not in name and not any(part == "" or part.startswith(".") for part in name.split("/"))


def _texts(value: Any, depth: int = 4) -> Iterator[str]:
    """The strings in settings."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, (Mapping, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part, depth - 1)


def _left(sizes: Mapping[str, int], kept: Collection[str]) -> list[str]:
    """Names of files that are not copied, a folder as one, without hidden ones; code first, weights last."""
    left = {name.partition("/")[0] + ("/" if "/" in name else "") for name in sizes if name not in kept}
    order = {".py": 0, "/": 1}
    return sorted(
        (name for name in left if not name.startswith(".")),
        key=lambda name: (
            next((order[end] for end in order if name.endswith(end)), 2 + name.endswith(_OTHER_SUFFIXES)),
            name,
        ),
    )
