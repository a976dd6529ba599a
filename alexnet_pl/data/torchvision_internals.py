"""Private attributes of torchvision's datasets that this project uses."""

from torchvision.datasets import Imagenette


def imagenette_archive(size: str) -> tuple[str, str]:
    """Return the URL and the MD5 of Imagenette's archive in one of its sizes: ``full``, ``320px`` or ``160px``."""
    url, md5 = Imagenette._ARCHIVES[size]
    return str(url), str(md5)
