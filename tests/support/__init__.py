"""Helpers of the tests: models, batches, references, commands. Fixtures are in conftest.py."""
