"""What exactly is being scored with: the identity of models, adapters and tokenizers, without their weights.

A cached score is only right if its key names the very weights that made it. A Hub id is resolved to a commit, a folder or a
GGUF file to a hash of its content, a loaded model to a hash of its tensors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError, first_line

if TYPE_CHECKING:
    import torch

# What loading reads from a folder; optimizer states, logs and the like do not change a score.
_READ_SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".gguf", ".py"}


@dataclass(frozen=True)
class Source:
    """A model, adapter or tokenizer: where it is and what it holds.

    `fingerprint` is a commit (Hub) or a SHA-256 of the content (folder, file, loaded object).
    """

    kind: Literal["hub", "folder", "loaded"]
    name: str
    fingerprint: str


def resolve(name: str | Path, *, what: str, probe: str, revision: str | None = None, file: str | None = None) -> Source:
    """Find out what `name` stands for.

    Args:
        name: a folder or a Hub id.
        what: what it should be, for errors ("model", "adapter", "tokenizer").
        probe: a file that such a repository has.
        revision: branch, tag or commit of a Hub id.
        file: the one file that will be read (a GGUF file); without it, all that loading reads.

    Raises:
        InputError: nothing of that name, or a revision for a folder.
    """
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"revision={revision!r} is for Hub ids, but the {what} {str(name)!r} is a folder")
        names = [file] if file else sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix in _READ_SUFFIXES)
        if missing := [n for n in [file or probe] if not (path / n).is_file()]:
            raise InputError(f"the {what} folder {str(name)!r} has no {missing[0]}")
        digest = hashlib.sha256()
        for file_name in names:
            stat = (path / file_name).stat()
            digest.update(f"{file_name}\0{_file_hash(path / file_name, stat.st_size, stat.st_mtime_ns)}\n".encode())
        return Source("folder", str(path.resolve()), digest.hexdigest())
    return Source("hub", str(name), _commit(str(name), what, file or probe, revision))


def _commit(repo_id: str, what: str, probe: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repo_id, probe, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(f"no {what} {repo_id!r}{at}: not a folder here, and not on the Hub ({first_line(error)})") from None
    # The cache's layout is snapshots/<commit>/<file>.
    return path.parents[len(Path(probe).parts) - 1].name


@lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; size and time are there so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each process holds a part of it (a `DTensor`, as FSDP2 makes them)."""
    return hasattr(tensor, "to_local")


def _whole(tensor: Any) -> Any:
    """A tensor with all of its parts, on every process; all must ask at once."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def module_stamp(module: torch.nn.Module) -> tuple[Any, ...]:
    """A cheap stamp of a module's weights that changes when they are replaced or written in place.

    Writes through `.data` do not count up a tensor's version, so a few entries of each tensor are looked at too.
    """
    tensors = [t.to_local() if is_sharded(t) else t for t in module.state_dict(keep_vars=True).values()]
    looked_at = [t.detach().flatten()[:: max(1, t.numel() // 16)].float().cpu().numpy().tobytes() for t in tensors]
    return tuple((t.data_ptr(), t._version, sample) for t, sample in zip(tensors, looked_at, strict=True))


def module_source(module: torch.nn.Module) -> Source:
    """The identity of a loaded model: a hash of its configuration and of every tensor in it."""
    import torch

    digest = hashlib.sha256(type(module).__qualname__.encode())
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_whole(tensor.detach()).contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return Source("loaded", type(module).__name__, digest.hexdigest())


def weights_fingerprint(module: torch.nn.Module) -> str:
    """A hash of a model's weights that is the same however they were loaded (Hub, folder, memory; float32 or 16 bits).

    It looks at up to 4096 entries of each parameter, rounded to bfloat16: training moves some of them, a copy none.
    """
    import torch

    digest = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        entries = _whole(p.detach()).flatten()[:: max(1, p.numel() // 4096)].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(entries.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_source(tokenizer: Any) -> Source:
    """The identity of a loaded tokenizer: a hash of its vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(tokenizer.chat_template),
    ]
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass"))
    return Source("loaded", type(tokenizer).__name__, digest.hexdigest())
