"""The LoRA-One start written into a PEFT model that is in memory, instead of into a file.

May import `initialization` and what stands below it. Inside of this package `import peft` is PEFT itself.
"""

from __future__ import annotations

from .initialize import initialize_peft
from .report import InitReport

__all__ = ["InitReport", "initialize_peft"]
