"""Train ``llava-smollm2``: first the tower, told what covers each patch; then everything, by what is said of images.

    python -m headscope.interp.laboratory.llava.training --out runs/llava

The first stage is what makes it work in minutes: a tower from scratch under next-token loss alone was not tried. Step
counts and seeds are fixed; batches depend on the number of loader workers, which is recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from headscope.interp.laboratory.llava.batches import Scenes, visible
from headscope.interp.models.available import LANGUAGE
from headscope.interp.models.llava import RANK, SCALE, tokenizer, trained_part, untrained
from headscope.interp.models.packages import PACKAGED, ensure_packaged
from headscope.interp.prompts.scenes.drawing import arrays, render
from headscope.interp.prompts.scenes.world import CLASSES, COLOURS, balanced_scene
from headscope.interp.runs.measured import hardware

BETAS = (0.9, 0.98)
Log = Callable[..., None]


@dataclass(frozen=True)
class Recipe:
    """Everything that is chosen. Rates are peaks; warm-up steps, then a cosine to a fiftieth."""

    seed: int = 0
    tower_steps: int = 800
    tower_batch: int = 512
    tower_rate: float = 1e-3
    steps: int = 800
    batch: int = 224
    length: int = 224
    rate: float = 8e-4
    rate_of_tower: float = 2e-4
    workers: int = 12
    compiled: bool = True


def schedule(step: int, steps: int, warm_up: int) -> float:
    """The share of the peak rate."""
    return min(1.0, (step + 1) / warm_up) * (0.49 * (1 + math.cos(math.pi * step / steps)) + 0.02)


class Clock:
    """Lines of the training's curve, printed and kept."""

    def __init__(self) -> None:
        self.start, self.lines = time.perf_counter(), list[dict[str, Any]]()

    def __call__(self, **line: Any) -> None:
        line["seconds"] = round(time.perf_counter() - self.start, 1)
        self.lines.append(line)
        print(json.dumps(line), flush=True)


def normal(pixels: Tensor) -> Tensor:
    """As the processor has them."""
    return pixels * 2 - 1


def train_tower(tower: nn.Module, recipe: Recipe, accelerator: Accelerator, log: Log) -> None:
    """Supervise every patch: the class and the colour of what covers most of it (two linear heads, thrown away)."""
    device, width = accelerator.device, 256
    heads = nn.ModuleList([nn.Linear(width, len(CLASSES) + 1), nn.Linear(width, len(COLOURS) + 1)]).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.tower_rate, betas=BETAS, weight_decay=0.05)
    chance, draw = torch.Generator(device).manual_seed(recipe.seed + 11), random.Random(f"tower-{recipe.seed}")
    pool = [t.to(device) for t in arrays([balanced_scene(draw) for _ in range(64 * recipe.tower_batch)])]
    for step in range(recipe.tower_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.tower_rate * schedule(step, recipe.tower_steps, 100)
        # the pool's scenes come again, each time with other noise, hills and shades
        rows = torch.randint(len(pool[0]), (recipe.tower_batch,), generator=chance, device=device)
        things, background, fog = (t[rows] for t in pool)
        drawn = render(things, background, fog, chance)
        wanted = [drawn.patches(drawn.kinds, len(CLASSES)) + 1, drawn.patches(drawn.colours, len(COLOURS)) + 1]
        with accelerator.autocast():
            seen = tower(normal(drawn.pixels)).last_hidden_state[:, 1:]
            guesses = [head(seen).float().flatten(0, 1) for head in heads]
        weight = torch.where(wanted[0] > 0, 1.0, 0.1).flatten()
        parts = [cross_entropy(g, w.flatten(), reduction="none") for g, w in zip(guesses, wanted, strict=True)]
        loss = torch.stack([(part * weight).sum() / weight.sum() for part in parts]).sum()
        _step(optimizer, loss, parameters, accelerator)
        if step % 100 == 0 or step == recipe.tower_steps - 1:
            right = [
                (g.argmax(-1) == w.flatten())[wanted[0].flatten() > 0].float().mean()
                for g, w in zip(guesses, wanted, strict=True)
            ]
            log(stage="tower", step=step, loss=float(loss.detach()), kind=float(right[0]), colour=float(right[1]))


def _step(optimizer: Any, loss: Any, parameters: Iterable[Tensor], accelerator: Accelerator) -> None:
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def with_updates(model: Any) -> Any:
    """The model with trainable low-rank updates at every linear map of its language model, which is frozen."""
    model.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=r".*language_model.*_proj", lora_dropout=0.0)
    adapted = inject_adapter_in_model(config, model)
    for name, parameter in adapted.named_parameters():
        # LLaVA takes patches before the tower's last norm
        seen = "vision_tower" in name and "post_layernorm" not in name
        if seen or "multi_modal_projector" in name or "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    return adapted


def spoken(model: Any, batch: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (token, vocabulary) and targets (token,) of everything that is answered."""
    mask = visible(batch["segment"])
    state = model.model(
        input_ids=batch["ids"],
        pixel_values=normal(pixels),
        position_ids=batch["position"],
        attention_mask=torch.zeros(mask.shape, device=mask.device, dtype=model.lm_head.weight.dtype).masked_fill_(
            ~mask, -math.inf
        ),
        use_cache=False,
    ).last_hidden_state
    answered = batch["target"] >= 0
    return model.lm_head(state[answered]).float(), batch["target"][answered]


def train_all(
    model: Any, words: Any, recipe: Recipe, accelerator: Accelerator, log: Log, keep: Callable[[], None]
) -> None:
    """Tower, projector and low-rank updates, by cross-entropy of answers and captions."""
    tower = [p for n, p in model.named_parameters() if p.requires_grad and "vision_tower" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "vision_tower" not in n]
    groups = [{"params": rest, "peak": recipe.rate}, {"params": tower, "peak": recipe.rate_of_tower}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=BETAS, weight_decay=0.0)
    data = Scenes(words, recipe.batch, recipe.length, recipe.seed)
    loader = iter(DataLoader(data, batch_size=None, num_workers=recipe.workers))
    chance = torch.Generator(accelerator.device).manual_seed(recipe.seed + 12)
    if recipe.compiled:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, recipe.steps, 60)
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in next(loader).items()}
        pixels = render(batch["things"], batch["background"], batch["fog"], chance).pixels
        with accelerator.autocast():
            logits, targets = spoken(model, batch, pixels)
        surprise = cross_entropy(logits, targets, reduction="none")
        weight = batch["weight"][batch["target"] >= 0]
        _step(optimizer, (surprise * weight).sum() / weight.sum(), rest + tower, accelerator)
        if step < 3 or step % 50 == 0 or step == recipe.steps - 1:
            hit, answers = logits.argmax(-1) == targets, weight > 1
            log(
                stage="all",
                step=step,
                captions=[float(surprise.detach()[~answers].mean()), float(hit[~answers].float().mean())],
                answers=[float(surprise.detach()[answers].mean()), float(hit[answers].float().mean())],
                gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
            )
        if step % 100 == 99:
            keep()


def save(model: Any, folder: Path, recipe: Recipe, curve: list[dict[str, Any]], device: str) -> None:
    """The trained part, and ``training.json`` with the recipe and the curve."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {n.replace(".base_layer", ""): v for n, v in get_peft_model_state_dict(model).items()}
    vision, language = trained_part(model, named)
    save_file(vision, folder / "vision.safetensors")
    save_file(language, folder / "language.safetensors")
    digest = hashlib.sha256()
    for name in ("vision.safetensors", "language.safetensors"):
        digest.update((folder / name).read_bytes())
    told = {
        "revision": digest.hexdigest(),
        "device": device,
        "torch": torch.__version__,
        "recipe": asdict(recipe),
        "curve": curve,
    }
    (folder / "training.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train by the recipe and write the trained part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(Recipe()).items():
        kind: Any = (lambda text: text == "True") if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    given = vars(parser.parse_args())
    out = given.pop("out")
    recipe = Recipe(**given)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    accelerator, log = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no"), Clock()
    device = hardware("cuda" if torch.cuda.is_available() else "cpu")
    folder = ensure_packaged(PACKAGED[LANGUAGE])
    model = untrained(folder)
    if torch.cuda.is_available():
        model.model.language_model.to(torch.bfloat16)
        model.tie_weights()
    model = with_updates(model.to(accelerator.device)).train()
    train_tower(model.model.vision_tower, recipe, accelerator, log)
    train_all(model, tokenizer(folder), recipe, accelerator, log, lambda: save(model, out, recipe, log.lines, device))
    save(model, out, recipe, log.lines, device)


if __name__ == "__main__":
    main()
