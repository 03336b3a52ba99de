"""Rows in and out of files, folders and the Hub."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..accounts import RUN_FILE
from ..errors import InputError, first_line
from ..files import replacing
from .json_files import check_json, check_json_folder

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SCORED = "scored.parquet"
# By suffix: the Dataset methods that read and write it.
_READERS = {".json": "from_json", ".jsonl": "from_json", ".csv": "from_csv", ".parquet": "from_parquet"}
_WRITERS = {".parquet": "to_parquet", ".jsonl": "to_json", ".csv": "to_csv"}


def read_rows(data: str, split: str | None = None, *, csv_as_text: bool = False) -> Dataset:
    """Rows from a file (json, jsonl, csv, parquet), a folder (saved dataset, `score`'s output, data files) or a Hub id.

    With `csv_as_text` a csv file's cells are text as they stand there: an answer `42` is no number, and `None` not missing.

    Raises:
        InputError: nothing there, several splits and none chosen, or a file that cannot be read; one line.
    """
    return cast("Dataset", _load(data, split, csv_as_text, streaming=False))


def stream_rows(data: str, split: str | None = None, *, csv_as_text: bool = False) -> IterableDataset:
    """The same rows as a stream: read when they are asked for, so that what cannot be read is found then."""
    return cast("IterableDataset", _load(data, split, csv_as_text, streaming=True))


def _load(data: str, split: str | None, csv_as_text: bool, *, streaming: bool) -> Any:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path = Path(data)
    if path.is_dir() and (path / SCORED).is_file():
        path = path / SCORED
    if (path / "plan.json").is_file() and (path / "records").is_dir():
        raise InputError(f"{data} holds shards of score --num-shards: join them first, hf-safefilter merge {data} -o scored")
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise InputError(f"{data}: cannot read {path.suffix or 'a file without a suffix'}; use {_listed(_READERS)}")
            if path.stat().st_size == 0:
                raise InputError(f"{data} is empty")
            if _READERS[path.suffix] == "from_json":
                check_json(path)
            options = _as_text(path) if csv_as_text and path.suffix == ".csv" else {}
            loaded: Any = getattr(IterableDataset if streaming else Dataset, _READERS[path.suffix])(str(path), **options)
        elif path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            loaded = load_from_disk(str(path))
        else:
            if path.is_dir():
                check_json_folder(path)
            loaded = load_dataset(data, streaming=streaming)
    except (RecursionError, StopIteration):  # what the readers raise for deep nesting, and for null bytes
        raise InputError(f"{data} cannot be read: it is nested too deeply, or no text") from None
    except DatasetGenerationError as error:
        raise InputError(f"{data} cannot be read: {first_line(error.__cause__ or error)}") from None
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise InputError(f"no data at {data!r}: not a file or folder here, and not on the Hub ({first_line(error)})") from None
    except (InputError, OSError):
        raise
    except Exception as error:  # what readers raise for a file that is not what it says it is has no bound
        if "corresponds to no data" in str(error):  # what `datasets` says of a table without rows
            raise InputError(f"{data} has no rows") from None
        raise InputError(f"{data} cannot be read: {type(error).__name__}: {first_line(error)}") from None
    if isinstance(loaded, DatasetDict | IterableDatasetDict):
        if split is None and len(loaded) > 1 and "train" not in loaded:
            raise InputError(f"{data} has several splits: choose one with --split, of {_listed(loaded)}")
        split = split or ("train" if "train" in loaded else next(iter(loaded)))
        if split not in loaded:
            raise InputError(f"{data} has no split {split!r}; it has {_listed(loaded)}")
        loaded = loaded[split]
    if streaming and isinstance(loaded, Dataset):
        if not len(loaded):  # a stream of it cannot be made
            raise InputError(f"{data} has no rows")
        loaded = loaded.to_iterable_dataset()
    return loaded


def data_fingerprint(data: str, split: str | None, limit: int | None) -> str:
    """What rows these are: a hash of the content of their files, or the commit on the Hub, and which part of them.

    Raises:
        InputError: the Hub cannot be asked.
    """
    from huggingface_hub import HfApi

    digest = hashlib.sha256(f"{split}\0{limit}\0".encode())
    path = Path(data)
    if is_on_hub(data):
        try:
            digest.update(str(HfApi().dataset_info(data).sha).encode())
        except Exception as error:  # offline, no permission, ...
            raise InputError(f"the commit of {data!r} on the Hub is not known: {first_line(error)}") from None
        return digest.hexdigest()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path)}\0{content}\n".encode())
    return digest.hexdigest()


def is_on_hub(data: str) -> bool:
    """Whether `read_rows` would look for these rows on the Hub: nothing here has that name."""
    return not Path(data).exists()


def account_beside(data: str) -> Path | None:
    """The account of the scoring run that left these rows, where they are `score`'s output."""
    path = Path(data)
    account = (path if path.is_dir() else path.parent) / RUN_FILE
    return account if account.is_file() and (path.is_dir() or path.name == SCORED) else None


def _as_text(path: Path) -> dict[str, Any]:
    """Options of `Dataset.from_csv` that read every cell as text."""
    from datasets import Features, Value

    with path.open(newline="", encoding="utf-8-sig") as file:
        names = next(csv.reader(file), [])
    return {"features": Features({name: Value("string") for name in names}), "keep_default_na": False}


def check_output(path: Path) -> Path:
    """Raise `InputError` where rows cannot be written in the format that the name asks for."""
    if path.suffix not in _WRITERS:
        raise InputError(f"cannot write {str(path)!r}: end its name in {_listed(_WRITERS)}")
    return path


def write_rows(ds: Dataset, path: Path) -> None:
    """Write rows in the format that the name asks for, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(check_output(path)) as temporary:
        getattr(ds, _WRITERS[path.suffix])(str(temporary))


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
