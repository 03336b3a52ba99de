"""Publishing on the Hub, privately unless told otherwise, in one commit: all of it or nothing."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .accounts import RUN_FILE, read_account, without_folders
from .cards import BEGIN, DATA_FILE, PICTURE_FILE, histogram, license_of, scored_card
from .errors import EvaluationError, InputError, first_line
from .select import default_score, score_columns, score_values

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
RepoType = Literal["dataset", "model"]


def push_scored_to_hub(
    ds: Dataset,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    run: Mapping[str, Any] | str | Path | None = None,
    license: str | None = None,
    source: str | None = None,
    by: str | None = None,
) -> str:
    """Publish a scored dataset with its card; returns the page's address.

    Args:
        ds: a scored dataset.
        repo_id: a dataset repository, `user/name` or `name`; made if it is not there.
        private: whether only its owners may see it. A repository that is public is not written to unless this is `False`.
        token: by default that of `hf auth login` or the environment variable `HF_TOKEN`. Never logged.
        run: the account that `hf-safefilter score` wrote (`run.json`), or its path.
        license: of the rows, as the Hub names licenses; by default what the dataset says, or the card that is there already, or
            the source's card; left out where none of them tells.
        source: Hub id of the dataset that the rows come from; by default what `run` says, where that was on the Hub.
        by: the score that the card's snippet filters by.

    Raises:
        InputError: not a scored dataset; a name that is none, or taken by something else; no token, or one that may not write;
            a public repository without `private=False`.
        EvaluationError: the Hub cannot be reached, or the connection was lost. Nothing is published then; what was
            uploaded is not sent again.
    """
    from datasets import Dataset

    if not isinstance(ds, Dataset):
        raise InputError(f"publishing needs a datasets.Dataset with scores, got {type(ds).__name__}")
    by = by or default_score(score_columns(ds))
    values = score_values(ds, [by])
    if not len(ds) or np.isnan(values).all():
        raise InputError("no row has a score" if len(ds) else "the dataset has no rows")
    check_repo_id(repo_id)
    if source is not None:
        check_repo_id(source)
    account = without_folders(read_account(run))
    if source is None and account and account.get("data_on_hub"):
        source = str(account.get("data"))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.parquet"
        ds.to_parquet(str(data))
        picture = histogram(values, by)
        files: dict[str, str | bytes] = {DATA_FILE: str(data)}
        files |= {RUN_FILE: (json.dumps(account, indent=1, ensure_ascii=False) + "\n").encode()} if account else {}
        files |= {PICTURE_FILE: picture} if picture else {}

        def make_card(repo_id: str, old: str | None) -> str:
            terms = license or ds.info.license or license_of(old) or _license_at(source, token)
            return scored_card(ds, by, repo_id, account, terms, source, old, picture=picture is not None)

        return push_files(files, make_card, repo_id, "dataset", private=private, token=token)


def _license_at(source: str | None, token: str | None) -> str | list[str] | None:
    """The license that the source's card names; `None`, with a warning, where it cannot be read."""
    from huggingface_hub import hf_hub_download

    if source is None:
        return None
    try:
        card = Path(hf_hub_download(source, CARD_FILE, repo_type="dataset", token=token)).read_text("utf-8")
    except Exception as error:  # no card, no access, no connection: the card says that the license is not known
        logger.warning("the license of %s is not known: %s", source, first_line(error))
        return None
    return license_of(card)


def push_files(
    files: Mapping[str, str | bytes],
    make_card: Callable[[str, str | None], str],
    repo_id: str,
    repo_type: RepoType,
    *,
    private: bool,
    token: str | None,
) -> str:
    """Push files, by their names there (contents, or paths here), and a card, in one commit; returns the page's address.

    Args:
        files: what to push.
        make_card: makes the card from the repository's full name and the card that is there, if any.
        repo_id, repo_type: where to; made if it is not there.
        private, token: see `push_scored_to_hub`, also for what is raised.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_repo_id(repo_id)
    token = token or get_token()
    if not token:
        raise InputError("no token for the Hub: run  hf auth login  or set HF_TOKEN")
    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id, parent, old = _repository(api, repo_id, repo_type, private)
        contents = {**files, CARD_FILE: make_card(repo_id, old).encode("utf-8", "replace")}
        operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
        api.create_commit(
            repo_id, operations, repo_type=repo_type, commit_message="Pushed by hf_safefilter", parent_commit=parent
        )
    return f"{api.endpoint}/{'datasets/' * (repo_type == 'dataset')}{repo_id}"


def check_repo_id(repo_id: Any) -> str:
    """Raise `InputError` unless this can be a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name for a Hub repository: {first_line(error)}") from None
    return str(repo_id)


def _repository(api: Any, repo_id: str, repo_type: RepoType, private: bool) -> tuple[str, str | None, str | None]:
    """The repository's full name, the commit to build on, and its card; made where it is not there."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        made = api.create_repo(repo_id, repo_type=repo_type, private=private)
        return made.repo_id, None, None
    if private and not info.private:
        raise InputError(f"{info.id} is public: publish there with private=False (--public), or choose another name")
    try:
        card = Path(api.hf_hub_download(info.id, CARD_FILE, repo_type=repo_type, revision=info.sha)).read_text("utf-8")
    except EntryNotFoundError:
        card = None
    others = {f.rfilename for f in info.siblings or []} - {".gitattributes", CARD_FILE}
    if others and (card is None or BEGIN not in card):
        raise InputError(f"{info.id} holds something else ({sorted(others)[0]}): choose another name")
    return info.id, info.sha, card


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """The Hub's errors in one line that says what to do; tokens are in none of them."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        import httpx2 as httpx  # what newer clients are built on
    except ImportError:
        import httpx  # type: ignore[no-redef]

    said = {
        401: "the Hub does not accept the token: run  hf auth login",
        403: f"this token may not write to {repo_id}: use one with write access, or another name",
        404: f"there is no {repo_id}, and it could not be made: check the user or organization",
        409: f"{repo_id} is taken: choose another name",
        412: f"{repo_id} was changed by someone else meanwhile: publish again",
    }
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        kind = EvaluationError if status is None or status >= 500 else InputError
        raise kind(f"nothing was published: {said.get(status or 0) or first_line(error)}") from None
    except OfflineModeIsEnabled:
        raise InputError("nothing was published: HF_HUB_OFFLINE is set") from None
    except (httpx.HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        # The client wraps what broke an upload in a RuntimeError.
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, httpx.HTTPError | OSError):
            raise
        why = first_line(error.__cause__ or error) or type(error).__name__
        raise EvaluationError(f"nothing was published: no connection to the Hub ({why}); try again") from None
