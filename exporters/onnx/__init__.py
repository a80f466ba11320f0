"""ONNX: the merged model, or the base with adapters beside it, as graphs for ONNX Runtime.

May import the other exporters, and all of loraone_init but its commands.
"""
