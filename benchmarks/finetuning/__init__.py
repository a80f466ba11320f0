"""What benchmarks/finetune.py compares: problems, methods, runs, and the report of them."""
