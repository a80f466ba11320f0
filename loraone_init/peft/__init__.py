"""The LoRA-One start written into a PEFT model that is in memory, instead of into a file.

May import `initialization` and what stands below it. Inside of this package `import peft` is PEFT itself.
"""

from __future__ import annotations

from ..extras import require

require("train", "peft", by="loraone_init.peft")

from .initialize import initialize_peft  # noqa: E402  (it imports peft)
from .report import InitReport  # noqa: E402

__all__ = ["InitReport", "initialize_peft"]
