"""Whether a model still speaks, at the start and after every evaluation of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.dialogue.run_files import write_json
from examples.dialogue.trainer import is_sharded

if TYPE_CHECKING:
    import torch

    from examples.dialogue.encoding import Encoded
    from examples.dialogue.settings import Settings

Say = Callable[[str], None]


@dataclass
class Listener:
    """Listens to a model of the run.

    Attributes:
        settings: of the run.
        tokenizer: of the model.
        validation: rows whose prompts it is given.
        device: where it is.
        reference: perplexity of the model that was factored, or None.
        say: told what is heard.
        speeches: what was heard so far, with the step.
    """

    settings: Settings
    tokenizer: Any
    validation: Encoded
    device: torch.device
    reference: float | None
    say: Say
    speeches: list[dict[str, Any]] = field(default_factory=list)

    def listen(self, model: Any, step: int) -> None:
        """Let the model answer some prompts, if the settings ask for it."""
        from examples.dialogue.speech import listen

        if not self.settings.speech.samples:
            return
        speech = listen(model, self.tokenizer, self.validation.rows, self.settings.speech, self.device, self.reference)
        before = f" (before factoring {speech.reference_perplexity:,.2f})" if speech.reference_perplexity else ""
        self.say(
            f"{f'step {step}' if step else 'start'}: perplexity {speech.perplexity:,.2f}{before}, repetition "
            f"{speech.repetition:.0%}, empty answers {speech.empty:.0%}"
        )
        for prompt, answer in speech.answers:
            self.say(f"  ...{prompt[-60:]!r} -> {answer!r}")
        for warning in speech.warnings:
            self.say(f"WARNING: {self.settings.name} may no longer speak: {warning}")
        self.speeches.append({"step": step} | speech.to_json())

    def callback(self, folder: Path) -> Any:
        """A Trainer's callback that listens after every evaluation, and draws the curves in a folder."""
        from transformers import TrainerCallback

        from examples.dialogue.curves import write_curves

        listener = self

        class Watcher(TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                write_curves(state.log_history, listener.settings.name, folder)
                # A model in shards can only speak with all processes together.
                if model is not None and not (args.fsdp or is_sharded() or args.deepspeed):
                    listener.listen(model, state.global_step)

        return Watcher()


def reference_perplexity(
    settings: Settings, start: Any, validation: Encoded, device: torch.device, folder: Path
) -> float | None:
    """Perplexity of the model that was factored, on the rows that the check listens to; kept in a file."""
    from examples.dialogue.models import load_causal
    from examples.dialogue.speech import answer_perplexity

    if not start.factored or start.source == start.folder or not settings.speech.samples:
        return None
    kept = folder / "reference.json"
    if kept.is_file():
        return float(json.loads(kept.read_text(encoding="utf-8"))["perplexity"])
    dense = load_causal(start.source, device, settings.model.weights)
    perplexity = answer_perplexity(dense, validation.rows[: settings.speech.samples], device)
    write_json(kept, {"perplexity": perplexity})
    return perplexity
