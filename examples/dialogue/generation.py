"""Answers of a model to the questions of samples, in batches, with settings that stand in the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.dialogue.predictions import Row, read_rows
from examples.dialogue.schema import Sample, write_lines
from examples.dialogue.templates import ELISION, TEMPLATES, render
from svdconvert.errors import InputError, JobError


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; by default the most likely one each time.

    The papers state none of this. Whatever a model's own generation_config.json says is not used.

    Attributes:
        max_new_tokens: longest answer; it ends before that at the end-of-text token.
        num_beams: beams of a beam search; 1 is none.
        do_sample: whether tokens are drawn; otherwise temperature, top_p and seed do nothing.
        temperature, top_p: of the draw.
        repetition_penalty, no_repeat_ngram_size: 1.0 and 0 leave repetitions as the model makes them.
        seed: of the draws, anew for each batch.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0


def generate(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    out: Path,
    *,
    template: str,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    name: str = "",
    identity: str = "",
    elision: str = ELISION,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Row]:
    """Generate an answer to every sample and write them to a JSONL file.

    Prompts are padded on the left and run in batches of similar length, the longest first, so that memory that does
    not suffice shows at once. Answers are written batch by batch next to the file; the same call goes on there.
    The file has the answers in the order of the samples.

    Args:
        model: a causal language model in evaluation mode, on its device.
        tokenizer: of the model.
        samples: unique by id.
        out: file to write.
        template: of the prompts.
        decoding: how tokens are chosen.
        batch_size: prompts in a batch.
        name: of the model, for the record.
        identity: tells whether an interrupted run was of the same model.
        elision: see :func:`examples.dialogue.templates.render`.
        overwrite: replace a file made with other settings.
        progress: show a bar on standard error.

    Returns:
        The rows of the file: id, prediction, prompt_tokens, new_tokens, finished (whether the model ended itself).

    Raises:
        InputError: a prompt is too long for the model, or the file was made with other settings.
        JobError: memory does not suffice or the run was interrupted; the same call goes on.
    """
    decoding = decoding or Decoding()
    if not samples:
        raise InputError("there are no samples to answer; give a file with some")
    # No special tokens, as in training: the answer goes on from the prompt.
    prompts = [render(sample, template, elision=elision).prompt for sample in samples]
    ids = [tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] for prompt in prompts]
    _check_lengths(samples, ids, decoding, model)
    settings = {
        "model": name,
        "identity": identity,
        "template": template,
        "elision": elision if "{elision}" in TEMPLATES[template].pattern else None,
        "decoding": asdict(decoding),
        "dtype": str(model.dtype).removeprefix("torch."),
        "samples": len(samples),
        "prompts": _digest(prompts, [sample.id for sample in samples]),
    }
    if decoding.do_sample:
        settings["batch_size"] = batch_size
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not overwrite:
        found, rows = read_rows(out)
        if found != settings:
            raise InputError(f"{out} was made {_difference(found, settings)}; give another file or --overwrite")
        return rows
    done = _resume(partial, settings, overwrite)
    order = sorted(range(len(samples)), key=lambda index: -len(ids[index]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_partial(partial, settings, done)
    with partial.open("a", encoding="utf-8", newline="\n") as handle, _bar(len(samples), progress) as advance:
        for number, batch in enumerate(batches):
            if not all(samples[index].id in done for index in batch):
                with _continuable():
                    answers = _answers(model, tokenizer, [ids[index] for index in batch], decoding, number)
                for index, answer in zip(batch, answers, strict=True):
                    done[samples[index].id] = {"id": samples[index].id, **answer}
                handle.writelines(json.dumps(done[samples[i].id], ensure_ascii=False) + "\n" for i in batch)
                handle.flush()
            advance(len(batch))
    rows = [done[sample.id] for sample in samples]
    write_lines(out, [{"settings": settings}, *rows])
    partial.unlink()
    return rows


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, number: int
) -> list[dict[str, Any]]:
    """Rows of one batch, without their ids."""
    import torch
    from transformers import GenerationConfig

    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), 0 if pad is None else pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    chosen = {key: value for key, value in asdict(decoding).items() if key != "seed"}
    if decoding.do_sample:
        chosen["top_k"] = 0
        torch.manual_seed(decoding.seed + number)
    config = GenerationConfig(**chosen, pad_token_id=pad, eos_token_id=end, bos_token_id=tokenizer.bos_token_id)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    rows = []
    for prompt, tokens in zip(prompts, output[:, width:].tolist(), strict=True):
        finished = end in tokens
        answer = tokens[: tokens.index(end)] if finished else tokens
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        rows.append({"prediction": text, "prompt_tokens": len(prompt), "new_tokens": len(answer), "finished": finished})
    return rows


def _check_lengths(samples: Sequence[Sample], ids: Sequence[Sequence[int]], decoding: Decoding, model: Any) -> None:
    if len({sample.id for sample in samples}) < len(samples):
        raise InputError("two samples have the same id; the answers could not be told apart")
    limit = getattr(model.config, "max_position_embeddings", None)
    too_long = [
        s for s, tokens in zip(samples, ids, strict=True) if limit and len(tokens) + decoding.max_new_tokens > limit
    ]
    if too_long:
        raise InputError(
            f"{len(too_long):,} prompts with {decoding.max_new_tokens} new tokens exceed the model's {limit:,} "
            f"positions (first {too_long[0].id}); prepare the data with --max-tokens or ask for fewer new tokens"
        )


def _resume(partial: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Row]:
    """What an interrupted run of the same settings has written; a last line cut short is none."""
    if not partial.exists():
        return {}
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        return {}
    if whole != content:
        partial.write_bytes(whole)
    found, rows = read_rows(partial)
    if found != settings:
        if overwrite:
            return {}
        raise InputError(f"{partial} was begun {_difference(found, settings)}; remove it or give another file")
    return {row["id"]: row for row in rows}


def _write_partial(partial: Path, settings: Mapping[str, Any], done: Mapping[str, Row]) -> None:
    write_lines(partial, [{"settings": settings}, *done.values()])


def _difference(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    names = [name for name in settings if found.get(name) != settings[name]]
    return f"with another {' and another '.join(names)}" if names else "with further settings"


def _digest(prompts: Sequence[str], names: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in (*names, *prompts):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


@contextmanager
def _continuable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise JobError("interrupted; the same command goes on where it stopped") from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        raise JobError("out of memory; use a smaller --batch-size, the same command goes on") from None


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda count: bar.advance(task, count)
