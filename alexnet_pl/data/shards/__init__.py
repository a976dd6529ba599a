"""Tar shards of images: writer, reader, data module."""
