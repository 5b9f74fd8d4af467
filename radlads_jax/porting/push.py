"""Sends a student's directory to the Hugging Face hub."""

from pathlib import Path

from radlads_jax.porting.model_card import OWN_TAG, named, tags
from radlads_jax.porting.repository import Kind, Repository, send
from radlads_jax.porting.safetensors_read import find_files
from radlads_jax.porting.save import MODEL_CARD
from radlads_jax.system.storage import AnyPath, read_text

EXPORT = Kind(
    f"an earlier export, whose card has the tag {OWN_TAG} (--replace takes all of these files away; its history keeps "
    "them)",
    lambda found: OWN_TAG in (found.tags or ()),
)


def push(directory: Path, repository: Repository) -> str:
    """Makes the repository's files those of a student's directory; returns its URL.

    The card names the repository where it said PATH. Raises ValueError for a directory that is no student's, and where
    it fails.
    """
    require_student(directory)
    files: dict[str, Path | bytes] = {
        each.name: each for each in sorted(directory.iterdir()) if each.is_file() and not each.name.startswith(".")
    }
    files[MODEL_CARD] = named(read_text(directory / MODEL_CARD), repository.name).encode()
    send(repository, files, "Student exported by radlads_jax")
    return repository.url


def require_student(directory: AnyPath) -> None:
    """Raises ValueError where a student's weights, its card or the card's tag are not there."""
    find_files(directory)
    card = directory / MODEL_CARD
    if not card.is_file() or OWN_TAG not in tags(read_text(card)):
        raise ValueError(
            f"{directory} has no {MODEL_CARD} with the tag {OWN_TAG}; expected a student's directory, whose card says "
            "what it is. Give a run that is finished, or an export of one."
        )
