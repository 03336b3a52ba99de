"""Model, adapter and tokenizer from a Hub id, a folder or a GGUF file; safetensors or GGUF only, never pickles."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError

from ..errors import InputError, first_line
from .identity import Source, module_stamp, resolve

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# The device that stands for all of them: layers are spread over the GPUs by `device_map="auto"`.
SPREAD = "auto"

# Loaded models and tokenizers by fingerprint: a scorer that was built from them finds them here after unpickling in the
# same process or in a fork of it. Weak: the registry must not keep a model alive.
_LOADED: WeakValueDictionary[str, Any] = WeakValueDictionary()
# The stamps that registered models had: one that was trained on since is not what its fingerprint says.
_STAMPS: dict[str, Any] = {}

# What from_pretrained raises for a repository that is missing, damaged or of another kind.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to load the model again, as plain values; part of the cache key."""

    model: Source
    tokenizer: Source
    dtype: str
    gguf_file: str | None = None
    adapter: Source | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `dataclasses.asdict`."""
        sources = {name: data[name] and Source(**data[name]) for name in ("model", "tokenizer", "adapter")}
        return cls(**{**data, **sources})


def named_spec(
    model: str,
    tokenizer: Source | str | Path | None = None,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
) -> ModelSpec:
    """What to load for a model named by a Hub id, a folder or the path of a `.gguf` file; the tokenizer is its own by default.

    Raises:
        InputError: nothing of that name, or an unknown dtype.
    """
    if gguf_file is None and model.endswith(".gguf") and Path(model).is_file():
        model, gguf_file = str(Path(model).parent), Path(model).name
    source = resolve(model, what="model", probe="config.json", revision=revision, file=gguf_file)
    adapter_from = None if adapter is None else resolve(adapter, what="adapter", probe="adapter_config.json")
    if isinstance(tokenizer, str | Path):
        tokenizer = resolve(tokenizer, what="tokenizer", probe="tokenizer_config.json")
    return ModelSpec(source, tokenizer or source, resolve_dtype(dtype, device), gguf_file, adapter_from)


def register(source: Source, loaded: Any, stamp: Any = None) -> Source:
    """Make a loaded object available to scorers that name its `source`, returned; `stamp` is a model's `module_stamp`."""
    _LOADED[source.fingerprint] = loaded
    _STAMPS[source.fingerprint] = stamp
    return source


def registered(source: Source, what: str = "model") -> Any:
    """The loaded object of this source.

    Raises:
        InputError: this process does not hold it, or it is a model that was trained on since.
    """
    loaded = _LOADED.get(source.fingerprint)
    if loaded is None:
        raise InputError(
            f"this scorer was built from a loaded {what} ({source.name}) that this process does not hold; "
            f"pass a Hub id or a folder to use it in another process"
        )
    if (stamp := _STAMPS[source.fingerprint]) is not None and stamp != module_stamp(loaded):
        raise InputError(
            f"the loaded {what} ({source.name}) has changed since this copy of its scorer was made; make a new one"
        )
    return loaded


def default_device() -> str:
    """`cuda`, `mps` or `cpu`, found without starting CUDA, so that worker processes can still be forked."""
    if torch.cuda.device_count():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(dtype: str | torch.dtype, device: str | None) -> str:
    """The name of the dtype to load weights in; `"auto"` is bfloat16 where the device multiplies it fast, else float32.

    CUDA is taken to be fast at it (Ampere or newer): asking the device would start CUDA in the parent process.

    Raises:
        InputError: not `"auto"` or one of `DTYPES`.
    """
    name = str(dtype).removeprefix("torch.")
    if name in DTYPES:
        return name
    if name != "auto":
        raise InputError(f"dtype must be 'auto', {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    kind = torch.device(default_device() if device in (None, SPREAD) else device).type
    if kind == "cuda":
        return "bfloat16"
    if kind == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"):
            return "bfloat16"
    return "float32"


def load(spec: ModelSpec, device: str) -> tuple[Any, Any]:
    """The model, on `device` (`SPREAD`: all) and in evaluation mode unless it was given loaded, and its tokenizer.

    Raises:
        InputError: not a causal language model, damaged or incomplete weights, an adapter that does not fit.
    """
    tokenizer = load_tokenizer(spec)
    if spec.model.kind == "loaded":
        return registered(spec.model), tokenizer
    spread = device == SPREAD
    if device == "cpu" and spec.dtype in ("bfloat16", "float16") and resolve_dtype("auto", device) == "float32":
        logger.warning("this processor multiplies %s many times slower than float32, which dtype='auto' takes", spec.dtype)
    model = _load_model(spec, spread)
    if spec.adapter is not None:
        model = _merge_adapter(model, spec.adapter)
    return (model if spread else model.to(device)).eval(), tokenizer


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: one that is spread over devices has its embedding there.

    Raises:
        InputError: weights stay on disk or in another memory between calls.
    """
    if away := sorted(name for name, p in model.named_parameters() if p.device.type == "meta"):
        raise InputError(
            f"{len(away)} of the model's weights are offloaded ({away[0]!r} among them): score on devices that hold all of it, "
            "or spread it over processes with FSDP2"
        )
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def check_lm_head(model: Any) -> None:
    """Raise `InputError` where the model gives no token logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise InputError(f"{type(model).__name__} has no language-model head; pass a causal language model (...ForCausalLM)")


def _from(source: Source) -> dict[str, Any]:
    """Arguments of from_pretrained that name exactly this source."""
    pinned = {"revision": source.fingerprint} if source.kind == "hub" else {}
    return {"pretrained_model_name_or_path": source.name, "trust_remote_code": False, **pinned}


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer alone.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if spec.tokenizer.kind == "loaded":
        return registered(spec.tokenizer, "tokenizer")
    gguf = {"gguf_file": spec.gguf_file} if spec.gguf_file and spec.tokenizer == spec.model else {}
    try:
        return AutoTokenizer.from_pretrained(**_from(spec.tokenizer), **gguf)
    except _LOAD_ERRORS as error:
        raise InputError(f"cannot load the tokenizer of {spec.tokenizer.name!r}: {first_line(error)}") from None


def load_config(spec: ModelSpec) -> Any:
    """The model's configuration, without its weights.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoConfig

    gguf = {"gguf_file": spec.gguf_file} if spec.gguf_file else {}
    try:
        return AutoConfig.from_pretrained(**_from(spec.model), **gguf)
    except _LOAD_ERRORS as error:
        raise InputError(f"cannot read the configuration of {spec.model.name!r}: {first_line(error)}") from None


def _load_model(spec: ModelSpec, spread: bool) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {"use_safetensors": True, **({"device_map": SPREAD} if spread else {})}
    if spec.gguf_file:
        # Without dequantize the weights may stay in GGUF blocks, which have no gradients.
        options |= {"gguf_file": spec.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **_from(spec.model), dtype=DTYPES[spec.dtype], output_loading_info=True, **options
        )
    except _LOAD_ERRORS as error:
        raise InputError(f"cannot load the model {spec.model.name!r}: {first_line(error)}") from None
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers would fill these with random numbers and go on.
        raise InputError(
            f"the model {spec.model.name!r} is incomplete: {len(missing)} weights are missing, {missing[0]!r} among them "
            f"(a base model without its language-model head?)"
        )
    check_lm_head(model)
    if spec.gguf_file:
        # Dequantized, it is a model like any other; with these left in, it can be neither trained nor saved.
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer = None
    return model


def _merge_adapter(model: Any, adapter: Source) -> Any:
    try:
        return attach_adapter(model, adapter).merge_and_unload()
    except _LOAD_ERRORS as error:
        raise InputError(f"the adapter {adapter.name!r} does not fit the model: {first_line(error)}") from None


def attach_adapter(model: Any, adapter: Source) -> Any:
    """The model, changed, as a `PeftModel` in evaluation mode with this adapter on top.

    Raises:
        InputError: the adapter cannot be downloaded, has pickled weights only, or does not fit.
    """
    from huggingface_hub import snapshot_download
    from peft import PeftModel

    folder = Path(adapter.name)
    if adapter.kind == "hub":
        files = ["adapter_config.json", "adapter_model.safetensors"]
        try:
            folder = Path(snapshot_download(adapter.name, revision=adapter.fingerprint, allow_patterns=files))
        except _LOAD_ERRORS as error:
            raise InputError(f"cannot download the adapter {adapter.name!r}: {first_line(error)}") from None
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"the adapter {adapter.name!r} has no adapter_model.safetensors (pickled weights are not loaded)")
    try:
        attached: Any = PeftModel.from_pretrained(model, str(folder))
    except _LOAD_ERRORS as error:
        raise InputError(f"the adapter {adapter.name!r} does not fit the model: {first_line(error)}") from None
    return attached.eval()


def context_length(model: Any) -> int:
    """The most tokens that the model reads; without bound where its configuration does not say."""
    return context_length_of(model.config)


def context_length_of(config: Any) -> int:
    """The same, of a configuration."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def accepts_logits_to_keep(model: Any) -> bool:
    """Whether the model can give logits at chosen positions only."""
    return "logits_to_keep" in inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
