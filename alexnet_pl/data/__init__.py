"""Image data sets as tensors: the split, the sources, the loader and the data modules around them."""
