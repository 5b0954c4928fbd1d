"""An export to the Hugging Face hub, through its own client: one commit of the folder's files.

The client reads its token (`hf auth login`, or `HF_TOKEN`) and its endpoint (`HF_ENDPOINT`) itself.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cosup_fast.export.sentence_transformers import EXPORT
from cosup_fast.files import read_object


def check_push(repo: str) -> None:
    """Refuses what cannot be pushed, before an export is written.

    Raises:
        ValueError: `repo` is not `owner/name`, or there is no token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--push {repo}: {error}") from None
    if repo.count("/") != 1:
        raise ValueError(f"--push {repo}: expected owner/name")
    if get_token() is None:
        raise ValueError(
            f"--push {repo} needs a token of the hub with write access: run hf auth login, or set HF_TOKEN"
        )


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Uploads an export as one commit, into a repository that is made if there is none; returns its address.

    Args:
        folder: what `export` wrote. Only files that it lists are uploaded.
        repo: owner/name.
        private: of a repository that is made; one that exists stays as it is.

    Raises:
        ValueError: the folder is not an export, or `check_push` or the hub refuses it.
    """
    folder = Path(folder)
    check_push(repo)
    if why := EXPORT.foreign(folder):
        raise ValueError(f"{folder} is not an export, {why}: cosup-fast export writes one")
    note = read_object(folder / EXPORT.marker, ["files", "kind"])
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[*note["files"], EXPORT.marker],
            commit_message=f"cosup-fast export: {note['kind']}",
        )
    except Exception as error:  # the hub, its client and the network each raise kinds of their own
        told = " ".join(str(error).split())
        raise ValueError(f"{folder} is written, but could not be pushed to {repo}: {told}") from error
    return str(made)
