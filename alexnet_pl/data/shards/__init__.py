"""Shards: images of one size in tar files. Writer, reader, data module."""
