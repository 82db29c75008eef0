"""The official CIFAR archives, fetched through torchvision when a user asks for it."""

from pathlib import Path

from engine.errors import Failed


def download_cifar(kind: str, folder: Path) -> Path:
    """The archive of ``cifar10`` or ``cifar100`` in ``folder``; one that is there with the right checksum is kept."""
    from torchvision.datasets import CIFAR10, CIFAR100  # takes seconds to import
    from torchvision.datasets.utils import download_url

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    try:
        download_url(dataset.url, folder, dataset.filename, dataset.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise Failed(f"cannot download {dataset.url} ({error}); get it another way and give it with --source") from None
    return folder / dataset.filename
