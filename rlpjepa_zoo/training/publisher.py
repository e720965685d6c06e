"""Publishes the artifact of a run while it goes on: into the run directory and, if the recipe asks for it, on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.training_sections import Hub
from ..core.source import ModelSource
from ..errors import ModelError
from ..hub import card
from ..hub.folder import read_folder, write_folder
from ..hub.push import Background, Pushed, push

__all__ = ["Publisher"]

log = logging.getLogger("rlpjepa_zoo")

_LAST_PUSH = 120.0
"""Seconds that the end of a run waits for the last push."""


class Publisher:
    """Writes the artifact into its sub-folder of the run directory and pushes it in the background. Only the main process uses it.

    Args:
        out: run directory.
        name: artifact name and its sub-folder.
        options: the section `hub` of the recipe.
        recipe: recipe text that is published beside the weights.
    """

    def __init__(self, out: Path, name: str, options: Hub, recipe: str) -> None:
        self.out, self.name, self.options, self.recipe = out, name, options, recipe
        self.path = out / name
        self.title = options.repo or ModelSource.folder(self.path).text
        self.pusher = Background(self._push) if options.repo is not None else None

    def write(self, model: Any, info: dict[str, Any], step: int, total: int, again: bool = False) -> None:
        """Publish a model (it has `fingerprint` and `contents`).

        Args:
            model, info: the artifact and its record.
            step, total: number of this step and of all steps.
            again: keep a folder that already holds these weights, with later card results.
        """
        contents = self._published(model, step) if again else None
        if contents is None:
            contents = model.contents(self.recipe, info, self.title, self.path)
            write_folder(self.path, contents)
        if self.pusher is not None:
            self.pusher.submit(contents, f"Step {step} of {total}")

    def copy_as(self, name: str, note: str) -> None:
        """Copy the published folder within the run directory; `note` tells on its card how it was selected."""
        write_folder(self.out / name, card.rewritten(self.path, ModelSource.folder(self.out / name).text, chosen=note))

    def finish(self) -> None:
        """Wait for the last push; if it does not finish in time, log the command that sends it."""
        if self.pusher is None or self.pusher.finish(_LAST_PUSH):
            return
        options = self.options
        visibility = "" if options.private is None else " --private" if options.private else " --public"
        branch = f" --revision {options.revision}" if options.revision else ""
        log.warning(
            "the last %s is not on the Hub; send it with: rlpjepa push %s %s%s%s", self.name, self.out, options.repo, visibility, branch
        )

    def _published(self, model: Any, step: int) -> dict[str, bytes] | None:
        """The published files, if they are complete and hold these weights at this step."""
        try:
            contents = card.rewritten(self.path, self.title)
            published = read_folder(self.path)
            same = published.fingerprint == model.fingerprint() and published.info["training"]["steps"] == step
        except (ModelError, KeyError, TypeError):  # the run was stopped between its last checkpoint and its last publication
            return None
        return contents if same else None

    def _push(self, contents: Mapping[str, bytes], message: str) -> Pushed:
        options = self.options
        return push(contents, str(options.repo), private=options.private, new_private=True, revision=options.revision, message=message)
