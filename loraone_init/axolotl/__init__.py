"""A plugin for Axolotl, which names it in its YAML: `plugins: [loraone_init.axolotl.LoraOnePlugin]`.

May import `transformers` and what stands below it. Inside of this package `import axolotl` is Axolotl itself.
"""

from __future__ import annotations

from .plugin import LoraOneArgs, LoraOnePlugin

__all__ = ["LoraOneArgs", "LoraOnePlugin"]
