"""Publishing scored datasets on the Hub, privately unless told otherwise, in one commit: all of it or nothing.

The card's part between two marks is ours and is written anew each time; what a person wrote around it, and the metadata that a
person added, stay.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .accounts import RUN_FILE, model_text, read_account, without_folders
from .errors import EvaluationError, InputError, first_line
from .select import default_score, score_columns, score_values

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

DATA_FILE, CARD_FILE, PICTURE_FILE = "data/train-00000-of-00001.parquet", "README.md", "scores.png"
BEGIN, END = "<!-- hf_safefilter: begin, written anew at each push -->", "<!-- hf_safefilter: end -->"
TAGS = ("hf_safefilter", "safety")


def push_scored_to_hub(
    ds: Dataset,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    run: Mapping[str, Any] | str | Path | None = None,
    license: str | None = None,
    by: str | None = None,
) -> str:
    """Publish a scored dataset with its card; returns the page's address.

    Args:
        ds: a scored dataset.
        repo_id: a dataset repository, `user/name` or `name`; made if it is not there.
        private: whether only its owners may see it. A repository that is public is not written to unless this is `False`.
        token: by default that of `hf auth login` or the environment variable `HF_TOKEN`. Never logged.
        run: the account that `hf-safefilter score` wrote (`run.json`), or its path.
        license: of the rows, as the Hub names licenses; by default what the dataset says, or else left out.
        by: the score that the card's snippet filters by.

    Raises:
        InputError: not a scored dataset; a name that is none, or taken by something else; no token, or one that may not write;
            a public repository without `private=False`.
        EvaluationError: the Hub cannot be reached, or the connection was lost. Nothing is published then; what was
            uploaded is not sent again.
    """
    from datasets import Dataset
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not isinstance(ds, Dataset):
        raise InputError(f"publishing needs a datasets.Dataset with scores, got {type(ds).__name__}")
    by = by or default_score(score_columns(ds))
    values = score_values(ds, [by])
    if not len(ds) or np.isnan(values).all():
        raise InputError("no row has a score" if len(ds) else "the dataset has no rows")
    check_repo_id(repo_id)
    token = token or get_token()
    if not token:
        raise InputError("no token for the Hub: run  hf auth login  or set HF_TOKEN")
    account = without_folders(read_account(run))
    api = HfApi(token=token)
    with _explained(repo_id), tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.parquet"
        ds.to_parquet(str(data))
        repo_id, parent, old_card = _repository(api, repo_id, private)
        picture = _picture(values, by)
        card = make_card(ds, by, repo_id, account, license, old_card, picture=picture is not None)
        files: dict[str, str | bytes] = {DATA_FILE: str(data), CARD_FILE: card.encode("utf-8", "replace")}
        files |= {RUN_FILE: (json.dumps(account, indent=1, ensure_ascii=False) + "\n").encode()} if account else {}
        files |= {PICTURE_FILE: picture} if picture else {}
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(
            repo_id, operations, repo_type="dataset", commit_message="Scored with hf_safefilter", parent_commit=parent
        )
        return f"{api.endpoint}/datasets/{repo_id}"


def check_repo_id(repo_id: Any) -> str:
    """Raise `InputError` unless this can be a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name for a Hub repository: {first_line(error)}") from None
    return str(repo_id)


def make_card(
    ds: Dataset,
    by: str,
    repo_id: str,
    account: Mapping[str, Any] | None,
    license: str | None,
    old: str | None,
    *,
    picture: bool,
) -> str:
    """The dataset card; `old` is the one that is there, whose other parts are kept."""
    from huggingface_hub import DatasetCard, DatasetCardData
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    template = resources.files(__package__).joinpath("assets/templates/scored_card.md.jinja").read_text("utf-8")
    lines = []
    for name in score_columns(ds):
        values = score_values(ds, [name])
        known = values[~np.isnan(values)]
        quantiles = np.quantile(known, [0.05, 0.5, 0.95]).tolist() if len(known) else [float("nan")] * 3
        lines.append({"name": name, "scored": len(known), "quantiles": quantiles})
    status = ds["risk_status"][:] if "risk_status" in ds.column_names else []
    missing = np.isnan(score_values(ds, [by]))
    reasons = Counter(why for why, no in zip(status, missing, strict=False) if no) if len(status) else Counter()
    license = license or (ds.info.license or None)
    ours = environment.from_string(template).render(
        rows=len(ds), by=by, repo_id=repo_id, columns=lines, reasons=reasons.most_common(10),
        model=model_text(account), anchors=(account or {}).get("anchors") or {}, source=(account or {}).get("data"),
        license=license, picture=PICTURE_FILE if picture else None, unscored=bool(missing.any()),
    )  # fmt: skip
    section = f"{BEGIN}\n{ours}\n{END}"
    card = DatasetCard(old, ignore_metadata_errors=True) if old else None
    data = card.data.to_dict() if card else {}
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *TAGS]))
    data["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILE}]}]
    if license:
        data["license"] = license
    text = card.text if card else f"# {repo_id}\n"
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    header = str(DatasetCardData(**data, ignore_metadata_errors=True))
    return f"---\n{header}\n---\n{text}"


def plain(text: Any) -> str:
    """Text from outside on one line of a card, as code that neither Markdown nor HTML reads."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split()).replace("`", "'").replace("|", "¦")
    return f"`{line[:200]}`" if line else "not said"


def _repository(api: Any, repo_id: str, private: bool) -> tuple[str, str | None, str | None]:
    """The repository's full name, the commit to build on, and its card; made where it is not there."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        info = api.dataset_info(repo_id)
    except RepositoryNotFoundError:
        made = api.create_repo(repo_id, repo_type="dataset", private=private)
        return made.repo_id, None, None
    if private and not info.private:
        raise InputError(f"{info.id} is public: publish there with private=False (--public), or choose another name")
    try:
        card = Path(api.hf_hub_download(info.id, CARD_FILE, repo_type="dataset", revision=info.sha)).read_text("utf-8")
    except EntryNotFoundError:
        card = None
    others = {f.rfilename for f in info.siblings or []} - {".gitattributes", CARD_FILE}
    if others and (card is None or BEGIN not in card):
        raise InputError(f"{info.id} holds another dataset ({sorted(others)[0]}): choose another name")
    return info.id, info.sha, card


def _picture(values: np.ndarray, by: str) -> bytes | None:
    """A histogram as PNG; `None` where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no histogram in the card: pip install matplotlib")
        return None
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(values[np.isfinite(values)], bins=60, color="#5b7fb5")
    axes.set_xlabel(f"{by} (higher is riskier)", parse_math=False)
    axes.set_ylabel("rows")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


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
