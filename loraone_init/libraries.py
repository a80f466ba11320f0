"""torch and transformers imported in one go, at the time a command chooses.

A command first checks what needs neither of them, and shows that it has begun. The imports are nearly all of the time
between its start and its first useful work: docs/profile.md has them one by one.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def import_torch() -> None:
    """What reading an adapter needs."""
    with _kept_for_good("torch"):
        import torch  # noqa: F401


def import_transformers(verbose: bool, quiet: bool = False) -> None:
    """What opening a model and its tokenizer needs, but for the model's own module.

    verbose: the library's messages are shown. quiet: bars of downloads are not, unless `verbose`.
    """
    with _kept_for_good("transformers.modeling_utils"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401
    if verbose:
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def import_trainer(verbose: bool, quiet: bool = False) -> None:
    """What a training needs, which is more than `import_transformers`. The options are the same."""
    import_transformers(verbose, quiet)
    with _kept_for_good("transformers.trainer"):
        from transformers import Trainer, TrainingArguments  # noqa: F401


@contextmanager
def _kept_for_good(module: str) -> Iterator[None]:
    """Inside, modules are imported that stay until the process ends; nothing changes where `module` is there already.

    Python's garbage collector would look through their hundreds of thousands of objects again and again while they are
    made, and at the end of the process once more: a third of the CPU time of a process that does nothing but import
    them. So it waits, and then leaves them out for good. A library must not decide this for its process: for commands.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()
