"""The Hugging Face Hub, as far as a conversion has to do with it."""

from __future__ import annotations

from dataclasses import dataclass

from svdconvert.settings.row import HUB, option


@dataclass(frozen=True)
class Hub:
    """What is read from it, and where the result goes.

    Attributes:
        revision: branch, tag or commit of the model that is read.
        push_to: repository to upload the result to.
        private: whether that is private if it has to be created.
        push_revision: branch to upload to.
    """

    revision: str | None = option(
        None,
        "--revision",
        "Branch, tag or commit of a Hub repository that is read.",
        keyword="revision",
        group="Hub",
        metavar="R",
    )
    push_to: str | None = option(
        None,
        "--push-to-hub",
        "Upload the result to this repository.",
        keyword="push_to_hub",
        group="Hub",
        metavar="REPO",
        omitted_because=HUB,
    )
    private: bool = option(
        False,
        "--private",
        "Create the repository as a private one.",
        keyword="private",
        group="Hub",
        kind="flag",
        omitted_because=HUB,
    )
    push_revision: str | None = option(
        None,
        "--hub-revision",
        "Branch to upload to.",
        keyword="hub_revision",
        group="Hub",
        metavar="B",
        omitted_because=HUB,
    )
