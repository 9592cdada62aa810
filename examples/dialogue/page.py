"""The page of a table of runs: Markdown and HTML of the same content, two plots, and all figures as JSON."""

from __future__ import annotations

import html
import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.dialogue.evaluation import TOTAL
from examples.dialogue.experiment import Experiment, Row
from svdconvert.errors import InputError
from svdconvert.words import size

Results = Mapping[str, Mapping[str, Any]]

# Lee et al. (HCLT 2023), Table 1: SVD, LoRA, parameters before and after in billions, and the four scores. Its printed
# totals of 1.3B-S and 3.8B-S-L are interchanged, so they are summed anew here.
PAPER = (
    ("3.8B", "X", "X", 3.8, 3.8, (17.68, 18.07, 11.47, 8.78)),
    ("1.3B", "X", "X", 1.3, 1.3, (17.04, 17.33, 10.39, 8.13)),
    ("1.3B-S", "O", "X", 1.3, 0.5, (14.47, 15.05, 9.28, 6.38)),
    ("3.8B-S-L", "O", "O", 3.8, 1.4, (14.90, 15.17, 8.37, 5.99)),
    ("1.3B-S-L", "O", "O", 1.3, 0.5, (12.58, 13.44, 8.45, 5.19)),
    ("3.8B-S", "O", "X", 3.8, 1.4, (7.68, 8.98, 5.33, 2.10)),
    ("1.3B-P-FS", "FWSVD", "X", 1.3, 0.5, (9.27, 10.22, 7.36, 2.35)),
    ("1.3B-P-S", "O", "X", 1.3, 0.5, (10.21, 11.70, 5.50, 2.65)),
)

# The MultiDoc2Dial paper's Table 2, LLaMA 7B: method, layers, length, learning rate, and the four scores.
ADAPTER_PAPER = (
    ("LLaMA-Adapter", "10", "10", "1e-2", (35.56, 29.93, 33.83, 12.96)),
    ("LLaMA-Adapter", "10", "30", "1e-2", (37.43, 32.43, 35.70, 15.64)),
    ("LLaMA-Adapter", "30", "10", "1e-2", (60.62, 58.37, 59.32, 47.63)),
    ("LLaMA-Adapter", "30", "30", "1e-2", (59.70, 57.08, 58.32, 46.12)),
    ("LoRA, r 1", "-", "-", "3e-4", (59.97, 57.34, 58.61, 46.35)),
)

# What a remark can quote of a row.
FIGURES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "F1": lambda result: f"{result['scores']['scores']['F1']:.2f}",
    "loss": lambda result: f"{_loss(result):.3f}",
    "kl": lambda result: _divergence(result),
    "perplexity": lambda result: f"{result['statistics']['perplexity']:,.2f}",
    "repetition": lambda result: f"{result['scores']['rates']['repetition']:.0f}",
    "unfinished": lambda result: f"{result['statistics']['unfinished']}",
    "start": lambda result: f"{result['run']['speech'][0]['perplexity']:.2f}",
    "total": lambda result: _scores(result)[-1],
}
_QUOTED = re.compile(r"\{([^{}.]+)\.(\w+)\}")

ADAPTERS = "adapters"
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
_PLOT, _CURVES = "total.png", "evaluation_loss.png"
# Beyond that ratio of sizes an axis is logarithmic; share of the axes that a point's name takes, across and up.
_WIDE, _NAME = 8, (0.35, 0.035)


def write_page(experiment: Experiment, results: Results, folder: Path, command: str) -> None:
    """Write README.md, index.html, the plots and results.json.

    Args:
        experiment: the table.
        results: of the rows that are done.
        folder: where to write.
        command: that makes the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = _blocks(experiment, results, folder, command)
    (folder / "README.md").write_text(_markdown(experiment.title, blocks), encoding="utf-8")
    (folder / "index.html").write_text(_html(experiment.title, blocks), encoding="utf-8")
    public = {name: _public(result) for name, result in results.items()}
    text = json.dumps({"command": command, "rows": public}, ensure_ascii=False, indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def remark(experiment: Experiment, results: Results, text: str) -> str:
    """A remark with the figures that it quotes; empty while a row that it quotes is not done.

    Raises:
        InputError: there is no such row or figure.
    """
    names = [row.name for row in experiment.rows]
    for name, figure in _QUOTED.findall(text):
        if name not in names or figure not in FIGURES:
            raise InputError(
                f"a remark quotes {{{name}.{figure}}}; rows are {', '.join(names)}, figures {', '.join(FIGURES)}"
            )
        if name not in results:
            return ""
    return _QUOTED.sub(lambda found: FIGURES[found[2]](results[found[1]]), text)


def paper_table() -> tuple[list[str], list[list[str]]]:
    """The paper's Table 1 with its totals summed anew."""
    header = ["model", "SVD", "LoRA", "before (B)", "after (B)", *TOTAL, "Total"]
    rows = [
        [name, svd, lora, f"{before}", f"{after}", *(f"{score:.2f}" for score in scores), f"{sum(scores):.2f}"]
        for name, svd, lora, before, after, scores in PAPER
    ]
    return header, rows


def adapter_paper_table() -> tuple[list[str], list[list[str]]]:
    """Table 2 of the paper on LLaMA-Adapter, with the totals that it does not have."""
    header = ["method", "layers", "length", "learning rate", *TOTAL, "Total"]
    rows = [[*names, *(f"{score:.2f}" for score in scores), f"{sum(scores):.2f}"] for *names, scores in ADAPTER_PAPER]
    return header, rows


def score_table(rows: Sequence[Row], results: Results) -> tuple[list[str], list[list[str]]]:
    """Rows in the form of the paper's table, those that are done and have answered."""
    losses = _losses(rows, results)
    header = ["model", "SVD", "LoRA", "before", "after", "bits", *TOTAL, "Total", *losses]
    lines = []
    for row in rows:
        result = results.get(row.name)
        if result is None or "scores" not in result:
            continue
        run = result["run"]
        bits = (
            row.bits
            or row.settings.quantization.bits
            or _BITS[result["statistics"].get("dtype", row.settings.model.weights)]
        )
        lines.append(
            [
                row.name,
                row.svd,
                row.lora,
                _count(run["source_parameters"]),
                _count(run["start_parameters"]),
                str(bits),
                *_scores(result),
                *(FIGURES[name.lower()](result) for name in losses),
            ]
        )
    return header, lines


def adapter_table(rows: Sequence[Row], results: Results) -> tuple[list[str], list[list[str]]]:
    """The columns of the LLaMA-Adapter paper's table, with the trainable parameters."""
    losses = _losses(rows, results)
    header = ["method", "layers", "length", "learning rate", "trainable", *TOTAL, "Total", *losses]
    lines = []
    for row in rows:
        result = results.get(row.name)
        if result is None or "scores" not in result:
            continue
        adapter, prompt = row.settings.adapter, row.settings.adapter.kind != "lora" and not row.start
        lines.append(
            [
                row.name,
                str(adapter.layers) if prompt else "-",
                str(adapter.length) if prompt else "-",
                "-" if row.start else f"{row.settings.training.learning_rate:g}",
                "0" if row.start else f"{result['run']['memory']['trainable']:,}",
                *_scores(result),
                *(FIGURES[name.lower()](result) for name in losses),
            ]
        )
    return header, lines


def cost_table(rows: Sequence[Row], results: Results) -> tuple[list[str], list[list[str]]]:
    """Memory, size and speed of every row."""
    header = ["model", "trainable", "weights asked", "standing", "training peak", "training", "tokens/s", "answers"]
    header += ["answers/s", "answering peak"]
    lines = []
    for row in rows:
        result = results.get(row.name)
        if result is None:
            continue
        run, memory = result["run"], result["run"]["memory"]
        rate = run["tokens"] * run["steps"] * row.settings.training.batch_size / run["rows"] / run["training_seconds"]
        line = [
            row.name,
            f"{memory['trainable']:,}",
            "-",
            size(memory["standing"]),
            size(memory["peak"]),
            f"{run['training_seconds']:,.0f} s",
            f"{rate:,.0f}",
            "-",
            "-",
            "-",
        ]
        if "statistics" in result:
            statistics = result["statistics"]
            line[2] = size(statistics["weights"])
            line[7] = str(statistics["samples"])
            line[8] = f"{statistics['samples'] / statistics['seconds']:.1f}"
            line[9] = size(statistics["peak"])
        if row.of:
            line[1] = line[3] = line[4] = line[5] = line[6] = "-"
        lines.append(line)
    return header, lines


def speech_table(rows: Sequence[Row], results: Results) -> tuple[list[str], list[list[str]]]:
    """How alive the answers are, and what the check said of the start point."""
    header = ["model", "start perplexity", "evaluation loss", "F1 char", "chrF++"]
    header += ["distinct-1", "distinct-2", "repetition", "empty", "unfinished"]
    lines = []
    for row in rows:
        result = results.get(row.name)
        if result is None or "scores" not in result:
            continue
        speech, scores = result["run"]["speech"], result["scores"]
        line = [row.name, f"{speech[0]['perplexity']:,.1f}" if speech else "-"]
        line.append("-" if row.start else f"{result['run']['eval_loss']:.4f}")
        line += [f"{scores['scores'][name]:.2f}" if name in scores["scores"] else "-" for name in ("F1 char", "chrF++")]
        line += [f"{scores['rates'][name]:.1f}" for name in ("distinct-1", "distinct-2", "repetition", "empty")]
        unfinished, asked = result["statistics"].get("unfinished"), result["statistics"]["samples"]
        line.append("-" if unfinished is None else f"{100 * unfinished / asked:.1f}")
        lines.append(line)
    return header, lines


def full_size_table() -> tuple[list[str], list[list[str]]]:
    """Standing memory of polyglot-ko's real sizes, by way of fine-tuning."""
    from examples.dialogue.full_size import SIZES, WAYS, standing_memory

    header = ["way", *SIZES]
    found = {way.name: {name: standing_memory(name, way) for name in SIZES} for way in WAYS}
    lora = found["LoRA"]
    lines = []
    for way in WAYS:
        cells = [way.name]
        for name in SIZES:
            standing = found[way.name][name].standing
            less = f" ({standing / lora[name].standing - 1:+.0%})" if way.adapter and way.name != "LoRA" else ""
            cells.append(size(standing) + less)
        lines.append(cells)
    return header, lines


def _blocks(experiment: Experiment, results: Results, folder: Path, command: str) -> list[tuple[Any, ...]]:
    rows = experiment.rows
    missing = [row.name for row in rows if row.name not in results]
    blocks: list[tuple[Any, ...]] = [("pre", command)]
    if missing:
        blocks.append(("p", f"Not done yet: {', '.join(missing)}."))
    remarks = [remark(experiment, results, text) for text in experiment.remarks]
    blocks += [("p", text) for text in remarks if text]
    done = [results[row.name] for row in rows if row.name in results]
    if done:
        blocks.append(("p", _made_with(experiment, done[0]["run"], done)))
    for name, title in experiment.tables.items():
        own = [row for row in rows if row.table == name]
        header, lines = (adapter_table if name == ADAPTERS else score_table)(own, results)
        if lines:
            blocks += [("h2", title), ("table", header, lines)]
    scored = [row for row in rows if "scores" in results.get(row.name, {})]
    if scored:
        _plot(scored, results, folder / _PLOT)
        _plot_curves(scored, results, folder / _CURVES)
        blocks += [("img", _PLOT, "Total score and size of every row"), ("img", _CURVES, "evaluation loss over steps")]
        blocks += [("h2", "Memory, size and speed"), ("p", _costs_are(results[scored[0].name]))]
        blocks.append(("table", *cost_table(rows, results)))
        blocks += [("h2", "Does it speak"), ("p", _SPEECH_IS), ("table", *speech_table(rows, results))]
    if experiment.full_size:
        blocks += [("h2", "Memory of a fine-tuning at full size"), ("p", _FULL_SIZE_IS), ("table", *full_size_table())]
    blocks += [("h2", "The papers' figures"), ("p", _PAPER_IS), ("table", *paper_table())]
    blocks += [("p", _ADAPTER_PAPER_IS), ("table", *adapter_paper_table())]
    if scored:
        title = "One question, all answers" if experiment.examples == 1 else "Some questions, all answers"
        blocks += [("h2", title), *_examples(experiment, results)]
        signatures = results[scored[0].name]["scores"]["signatures"]
        blocks += [("h2", "Signatures"), ("pre", "\n".join(f"{key}: {value}" for key, value in signatures.items()))]
    return blocks


_SPEECH_IS = (
    "Start perplexity: of a few reference answers under the start model as loaded, before the first step. The others "
    "are rates of the generated answers, times 100: distinct-n, repetition (the share of 4-grams that an answer had "
    "before), empty answers, and those that were cut off at the longest length."
)
_FULL_SIZE_IS = (
    "Weights, gradients and AdamW state, without activations, counted from the real geometry; nothing was run. "
    "Trained weights are float32 masters, frozen ones 16 bits, QLoRA's nf4 with double quantisation. In brackets: "
    "against LoRA. The rank is a quarter of the hidden size, LoRA's rank 32."
)
_PAPER_IS = (
    "Lee et al., HCLT 2023, polyglot-ko on KoDoc2Dial, Table 1. The totals are summed anew: those printed for 1.3B-S "
    "and 3.8B-S-L are interchanged, so of the two it is 1.3B-S that scores higher."
)


_ADAPTER_PAPER_IS = (
    "Table 2 of the paper on LLaMA-Adapter, LLaMA 7B on MultiDoc2Dial. Its prompts mark the span that answers."
)


def _made_with(experiment: Experiment, run: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    data = experiment.rows[0].settings.data
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    decoding = ", ".join(f"{key} {value}" for key, value in experiment.decoding.items()) or "greedy"
    minutes = sum(float(result["seconds"]) for result in done) / 60
    return (
        f"{run['rows']:,} training samples of {run['tokens']:,} tokens, {run['steps']} steps of "
        f"{experiment.rows[0].settings.training.batch_size}, seed {experiment.rows[0].settings.training.seed} "
        f"(warm-up {run['warmup']}, evaluation every {run['evaluation_every']}), template {data.template}; decoding "
        f"{decoding}; device {run['device']}, {run['processes']} process; {minutes:,.0f} minutes for "
        f"{len(done)} rows; {versions}."
    )


def _costs_are(result: Mapping[str, Any]) -> str:
    return (
        "Weights asked: of the model that answers, as it lies in memory. Standing: weights, gradients and optimiser "
        f"state in training. Peaks: {result['run']['memory']['peak_is']}. Answers per second count only generation. "
        "Times are of a shared machine."
    )


def _examples(experiment: Experiment, results: Results) -> list[tuple[Any, ...]]:
    """A table for every question; rows of different templates may have kept different samples."""
    blocks: list[tuple[Any, ...]] = []
    asked: dict[tuple[str, str], list[list[str]]] = {}
    for row in experiment.rows:
        for example in results.get(row.name, {}).get("examples", ()):
            answers = asked.setdefault((example["question"], example["reference"]), [])
            answers.append([row.name, example["answer"] or "(empty)"])
    for (question, reference), answers in asked.items():
        blocks += [("p", f"Question: {question}"), ("p", f"Reference: {reference}")]
        blocks.append(("table", ["model", "answer"], answers))
    return blocks


def _losses(rows: Sequence[Row], results: Results) -> list[str]:
    """Columns of the losses; KL where a row was measured against another."""
    measured = any(_divergence(results[row.name]) != "-" for row in rows if "statistics" in results.get(row.name, {}))
    return ["perplexity", "loss", *["KL"] * measured]


def _loss(result: Mapping[str, Any]) -> float:
    # results of earlier versions have the perplexity alone
    return float(result["statistics"].get("loss", math.log(result["statistics"]["perplexity"])))


def _divergence(result: Mapping[str, Any]) -> str:
    found = result["statistics"].get("kl")
    return "-" if found is None else f"{found:.3f}"


def _scores(result: Mapping[str, Any]) -> list[str]:
    scores = [result["scores"]["scores"][name] for name in TOTAL]
    return [*(f"{score:.2f}" for score in scores), f"{sum(scores):.2f}"]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"


def _public(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what is only of this machine or long."""
    run = {key: value for key, value in result["run"].items() if key != "speech"}
    run["speech"] = [
        {key: entry[key] for key in ("step", "perplexity", "repetition", "empty", "warnings")}
        for entry in result["run"]["speech"]
    ]
    return {**result, "run": run}


def _plot(rows: Sequence[Row], results: Results, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [row.name for row in rows]
    totals = [sum(results[name]["scores"]["scores"][score] for score in TOTAL) for name in names]
    weights = [results[name]["statistics"]["weights"] / 1e6 for name in names]
    figure = Figure(figsize=(10, 1.5 + 0.28 * len(names)), layout="constrained")
    bars, points = figure.subplots(1, 2)
    left = [0.0] * len(names)
    for score in TOTAL:
        values = [results[name]["scores"]["scores"][score] for name in names]
        bars.barh(names, values, left=left, label=score)
        left = [a + b for a, b in zip(left, values, strict=True)]
    bars.invert_yaxis()
    bars.set_xlabel("Total = F1 + METEOR + ROUGE-L + SacreBLEU")
    bars.legend(fontsize="small")
    points.scatter(weights, totals)
    points.margins(x=_NAME[0])
    if max(weights) > _WIDE * min(weights):
        points.set_xscale("log")
    for name, x, y, height in zip(names, weights, totals, _apart(weights, totals), strict=True):
        points.annotate(
            name, (x, y), xytext=(6, height), textcoords=("offset points", "data"), fontsize="x-small", va="center"
        )
    points.set_xlabel("weights in memory when answering (MB)")
    points.set_ylabel("Total")
    points.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def _apart(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """A height for the name of each point, at its own or above, so that no two names lie on each other."""
    wide, high = (share * (max(values) - min(values)) for share, values in zip(_NAME, (xs, ys), strict=True))
    found: dict[int, float] = {}
    for i in sorted(range(len(ys)), key=ys.__getitem__):
        below = [height + high for j, height in found.items() if abs(xs[i] - xs[j]) <= wide]
        found[i] = max([ys[i], *below])
    return [found[i] for i in range(len(ys))]


def _plot_curves(rows: Sequence[Row], results: Results, path: Path) -> None:
    from examples.dialogue.curves import draw

    draw({row.name: results[row.name]["run"]["curve"] for row in rows if not row.of}, ("eval_loss",), path)


def _markdown(title: str, blocks: Sequence[tuple[Any, ...]]) -> str:
    parts = [f"# {title}"]
    for kind, *content in blocks:
        if kind == "table":
            header, lines = content
            cells = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
            parts.append("\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in cells))
        elif kind == "pre":
            parts.append("```\n" + content[0] + "\n```")
        elif kind == "img":
            parts.append(f"![{content[1]}]({content[0]})")
        else:
            parts.append(f"## {content[0]}" if kind == "h2" else _wrapped(content[0]))
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums;
        display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left }
td.text { text-align: left }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
img { max-width: 100% }
"""


def _html(title: str, blocks: Sequence[tuple[Any, ...]]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for kind, *content in blocks:
        if kind == "table":
            header, lines = content
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(_html_cell(cell) for cell in line) + "</tr>\n" for line in lines)
            parts.append(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>")
        elif kind == "img":
            parts.append(f'<img src="{html.escape(content[0])}" alt="{html.escape(content[1])}">')
        else:
            parts.append(f"<{kind}>{html.escape(content[0])}</{kind}>")
    return (
        f'<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _html_cell(text: str) -> str:
    kind = "" if re.fullmatch(r"[-+()%\d.,:/\s\w]{0,24}", text, re.ASCII) else ' class="text"'
    return f"<td{kind}>{html.escape(text)}</td>"
