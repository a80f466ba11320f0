"""What benchmarks/startup.py measures with: imports by package, and what a command shows, as it shows it."""
