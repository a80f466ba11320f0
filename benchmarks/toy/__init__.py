"""Toy problems on which the theory of LoRA-One can be checked; see ../theory.py."""
