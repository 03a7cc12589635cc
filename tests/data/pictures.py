"""Makes small folders of images for the tests of momconv.data."""

import hashlib
from pathlib import Path

from PIL import Image


def save_picture(path: Path, number: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    """An image whose pixels differ from those of every other ``number``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = Image.radial_gradient("L").resize(size)
    bands = (gradient, gradient.rotate(90), Image.new("L", size, number * 37 % 256))
    Image.merge("RGB", bands).save(path)
    return path


def save_classes(root: Path, **counts: int) -> Path:
    """A folder of class folders, with that many images each."""
    for name, count in counts.items():
        for number in range(count):
            save_picture(root / name / f"{number}.png", number)
    return root


def fingerprint(root: Path) -> dict[str, str]:
    """Every entry below ``root`` with a hash of its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in root.rglob("*")
    }
