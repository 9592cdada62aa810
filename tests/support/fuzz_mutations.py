"""Seeded damage to files: of their bytes, of the JSON that they hold, and of the containers of weights."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# What stands where something else should.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.5, 1e-200, 1e200, float("inf"), float("nan"), 2**31, 2**63, [None],
    10**30, -(10**30), "", "x", "0", "64", "float16", "float128", "../../etc/passwd", "/dev/zero", "a\nb\x1b[2J",
    "a" * 256, "b" * 5000, "\0", [], {}, [1], ["x"], [[1, 2], [3]], {"a": 1}, {"": []}, [0] * 1000, "한글",
)  # fmt: skip


_WHOLE = (b"null", b"[]", b"{}", b"1", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf{}")
_KINDS = "strange strange strange number number remove rename add nest wrap swap".split()


def mutate(path: Path, random: Random) -> str:
    """Damage a file in place; says how."""
    if random.random() < 0.04:
        return _replace(path, random)
    data = path.read_bytes()
    name = path.name
    if name.endswith((".json", ".jsonl")) and random.random() < 0.75:
        said, data = (_lines if name.endswith("l") else _json)(data, random)
    elif name.endswith((".safetensors", ".inner", ".outer")) and random.random() < 0.75:
        said, data = _header(data, random)
    elif name.endswith(".bin") and random.random() < 0.4:
        said = _pickle(path, random)
        data = path.read_bytes()
    else:
        said, data = _bytes(data, random)
    path.write_bytes(data)
    return said


def _replace(path: Path, random: Random) -> str:
    """Something that is no regular file."""
    path.unlink()
    kind = random.choice(["pipe", "folder", "device", "dangling link", "loop", "nothing"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to({"device": "/dev/zero", "dangling link": "nowhere", "loop": path.name}[kind])
    return f"becomes a {kind}"


def _bytes(data: bytes, random: Random) -> tuple[str, bytes]:
    raw = bytearray(data)
    # Most of a file of weights is numbers: half of the damage goes where its structure is.
    place = random.randrange(max(len(raw) if random.random() < 0.5 else min(len(raw), 2000), 1))
    kind = random.choice(["flip", "flips", "cut", "empty", "insert", "repeat", "zeros", "append", "delete", "text"])
    if kind == "flip" and raw:
        raw[place] ^= 1 << random.randrange(8)
    elif kind == "flips" and raw:
        for _ in range(random.randrange(2, 30)):
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del raw[place:]
    elif kind == "empty":
        raw.clear()
    elif kind == "insert":
        raw[place:place] = random.randbytes(random.randrange(1, 50))
    elif kind == "repeat":
        raw[place:place] = raw[place : place + random.randrange(1, 200)]
    elif kind == "zeros":
        end = min(place + random.randrange(1, 200), len(raw))
        raw[place:end] = bytes(end - place)
    elif kind == "append":
        raw += random.choice([b"\0", b"}", b"\n", b"{}", random.randbytes(20)])
    elif kind == "delete":
        del raw[place : place + random.randrange(1, 50)]
    else:
        raw[:] = random.choice(_WHOLE)
    return f"{kind} at {place}", bytes(raw)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places in a value; of long lists and tables the beginning."""
    found = [at]
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items[:40]:
        found += _paths(inner, (*at, key))
    return found


def _change(value: Any, random: Random) -> tuple[str, Any]:
    """Change one place of a JSON value; the value itself is left alone."""
    value = copy.deepcopy(value)
    at = random.choice(_paths(value))
    holder: Any = None
    old = value
    for key in at:
        holder, old = old, old[key]
    kind = random.choice(
        ["strange", "strange", "strange", "number", "number", "remove", "rename", "add", "nest", "wrap", "swap"]
    )
    new: Any = random.choice(STRANGE)
    if kind == "number" and type(old) in (int, float):
        new = random.choice(
            [-old, old + 1, old - 1, old * 2, old * 1000, old / 3, float(old), str(old), 0, old * 10**9]
        )
    elif (kind == "remove" and isinstance(holder, dict)) or (kind == "remove" and isinstance(holder, list)):
        del holder[at[-1]]
        return f"remove {at}", value
    elif kind == "rename" and isinstance(holder, dict):
        name = random.choice([at[-1] + "x", at[-1].upper(), at[-1][:-1], "", "x" * 300])
        holder[name] = holder.pop(at[-1])
        return f"rename {at} to {name[:20]}", value
    elif kind == "add" and isinstance(old, dict):
        old[random.choice(["x", "auto_map", "quantization_config", "bias", "r", "dtype", "", "y" * 300])] = new
        return f"add {str(new)[:20]} to {at}", value
    elif kind == "nest":
        new = old
        for _ in range(random.choice([1, 5, 30])):
            new = [new] if random.random() < 0.5 else {"a": new}
    elif kind == "wrap":
        new = [old]
    elif kind == "swap" and isinstance(holder, dict) and len(holder) > 1:
        other = random.choice([key for key in holder if key != at[-1]])
        holder[at[-1]], holder[other] = holder[other], holder[at[-1]]
        return f"swap {at} and {other}", value
    if holder is None:
        return f"all becomes {str(new)[:20]}", new
    holder[at[-1]] = new
    return f"{at} becomes {str(new)[:20]}", value


def _dump(value: Any, random: Random) -> bytes:
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    if random.random() < 0.03:  # deeper than Python's own writer goes
        at = text.find(":")
        text = text[: at + 1] + "[" * 100_000 + "]" * 100_000 + "," + text[at + 1 :]
    return text.encode("utf-8", "surrogatepass")


def _json(data: bytes, random: Random) -> tuple[str, bytes]:
    said, value = _change(json.loads(data), random)
    if random.random() < 0.2:
        more, value = _change(value, random)
        said = f"{said}; {more}"
    return said, _dump(value, random)


def _lines(data: bytes, random: Random) -> tuple[str, bytes]:
    lines = data.splitlines(keepends=True)
    place = random.randrange(len(lines))
    kind = random.choice(["change", "change", "change", "remove", "repeat", "move", "tear"])
    if kind == "change":
        told, _, text = lines[place].partition(b" ")  # a digest, and what it is of
        said, text = _json(text, random)
        lines[place] = told + b" " + text + b"\n"
        return f"line {place}: {said}", b"".join(lines)
    if kind == "remove":
        del lines[place]
    elif kind == "repeat":
        lines.insert(random.randrange(len(lines)), lines[place])
    elif kind == "move":
        random.shuffle(lines)
    else:
        lines[place] = lines[place][: random.randrange(len(lines[place]))]
    return f"{kind} line {place}", b"".join(lines)


def _header(data: bytes, random: Random) -> tuple[str, bytes]:
    """Of a safetensors file: its header's length, its text, or what the text says."""
    (length,) = struct.unpack("<Q", data[:8])
    text, rest = data[8 : 8 + length], data[8 + length :]
    kind = random.random()
    if kind < 0.1:
        claimed = random.choice([0, 1, length - 1, length + 1, length * 2, 2**31, 2**64 - 1, random.randrange(2**20)])
        return f"header length {claimed}", struct.pack("<Q", claimed) + text + rest
    if kind < 0.25:
        said, text = _bytes(text, random)
    else:
        said, text = _json(text, random)
    return f"header: {said}", struct.pack("<Q", len(text)) + text + rest


def _pickle(path: Path, random: Random) -> str:
    """Of a pickled state dict: what it holds."""
    import torch

    state = torch.load(path, weights_only=True)
    name = random.choice(sorted(state))
    tensor = state[name]
    changes: dict[str, Callable[[], Any]] = {
        "number": lambda: 3,
        "list": lambda: [1, 2],
        "nested": lambda: {"a": tensor},
        "double": lambda: tensor.double(),
        "integer": lambda: torch.ones_like(tensor, dtype=torch.int64),
        "complex": lambda: tensor.to(torch.complex64),
        "flat": lambda: tensor.reshape(-1),
        "turned": lambda: tensor.T if tensor.dim() == 2 else tensor[None],
        "less": lambda: tensor[1:],
        "none": lambda: tensor[:0],
        "wide": lambda: tensor.new_zeros(1).expand(10**12),
        "meta": lambda: torch.empty(10**12, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nan": lambda: torch.full_like(tensor.float(), float("nan")),
    }
    kind = random.choice([*changes, "remove", "add", "whole", "rename"])
    if kind == "remove":
        del state[name]
    elif kind == "rename":
        state[random.choice([name + "x", "x" * 300, "", "module." + name])] = state.pop(name)
    elif kind == "add":
        state["extra"] = random.choice([torch.ones(3), 1, "x"])
    elif kind == "whole":
        state = random.choice([{"state_dict": state}, list(state.values()), tensor, 5, {1: tensor}])
    else:
        state[name] = changes[kind]()
    torch.save(state, path)
    return f"pickle: {kind} {name}"
