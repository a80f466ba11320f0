"""`--push-to-hub`: asked before the work, done after it, of `loraone-init` and `loraone-train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OutputError
from .run_record import record_file, without_paths, write_record

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..adapter.hub import Repository
    from ..adapter.plain import PlainAdapter
    from .init_options import InitOptions
    from .train_options import TrainCommand


def check_private(options: InitOptions | TrainCommand) -> None:
    """Raise UsageError for --private without anything to publish."""
    if options.private and options.push_to_hub is None:
        raise click.UsageError("--private is for --push-to-hub.")


def check_push(options: InitOptions | TrainCommand) -> Repository | None:
    """The repository to write to; None where nothing is to be published. Raises OutputError."""
    if options.push_to_hub is None:
        return None
    from ..adapter.hub import check_repository

    return check_repository(
        options.push_to_hub, token=options.token, private=options.private, overwrite=options.overwrite
    )


def push(repository: Repository, adapter: Adapter | PlainAdapter, recorded: Mapping[str, Any], output: Path) -> str:
    """Publish an adapter that is written to `output` as a PEFT directory, whatever its form there; the address.

    recorded: the run's options, of which those that are paths of this machine are not published.
    """
    from ..adapter.hub import upload

    def save(directory: Path) -> None:
        adapter.save(directory, overwrite=True)
        write_record(record_file(directory, is_file=False), without_paths(recorded))

    try:
        return upload(repository, save)
    except OutputError as error:
        raise OutputError(f"{error}. {output} is written and whole") from error
