"""The four commands, `loraone-init`, `loraone-train`, `loraone-export` and `loraone-inspect`: options, progress bars,
what is printed.

May import everything below, and is the only package that imports `loraone_init.exporters`. Nothing is imported here,
so that `--help` answers at once.
"""
