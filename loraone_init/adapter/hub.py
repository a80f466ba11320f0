"""An adapter published on the Hugging Face hub: what can be told before the work is asked then, not after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..errors import LoraOneError, OutputError, describe, others_errors
from ..version import __version__
from .files import CARD
from .model_card import PLACE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SETTINGS = "https://huggingface.co/settings/tokens"
_ALWAYS_THERE = (".gitattributes",)


@dataclass(frozen=True)
class Repository:
    """A model repository that may be written to. name: with its owner; exists: whether it is there already."""

    api: HfApi
    name: str
    private: bool
    exists: bool


def check_repository(name: str, *, token: str | None, private: bool, overwrite: bool) -> Repository:
    """Ask the hub for the token's owner and the repository, before any work is done. Nothing is made there yet.

    Raises OutputError for a name that cannot be one, without a token that may write there, without a network, and where
    the repository has files already (unless `overwrite`), or is public though `private` was asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(token=token, library_name="loraone-init", library_version=__version__)
    with others_errors(lambda error: _refusal(error, name)):
        account = api.whoami()
        name = name if "/" in name else f"{account['name']}/{name}"
        _check_account(account, name)
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return Repository(api, name, private, exists=False)
    files = [file.rfilename for file in found.siblings or [] if file.rfilename not in _ALWAYS_THERE]
    if files and not overwrite:
        raise OutputError(f"{name} on the hub holds {files[0]} already; choose another name, or pass `overwrite=True`")
    if private and not found.private:
        raise OutputError(f"{name} on the hub is public already; choose another name, or leave `private` out")
    return Repository(api, name, private, exists=True)


def upload(repository: Repository, save: Callable[[Path], None]) -> str:
    """Make the repository, and commit to it in one step what `save` writes into a directory. Returns its address.

    Raises OutputError where the hub refuses, or the network ends.
    """
    from huggingface_hub import CommitOperationAdd

    api, name = repository.api, repository.name
    with TemporaryDirectory() as place, others_errors(lambda error: _refusal(error, name)):
        directory = Path(place)
        save(directory)
        card = directory / CARD
        if card.exists():
            card.write_text(card.read_text(encoding="utf-8").replace(PLACE, name), encoding="utf-8")
        if not repository.exists:
            api.create_repo(name, private=repository.private or None, exist_ok=True)
        files = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
        operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=directory / file) for file in files]
        api.create_commit(name, operations, commit_message=f"Adapter written by loraone-init {__version__}")
    return f"{api.endpoint}/{name}"


def _check_account(account: dict[str, object], name: str) -> None:
    """What the hub tells of a token: whose it is, and with older kinds of tokens whether it may write."""
    owner, _, _ = name.partition("/")
    organisations = account.get("orgs")
    names = (
        [item.get("name") for item in organisations if isinstance(item, dict)]
        if isinstance(organisations, list)
        else []
    )
    if owner not in (account.get("name"), *names):
        raise OutputError(
            f"the token is {account.get('name')}'s, who is not in {owner}; take a name of {account.get('name')}, or"
            " another `token`"
        )
    auth = account.get("auth")
    access = auth.get("accessToken") if isinstance(auth, dict) else None
    if isinstance(access, dict) and access.get("role") == "read":
        raise OutputError(f"the token may only read; make one that may write to {name} at {_SETTINGS}")


def _refusal(error: Exception, name: str) -> LoraOneError:
    """What the library raised, as one line with the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HFValidationError):
        return OutputError(f"{name!r} is no name of a repository, expected ORG/NAME: {describe(error)[:200]}")
    if isinstance(error, LocalTokenNotFoundError):
        return OutputError(f"the hub wants a token to write {name}; pass `token`, set HF_TOKEN, or run hf auth login")
    if isinstance(error, OfflineModeIsEnabled):
        return OutputError(f"{name} cannot be written to the hub: HF_HUB_OFFLINE is set; unset it")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else _status_of_cause(error)
    if status == 401:
        return OutputError(f"the hub does not know the token; make one that may write to {name} at {_SETTINGS}")
    if status == 403:
        return OutputError(f"the hub does not let this token write to {name}; give it that permission at {_SETTINGS}")
    if status == 404:
        return OutputError(f"the hub has no repository {name}, or this token may not see it; check name and token")
    if status is not None:
        return OutputError(f"the hub refused {name}: {describe(error)[:250]}")
    if isinstance(error, OSError) and error.filename is not None:  # of this machine
        return OutputError(f"{error.filename} cannot be used: {error.strerror}")
    return OutputError(
        f"{constants.ENDPOINT} cannot be reached: {describe(error)[:200]}; try again when there is a network"
    )


def _status_of_cause(error: BaseException) -> int | None:
    """An upload's error comes wrapped."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code
        cause = cause.__cause__
    return None
