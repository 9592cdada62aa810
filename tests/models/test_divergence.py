"""The literature's protocol and the divergence from the dense model, against independent references in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdconvert import InputError, evaluate, sweep
from svdconvert.models.divergence import Divergence, likelihoods
from svdconvert.models.passages import Passage

TEXT = "옛날 옛적에 호랑이가 살았다. Once upon a time there was a tiger.\n\n" * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def tokens(folder: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"][0]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """[n, vocabulary] float64 of a model computed in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval()
    with torch.inference_mode():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("window", [20, 50, 64])
def test_disjoint_is_what_the_literature_computes(window: int, factored: Path, text: Path) -> None:
    ids = tokens(factored)
    losses = []
    for i in range(len(ids) // window):
        piece = ids[i * window : (i + 1) * window]
        found = logits(factored, piece)[:-1].log_softmax(-1)
        losses.append(-found.gather(1, piece[1:, None]).mean())
    assert 1 < len(losses) < len(ids) / window, "there must be windows, and a tail to drop"
    result = evaluate(factored, text, protocol="disjoint", window=window, device="cpu", batch_size=2)
    assert result.perplexity == pytest.approx(math.exp(float(torch.stack(losses).mean())), rel=1e-6)
    assert result.tokens == (window - 1) * len(losses)
    assert (result.protocol, result.window, result.stride, result.opening) == ("disjoint", window, window, None)
    assert result.bits_per_character is None, "the tail is not predicted"


@pytest.mark.parametrize("protocol", ["sliding", "disjoint"])
def test_divergence(protocol: str, dense: Path, factored: Path, text: Path) -> None:
    window = 32
    result = evaluate(factored, text, protocol=protocol, window=window, against=dense, device="cpu", batch_size=3)
    ids = tokens(dense)
    if protocol == "sliding":
        ids = torch.cat([torch.tensor([AutoTokenizer.from_pretrained(dense).eos_token_id]), ids])
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    begin = done = 0
    while (done < len(ids) - 1) if protocol == "sliding" else (begin + window <= len(ids)):
        end = min(begin + window, len(ids) - 1) if protocol == "sliding" else begin + window - 1
        begin = max(end - window, 0) if protocol == "sliding" else begin
        first = done - begin if protocol == "sliding" else 0
        pair = (logits(folder, ids[begin:end]).log_softmax(-1)[first:] for folder in (dense, factored))
        rows.append((*pair, ids[begin + first + 1 : end + 1]))  # type: ignore[arg-type]
        done = end
        begin += window // 2 if protocol == "sliding" else window
    p, q, labels = (torch.cat(part) for part in zip(*rows, strict=True))
    assert len(labels) == result.tokens
    own, theirs = (-values.gather(1, labels[:, None]).mean() for values in (q, p))
    expected = Divergence(
        kl=float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")),
        agreement=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        entropy=float(torch.distributions.Categorical(logits=p).entropy().mean()),
        cross_entropy=float(theirs),
        added=float(own - theirs),
    )
    assert result.divergence is not None
    for name, value in vars(expected).items():
        assert getattr(result.divergence, name) == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert result.perplexity == pytest.approx(math.exp(float(own)), rel=1e-6)
    assert result.divergence.kl > 0.001, "a rank that changes nothing shows nothing"


def test_a_model_is_no_distance_from_itself(dense: Path, text: Path) -> None:
    found = evaluate(dense, text, against=dense, device="cpu").divergence
    assert found is not None
    assert (found.kl, found.agreement, found.added) == (0.0, 1.0, 0.0)


class Fixed(torch.nn.Module):
    """The same logits at every position."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        return type("Output", (), {"logits": self.values.expand(*input_ids.shape, -1)})


def test_tokens_that_are_ruled_out() -> None:
    passage = Passage(torch.tensor([0, 1, 0, 1, 0]), 5, 4, 2)
    p, q = Fixed([math.log(0.75), math.log(0.25), -math.inf]), Fixed([math.log(0.5), math.log(0.25), math.log(0.25)])
    found = likelihoods(q, passage, 1, reference=p).divergence
    assert found is not None
    assert found.kl == pytest.approx(0.75 * math.log(1.5), rel=1e-6)
    assert found.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-6)
    back = likelihoods(p, passage, 1, reference=q).divergence
    assert back is not None
    assert back.kl == math.inf


def test_another_vocabulary() -> None:
    passage = Passage(torch.tensor([0, 1, 0]), 3, 4, 2)
    with pytest.raises(InputError, match="vocabularies of 3 and 2 tokens"):
        likelihoods(Fixed([0.0, 1.0]), passage, 1, reference=Fixed([0.0, 1.0, 2.0]))


def test_over_confidence_is_said() -> None:
    assert Divergence(0.01, 0.9, entropy=4.744, cross_entropy=5.193, added=-0.01).over_confident
    assert not Divergence(0.01, 0.9, entropy=3.10, cross_entropy=3.14, added=0.01).over_confident


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "disjoint", "window": 2048}, "reads from 2 to"),
        ({"protocol": "disjoint", "window": 32, "stride": 16}, "leave it out"),
        ({"protocol": "wikitext"}, "choose sliding or disjoint"),
        ({"window": "32"}, "window='32' is not a whole number"),
        ({"window": 32, "stride": 4.0}, "stride=4.0 is not a whole number"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"device": None}, "device=None is unknown"),
        ({"window": 32, "stride": 32}, "stride=32 must lie between 1 and 31, .* use protocol='disjoint'"),
    ],
)
def test_refused(options: dict[str, object], message: str, dense: Path, text: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(dense, text, **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_a_text_of_less_than_a_window(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a b")
    with pytest.raises(InputError, match=r"less than one window of 64; lower window$"):
        evaluate(dense, tmp_path / "short.txt", protocol="disjoint", window=64, device="cpu")


def test_a_sweep_tells_it(dense: Path, text: Path, tmp_path: Path) -> None:
    found = sweep(dense, text, tmp_path / "sweep", keep=[0.4], window=48, device="cpu", plot=False, keep_models=True)
    (model,) = (tmp_path / "sweep" / "models").iterdir()
    direct = evaluate(model, text, window=48, against=dense, device="cpu").divergence
    assert direct is not None
    assert (found.points[0].kl, found.points[0].added) == pytest.approx((direct.kl, direct.added), rel=1e-6)
    assert f"| {direct.kl:.4f} |" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_command(run: Callable[..., SimpleNamespace], dense: Path, factored: Path, text: Path) -> None:
    line = ["evaluate", factored, "--text", text, "--device", "cpu"]
    command = [*line, "--window", 32, "--protocol", "disjoint", "--against", dense]
    told = run(*command).out
    found = json.loads(run(*command, "--json").out)
    far = found["divergence"]
    assert f"KL {far['kl']:.4f} nats per token" in told
    assert "disjoint: windows of 32 tokens that do not overlap" in told
    assert found["against"] == str(dense)
    alone = run(*line, "--against-revision", "main")
    assert alone.code == 2
    assert "--against-revision belongs to --against" in alone.err
