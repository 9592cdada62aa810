"""Two small data sets for lm-evaluation-harness out of the bundled held-out reviews.

cloze.jsonl has the first half of a review and four second halves, one of them its own; perplexity.jsonl has pieces of
the text of about 2,000 characters.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

ROOT = Path(__file__).parents[2]


def halves(review: str) -> tuple[str, str] | None:
    """A review cut at the space nearest to its middle; None if it has fewer than eight words."""
    words = review.split()
    if len(words) < 8:
        return None
    cuts = range(1, len(words))
    cut = min(cuts, key=lambda n: abs(2 * len(" ".join(words[:n])) - len(review)))
    return " ".join(words[:cut]), " ".join(words[cut:])


def cloze(reviews: list[str], rows: int, seed: int) -> list[dict[str, object]]:
    """Questions with four choices; the wrong ones are second halves of about the same length."""
    generator = random.Random(seed)
    pairs = [pair for pair in map(halves, reviews) if pair]
    questions = []
    for start, end in generator.sample(pairs, rows):
        others = sorted(
            {other for _, other in pairs if other != end}, key=lambda other: (abs(len(other) - len(end)), other)
        )
        choices = [end, *generator.sample(others[:20], 3)]
        generator.shuffle(choices)
        questions.append({"start": start, "choices": choices, "answer": choices.index(end)})
    return questions


def pieces(reviews: list[str], characters: int = 2000) -> list[dict[str, object]]:
    """The text, a line a review, in pieces."""
    found: list[list[str]] = [[]]
    for review in reviews:
        if sum(map(len, found[-1])) >= characters:
            found.append([])
        found[-1].append(review)
    return [{"text": "\n".join(piece)} for piece in found]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "tiny_polyglot" / "heldout.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "lm_eval")
    parser.add_argument("--rows", type=int, default=200, help="questions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reviews = [line for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, entries in {
        "cloze": cloze(reviews, options.rows, options.seed),
        "perplexity": pieces(reviews),
    }.items():
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (options.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{options.out / name}.jsonl: {len(entries)} rows")


if __name__ == "__main__":
    main()
