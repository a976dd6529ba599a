"""Trained runs: loading, evaluation, prediction, export, model card, web app."""
