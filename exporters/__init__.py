"""Exporters: one file for each format that an adapter can be turned into."""
