"""A folder of a LoRA to the hub, with huggingface_hub's own client, login and environment variables.

A repository is private unless its maker says otherwise. Files that the hub has already are not sent again, so an upload
that broke continues when it is run again. A repository with files of something else is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import OptionError
from lorasmith.core.extras import model_packages
from lorasmith.core.printable import first_line
from lorasmith.runs.hub_download import HubError, hub_constants, hub_token


@dataclass(frozen=True)
class Uploaded:
    """A folder on the hub."""

    repository: str  # `owner/name`
    address: str
    is_private: bool


@model_packages("an upload to the hub")
def named_repository(name: str) -> str:
    """`owner/name` for a name, whose owner is the account that is logged in if it has none.

    Raises OptionError for an invalid name, and HubError without a login or a network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # hidden by its lazy import

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError(
            f"a repository must be owner/name of letters, digits, -, _ and ., got {name!r}; choose another name"
        ) from error
    if not hub_token():
        raise HubError(f"an upload needs a login at {hub_constants().ENDPOINT}, and there is none; run: hf auth login")
    with _explained(name):
        owner = HfApi(endpoint=hub_constants().ENDPOINT, token=hub_token()).whoami()["name"]
    return name if "/" in name else f"{owner}/{name}"


@typed_arguments
@model_packages("an upload to the hub")
def upload_card(folder: Path | str, repository: str, *, public: bool = False) -> Uploaded:
    """Upload a folder that `write_card` wrote, with the login of huggingface_hub. Files that are there already are not
    sent again, so a call continues an upload that broke.

    Args:
        repository: of models, `owner/name`; made if it does not exist.
        public: let everybody see it.

    Raises HubError, also for a repository with files of something else and for a public one without `public`.
    """
    folder = Path(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # hidden by its lazy import

    disable_progress_bars()
    endpoint = hub_constants().ENDPOINT
    api = HfApi(endpoint=endpoint, token=hub_token())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    with _explained(repository):
        try:
            there = api.model_info(repository)
        except RepositoryNotFoundError:
            there = None
            api.create_repo(repository, private=not public, exist_ok=True)
        if there is not None:
            others = sorted({sibling.rfilename for sibling in there.siblings or ()} - files - {".gitattributes"})
            if others:
                raise HubError(
                    f"{repository} exists with other files, such as {others[0]}; choose another name, or remove them"
                )
            if not there.private and not public:
                raise HubError(f"{repository} exists and is public; add --public, or choose another name")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a LoRA with its card")
    is_private = not public if there is None else bool(there.private)
    return Uploaded(repository, f"{endpoint}/{repository}", is_private)


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the hub and of the connection become sentences."""
    endpoint = hub_constants().ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    again = "; run the command again to continue"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so nothing is uploaded; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise HubError(f"{endpoint} does not know your token; run: hf auth login") from error
        if status == 403:
            raise HubError(
                f"your token may not write to {repository}; make one that may at {endpoint}/settings/tokens, and run: "
                "hf auth login"
            ) from error
        raise HubError(f"the hub answers with an error ({status}){again}") from error
    except (HTTPError, OSError) as error:
        raise HubError(f"no internet just now, or the connection to {endpoint} broke{again}") from error
    except (RuntimeError, ValueError) as error:  # of its client: an upload that broke, a card that the hub refuses
        raise HubError(f"the upload to {repository} failed ({first_line(error)}){again}") from error
