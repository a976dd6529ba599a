"""Inference with trained runs: loading, evaluation, prediction, export, model card, web page."""
