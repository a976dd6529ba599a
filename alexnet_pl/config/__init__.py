"""Hydra config: validation, resolution of ``auto`` values, allow-list for foreign configs, resolvers."""
