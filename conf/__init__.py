"""Options of ``alexnet train``, one directory per config group. Installed packages hold them as ``alexnet_pl.conf``."""
