"""What `loraone-init` does once its options have been read. Heavy imports wait until all that needs none is checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .init_options import InitOptions
from .publishing import check_push, push
from .run_config import config_in_use
from .support import start_logging

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..adapter.hub import Repository
    from ..data.labels import LabelSource
    from ..data.rows import Rows
    from ..data.sample import Sample
    from ..machine import Peaks
    from ..models.opening import OpenModel
    from ..monitor import Monitor
    from ..processes.processes import Processes

logger = logging.getLogger(__name__)


def run(processes: Processes, options: InitOptions) -> None:
    """The whole command, in this process of those that share the work."""
    from ..libraries import import_transformers
    from ..machine import own_peaks, use_one_heap

    config, growth, max_bytes, is_main = options.config(), options.growth(), options.max_bytes(), processes.index == 0
    repository, data = _check(options, is_main)
    use_one_heap()
    from .bars import Bars

    with Bars(shown=is_main and not (options.quiet or options.as_json)) as monitor:
        with monitor.timed("import"):
            import_transformers(options.verbose, options.quiet)
            from ..initialization.initialize import initialize
            from .dry_run import plan, print_plan

        opened, sample = _prepare(processes, options, data, monitor)
        del data  # all rows of a file
        if options.dry_run:
            if is_main:
                planned = plan(opened, sample, config, growth, options.schedule, max_bytes)
                monitor.stop()
                print_plan(planned, options.as_json)
            return
        monitor.expect(sample, config.gamma, growth)
        adapter = initialize(
            opened,
            sample,
            config,
            max_memory=max_bytes,
            schedule=options.schedule,
            monitor=monitor,
            processes=processes,
            growth=growth,
        )
        peaks = processes.gather(own_peaks())
        processes.finish()
    if is_main:
        _finish(options, opened, adapter, monitor, peaks, repository)


def _check(options: InitOptions, is_main: bool) -> tuple[Repository | None, Rows | str]:
    """The repository to publish in, and the rows of a local file, else the id of a hub data set.

    Raises LoraOneError for all that can be known before torch is imported.
    """
    from ..adapter.files import check_output, is_single_file
    from ..adapter.inputs import check_apart
    from ..data.rows import read_if_local, require_packages
    from ..models.sources import check_model
    from .run_record import check_record, record_file

    wanted, output = options.rows(), options.output
    if output is not None and is_main:
        check_apart(output, (options.model, options.data, config_in_use()))
        check_output(output, options.overwrite)
        check_record(record_file(output, is_file=is_single_file(output)), options.overwrite)
    start_logging(options.quiet, options.verbose, silent=not is_main)
    repository = check_push(options) if is_main else None
    require_packages(options.data)
    check_model(options.model, options.revision)
    return repository, read_if_local(options.data, wanted.split)


def _finish(
    options: InitOptions,
    opened: OpenModel,
    adapter: Adapter,
    monitor: Monitor,
    peaks: Sequence[Peaks],
    repository: Repository | None,
) -> None:
    """Write the adapter and the record of its run, publish them, and say so."""
    from ..adapter.files import is_single_file
    from ..layers.targets import left_out_layers
    from .run_record import record_file, recorded_options, without_machine, write_record
    from .summary import print_summary, print_warning, summarize

    output = options.output
    assert output is not None
    with monitor.timed("save"):
        recorded = recorded_options(options, options.base_name)
        adapter = replace(adapter, run=without_machine(recorded))
        adapter.save(output, overwrite=options.overwrite)
        write_record(record_file(output, is_file=is_single_file(output)), recorded)
    _tell_paths(adapter, output, is_published=repository is not None)
    published = None if repository is None else push(repository, adapter, recorded, output)
    left_out = 0 if adapter.config.vision_layers else left_out_layers(opened.module)
    summary = summarize(adapter, output, monitor, peaks, opened.opened_from, left_out)
    summary["published"] = published
    if not options.quiet or options.as_json:
        print_summary(summary, options.as_json)
    print_warning(summary)


def _prepare(
    processes: Processes, options: InitOptions, data: Rows | str, monitor: Monitor
) -> tuple[OpenModel, Sample]:
    """The model opened, and the rows drawn. data: rows of a file, or the id of a hub data set."""
    from ..data.classification_rows import read_labels
    from ..data.sample import load_sample
    from ..errors import ModelError

    wanted = options.rows()
    with monitor.timed("open"):
        labels = partial(read_labels, data, wanted, token=options.token)
        opened = _open(processes, options, options.max_bytes(), labels)
    if opened.tokenizer is None:
        raise ModelError(
            f"{options.model} has no tokenizer that can be read (--verbose says why); put its files beside config.json"
        )
    with monitor.timed("data"), processes.first():
        wanted = wanted.for_device(opened.device.type)
        return opened, load_sample(data, opened.tokenizer, wanted, token=options.token, labels=opened.labels)


def _open(processes: Processes, options: InitOptions, max_bytes: int | None, labels: LabelSource) -> OpenModel:
    """The model on this process's device. What has to be fetched or converted is so by one process of each node."""
    from ..models.opening import open_model
    from ..models.sources import resolve_model

    if processes.size > 1:
        with processes.first():
            resolve_model(
                options.model,
                revision=options.revision,
                token=options.token,
                trust_remote_code=options.trust_remote_code,
            )
    return open_model(
        options.model,
        revision=options.revision,
        token=options.token,
        trust_remote_code=options.trust_remote_code,
        device=processes.device,
        dtype=options.dtype,
        block_path=options.block_path,
        placement=options.placement,
        max_memory=max_bytes,
        weights=not options.dry_run,
        task=options.task,
        labels=labels,
        seed=options.seed,
        base_name=options.base_name,
    )


def _tell_paths(adapter: Adapter, output: Path, is_published: bool) -> None:
    """Say which paths of this machine the adapter holds: whoever publishes it publishes them.

    A PEFT directory is what people publish, so that it gets a warning; so does what is published at once.
    """
    from ..adapter.files import is_single_file

    base, data = adapter.base.get("name"), adapter.sample.get("source")
    level = logging.INFO if is_single_file(output) and not is_published else logging.WARNING
    if base is not None and os.path.isabs(base):
        logger.log(level, "The adapter names its base by a path on this machine, %s; --base-name gives another", base)
    if data is not None and os.path.isabs(data):
        logger.log(
            level, "The adapter names its data by a path on this machine, %s; a relative one is recorded as given", data
        )
